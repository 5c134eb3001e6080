"""Means over a numeric axis as lines in a look of the figure's own, and their rows in its csv."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dynamics import statistics
from dynamics.statistics import Estimate
from paper_figures.draw import Look
from paper_figures.reading import row


def curve(
    axes: Axes, x: Sequence[float], values: np.ndarray, look: Look, label: str
) -> list[Estimate]:
    """Means of [R, T] over R as a line, their 95 % intervals as a band; the means."""
    found = [statistics.bootstrap(column) for column in values.T]
    mean, low, high = np.array(found).T
    axes.plot(x, mean, look.line, color=look.color, marker=look.marker, label=label, zorder=3)
    if np.isfinite([low, high]).all():
        axes.fill_between(x, low, high, color=look.color, alpha=0.18, lw=0)
    return found


def rows_of(
    panel: str, series: str, x: Sequence[float], found: Sequence[Estimate], seeds: int
) -> list[dict[str, Any]]:
    """The rows of a figure's csv for one line."""
    return [row(panel, series, at, e, seeds) for at, e in zip(x, found, strict=True)]
