"""Test accuracy against the rate of label noise, for several losses and regularisers; and what
part of the wrong labels each memorises. Last epoch.

Reference: Liu et al. 2020, arXiv 2007.00151, tables 1 and 2, on our data and model, where all
methods see the same noise, initialisation and order of batches. Bands are 95 % intervals of the
mean over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale
from paper_figures import draw as drawing
from paper_figures import panels, reading
from paper_figures.draw import Look
from paper_figures.reading import Cells, Said, percent, row

EXPERIMENT = "early_learning"
STUDY = "Rates"
PRESET = "digits"
TOGETHER = ()

PAPER = "Liu et al. 2020, arXiv 2007.00151"
OURS = f"ours, after {PAPER}"
METHODS = {
    "ce": "cross-entropy",
    "smoothing": "label smoothing",
    "gce": "GCE",
    "sce": "SCE",
    "elr": "ELR",
    "elr_plus": "ELR+",
}
LOOKS = {
    "ce": Look("#D55E00", "s"),
    "smoothing": Look("#E69F00", "D"),
    "gce": Look("#009E73", "^"),
    "sce": Look("#CC79A7", "P"),
    "elr": Look("#0072B2", "o"),
    "elr_plus": Look("#56B4E9", "v"),
}
AT = 0.4  # the rate of the claims

BETTER = Said("Early-learning regularization generalises better than cross-entropy.", PAPER)
ROBUST = Said("It generalises better than losses made to be robust.", PAPER)
PLUS = Said("Two networks, weight averages and mixup improve it further.", PAPER)
CLEAN = Said("On clean labels it costs next to nothing.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by method and rate, in percent
    memorised: Cells  # likewise, where there are wrong labels
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    strength: float
    beta: float
    epochs: float
    noise: str
    scale: Scale


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "early_learning_rates"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.7)
        left, right = fig.subplots(1, 2)
        rows = _panel(left, "a", study, study.accuracy, study.rates)
        left.set_ylabel("test accuracy (%)")
        noisy = tuple(rate for rate in study.rates if rate)
        rows += _panel(right, "b", study, study.memorised, noisy)
        right.set_ylabel("wrong labels memorised (%)")
        panels.legend(fig, left)
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "early_learning_rates") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    accuracy = reading.cells(run, "method", "rate")
    methods = tuple(name for name in METHODS if accuracy.places(method=name))
    if not methods:
        raise ValueError(f"{reading.where(run)} has no method of {list(METHODS)}")
    rates = accuracy.places(method=methods[0])
    if not any(rates):
        raise ValueError(f"{reading.where(run)} needs a rate above 0, got {rates}")
    noisy = reading.frame(run).filter(pl.col("rate") > 0)
    return Study(
        accuracy=accuracy,
        memorised=reading.cells(run, "method", "rate", rows=noisy, of="wrong_memorised"),
        methods=methods,
        rates=rates,
        strength=reading.number(run, "strength"),
        beta=reading.number(run, "beta"),
        epochs=reading.number(run, "epochs"),
        noise=str(reading.value(run, "noise")).replace("_", " "),
        scale=reading.scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(
        figure, study.scale.of(f"{study.scale}, {study.noise} noise"), study.accuracy.replicas
    )
    has, at = set(study.methods), reading.nearest([r for r in study.rates if r], AT)
    where = f"at {percent(at)}"
    claims = []
    if {"elr", "ce"} <= has:
        gained = study.accuracy.paired(("elr", at), ("ce", at))
        claims.append(made(gained, f"ELR - CE {where}", BETTER, at_least=15.0))
    for other in [name for name in ("gce", "sce") if {name, "elr"} <= has]:
        gained = study.accuracy.paired(("elr", at), (other, at))
        claims.append(made(gained, f"ELR - {METHODS[other]} {where}", ROBUST, at_least=0.0))
    if {"elr", "elr_plus"} <= has:
        gained = study.accuracy.paired(("elr_plus", at), ("elr", at))
        claims.append(made(gained, f"ELR+ - ELR {where}", PLUS, at_least=0.0))
    if {"elr", "ce"} <= has and 0.0 in study.rates:
        lost = study.accuracy.paired(("elr", 0.0), ("ce", 0.0))
        claims.append(made(lost, "ELR - CE on clean labels", CLEAN, control=True, at_least=-1.0))
    return claims


def _panel(
    axes: Axes, letter: str, study: Study, cells: Cells, rates: Sequence[float]
) -> list[dict[str, Any]]:
    rows, seeds = [], cells.replicas
    for method in study.methods:
        found = [statistics.bootstrap(cells.of(method, rate)) for rate in rates]
        panels.line(
            axes, [100 * rate for rate in rates], found, METHODS[method], look=LOOKS[method]
        )
        rows += [
            row(letter, METHODS[method], r, e, seeds) for r, e in zip(rates, found, strict=True)
        ]
    axes.set_xticks([100 * rate for rate in rates])
    axes.set_xlabel(f"{study.noise} label noise (%)")
    axes.grid(True, axis="y")
    drawing.letter(axes, letter)
    return rows


def _caption(study: Study) -> str:
    seeds = study.accuracy.replicas
    return (
        f"{study.scale}. {reading.count(seeds, 'paired seed')}, each with wrong labels of its own, "
        f"on one split; the last of {reading.count(study.epochs, 'epoch')}; ELR and ELR+: "
        f"lambda {study.strength:g}, beta {study.beta:g}."
        + (" Bands are 95 % intervals of the mean." if seeds > 1 else " No intervals.")
    )
