"""When to correct: all classes at an epoch that is given, beside the detection of each class.

The part of the pixels whose label is right in the end, and the IoU of the training images with the
clean labels, against the epoch of the one correction.

Reference: Liu et al. 2022, arXiv 2110.03740, who argue that each class has its own time. The sweep
over times is ours. Bands are 95 % intervals of the mean over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale
from paper_figures import draw as drawing
from paper_figures import panels, reading
from paper_figures import segmentation_noise as shared
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said, row
from paper_figures.segmentation_noise import CLASSES, LAST, OURS, PAPER

EXPERIMENT = "segmentation_noise"
STUDY = "Timing"
PRESET = "shapes"
TOGETHER = ()

GIVEN = Look("#D55E00", "o")
LEVELS = {"adele": ("ADELE", Look("#0072B2", "", "-")), "ce": ("none", Look("#777777", "", "--"))}
PANELS = {"label_accuracy": "labels right at the end (%)", "train_iou": "training IoU (%)"}

DETECTS = Said("Correcting each class at its detection beats a time that knows nothing.", PAPER)
ORACLE = Said("It comes near the best time in hindsight, which clean labels would tell.", OURS)
TOO_EARLY = Said("Before anything is learned, confident predictions are background.", OURS)
TOO_LATE = Said("The later the correction, the more wrong labels the predictions repeat.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked: f64[R] in percent."""

    run: record.Run
    given: dict[str, np.ndarray]  # column -> f64[R, T]
    levels: dict[str, dict[str, np.ndarray]]  # column -> method -> f64[R]
    at: tuple[float, ...]
    onsets: dict[int, np.ndarray]
    scale: Scale

    @property
    def seeds(self) -> int:
        """Replicas of each epoch."""
        return len(self.given["label_accuracy"])


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "segmentation_noise_timing"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    study = _study(reading.only(runs))
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.5)
        places = fig.subplots(1, 2)
        rows: list[dict[str, Any]] = []
        for letter, axes, column in zip("ab", places, PANELS, strict=True):
            rows += _panel(axes, letter, study, column)
        panels.legend(fig, places[0])
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[study.run.fingerprint],
        )
    return paths, claims


def measure(
    runs: Sequence[record.Run], *, figure: str = "segmentation_noise_timing"
) -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    at = tuple(float(epoch) for epoch in reading.value(run, "study", "at"))
    given, levels = {}, {}
    for column in PANELS:
        last = LAST if column == "train_iou" else 1
        found = shared.over_epochs(run, column, "method", "at")
        ends = {key: values[:, -last:].mean(axis=1) for key, values in found.items()}
        for key in [*(("at", epoch) for epoch in at), *((method, None) for method in LEVELS)]:
            if key not in ends:
                raise ValueError(f"{reading.where(run)} has no rows for method, at = {key}")
        given[column] = np.stack([ends["at", epoch] for epoch in at], axis=1)
        levels[column] = {method: ends[method, None] for method in LEVELS}
    onsets = {c: found["adele", None] for c, found in shared.onsets(run, "method", "at").items()}
    return Study(run, given, levels, at, onsets, shared.scale(run))


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.seeds)
    given, level = study.given["label_accuracy"], study.levels["label_accuracy"]
    best = given[:, int(given.mean(axis=0).argmax())]
    paired, first, last = statistics.paired, study.at[0], study.at[-1]
    text = "label accuracy, {} - {}"
    return [
        points(paired(level["adele"], given.mean(axis=1)),
               text.format("ADELE", "mean over all epochs"), DETECTS, at_least=1.0),
        points(paired(level["adele"], best), text.format("ADELE", "best epoch in hindsight"),
               ORACLE, at_least=-1.0),
        points(paired(given[:, 0], level["ce"]),
               text.format(f"corrected after epoch {first:g}", "none"), TOO_EARLY, control=True,
               at_most=0.0),
        points(paired(given[:, -1], best),
               text.format(f"corrected after epoch {last:g}", "best epoch"), TOO_LATE, control=True,
               at_most=-1.0),
    ]  # fmt: skip


def _panel(axes: Axes, letter: str, study: Study, column: str) -> list[dict[str, Any]]:
    found = curve(axes, study.at, study.given[column], GIVEN, "all classes at once")
    rows = rows_of(letter, f"all classes at once: {column}", study.at, found, study.seeds)
    for method, (name, look) in LEVELS.items():
        e = statistics.bootstrap(study.levels[column][method])
        axes.axhline(e.mean, color=look.color, ls=look.line, lw=0.9, label=name, zorder=2)
        if np.isfinite([e.low, e.high]).all():
            axes.axhspan(e.low, e.high, color=look.color, alpha=0.12, lw=0)
        rows.append(row(letter, f"{name}: {column}", None, e, study.seeds))
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(study.at, [f"{epoch:g}" for epoch in study.at])
    for i, (c, (name, look)) in enumerate(CLASSES.items()):
        there = study.onsets[c][np.isfinite(study.onsets[c])]
        places = np.full(len(there), 0.04 + 0.05 * i)
        axes.plot(there, places, "|", color=look.color, ms=6, mew=1.0, zorder=4,
                  transform=axes.get_xaxis_transform(), label=f"onset of the {name}")  # fmt: skip
    axes.set_xlabel("epoch of the correction")
    axes.set_ylabel(PANELS[column])
    axes.grid(True, axis="y")
    drawing.letter(axes, letter, "")
    return rows


def _caption(study: Study) -> str:
    among = reading.value(study.run, "among")
    again = ", and those before it once more" if among == "active" else ""
    return (
        f"{study.scale}, {reading.count(study.seeds, 'paired seed')}, each with annotations of its "
        f"own of the same images; IoU is the mean of disk and square "
        f"with the clean labels over the last {LAST} epochs. ADELE corrects each class at "
        f"its onset (ticks){again}."
        + (" Bands are 95 % intervals of the mean." if study.seeds > 1 else " No intervals.")
    )
