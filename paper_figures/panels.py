"""What panels are made of: means with their intervals, as lines, levels and bars; their axes."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dynamics.statistics import Estimate, Paired
from paper_figures.draw import LOOKS, Look

Band = Estimate | Paired  # a mean between two ends


def line(
    axes: Axes,
    x: Sequence[float],
    estimates: Sequence[Band],
    name: str,
    *,
    label: str = "",
    hollow: Sequence[bool] = (),
    look: Look | None = None,
) -> None:
    """Means over ``x`` as a line with markers, some ``hollow``, their intervals as a band.

    ``look`` is that of ``name`` in LOOKS unless it is given.
    """
    look = look or LOOKS[name]
    mean, low, high = np.array([(e.mean, e.low, e.high) for e in estimates]).T
    axes.plot(
        x, mean, look.line, color=look.color, marker=look.marker, label=label or name, zorder=3
    )
    empty = [i for i, is_hollow in enumerate(hollow) if is_hollow]
    if empty:
        places = [x[i] for i in empty]
        axes.plot(places, mean[empty], look.marker, color=look.color, mfc="white", zorder=4)
    if np.isfinite([low, high]).all():
        axes.fill_between(x, low, high, color=look.color, alpha=0.18, lw=0)


def level(axes: Axes, estimate: Band, name: str, *, label: str = "") -> None:
    """A mean that depends on no ``x``, across the panel, its interval as a band."""
    look = LOOKS[name]
    axes.axhline(
        estimate.mean, color=look.color, ls=look.line, lw=0.8, label=label or name, zorder=2
    )
    if math.isfinite(estimate.low):
        axes.axhspan(estimate.low, estimate.high, color=look.color, alpha=0.12, lw=0)


def bar(
    axes: Axes,
    at: float,
    e: Band,
    name: str,
    *,
    label: str = "",
    horizontal: bool = False,
    hollow: bool = False,
) -> None:
    """A mean at one place as a marker, its interval as a bar."""
    look = LOOKS[name]
    ends = np.array([[e.mean - e.low], [e.high - e.mean]])
    known = ends if np.isfinite(ends).all() else None
    x, y = (e.mean, at) if horizontal else (at, e.mean)
    axes.errorbar(
        [x],
        [y],
        xerr=known if horizontal else None,
        yerr=None if horizontal else known,
        color=look.color,
        marker=look.marker or "_",
        mfc="white" if hollow else look.color,
        ls="",
        elinewidth=0.9,
        label=label or name,
        zorder=3,
    )


def xticks(axes: Axes, values: Sequence[float], texts: Sequence[str], *, gap: float = 0.07) -> None:
    """A tick at every value, a text where the one before is ``gap`` panel widths away.

    Set the scale and the limits first.
    """
    to_panel = axes.transData + axes.transAxes.inverted()
    places = to_panel.transform([(v, axes.get_ylim()[0]) for v in values])[:, 0]
    labelled: list[int] = []
    for i, place in enumerate(places):
        if not labelled or place - places[labelled[-1]] >= gap:
            labelled.append(i)
    axes.set_xticks([values[i] for i in labelled], [texts[i] for i in labelled])
    axes.set_xticks(values, minor=True)
    axes.tick_params(which="minor", labelbottom=False, labeltop=False)


def aside(count: int, step: float) -> list[float]:
    """``count`` shifts around zero, a ``step`` apart: for what would lie on one another."""
    return [step * (i - (count - 1) / 2) for i in range(count)]


def points_axis(axes: Axes) -> None:
    """Points of accuracy on y, logarithmic beyond 1 on either side, a line at zero."""
    axes.axhline(0, color=LOOKS["random"].color, ls="--", lw=0.8, zorder=1)
    axes.set_yscale("symlog", linthresh=1, linscale=0.6)
    axes.yaxis.set_major_locator(FixedLocator([-100, -30, -10, -3, -1, 0, 1, 3, 10, 30, 100]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_points))
    axes.grid(True, axis="y")


def _points(value: float, _: int) -> str:
    return f"{value:+.0f}".replace("-", "\N{MINUS SIGN}") if value else "0"


def legend(fig: Figure, axes: Axes, *, ncols: int | None = None) -> None:
    """The labels of a panel in a row above all panels."""
    handles, labels = axes.get_legend_handles_labels()
    fig.legend(
        handles, labels, loc="outside upper center", ncols=ncols or len(labels), columnspacing=1.2
    )
