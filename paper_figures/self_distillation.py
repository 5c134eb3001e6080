"""Self-distillation in kernel ridge regression with a part of the ground truth.

The distance of each student to the truth for several weights alpha of the labels, and the ridge
that the students tend to; how their eigendirections are thinned out; the weight that is best on
held-out examples beside a grid.

Reference: Borup & Andersen 2021, arXiv 2102.13088.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import UNBOUNDED, Claim, Estimate, Scale
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said, row

EXPERIMENT = "early_learning_theory"
STUDY = "Distillation"
PRESET = "default"
TOGETHER = ()

PAPER = "Borup & Andersen 2021, arXiv 2102.13088"
MOBAHI = "Mobahi et al. 2020, arXiv 2002.05715"
SHOWN = (0.0, 0.1, 0.35, 1.0)  # the alphas nearest to these are drawn
COLORS = ("#D55E00", "#E69F00", "#0072B2", "#777777")
MARKS = ("o", "s", "^", "x")
SOME = 0.35
BEST = Look("#000000", "D", "--")

HELPS = Said("A few students without ground truth are better than plain regression.", MOBAHI)
COLLAPSES = Said("Many fit nothing any more.", MOBAHI)
SPARSER = Said(
    "Without ground truth the solution becomes sparser in the eigenbasis of the kernel at every "
    "step.",
    MOBAHI,
)
TENDS = Said(
    "With a part alpha of ground truth the students tend to the regression of ridge / alpha.", PAPER
)
CHOSEN = Said(
    "The best weight of every step has a closed form on held-out examples, which saves the grid.",
    PAPER,
)
NOTHING = Said("With ground truth alone every student is the first.", PAPER)
TRAINED = Said(
    "On the training examples the same formula asks for more than all of the ground truth.",
    f"ours, after {PAPER}",
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    fixed: reading.Cells  # the loss, by method, alpha and step
    best: np.ndarray  # f64[R, T]
    weights: np.ndarray  # f64[R, T]: the first is NaN
    training: np.ndarray  # f64[R, T]
    alphas: tuple[float, ...]
    shrinkage: np.ndarray  # f64[A, T, n]
    limit: np.ndarray  # f64[n]: of the alpha nearest to SOME
    scale: Scale

    @property
    def steps(self) -> list[int]:
        """The students."""
        return list(range(1, self.best.shape[1] + 1))

    def over(self, alpha: float) -> np.ndarray:
        """f64[R, T]: the loss of each student."""
        return np.stack([self.fixed.of("fixed", alpha, step) for step in self.steps], axis=1)

    def near(self, alpha: float) -> float:
        """The alpha of the run nearest to this one."""
        return reading.nearest(self.alphas, alpha)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "self_distillation"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.6)
        steps, thinned, weights = fig.subplots(1, 3)
        rows = [*_steps(steps, study), *_thinned(thinned, study), *_weights(weights, study)]
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "self_distillation") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    number = {n: reading.number(run, "study", n) for n in
              ("examples", "noise", "ridge", "gamma", "steps")}  # fmt: skip
    alphas = tuple(float(one) for one in reading.value(run, "study", "alphas"))
    shrinkage, d = reading.array(run, "shrinkage", 3), reading.array(run, "eigenvalues", 1)
    shape = (len(alphas), int(number["steps"]), len(d))
    if shrinkage.shape != shape:
        raise ValueError(
            f"{reading.where(run)}: array 'shrinkage' must be of alphas, steps and eigenvalues, "
            f"{shape}, got {shrinkage.shape}"
        )
    best = {
        name: _by_step(run, name, int(number["steps"])) for name in ("loss", "alpha", "training")
    }
    some = reading.nearest(alphas, SOME)
    study = Study(
        fixed=reading.cells(
            *(run, "method", "alpha", "step"),
            rows=_only_fixed(run),
            of="loss",
            within=(0, np.inf),
            times=1.0,
        ),
        best=best["loss"],
        weights=best["alpha"],
        training=best["training"],
        alphas=alphas,
        shrinkage=shrinkage,
        limit=some * d / (some * d + number["ridge"]),
        scale=reading.scale_of(
            run,
            f"{number['examples']:g} values of sin(2 pi x) with noise {number['noise']:g}, "
            f"kernel exp(-{number['gamma']:g} (x - z)^2), ridge {number['ridge']:g}",
        ),
    )
    for alpha in alphas:
        study.over(alpha)
        study.fixed.of("limit", alpha, None)
    return study


def _only_fixed(run: record.Run) -> pl.DataFrame:
    """The rows without those of the best weights, whose alphas are those of one replica."""
    reading.columns(run, "method")
    return reading.frame(run).filter(pl.col("method") != "best")


def _by_step(run: record.Run, name: str, steps: int) -> np.ndarray:
    """f64[R, T] of the rows of the best weights."""
    found: dict[int, dict[int, float]] = {}
    for method, step, replica, value in reading.columns(run, "method", "step", "replica", name):
        if method == "best":
            found.setdefault(int(replica), {})[step] = np.nan if value is None else value
    wanted = list(range(1, steps + 1))
    if not found or any(sorted(one) != wanted for one in found.values()):
        raise ValueError(f"{reading.where(run)} needs rows of method 'best' for steps {wanted}")
    return np.array([[found[r][t] for t in wanted] for r in sorted(found)])


def _claims(study: Study, figure: str) -> list[Claim]:
    seeds = study.fixed.replicas
    made = reading.judging(figure, study.scale, seeds, "")
    exact = reading.judging(figure, study.scale, 1, "")
    alone, some = study.over(0.0), study.near(SOME)
    turn = int(np.argmin(alone.mean(axis=0)))
    sparse = study.shrinkage[study.alphas.index(0.0)]
    ratios = sparse[:, :-1] / sparse[:, 1:]
    last = {alpha: study.over(alpha)[:, -1] for alpha in study.alphas}
    grid = min(last, key=lambda alpha: last[alpha].mean())
    limit = study.fixed.of("limit", some, None)
    same = abs(study.over(1.0) - study.over(1.0)[:, :1]).max()
    end = study.steps[-1]
    return [
        made(statistics.paired(alone[:, 0], alone[:, turn]),
             f"alpha 0: loss of student 1 - student {turn + 1}", HELPS, at_least=0.02),
        made(statistics.paired(alone[:, -1], alone[:, turn]),
             f"alpha 0: loss of student {end} - student {turn + 1}", COLLAPSES, at_least=0.05),
        exact(Estimate(float((ratios[1:] / ratios[:-1]).min()), *UNBOUNDED),
              "alpha 0: least growth of the ratio of neighbours in a step", SPARSER,
              at_least=1.0),
        made(statistics.bootstrap(abs(last[some] - limit)),
             f"alpha {some:g}: |loss of student {end} - of ridge / alpha|", TENDS,
             at_most=0.002),
        made(statistics.paired(last[grid], study.best[:, -1]),
             f"student {end}: loss of the best alpha of the grid, {grid:g} - held-out weight",
             CHOSEN, at_least=0.0),
        made(Estimate(float(same), *UNBOUNDED), "alpha 1: largest change of the loss", NOTHING,
             control=True, at_most=1e-4),
        made(statistics.bootstrap(study.training[:, 1]), "weight from the training examples",
             TRAINED, control=True, at_least=1.0),
    ]  # fmt: skip


def _steps(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows, seeds, shown = [], study.fixed.replicas, {study.near(alpha) for alpha in SHOWN}
    for alpha, color, mark in zip(sorted(shown), COLORS, MARKS, strict=False):
        name = f"$\\alpha$ = {alpha:g}"
        found = curve(axes, study.steps, study.over(alpha), Look(color, mark), name)
        rows += rows_of("a", f"alpha {alpha:g}", study.steps, found, seeds)
        end = study.fixed.estimate("limit", alpha, None)
        if 0 < alpha < 1:
            axes.axhline(end.mean, color=color, ls=":", lw=0.8)
        rows.append(row("a", f"alpha {alpha:g}, limit", None, end, seeds))
    found = curve(axes, study.steps, study.best, BEST, "held-out weight")
    rows += rows_of("a", "held-out weight", study.steps, found, seeds)
    axes.set_xlabel("student")
    axes.set_ylabel("squared distance to truth")
    axes.set_xticks(study.steps[:: max(1, len(study.steps) // 5)])
    axes.grid(True, axis="y")
    axes.legend(loc="upper left", fontsize=6)
    drawing.letter(axes, "a", "some truth, many students")
    return rows


def _thinned(axes: Axes, study: Study) -> list[dict[str, Any]]:
    left, rows = study.shrinkage[study.alphas.index(0.0)], []
    x = list(range(1, left.shape[1] + 1))
    shown = [t for t in (1, 2, 5, 10, 20, 50) if t <= len(left)]
    some = study.near(SOME)
    lines = [(f"$\\alpha$ = 0, student {t}", left[t - 1], "-") for t in shown]
    lines.append((f"$\\alpha$ = {some:g}, limit", study.limit, "--"))
    shades = ["#F4B183", "#E58A4E", "#D55E00", "#8F3F00", "#5A2800", "#2E1400"][: len(shown)]
    for (name, values, style), color in zip(lines, [*shades, COLORS[2]], strict=True):
        axes.plot(x, values, style, color=color, label=name)
        series = name.replace("$\\alpha$ =", "alpha")
        found = [Estimate(float(v), *UNBOUNDED) for v in values]
        rows += rows_of("b", series, x, found, 1)
    axes.set_yscale("log")
    axes.set_xticks(x[:: max(1, len(x) // 5)])
    axes.set_xlabel("eigendirection of the kernel")
    axes.set_ylabel("part that is left")
    axes.grid(True, axis="y")
    axes.legend(loc="lower left", fontsize=6)
    drawing.letter(axes, "b", "ever sparser")
    return rows


def _weights(axes: Axes, study: Study) -> list[dict[str, Any]]:
    last = np.stack([study.over(alpha)[:, -1] for alpha in study.alphas], axis=1)
    end, seeds = study.steps[-1], study.fixed.replicas
    found = curve(axes, study.alphas, last, Look("#0072B2", "o"), f"student {end}, a grid")
    rows = rows_of("c", "grid", study.alphas, found, seeds)
    e = statistics.bootstrap(study.best[:, -1])
    weight = float(np.median(study.weights[:, -1]))
    axes.axhline(e.mean, color=BEST.color, ls=BEST.line, lw=0.8)
    axes.axhspan(e.low, e.high, color=BEST.color, alpha=0.1, lw=0)
    axes.plot([weight], [e.mean], BEST.marker, color=BEST.color, label="held-out weight, median")
    rows.append(row("c", "held-out weight", weight, e, seeds))
    axes.set_xlabel("weight $\\alpha$ of the ground truth")
    axes.set_ylabel("squared distance to truth")
    axes.grid(True, axis="y")
    axes.legend(loc="upper center", fontsize=6)
    drawing.letter(axes, "c", "a weight without a search")
    return rows


def _caption(study: Study) -> str:
    scale = study.scale.replace("sin(2 pi x)", r"$\sin\,2\pi\,x$").replace("^2", "²")
    scale = reading.minus(scale)  # and no space inside of mathematics: captions are wrapped
    seeds = reading.count(study.fixed.replicas, "draw")
    return (
        f"Kernel ridge regression of {scale}, fitted to $\\alpha$ times the labels and "
        f"$1-\\alpha$ times the student before; means of {seeds} of the noise with "
        "95 % intervals. a: dotted, the regression of ridge / $\\alpha$."
    )
