"""Data Diet: how fast the tangent kernel of a group of examples turns, against its EL2N.

Above, the kernel velocity of groups of neighbouring EL2N over each epoch; below, the same divided
by that of the group of lowest EL2N in the same run. A column for each fraction of wrong labels; the
bars are the part of a group whose labels are wrong.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, figure 3 of the submission, on our data
and model; the velocity is that of Fort et al. 2020, arXiv 2010.15110. Bands are 95 % intervals of
the mean over runs, in logarithms below.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate
from paper_figures import data_diet, data_diet_scores, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import PAPER

EXPERIMENT = "data_diet"
STUDY = "Velocity"
PRESET = "digits"
TOGETHER = ("noise",)

WRONG = "#D55E00"
FEWEST = 4  # groups

RISE = "The kernel turns faster for examples of higher EL2N."
RISE_EACH = "It does so in every single run."
FALL = "With wrong labels, it turns slower again for the examples of very highest EL2N."
EVEN = "Groups of neighbours in a random order turn alike."


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    velocity: np.ndarray  # f64[epochs, groups, R], above 0
    epochs: tuple[int, ...]
    ranks: tuple[float, ...]  # of the groups' middles in EL2N, 0..1, rising
    wrong: np.ndarray  # f64[groups]: the part whose labels are wrong, averaged over runs
    control: np.ndarray  # f64[2, R]: logarithms for the ends of a random order, over all epochs
    run: record.Run

    @property
    def top(self) -> int:
        """The group of highest EL2N most of whose labels are right."""
        return int(np.flatnonzero(self.wrong < 0.5)[-1])

    def turned(self) -> np.ndarray:
        """f64[groups, R]: the logarithm of the velocity, averaged over epochs."""
        return np.log(self.velocity).mean(axis=0)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_velocity"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs that differ in their wrong labels; its files, and its claims.

    ValueError: a run lacks something, named.
    """
    studies = [_study(run) for run in runs]
    claims = [claim for study in studies for claim in _claims(study, name)]
    size = "half" if len(studies) == 1 else "full"
    with drawing.style(size):
        fig = drawing.figure(size, height=4.1 if len(studies) == 1 else 3.6)
        panels = fig.subplots(2, len(studies), sharex=True, sharey="row", squeeze=False)
        table = []
        for i, study in enumerate(studies):
            above, below = panels[:, i]
            table += _panel_velocity(above, chr(ord("a") + 2 * i), study)
            table += _panel_ratio(below, chr(ord("b") + 2 * i), study)
        if any(study.wrong.any() for study in studies):  # room for the bars
            low, high = panels[1, 0].get_ylim()
            panels[1, 0].set_ylim(low - 0.25 * (high - low), high)
        panels[0, 0].set_ylabel("kernel velocity")
        panels[1, 0].set_ylabel("ratio to the lowest group")
        handles, labels = panels[1, -1].get_legend_handles_labels()
        fig.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=4 if size == "half" else len(labels),
            columnspacing=1.0,
            handlelength=1.4,
        )
        drawing.caption(fig, _caption(studies))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(table),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_velocity") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for run in runs for claim in _claims(_study(run), figure)]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    where = reading.where(run)
    orders = {order for (order,) in reading.columns(run, "order")}
    if orders != {"el2n", "random"}:
        raise ValueError(f"{where} must have rows of order 'el2n' and 'random', got {orders}")
    by_order = {order: reading.frame(run).filter(pl.col("order") == order) for order in orders}
    options = {"of": "velocity", "within": (0.0, 2.0), "times": 1.0}
    cells = reading.cells(run, "rank", "epoch", rows=by_order["el2n"], **options)
    ranks, epochs = (tuple(sorted({key[i] for key in cells.values})) for i in (0, 1))
    if len(ranks) < FEWEST:
        raise ValueError(f"{where} must have rows of {FEWEST} groups or more, got {len(ranks)}")
    velocity = np.array([[cells.of(rank, epoch) for rank in ranks] for epoch in epochs])
    if not (velocity > 0).all():
        raise ValueError(f"{where}: velocity must be above 0 to compare its sizes")
    parts: dict[float, list[float]] = {}
    for rank, part in reading.columns(run, "rank", "mislabelled", rows=by_order["el2n"]):
        parts.setdefault(round(float(rank), 6), []).append(float(part))
    wrong = np.array([np.mean(parts[rank]) for rank in ranks])  # each replica has its own
    if not ((wrong >= 0) & (wrong <= 1)).all():
        raise ValueError(f"{where}: mislabelled must be a part in [0, 1] for each group")
    if not (wrong < 0.5).any() or wrong[0] >= 0.5:
        raise ValueError(f"{where}: the group of lowest EL2N must have right labels")
    cells = reading.cells(run, "rank", "epoch", rows=by_order["random"], **options)
    ends = [np.log([cells.of(ranks[i], epoch) for epoch in epochs]).mean(axis=0) for i in (0, -1)]
    return Study(velocity, epochs, ranks, wrong, np.array(ends), run)


# Measuring


def _claims(study: Study, figure: str) -> list[Claim]:
    turned = study.turned()
    judge = functools.partial(
        statistics.judge,
        figure=figure,
        paper=PAPER,
        seeds=turned.shape[1],
        scale=data_diet.scale(study.run),
    )
    ratio = functools.partial(judge, unit="times")
    rise = turned[study.top] - turned[0]
    right = " with right labels" if study.top < len(turned) - 1 else ""
    quantity = f"velocity, highest EL2N{right} / lowest"
    share = statistics.bootstrap((rise > 0).astype(float))
    claims = [
        ratio(_times(rise), quantity=quantity, statement=RISE, at_least=1.0),
        judge(share, quantity="runs in which it is above 1", statement=RISE_EACH, at_least=1.0,
              unit="of all"),
    ]  # fmt: skip
    if study.top < len(turned) - 1:
        fall, quantity = _times(turned[-1] - turned[-2]), "velocity, highest EL2N / next highest"
        claims.append(ratio(fall, quantity=quantity, statement=FALL, at_most=1.0))
    even = study.control[1] - study.control[0]
    off = data_diet_scores.size(Estimate(*(end - 1 for end in _times(even))))
    return [
        *claims,
        ratio(off, kind="control", statement=EVEN, at_most=0.1,
              quantity="|velocity, last / first group in a random order - 1|"),
    ]  # fmt: skip


def _times(logarithms: np.ndarray) -> Estimate:
    """The geometric mean over runs, and its interval."""
    mean, low, high = statistics.bootstrap(logarithms)
    if not math.isfinite(low):
        return Estimate(math.exp(mean), low, high)
    return Estimate(math.exp(mean), math.exp(low), math.exp(high))


# Drawing


def _colors(count: int) -> list[Any]:
    """Dark to light, the first epoch darkest."""
    return [matplotlib.colormaps["viridis"](x) for x in np.linspace(0.0, 0.9, count)]


def _panel_velocity(axes: Axes, panel: str, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, panel, data_diet.labels(study.run))
    table = []
    seeds = study.velocity.shape[2]
    for color, epoch, values in zip(_colors(len(study.epochs)), study.epochs, study.velocity,
                                    strict=True):  # fmt: skip
        found = [statistics.bootstrap(group) for group in values]
        mean, low, high = np.array(found).T
        axes.plot(study.ranks, mean, color=color, marker="o", markersize=2.2)
        if np.isfinite(low).all():
            axes.fill_between(study.ranks, low, high, color=color, alpha=0.18, lw=0)
        pairs = zip(study.ranks, found, strict=True)
        table += [reading.row(panel, f"epoch {epoch}", rank, e, seeds) for rank, e in pairs]
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y")
    return table


def _panel_ratio(axes: Axes, panel: str, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, panel)
    table = []
    logs = np.log(study.velocity)
    ratios = logs - logs[:, :1]
    colors, seeds = _colors(len(study.epochs)), study.velocity.shape[2]
    for color, epoch, values in zip(colors, study.epochs, ratios, strict=True):
        mean = np.exp(values.mean(axis=1))
        axes.plot(study.ranks, mean, color=color, lw=0.7, label=f"epoch {epoch}")
    found = [_times(group) for group in ratios.mean(axis=0)]
    mean, low, high = np.array(found).T
    axes.plot(study.ranks, mean, color="black", marker="o", label="mean of epochs", zorder=4)
    if np.isfinite(low).all():
        axes.fill_between(study.ranks, low, high, color="black", alpha=0.13, lw=0, zorder=2)
    pairs = zip(study.ranks, found, strict=True)
    table += [reading.row(panel, "mean of epochs", rank, e, seeds) for rank, e in pairs]
    axes.axhline(1, color="#777777", lw=0.8, ls="--", zorder=1)
    _bars(axes, study)
    pairs = zip(study.ranks, study.wrong.tolist(), strict=True)
    nothing = (math.nan, math.nan)
    table += [reading.row(panel, "wrong labels", rank, Estimate(part, *nothing), None)
              for rank, part in pairs]  # fmt: skip
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.grid(axis="y")
    axes.set_xlabel("rank of the group by EL2N (0: lowest)")
    return table


def _bars(axes: Axes, study: Study) -> None:
    """The part of wrong labels from the bottom, all of them being a sixth of the panel."""
    bottom, width = axes.get_xaxis_transform(), 0.6 * float(np.diff(study.ranks).min())
    for rank, part in zip(study.ranks, study.wrong, strict=True):
        if part:
            axes.bar(rank, part / 6, width, color=WRONG, alpha=0.55, lw=0, transform=bottom)
            axes.text(rank, part / 6 + 0.02, f"{100 * part:.0f} %", fontsize=5.5, color=WRONG,
                      ha="center", va="bottom", transform=bottom)  # fmt: skip


def _caption(studies: Sequence[Study]) -> str:
    study = studies[0]
    config = functools.partial(reading.number, study.run, "study")
    seeds = study.velocity.shape[2]
    bands = "; bands: 95 % intervals" if seeds > 1 else ", no intervals"
    noise = max(float(s.wrong.max()) for s in studies)
    text = (
        f"{data_diet.scale(study.run, noise=False)}; {reading.count(config('epochs'), 'epoch')}; "
    )
    text += f"{data_diet.varied(study.run, seeds, noise, 'run')}{bands}. Groups of "
    text += f"{config('examples'):g} examples by EL2N at epoch {config('scored_at'):g}; how far "
    text += "their kernel turns over the epoch that ends there; below, as a multiple of the lowest "
    text += "group's in the same run."
    if any(s.wrong.any() for s in studies):
        text += " Orange: part with wrong labels."
    return text
