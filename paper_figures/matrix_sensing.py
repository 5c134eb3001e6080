"""What superfluous columns cost in matrix sensing, and what frees descent of the cost.

The squared error of X X^T and of F G^T against the step: a power law of -2 with more columns than
the rank, linear convergence if F and G start unequal, at a rate that depends on the start until one
step is modified.

Reference: Xiong, Ding and Du 2023, arXiv 2310.01769.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record
from dynamics.statistics import Claim, Estimate, Scale, bootstrap
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said

EXPERIMENT = "stability_theory"
STUDY = "Sensing"
PRESET = "default"
TOGETHER = ()

PAPER = "Xiong, Ding & Du 2023, arXiv 2310.01769"
OURS = f"ours, after {PAPER}"
LEAST = 1e-31  # below it the squared error is rounding
FLOOR = 1e-28  # rates are measured above it
COLORS = ("#777777", "#56B4E9", "#0072B2", "#332288")
LOOKS = {
    "asymmetric": Look("#0072B2", ""),
    "balanced": Look("#777777", "", "--"),
    "modified": Look("#D55E00", ""),
}

POWER = Said("With more columns than the rank the squared error of X X^T falls as T^-2.", PAPER)
CONSTANT = Said(
    "... and is (k - r) / (4 eta^2 T^2) in the end, whatever the scale of the start.", OURS
)
LINEAR = Said("With as many columns as the rank it converges linearly.", PAPER)
UNEQUAL = Said("F G^T converges linearly if F and G start unequal, at the rate 2 eta s^2.", OURS)
SQUARE = Said("... which is proportional to the square of the scale of the start.", PAPER)
FREE = Said("After one modified step the rate is the same for every scale.", PAPER)
RATE = Said("... and is 2 eta beta^2, beta being what singular values are raised to.", OURS)
EQUAL = Said("Where F and G start equal it is as slow as X X^T.", PAPER)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    errors: reading.Cells  # by method, columns, scale and step
    least: reading.Cells
    columns: tuple[int, ...]
    rank: int
    width: int
    scales: tuple[float, ...]
    start: float
    rate: float
    before: float
    raised: float
    scale: Scale

    def steps(self, method: str, columns: int, scale: float) -> np.ndarray:
        """f64[T]: at which the error is known."""
        found = self.errors.places(method=method, columns=columns, scale=scale)
        if not found:
            raise ValueError(
                f"{self.errors.where} has no rows for method {method!r}, columns {columns}, scale "
                f"{scale:g}"
            )
        return np.array(found)

    def over(self, method: str, columns: int, scale: float) -> np.ndarray:
        """f64[R, T]: squared errors."""
        steps = self.steps(method, columns, scale)
        return np.stack([self.errors.of(method, columns, scale, t) for t in steps], axis=1)

    def measured(self, method: str, scale: float) -> np.ndarray:
        """f64[R]: the rate a step at which the squared error of F G^T falls after the change."""
        steps = self.steps(method, self.width, scale)
        late = steps > self.before
        found = []
        for errors in self.over(method, self.width, scale):
            kept = late & (errors > FLOOR)
            found.append(-np.polyfit(steps[kept], np.log(errors[kept]), 1)[0])
        return np.array(found)


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "matrix_sensing"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=2.6)
        symmetric, asymmetric, modified = fig.subplots(1, 3)
        rows = [
            *_symmetric(symmetric, study),
            *_asymmetric(asymmetric, study),
            *_modified(modified, study),
        ]
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "matrix_sensing") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    by = ("method", "columns", "scale", "step")
    errors, least = (
        reading.cells(run, *by, of=name, within=(0.0, np.inf), times=1.0)
        for name in ("error", "least")
    )
    number = lambda name: reading.number(run, "study", name)  # noqa: E731
    columns = tuple(int(k) for k in reading.value(run, "study", "columns"))
    scales = tuple(float(s) for s in reading.value(run, "study", "scales"))
    study = Study(
        *(errors, least, columns, int(number("rank")), int(number("width")), scales),
        *(number(name) for name in ("start", "learning_rate", "before", "raised")),
        scale=reading.scale_of(
            run,
            f"a matrix of rank {number('rank'):g} and size {number('dim'):g}, all of it measured",
        ),
    )
    for k in columns:
        study.over("symmetric", k, study.start)
    for method in LOOKS:
        for scale in (scales[0], scales[-1]):
            if (study.steps(method, study.width, scale) > study.before).sum() < 2:
                raise ValueError(
                    f"{reading.where(run)} needs two steps of {method!r} after {study.before:g}"
                )
    return study


def _slope(study: Study, method: str, columns: int, scale: float, decades: float) -> np.ndarray:
    """f64[R]: d log error / d log step over the last part of the steps."""
    steps, errors = study.steps(method, columns, scale), study.over(method, columns, scale)
    kept = steps >= steps[-1] / 10**decades * 0.999
    return np.polyfit(np.log(steps[kept]), np.log(np.maximum(errors[:, kept], LEAST)).T, 1)[0]


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(figure, study.scale, study.errors.replicas, "")
    more = [k for k in study.columns if k > study.rank]
    last = study.steps("symmetric", more[0], study.start)[-1]
    slopes = np.stack([_slope(study, "symmetric", k, study.start, 1.0) for k in more])
    ends = {k: study.over("symmetric", k, study.start)[:, -1] for k in study.columns}
    constants = [4 * (study.rate * last) ** 2 * ends[k] / (k - study.rank) for k in more]
    high = study.scales[-1]
    balanced = _slope(study, "balanced", study.width, high, 1.0)
    return [
        made(bootstrap(abs(slopes + 2).max(axis=0)),
             f"largest |slope + 2|, k = {', '.join(map(str, more))}", POWER, at_most=0.07),
        made(bootstrap(abs(np.array(constants) - 1).max(axis=0)),
             "largest |4 (eta T)^2 error / (k - r) - 1|", CONSTANT, at_most=0.02),
        *_rates(study, figure),
        made(bootstrap(_log(ends[study.rank])), f"log10 of the error at step {last:,g}, k = r",
             LINEAR, control=True, at_most=-20.0),
        made(bootstrap(balanced), f"equal starts of scale {high:g}: slope", EQUAL, control=True,
             at_least=-2.5),
    ]  # fmt: skip


def _rates(study: Study, figure: str) -> list[Claim]:
    """Of F G^T after the step that is modified in a part of the runs."""
    made = reading.judging(figure, study.scale, study.errors.replicas, "")
    low, high = study.scales[0], study.scales[-1]
    plain, free = (
        {scale: study.measured(method, scale) for scale in (low, high)}
        for method in ("asymmetric", "modified")
    )
    s = study.least.of("asymmetric", study.width, low,
                       study.steps("asymmetric", study.width, low)[-1])  # fmt: skip
    ratio = f"rate from scale {high:g} over rate from {low:g}"
    # of the squared error in a step; 2 eta s^2 for small steps
    wanted, raised = (-2 * np.log(1 - study.rate * v**2) for v in (s, study.raised))
    return [
        made(bootstrap(abs(plain[low] / wanted - 1)),
             f"|rate / -2 log(1 - eta s^2) - 1|, scale {low:g}", UNEQUAL, at_most=0.05),
        made(bootstrap(plain[high] / plain[low]), ratio, SQUARE,
             at_least=0.75 * (high / low) ** 2),
        made(bootstrap(abs(free[high] / free[low] - 1)), f"modified: |{ratio} - 1|", FREE,
             at_most=0.05),
        made(bootstrap(abs(free[low] / raised - 1)),
             "modified: |rate / -2 log(1 - eta beta^2) - 1|", RATE, at_most=0.05),
    ]  # fmt: skip


def _log(values: np.ndarray) -> np.ndarray:
    return np.log10(np.maximum(values, LEAST))


def _lines(
    axes: Axes,
    study: Study,
    panel: str,
    cells: Sequence[tuple[str, int, float, Look, str]],
    first: float,
) -> list[dict[str, Any]]:
    """log10 of errors from step ``first`` on."""
    rows = []
    for method, columns, scale, look, name in cells:
        steps = study.steps(method, columns, scale)
        kept = steps >= first
        values = _log(study.over(method, columns, scale))[:, kept]
        found: list[Estimate] = curve(axes, steps[kept].tolist(), values, look, name)
        rows += rows_of(panel, f"{name}, log10", steps[kept].tolist(), found, len(values))
    axes.set_xlabel("step $T$")
    axes.grid(True, axis="y")
    return rows


def _symmetric(axes: Axes, study: Study) -> list[dict[str, Any]]:
    cells = [
        ("symmetric", k, study.start, Look(color, ""), f"$k$ = {k}" + " = $r$" * (k == study.rank))
        for k, color in zip(study.columns, COLORS, strict=False)
    ]
    rows = _lines(axes, study, "a", cells, 10)
    steps = study.steps("symmetric", study.columns[-1], study.start)
    x = steps[steps >= 100]
    for k in study.columns[1:]:
        y = np.log10((k - study.rank) / (2 * study.rate * x) ** 2)
        axes.plot(x, y, ":", color="#000000", lw=0.9, zorder=4)
    axes.set_xscale("log")
    axes.set_ylim(-12, 1)
    axes.set_ylabel("$\\log_{10}\\;||XX^T - M||^2$")
    axes.legend(loc="lower left", fontsize=6)
    drawing.letter(axes, "a", "symmetric")
    return rows


def _of_scales(study: Study, method: str, name: str) -> list[tuple[str, int, float, Look, str]]:
    """Lines of the smallest and the largest scale, the smallest one dashed."""
    look, ends = LOOKS[method], (study.scales[0], study.scales[-1])
    return [
        (method, study.width, s, look._replace(line=line), f"{name}, $\\alpha$ = {s:g}")
        for s, line in zip(ends, ("--", "-"), strict=True)
    ]


def _asymmetric(axes: Axes, study: Study) -> list[dict[str, Any]]:
    cells = [
        *_of_scales(study, "balanced", "equal"),
        *_of_scales(study, "asymmetric", "unequal"),
    ]
    rows = _lines(axes, study, "b", cells, 0)
    axes.set_ylabel("$\\log_{10}\\;||FG^T - M||^2$")
    axes.legend(loc="lower left", fontsize=6)
    drawing.letter(axes, "b", "asymmetric")
    return rows


def _modified(axes: Axes, study: Study) -> list[dict[str, Any]]:
    cells = [
        *_of_scales(study, "asymmetric", "unequal"),
        *_of_scales(study, "modified", "modified"),
    ]
    rows = _lines(axes, study, "c", cells, study.before * 0.8)
    axes.axvline(study.before, color="#999999", ls=":", lw=0.8)
    axes.legend(loc="lower left", fontsize=6)
    drawing.letter(axes, "c", "one step modified")
    return rows


def _caption(study: Study) -> str:
    seeds = reading.count(study.errors.replicas, "paired seed")
    return (
        f"{study.scale[0].upper()}{study.scale[1:]}; gradient descent with $\\eta$ = "
        f"{study.rate:g}; bands are 95 % intervals of the mean over {seeds}. a, dotted: (k - r) / "
        f"(4 $\\eta^2 T^2$). b and c: {study.width} columns, $\\alpha$ the scale of F at the start."
    )
