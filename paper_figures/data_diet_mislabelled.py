"""Data Diet: how well the scores of examples find those whose labels are wrong.

(a) The part of the wrong labels found against the part of the right ones suspected with them, when
examples are taken from the hard end of a score averaged over the runs of a draw. (b) The area under
that curve against the epoch of the score. A row of panels for each fraction of wrong labels.

Reference: Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075, section 4 on label noise; Pleiss et al.
2020, arXiv 2001.10528, for AUM; Anand, Tan & Minakova 2023, arXiv 2311.16298, for VoG. Curves and
areas are means over draws, each with wrong labels and scoring runs of its own; so are intervals.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate
from paper_figures import data_diet, data_diet_scores, reading
from paper_figures import draw as drawing
from paper_figures.data_diet import KIRSCH, PAPER
from paper_figures.data_diet_scores import LABELS, Score, Scores
from paper_figures.draw import Look

EXPERIMENT = "data_diet"
STUDY = "Ranking"
PRESET = "digits"
TOGETHER = ("noise",)

AUM_PAPER = "Pleiss et al. 2020, arXiv 2001.10528"
VOG_PAPER = "Anand, Tan & Minakova 2023, arXiv 2311.16298"

LOOKS = {
    "el2n": drawing.LOOKS["EL2N (hardest)"],
    "grand": drawing.LOOKS["GraNd (hardest)"],
    "loss": Look("#CC79A7", "P"),
    "pvi": Look("#56B4E9", "v"),
    "tracin": Look("#332288", "X"),
    "aum": Look("#000000", "*"),
    "forgetting": drawing.LOOKS["forgetting (hardest)"],
    "vog": Look("#882255", "d", "--"),
    "input_norm": Look("#777777", "x", ":"),
}
INIT_LOOK = Look(drawing.LOOKS["GraNd at init (hardest)"].color, "D", "--")
INIT, NORM_OF = Score("grand", 0.0), Score("input_norm")
OPTIONAL = ("pvi", "vog")
ONCE = ("tracin", "input_norm")  # scores of no single epoch
TOP = 0.9999  # of the axis of areas

EARLY = "Early in training the examples of highest EL2N are those whose labels are wrong."
SINGLE = "A single run already finds most of them."
AUM = "Over the whole of training, the area under the margin tells wrong labels from right ones."
CHANCE = "GraNd at initialisation knows nothing of the labels."
NORM = "Nor does the norm of the input, to which GraNd at initialisation comes down."
VOG = "The variance of gradients is no detector of wrong labels, whatever else it ranks."


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    scores: Scores
    wrong: np.ndarray  # bool[D, N]
    names: dict[str, list[Score]]  # those of a kind, by epoch
    single: np.ndarray  # f64[D]: the area for early EL2N of a run alone, averaged over a draw's

    def auc(self, score: Score) -> Estimate:
        """The area under the curve of the average over a draw's runs; its mean over draws."""
        found = self.scores.estimate(lambda mean, d: statistics.auc(mean[0], self.wrong[d]), score)
        return data_diet.clipped(found, 0.0, 1.0)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "data_diet_mislabelled"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of the runs that have wrong labels; its files, and its claims.

    ValueError: none has any, or one lacks something, named.
    """
    studies = _studies(runs)
    claims = [claim for study in studies for claim in _claims(study, name)]
    with drawing.style("full"):
        fig = drawing.figure("full", height=0.85 + 1.7 * len(studies))
        panels = fig.subplots(len(studies), 2, squeeze=False)
        table = []
        for i, (study, axes) in enumerate(zip(studies, panels, strict=True)):
            table += _panel_roc(axes[0], chr(ord("a") + 2 * i), study)
            table += _panel_epochs(axes[1], chr(ord("b") + 2 * i), study)
        panels[-1, 0].set_xlabel("right labels suspected (%)")
        panels[-1, 1].set_xlabel("epoch of the score")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside right center", handlelength=2.6, labelspacing=0.7)
        drawing.caption(fig, _caption(studies))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(table),
            claims=claims,
            fingerprints=[study.scores.run.fingerprint for study in studies],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "data_diet_mislabelled") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return [claim for study in _studies(runs) for claim in _claims(study, figure)]


def _studies(runs: Sequence[record.Run]) -> list[Study]:
    noisy = [run for run in runs if reading.number(run, "noise")]
    if not noisy:
        fingerprints = ", ".join(run.fingerprint for run in runs)
        raise ValueError(
            f"{EXPERIMENT} run {fingerprints}: there are no wrong labels to find: "
            "add noise, as in --noise 0.2"
        )
    return [_study(run) for run in noisy]


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    scores = data_diet_scores.read(run)
    wrong = data_diet_scores.flags(run, scores.draws)
    if wrong.all(axis=1).any() or not wrong.any(axis=1).all():
        raise ValueError(
            f"{reading.where(run)}: some of the labels of every draw must be wrong and some right, "
            f"got {wrong.sum(axis=1).tolist()} wrong of {wrong.shape[1]}"
        )
    names = {}
    for kind in LOOKS:
        once, early = kind in ONCE, Score(kind, scores.early)
        mine = [Score(kind)] if once else [Score(kind, epoch) for epoch in scores.epochs]
        names[kind] = [score for score in mine if scores.has(score)]
        if not once and early not in names[kind]:
            if kind not in OPTIONAL:
                scores.hard(early)  # says that it isn't there
            del names[kind]
        elif not names[kind]:
            scores.hard(Score(kind))
    single = _single(run, scores)
    return Study(scores, wrong, names, single)


def _single(run: record.Run, scores: Scores) -> np.ndarray:
    found = {
        int(replica): np.nan if auc is None else float(auc)
        for score, epoch, replica, auc in reading.columns(run, "score", "epoch", "replica", "auc")
        if score == "el2n" and epoch == scores.early and replica is not None
    }
    values = np.array([found[replica] for replica in sorted(found)])
    if len(values) != scores.replicas or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            f"{reading.where(run)} must have a row of auc in [0, 1] for el2n at epoch "
            f"{scores.early:g} and each of {scores.replicas} replicas, got {values.tolist()}"
        )
    return np.array([values[mine].mean() for mine in scores.draws.runs])


# Measuring


def _claims(study: Study, figure: str) -> list[Claim]:
    scores = study.scores
    judge = functools.partial(
        statistics.judge,
        figure=figure,
        seeds=scores.draws.seeds,
        scale=data_diet.scale(scores.run),
        unit="AUC",
    )
    early = f"after {reading.count(scores.early, 'epoch')}"
    late = f"after {reading.count(scores.last, 'epoch')}"
    el2n, aum = Score("el2n", scores.early), Score("aum", scores.last)
    average = f"averaged over {reading.count(scores.draws.count, 'run')}"
    claims = [
        judge(study.auc(el2n), paper=PAPER, statement=EARLY, at_least=0.98,
              quantity=f"AUC of EL2N {early}, {average}"),
        judge(statistics.bootstrap(study.single), paper=PAPER, statement=SINGLE, at_least=0.95,
              quantity=f"AUC of EL2N {early}, of one run"),
        judge(study.auc(aum), paper=AUM_PAPER, statement=AUM, at_least=0.98,
              quantity=f"AUC of AUM {late}, {average}"),
    ]  # fmt: skip
    control = functools.partial(judge, kind="control")
    for score, what, said in ((INIT, "GraNd at init", CHANCE), (NORM_OF, "the input norm", NORM)):
        if scores.has(score):
            off = Estimate(*(np.array(study.auc(score)) - 0.5).tolist())
            claims.append(control(data_diet_scores.size(off), paper=KIRSCH, statement=said,
                                  quantity=f"|AUC - 0.5| of {what}", at_most=0.12))  # fmt: skip
    if "vog" in study.names:
        vog = study.auc(Score("vog", scores.last))
        claims.append(control(vog, paper=VOG_PAPER, statement=VOG, at_most=0.6,
                              quantity=f"AUC of VoG {late}"))  # fmt: skip
    return claims


# Drawing


def _curves(study: Study) -> dict[Score, tuple[str, Look]]:
    """Score -> label and look, of what has a curve in (a)."""
    early, out = study.scores.early, {}
    for kind in study.names:
        out[Score(kind, None if kind in ONCE else early)] = (LABELS[kind], LOOKS[kind])
    if study.scores.has(INIT) and INIT not in out:
        norm = out.pop(NORM_OF)
        out |= {INIT: ("GraNd at init", INIT_LOOK), NORM_OF: norm}
    return out


def _panel_roc(axes: Axes, panel: str, study: Study) -> list[dict[str, Any]]:
    """Logarithmic in the false alarms, where good detectors differ."""
    drawing.letter(axes, panel, data_diet.labels(study.scores.run))
    fewest = 1 / int((~study.wrong).sum(axis=1).max())
    grid = np.geomspace(fewest, 1, 200)
    table = []
    for score, (label, look) in _curves(study).items():
        each = [
            np.interp(grid, *roc(mean[0], wrong))
            for mean, wrong in zip(study.scores.averages(score), study.wrong, strict=True)
        ]
        y = np.mean(each, axis=0)
        axes.plot(grid, y, look.line, color=look.color, marker=look.marker, lw=0.9,
                  markevery=(0.07, 0.22), label=label, zorder=3)  # fmt: skip
        table += [
            {"panel": panel, "series": label, "x": float(a), "y": float(b),
             "seeds": study.scores.draws.seeds} for a, b in zip(grid, y, strict=True)
        ]  # fmt: skip
    axes.plot(grid, grid, color="#BBBBBB", lw=0.8, zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(fewest, 1)
    axes.set_ylim(0, 1.03)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g}"))
    axes.grid(axis="y")
    axes.set_ylabel("wrong labels found")
    return table


def roc(scores: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parts of right and of wrong labels that are at least as hard as each score, from (0, 0).

    Examples of one score come together, so a tie is a straight line; so do infinities.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(statistics.ranks(scores)[order])), len(order) - 1)
    hits = np.cumsum(wrong[order])[ends]
    misses = ends + 1 - hits
    return (
        np.concatenate([[0.0], misses / (~wrong).sum()]),
        np.concatenate([[0.0], hits / wrong.sum()]),
    )


def _panel_epochs(axes: Axes, panel: str, study: Study) -> list[dict[str, Any]]:
    """Areas on a logit axis, epochs on one that is linear up to 1."""
    drawing.letter(axes, panel)
    table, epochs = [], study.scores.epochs
    for kind, names in study.names.items():
        look, label = LOOKS[kind], LABELS[kind]
        found = [study.auc(score) for score in names]
        if kind in ONCE:
            x = [epochs[-1]] if kind == "tracin" else [epochs[0], epochs[-1]]
            found *= len(x)
        else:
            x = [score.epoch for score in names if score.epoch is not None]
        mean, low, high = np.clip(np.array(found), 1 - TOP, TOP).T
        axes.plot(x, mean, look.line, color=look.color, marker=look.marker, lw=0.9, zorder=3)
        if np.isfinite(np.array(found)).all() and len(x) > 1:
            axes.fill_between(x, low, high, color=look.color, alpha=0.18, lw=0)
        seeds = study.scores.draws.seeds
        table += [reading.row(panel, label, at, e, seeds) for at, e in zip(x, found, strict=True)]
    axes.axhline(0.5, color="#BBBBBB", lw=0.8, zorder=1)
    axes.axvline(study.scores.early, color="#BBBBBB", lw=0.6, ls=(0, (2, 2)), zorder=1)
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlim(epochs[0] - 0.1 * (epochs[0] == 0), epochs[-1] * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(epochs))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_yscale("logit")
    axes.yaxis.set_major_locator(FixedLocator([0.01, 0.1, 0.5, 0.9, 0.99, 0.999]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.set_ylim(0.25, TOP)
    axes.grid(axis="y")
    axes.set_ylabel("area under the curve (AUC)")
    return table


def _caption(studies: Sequence[Study]) -> str:
    scores = studies[0].scores
    draws = data_diet.varied(scores.run, scores.draws.seeds, 1.0, "draw")
    return (
        f"{data_diet.scale(scores.run, noise=False)}. Means of {draws}; scores averaged over a "
        f"draw's runs of {reading.count(scores.last, 'epoch')}; left, after {scores.early:g} "
        "(dashed on the right), false alarms logarithmic; right, bands: 95 % intervals over draws. "
        "TracIn sums over all epochs. "
        "Grey: chance. Forgetting: never learned counts as hardest."
    )
