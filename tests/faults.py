"""Hit a run with faults at random moments, start it again each time, and count what comes out.

    python tests/faults.py --rounds 200 [--seed 0] [--only "full disk"] [--at-once 2]

A round is one run with checkpoints, probes, rows and arrays, one fault, and the same command again
until it ends. Everything is chosen by the seed; when a fault falls is a matter of the machine, too.
What is counted is in docs/faults.md. Status 1 unless every outcome is one of ``GOOD``.
"""

import argparse
import collections
import contextlib
import ctypes
import datetime
import glob
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

STEPS, EVERY, REPLICAS = 240, 20, 4
POINTS = {"all": slice(0, 4), "left": slice(0, 2), "right": slice(2, 4)}
CASES = (("all",), ("left", "right"))  # a run of its own, and two that are computed as a group
HANG = 120.0  # seconds for what takes 3 on a quiet machine
STARTS = 3

EXACT, ERROR = "resumed bit-exact", "stopped with one clear error"
GOOD = (EXACT, ERROR)
BAD = ("silent corruption", "fresh start", "hang", "unclear error")

MOMENTS = ("start-up", "training", "saving", "finishing")
FILES = {
    "checkpoint arrays": r"/checkpoints/\d+/(state|probes)/.*(d/|ocdbt)",
    "checkpoint metadata": r"/checkpoints/\d+/",
    "checksums": r"/checksums/",
    "rows.jsonl": r"/rows\.jsonl$",
    "sums.jsonl": r"/sums\.jsonl$",
    "frames": r"/frames/[^.]",
    "arrays": r"/arrays/[^.]",
    "config.json": r"/config\.json$",
    "provenance.json": r"/provenance\.json$",
    "done.json": r"/done\.json$",
}
DAMAGE = ("flipped bit", "truncated file", "deleted file")
ENVIRONMENT = ("full disk", "file size limit", "no write permission", "clock jumps")
KINDS = ("SIGKILL", "SIGTERM", *ENVIRONMENT, *DAMAGE, *[f"{d}, finished run" for d in DAMAGE])


class Outcome(NamedTuple):
    fault: str
    place: str  # the moment, or the kind of file
    outcome: str
    said: str  # the error, or what is wrong


class Wrong(Exception):
    """An outcome in BAD, and what is wrong."""


# ---- the run, in a process of its own -----------------------------------------------------------


def child(folder: Path, points: Sequence[str], said: Path, limit: int, jumps: list) -> None:
    """Three probes, many checkpoints, everything that was trained among the arrays and weights."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    logging.basicConfig(force=True)
    logging.getLogger("dynamics").setLevel(logging.INFO)
    obey_permissions()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if jumps:
        move_clock(jumps)
    import numpy as np
    import tiny

    from dynamics import fit, mesh, population, record, scores
    from dynamics.probes import Evaluate, Forgetting, Score

    p = tiny.problem("mlp", STEPS)

    def compute(points: Sequence[str], recorder: record.Recorder | None) -> list[record.Findings]:
        probes = (
            Evaluate(30, batch_size=20),
            Score(scores.el2n, (0, 100, STEPS), "el2n", batch_size=20),
            Forgetting(len(p.data), 90),
        )
        options: dict[str, Any] = {"store": recorder, "checkpoint_every": EVERY, "probes": probes}
        found = tiny.run(p, mesh.make(2), REPLICAS, **options)
        frames = {"rows": found.rows, "status": found.status} | found.measured
        arrays = {".".join(key): array for key, array in found.arrays.items()}
        for i, x in enumerate(tiny.leaves(found)):
            dims = ("member", *(f"axis_{axis}" for axis in range(x.ndim - 1)))
            arrays[f"leaf{i}"] = record.Array(x, dims, {"member": np.arange(REPLICAS)})
        findings = []
        for point in points:
            members = list(range(REPLICAS)[POINTS[point]])
            own = {n: frame.filter(frame["member"].is_in(members)) for n, frame in frames.items()}
            some = {name: array.among("member", members) for name, array in arrays.items()}
            state = population.take(found.state, members)
            findings.append(record.Findings(own, some, {"last": state}))
        return findings

    def keep(home: Path, found: record.Findings) -> None:
        for name, state in found.weights.items():
            fit.save(home / "weights" / name, state)

    try:
        record.completed(folder, points, compute, {"data": "made up"}, keep)
    finally:  # what it ends with can be said
        without = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, without)


def obey_permissions() -> None:
    """Give up root's right to write where no one may, so that a removed permission is one."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Sets(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

    header, sets, libc = Header(0x20080522, 0), (Sets * 2)(), ctypes.CDLL(None, use_errno=True)
    if libc.capget(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capget")
    sets[0].effective &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    if libc.capset(ctypes.byref(header), sets):
        raise OSError(ctypes.get_errno(), "capset")


def move_clock(jumps: list[tuple[float, float]]) -> None:
    """From so many seconds after now on, the time of day is off by so many days."""
    began = time.monotonic()
    now, now_ns, local, utc, real = (
        *(time.time, time.time_ns, time.localtime, time.gmtime),
        datetime.datetime,
    )

    def off() -> float:
        passed = [days for after, days in jumps if time.monotonic() - began >= after]
        return 86400 * passed[-1] if passed else 0.0

    class Moved(real):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.fromtimestamp(now() + off(), tz)

    time.time = lambda: now() + off()
    time.time_ns = lambda: now_ns() + int(off()) * 10**9
    time.localtime = lambda at=None: local(now() + off() if at is None else at)
    time.gmtime = lambda at=None: utc(now() + off() if at is None else at)
    datetime.datetime = Moved


SERVER = multiprocessing.get_context("forkserver")  # jax is imported once, not in each process


def log(folder: Path) -> Path:
    """Where a run's process says what it says: not on a disk that may be full."""
    return folder.parent.with_suffix(".said")


def start(folder: Path, points: Sequence[str], limit: int = 0, jumps: Any = ()) -> BaseProcess:
    log(folder).write_bytes(b"")
    process = SERVER.Process(target=child, args=(folder, points, log(folder), limit, list(jumps)))
    process.start()
    return process


def ended(process: BaseProcess, folder: Path) -> tuple[int, str]:
    """The status, and what was said. Wrong: it hangs."""
    process.join(HANG)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise Wrong("hang", log(folder).read_text()[-2000:])
    return process.exitcode, log(folder).read_text(errors="replace")


# ---- what a run left ----------------------------------------------------------------------------


def of_points(folder: Path, points: Sequence[str]) -> list[Path]:
    """The directories of points."""
    from dynamics import config

    return [folder / config.fingerprint(point) for point in points]


def differences(path: Path, calm: Path) -> list[str]:
    """What differs between a run as read and the undisturbed one: bits, no tolerance.

    One that goes on may have no more than the first rows and some steps of the arrays; of a group,
    the config is another, and all members' rows are there.
    """
    import numpy as np

    from dynamics import record

    run, whole = record.read(path), record.read(of_points(calm, ["all"])[0])
    same = calm / path.name
    truth = record.read(same) if same.exists() else None
    found = [] if truth is None or run.config == truth.config else ["config"]
    made = [{**r.provenance, "started": 0, "command": 0} for r in (run, truth or whole)]
    found += ["provenance"] * (made[0] != made[1])
    expected = truth if run.done and truth is not None else whole
    if run.done and (run.frames.keys(), run.arrays.keys()) != (
        expected.frames.keys(),
        expected.arrays.keys(),
    ):
        found.append("names of frames or arrays")
    for name, frame in run.frames.items():
        wanted = expected.frames[name] if run.done else expected.frames[name][: len(frame)]
        same = frame.schema == wanted.schema and frame.equals(wanted)
        found += [f"frame {name}"] * (not same)
    for name, array in run.arrays.items():
        wanted = expected.arrays[name]
        if not run.done:
            wanted = wanted.among("step", array.coords["step"].tolist())
        labels = all(np.array_equal(wanted.coords[d], c) for d, c in array.coords.items())
        if (
            not labels
            or (array.dims, array.values.dtype) != (wanted.dims, wanted.values.dtype)
            or array.values.tobytes() != wanted.values.tobytes()
        ):
            found.append(f"array {name}")
    return found + kept(path, expected) * run.done


def kept(path: Path, expected: Any) -> list[str]:
    """What differs between the weights of a finished run and what it trained."""
    import jax
    import numpy as np

    from dynamics import fit

    state = fit.load(path / "weights" / "last")
    leaves = [np.asarray(x) for x in jax.tree.leaves((state.params, state.extras))]
    wanted = [expected.arrays[f"leaf{i}"].values for i in range(len(leaves))]
    same = all(a.tobytes() == b.tobytes() for a, b in zip(leaves, wanted, strict=True))
    return [] if same else ["weights"]


def look(folder: Path, calm: Path) -> None:
    """Read everything there is. Wrong: other data than the undisturbed run's, and no error."""
    from dynamics import record
    from dynamics.checkpoint import CheckpointError

    for path in sorted(folder.iterdir()):
        try:
            found = differences(path, calm)
        except (record.RecordError, CheckpointError, OSError) as error:
            if str(path) not in str(error):
                raise Wrong("unclear error", f"read: {error!r}") from error
        except Exception as error:
            raise Wrong("unclear error", f"read: {error!r}") from error
        else:
            if found:
                raise Wrong("silent corruption", f"read({path}) has another {', '.join(found)}")


def sealed(folder: Path) -> bool:
    """Whether a checkpoint was ever committed."""
    return any(p.read_bytes().startswith(b'{\n "') for p in folder.glob("*/checksums/*.json"))


def clear_error(said: str, folder: Path) -> str:
    """The one error a start ended with. Wrong: it is not of ours, or doesn't say where."""
    found = re.findall(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception)\b.*(?:\n .*)*)", said, re.M)
    ours = [error for error in found if error.startswith(("CheckpointError", "RecordError"))]
    last = (ours or found or [said[-500:]])[-1]  # a thread of orbax may log another one after it
    ours = re.match(r"(CheckpointError|RecordError|\w*OSError|PermissionError|File\w+Error):", last)
    if not ours or str(folder) not in last or len(last) > 800:
        raise Wrong("unclear error", said[-1500:])
    return last


# ---- faults -------------------------------------------------------------------------------------


def wait_for(moment: str, process: BaseProcess, folder: Path, chance: random.Random) -> None:
    """Return at a random time of that part of a run (or when the process ends before it)."""
    step = chance.randrange(EVERY, STEPS, EVERY)
    pattern = {
        "training": "*/checkpoints/*",
        "saving": "*/checkpoints/*",
        "finishing": "*/arrays/leaf*.npz",
    }.get(moment)
    while pattern is not None and process.exitcode is None:
        found = [Path(p).name for p in glob.glob(str(folder / pattern))]  # while they come and go
        if moment == "training":
            found = [n for n in found if n.isdigit() and int(n) >= step]
        elif moment == "saving":
            found = [n for n in found if "tmp" in n and int(n.split(".")[0]) >= step]
        if found:
            break
        time.sleep(0.002)
    longest = {"start-up": 1.5, "training": 0.2, "saving": 0.03, "finishing": 0.1}[moment]
    process.join(chance.uniform(0, longest))


def files(folder: Path) -> dict[str, list[Path]]:
    """The files of a run by their kind."""
    out = collections.defaultdict(list)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        for kind, pattern in FILES.items():
            if re.search(pattern, str(path)):
                out[kind].append(path)
                break
    return out


def damage(how: str, folder: Path, chance: random.Random) -> str:
    """Damage one file, each kind as likely as any other; the kind."""
    found = files(folder)
    if not found:
        return "nothing there"
    kind = chance.choice(sorted(found))
    path = chance.choice(found[kind])
    content = bytearray(path.read_bytes())
    if how.startswith("deleted"):
        path.unlink()
    elif how.startswith("truncated"):
        path.write_bytes(content[: chance.randrange(len(content))] if content else b"")
    elif content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return kind


def fill(folder: Path, spare: int) -> None:
    """Leave so many bytes on the file system of a folder."""
    free = os.statvfs(folder)
    with (folder / "ballast").open("wb") as file, contextlib.suppress(OSError):
        os.posix_fallocate(file.fileno(), 0, max(free.f_bavail * free.f_frsize - spare, 1))


@contextlib.contextmanager
def place(kind: str, where: Path) -> Iterator[Path]:
    """A folder for a round, on a file system of its own where that is to be filled."""
    where.mkdir()
    mounted = kind == "full disk"
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(where)]
        subprocess.run(command, check=True)
    try:
        (where / "runs").mkdir()
        yield where / "runs"
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(where)], check=True)
        shutil.rmtree(where, ignore_errors=True)


def hit(kind: str, moment: str, folder: Path, points: Any, chance: random.Random) -> tuple:
    """A run with a fault, or one that is killed to be damaged; its status and what it said."""
    limit = chance.randrange(2000, 40000) if kind == "file size limit" else 0
    jumps = [(chance.uniform(0, 3), chance.choice((-1, 1)) * 10 ** chance.uniform(-1, 4.3))]
    jumps += [(chance.uniform(0, 3), 0.0)] * chance.randrange(2)
    process = start(folder, points, limit, jumps if kind == "clock jumps" else ())
    if kind != "file size limit":
        wait_for(moment, process, folder, chance)
    if kind == "full disk":
        fill(folder.parent, chance.choice((0, chance.randrange(100_000))))
    elif kind == "no write permission":
        folders = [Path(p) for p, _, _ in os.walk(folder) if "tmp" not in Path(p).name]
        with contextlib.suppress(FileNotFoundError):
            chance.choice(sorted(folders)).chmod(0o555)
    elif kind == "SIGTERM" and process.exitcode is None:
        process.terminate()
    elif kind == "SIGKILL" or kind in DAMAGE or (kind == "clock jumps" and chance.random() < 0.5):
        process.kill()
    return ended(process, folder)


def one(number: int, kind: str, seed: int, calm: Path, where: Path) -> Outcome:
    """A round: the fault, and what came of it."""
    chance = random.Random(f"{seed} {number}")
    points, at, error = chance.choice(CASES), chance.choice(MOMENTS), ""
    at = "any" if kind == "file size limit" else at
    with place(kind, where / str(number)) as folder:
        try:
            if kind.endswith("finished run"):
                for path in of_points(calm, points):
                    shutil.copytree(path, folder / path.name)
            else:
                for _ in range(chance.randint(1, 3) if kind.startswith("SIG") else 1):
                    status, said = hit(kind, at, folder, points, chance)
                    asked = kind == "SIGTERM" and status == 128 + signal.SIGTERM
                    error = clear_error(said, folder) if status > 0 and not asked else ""
                    look(folder, calm)
            begun = sealed(folder)
            if kind.startswith(DAMAGE):
                at = damage(kind, folder, chance)
            if kind == "clock jumps":
                for path in folder.rglob("*"):
                    then = time.time() + 86400 * chance.uniform(-5000, 5000)
                    os.utime(path, (then, then))
            return Outcome(kind, at, *again(folder, points, calm, begun, error))
        except Wrong as wrong:
            return Outcome(kind, at, wrong.args[0], wrong.args[1])


def again(folder: Path, points: Any, calm: Path, begun: bool, error: str) -> tuple[str, str]:
    """Give back space and permission, and start the run until it is done; what came of it.

    It is a fresh start if the run was trained from step 0 though a checkpoint was ``begun``: had
    been committed and hashed before the fault.
    """
    folder.with_name("ballast").unlink(missing_ok=True)
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    for _ in range(STARTS):
        look(folder, calm)
        done = all((home / "done.json").is_file() for home in of_points(folder, points))
        status, said = ended(start(folder, points), folder)
        if status == 0:
            if begun and not done and "restored checkpoint" not in said:
                raise Wrong("fresh start", said[-3000:])
            look(folder, calm)
            if not all((home / "done.json").is_file() for home in of_points(folder, points)):
                raise Wrong("unclear error", f"status 0, and not finished: {said[-2000:]}")
            left = [p for p in folder.rglob("*") if "tmp" in p.name or p.name.startswith(".")]
            if left:
                raise Wrong("unclear error", f"left behind: {left}")
            return EXACT, error
        error = clear_error(said, folder)
    return ERROR, error


def undisturbed(calm: Path) -> None:
    """Every case once; compiled programs are cached from here on."""
    calm.mkdir(parents=True)
    for points in CASES:
        status, said = ended(start(calm, points), calm)
        if status:
            raise SystemExit(said)


def table(found: list[Outcome], by: str) -> str:
    """Markdown: a row for each value of a field, a column for each outcome."""
    counts = collections.Counter((getattr(one, by), one.outcome) for one in found)
    lines = [
        f"| {by} | faults | {' | '.join((*GOOD, *BAD))} |",
        "|---" * (len(GOOD + BAD) + 2) + "|",
    ]
    for row in [*dict.fromkeys(getattr(one, by) for one in found), None]:
        names = {name for name, _ in counts if row in (None, name)}
        cells = [sum(counts[name, outcome] for name in names) for outcome in (*GOOD, *BAD)]
        lines.append(f"| {row or 'all'} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first round")
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    alone = ["unshare", "--map-root-user", "--mount"]  # where a file system may be mounted
    can = shutil.which("unshare") and not subprocess.run([*alone, "true"]).returncode
    if can and not args.inside:
        command = [*alone, sys.executable, __file__, *(argv or sys.argv[1:]), "--inside"]
        return subprocess.run(command).returncode
    kinds = [kind for kind in args.only or KINDS if can or kind != "full disk"]
    if not can:
        print("no file system can be mounted here: 'full disk' is left out")
    SERVER.set_forkserver_preload(["tiny", "dynamics.fit", "dynamics.probes", "dynamics.scores"])
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as where, ThreadPoolExecutor(args.at_once) as pool:
        undisturbed(calm := Path(where, "calm", "runs"))

        def play(number: int) -> Outcome:
            return one(number, kinds[number % len(kinds)], args.seed, calm, Path(where))

        began = time.monotonic()
        for number, outcome in enumerate(
            pool.map(play, range(args.first, args.first + args.rounds)), args.first
        ):
            found.append(outcome)
            at, said = f"{time.monotonic() - began:.0f} s", outcome.said
            print(f"{number} [{at}] {', '.join(outcome[:3])}", flush=True)
            if said:
                print("    " + said.strip().replace("\n", "\n    "), flush=True)
    print("", table(found, "fault"), "", table(found, "place"), sep="\n")
    return int(any(one.outcome in BAD for one in found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))  # this project, whatever is installed
    import conftest  # noqa: F401  (the environment the tests run in)

    sys.exit(main())
