"""Draw every figure again, and compare its numbers and claims with those of an earlier version.

    python tests/golden.py OUT [--earlier FOLDER] [--items ITEM ...]

Computes the items (all of them, or those named) into OUT/<item>/runs with the presets whole or
small, draws their figures into OUT/<item>/out, and prints each number, text and claim that is not
what FOLDER/<item>/out has, the OUT of an earlier version: the place, what was there, what is. What
is finished in OUT is not computed again. The exit status is 0 if nothing differs, 1 if something
does or is missing, 2 if an item can't be computed or drawn.

So, before a change that must not change a number, and after it::

    python tests/golden.py before
    python tests/golden.py after --earlier before

Exactly equal numbers can be expected of the same program on the same machine with the same devices
alone. Fingerprints of runs may differ and are not compared; of several figures of one kind the
nearest are compared. ``mnist`` and ``cifar_small`` need their data sets (DYNAMICS_DATA).
"""

import argparse
import csv
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHAPES = "segmentation_noise configs/segmentation_noise/shapes.py --epochs 12 --study.replicas 2"
DOCSTRINGS = (
    "transformer_stability configs/transformer_stability/docstrings.py --steps 40 "
    "--study.replicas 2"
)
ITEMS = {  # name -> the arguments of ``python -m experiments``
    "data_diet": "sweep data_diet configs/data_diet/digits.py",
    "connectivity": "sweep data_diet configs/data_diet/digits_connectivity.py",
    "early": "sweep early_learning configs/early_learning/digits.py",
    "stability": "sweep stability configs/stability/digits.py",
    "theory": "sweep early_learning_theory configs/early_learning_theory/default.py",
    "stability_theory": "sweep stability_theory configs/stability_theory/default.py",
    "seg_comparison": SHAPES,
    "seg_timing": f"{SHAPES} --study timing --study.at 1 3 5",
    "transformer_rates": f"{DOCSTRINGS} --study.every 20 --study.rates 0.003 0.03 0.3",
    "transformer_widths": (
        f"{DOCSTRINGS} --study widths --study.widths 16 32 --study.first 20 --study.last 24"
    ),
    "mnist": (
        "data_diet configs/data_diet/mnist.py --data.num-train 3000 --data.num-test 1000 "
        "--score.replicas 4 --study.replicas 2"
    ),
    "cifar_small": (
        "data_diet configs/data_diet/cifar10_small.py --data.num-train 400 --data.num-test 200 "
        "--score.replicas 2 --study.replicas 2"
    ),
}
DATA = {"mnist", "cifar_small"}  # need files
OLDER = re.compile(r"-[0-9a-f]{8}$")  # of a figure's name: the fingerprint of an older run

Figure = dict[tuple[Any, ...], Any]  # place -> what is there


def main(argv: Sequence[str]) -> int:
    """Carry out the command; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--items", nargs="+", choices=list(ITEMS), default=list(ITEMS))
    options = parser.parse_args(argv)
    lost, count = [], 0
    for item in options.items:
        if not drawn(item, options.out.absolute() / item):
            lost.append(item)
        elif options.earlier is not None:
            found = list(differences(options.earlier / item / "out", options.out / item / "out"))
            count += len(found)
            print(f"{item}: {len(found)} differences", *found, sep="\n  ", flush=True)
    print(f"{count} differences, {len(lost)} items not drawn {' '.join(lost)}".strip())
    return 2 if lost else int(count > 0)


def drawn(item: str, folder: Path) -> bool:
    """Compute and draw an item; whether that worked. What was said is in log.txt beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = (
        ["experiments", *ITEMS[item].split(), "--runs", str(folder / "runs")],
        ["paper_figures", "--runs", str(folder / "runs"), "--out", str(folder / "out")],
    )
    with (folder / "log.txt").open("w") as log:
        for command in commands:
            call = [sys.executable, "-m", *command]
            done = subprocess.run(call, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            if command[0] == "experiments" and done.returncode:
                break
    if not (made := any((folder / "out").glob("*.csv"))):
        print(f"{item}: not drawn, see {folder / 'log.txt'}", flush=True)
    return made


def differences(earlier: Path, now: Path) -> Iterator[str]:
    """A line for each place in which the figures of two folders differ."""
    then, found = figures(earlier), figures(now)
    for name in sorted(then.keys() | found.keys()):
        old, new = then.get(name, []), found.get(name, [])
        if len(old) != len(new):
            yield f"{name}: there were {len(old)} figures, now {len(new)}"
        best = min(
            (
                [line for a, b in zip(old, some, strict=False) for line in changed(a, b)]
                for some in itertools.permutations(new)
            ),
            key=len,
        )
        yield from (f"{name} {line}" for line in best)


def changed(old: Figure, new: Figure) -> list[str]:
    """A line for each place whose number, text or claim is another."""
    found = [(p, old.get(p, "nothing"), new.get(p, "nothing")) for p in {**old, **new}]
    return [
        f"{' '.join(map(str, place))}: {then} -> {now}"
        for place, then, now in found
        if _plain(then) != _plain(now)
    ]


def _plain(value: Any) -> Any:
    """The number of a cell that is one: 20 is 20.0."""
    try:
        return float(value) if isinstance(value, str) and value != "nan" else value
    except ValueError:
        return value


def figures(folder: Path) -> dict[str, list[Figure]]:
    """The figures of a folder by name, those of older runs under the same."""
    out: dict[str, list[Figure]] = {}
    for file in sorted(folder.glob("*.csv")):
        name = OLDER.sub("", file.stem)
        out.setdefault(name, []).append(table(file) | claims(file.with_suffix(".json")))
    return out


def table(file: Path) -> Figure:
    """Each cell of a csv, as its text."""
    with file.open() as f:
        return {
            ("row", i, column): text
            for i, row in enumerate(csv.DictReader(f))
            for column, text in row.items()
        }


def claims(file: Path) -> Figure:
    """Each value of each claim; a figure's name may hold a fingerprint and is left out."""
    return {
        ("claim", i, name): value
        for i, claim in enumerate(json.loads(file.read_text())["claims"])
        for name, value in claim.items()
        if name != "figure"
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
