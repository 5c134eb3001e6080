"""Early-learning regularization against its strength lambda and the memory beta of its targets:
test accuracy, and the part of the wrong labels that is memorised. Last epoch.

Reference: Liu et al. 2020, arXiv 2007.00151, appendix H, on our data and model. That lambda <= 2
only delays memorising is derived in ``task.elr``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.reading import Cells, Said, percent, row

EXPERIMENT = "early_learning"
STUDY = "Grid"
PRESET = "digits"
TOGETHER = ()

PAPER = "Liu et al. 2020, arXiv 2007.00151"
OURS = f"ours, after {PAPER}"
BETA = 0.7  # of the claims: the paper's for CIFAR-10
WEAK, STRONG = 1.0, 7.0

DELAYS = Said("lambda <= 2 only delays: at lambda = 1 wrong labels are memorised.", OURS)
HOLDS = Said("A strong enough regulariser is not memorised against.", PAPER)
SLOW = Said("Targets that remember too long come too late.", OURS)
NO_MEMORY = Said("Without memory (beta = 0) training collapses.", PAPER)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    accuracy: Cells  # by method, strength and beta, in percent
    memorised: Cells
    strengths: tuple[float, ...]
    betas: tuple[float, ...]
    epochs: float
    scale: Scale


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "early_learning_grid"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.9)
        left, right = fig.subplots(1, 2)
        rows = _panel(left, "a", "test accuracy (%)", study, study.accuracy)
        rows += _panel(right, "b", "wrong labels memorised (%)", study, study.memorised)
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "early_learning_grid") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    elr = reading.frame(run).filter(pl.col("method") == "elr")
    if not len(elr):
        raise ValueError(f"{reading.where(run)} has no rows of method 'elr'")
    accuracy = reading.cells(run, "strength", "beta", rows=elr)
    strengths, betas = (tuple(sorted({key[i] for key in accuracy.values})) for i in (0, 1))
    if min(len(strengths), len(betas)) < 2:
        raise ValueError(f"{reading.where(run)} needs two values of lambda and of beta or more")
    for strength in strengths:
        for beta in betas:
            accuracy.of(strength, beta)
    noise = reading.number(run, "rate")
    kind = str(reading.value(run, "noise")).replace("_", " ")
    return Study(
        accuracy=accuracy,
        memorised=reading.cells(run, "strength", "beta", rows=elr, of="wrong_memorised"),
        strengths=strengths,
        betas=betas,
        epochs=reading.number(run, "epochs"),
        scale=reading.scale_of(run, f"{reading.scale(run)}, {percent(noise)} {kind} noise"),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(figure, study.scale, study.accuracy.replicas, "%")
    beta = reading.nearest(study.betas, BETA)
    weak = reading.nearest(study.strengths, WEAK)
    strong = reading.nearest(study.strengths, STRONG)
    longest = study.betas[-1]

    def memorised(strength: float, beta: float) -> Any:
        return statistics.bootstrap(study.memorised.of(strength, beta))

    at = "memorised at lambda {:g}, beta {:g}".format
    claims = [made(memorised(strong, beta), at(strong, beta), HOLDS, at_most=10.0)]
    if weak <= 2:
        claims.append(
            made(memorised(weak, beta), at(weak, beta), DELAYS, control=True, at_least=70.0)
        )
    if longest >= 0.99:
        claims.append(
            made(memorised(strong, longest), at(strong, longest), SLOW, control=True, at_least=70.0)
        )
    if study.betas[0] == 0:
        e = statistics.bootstrap(study.accuracy.of(strong, 0.0))
        quantity = f"test accuracy at lambda {strong:g}, beta 0"
        claims.append(made(e, quantity, NO_MEMORY, control=True, at_most=38.0))
    return claims


def _panel(axes: Axes, letter: str, text: str, study: Study, cells: Cells) -> list[dict[str, Any]]:
    means = np.array([[cells.of(s, b).mean() for b in study.betas] for s in study.strengths])
    axes.imshow(means, vmin=0, vmax=100, cmap="cividis", aspect="auto", origin="lower")
    for i, j in np.ndindex(*means.shape):
        shade = "white" if means[i, j] < 50 else "black"
        axes.text(j, i, f"{means[i, j]:.0f}", ha="center", va="center", color=shade, fontsize=7)
    axes.set_xticks(range(len(study.betas)), [f"{beta:g}" for beta in study.betas])
    axes.set_yticks(range(len(study.strengths)), [f"{s:g}" for s in study.strengths])
    below = sum(s <= 2 for s in study.strengths)
    if 0 < below < len(study.strengths):
        axes.axhline(below - 0.5, color="white", ls="--", lw=1.0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(r"memory of the targets $\beta$")
    axes.set_ylabel(r"strength $\lambda$")
    drawing.letter(axes, letter, text)
    return [
        row(letter, f"lambda {s:g}", b, statistics.bootstrap(cells.of(s, b)), cells.replicas)
        for s in study.strengths
        for b in study.betas
    ]


def _caption(study: Study) -> str:
    seeds = study.accuracy.replicas
    return (
        f"{study.scale}. Means of {reading.count(seeds, 'paired seed')}, each with wrong labels of "
        f"its own, on one split; the last of {reading.count(study.epochs, 'epoch')}. "
        "Dashed: lambda = 2, up to which memorising is only delayed."
    )
