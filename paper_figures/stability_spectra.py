"""The density of all eigenvalues of the training loss's Hessian along full-batch gradient descent,
one loss to a column.

Above, the density of one network from the first step (bottom) to the last (top), on a logarithmic
scale, each shifted up; dotted, the threshold 2 / eta, where it is within reach. Below, over all
initialisations, the part of the eigenvalues within 1 % of the largest around zero, and the part
below that, which are negative.

Reference: Sagun et al. 2017, arXiv 1706.04454; Ghorbani et al. 2019, arXiv 1901.10159; on our data
and model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Scale
from paper_figures import draw as drawing
from paper_figures import panels, reading
from paper_figures.draw import Look
from paper_figures.reading import Said, row

EXPERIMENT = "stability"
STUDY = "Spectra"
PRESET = "digits"
TOGETHER = ("loss",)

SAGUN = "Sagun et al. 2017, arXiv 1706.04454"
GHORBANI = "Ghorbani et al. 2019, arXiv 1901.10159"
NAMES = {"squared_error": "squared error", "cross_entropy": "cross-entropy"}
PARTS = {
    "near zero": Look("#0072B2", "o"),
    "negative": Look("#D55E00", "s"),
}
NEAR = 0.01  # of the largest eigenvalue
FLOOR = 1e-5  # of the highest density, below which none is drawn

BULK = Said("Nearly all eigenvalues lie near zero.", SAGUN)
RISES = Said("More of them than at initialisation.", GHORBANI)
FALLS = Said("Training takes the negative eigenvalues away.", GHORBANI)
EDGE = Said(
    "The density ends at the sharpness, which is measured apart.", f"ours, after {GHORBANI}"
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    loss: str
    steps: np.ndarray  # [T]
    nodes: np.ndarray  # [T, R, num, k]
    weights: np.ndarray  # the same; those of a vector have the sum 1
    sharpness: np.ndarray  # [T, R], by Lanczos from one vector
    threshold: float
    scale: Scale

    def part(self, name: str) -> np.ndarray:
        """[T, R]: the part of the eigenvalues that is ``near zero``, or ``negative``."""
        near = NEAR * self.sharpness[:, :, None, None]
        where = np.abs(self.nodes) < near if name == "near zero" else self.nodes <= -near
        return (self.weights * where).sum(-1).mean(-1)

    def density(self, replica: int, at: np.ndarray) -> np.ndarray:
        """[T, len(at)]: the density at the places, each node a Gaussian as wide as k resolve."""
        k = self.nodes.shape[-1]
        nodes, weights = (x[:, replica].reshape(len(self.steps), -1) for x in self[2:4])
        wide = (nodes.max(1) - nodes.min(1)) / (max(k - 1, 1) * np.sqrt(8 * np.log(3)))
        z = (at[None, :, None] - nodes[:, None]) / wide[:, None, None]
        each = np.exp(-0.5 * z**2) / (np.sqrt(2 * np.pi) * wide[:, None, None])
        return (weights[:, None] * each).sum(-1) / weights.sum(-1)[:, None]


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "stability_spectra"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of runs of different losses; its files, and its claims.

    ValueError: a run lacks something.
    """
    studies = [_study(run) for run in runs][::-1]  # the squared error first
    claims = [claim for study in studies for claim in _claims(study, name)]
    wide = "full" if len(studies) > 1 else "half"
    with drawing.style(wide):
        fig = drawing.figure(wide, height=4.3)
        ratio = {"height_ratios": [2, 1]}
        places = fig.subplots(2, len(studies), squeeze=False, sharey="row", gridspec_kw=ratio)
        rows: list[dict[str, Any]] = []
        for i, study in enumerate(studies):
            rows += _ridges(places[0, i], "ab"[i], study)
            rows += _parts(places[1, i], "cd"[i] if len(studies) > 1 else "b", study)
        places[0, 0].set_ylabel("density, log scale, by step")
        places[1, 0].set_ylabel("part of the eigenvalues")
        panels.legend(fig, places[1, 0])
        drawing.caption(fig, _caption(studies[0]))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "stability_spectra") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for run in runs[::-1] for claim in _claims(_study(run), figure)]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    nodes, weights = (reading.array(run, name, 4) for name in ("nodes", "weights"))
    steps = run.arrays["nodes"].coords["step"]
    cells = {
        name: reading.cells(run, "step", of=name, within=(-1e9, 1e9), times=1.0)
        for name in ("sharpness", "ratio")
    }
    sharpness = np.stack([cells["sharpness"].of(step) for step in steps])
    ratio = cells["ratio"].of(steps[-1])
    wanted = sharpness.shape
    if nodes.shape[:2] != wanted or weights.shape != nodes.shape:
        raise ValueError(
            f"{reading.where(run)}: arrays 'nodes' and 'weights' must be [steps, replicas, ...] = "
            f"{wanted}, got {nodes.shape} and {weights.shape}"
        )
    return Study(
        loss=str(reading.value(run, "loss")),
        steps=steps,
        nodes=nodes,
        weights=weights,
        sharpness=sharpness,
        threshold=float(np.median(sharpness[-1] / ratio)),
        scale=reading.scale(run),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    seeds = study.sharpness.shape[1]
    scale = study.scale.of(f"{study.scale}, {NAMES.get(study.loss, study.loss)}")
    made = reading.judging(figure, scale, seeds, "of the eigenvalues")
    edges = reading.judging(figure, scale, seeds, "of the sharpness")
    near, negative = study.part("near zero"), study.part("negative")
    apart = np.abs(study.nodes.max((-2, -1)) / study.sharpness - 1).max(axis=0)
    within = f"within {reading.percent(NEAR)} of the largest around zero"
    return [
        made(statistics.bootstrap(near[-1]), f"{within}, in the end", BULK, at_least=0.9),
        made(statistics.paired(near[-1], near[0]), f"{within}, end - start", RISES, at_least=0.1),
        made(
            statistics.paired(negative[0], negative[-1]),
            "negative, start - end",
            FALLS,
            at_least=0.05,
        ),
        edges(
            statistics.bootstrap(apart),
            "largest |edge of the density / sharpness - 1|",
            EDGE,
            control=True,
            at_most=1e-3,
        ),
    ]


def _ridges(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    low, high = study.nodes[:, 0].min(), study.nodes[:, 0].max()
    at = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 600)
    found = study.density(0, at)
    height = np.log10(np.maximum(found / found.max(), FLOOR)) - np.log10(FLOOR)
    colors = colormaps["viridis"](np.linspace(0.85, 0.1, len(study.steps)))
    rows = []
    for i in reversed(range(len(study.steps))):
        axes.fill_between(at, 1.6 * i, 1.6 * i + height[i], color=colors[i], alpha=0.35, lw=0)
        axes.plot(at, 1.6 * i + height[i], color=colors[i], lw=0.7)
        axes.annotate(
            f"{study.steps[i]:,.0f}",
            (1.0, 1.6 * i),
            xycoords=("axes fraction", "data"),
            fontsize=6.5,
            va="bottom",
            ha="right",
            color=colors[i],
        )
        rows += [
            row(letter, f"density at step {study.steps[i]:g}", x, Estimate(y, np.nan, np.nan), 1)
            for x, y in zip(at, found[i], strict=True)
        ]
    if study.threshold < at[-1]:
        axes.axvline(study.threshold, color="#000000", ls=":", lw=0.8)
    axes.set_yticks([])
    axes.set_ylim(-0.1, None)
    axes.set_xlabel("eigenvalue")
    drawing.letter(axes, letter, NAMES.get(study.loss, study.loss))
    return rows


def _parts(axes: Axes, letter: str, study: Study) -> list[dict[str, Any]]:
    rows = []
    for name, look in PARTS.items():
        found = [statistics.bootstrap(values) for values in study.part(name)]
        panels.line(axes, study.steps.tolist(), found, name, look=look)
        seeds = study.sharpness.shape[1]
        rows += [row(letter, name, s, e, seeds) for s, e in zip(study.steps, found, strict=True)]
    first = min((s for s in study.steps if s > 0), default=1.0)
    axes.set_xscale("symlog", linthresh=first, linscale=0.4)
    shown = [s for s in study.steps if s == 0 or s >= first]
    axes.set_xlim(-0.1 * first, study.steps[-1] * 1.1)
    axes.set_ylim(0, 1)
    panels.xticks(axes, shown, [f"{s:,.0f}" for s in shown], gap=0.11)
    axes.set_xlabel("step")
    axes.grid(True, axis="y")
    drawing.letter(axes, letter)
    return rows


def _caption(study: Study) -> str:
    seeds = reading.count(study.sharpness.shape[1], "initialisation")
    _, _, num, k = study.nodes.shape
    return (
        f"{study.scale}; {seeds} on the same examples, full batch; stochastic Lanczos "
        f"quadrature, {num} vectors of {k} products. Labels on the right: the step. Dotted: the "
        "threshold of gradient descent."
    )
