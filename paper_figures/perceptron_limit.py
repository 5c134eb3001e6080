"""Logistic regression at large steps becomes the perceptron.

The distance of theta / gamma to the batch perceptron against the step size gamma, the steps until
every example is right, and the loss on the way, which is no measure of that.

Reference: Tyurin 2024, arXiv 2412.08424, theorem 3.2, section 4 and table 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from dynamics import record
from dynamics.statistics import UNBOUNDED, Claim, Estimate, Scale, bootstrap
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said, row

EXPERIMENT = "stability_theory"
STUDY = "Perceptron"
PRESET = "default"
TOGETHER = ()

PAPER = "Tyurin 2024, arXiv 2412.08424"
OURS = f"ours, after {PAPER}"
TABLE = {("normalised", 100.0): 2, ("normalised", 10.0): 2, ("normalised", 1.0): 16,
         ("normalised", 0.1): 157, ("descent", 100.0): 308}  # fmt: skip
EXAMPLES = 1000  # of the table
MODERATE = 100.0
LEAST = 1e-17  # a distance of zero is drawn here
LOOKS = {
    "descent": Look("#D55E00", "s"),
    "normalised": Look("#0072B2", "o"),
}
NAMES = {"descent": "gradient descent", "normalised": "normalised descent"}

LIMIT = Said("theta / gamma becomes the batch perceptron's as gamma grows.", PAPER)
NORMALISED = Said("... and that of normalised descent the normalised perceptron's.", OURS)
SMALL = Said("At a moderate gamma it is another path.", PAPER)
SAME = Said("At a large gamma it separates the examples at the perceptron's own step.", PAPER)
TABLED = Said("The steps to separate the worst case are those of table 1.", PAPER)
FEWER = Said("On the worst case normalised descent needs far fewer steps.", PAPER)
UNRELIABLE = Said("A larger gamma has a larger loss on the way ...", PAPER)
FASTER = Said("... and separates no later.", PAPER)
FIRST = Said("On two examples the loss after one step is about gamma / 8.", PAPER)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    iterations: reading.Cells  # by problem, method and gamma; infinity: never
    reference: reading.Cells
    distance: reading.Cells
    peak: reading.Cells
    gammas: tuple[float, ...]
    losses: np.ndarray  # f64[gammas, T]: of the worst case, by gradient descent
    pair: np.ndarray  # f64[gammas, 4]
    examples: float
    scale: Scale

    def over(self, values: reading.Cells, problem: str, method: str) -> np.ndarray:
        """f64[R, gammas]."""
        return np.stack([values.of(problem, method, g) for g in self.gammas], axis=1)

    @property
    def moderate(self) -> float:
        """Among the gammas."""
        return reading.nearest(self.gammas, MODERATE)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "perceptron_limit"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.5)
        distance, iterations, loss = fig.subplots(1, 3)
        rows = [
            *_distance(distance, study),
            *_iterations(iterations, study),
            *_loss(loss, study),
        ]
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "perceptron_limit") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    names = ("iterations", "perceptron", "distance", "mistake")
    values = {name: _cells(run, name) for name in names}
    gammas = tuple(float(one) for one in reading.value(run, "study", "gammas"))
    classes = reading.value(run, "study", "classes")
    study = Study(
        *(values[name] for name in names),
        gammas=gammas,
        losses=_losses(run, "worst", gammas),
        pair=_losses(run, "pair", gammas),
        examples=reading.number(run, "study", "examples"),
        scale=reading.scale_of(
            run, f"digits {classes[0]} and {classes[1]}, and the paper's problems"
        ),
    )
    for problem in ("worst", "digits"):
        for method in NAMES:
            study.over(study.distance, problem, method)
    return study


def _cells(run: record.Run, name: str) -> reading.Cells:
    """As ``reading.cells``, where problems may have other numbers of replicas."""
    by, out = ("problem", "method", "gamma"), {}
    for *raw, replica, number in reading.columns(run, *by, "replica", name):
        if number is None or not number >= 0:
            raise ValueError(f"{reading.where(run)}: {name} must be >= 0, got {number} for {raw}")
        out.setdefault(reading.key_of(raw), {})[int(replica)] = float(number)
    return reading.Cells(reading.where(run), by, out)


def _losses(run: record.Run, problem: str, gammas: Sequence[float]) -> np.ndarray:
    """f64[gammas, T + 1]: the loss of gradient descent at every step."""
    path = reading.frame(run, "path").filter(
        pl.col("problem") == problem, pl.col("method") == "descent", pl.col("replica") == 0
    )
    parts = [path.filter(pl.col("gamma") == gamma).sort("step")["mistake"] for gamma in gammas]
    if 0 in (lengths := {len(part) for part in parts}) or len(lengths) > 1:
        raise ValueError(
            f"{reading.where(run)} needs the loss of every step on problem {problem!r} for "
            f"{len(gammas)} gammas, got {[len(part) for part in parts]} steps"
        )
    return np.array(parts)


def _claims(study: Study, figure: str) -> list[Claim]:
    distance = {m: study.over(study.distance, "digits", m) for m in NAMES}
    made = reading.judging(figure, study.scale, len(distance["descent"]), "")
    last = lambda m: bootstrap(_log(distance[m][:, -1]))  # noqa: E731
    moderate = study.gammas.index(study.moderate)
    steps, own = (
        study.over(values, "digits", "descent")[:, -1]
        for values in (study.iterations, study.reference)
    )
    largest = f"at gamma {study.gammas[-1]:g}"
    return [
        made(last("descent"), f"log10 |theta / gamma - perceptron| {largest}", LIMIT,
             at_most=-10.0),
        made(last("normalised"), f"the same of normalised descent {largest}", NORMALISED,
             at_most=-10.0),
        made(bootstrap(abs(steps - own)), f"|steps to separate - perceptron's| {largest}", SAME,
             at_most=0.0),
        *_worst(study, figure),
        made(bootstrap(_log(distance["descent"][:, moderate])),
             f"log10 |theta / gamma - perceptron| at gamma {study.moderate:g}", SMALL, control=True,
             at_least=-3.0),
    ]  # fmt: skip


def _worst(study: Study, figure: str) -> list[Claim]:
    """Nothing is random, so there are no intervals."""
    scale = study.scale.of(f"the worst case of {study.examples:g} examples, and two")
    made = reading.judging(figure, scale, 1, "")
    steps = {m: study.over(study.iterations, "worst", m)[0] for m in NAMES}
    moderate, largest = study.gammas.index(study.moderate), study.gammas[-1]
    peak = study.over(study.peak, "worst", "descent")[0]
    known = {key: n for key, n in TABLE.items() if key[1] in study.gammas}
    claims = []
    if study.examples == EXAMPLES and known:
        off = [abs(steps[m][study.gammas.index(g)] - n) for (m, g), n in known.items()]
        quantity = f"largest |steps - table 1| of {len(known)} runs"
        claims.append(made(_one(max(off)), quantity, TABLED, at_most=0.0))
    ratio = steps["descent"][moderate] / steps["normalised"][moderate]
    first = study.pair[moderate, 1] / study.moderate
    return [
        *claims,
        made(_one(ratio), f"steps of descent / of normalised at gamma {study.moderate:g}", FEWER,
             at_least=10.0),
        made(_one(np.log10(peak[-1] / peak[moderate])),
             f"log10 of the largest losses, gamma {largest:g} over {study.moderate:g}", UNRELIABLE,
             at_least=1.0),
        made(_one(steps["descent"][-1] - steps["descent"][moderate]),
             f"steps at gamma {largest:g} - at {study.moderate:g}", FASTER, at_most=0.0),
        made(_one(abs(first - 1 / 8)), f"two examples: |loss / gamma - 1/8| at gamma "
             f"{study.moderate:g}", FIRST, at_most=1e-6),
    ]  # fmt: skip


def _one(value: float) -> Estimate:
    return Estimate(float(value), *UNBOUNDED)


def _log(values: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(values, LEAST))


def _distance(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows = []
    for method, name in NAMES.items():
        values = study.over(study.distance, "digits", method)
        found = curve(axes, study.gammas, _log(values), LOOKS[method], name)
        rows += rows_of("a", f"{name}, log10", study.gammas, found, len(values))
    axes.set_xscale("log")
    axes.set_xlabel("step size $\\gamma$")
    axes.set_ylabel("$\\log_{10}$ distance to perceptron")
    axes.grid(True, axis="y")
    axes.legend(loc="lower left", fontsize=6)
    drawing.letter(axes, "a", "the limit, on digits")
    return rows


def _iterations(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows = []
    for method, name in NAMES.items():
        steps = study.over(study.iterations, "worst", method)[0]
        there, look = np.isfinite(steps), LOOKS[method]
        x = [g for g, is_there in zip(study.gammas, there, strict=True) if is_there]
        axes.plot(x, steps[there], look.line, color=look.color, marker=look.marker, label=name)
        rows += [row("b", name, g, _one(v), 1) for g, v in zip(x, steps[there], strict=True)]
        own = study.over(study.reference, "worst", method)[0][0]
        axes.axhline(own, color=look.color, ls=":", lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("step size $\\gamma$")
    axes.set_ylabel("steps to separate")
    axes.grid(True, axis="y")
    axes.legend(loc="center right", fontsize=6)
    drawing.letter(axes, "b", "the worst case")
    return rows


def _loss(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows, shades = [], ("#56B4E9", "#0072B2", "#332288")
    shown = [g for g in study.gammas if 10 <= g <= 1e4]
    shown = [shown[0], shown[len(shown) // 2], shown[-1]] if len(shown) > 2 else shown
    for g, color in zip(shown, shades, strict=False):
        values = study.losses[study.gammas.index(g)]
        steps = study.over(study.iterations, "worst", "descent")[0][study.gammas.index(g)]
        axes.plot(np.maximum(values, 1e-8), color=color, label=f"$\\gamma$ = {g:g}")
        if np.isfinite(steps):
            at = int(steps)
            axes.plot([at], [max(values[at], 1e-8)], "o", color=color, mfc="white", zorder=4)
        rows += [row("c", f"gamma {g:g}", t, _one(v), 1) for t, v in enumerate(values)]
    axes.set_yscale("log")
    axes.set_xlabel("step of gradient descent")
    axes.set_ylabel("loss")
    axes.grid(True, axis="y")
    axes.legend(loc="lower left", fontsize=6)
    drawing.letter(axes, "c", "the loss, and separation (o)")
    return rows


def _caption(study: Study) -> str:
    seeds = reading.count(len(study.over(study.distance, "digits", "descent")), "paired seed")
    return (
        f"Logistic regression from zero in float64. a: {study.scale.split(',')[0]}, largest over "
        f"the steps until both separate, bands are 95 % intervals of the mean over {seeds}. b and "
        f"c: {study.examples:g} examples, all but one alike; dotted: the perceptrons; no marker: "
        "not within the steps of the run."
    )
