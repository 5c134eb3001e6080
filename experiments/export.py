"""``python -m experiments export RUN``: scores and a chosen subset, for use elsewhere.

Writes OUT/scores.npz and .parquet: a row for each training example in the order of the dataset,
with ``index`` (its place in the file), ``label`` as trained on, and for each score its mean over
the runs that did not diverge and saw the example, ``<score>``, and the standard error of that mean,
``<score>_se`` (nan for one run). With --keep also OUT/subset.npz and .parquet, the rows that are
kept. The .json beside them names the run, its config, the hash of the data, and how the subset was
chosen.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import record, scores, statistics

HARD = ", ".join(f"{name} ({end})" for name, end in scores.HARD.items())


def main(argv: Sequence[str]) -> int:
    """Carry out the command; the exit status: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments export",
        description=__doc__,
        epilog=textwrap.fill(f"Which end of a score is hard: {HARD}."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="runs/data_diet/<fingerprint> or .../scores/<...>")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder (default: out)")
    parser.add_argument("--keep", type=float, help="part of the examples to keep, above 0 to 1")
    parser.add_argument("--score", help="the score to keep by, as in el2n@5")
    parser.add_argument("--end", choices=("hard", "easy"), default="hard", help="default: hard")
    parser.add_argument("--drop", type=float, default=0.0, help="part left out at that end first")
    parser.add_argument("--balanced", action="store_true", help="the same part of each class")
    parser.add_argument("--seed", type=int, default=0, help="of ties (default: 0)")
    options = parser.parse_args(argv)
    try:
        paths = _export(options)
    except (ValueError, OSError, record.RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


def _export(options: argparse.Namespace) -> list[Path]:
    run = record.read(options.run)
    if not run.done:
        raise ValueError(f"{options.run} is not finished: run its command again")
    if "index" not in run.arrays:
        raise ValueError(f"{options.run} has no scores: it has {sorted(run.arrays)}")
    columns, means = table(run.arrays)
    about: dict[str, Any] = {
        "run": run.fingerprint,
        "config": run.config,
        "data": run.provenance.get("data"),
        "replicas": {name: len(run.arrays[name]) for name in means if run.arrays[name].ndim == 2},
        "hard": {name: scores.HARD[_kind(name)] for name in means},
    }
    paths = record.export(options.out, "scores", columns, about)
    if options.keep is not None:
        rows, how = _subset(options, columns, means)
        kept = {"row": rows, "index": columns["index"][rows], "label": columns["label"][rows]}
        paths += record.export(options.out, "subset", kept, about | {"chosen": how})
    return paths


def table(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The columns of all scores, and the means alone."""
    n = len(arrays["index"])
    columns = {"index": arrays["index"], "label": arrays["labels"]}
    columns |= {name: arrays[name] for name in ("clean", "mislabelled") if name in arrays}
    whole = np.isinf(arrays.get("diverged", np.array([np.inf])))
    means: dict[str, np.ndarray] = {}
    for name, value in sorted(arrays.items()):
        if _kind(name) not in scores.HARD or value.shape[-1:] != (n,):
            continue
        if value.ndim == 1:
            columns[name] = means[name] = value
            continue
        if not (len(whole) == len(value) and whole.any()):
            raise ValueError(f"no run of {name} is left that did not diverge")
        means[name], error = statistics.over_replicas(value[whole])
        columns |= {name: means[name], f"{name}_se": error}
    return columns, means


def _kind(name: str) -> str:
    return name.split("@")[0].removesuffix("_init")


def _subset(
    options: argparse.Namespace, columns: dict[str, np.ndarray], means: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, Any]]:
    if options.score not in means:
        raise ValueError(f"--score must be one of {', '.join(means)}; got {options.score}")
    n, keep, drop = len(columns["index"]), options.keep, options.drop
    if not 0 < keep <= 1 or drop < 0 or keep + drop > 1 + 1e-9:
        raise ValueError(
            f"--keep must be above 0 and --keep + --drop at most 1, got {keep}, {drop}"
        )
    high = (scores.HARD[_kind(options.score)] == "high") == (options.end == "hard")
    count, dropped = round(keep * n), round(drop * n)
    dropped = min(dropped, n - count)
    rows = scores.window(
        means[options.score] if high else -means[options.score],
        count,
        drop=dropped,
        labels=columns["label"] if options.balanced else None,
        seed=options.seed,
    )
    names = ("score", "end", "keep", "drop", "balanced", "seed")
    return rows, {name: getattr(options, name) for name in names} | {"count": count}
