"""ADELE: when each class begins to memorise its wrong outlines, and what its correction changes.

Above, the curve of each class with its fit and the epoch of its correction; what the pixels of the
disk whose label is wrong are predicted as, without correction and with it. Below, annotations
before and after, beside the predictions at the end; and all methods, with corrections at the wrong
time as controls.

Reference: Liu et al. 2022, arXiv 2110.03740, figures 1, 2 and 4, on images of our own. Bands and
bars are 95 % intervals of the mean over seeds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures import segmentation_noise as shared
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said, row
from paper_figures.segmentation_noise import CLASSES, FATES, LAST, OURS, PAPER

EXPERIMENT = "segmentation_noise"
STUDY = "Comparison"
PRESET = "shapes"
TOGETHER = ()

METHODS = {
    "ce": ("cross-entropy", Look("#D55E00", "o")),
    "early": ("corrected after epoch 1", Look("#999933", "v")),
    "late": ("corrected late", Look("#AA4499", "^")),
    "adele": ("ADELE", Look("#0072B2", "s")),
    "consistency": ("over scales", Look("#E69F00", "D")),
    "adele_consistency": ("ADELE over scales", Look("#117733", "P")),
}
LABEL = "label accuracy, {} - {}"
ENDS = {"label_accuracy": "labels right at the end (%)", "train_iou": "training IoU (%)"}
COLUMNS = ("image", "annotation", "corrected", "ADELE", "CE")

LEARNS = Said("Wrong pixels are first predicted as what they truly are, then no longer.", PAPER)
FIRST = Said("Classes differ in when they are learned: the large one is before the small.", PAPER)
LABELS = Said("Correcting each class when it is about to be memorised repairs its labels.", PAPER)
MEMORY = Said("... and less of what was wrong is memorised.", PAPER)
TRAIN = Said("... and training images are segmented better.", PAPER)
TEST = Said("... and new images are segmented better.", PAPER)
SCALES = Said("Consistency over scales improves on correction alone.", PAPER)
TOO_EARLY = Said("Before anything is learned, confident predictions are background.", OURS)
TOO_LATE = Said("Once wrong labels are memorised, predictions repeat many of them.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked: [R, E] in percent, by method."""

    run: record.Run
    values: dict[str, dict[str, np.ndarray]]  # column -> method
    onsets: dict[int, np.ndarray]  # class -> f64[R] of ADELE, at most the last epoch + 1
    methods: tuple[str, ...]
    epochs: tuple[float, ...]
    scale: Scale

    @property
    def seeds(self) -> int:
        """Replicas of each method."""
        return len(self.values["test_iou"]["ce"])

    def end(self, column: str, method: str) -> np.ndarray:
        """f64[R]: at the end; of an IoU the mean of the last epochs."""
        last = LAST if column.endswith("iou") else 1
        return self.values[column][method][:, -last:].mean(axis=1)

    def gain(self, column: str, a: str = "adele", b: str = "ce") -> statistics.Paired:
        """Of the ends, a - b over paired seeds."""
        return statistics.paired(self.end(column, a), self.end(column, b))

    def array(self, name: str, method: str) -> np.ndarray:
        """The part of an array that belongs to a method."""
        return self.run.arrays[name].at(cell=method).values


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "segmentation_noise_correction"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    study = _study(reading.only(runs))
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=4.7)
        halves: Any = fig.subfigures(2, 1, height_ratios=(1.0, 1.15))
        above, below = halves
        places = above.subplots(1, 3, width_ratios=(1.25, 1, 1))
        left, *others = below.subplots(1, 3, width_ratios=(2.7, 1, 1))
        rows = _curves(places[0], study)
        for letter, axes, method in zip("bc", places[1:], ("ce", "adele"), strict=True):
            rows += _fates(axes, letter, study, method)
        handles, texts = places[1].get_legend_handles_labels()
        above.legend(handles, texts, loc="outside upper right", ncols=3, columnspacing=1.2)
        _examples(left, study)
        for letter, axes, column in zip("ef", others, ENDS, strict=True):
            rows += _methods(axes, letter, study, column)
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[study.run.fingerprint],
        )
    return paths, claims


def measure(
    runs: Sequence[record.Run], *, figure: str = "segmentation_noise_correction"
) -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    columns = ["label_accuracy", "train_iou", "test_iou"]
    columns += [f"{name}.{c}" for name in (*FATES, "iou") for c in CLASSES]
    values = {
        name: {key[0]: found for key, found in shared.over_epochs(run, name, "method").items()}
        for name in columns
    }
    methods = tuple(reading.value(run, "study", "methods"))
    for needed in ("ce", "adele"):
        if needed not in methods or needed not in values["test_iou"]:
            raise ValueError(f"{reading.where(run)} has no rows for method {needed!r}")
    shapes = {"shown_images": 3, "shown_clean": 3, "shown_labels": 3, "fit": 4}
    shapes |= {"shown_corrected": 4, "shown_predicted": 4}
    for name, ndim in shapes.items():
        reading.array(run, name, ndim, finite=name != "fit")
    epochs = shared.epochs(run)
    if len(values["test_iou"]["ce"][0]) != len(epochs):
        raise ValueError(f"{reading.where(run)} must have rows for each of {len(epochs)} epochs")
    onsets = shared.onsets(run, "method")
    never = len(epochs) + 1.0
    last = {c: np.minimum(found[("adele",)], never) for c, found in onsets.items()}
    return Study(run, values, last, methods, epochs, shared.scale(run))


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.seeds)
    epochs = reading.judging(figure, study.scale, study.seeds, "epochs")
    paired = statistics.paired
    correct = study.values["correct.1"]["ce"]
    lost = paired(correct.max(axis=1), correct[:, -1])
    later = paired(study.onsets[2], study.onsets[1])
    gain, kept = study.gain, study.gain("memorised.1", "ce", "adele")
    return [
        points(lost, "wrong pixels of the disk predicted truly, peak - end, CE", LEARNS,
               at_least=40.0),
        epochs(later, "onset of the square - onset of the disk", FIRST, at_least=1.0),
        points(gain("label_accuracy"), LABEL.format("ADELE", "CE"), LABELS, at_least=1.0),
        points(kept, "wrong pixels of the disk memorised at the end, CE - ADELE", MEMORY,
               at_least=20.0),
        points(gain("train_iou"), f"IoU of training images, last {LAST} epochs, ADELE - CE", TRAIN,
               at_least=6.0),
        points(gain("test_iou"), f"IoU of test images, last {LAST} epochs, ADELE - CE", TEST,
               at_least=0.0),
        *_over_scales(study, points),
        *_controls(study, points),
    ]  # fmt: skip


def _over_scales(study: Study, points: Callable[..., Claim]) -> list[Claim]:
    if "adele_consistency" not in study.methods:
        return []
    found = {column: study.gain(column, "adele_consistency", "adele") for column in ENDS}
    text = "{}, ADELE over scales - ADELE"
    return [
        points(found["label_accuracy"], text.format("label accuracy"), SCALES, at_least=0.0),
        points(found["train_iou"], text.format(f"IoU of training images, last {LAST} epochs"),
               SCALES, at_least=0.0),
    ]  # fmt: skip


def _controls(study: Study, points: Callable[..., Claim]) -> list[Claim]:
    """Corrections at the wrong time."""
    made = []
    if "early" in study.methods:
        name = LABEL.format(METHODS["early"][0], "CE")
        found = study.gain("label_accuracy", "early", "ce")
        made.append(points(found, name, TOO_EARLY, control=True, at_most=0.0))
    if "late" in study.methods:
        name = LABEL.format(METHODS["late"][0], "ADELE")
        found = study.gain("label_accuracy", "late", "adele")
        made.append(points(found, name, TOO_LATE, control=True, at_most=-1.0))
    return made


def _curves(axes: Axes, study: Study) -> list[dict[str, Any]]:
    """The curves of the first whole seed, and when each class was corrected in every seed."""
    rows = []
    first = next(iter(reading.seeds(study.run).whole), 0)
    fits = study.run.arrays["fit"].at(cell="adele", replica=first)
    for i, (c, (name, look)) in enumerate(CLASSES.items()):
        values = study.values[f"iou.{c}"]["adele"]
        axes.plot(study.epochs, values[0], look.marker, ms=2.0, color=look.color, label=name,
                  alpha=0.65, zorder=2)  # fmt: skip
        onset, a, b, power = fits.at(**{"class": c}).values
        if np.isfinite(a):
            t = np.linspace(1.0, len(study.epochs) - onset, 200)
            fit = -100 * a * np.expm1(-b * t**power)
            axes.plot(onset + t, fit, color=look.color, lw=1.3, zorder=3)
        mine = study.onsets[c]
        axes.axvline(mine[0], color=look.color, ls="--", lw=0.8, zorder=1)
        places = np.full(len(mine), 2.0 + 4.0 * i)
        axes.plot(mine, places, "|", color=look.color, ms=6, mew=1.0, zorder=4)
        found = [statistics.bootstrap(column) for column in values.T]
        rows += rows_of("a", f"ADELE: IoU of the {name}, labels of the start", study.epochs, found,
                        study.seeds)  # fmt: skip
        rows.append(row("a", f"onset of the {name}", None, statistics.bootstrap(mine), study.seeds))
    axes.set_ylim(0, 100)
    axes.set_ylabel("training IoU with the annotation (%)")
    axes.legend(loc="lower right", markerscale=2.0)
    _epochs(axes, "a", "fit and onset of each class")
    return rows


def _fates(axes: Axes, letter: str, study: Study, method: str) -> list[dict[str, Any]]:
    name, _ = METHODS[method]
    rows = []
    for fate, (label, look) in FATES.items():
        values = study.values[f"{fate}.1"][method]
        found = curve(axes, study.epochs, values, look, label)
        rows += rows_of(letter, f"{name}: {label}", study.epochs, found, study.seeds)
    if method == "adele":
        axes.axvline(study.onsets[1].mean(), color=CLASSES[1][1].color, ls="--", lw=0.8, zorder=1)
    axes.set_ylim(-3, 103)
    axes.set_ylabel("wrong pixels of the disk (%)" if letter == "b" else "")
    _epochs(axes, letter, name)
    return rows


def _epochs(axes: Axes, letter: str, note: str) -> None:
    axes.set_xlabel("epoch")
    axes.set_xlim(0, None)
    axes.grid(True, axis="y")
    drawing.letter(axes, letter, note)


def _examples(axes: Axes, study: Study) -> None:
    """A row for each image: what it is, what was said of it, what became of that.

    What became of it is that of seed 0, if no member of it diverged.
    """
    images, true, noisy = (
        study.run.arrays[f"shown_{name}"].values for name in ("images", "clean", "labels")
    )
    step = 1.07
    parts = [noisy]
    if 0 not in reading.seeds(study.run).lost:
        parts += [study.array("shown_corrected", "adele")]
        parts += [study.array("shown_predicted", method) for method in ("adele", "ce")]
    limit = np.abs(images).max()
    for i, clean in enumerate(true):
        y = i * step
        shared.picture(axes, images[i], 0.0, y, cmap="gray", vmin=-limit, vmax=limit)
        for j, part in enumerate(parts):
            shared.mask(axes, part[i], (j + 1) * step, y, clean)
    for j, text in enumerate(COLUMNS[: len(parts) + 1]):
        axes.text(j * step + 0.5, -0.05, text, fontsize=7, ha="center", va="bottom")
    axes.set_xlim(0, len(COLUMNS) * step - (step - 1))
    axes.set_ylim(len(true) * step - (step - 1), -0.32)
    axes.axis("off")
    drawing.letter(axes, "d", "")


def _methods(axes: Axes, letter: str, study: Study, column: str) -> list[dict[str, Any]]:
    """How every method ends."""
    rows, names = [], [name for name in METHODS if name in study.methods]
    for i, method in enumerate(names):
        text, look = METHODS[method]
        e = statistics.bootstrap(study.end(column, method))
        known = np.isfinite([e.low, e.high]).all()
        ends = [[e.mean - e.low], [e.high - e.mean]] if known else None
        axes.errorbar([e.mean], [i], xerr=ends, color=look.color, marker=look.marker, ls="",
                      elinewidth=0.9)  # fmt: skip
        rows.append(row(letter, f"{text}: {column}", None, e, study.seeds))
    texts = [METHODS[name][0] for name in names] if letter == "e" else [""] * len(names)
    axes.set_yticks(range(len(names)), texts)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(True, axis="x")
    axes.set_xlabel(ENDS[column])
    drawing.letter(axes, letter, "")
    return rows


def _caption(study: Study) -> str:
    onset = "Dashed and ticks: corrections, of the first and of every seed."
    return (
        f"{study.scale}, {reading.count(study.seeds, 'paired seed')}, each with annotations of its "
        f"own of the same images; IoU is the mean of disk and square "
        f"with the clean labels, in (a) with the annotations. {onset} (d): black lines "
        "are the true outlines; ADELE and CE (cross-entropy) are the predictions of the last epoch."
        + (" Bands and bars are 95 % intervals of the mean." if study.seeds > 1 else "")
    )
