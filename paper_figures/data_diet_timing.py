"""Data Diet: how early the scores can be taken.

Above: test accuracy of networks trained on the examples that score highest, against the epoch at
which they were scored; beside as many random examples, and all. Below: the difference from random
examples within pairs of runs. A column for each level of label noise.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, figure 1 (first row), on our data and
model; bands are 95 % intervals of the mean over replicas, each of which chooses by scoring runs
of its own, where the paper's are the 16th to 84th percentile of the runs. Kirsch 2023, arXiv
2303.14753, for GraNd at initialisation.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from dynamics import record
from dynamics.statistics import Claim, Paired, Scale
from paper_figures import data_diet, panels, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import KIRSCH, OURS, said
from paper_figures.reading import Cells, Key, count, percent, row

EXPERIMENT = "data_diet"
STUDY = "Timing"
PRESET = "digits"
TOGETHER = ("noise",)

METHODS = {  # as the rows name them -> as the reader sees them
    "el2n_hard": "EL2N (hardest)",
    "grand_hard": "GraNd (hardest)",
    "forgetting_hard": "forgetting (hardest)",
    "aum_hard": "AUM (hardest)",
}
OTHERS = {"random": "random", "full": "all data"}
EARLY = 5.0  # the claims' epoch: a few

FEW = said(
    "EL2N of a few epochs is enough to choose by: the hardest examples train a better network than "
    "as many drawn at random."
)
LATER = said("Scores of more epochs choose no better than those of a few.")
INIT = said(
    "EL2N is of no consistent use before training: at initialisation it beats no random choice."
)
GRAND_INIT = said(
    "GraNd at initialisation, by which the submission of Data Diet prunes, does not reproduce: it "
    "keeps no better examples than chance.",
    KIRSCH,
)
NOISE = said(
    "With wrong labels among them the hardest examples are the ones to leave out, whenever after "
    "the start of training they are scored.",
    OURS,
)
BLIND = said(
    "Before training, scores cannot tell which labels are wrong: what they keep harms less.", OURS
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by method and scored_at, in percent
    bereft: set[Key]  # those of them in which some class has no example left
    epochs: dict[str, tuple[float, ...]]  # of each method, at which it was scored, rising
    kept: float
    noise: float
    trained: float  # epochs of every run
    labels: str
    scale: Scale

    def after(self, method: str, epoch: float, other: float | None = None) -> Paired:
        """Points of accuracy over another epoch's scores, or over a random choice."""
        against = ("random", None) if other is None else (method, other)
        return self.accuracy.paired((method, epoch), against)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_timing"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs that differ in their noise; its files, and its claims.

    ValueError: a run lacks something, named.
    """
    studies = [_study(run) for run in runs]
    claims = [claim for study in studies for claim in _claims(study, name)]
    columns = "half" if len(studies) == 1 else "full"
    with drawing.style(columns):
        fig = drawing.figure(columns, height=3.5)
        grid = fig.subplots(2, len(studies), squeeze=False, sharex="col")
        rows = []
        for i, study in enumerate(studies):
            above, below = ascii_lowercase[i], ascii_lowercase[len(studies) + i]
            drawing.letter(grid[0, i], above, study.labels)
            drawing.letter(grid[1, i], below)
            rows += _accuracies(grid[0, i], above, study)
            rows += _differences(grid[1, i], below, study)
        grid[0, 0].set_ylabel("test accuracy (%)")
        grid[1, 0].set_ylabel("above random (points)")
        panels.legend(fig, grid[0, 0], ncols=None if columns == "full" else 2)
        drawing.caption(fig, _caption(runs[0], studies))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_timing") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for run in runs for claim in _claims(_study(run), figure)]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    accuracy = reading.cells(run, "method", "scored_at")
    for method in OTHERS:
        accuracy.of(method, None)
    asked = [f"{method}_hard" for method in reading.value(run, "study", "methods")]
    if unknown := [method for method in asked if method not in METHODS]:
        raise ValueError(f"{reading.where(run)}: no name for method {unknown[0]!r} in a figure")
    epochs = {method: accuracy.places(method=method) for method in METHODS if method in asked}
    for method in epochs:
        if not any(epochs[method]):
            raise ValueError(f"{reading.where(run)} has no rows for {method!r} after epoch 0")
    return Study(
        accuracy=accuracy,
        bereft=data_diet.bereft(run, "method", "scored_at"),
        epochs=epochs,
        kept=reading.number(run, "study", "kept"),
        noise=reading.number(run, "noise"),
        trained=reading.number(run, "study", "epochs"),
        labels=data_diet.labels(run),
        scale=data_diet.scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.accuracy.replicas)
    at = f"at {percent(study.kept)} kept"
    claims = []
    if "el2n_hard" in study.epochs:
        claims += _noisy(study, points, at) if study.noise else _clean(study, points, at)
    if 0.0 in study.epochs.get("grand_hard", ()):
        found, quantity = study.after("grand_hard", 0), f"GraNd at epoch 0 - random {at}"
        claims.append(points(found, quantity, GRAND_INIT, control=True, at_most=0.0))
    return claims


def _clean(study: Study, points: Callable[..., Claim], at: str) -> list[Claim]:
    epochs = study.epochs["el2n_hard"]
    early, last = reading.nearest([e for e in epochs if e], EARLY), epochs[-1]
    quantity = f"EL2N after {count(early, 'epoch')}"
    claims = [
        points(study.after("el2n_hard", early), f"{quantity} - random {at}", FEW, at_least=0.5)
    ]
    if last > early:
        found = study.after("el2n_hard", early, last)
        claims.append(points(found, f"{quantity} - after {last:g} {at}", LATER, at_least=-0.5))
    if 0.0 in epochs:
        found, quantity = study.after("el2n_hard", 0), f"EL2N at epoch 0 - random {at}"
        claims.append(points(found, quantity, INIT, control=True, at_most=0.0))
    return claims


def _noisy(study: Study, points: Callable[..., Claim], at: str) -> list[Claim]:
    epochs = study.epochs["el2n_hard"]
    trained = [e for e in epochs if e]
    best = max((study.after("el2n_hard", e) for e in trained), key=lambda found: found.mean)
    quantity = f"EL2N - random {at}, the highest of epochs {trained[0]:g} to {trained[-1]:g}"
    claims = [points(best, quantity, NOISE, at_most=-30.0)]
    if 0.0 in epochs:
        early = reading.nearest(trained, EARLY)
        found = study.after("el2n_hard", 0, early)
        quantity = f"EL2N at epoch 0 - after {early:g} {at}"
        claims.append(points(found, quantity, BLIND, control=True, at_least=10.0))
    return claims


def _accuracies(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    rows, seeds = [], study.accuracy.replicas
    for method, epochs in study.epochs.items():
        found = [study.accuracy.estimate(method, epoch) for epoch in epochs]
        hollow = [(method, epoch) in study.bereft for epoch in epochs]
        panels.line(axes, epochs, found, METHODS[method], hollow=hollow)
        rows += [
            row(letter, METHODS[method], x, e, seeds) for x, e in zip(epochs, found, strict=True)
        ]
    for method, series in OTHERS.items():
        found = study.accuracy.estimate(method, None)
        panels.level(axes, found, series)
        rows.append(row(letter, series, None, found, seeds))
    axes.grid(True, axis="y")
    return rows


def _differences(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    panels.points_axis(axes)
    places = sorted({epoch for epochs in study.epochs.values() for epoch in epochs})
    smallest = next(place for place in places if place > 0)
    shifts = panels.aside(len(study.epochs), 0.12)
    for (method, epochs), shift in zip(study.epochs.items(), shifts, strict=True):
        for epoch in epochs:
            found = study.after(method, epoch)
            x = epoch * (1 + shift) if epoch else shift * smallest
            hollow = (method, epoch) in study.bereft
            panels.bar(axes, x, found, METHODS[method], hollow=hollow)
            rows.append(row(letter, METHODS[method], epoch, found, found.seeds))
    full = study.accuracy.paired(("full", None), ("random", None))
    panels.level(axes, full, "all data")
    rows.append(row(letter, "all data", None, full, full.seeds))
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)  # 0 beside a logarithmic axis
    axes.set_xlim(-0.25 * smallest, places[-1] * 1.25)
    axes.set_xlabel("epoch of the scores")
    panels.xticks(axes, places, [f"{place:g}" for place in places])
    return rows


def _caption(run: record.Run, studies: Sequence[Study]) -> str:
    study, seeds = studies[0], studies[0].accuracy.replicas
    lost = data_diet.BEREFT if any(s.bereft for s in studies) else ""
    intervals = "bands and bars are 95 % intervals of the mean" if seeds > 1 else "no intervals"
    return (
        f"{data_diet.scale(run, noise=False)}. {percent(study.kept)} of the examples kept by "
        f"averaged scores; retrained for {count(study.trained, 'epoch')}; "
        f"{data_diet.varied(run, seeds, max(s.noise for s in studies))}; {intervals}. Below: "
        f"logarithmic beyond ±1.{lost}"
    )
