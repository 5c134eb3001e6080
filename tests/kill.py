"""Kill a run at random moments, start it again each time, and compare it with an undisturbed one.

    python tests/kill.py --kills 10 [--term 3] [--seed 0]

``--kills`` send SIGKILL, ``--term`` SIGTERM. The final parameters, rows and arrays must be equal
bit for bit and nothing temporary may be left.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

STEPS = 2000


def child(folder: Path) -> None:
    """The run: two probes, many checkpoints, everything that was trained among its arrays."""
    import tiny

    from dynamics import mesh, record, scores
    from dynamics.probes import Evaluate, Score
    from dynamics.record import Table

    p = tiny.problem("mlp", STEPS)

    def compute(points: Sequence[str], recorder: record.Recorder | None) -> list[Table]:
        probes = (
            Evaluate(p.task, p.data, 50, batch_size=20),
            Score(scores.el2n, p.task, p.data, (0, 500, STEPS), "el2n", batch_size=20),
        )
        found = tiny.run(p, mesh.make(2), 4, store=recorder, checkpoint_every=40, probes=probes)
        trained = {f"leaf{i}": x for i, x in enumerate(tiny.leaves(found))}
        return [Table(found.rows, found.arrays | trained)]

    record.completed(folder, ("run",), compute, {"data": "made up"})


def start(folder: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--child", str(folder)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with status {process.returncode}:\n{errors}")


def contents(folder: Path) -> dict[str, object]:
    """What a run left: rows and arrays; ValueError if anything temporary is left."""
    from dynamics import record

    (run,) = [record.read(path.parent) for path in folder.glob("*/done.json")]
    left = [p for p in folder.rglob("*") if "tmp" in p.name or p.name.startswith(".")]
    if left or (folder / "damaged").exists():
        raise ValueError(f"left behind: {left}")
    rows = {name: run.rows[name].to_numpy().tobytes() for name in run.rows.columns}
    return rows | {name: value.tobytes() for name, value in run.arrays.items()}


def newest(folder: Path) -> int:
    steps = [int(p.name) for p in folder.glob("*/checkpoints/*") if p.name.isdigit()]
    return max(steps, default=0)


def undisturbed(folder: Path) -> tuple[float, float]:
    """Seconds to the first checkpoint, and from there to the end."""
    began, process = time.monotonic(), start(folder)
    while not newest(folder) and process.poll() is None:
        time.sleep(0.01)
    first = time.monotonic()
    finish(process)
    return first - began, time.monotonic() - first


def disturbed(folder: Path, signals: list[int], first: float, rest: float, seed: int) -> None:
    """Run to the end, being hit by each signal once on the way, spread over the whole of it."""
    moments = random.Random(seed)
    for number in signals:
        process = start(folder)
        time.sleep(first * moments.uniform(0.8, 1.0) + rest * moments.uniform(0, 2 / len(signals)))
        ended = process.poll() is not None
        process.send_signal(number)
        _, errors = process.communicate()
        expected = {0} if ended or number == signal.SIGTERM else {-signal.SIGKILL}
        # before the loop is entered nothing listens to SIGTERM, and nothing is lost
        if number == signal.SIGTERM and "Traceback" not in errors:
            expected.add(-signal.SIGTERM)
        if process.returncode not in expected:
            raise SystemExit(f"status {process.returncode} after {number}:\n{errors}")
        print(f"  {signal.Signals(number).name}: newest checkpoint {newest(folder)}", flush=True)
    finish(start(folder))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--term", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        calm, rough = Path(folder, "calm"), Path(folder, "rough")
        finish(start(Path(folder, "warm")))  # compiled programs are cached from here on
        first, rest = undisturbed(calm)
        signals = [signal.SIGKILL] * args.kills + [signal.SIGTERM] * args.term
        random.Random(args.seed).shuffle(signals)
        disturbed(rough, [int(s) for s in signals], first, rest, args.seed)
        if contents(calm) != contents(rough):
            raise SystemExit("the disturbed run differs from the undisturbed one")
    print(
        f"{args.kills} kills and {args.term} terminations: equal bit for bit, nothing left behind"
    )
    return 0


if __name__ == "__main__":
    import conftest  # noqa: F401  (the environment the tests run in)

    sys.exit(main())
