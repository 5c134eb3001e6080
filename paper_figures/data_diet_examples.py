"""Data Diet: the examples at both ends of EL2N.

For each class, as labelled, (a) the training examples of highest EL2N and (b) those of lowest, with
their score. A wrong label has a frame and its true class in the corner.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075; the scores are averaged over runs.
Intervals choose the examples again from the scores of all runs but one; where labels are wrong,
from the labels and the runs of each draw. The first draw is shown.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate
from paper_figures import data_diet, data_diet_scores, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import PAPER
from paper_figures.data_diet_scores import Score, Scores, average, parts

EXPERIMENT = "data_diet"
STUDY = "Ranking"
PRESET = "digits"
TOGETHER = ()

CLASSES = {
    "cifar10": "plane car bird cat deer dog frog horse ship truck".split(),
    "fashion_mnist": "t-shirt pants sweater dress coat sandal shirt shoe bag boot".split(),
}
MOST = 10  # classes drawn
WRONG = "#D55E00"
GAP, STRIP, HEADER = 0.4, 0.34, 0.5  # between classes, under an image, above (a), in images
FEWEST = 4  # runs, so that without one there are still two halves

FOUND = "The examples of highest EL2N are those whose labels are wrong; those of lowest are not."
NO_NEWS = "The largest and smallest inputs are no more often labelled wrongly than one another."
SAME = "Independent runs agree which examples of a class are hard and which easy."
NORM = "The largest and smallest inputs of a class are as hard as one another."
CLEAN = "Where all labels are right none is marked as wrong."


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    scores: Scores
    el2n: np.ndarray  # f64[R, N]
    labels: np.ndarray  # i64[D, N]: trained on in each draw
    clean: list[int]  # [N]: true
    wrong: np.ndarray  # bool[D, N]
    shown: np.ndarray  # i64[2, C, S]: rows of the hardest and of the easiest
    images: np.ndarray  # [2, C, S, H, W] or [2, C, S, H, W, 3], 0..1

    @property
    def mean(self) -> np.ndarray:
        """f64[N]: EL2N averaged over the runs on the labels of the first draw."""
        return average(self.el2n[self.scores.draws.first])

    def extremes(self, hardness: np.ndarray, draw: int) -> np.ndarray:
        """i64[2, C, S] rows at both ends of a score, as the experiment chooses them."""
        order, count = np.argsort(hardness, kind="stable"), self.shown.shape[2]
        labels = self.labels[draw][order]
        classes = [order[labels == c] for c in range(self.shown.shape[1])]
        return np.array([[c[::-1][:count] for c in classes], [c[:count] for c in classes]])

    def apart(self, values: np.ndarray, hardness: np.ndarray, draw: int) -> float:
        """How much larger the mean of ``values`` is at the hard end than at the easy one."""
        hardest, easiest = self.extremes(hardness, draw)
        return float(values[hardest].mean() - values[easiest].mean())


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_examples"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    study = _study(runs)
    claims = _claims(study, name)
    classes, count = min(study.shown.shape[1], MOST), study.shown.shape[2]
    wide = math.ceil(math.sqrt(count))
    tall = math.ceil(count / wide)
    width = classes * (wide + GAP) - GAP
    heights = [HEADER + tall * (1 + STRIP), tall * (1 + STRIP)]  # (b) has the columns of (a)
    with drawing.style("full"):
        fig = drawing.figure("full", height=6.6 / width * sum(heights) + 0.85)
        panels = fig.subplots(2, 1, height_ratios=heights)
        for end, (axes, letter) in enumerate(zip(panels, "ab", strict=True)):
            which = ("highest", "lowest")[end]
            drawing.letter(axes, letter, f"{which} EL2N of each class, as labelled")
            _panel(axes, study, end, wide, classes)
            axes.set_xlim(0, width)
            axes.set_ylim(tall * (1 + STRIP), tall * (1 + STRIP) - heights[end])
            axes.set_axis_off()
        drawing.caption(fig, _caption(study, classes))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(_table(study)),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_examples") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(runs), figure)


def _study(runs: Sequence[record.Run]) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    if len(runs) != 1:
        raise ValueError(f"{EXPERIMENT}: this figure is of one run, got {len(runs)}")
    run, where = runs[0], reading.where(runs[0])
    scores = data_diet_scores.read(run)
    if scores.draws.count < FEWEST:
        raise ValueError(
            f"{where}: score.replicas must be >= {FEWEST} to compare halves of the runs on the "
            f"same labels, got {scores.draws.count}"
        )
    if "shown" not in run.arrays:
        raise ValueError(
            f"{where} has no array 'shown': its data are no images, or a class has fewer examples "
            "than study.shown"
        )
    n = len(reading.index(run))
    shown = reading.array(run, "shown", 3).astype(np.int64)
    labels, clean = (
        reading.array(run, name, ndim).astype(np.int64)
        for name, ndim in (("labels", 2), ("clean", 1))
    )
    stored = run.arrays.get("shown_images")
    images = np.empty(0) if stored is None else stored.values
    color = images.ndim == 6 and images.shape[-1] == 3
    if len(shown) != 2 or shown.min() < 0 or shown.max() >= n:
        raise ValueError(f"{where}: 'shown' must be two ends of rows below {n}, got {shown.shape}")
    if images.shape[:3] != shown.shape or not (color or images.ndim == 5):
        raise ValueError(
            f"{where}: 'shown_images' must be images for 'shown' {shown.shape}, got {images.shape}"
        )
    images = images.astype(np.float64)
    images = (images - min(images.min(), 0)) / (np.ptp(images) or 1.0)
    el2n = scores.hard(Score("el2n", scores.early))
    wrong = data_diet_scores.flags(run, scores.draws)
    study = Study(scores, el2n, labels, clean.tolist(), wrong, shown, images)
    mean = study.mean
    if not np.allclose(mean[shown], mean[study.extremes(mean, 0)]):  # ties may differ
        raise ValueError(f"{where}: 'shown' are not the examples of extreme EL2N in each class")
    return study


# Measuring


def _claims(study: Study, figure: str) -> list[Claim]:
    scores = study.scores
    judge = functools.partial(
        statistics.judge,
        figure=figure,
        paper=PAPER,
        seeds=scores.draws.seeds,
        scale=data_diet.scale(study.scores.run),
    )
    wrong, norm = study.wrong.astype(np.float64), scores.hard(Score("input_norm"))[0]
    half, estimate = scores.draws.count // 2, scores.draws.estimate
    agreed = estimate(lambda some, d: _agreed(study, some, d), study.el2n)
    count = study.shown.shape[2]
    ends = f"{count} hardest - {count} easiest of each class"
    claims = [
        judge(agreed, statement=SAME, unit="EL2N", at_least=0.2,
              quantity=f"{ends}, chosen by {half} runs, measured by {half} others")
    ]  # fmt: skip
    if wrong.any():
        found = estimate(lambda some, d: study.apart(wrong[d], average(some), d), study.el2n)
        found = data_diet.clipped(found, -1.0, 1.0)
        part = functools.partial(judge, unit="of the labels")
        none = estimate(lambda _, d: study.apart(wrong[d], norm, d), study.el2n)
        none = data_diet_scores.size(none)
        claims = [
            part(found, statement=FOUND, quantity=f"wrong, {ends}", at_least=0.5),
            *claims,
            part(none, kind="control", statement=NO_NEWS, at_most=0.25,
                 quantity=f"|wrong, {count} largest - {count} smallest inputs of each class|"),
        ]  # fmt: skip
        return claims
    off = estimate(lambda some, d: study.apart(average(some), norm, d), study.el2n)
    marked = int(study.wrong[0][study.shown].sum())
    return [
        *claims,
        judge(data_diet_scores.size(off), kind="control", statement=NORM, unit="EL2N", at_most=0.15,
              quantity=f"|{count} largest - {count} smallest inputs of each class|"),
        judge(_certain(float(marked)), kind="control", statement=CLEAN, unit="", at_most=0.0,
              quantity="wrong labels among the shown"),
    ]  # fmt: skip


def _agreed(study: Study, replicas: np.ndarray, draw: int) -> float:
    """EL2N at the ends that one half of the replicas chooses, by the other half."""
    half = len(replicas) // 2
    sets = parts(replicas, half)
    pairs = zip(sets, np.roll(sets, -half, axis=0), strict=True)
    return float(np.mean([study.apart(other, one, draw) for one, other in pairs]))


def _certain(value: float) -> Estimate:
    """A number in which nothing that was drawn has a part."""
    return Estimate(value, value, value)


# Drawing


def _panel(axes: Axes, study: Study, end: int, wide: int, classes: int) -> None:
    """A block of images to a class; one unit is the side of an image."""
    mean, names = study.mean, _classes(study)
    gray = study.images.ndim == 5
    for c in range(classes):
        left = c * (wide + GAP)
        if end == 0:
            axes.text(left + wide / 2, -0.06, names[c], fontsize=7, ha="center", va="bottom")
        for s, row in enumerate(study.shown[end, c]):
            x, y = left + s % wide, (s // wide) * (1 + STRIP)
            axes.imshow(study.images[end, c, s], cmap="gray_r" if gray else None, vmin=0, vmax=1,
                        extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04), aspect="equal",
                        interpolation="nearest")  # fmt: skip
            axes.text(x + 0.5, y + 1.14, _number(float(mean[row])), fontsize=5.2, ha="center",
                      va="center", color="#333333")  # fmt: skip
            true = names[study.clean[int(row)]] if study.wrong[0][row] else None
            _frame(axes, x + 0.04, y + 0.04, 0.92, true)


def _frame(axes: Axes, x: float, y: float, side: float, true: str | None) -> None:
    """A thin frame, or one that shows that the label is wrong and what would be right."""
    edge = {"ec": "#BBBBBB", "lw": 0.4} if true is None else {"ec": WRONG, "lw": 1.1}
    axes.add_patch(Rectangle((x, y), side, side, fill=False, zorder=3, **edge))
    if true is not None:
        box = {"boxstyle": "square,pad=0.12", "fc": WRONG, "ec": "none"}
        axes.text(x + side - 0.03, y + side - 0.03, true, fontsize=5, color="white", bbox=box,
                  fontweight="bold", ha="right", va="bottom", zorder=4)  # fmt: skip


def _number(value: float) -> str:
    """Two figures of a score below 1, three of a larger one."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.3f}" if value >= 5e-4 else "<.001"


def _classes(study: Study) -> list[str]:
    source = reading.value(study.scores.run, "data", "source")
    names: Sequence[str] = CLASSES.get(source, ()) if isinstance(source, str) else ()
    count = max(study.shown.shape[1], max(study.clean) + 1)
    return list(names) if len(names) == count else [str(c) for c in range(count)]


def _table(study: Study) -> list[dict[str, Any]]:
    """A row for each image: EL2N against the label, and the true class in the series."""
    mean, index, names = study.mean, reading.index(study.scores.run), _classes(study)
    rows = []
    for end, c, s in np.ndindex(study.shown.shape):
        row = study.shown[end, c, s]
        series = f"true class {names[study.clean[int(row)]]}"
        e = Estimate(float(mean[row]), math.nan, math.nan)
        rows.append(
            reading.row("ab"[end], series, names[c], e, study.scores.draws.count)
            | {"index": int(index[row])}
        )
    return rows


def _caption(study: Study, classes: int) -> str:
    scores = study.scores
    some = study.shown.shape[1]
    text = f"{data_diet.scale(study.scores.run)}. Under each image its EL2N after "
    text += f"{reading.count(scores.early, 'epoch')}, averaged over "
    text += f"{reading.count(scores.draws.count, 'run')}."
    if study.wrong[0][study.shown[:, :classes]].any():
        text += " Framed: the label is wrong; in the corner, the true class."
    return text + (f" The first {classes} of {some} classes." if classes < some else "")
