"""Data Diet: a network that picks its own hardest examples while it trains.

Left: test accuracy against the epoch, when the examples are chosen once after a warm-up or anew
every few epochs, by the network's own EL2N or at random. Middle: the part of each subset that was
in the one before. Right: differences at the end, within pairs of runs that share seed and steps. A
row for each level of label noise.

Reference: Attendu & Corbeil 2023, arXiv 2306.03208, who re-score by EL2N when fine-tuning language
models; here small networks from scratch. Bands and bars are 95 % intervals of the mean.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Paired, Scale
from paper_figures import data_diet, panels, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import said
from paper_figures.reading import Cells, Said, count, minus, percent, row

EXPERIMENT = "data_diet"
STUDY = "Rescoring"
PRESET = "digits"
TOGETHER = ("noise",)

ATTENDU = "Attendu & Corbeil 2023, arXiv 2306.03208"
OURS = f"ours, after {ATTENDU}"

METHODS = {  # as the rows name them -> as draw.LOOKS does, and as the reader sees them
    "once": ("EL2N (hardest)", "hardest, once"),
    "again": ("EL2N again", "hardest, again"),
    "random": ("random", "random, once"),
    "random_again": ("random again", "random, again"),
    "full": ("all data", "all data"),
}
COMPARED = {  # a - b at the end
    ("once", "random"): "hardest - random, once",
    ("again", "random_again"): "hardest - random, again",
    ("again", "once"): "again - once, hardest",
    ("random_again", "random"): "again - once, random",
}

NOTHING_LOST = said(
    "A network that goes on choosing its own hardest examples by EL2N loses nothing against "
    "training on all of them.",
    ATTENDU,
)
BETTER = said("Choosing anew while training serves better than to choose once.", ATTENDU)
HARDER = said(
    "What is hardest at the time is a better choice than as many drawn anew at random.", OURS
)
FAILS = said(
    "With wrong labels among them, a network that trains on what it finds hardest after a warm-up "
    "fails.",
    OURS,
)
RECOVERS = said(
    "While a network learns the wrong labels it forgets the right ones, so that choosing anew "
    "alternates between them: better than to stay with the wrong ones.",
    OURS,
)
NEW = said(
    "Drawing anew at random helps as well, for more examples are seen: what re-scoring adds is to "
    "be measured against that.",
    OURS,
)
WARM = said("Until the first choice all ways to choose are the same run.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by method and epoch, in percent
    overlap: dict[str, dict[float, list[float]]]  # method -> epoch of a choice -> percent
    epochs: tuple[float, ...]  # of the choices, and the last
    kept: float
    every: float
    noise: float
    labels: str
    scale: Scale

    def at_end(self, a: str, b: str) -> Paired:
        """Points of accuracy a - b, over paired replicas."""
        return self.accuracy.paired((a, self.epochs[-1]), (b, self.epochs[-1]))

    def average(self, method: str, epochs: Sequence[float]) -> np.ndarray:
        """f64[R]: accuracy of each replica, averaged over epochs."""
        return np.mean([self.accuracy.of(method, epoch) for epoch in epochs], axis=0)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_rescoring"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs that differ in their noise; its files, and its claims.

    ValueError: a run lacks something, named.
    """
    studies = [_study(run) for run in runs]
    claims = [claim for study in studies for claim in _claims(study, name)]
    with drawing.style("full"):
        fig = drawing.figure("full", height=0.85 + 1.65 * len(studies))
        places = fig.subplots(len(studies), 3, squeeze=False, width_ratios=[1.5, 1.1, 1])
        rows = []
        for i, study in enumerate(studies):
            letters = ascii_lowercase[3 * i : 3 * i + 3]
            rows += _panel_accuracy(places[i, 0], letters[0], study)
            rows += _panel_overlap(places[i, 1], letters[1], study)
            rows += _panel_end(places[i, 2], letters[2], study)
        fig.align_ylabels(places[:, 0])
        panels.legend(fig, places[0, 0])
        drawing.caption(fig, _caption(runs[0], studies))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_rescoring") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for run in runs for claim in _claims(_study(run), figure)]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    accuracy = reading.cells(run, "method", "epoch")
    epochs = accuracy.places(method="full")
    if len(epochs) < 2:
        raise ValueError(f"{reading.where(run)} has no rows for method 'full' at two epochs")
    for method, epoch in itertools.product(METHODS, epochs):
        accuracy.of(method, epoch)
    overlap: dict[str, dict[float, list[float]]] = {}
    for method, epoch, part in reading.columns(run, "method", "epoch", "overlap"):
        epoch = round(epoch, 6)
        if part is None or not part >= 0 or epoch == epochs[-1]:
            continue  # the first choice has none before it, and at the end nothing is chosen
        overlap.setdefault(method, {}).setdefault(epoch, []).append(100 * part)
    return Study(
        accuracy=accuracy,
        overlap=overlap,
        epochs=epochs,
        kept=reading.number(run, "study", "kept"),
        every=reading.number(run, "study", "every"),
        noise=reading.number(run, "noise"),
        labels=data_diet.labels(run),
        scale=data_diet.scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.accuracy.replicas)
    at, first = f"({percent(study.kept)} kept)", study.epochs[0]

    def claim(a: str, b: str, claimed: Said, **options: Any) -> Claim:
        quantity = COMPARED.get((a, b), f"{METHODS[a][1]} - {METHODS[b][1]}")
        return points(study.at_end(a, b), f"{quantity} {at}", claimed, **options)

    if study.noise:
        late = study.epochs[-2:]  # choices alternate: one of each kind
        mean = statistics.paired(*(study.average(method, late) for method in ("again", "once")))
        quantity = f"{COMPARED['again', 'once']} {at}, mean of epochs {late[0]:g} and {late[-1]:g}"
        claims = [
            claim("once", "random", FAILS, at_most=-30.0),
            points(mean, quantity, RECOVERS, at_least=10.0),
        ]
    else:
        claims = [
            claim("again", "full", NOTHING_LOST, at_least=-0.5),
            claim("again", "once", BETTER, at_least=0.0),
            claim("again", "random_again", HARDER, at_least=0.0),
        ]
    apart = study.accuracy.paired(("again", first), ("random", first)).differences
    quantity = f"|hardest - random| at the end of the warm-up, {count(first, 'epoch')}"
    return [
        *claims,
        claim("random_again", "random", NEW, control=True, at_least=0.5),
        points(statistics.bootstrap(abs(apart)), quantity, WARM, control=True, at_most=0.0),
    ]


def _panel_accuracy(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, letter, study.labels)
    rows, seeds = [], study.accuracy.replicas
    for method, (like, label) in METHODS.items():
        found = [study.accuracy.estimate(method, epoch) for epoch in study.epochs]
        panels.line(axes, study.epochs, found, like, label=label)
        rows += [row(letter, label, x, e, seeds) for x, e in zip(study.epochs, found, strict=True)]
    axes.set_ylabel("test accuracy (%)")
    _epoch_axis(axes, study)
    return rows


def _panel_overlap(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, letter, "overlap of choices")
    rows = []
    for method in ("again", "random_again"):
        like, label = METHODS[method]
        parts = study.overlap.get(method, {})
        found = [statistics.bootstrap(values) for values in parts.values()]
        if found:
            panels.line(axes, list(parts), found, like, label=label)
        rows += [row(letter, label, x, e, len(parts[x])) for x, e in zip(parts, found, strict=True)]
    axes.set_ylim(-4, 104)
    axes.set_ylabel("chosen before (%)")
    _epoch_axis(axes, study)
    return rows


def _epoch_axis(axes: Axes, study: Study) -> None:
    margin = 0.04 * (study.epochs[-1] - study.epochs[0])
    axes.set_xlim(study.epochs[0] - margin, study.epochs[-1] + margin)
    panels.xticks(axes, study.epochs, [f"{epoch:g}" for epoch in study.epochs], gap=0.1)
    axes.set_xlabel("epoch")
    axes.grid(True, axis="y")


def _panel_end(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    """Differences as horizontal bars, each under its name."""
    drawing.letter(axes, letter, f"after epoch {study.epochs[-1]:g}")
    axes.axvline(0, color=drawing.LOOKS["random"].color, ls="--", lw=0.8, zorder=1)
    rows = []
    for at, ((a, b), series) in enumerate(COMPARED.items()):
        found, y = study.at_end(a, b), -at
        panels.bar(axes, y, found, METHODS[a][0], horizontal=True)
        axes.text(0.03, y + 0.22, minus(series), transform=axes.get_yaxis_transform(), fontsize=7,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})  # fmt: skip
        rows.append(row(letter, series, None, found, found.seeds))
    axes.set_ylim(-len(COMPARED) + 0.6, 0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference (points)")
    axes.grid(True, axis="x")
    return rows


def _caption(run: record.Run, studies: Sequence[Study]) -> str:
    study, seeds = studies[0], studies[0].accuracy.replicas
    own = ", each with wrong labels of its own" if any(s.noise for s in studies) else ""
    intervals = "bands and bars are 95 % intervals of the mean" if seeds > 1 else "no intervals"
    return (
        f"{data_diet.scale(run, noise=False)}. {percent(study.kept)} of the examples kept after "
        f"{count(study.epochs[0], 'epoch')} on all: once, or again every "
        f"{count(study.every, 'epoch')}; hardest by the network's own EL2N. Middle: the part of "
        f"each choice that was in the one before. {count(seeds, 'paired seed')}{own}, on one "
        f"split; {intervals}."
    )
