"""Data Diet: the window of scores to keep.

Test accuracy of networks trained on the examples that follow when the very hardest are left out,
against how many are; beside as many random examples, as many of the easiest, and all. A panel for
each level of label noise.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, figure 2, on our data and model. The
paper's axis is the number of easiest examples below the window (the axis above); bands are 95 %
intervals of the mean over replicas, each of which chooses by scoring runs of its own, where the
paper's are the 16th to 84th percentile of the runs.
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
from paper_figures.data_diet import OURS, said
from paper_figures.reading import Cells, Key, count, percent, row

EXPERIMENT = "data_diet"
STUDY = "Window"
PRESET = "digits"
TOGETHER = ("noise",)

WINDOW = "hardest of the rest"
OTHERS = {"easy": "EL2N (easiest)", "random": "random", "full": "all data"}  # -> draw.LOOKS
DROPPED = 0.25  # the claims' window with wrong labels; where the digits gate was set
FROM = 0.05  # the smallest window of the clean control

FAILS = said("With wrong labels, the examples of highest EL2N train a network that fails.")
WINDOWED = said(
    "With wrong labels, the examples to keep are those below the very hardest: they train a better "
    "network than as many drawn at random."
)
TOO_FEW = said(
    "Leaving out fewer than are wrong does not help: the window is still full of them.", OURS
)
HARD = said(
    "The examples of highest EL2N early in training are the ones to keep: they train a better "
    "network than as many drawn at random."
)
CLEAN = said(
    "On clean labels next to none of the hardest need be left out (1 % on CIFAR-10): a window well "
    "below them is no better than the hardest themselves."
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by method and dropped, in percent
    bereft: set[Key]  # those of them in which some class has no example left
    dropped: tuple[float, ...]  # fractions of hardest examples left out, rising
    kept: float
    examples: int
    noise: float
    scored_at: float
    trained: float  # epochs of every run
    labels: str
    scale: Scale

    def window(self, dropped: float, other: str = "random") -> Paired:
        """Points of accuracy over another choice, or over the hardest: ``window``."""
        against = (other, 0.0 if other == "window" else None)
        return self.accuracy.paired(("window", dropped), against)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_window"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs that differ in their noise; its files, and its claims.

    ValueError: a run lacks something, named.
    """
    studies = [_study(run) for run in runs]
    claims = [claim for study in studies for claim in _claims(study, name)]
    columns = "half" if len(studies) == 1 else "full"
    with drawing.style(columns):
        fig = drawing.figure(columns, height=2.9)
        places = fig.subplots(1, len(studies), squeeze=False)[0]
        rows = []
        for letter, axes, study in zip(ascii_lowercase, places, studies, strict=False):
            rows += _panel(axes, letter, study)
        places[0].set_ylabel("test accuracy (%)")
        panels.legend(fig, places[0], ncols=None if columns == "full" else 2)
        drawing.caption(fig, _caption(runs[0], studies))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_window") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for run in runs for claim in _claims(_study(run), figure)]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    accuracy = reading.cells(run, "method", "dropped")
    dropped = accuracy.places(method="window")
    if not dropped:
        raise ValueError(f"{reading.where(run)} has no rows for method 'window'")
    for method in OTHERS:
        accuracy.of(method, None)
    return Study(
        accuracy=accuracy,
        bereft=data_diet.bereft(run, "method", "dropped"),
        dropped=dropped,
        kept=reading.number(run, "study", "kept"),
        examples=len(reading.index(run)),
        noise=reading.number(run, "noise"),
        scored_at=reading.number(run, "study", "scored_at"),
        trained=reading.number(run, "study", "epochs"),
        labels=data_diet.labels(run),
        scale=data_diet.scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.accuracy.replicas)
    at, dropped = f"at {percent(study.kept)} kept", study.dropped
    return [
        *_hardest(study, points, at),
        *(_noisy(study, points, at) if study.noise else []),
        *([] if study.noise or 0.0 not in dropped else _clean(study, points, at)),
    ]


def _hardest(study: Study, points: Callable[..., Claim], at: str) -> list[Claim]:
    if 0.0 not in study.dropped:
        return []
    found, quantity = study.window(0.0), f"hard - random {at}"
    if study.noise:
        return [points(found, quantity, FAILS, at_most=-30.0)]
    return [points(found, quantity, HARD, at_least=0.5)]


def _noisy(study: Study, points: Callable[..., Claim], at: str) -> list[Claim]:
    part = reading.nearest(study.dropped, DROPPED)
    near = "" if part == DROPPED else f" (nearest to {percent(DROPPED)})"
    quantity = f"window without the hardest {percent(part)}{near} - random {at}"
    claims = [points(study.window(part), quantity, WINDOWED, at_least=4.0)]
    if few := [part for part in study.dropped if 0 < part <= study.noise / 2]:
        part = reading.nearest(few, study.noise / 4)
        quantity = f"window without the hardest {percent(part)} - random {at}"
        claims.append(points(study.window(part), quantity, TOO_FEW, control=True, at_most=-10.0))
    return claims


def _clean(study: Study, points: Callable[..., Claim], at: str) -> list[Claim]:
    below = [part for part in study.dropped if part >= FROM]
    if not below:
        return []
    best = max((study.window(part, "window") for part in below), key=lambda found: found.mean)
    quantity = f"best window without the hardest {percent(below[0])} or more - hard {at}"
    return [points(best, quantity, CLEAN, control=True, at_most=0.0)]


def _panel(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    seeds, x = study.accuracy.replicas, [100 * part for part in study.dropped]
    found = [study.accuracy.estimate("window", part) for part in study.dropped]
    if study.noise:
        axes.axvline(100 * study.noise, color="#999999", ls=":", lw=0.8)
    hollow = [("window", part) in study.bereft for part in study.dropped]
    panels.line(axes, x, found, "EL2N (hardest)", label=WINDOW, hollow=hollow)
    rows = [
        row(letter, WINDOW, part, e, seeds) for part, e in zip(study.dropped, found, strict=True)
    ]
    for method, series in OTHERS.items():
        e = study.accuracy.estimate(method, None)
        panels.level(axes, e, series)
        rows.append(row(letter, series, None, e, seeds))
    axes.set_xlabel("hardest examples left out (%)")
    axes.grid(True, axis="y")
    rest = 100 * (1 - study.kept)

    def flipped(percent: Any) -> Any:
        return rest - percent

    above = axes.secondary_xaxis("top", functions=(flipped, flipped))
    above.set_xlabel("offset: easiest examples left out (%)")
    drawing.letter(axes, letter, study.labels)
    return rows


def _caption(run: record.Run, studies: Sequence[Study]) -> str:
    study, seeds = studies[0], studies[0].accuracy.replicas
    intervals = "bands are 95 % intervals of the mean" if seeds > 1 else "no intervals"
    lost = data_diet.BEREFT if any(s.bereft for s in studies) else ""
    wrong = " Dotted: as many as are wrong." if any(s.noise for s in studies) else ""
    return (
        f"{data_diet.scale(run, noise=False)}. {percent(study.kept)} of the examples kept in the "
        f"order of EL2N after {count(study.scored_at, 'epoch')}, between those left out at either "
        f"end; retrained for {count(study.trained, 'epoch')}; "
        f"{data_diet.varied(run, seeds, max(s.noise for s in studies))}; {intervals}.{wrong}{lost}"
    )
