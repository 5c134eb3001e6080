"""``python -m experiments export RUN``: scores and a chosen subset, for use elsewhere.

Writes OUT/scores.npz and .parquet: a row for each training example in the order of the dataset,
with ``index`` (its place in the file), ``label`` as trained on, and for each score its mean over
the runs that did not diverge and saw the example, ``<score>`` or ``<score>@<epoch>``, and the
standard error of that mean, ``..._se`` (nan for one run). Where wrong labels were drawn several
times, the labels and the runs are those of the first draw. With --keep also OUT/subset.npz and
.parquet, the rows that are kept. The .json beside them names the run, its config, the hash of the
data, the runs that diverged, if any, and how the subset was chosen.
"""

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dynamics import record, scores, statistics
from runner.errors import Parser

HARD = ", ".join(f"{name} ({end})" for name, end in scores.HARD.items())
KINDS = {name: name for name in scores.HARD} | {f"{name}_init": name for name in scores.HARD}


class Mean(NamedTuple):
    """A score of each example, averaged over runs."""

    value: np.ndarray  # [N]
    error: np.ndarray | None  # [N]: its standard error; None: of a score that no run has a part in
    kind: str  # of ``scores.HARD``
    replicas: int  # that it is over; 0: of a score that no run has a part in


def main(argv: Sequence[str]) -> int:
    """Carry out the command; the exit status. Refused, ValueError or RecordError: it can't be."""
    parser = Parser(
        prog="python -m experiments export",
        allow_abbrev=False,
        description=__doc__,
        epilog=textwrap.fill(f"Which end of a score is hard: {HARD}."),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        type=Path,
        help="folder of a finished run of data_diet, or of its scores",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="folder to write to (default: out)"
    )
    parser.add_argument(
        "--keep", type=float, help="part of the examples to keep, above 0 and up to 1"
    )
    parser.add_argument("--score", help="the score to keep by, as in el2n@5")
    parser.add_argument(
        "--end", choices=("hard", "easy"), help="which end of the score is kept (default: hard)"
    )
    parser.add_argument(
        "--drop",
        type=float,
        default=0.0,
        help="part that is left out first at that end (default: 0)",
    )
    parser.add_argument("--balanced", action="store_true", help="keep the same part of each class")
    parser.add_argument("--seed", type=int, default=0, help="breaks ties (default: 0)")
    options = parser.parse_args(argv)
    print("\n".join(map(str, _export(options))))
    return 0


def _export(options: argparse.Namespace) -> list[Path]:
    given = {name: getattr(options, name) for name in ("score", "end", "drop", "balanced")}
    if options.keep is None and (extra := [name for name, value in given.items() if value]):
        raise ValueError(f"--{extra[0]} says which examples to keep, and needs --keep PART")
    run = record.read(options.run)
    if not run.done:
        raise ValueError(f"{options.run} is not finished: run its command again")
    if not {"index", "labels"} <= run.arrays.keys():
        raise ValueError(f"{options.run} has no scores: it has {sorted(run.arrays)}")
    means = averages(run)
    columns = table(run, means)
    about: dict[str, Any] = {
        "run": run.fingerprint,
        "config": run.config,
        "data": run.provenance.get("data"),
        "replicas": {name: mean.replicas for name, mean in means.items() if mean.replicas},
        "hard": {name: scores.HARD[mean.kind] for name, mean in means.items()},
    }
    if (lost := _lost(run))["diverged"]:
        about |= lost
    paths = record.export(options.out, "scores", columns, about)
    if options.keep is not None:
        rows, how = _subset(options, columns, means)
        kept = {"row": rows, "index": columns["index"][rows], "label": columns["label"][rows]}
        paths += record.export(options.out, "subset", kept, about | {"chosen": how})
    return paths


def _lost(run: record.Run) -> dict[str, list[int]]:
    """``diverged``: the scoring runs that did, of which no number is in the table."""
    runs = run.frames.get(record.SCORED)
    if runs is None:
        return {"diverged": []}
    return {"diverged": sorted(runs.filter(runs["diverged"].is_not_null())["replica"].to_list())}


def averages(run: record.Run) -> dict[str, Mean]:
    """Every score by the name of its column, ``el2n@5``, in the order of the names."""
    found = {}
    for name, array in run.arrays.items():
        if name not in KINDS:
            continue
        if "epoch" not in array.dims:
            found[name] = _mean(run, name, array)
            continue
        for epoch in array.coords["epoch"]:
            found[f"{name}@{epoch:g}"] = _mean(run, name, array.at(epoch=epoch))
    return dict(sorted(found.items()))


def _mean(run: record.Run, name: str, array: record.Array) -> Mean:
    """Over the runs on the first draw's labels that did not diverge. ValueError: there are none."""
    if "replica" not in array.dims:
        return Mean(array.values, None, KINDS[name], 0)
    scored, labels = run.frames["scored"].sort("replica"), run.arrays["labels"].values
    alike = (labels == labels[0]).all(axis=1)[scored["draw"].to_numpy()]
    whole = array.values[alike & scored["diverged"].is_null().to_numpy()]
    if not len(whole):
        raise ValueError(f"no run of {name} is left that did not diverge")
    value, error = statistics.over_replicas(whole)
    return Mean(value, error, KINDS[name], len(whole))


def table(run: record.Run, means: dict[str, Mean]) -> dict[str, np.ndarray]:
    """The columns of all scores, and what is known of the examples."""
    columns = {"index": run.arrays["index"].values, "label": run.arrays["labels"].values[0]}
    columns |= {"clean": run.arrays["clean"].values} if "clean" in run.arrays else {}
    columns |= {"mislabelled": run.arrays["mislabelled"].values[0]}
    for name, mean in means.items():
        columns[name] = mean.value
        columns |= {} if mean.error is None else {f"{name}_se": mean.error}
    return columns


def _subset(
    options: argparse.Namespace, columns: dict[str, np.ndarray], means: dict[str, Mean]
) -> tuple[np.ndarray, dict[str, Any]]:
    if options.score not in means:
        near = difflib.get_close_matches(options.score or "", means, 1)
        perhaps = f"; perhaps {near[0]}" if near else ""
        got = options.score or "none"
        raise ValueError(f"--score must be one of {', '.join(means)}, got {got}{perhaps}")
    n, keep, drop, end = len(columns["index"]), options.keep, options.drop, options.end or "hard"
    if not (0 < keep <= 1 and 0 <= drop and keep + drop <= 1 + 1e-9 and round(keep * n)):
        raise ValueError(
            f"--keep must keep one of {n} examples or more and --keep + --drop be at most 1, got "
            f"{keep:g} and {drop:g}"
        )
    if options.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {options.seed}")
    mean = means[options.score]
    high = (scores.HARD[mean.kind] == "high") == (end == "hard")
    count, dropped = round(keep * n), round(drop * n)
    dropped = min(dropped, n - count)
    rows = scores.window(
        mean.value if high else -mean.value,
        count,
        drop=dropped,
        labels=columns["label"] if options.balanced else None,
        seed=options.seed,
    )
    names = ("score", "end", "keep", "drop", "balanced", "seed")
    how = {name: getattr(options, name) for name in names}
    return rows, how | {"end": end, "count": count}
