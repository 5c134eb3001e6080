"""Data Diet: the error barrier between two children of one network, against when they parted.

One panel for each fraction of wrong labels. Both children begin as a copy of the parent at the
spawn epoch and then see the examples in orders of their own; the barrier is how far the training
error on the path between their final weights rises above the straight line between its ends, on
the examples of highest EL2N, of lowest, and on random ones. At the left, children that share
nothing, not even their initialisation.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, figure 4 of the submission, on our data
and model; bars are 95 % intervals of the mean over pairs of children, each with scores of its own.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Paired
from paper_figures import data_diet, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import PAPER
from paper_figures.reading import Cells

EXPERIMENT = "data_diet"
STUDY = "Connectivity"
PRESET = "digits_connectivity"
TOGETHER = ("noise",)

SUBSETS = {  # as the rows name them -> as the reader sees them, and drawn like
    "high": ("highest EL2N", "EL2N (hardest)"),
    "random": ("random", "random"),
    "low": ("lowest EL2N", "EL2N (easiest)"),
}
INDEPENDENT = None  # the spawn of children that share nothing, in a key
GATED = 0.15  # fraction of wrong labels from which the digits gates of the barriers' sizes hold
GONE = 1.0  # points of error up to which a barrier counts as none

HIGH = (
    "Children that part at the start are separated by an error barrier on the examples of highest "
    "EL2N."
)
LOW = "On the examples of lowest EL2N the same children are linearly connected from the start."
APART = "The barrier is higher on the examples of highest EL2N than on those of lowest."
ONSET = (
    "On the examples of highest EL2N the barrier vanishes only when the children part much later "
    "than on those of lowest."
)
BETWEEN = "Random examples lie between the two ends of the score."
LATE = "Children that part late enough are linearly connected on any examples."


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    cells: Cells  # points of error, by (spawn, subset)
    spawns: tuple[float, ...]  # epochs, rising
    independent: bool  # whether there are children that share nothing
    own_error: dict[str, Estimate]  # percent, of the children themselves, by subset
    run: record.Run

    @property
    def noise(self) -> float:
        """The fraction of training labels that are wrong."""
        return reading.number(self.run, "noise")

    def apart(self, spawn: float | None) -> Paired:
        """The barrier on high examples less that on low ones, over pairs of children."""
        return self.cells.paired((spawn, "high"), (spawn, "low"))

    def together(self, spawn: float | None) -> np.ndarray:
        """f64[R, 3]: the barriers on high, random and low examples."""
        return np.stack([self.cells.of(spawn, subset) for subset in SUBSETS], axis=1)

    def onset(self, subset: str) -> np.ndarray:
        """f64[R]: the first spawn epoch from which on a pair has no barrier; the last if none."""
        barriers = np.stack([self.cells.of(spawn, subset) for spawn in self.spawns], axis=1)
        there = barriers > GONE + 1e-9
        first = there.shape[1] - np.argmax(there[:, ::-1], axis=1)  # one past the last barrier
        first = np.where(there.any(axis=1), first, 0)
        return np.array(self.spawns)[np.minimum(first, len(self.spawns) - 1)]


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_barrier"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs that differ in their wrong labels; its files, and its claims.

    ValueError: a run lacks something, named.
    """
    studies = [_study(run) for run in runs]
    claims = _claims(studies, name)
    size = "half" if len(studies) == 1 else "full"
    with drawing.style(size):
        fig = drawing.figure(size, height=2.6 if len(studies) == 1 else 2.35)
        panels = fig.subplots(1, len(studies), sharey=True, squeeze=False)[0]
        table = []
        for i, (axes, study) in enumerate(zip(panels, studies, strict=True)):
            table += _panel(axes, chr(ord("a") + i), study)
        panels[0].set_ylabel("error barrier (points)")
        handles, labels = panels[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper center", ncols=3, columnspacing=1.6)
        drawing.caption(fig, _caption(studies))
        fingerprints = [run.fingerprint for run in runs]
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(table),
            claims=claims,
            fingerprints=fingerprints,
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_barrier") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims([_study(run) for run in runs], figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    cells = reading.cells(run, "spawn", "subset", of="error_barrier")
    spawns = sorted({spawn for spawn, _ in cells.values if spawn is not INDEPENDENT})
    if not spawns:
        raise ValueError(f"{reading.where(run)} has no rows of children that share a parent")
    independent = any(spawn is INDEPENDENT for spawn, _ in cells.values)
    for spawn in [*spawns, *([INDEPENDENT] if independent else [])]:
        for subset in SUBSETS:
            cells.of(spawn, subset)
    own = reading.cells(run, "spawn", "subset", of="end_error")
    return Study(
        cells=cells,
        spawns=tuple(spawns),
        independent=independent,
        own_error={
            subset: statistics.bootstrap(
                np.mean([own.of(spawn, subset) for spawn in spawns], axis=0)
            )
            for subset in SUBSETS
        },
        run=run,
    )


# Measuring


def _claims(studies: Sequence[Study], figure: str) -> list[Claim]:
    return [claim for study in studies for claim in _claims_of(study, figure)]


def _claims_of(study: Study, figure: str) -> list[Claim]:
    judge = functools.partial(
        statistics.judge,
        figure=figure,
        paper=PAPER,
        seeds=study.cells.replicas,
        scale=data_diet.scale(study.run),
    )
    points = functools.partial(judge, unit="points")
    first, last = study.spawns[0], study.spawns[-1]
    start = f"spawned at epoch {first:g}"
    claims = []
    if study.noise >= GATED:
        high, low = (study.cells.estimate(first, subset) for subset in ("high", "low"))
        apart = study.apart(first).differences
        share = statistics.bootstrap((apart > 0).astype(float))
        onset = statistics.paired(study.onset("high"), study.onset("low"))
        claims += [
            points(high, quantity=f"high, {start}", statement=HIGH, at_least=4.0),
            points(low, quantity=f"low, {start}", statement=LOW, at_most=0.5),
            judge(share, quantity=f"pairs with high > low, {start}", statement=APART,
                  at_least=1.0, unit="of all"),
            judge(onset, quantity=f"first spawn without a barrier over {GONE:g} point, high - low",
                  statement=ONSET, at_least=0.5, unit="epochs"),
        ]  # fmt: skip
    elif study.noise:
        claims.append(points(study.apart(first), quantity=f"high - low, {start}", statement=APART,
                             at_least=0.5))  # fmt: skip
    if study.noise:
        claims.append(points(_between(study, first), quantity=BETWEEN_OF.format(start),
                             statement=BETWEEN, at_least=0.0))  # fmt: skip
    elif study.independent:
        claims.append(points(study.apart(None), quantity="high - low, children that share nothing",
                             statement=APART, at_least=10.0))  # fmt: skip
        claims.append(points(_between(study, None), quantity=BETWEEN_OF.format("sharing nothing"),
                             statement=BETWEEN, at_least=0.0))  # fmt: skip
    largest = statistics.jackknife(lambda r: r.mean(axis=0).max(), study.together(last))
    control = points(largest, kind="control", quantity=f"largest of the three, spawned at {last:g}",
                     statement=LATE, at_most=2.0)  # fmt: skip
    return [*claims, control]


BETWEEN_OF = "smaller of high - random and random - low, {}"


def _between(study: Study, spawn: float | None) -> Estimate:
    """How far the barrier on random examples is inside those at the two ends."""

    def statistic(replicas: np.ndarray) -> float:
        high, random, low = replicas.mean(axis=0)
        return min(high - random, random - low)

    return statistics.jackknife(statistic, study.together(spawn))


# Drawing


def _panel(axes: Axes, panel: str, study: Study) -> list[dict[str, Any]]:
    """Spawn epochs evenly spaced, and children that share nothing apart at the left."""
    drawing.letter(axes, panel, data_diet.labels(study.run))
    table = []
    places = list(range(len(study.spawns)))
    for aside, (subset, (label, like)) in zip((-0.1, 0.0, 0.1), SUBSETS.items(), strict=True):
        look = drawing.LOOKS[like]
        found = [study.cells.estimate(spawn, subset) for spawn in study.spawns]
        _bars(axes, [p + aside for p in places], found, look, label=label, ls=look.line)
        table += _rows(panel, label, study, study.spawns, found)
        if study.independent:
            alone = study.cells.estimate(None, subset)
            _bars(axes, [-1.4 + aside], [alone], look, ls="")
            table += _rows(panel, label, study, ["independent"], [alone])
        own = study.own_error[subset]
        table += _rows(panel, f"own error, {label}", study, ["all"], [own])
    if study.independent:
        axes.axvline(-0.7, color="#BBBBBB", lw=0.6, ls=(0, (2, 2)))
    labels = [f"{spawn:g}" for spawn in study.spawns]
    axes.xaxis.set_major_locator(FixedLocator([-1.4] * study.independent + places))
    axes.set_xticklabels(["share\nnothing"] * study.independent + labels, linespacing=0.95)
    left, right = -2.0 if study.independent else -0.4, places[-1] + 0.4
    axes.set_xlim(left, right)
    axes.set_yscale("symlog", linthresh=1, linscale=0.7)
    axes.set_ylim(-0.15, 100)
    axes.yaxis.set_major_locator(FixedLocator([0, 1, 3, 10, 30, 100]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.grid(axis="y")
    middle = (places[-1] / 2 - left) / (right - left)
    axes.set_xlabel("spawn epoch", x=middle, labelpad=-7 if study.independent else 1)
    return table


def _bars(axes: Axes, x: list[float], found: Sequence[Estimate], look: Any, **options: Any) -> None:
    mean, low, high = np.array(found).T
    ends = np.array([mean - low, high - mean]) if np.isfinite(low).all() else None
    axes.errorbar(x, mean, ends, color=look.color, marker=look.marker, elinewidth=0.9, zorder=3,
                  clip_on=False, **options)  # fmt: skip


def _rows(
    panel: str, series: str, study: Study, x: Sequence[Any], found: Sequence[Estimate]
) -> list[dict[str, Any]]:
    pairs = zip(x, found, strict=True)
    return [reading.row(panel, series, at, e, study.cells.replicas) for at, e in pairs]


def _caption(studies: Sequence[Study]) -> str:
    study = studies[0]
    config = functools.partial(reading.number, study.run, "study")
    own = ", ".join(f"{s.own_error['high'].mean:.0f}" for s in studies)
    pairs = study.cells.replicas
    intervals = "; bars: 95 % intervals of the mean" if pairs > 1 else ", no intervals"
    return (
        f"{data_diet.scale(study.run, noise=False)}. Training error between two children after "
        f"{reading.count(config('epochs'), 'epoch')} in all, parted at the spawn epoch; "
        f"{data_diet.varied(study.run, pairs, max(s.noise for s in studies), 'pair')}{intervals}. "
        f"{config('examples'):g} examples of highest, "
        f"of lowest EL2N at epoch {config('scored_at'):g}, and random ones; the children's own "
        f"error on the highest: {own} %. Logarithmic above 1."
    )
