"""Early learning: what becomes of wrong-labelled examples, epoch by epoch, method by method.

Above, the fractions of them that are predicted as they truly are, as their label says, or as
neither, under cross-entropy and under early-learning regularization (ELR), and the accuracy on test
examples. Below, what finds them: the coefficient of their gradient, the rank of their loss, and the
running targets.

Reference: Liu et al. 2020, arXiv 2007.00151, figures 1, B.1 and D.1, on our data and model. Bands
are 95 % intervals of the mean over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Scale
from paper_figures import draw as drawing
from paper_figures import panels, reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said, percent

EXPERIMENT = "early_learning"
STUDY = "Curves"
PRESET = "digits"
TOGETHER = ()

PAPER = "Liu et al. 2020, arXiv 2007.00151"
OURS = f"ours, after {PAPER}"
FATES = {
    "wrong_correct": ("as they truly are", Look("#009E73", "")),
    "wrong_memorised": ("as their label says", Look("#882255", "", "-.")),
    "wrong_other": ("as neither", Look("#777777", "", ":")),
}
METHODS = {"ce": ("cross-entropy", Look("#D55E00", "")), "elr": ("ELR", Look("#0072B2", ""))}
EARLY = 3.0  # the epoch at which losses still tell wrong labels

LEARNS = Said(
    "Networks first predict wrong-labelled examples as what they are, then no longer.", PAPER
)
MEMORISES = Said("Trained long enough with cross-entropy, networks memorise wrong labels.", PAPER)
HOLDS = Said("With early-learning regularization they do not.", PAPER)
BETTER = Said("It generalises better than cross-entropy.", PAPER)
ORACLE = Said(
    "Even than cross-entropy at its best epoch, which clean test labels would tell.", OURS
)
FOUND = Said("Its running targets say which labels are wrong.", OURS)
ALONE = Said("The targets alone do not help: under cross-entropy they follow the labels.", PAPER)
FADES = Said(
    "Wrong labels have large losses early in training, and no longer once memorised.", OURS
)


class Study(NamedTuple):
    """What is drawn of a run, checked: columns [R, T] in percent or as they are."""

    epochs: tuple[float, ...]
    values: dict[tuple[str, str], np.ndarray]  # (method, column)
    noise: float
    strength: float
    beta: float
    scale: Scale

    def of(self, method: str, column: str) -> np.ndarray:
        """[R, T]."""
        return self.values[method, column]

    @property
    def seeds(self) -> int:
        """Replicas of each method."""
        return len(next(iter(self.values.values())))

    @property
    def early(self) -> int:
        """The place of the measured epoch nearest to EARLY."""
        return self.epochs.index(reading.nearest(self.epochs, EARLY))


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "early_learning_memorisation"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=3.9)
        places = fig.subplots(2, 3).flatten()
        rows: list[dict[str, Any]] = []
        for axes, letter, method in zip(places[:2], "ab", METHODS, strict=True):
            rows += _fates(axes, letter, study, method)
        rows += _methods(places[2], "c", study, {"test_accuracy": "-"}, "test accuracy (%)")
        places[2].legend(loc="best")
        fits = {"fit_wrong": "-", "fit_clean": "--"}
        rows += _methods(places[3], "d", study, fits, "gradient coefficient, norm")
        rows += _methods(places[4], "e", study, {"loss_auc": "-"}, "AUC of the loss")
        found = {"recall": "-", "precision": "--"}
        rows += _methods(places[5], "f", study, found, "found by the targets (%)")
        drawing.letter(places[3], "d", "wrong labels; dashed: clean")
        drawing.letter(places[5], "f", "recall; dashed: precision")
        panels.legend(fig, places[0])
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(
    runs: Sequence[record.Run], *, figure: str = "early_learning_memorisation"
) -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    noise = reading.number(run, "rate")
    later = reading.frame(run).filter(pl.col("epoch") > 0, pl.col("method").is_in([*METHODS]))
    values = {}
    epochs: tuple[float, ...] = ()
    for column in (
        "test_accuracy",
        *FATES,
        "loss_auc",
        "fit_wrong",
        "fit_clean",
        "recall",
        "precision",
    ):
        norm = column.startswith("fit")
        within, times = (
            ((0.0, 1.5), 1.0) if norm else ((0.0, 1.0), 1.0 if "auc" in column else 100.0)
        )
        if column == "precision":  # nothing is flagged where there is nothing yet
            later = later.with_columns(pl.col(column).fill_null(1.0))
        options = {"rows": later, "of": column, "within": within, "times": times}
        cells = reading.cells(run, "method", "epoch", **options)
        for method in METHODS:
            epochs = cells.places(method=method)
            if len(epochs) < 2:
                raise ValueError(f"{reading.where(run)} needs two epochs or more of {method!r}")
            values[method, column] = np.stack([cells.of(method, e) for e in epochs], axis=1)
    return Study(
        epochs=epochs,
        values=values,
        noise=noise,
        strength=reading.number(run, "strength"),
        beta=reading.number(run, "beta"),
        scale=reading.scale_of(run, f"{reading.scale(run)}, {percent(noise)} {_kind(run)} noise"),
    )


def _kind(run: record.Run) -> str:
    return str(reading.value(run, "noise")).replace("_", " ")


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.seeds)
    percents = reading.judging(figure, study.scale, study.seeds, "%")
    last = {key: value[:, -1] for key, value in study.values.items()}
    mean, paired = statistics.bootstrap, statistics.paired
    correct, best = study.of("ce", "wrong_correct"), study.of("ce", "test_accuracy").max(axis=1)
    lost = paired(correct.max(axis=1), correct[:, -1])
    elr, ce = (last[method, "test_accuracy"] for method in ("elr", "ce"))
    memorised = {method: mean(last[method, "wrong_memorised"]) for method in METHODS}
    recall = {method: mean(last[method, "recall"]) for method in METHODS}
    auc = 100 * study.of("ce", "loss_auc")
    told = f"AUC of the loss, epoch {study.epochs[study.early]:g} - epoch {study.epochs[-1]:g}, CE"
    return [
        points(lost, "truly predicted, peak - end, CE", LEARNS, at_least=50.0),
        percents(memorised["ce"], "memorised at the end, CE", MEMORISES, at_least=90.0),
        percents(memorised["elr"], "memorised at the end, ELR", HOLDS, at_most=10.0),
        points(paired(elr, ce), "test accuracy, ELR - CE", BETTER, at_least=15.0),
        points(paired(elr, best), "test accuracy, ELR - CE's best epoch", ORACLE, at_least=0.0),
        percents(recall["elr"], "wrong labels found, ELR", FOUND, at_least=93.0),
        percents(mean(last["elr", "precision"]), "right of those found, ELR", FOUND, at_least=93.0),
        points(paired(auc[:, study.early], auc[:, -1]), told, FADES, at_least=8.0),
        percents(recall["ce"], "wrong labels found, CE", ALONE, control=True, at_most=10.0),
    ]


def _fates(axes: Axes, letter: str, study: Study, method: str) -> list[dict[str, Any]]:
    name, _ = METHODS[method]
    rows = []
    for column, (label, look) in FATES.items():
        found = curve(axes, study.epochs, study.of(method, column), look, label)
        rows += rows_of(letter, f"{name}: {label}", study.epochs, found, study.seeds)
    _epochs(axes, letter, name)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("wrong-labelled examples (%)")
    return rows


def _methods(
    axes: Axes, letter: str, study: Study, columns: dict[str, str], text: str
) -> list[dict[str, Any]]:
    rows = []
    for method, (name, look) in METHODS.items():
        for i, (column, line) in enumerate(columns.items()):
            values = study.of(method, column)
            label = "" if i else name
            found: list[Estimate] = curve(
                axes, study.epochs, values, look._replace(line=line), label
            )
            rows += rows_of(letter, f"{name}: {column}", study.epochs, found, study.seeds)
    _epochs(axes, letter, "")
    axes.set_ylabel(text)
    return rows


def _epochs(axes: Axes, letter: str, note: str) -> None:
    axes.set_xlabel("epoch")
    axes.grid(True, axis="y")
    drawing.letter(axes, letter, note)


def _caption(study: Study) -> str:
    return (
        f"{study.scale}. {reading.count(study.seeds, 'paired seed')}, each with wrong labels of "
        f"its own, on one split; ELR: lambda "
        f"{study.strength:g}, beta {study.beta:g}. Evaluation mode, unaugmented inputs."
        + (" Bands are 95 % intervals of the mean." if study.seeds > 1 else " No intervals.")
    )
