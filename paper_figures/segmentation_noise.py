"""What the figures of ``experiments.segmentation_noise`` share: reading a run, drawing masks.

It has no ``draw``, so the gallery takes it for no figure.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from dynamics import record
from dynamics.statistics import Scale
from paper_figures import reading
from paper_figures.draw import Look
from paper_figures.reading import Cells

PAPER = "Liu et al. 2022, arXiv 2110.03740"
OURS = f"ours, after {PAPER}"
CLASSES = {1: ("disk", Look("#0072B2", "o")), 2: ("square", Look("#E69F00", "s"))}
FATES = {
    "correct": ("as they truly are", Look("#009E73", "")),
    "memorised": ("as their label says", Look("#882255", "", "-.")),
    "other": ("as neither", Look("#777777", "", ":")),
}
PAPER_WHITE, EDGE = "#F4F4F4", "#000000"
LAST = 5  # epochs that an IoU is averaged over


def over_epochs(
    run: record.Run, of: str, *by: str, **options: Any
) -> dict[tuple[Any, ...], np.ndarray]:
    """f64[R, E] for each value of the columns ``by``: column ``of`` after every epoch.

    ``options`` are those of ``reading.cells``. ValueError: a method with other epochs than
    another's.
    """
    cells: Cells = reading.cells(run, *by, "epoch", of=of, **options)
    keys = dict.fromkeys(key[:-1] for key in cells.values)
    epochs = {key: tuple(sorted(k[-1] for k in cells.values if k[:-1] == key)) for key in keys}
    if len(set(epochs.values())) > 1:
        raise ValueError(f"{reading.where(run)}: its methods have other epochs: {epochs}")
    return {key: np.stack([cells.of(*key, epoch) for epoch in epochs[key]], axis=1) for key in keys}


def epochs(run: record.Run) -> tuple[float, ...]:
    """1, 2, ..., as many as the config says."""
    return tuple(float(e) for e in range(1, int(reading.number(run, "epochs")) + 1))


def scale(run: record.Run) -> Scale:
    """``shapes, 30 images, U-Net of width 8``, of what is trained on."""
    width = reading.number(run, "model", "width")
    text = f"shapes, {len(reading.index(run))} images, U-Net of width {width:g}"
    return reading.scale_of(run, text)


def onsets(run: record.Run, *by: str) -> dict[int, dict[tuple[Any, ...], np.ndarray]]:
    """f64[R] for each class and value of ``by``: the epoch of its correction, infinite if none."""
    rows = reading.frame(run).with_columns(pl.col("^onset.*$").cast(pl.Float64).fill_null(np.inf))
    options = {"rows": rows, "within": (1.0, np.inf), "times": 1.0}
    found = {c: over_epochs(run, f"onset.{c}", *by, **options) for c in CLASSES}
    return {c: {key: values[:, -1] for key, values in one.items()} for c, one in found.items()}


def mask(axes: Axes, labels: np.ndarray, x: float, y: float, true: np.ndarray | None) -> None:
    """Labels [h, w] in the colours of their classes, the outlines of what is true over them.

    The upper left corner is at (x, y), a side is 1 long, y points down.
    """
    colors = np.ones((*labels.shape, 3)) * np.array(_rgb(PAPER_WHITE))
    for c, (_, look) in CLASSES.items():
        colors[labels == c] = 0.35 * np.ones(3) + 0.65 * np.array(_rgb(look.color))
    picture(axes, colors, x, y)
    if true is not None:
        height, width = true.shape
        lines = [
            [(x + a / width, y + b / height) for b, a in segment]
            for c in CLASSES
            for segment in outline(true == c)
        ]
        axes.add_collection(LineCollection(lines, colors=EDGE, linewidths=0.6, zorder=3))


def picture(axes: Axes, image: np.ndarray, x: float, y: float, **options: Any) -> None:
    """An image whose upper left corner is at (x, y) and whose side is 1."""
    place = (x, x + 1, y + 1, y)
    axes.imshow(image, extent=place, interpolation="nearest", aspect="equal", **options)


def outline(region: np.ndarray) -> list[list[tuple[int, int]]]:
    """The pixel edges (row, column) to (row, column) between a region and what is outside it."""
    padded = np.pad(region, 1)
    below = np.argwhere(padded[1:] != padded[:-1])  # between rows
    beside = np.argwhere(padded[:, 1:] != padded[:, :-1])
    rows = [[(int(i), int(j) - 1), (int(i), int(j))] for i, j in below]
    return rows + [[(int(i) - 1, int(j)), (int(i), int(j))] for i, j in beside]


def _rgb(color: str) -> Sequence[float]:
    return [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
