"""Data Diet: what pruning by early scores costs, and what the scores agree with.

(a) Test accuracy against the fraction of the training set kept. (b) The difference from a random
subset of the same size, within pairs of runs that share seed, steps and everything else. (c) EL2N
against GraNd, and (d) GraNd at initialisation against the norm of the input: each point of the
plane coloured by the number of training examples there.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, figure 1 (second row), on our data and
model; bands are 95 % intervals of the mean over replicas, each of which chooses by scoring runs
of its own, where the paper's are the 16th to 84th percentile of the runs. Kirsch 2023, arXiv
2303.14753, for GraNd at initialisation.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, NullLocator

from dynamics import record
from dynamics.statistics import Claim, Estimate, Paired, Scale
from paper_figures import data_diet, panels, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import KIRSCH, Draws, said
from paper_figures.reading import Cells, Key, count, minus, percent, row

EXPERIMENT = "data_diet"
STUDY = "Pruning"
PRESET = "digits"
TOGETHER = ()

METHODS = {  # as the rows name them -> as the reader sees them; in the order of the legend
    "el2n_hard": "EL2N (hardest)",
    "grand_hard": "GraNd (hardest)",
    "grand_init_hard": "GraNd at init (hardest)",
    "input_norm_hard": "input norm (largest)",
    "forgetting_hard": "forgetting (hardest)",
    "aum_hard": "AUM (hardest)",
    "coverage": "coverage-centric (EL2N)",
    "el2n_easy": "EL2N (easiest)",
    "random": "random",
    "full": "all data",
}
HARD = said(
    "The examples of highest EL2N early in training are the ones to keep: they train a better "
    "network than as many drawn at random."
)
HARD_NOISE = said(
    "With wrong labels among them, the examples of highest EL2N are the ones to leave out: trained "
    "on them alone, a network fails."
)
EASY = said(
    "The examples of lowest EL2N are the ones training can do without: alone, they train a worse "
    "network than as many drawn at random."
)
SAME = said("EL2N, which needs no gradient, ranks examples as GraNd does once training has begun.")
NORM = said(
    "GraNd at initialisation ranks examples by little more than the norm of their input.", KIRSCH
)
CHANCE = said(
    "Pruning half by GraNd at initialisation does not reproduce: no better than chance.", KIRSCH
)
NO_BETTER = said(
    "What GraNd at initialisation keeps is no better than the inputs of largest norm, which need "
    "no network at all.",
    KIRSCH,
)

SCORES = {  # likewise, the scores that are arrays
    "el2n": "EL2N",
    "grand": "GraNd",
    "grand_init": "GraNd at init",
    "input_norm": "input norm",
}
KEPT = 0.3  # the claims' fraction; where the digits gates were set


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by method and fraction, in percent
    bereft: set[Key]  # those of them in which some class has no example left
    methods: tuple[str, ...]  # all but random and full
    fractions: tuple[float, ...]  # kept, rising
    scores: dict[str, np.ndarray]  # f64[R, N]; f64[1, N] for the input norm
    draws: Draws  # of the scores
    seeds: str  # what differs between those of (a, b)
    index: np.ndarray  # i64[N]
    noise: float  # the fraction of training labels that are wrong
    scored_at: float  # the epoch of el2n and grand
    trained: float  # epochs of every run of (a)
    notes: str  # what is out of the ordinary, for the caption
    scale: Scale

    @property
    def correlated(self) -> list[tuple[str, str]]:
        """The pairs of scores that are shown against each other, x first."""
        return [("el2n", "grand")] + [("input_norm", "grand_init")] * ("grand_init" in self.scores)

    def difference(self, method: str, fraction: float, other: str = "random") -> Paired:
        """Points of accuracy, method - other, over paired replicas."""
        return self.accuracy.paired((method, fraction), (other, fraction))


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_pruning"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of a run of ``experiments.data_diet``; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    study = _study(reading.only(runs))
    rhos = _correlations(study)
    claims = _claims(study, rhos, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=3.05)
        places = "aabbc\naabbd" if len(rhos) > 1 else "aabbc"
        axes = fig.subplot_mosaic(places, gridspec_kw={"width_ratios": [1, 1, 1, 1, 1.4]})
        rows = _panel_accuracy(axes["a"], study) + _panel_difference(axes["b"], study)
        for panel, (pair, rho) in zip("cd", rhos.items(), strict=False):
            rows += _panel_scores(axes[panel], panel, study, *pair, rho)
        shown = len(study.methods) + 2
        panels.legend(fig, axes["a"], ncols=shown if shown < 6 else -(-shown // 2))
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_pruning") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    study = _study(reading.only(runs))
    return _claims(study, _correlations(study), figure)


# Reading


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    accuracy = reading.cells(run, "method", "fraction")
    fractions = accuracy.places(method="random")
    asked = reading.value(run, "study", "methods")
    unknown = [method for method in asked if method not in METHODS]
    if unknown:
        raise ValueError(f"{reading.where(run)}: no name for method {unknown[0]!r} in a figure")
    accuracy.of("full", 1.0)
    for method in ("random", *asked):
        for fraction in fractions or (KEPT,):
            accuracy.of(method, fraction)
    names = ["el2n", "grand"] + ["grand_init"] * ("grand_init" in run.arrays)
    scores = dict(zip(names, data_diet.scores(run, *names), strict=True))
    scores["input_norm"] = reading.array(run, "input_norm", 1)[None]
    if scores["input_norm"].shape[1] != scores["el2n"].shape[1]:
        raise ValueError(
            f"{reading.where(run)}: 'input_norm' must be of the {scores['el2n'].shape[1]} "
            f"examples scored, got {scores['input_norm'].shape[1]}"
        )
    notes = " Every class keeps the same fraction." * bool(run.config["study"].get("balanced"))
    if "coverage" in asked:
        cutoff = reading.number(run, "study", "cutoff")
        notes += f" Coverage-centric without the hardest {percent(cutoff)}."
    return Study(
        accuracy=accuracy,
        bereft=data_diet.bereft(run, "method", "fraction"),
        methods=tuple(m for m in METHODS if m in asked and m != "random"),
        fractions=fractions,
        scores=scores,
        draws=data_diet.draws(run),
        seeds=data_diet.varied(run, accuracy.replicas, reading.number(run, "noise")),
        index=reading.index(run),
        noise=reading.number(run, "noise"),
        scored_at=reading.number(run, "study", "scored_at"),
        trained=reading.number(run, "study", "epochs"),
        notes=notes,
        scale=data_diet.scale(run),
    )


# Measuring


def _correlations(study: Study) -> dict[tuple[str, str], Estimate]:
    """Spearman of each pair of scores; the interval is over scoring runs, or draws of them."""
    return {
        (x, y): data_diet.correlation(study.scores[y], study.scores[x], study.draws)
        for x, y in study.correlated
    }


def _claims(study: Study, rhos: Mapping[tuple[str, str], Estimate], figure: str) -> list[Claim]:
    fraction = reading.nearest(study.fractions, KEPT)
    at = f"at {percent(fraction)} kept"
    at += f" (nearest to {percent(KEPT)})" if fraction != KEPT else ""
    points = reading.judging(figure, study.scale, study.accuracy.replicas)
    rank = reading.judging(figure, study.scale, study.draws.seeds, "Spearman")
    claims = []
    if "el2n_hard" in study.methods:
        found, quantity = study.difference("el2n_hard", fraction), f"hard - random {at}"
        claimed, gate = (
            (HARD_NOISE, {"at_most": -30.0}) if study.noise else (HARD, {"at_least": 0.5})
        )
        claims.append(points(found, quantity, claimed, **gate))
    if "el2n_easy" in study.methods and not study.noise:
        found = study.difference("el2n_easy", fraction)
        claims.append(points(found, f"easy - random {at}", EASY, at_most=-5.0))
    gate = 0.97 if not study.noise else 0.95 if study.noise <= 0.2 else 0.93
    quantity = f"Spearman(EL2N, GraNd) after {count(study.scored_at, 'epoch')}"
    claims.append(rank(rhos["el2n", "grand"], quantity, SAME, at_least=gate))
    if rho := rhos.get(("input_norm", "grand_init")):
        quantity = "Spearman(GraNd at init, input norm)"
        claims.append(rank(rho, quantity, NORM, control=True, at_least=0.75))
    if "grand_init_hard" in study.methods:
        found = study.difference("grand_init_hard", fraction)
        quantity = f"GraNd at init - random {at}"
        claims.append(points(found, quantity, CHANCE, control=True, at_most=0.0))
    if {"grand_init_hard", "input_norm_hard"} <= set(study.methods):
        found = study.difference("grand_init_hard", fraction, "input_norm_hard")
        quantity = f"GraNd at init - input norm {at}"
        claims.append(points(found, quantity, NO_BETTER, control=True, at_most=1.0))
    return claims


# Drawing


def _panel_accuracy(axes: Axes, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, "a")
    rows, seeds = [], study.accuracy.replicas
    for method in (*study.methods, "random"):
        found = [study.accuracy.estimate(method, f) for f in study.fractions]
        hollow = [(method, fraction) in study.bereft for fraction in study.fractions]
        panels.line(axes, study.fractions, found, METHODS[method], hollow=hollow)
        rows += [
            row("a", METHODS[method], f, e, seeds)
            for f, e in zip(study.fractions, found, strict=True)
        ]
    full = study.accuracy.estimate("full", 1.0)
    panels.level(axes, full, METHODS["full"])
    axes.set_ylabel("test accuracy (%)")
    _kept_axis(axes, study)
    return [*rows, row("a", METHODS["full"], 1.0, full, seeds)]


def _panel_difference(axes: Axes, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, "b")
    rows: list[dict[str, Any]] = []
    panels.points_axis(axes)
    closest = min((b / a - 1 for a, b in itertools.pairwise(study.fractions)), default=1.0)
    shifts = panels.aside(len(study.methods), min(0.07, 0.8 * closest / len(study.methods)))
    for method, shift in zip(study.methods, shifts, strict=True):
        for fraction in study.fractions:
            found = study.difference(method, fraction)
            hollow = (method, fraction) in study.bereft
            panels.bar(axes, fraction * (1 + shift), found, METHODS[method], hollow=hollow)
            rows.append(row("b", METHODS[method], fraction, found, found.seeds))
    axes.set_ylabel("accuracy \N{MINUS SIGN} random (points)")
    _kept_axis(axes, study)
    return rows


def _kept_axis(axes: Axes, study: Study) -> None:
    """Percent kept on a logarithmic axis: a tick at every fraction, labels where they fit."""
    axes.set_xscale("log")
    axes.set_xlim(study.fractions[0] / 1.25, study.fractions[-1] * 1.25)
    panels.xticks(axes, study.fractions, [f"{100 * f:g}" for f in study.fractions])
    axes.set_xlabel("training examples kept (%)")
    axes.grid(True, axis="y")


def _panel_scores(
    axes: Axes, panel: str, study: Study, x_name: str, y_name: str, rho: Estimate
) -> list[dict[str, Any]]:
    """Counts of examples, on logarithmic axes where both scores are skewed and positive."""
    drawing.letter(axes, panel, minus(f"Spearman {rho.mean:.3f}"))
    whole, first = len(study.scores["el2n"]), study.draws.first
    x, y = (
        np.broadcast_to(study.scores[name], (whole, len(study.index)))[first].mean(axis=0)
        for name in (x_name, y_name)
    )
    scale = "log" if panel == "c" and x.min() > 0 and y.min() > 0 else "linear"
    # 26 by 9: hexagons that are regular in a panel of this shape. One example is a visible blue.
    axes.hexbin(x, y, xscale=scale, yscale=scale, gridsize=(26, 9), mincnt=1, cmap="Blues",
                norm=LogNorm(vmin=0.25), lw=0.1)  # fmt: skip
    if scale == "log":
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=4))
            axis.set_minor_locator(NullLocator())
    axes.set_xlabel(SCORES[x_name], labelpad=1)
    axes.set_ylabel(SCORES[y_name])
    series = f"{SCORES[y_name]} against {SCORES[x_name]}"
    return [
        {"panel": panel, "series": series, "index": int(i), "x": float(a), "y": float(b)}
        for i, a, b in zip(study.index, x, y, strict=True)
    ]


def _caption(study: Study) -> str:
    seeds, scorings = study.accuracy.replicas, study.draws.count
    intervals = "bands and bars are 95 % intervals of the mean" if seeds > 1 else "no intervals"
    return (
        f"{study.scale}. (a, b) {count(study.trained, 'epoch')}; {study.seeds}; "
        f"{intervals}; (b) is logarithmic beyond ±1. (c, d) Darker: more examples; scores averaged "
        f"over {count(scorings, 'run')}, EL2N and GraNd after {count(study.scored_at, 'epoch')}."
        f"{study.notes}{data_diet.BEREFT if study.bereft else ''}"
    )
