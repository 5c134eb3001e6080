"""Data Diet: whether scores of one network serve another.

Three settings: the run's own, another architecture, another learning rate. Left: accuracy above a
random subset of the same size, within pairs of runs, when each is trained on the examples that
score highest in each. Right: Spearman between their scores; on the diagonal, between two halves of
the runs that the setting was scored with. A row for each level of label noise.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, abstract (scores transfer across
architectures and settings), on our data and models.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record
from dynamics.statistics import Claim, Estimate, Paired, Scale
from paper_figures import data_diet, panels, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import OURS, Draws, said
from paper_figures.reading import Cells, count, minus, percent, row

EXPERIMENT = "data_diet"
STUDY = "Transfer"
PRESET = "digits"
TOGETHER = ("noise",)

SETTINGS = {  # as the rows name them -> as draw.LOOKS does
    "own": "EL2N (hardest)",
    "model": "EL2N of another model",
    "rate": "EL2N at another rate",
}
LETTERS = {"own": "A", "model": "B", "rate": "C"}
FOREIGN = {  # the pairs of settings that differ in one thing
    "architecture": (("own", "model"), ("model", "own")),
    "learning rate": (("own", "rate"), ("rate", "own")),
}

PRUNES = "Scores of another {} prune as well as a network's own."
FAILS = (
    "Wrong labels score high in every setting: what another {} finds hardest fails as a network's "
    "own choice does."
)
RANKS = "Settings that differ in {} rank the examples alike."
RANDOM = said(
    "Random subsets are no match for a network's own scores: a worse choice would be seen.", OURS
)
RANDOM_NOISE = said(
    "Random subsets do not fail: another choice than a network's own would be seen.", OURS
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by target and source, in percent
    scores: dict[str, np.ndarray]  # f64[R, N] of each setting
    draws: Draws  # of the scores
    names: dict[str, str]  # of each setting, as the reader sees it
    kept: float
    noise: float
    scored_at: float
    trained: float  # epochs of every run
    labels: str
    scale: Scale

    def over(self, target: str, source: str, other: str = "random") -> Paired:
        """Points of accuracy over another choice, over paired replicas."""
        return self.accuracy.paired((target, source), (target, other))

    def ranks(self, a: str, b: str) -> Estimate:
        """Spearman between the averaged scores of two settings; of one, between its halves."""
        if a != b:
            return data_diet.correlation(self.scores[a], self.scores[b], self.draws)
        if self.draws.count < 2:
            return Estimate(np.nan, -np.inf, np.inf)
        half = [mine[: len(mine) // 2] for mine in self._same()]
        other = [mine[len(mine) // 2 : 2 * (len(mine) // 2)] for mine in self._same()]
        places = np.cumsum([0, *map(len, half)])
        both = [np.arange(*ends) for ends in itertools.pairwise(places)]
        one, two = (self.scores[a][np.concatenate(part)] for part in (half, other))
        return data_diet.correlation(one, two, Draws(both, self.draws.alike))

    def _same(self) -> list[np.ndarray]:
        return [self.draws.first] if self.draws.alike else self.draws.runs


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_transfer"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs that differ in their noise; its files, and its claims.

    ValueError: a run lacks something, named.
    """
    studies = [_study(run) for run in runs]
    claims = [claim for study in studies for claim in _claims(study, name)]
    with drawing.style("full"):
        fig = drawing.figure("full", height=0.85 + 1.45 * len(studies))
        places = fig.subplots(len(studies), 2, squeeze=False, width_ratios=[3, 1])
        rows = []
        for i, study in enumerate(studies):
            left, right = ascii_lowercase[2 * i : 2 * i + 2]
            rows += _panel_accuracy(places[i, 0], left, study)
            rows += _panel_ranks(places[i, 1], right, study)
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


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_transfer") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for run in runs for claim in _claims(_study(run), figure)]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    accuracy = reading.cells(run, "target", "source")
    for target in SETTINGS:
        for source in (*SETTINGS, "random", "full"):
            accuracy.of(target, source)
    found = data_diet.scores(run, *(f"el2n_{setting}" for setting in SETTINGS))
    model = reading.model(reading.value(run, "model"))
    rate = reading.number(run, "train", "optimizer", "learning_rate")
    other_rate = reading.number(run, "study", "learning_rate")
    other = reading.model(reading.value(run, "study", "model"))
    return Study(
        accuracy=accuracy,
        scores=dict(zip(SETTINGS, found, strict=True)),
        draws=data_diet.draws(run),
        names={
            "own": f"{model}, rate {rate:g}",
            "model": f"{other}, rate {rate:g}",
            "rate": f"{model}, rate {other_rate:g}",
        },
        kept=reading.number(run, "study", "kept"),
        noise=reading.number(run, "noise"),
        scored_at=reading.number(run, "study", "scored_at"),
        trained=reading.number(run, "study", "epochs"),
        labels=data_diet.labels(run),
        scale=data_diet.scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    points = reading.judging(figure, study.scale, study.accuracy.replicas)
    rank = reading.judging(figure, study.scale, study.draws.seeds, "Spearman")
    at = f"at {percent(study.kept)} kept"
    claims = []
    for thing, pairs in FOREIGN.items():
        if study.noise:
            found = max((study.over(*pair) for pair in pairs), key=lambda p: p.mean)
            quantity = f"scores of the other {thing} - random {at}, the higher of 2 ways"
            claimed = said(FAILS.format(thing), OURS)
            claims.append(points(found, quantity, claimed, at_most=-30.0))
        else:
            found = min((study.over(t, s, t) for t, s in pairs), key=lambda p: p.mean)
            quantity = f"scores of the other {thing} - own {at}, the lower of 2 ways"
            claims.append(points(found, quantity, said(PRUNES.format(thing)), at_least=-1.0))
    for thing, ((a, b), _) in FOREIGN.items():
        quantity = f"Spearman(EL2N, EL2N of the other {thing})"
        claimed = said(RANKS.format(thing), OURS)
        claims.append(rank(study.ranks(a, b), quantity, claimed, at_least=0.9))
    found, quantity = study.over("own", "random", "own"), f"random - own scores {at}"
    if study.noise:
        return [*claims, points(found, quantity, RANDOM_NOISE, control=True, at_least=30.0)]
    return [*claims, points(found, quantity, RANDOM, control=True, at_most=-0.5)]


def _panel_accuracy(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    """For each target, a bar for each source, beside one another."""
    drawing.letter(axes, letter, study.labels)
    rows: list[dict[str, Any]] = []
    sources: Mapping[str, str] = SETTINGS | {"full": "all data"}
    labels = {s: f"scored by {LETTERS[s]}: {study.names[s]}" for s in SETTINGS}
    labels |= {"full": "all data"}
    axes.axhline(0, color=drawing.LOOKS["random"].color, ls="--", lw=0.8, zorder=1)
    for at, target in enumerate(SETTINGS):
        shifts = panels.aside(len(sources), 0.16)
        for (source, like), shift in zip(sources.items(), shifts, strict=True):
            found = study.over(target, source)
            label = labels[source] if at == 0 else "_"
            panels.bar(axes, at + shift, found, like, label=label)
            rows.append(row(letter, labels[source], study.names[target], found, found.seeds))
    axes.set_xlim(-0.5, len(SETTINGS) - 0.5)
    axes.set_xticks(range(len(SETTINGS)), [f"trained as {LETTERS[t]}" for t in SETTINGS])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("above random (points)")
    axes.grid(True, axis="y")
    return rows


def _panel_ranks(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    """Spearman between settings as a matrix of numbers on colours."""
    drawing.letter(axes, letter, "Spearman of EL2N")
    names = list(SETTINGS)
    found = [[study.ranks(a, b) for b in names] for a in names]
    axes.imshow(
        [[e.mean for e in line] for line in found], cmap="Blues", vmin=0.5, vmax=1.3, aspect="auto"
    )
    rows = []
    for i, line in enumerate(found):
        for j, e in enumerate(line):
            axes.text(j, i, minus(f"{e.mean:.3f}"), ha="center", va="center", fontsize=7)
            series = f"{study.names[names[i]]} and {study.names[names[j]]}"
            rows.append(row(letter, series, None, e, study.draws.seeds))
    axes.set_xticks(range(len(names)), [LETTERS[name] for name in names])
    axes.set_yticks(range(len(names)), [LETTERS[name] for name in names])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return rows


def _caption(run: record.Run, studies: Sequence[Study]) -> str:
    study = studies[0]
    seeds, noise = study.accuracy.replicas, max(s.noise for s in studies)
    scorings = dict.fromkeys(s.draws.count for s in studies)
    intervals = "bars are 95 % intervals of the mean" if seeds > 1 else "no intervals"
    return (
        f"{data_diet.scale(run, noise=False, net=False)}. Left: each of A, B, C trained for "
        f"{count(study.trained, 'epoch')} on the {percent(study.kept)} hardest by EL2N of each "
        f"after {count(study.scored_at, 'epoch')}; {data_diet.varied(run, seeds, noise)}; "
        f"{intervals}. Right: scores averaged over {' or '.join(map(str, scorings))} runs on the "
        "same labels; diagonal: between halves of them."
    )
