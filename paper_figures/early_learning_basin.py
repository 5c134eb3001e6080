"""The basin that early-learning regularization makes around an example's true class.

The logits of one example with a wrong label: from which probability of its true class it is held
there, measured and by the formula lambda / (2 (lambda - 1)), and what becomes of it.

The derivation is ours, from the gradient of Liu et al. 2020, arXiv 2007.00151, lemma 2.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record
from dynamics.statistics import UNBOUNDED, Claim, Estimate, Scale
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.draw import Look
from paper_figures.early_learning_theory import OURS
from paper_figures.reading import Said, row

EXPERIMENT = "early_learning_theory"
STUDY = "Basin"
PRESET = "default"
TOGETHER = ()

CLEAR = 2.5  # from this lambda on the clip of the probabilities is not felt
SHOWN = 3.0  # the lambda whose trajectories are drawn
FAR = 0.99  # of the true class, at the start
PLACES = ("step", "elr_lambda", "start")
LOOKS = {
    "two classes": Look("#0072B2", "o"),
    "many classes": Look("#56B4E9", "s"),
    "spread": Look("#E69F00", "^"),
}

FORMULA = Said(
    "With early-learning regularization of lambda > 2 an example is held at its true class from a "
    "probability of lambda / (2 (lambda - 1)).",
    OURS,
)
HELD = Said("Just above lambda = 2 an example that is sure of its true class stays there.", OURS)
LOST = Said("Up to lambda = 2 nothing is held: it is memorised, only later.", OURS)
SPREAD = Said(
    "The formula asks for the rest of the probability to be at the noisy label: spread over all "
    "other classes, the basin is another.",
    OURS,
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    cases: dict[str, dict[float, tuple[float, float]]]  # -> lambda -> measured, predicted
    classes: int
    lambdas: np.ndarray  # f64[L]
    starts: np.ndarray  # f64[Q]
    steps: np.ndarray  # f64[T]
    true: np.ndarray  # f64[L, Q, T]: of two classes
    scale: Scale

    def end(self, elr_lambda: float) -> float:
        """Where an example that started at FAR ends."""
        return float(self.true[self.place(elr_lambda), self.near(FAR), -1])

    def place(self, elr_lambda: float) -> int:
        """Of the lambda nearest to this one."""
        return int(np.argmin(abs(self.lambdas - elr_lambda)))

    def near(self, start: float) -> int:
        """The place of the start nearest to this one."""
        return int(np.argmin(abs(self.starts - start)))

    def apart(self, case: str, least: float) -> float:
        """The largest distance of measured and predicted from the lambda ``least`` on."""
        found = [abs(m - p) for e, (m, p) in self.cases[case].items() if e >= least]
        return max(found, default=float("nan"))


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "early_learning_basin"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.6)
        places = fig.subplots(1, 3, width_ratios=[1.2, 1, 1])
        rows = [
            *_thresholds(places[0], study),
            *_fan(places[1], study),
            *_sure(places[2], study),
        ]
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "early_learning_basin") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    reading.array(run, "true", 4)  # finite: none diverged
    cases: dict[str, dict[float, tuple[float, float]]] = {name: {} for name in LOOKS}
    names = ("case", "elr_lambda", "measured", "predicted")
    for case, elr_lambda, measured, predicted in reading.columns(run, *names):
        if case in cases:
            cases[case][float(elr_lambda)] = (float(measured), float(predicted))
    for name, found in cases.items():
        if not any(one > 2 for one in found) or not any(one <= 2 for one in found):
            raise ValueError(
                f"{reading.where(run)} needs rows of case {name!r} for lambdas up to 2 and "
                f"above, got {sorted(found)}"
            )
    true = run.arrays["true"].at(case="two classes")
    if true.dims != PLACES:
        raise ValueError(
            f"{reading.where(run)}: array 'true' must have the dims case and {PLACES}, got "
            f"{run.arrays['true'].dims}"
        )
    steps, lambdas, starts = (np.asarray(true.coords[dim], np.float64) for dim in PLACES)
    rate, beta = (reading.number(run, "study", name) for name in ("learning_rate", "beta"))
    return Study(
        cases=cases,
        classes=int(reading.number(run, "study", "classes")),
        lambdas=lambdas,
        starts=starts,
        steps=steps,
        true=np.moveaxis(np.asarray(true.values, np.float64), 0, -1),
        scale=reading.scale_of(
            run, f"the logits of one example, learning rate {rate:g}, beta {beta:g}"
        ),
    )


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(figure, study.scale, 1, "")
    above = float(min(study.lambdas[study.lambdas > 2]))
    below = float(max(study.lambdas[study.lambdas <= 2]))
    clear = reading.nearest(list(study.lambdas), CLEAR)
    return [
        made(
            *(_one(study.apart("two classes", above)), "two classes: largest |measured - formula|"),
            *(FORMULA,),
            at_most=0.005,
        ),
        made(
            _one(study.apart("many classes", clear)),
            f"{study.classes} classes: largest |measured - formula| from lambda {clear:g}",
            FORMULA,
            at_most=0.005,
        ),
        made(
            *(_one(study.end(above)), f"from {FAR} to, at lambda {above:g}", HELD),
            at_least=0.9,
        ),
        made(
            *(_one(study.end(below)), f"from {FAR} to, at lambda {below:g}", LOST),
            control=True,
            at_most=0.1,
        ),
        made(
            _one(study.apart("spread", clear)),
            "rest spread over all classes: largest |measured - formula|",
            SPREAD,
            control=True,
            at_least=0.05,
        ),
    ]


def _one(value: float) -> Estimate:
    """Nothing is random, so there is no interval."""
    return Estimate(value, *UNBOUNDED)


def _thresholds(axes: Axes, study: Study) -> list[dict[str, Any]]:
    x = np.linspace(2, max(study.lambdas), 400)
    curve = x / (2 * (x - 1))
    axes.fill_between(x, curve, 1, color="#0072B2", alpha=0.08, lw=0)
    axes.plot(x, curve, color="#000000", lw=1.0, label=r"$\lambda\,/\,2(\lambda-1)$")
    axes.axvline(2, color="#999999", ls=":", lw=0.8)
    names = {
        "two classes": "two classes",
        "many classes": f"{study.classes} classes, rest at label",
        "spread": f"{study.classes} classes, rest spread",
    }
    rows = [row("a", "formula", at, _one(float(y)), None) for at, y in zip(x, curve, strict=True)]
    for case, name in names.items():
        look, found = LOOKS[case], study.cases[case]
        shown = [one for one in found if one > 2]
        measured = [found[one][0] for one in shown]
        axes.plot(shown, measured, look.marker, color=look.color, mfc="white", label=name, zorder=3)
        rows += [row("a", name, e, _one(found[e][0]), 1) for e in found]
    axes.set_xlim(0.8, max(study.lambdas) + 0.2)
    axes.set_ylim(0.2, 1.02)
    axes.text(0.62, 0.93, "held", transform=axes.transAxes, color="#0072B2", fontsize=7)
    axes.text(1.05, 0.6, "none\nheld", fontsize=7, color="#777777")
    axes.set_xlabel("strength $\\lambda$ of ELR")
    axes.set_ylabel("probability $q$ of true class")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.0), fontsize=6)
    drawing.letter(axes, "a", "the basin")
    return rows


def _fan(axes: Axes, study: Study) -> list[dict[str, Any]]:
    place, rows = study.place(SHOWN), []
    elr_lambda = float(study.lambdas[place])
    border = study.cases["two classes"][elr_lambda][1]
    for start in sorted({study.near(border + d) for d in (-0.3, -0.15, -0.05, -0.01, 0.01, 0.1)}):
        color = LOOKS["two classes"].color if study.starts[start] > border else "#D55E00"
        rows += _path(axes, study, "b", place, start, Look(color, ""), "")
    axes.axhline(border, color="#000000", ls=":", lw=0.8)
    axes.set_xlabel("step")
    drawing.letter(axes, "b", f"starts around it, $\\lambda$ = {elr_lambda:g}")
    return rows


def _sure(axes: Axes, study: Study) -> list[dict[str, Any]]:
    start, rows = study.near(FAR), []
    near = sorted(study.lambdas, key=lambda one: (abs(one - 2), one))
    shown = sorted({float(min(study.lambdas)), *(float(one) for one in near[:2]), SHOWN})
    colors = ("#D55E00", "#E69F00", "#56B4E9", "#0072B2")
    for color, elr_lambda in zip(colors, shown, strict=False):
        place, name = study.place(elr_lambda), f"$\\lambda$ = {elr_lambda:g}"
        rows += _path(axes, study, "c", place, start, Look(color, ""), name)
    axes.set_xlabel("step")
    axes.legend(loc="center left", fontsize=6)
    drawing.letter(axes, "c", f"all from {study.starts[start]:.2f}")
    return rows


def _path(
    axes: Axes, study: Study, panel: str, place: int, start: int, look: Look, name: str
) -> list[dict[str, Any]]:
    """One example over the steps after the first, logarithmic."""
    x, y = study.steps[1:], study.true[place, start, 1:]
    axes.plot(x, y, color=look.color, label=name)
    axes.set_xscale("log")
    axes.set_xlim(1, x[-1])
    axes.set_ylim(-0.03, 1.03)
    axes.grid(True, axis="y")
    series = f"lambda {study.lambdas[place]:g} from {study.starts[start]:g}"
    return [row(panel, series, t, _one(float(v)), 1) for t, v in zip(x, y, strict=True)]


def _caption(study: Study) -> str:
    return (
        f"Gradient descent on {study.scale}, its label wrong. Above the curve it ends at its true "
        f"class. b and c: two classes. Nothing is random; measured on a grid of "
        f"{len(study.starts)} starts. Near $\\lambda$ = 2 the clip of the probabilities at 1e-4 "
        "makes the basin a little smaller."
    )
