"""Early learning and memorisation in logistic regression, where they can be proved.

Two Gaussians, labels of which some are wrong, gradient descent: the direction of the gradient, the
labels that wrong-labelled examples are given, and test accuracy against the step, for cross-entropy
beside early-learning regularization (ELR); and what is memorised against ELR's strength lambda.

Reference: Liu et al. 2020, arXiv 2007.00151, figures 1 and A.1, theorem 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Scale, bootstrap
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said

EXPERIMENT = "early_learning_theory"
STUDY = "Phases"
PRESET = "default"
TOGETHER = ()

PAPER = "Liu et al. 2020, arXiv 2007.00151"
OURS = f"ours, after {PAPER}"
HELD = 3.0  # the lambda of the paper's CIFAR-10 runs, drawn beside cross-entropy
WEAK = 1.0
GROWN = 0.1  # <theta, v> at the time T

LOOKS = {
    "cross-entropy": Look("#D55E00", ""),
    "ELR": Look("#0072B2", "", "-"),
    "weak ELR": Look("#E69F00", "", "-."),
    "few dimensions": Look("#777777", "", "--"),
}
METRICS = {  # what a run says of each step, and its range
    "cosine": (-1.001, 1.001),
    "corrected": (0.0, 1.0),
    "memorised": (0.0, 1.0),
    "test": (0.0, 1.0),
    "along": (-np.inf, np.inf),
    "kappa_clean": (0.0, 4.001),
    "kappa_wrong": (0.0, 4.001),
}

ALONG = Said("Until <theta, v> is 1 / 10, the gradient's cosine with v is at least 1 / 6.", PAPER)
FIRST = Said("At first wrong-labelled examples are given their true labels.", PAPER)
LAST = Said("In the end every noisy label is memorised.", PAPER)
WORSE = Said("Memorising costs test accuracy.", PAPER)
VANISH = Said("While the truth is learned, the gradients of clean examples shrink.", PAPER)
GROW = Said("... and those of wrong-labelled examples grow.", PAPER)
HOLDS = Said("Early-learning regularization keeps wrong labels from being memorised.", PAPER)
BETTER = Said("... and keeps the test accuracy that was learned early.", PAPER)
DELAYS = Said(
    "Up to lambda = 2 it only delays: at lambda = 1 wrong labels are memorised too.", OURS
)
FEW = Said(
    "Where no plane fits all labels (a dimension below n (1 - flip / 2)), not all are memorised.",
    PAPER,
)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    values: dict[str, reading.Cells]  # metric -> by dim, lambda and step
    steps: tuple[float, ...]
    lambdas: tuple[float, ...]
    dim: float
    control: float
    scale: Scale

    def over(self, metric: str, elr_lambda: float, dim: float | None = None) -> np.ndarray:
        """f64[R, T]: a metric at every step."""
        at = (self.dim if dim is None else dim, elr_lambda)
        return np.stack([self.values[metric].of(*at, step) for step in self.steps], axis=1)

    @property
    def held(self) -> float:
        """The strength that is drawn."""
        return reading.nearest([one for one in self.lambdas if one] or [0.0], HELD)

    @property
    def weak(self) -> float | None:
        """A strength of at most 2, if there is one."""
        below = [one for one in self.lambdas if 0 < one <= 2]
        return reading.nearest(below, WEAK) if below else None

    def grown(self, elr_lambda: float) -> np.ndarray:
        """i64[R]: the place of T among the steps, the last one if never."""
        grown = self.over("along", elr_lambda) >= GROWN
        return np.where(grown.any(axis=1), grown.argmax(axis=1), len(self.steps) - 1)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "early_learning_theory"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=4.1)
        (labels, along), (test, strength) = fig.subplots(2, 2)
        rows = [
            *_labels(labels, study),
            *_along(along, study),
            *_test(test, study),
            *_strength(strength, study),
        ]
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "early_learning_theory") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    by = ("dim", "elr_lambda", "step")
    values = {
        name: reading.cells(run, *by, of=name, within=within, times=1.0)
        for name, within in METRICS.items()
    }
    dim, control = (reading.number(run, "study", name) for name in ("dim", "control"))
    lambdas = tuple(float(one) for one in reading.value(run, "study", "lambdas"))
    n, flip = (reading.number(run, "study", name) for name in ("examples", "flip"))
    sigma = reading.number(run, "study", "sigma")
    study = Study(
        values=values,
        steps=values["test"].places(dim=dim, elr_lambda=0.0),
        lambdas=lambdas,
        dim=dim,
        control=control,
        scale=reading.scale_of(
            run,
            f"two Gaussians of sigma {sigma:g}, {n:g} examples in {dim:g} dimensions, about "
            f"{100 * flip / 2:g} % wrong labels",
        ),
    )
    for elr_lambda in lambdas:
        study.over("test", elr_lambda)
    study.over("test", 0.0, control)
    return study


def _claims(study: Study, figure: str) -> list[Claim]:
    seeds = study.values["test"].replicas
    part = reading.judging(figure, study.scale, seeds, "")
    points = reading.judging(figure, study.scale, seeds)
    ce, elr, last = (lambda m: study.over(m, 0.0)), (lambda m: study.over(m, study.held)), -1
    until = study.grown(0.0)
    early = [row[: max(t, 1)].min() for row, t in zip(ce("cosine"), until, strict=True)]
    corrected, memorised, test = ce("corrected"), ce("memorised"), ce("test")
    with_elr = f"ELR of lambda {study.held:g}"
    claims = [
        part(bootstrap(early), "least cosine with v before T", ALONG, at_least=1 / 6),
        part(bootstrap(corrected.max(1)), "wrong-labelled given the true label, at the peak", FIRST,
             at_least=0.95),
        part(bootstrap(memorised[:, last]), "wrong labels memorised in the end", LAST,
             at_least=0.98),
        points(statistics.paired(100 * test.max(1), 100 * test[:, last]),
               "best - last test accuracy", WORSE, at_least=8.0),
        *_gradients(study, part, until),
        part(bootstrap(elr("memorised")[:, last]), f"memorised in the end with {with_elr}", HOLDS,
             at_most=0.02),
        points(statistics.paired(100 * elr("test")[:, last], 100 * test[:, last]),
               f"{with_elr} - cross-entropy, last test accuracy", BETTER, at_least=8.0),
    ]  # fmt: skip
    if study.weak is not None:
        late = study.over("memorised", study.weak)[:, last]
        quantity = f"memorised in the end with ELR of lambda {study.weak:g}"
        claims.append(part(bootstrap(late), quantity, DELAYS, control=True, at_least=0.9))
    few = study.over("memorised", 0.0, study.control)[:, last]
    quantity = f"memorised in the end in {study.control:g} dimensions"
    return [*claims, part(bootstrap(few), quantity, FEW, control=True, at_most=0.7)]


def _gradients(study: Study, part: Callable[..., Claim], until: np.ndarray) -> list[Claim]:
    """How the mean of (tanh(s / 2) - eps)^2 changes until T."""
    claims = []
    for name, text, said, gate in (
        ("kappa_clean", "clean", VANISH, {"at_most": -0.05}),
        ("kappa_wrong", "wrong-labelled", GROW, {"at_least": 0.05}),
    ):
        kappa = study.over(name, 0.0)
        change = kappa[np.arange(len(kappa)), until] - kappa[:, 0]
        claims.append(part(bootstrap(change), f"kappa^2 at T - at the start, {text}", said, **gate))
    return claims


def _over_steps(
    axes: Axes, study: Study, panel: str, lines: Sequence[tuple[str, np.ndarray, str, str]]
) -> list[dict[str, Any]]:
    """Lines (name, values [R, T], look, style) over the steps after the first, logarithmic."""
    kept = [i for i, step in enumerate(study.steps) if step >= 1]
    x, rows = [study.steps[i] for i in kept], []
    for name, values, look, style in lines:
        made = LOOKS[look]._replace(line=style)
        found = curve(axes, x, values[:, kept], made, name)
        rows += rows_of(panel, name, x, found, len(values))
    axes.set_xscale("log")
    axes.set_xlim(1, study.steps[-1])
    axes.set_xlabel("step of gradient descent")
    axes.grid(True, axis="y")
    return rows


def _labels(axes: Axes, study: Study) -> list[dict[str, Any]]:
    elr = f"ELR, $\\lambda$ = {study.held:g}"
    rows = _over_steps(
        *(axes, study, "a"),
        [
            ("cross-entropy: true label", study.over("corrected", 0.0), "cross-entropy", "-"),
            ("cross-entropy: noisy label", study.over("memorised", 0.0), "cross-entropy", ":"),
            (f"{elr}: true label", study.over("corrected", study.held), "ELR", "-"),
            (f"{elr}: noisy label", study.over("memorised", study.held), "ELR", ":"),
        ],
    )
    axes.set_ylabel("part of wrong-labelled")
    axes.legend(loc="center right", fontsize=6)
    drawing.letter(axes, "a", "what wrong-labelled examples are given")
    return rows


def _along(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows = _over_steps(
        *(axes, study, "b"),
        [
            ("cross-entropy", study.over("cosine", 0.0), "cross-entropy", "-"),
            (
                f"cross-entropy, {study.control:g} dimensions",
                *(study.over("cosine", 0.0, study.control), "few dimensions", "--"),
            ),
        ],
    )
    axes.axhline(1 / 6, color="#999999", ls=":", lw=0.8)
    axes.text(1.1, 1 / 6 + 0.02, "1/6", fontsize=6, color="#777777")
    axes.set_ylabel("cosine of descent and $v$")
    axes.legend(loc="upper right", fontsize=6)
    drawing.letter(axes, "b", "towards the true direction, then not")
    return rows


def _test(axes: Axes, study: Study) -> list[dict[str, Any]]:
    lines = [("cross-entropy", study.over("test", 0.0), "cross-entropy", "-")]
    if study.weak is not None:
        name = f"ELR, $\\lambda$ = {study.weak:g}"
        lines.append((name, study.over("test", study.weak), "weak ELR", "-."))
    lines.append((f"ELR, $\\lambda$ = {study.held:g}", study.over("test", study.held), "ELR", "-"))
    lines.append(
        (
            f"cross-entropy, {study.control:g} dimensions",
            *(study.over("test", 0.0, study.control), "few dimensions", "--"),
        )
    )
    rows = _over_steps(
        axes, study, "c", [(name, 100 * values, look, style) for name, values, look, style in lines]
    )
    axes.set_ylabel("test accuracy (%)")
    axes.legend(loc="lower left", bbox_to_anchor=(0.1, 0.0), fontsize=6)
    drawing.letter(axes, "c", "what is lost by memorising")
    return rows


def _strength(axes: Axes, study: Study) -> list[dict[str, Any]]:
    last, rows = study.steps[-1], []
    times = [reading.nearest(study.steps, last / part) for part in (100, 10)]
    shades = ("#56B4E9", "#0072B2", "#332288")
    marks = ("o", "s", "D")
    for at, color, mark in zip([*times, last], shades, marks, strict=True):
        place = study.steps.index(at)
        values = np.stack([study.over("memorised", e)[:, place] for e in study.lambdas], axis=1)
        name = f"after {at:,.0f} steps"
        found = curve(axes, study.lambdas, values, Look(color, mark), name)
        rows += rows_of("d", name, study.lambdas, found, len(values))
    axes.axvline(2, color="#999999", ls=":", lw=0.8)
    axes.set_xlabel("strength $\\lambda$ of ELR (0: cross-entropy)")
    axes.set_ylabel("wrong labels memorised")
    axes.grid(True, axis="y")
    axes.legend(loc="upper right", fontsize=6)
    drawing.letter(axes, "d", "a transition at $\\lambda$ = 2")
    return rows


def _caption(study: Study) -> str:
    seeds = study.values["test"].replicas
    bands = "bands are 95 % intervals of the mean over" if seeds > 1 else "from"
    return (
        f"{study.scale[0].upper()}{study.scale[1:]}; full-batch gradient descent on the logistic "
        f"loss from a start orthogonal to $v$; {bands} {reading.count(seeds, 'paired seed')}."
    )
