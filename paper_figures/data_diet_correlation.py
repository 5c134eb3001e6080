"""Data Diet: how far the scores of examples agree, with one another and with themselves.

(a) Spearman's rank correlation of every two scores, each averaged over runs and turned so that high
is hard; on the diagonal of a score with itself, half of the runs against the other half. (b) The
same for averages over fewer runs: how many it takes.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, appendix D of the submission; Kirsch
2023, arXiv 2303.14753, for GraNd at initialisation. Intervals leave out one run at a time; where
labels are wrong, numbers are means over draws, each with labels and runs of its own, and intervals
are over these.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate
from paper_figures import data_diet, data_diet_scores, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import KIRSCH, PAPER, Draws
from paper_figures.data_diet_scores import Score, Scores, parts
from paper_figures.draw import Look
from paper_figures.reading import minus

EXPERIMENT = "data_diet"
STUDY = "Ranking"
PRESET = "digits"
TOGETHER = ()

NORM_OF = Score("input_norm")
INIT = ("grand", "el2n")  # after input norm, in the corner of what knows no labels
EARLY = ("el2n", "grand", "loss", "entropy", "logit_margin", "pvi")
LATE = ("aum", "confidence", "forgetting", "variability", "vog")
COLORS = "RdBu_r"
CORNER = (0.58, 0.64, 0.24, 0.33)  # of the matrix, which is empty above its diagonal
FEWEST = 4  # runs, so that without one there are still two halves

SAME = "EL2N, which needs no gradient, ranks examples as GraNd does once training has begun."
NORM = "GraNd at initialisation ranks examples by little more than the norm of their input."
SOON = "EL2N early in training already ranks examples as it does at the end."
AVERAGE = "Scores are to be averaged over runs: a single run ranks examples less reliably."
NOTHING = "GraNd at initialisation says nothing of which examples are hard later."


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    scores: Scores
    names: tuple[Score, ...]  # in the order drawn
    agreement: dict[Score, dict[int, Estimate]]  # (b): runs averaged -> Spearman

    def correlation(self, a: Score, b: Score) -> Estimate:
        """Spearman of two averages over runs."""
        found = self.scores.estimate(lambda means, _: statistics.spearman(*means), a, b)
        return data_diet.clipped(found, -1.0, 1.0)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_correlation"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    study = _study(runs)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=3.6)
        axes = fig.subplots()
        table = _panel_matrix(fig, axes, study)
        table += _panel_runs(axes.inset_axes(CORNER), study)
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(table),
            claims=claims,
            fingerprints=[run.fingerprint for run in runs],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_correlation") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(runs), figure)


def _study(runs: Sequence[record.Run]) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    if len(runs) != 1:
        raise ValueError(f"{EXPERIMENT}: this figure is of one run, got {len(runs)}")
    scores = data_diet_scores.read(runs[0])
    if scores.draws.count < FEWEST:
        raise ValueError(
            f"{reading.where(runs[0])}: score.replicas must be >= {FEWEST} to compare halves of "
            f"the runs on the same labels, got {scores.draws.count}"
        )
    early, last = scores.early, scores.last
    names = [NORM_OF, *(Score(kind, 0) for kind in INIT)]
    names += [Score(kind, early) for kind in EARLY]
    names += [Score("el2n", last), Score("tracin"), *(Score(kind, last) for kind in LATE)]
    names = [name for name in dict.fromkeys(names) if scores.has(name)]
    followed = [Score("el2n", early), Score("grand", early), Score("grand", 0)]
    for name in [*followed, NORM_OF]:
        scores.hard(name)  # or says that it isn't there
    followed += [name for name in (Score("forgetting", last),) if name in names]
    half = scores.draws.count // 2
    counts = sorted({1, half} | {k for k in (2, 5) if k < half})
    return Study(
        scores,
        tuple(names),
        {
            name: {k: agreement(scores.hard(name), k, scores.draws) for k in counts}
            for name in followed
        },
    )


# Measuring


def agreement(replicas: np.ndarray, count: int, draws: Draws) -> Estimate:
    """Spearman between the averages of two disjoint sets of ``count`` replicas, of [R, N]."""
    found = draws.estimate(lambda some, _: _agreement(some, count), replicas)
    return data_diet.clipped(found, -1.0, 1.0)


def _agreement(replicas: np.ndarray, count: int) -> float:
    """The mean over all sets of replicas in a row; of fewer each where there are too few."""
    count = min(count, len(replicas) // 2)
    ranks = _standard(parts(replicas, count))
    return float(np.mean(np.sum(ranks * np.roll(ranks, -count, axis=0), axis=1)))


def _standard(scores: np.ndarray) -> np.ndarray:
    """Rows of ranks of mean 0 and length 1, so that products are Spearman's; NaN if constant."""
    ranks = np.stack([statistics.ranks(row) for row in scores])
    ranks -= ranks.mean(axis=1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    return np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)


def _halves(replicas: np.ndarray, half: int, draws: Draws) -> float:
    """Spearman of two halves of the runs on the same labels, averaged over draws."""
    return float(np.mean(draws.each(lambda some, _: _agreement(some, half), replicas)))


def _helped(replicas: np.ndarray) -> float:
    """Spearman of two halves of the replicas, less that of two single ones."""
    return _agreement(replicas, len(replicas) // 2) - _agreement(replicas, 1)


def _claims(study: Study, figure: str) -> list[Claim]:
    scores = study.scores
    judge = functools.partial(
        statistics.judge,
        figure=figure,
        seeds=scores.draws.seeds,
        scale=data_diet.scale(scores.run),
        unit="Spearman",
    )
    noise = reading.number(scores.run, "noise")
    el2n, grand, init = (
        *(Score(kind, scores.early) for kind in ("el2n", "grand")),
        Score("grand", 0),
    )
    gate = 0.97 if not noise else 0.95 if noise <= 0.2 else 0.93
    claims = [
        judge(study.correlation(el2n, grand), paper=PAPER, statement=SAME, at_least=gate,
              quantity=f"Spearman({el2n.label}, {grand.label})"),
        judge(study.correlation(init, NORM_OF), paper=KIRSCH, statement=NORM, at_least=0.75,
              quantity="Spearman(GraNd at init, input norm)"),
    ]  # fmt: skip
    late = Score("el2n", scores.last)
    if not noise and late != el2n:
        claims.append(
            judge(study.correlation(el2n, late), paper=PAPER, statement=SOON, at_least=0.9,
                  quantity=f"Spearman({el2n.label}, {late.label})")
        )  # fmt: skip
    helped = scores.draws.estimate(lambda some, _: _helped(some), scores.hard(el2n))
    claims.append(judge(helped, paper=PAPER, statement=AVERAGE, at_least=0.03,
                        quantity=f"Spearman({el2n.label}, itself), "
                        f"{scores.draws.count // 2} runs each - one each"))  # fmt: skip
    nothing = data_diet_scores.size(study.correlation(init, el2n))
    return [
        *claims,
        judge(nothing, paper=KIRSCH, statement=NOTHING, kind="control", at_most=0.3,
              quantity=f"|Spearman(GraNd at init, {el2n.label})|"),
    ]  # fmt: skip


# Drawing


def _panel_matrix(fig: Figure, axes: Axes, study: Study) -> list[dict[str, Any]]:
    """The lower triangle, numbers in the cells, the scale in the empty corner."""
    drawing.letter(axes, "a", "Spearman of two scores")
    scores, names = study.scores, study.names
    each = [_standard(means) for means in scores.averages(*names)]
    rho = np.mean([ranks @ ranks.T for ranks in each], axis=0)
    half = scores.draws.count // 2
    for i, name in enumerate(names):
        certain = len(scores.hard(name)) == 1
        rho[i, i] = math.nan if certain else _halves(scores.hard(name), half, scores.draws)
    shown = np.where(np.tri(len(names), dtype=bool), rho, np.nan)
    image = axes.pcolormesh(shown, cmap=COLORS, vmin=-1, vmax=1, edgecolors="white", lw=0.4)
    table = []
    for i, j in zip(*np.nonzero(np.isfinite(shown)), strict=True):
        color = "white" if abs(shown[i, j]) > 0.62 else "black"
        weight = "bold" if i == j else "normal"
        axes.text(j + 0.5, i + 0.52, _short(float(shown[i, j])), fontsize=5.2, fontweight=weight,
                  color=color, ha="center", va="center")  # fmt: skip
        series = f"{names[i].label} ~ {names[j].label}"
        e = Estimate(float(shown[i, j]), math.nan, math.nan)
        table.append(reading.row("a", series, None, e, scores.draws.seeds))
    places = np.arange(len(names)) + 0.5
    axes.set_xticks(places, [name.label for name in names], rotation=45, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    axes.set_yticks(places, [name.label for name in names])
    axes.tick_params(length=0, pad=2, labelsize=6.5)
    axes.invert_yaxis()
    for side in axes.spines.values():
        side.set_visible(False)
    _scale(fig, axes, image)
    return table


def _scale(fig: Figure, axes: Axes, image: Any) -> None:
    inside = axes.inset_axes((0.955, 0.17, 0.015, 0.33))
    bar = fig.colorbar(ScalarMappable(Normalize(-1, 1), image.cmap), cax=inside)
    bar.set_ticks([-1, -0.5, 0, 0.5, 1])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: minus(f"{v:g}")))
    bar.ax.tick_params(length=0, pad=2, labelsize=6.5)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def _short(value: float) -> str:
    """Two decimals without the zero before the point."""
    text = f"{abs(value):.2f}"
    sign = "-" if value < 0 and text != "0.00" else ""
    return minus(sign + ("1" if text == "1.00" else text.removeprefix("0")))


def _panel_runs(axes: Axes, study: Study) -> list[dict[str, Any]]:
    drawing.letter(axes, "b", "of a score and itself")
    looks = (*(drawing.LOOKS[f"{n} (hardest)"] for n in ("EL2N", "GraNd", "GraNd at init")),
             drawing.LOOKS["forgetting (hardest)"])  # fmt: skip
    table, counts = [], []
    for look, (name, found) in zip(looks, study.agreement.items(), strict=False):
        counts = list(found)
        _line(axes, counts, list(found.values()), look, name.label)
        rows = [reading.row("b", name.label, k, e, study.scores.draws.seeds)
                for k, e in found.items()]  # fmt: skip
        table += rows
    axes.set_xscale("log")
    axes.set_xlim(0.85, counts[-1] * 1.18)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_ylim(None, 1.0)
    axes.grid(axis="y")
    axes.set_xlabel("runs averaged")
    axes.set_ylabel("Spearman")
    axes.legend(loc="center left", bbox_to_anchor=(1.04, 0.5), borderaxespad=0)
    return table


def _line(axes: Axes, x: list[int], found: list[Estimate], look: Look, name: str) -> None:
    mean, low, high = np.array(found).T
    top = name.startswith("EL2N")  # on GraNd, which it hardly differs from
    sizes = {"markersize": 2.2, "lw": 0.7, "zorder": 4} if top else {"markersize": 3.8, "zorder": 3}
    axes.plot(x, mean, look.line, color=look.color, marker=look.marker, label=name, clip_on=False,
              **sizes)  # fmt: skip
    axes.fill_between(x, low, high, color=look.color, alpha=0.18, lw=0)


def _caption(study: Study) -> str:
    scores, draws = study.scores, study.scores.draws
    over = "runs" if draws.alike else f"{reading.count(draws.seeds, 'draw')} of labels and runs"
    return (
        f"{data_diet.scale(scores.run)}. Scores after @ epochs of {scores.last:g}, high is hard in "
        f"all. (a) Averaged over {reading.count(draws.count, 'run')}; bold: half of the runs "
        f"against the other half. (b) Averages over two sets of runs; bands: 95 % intervals over "
        f"{over}, on one split."
    )
