"""How sharp the minima are that minibatches stay at: the trace law, and where it ends.

A diagonal linear net trained with one example a batch, with more, and by gradient descent: the
trace of the Hessian, the inequality that holds for every batch size, and the critical learning
rates of made-up minima, which are exact.

Reference: Wu and Su 2023, arXiv 2305.17490.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from dynamics import record
from dynamics.statistics import Claim, Scale, bootstrap
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.curves import curve, rows_of
from paper_figures.draw import Look
from paper_figures.reading import Said

EXPERIMENT = "stability_theory"
STUDY = "Diagonal"
PRESET = "default"
TOGETHER = ()

PAPER = "Wu & Su 2023, arXiv 2305.17490"
OURS = f"ours, after {PAPER}"
SHOWN = 0.016  # the learning rate whose runs are drawn over their steps
KINDS = {"equal": "equal norms", "normal": "normal", "heavy": "heavy tails"}
LOOKS = (Look("#0072B2", "o"), Look("#E69F00", "s"), Look("#D55E00", "^"), Look("#777777", "D"))
METRICS = ("trace", "top", "necessary", "mistake")

TRACE = Said("SGD with one example a batch stays where tr H <= 2 / eta.", PAPER)
TOP = Said("Gradient descent stays where lambda_max <= 2 / eta, whatever the trace.", PAPER)
FITTED = Said("These are minima: the runs fit every example.", OURS)
MORE = Said("With more than one example a batch tr H <= 2 / eta is false.", OURS)
DESCENT = Said("... and for gradient descent, which says nothing of the trace.", PAPER)
GENERAL = Said("c mean |x|^4 + (1 - c) |H|_F^2 <= (2 / eta) tr H holds for every batch size.", OURS)
TIGHT = Said(
    "With gradients of equal norms and one example a batch, SGD is stable up to tr H = 2 / eta.",
    PAPER,
)
EXACT = Said("The inequality holds at every critical learning rate, computed exactly.", OURS)
LOOSE = Said("With norms of heavy tails SGD is unstable long before tr H = 2 / eta.", OURS)
BATCHES = Said("... and with more examples a batch it is stable far beyond it.", OURS)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    values: dict[str, reading.Cells]  # metric -> by batch, learning rate and step
    batches: tuple[float, ...]  # the last is gradient descent
    rates: tuple[float, ...]
    large: tuple[float, ...]  # of gradient descent alone
    steps: tuple[float, ...]
    critical: dict[str, np.ndarray]  # f64[B, 2, R]: eta tr H / 2 by kind
    bounds: dict[str, np.ndarray]
    sizes: np.ndarray  # f64[B]
    scale: Scale

    def ends(self, metric: str, batch: float) -> np.ndarray:
        """f64[R, rates]: at the last step."""
        return self._at(metric, batch, self.rates)

    def everywhere(self, metric: str) -> np.ndarray:
        """f64[R, rates]: of gradient descent at all its rates."""
        return self._at(metric, self.batches[-1], (*self.rates, *self.large))

    def _at(self, metric: str, batch: float, rates: Sequence[float]) -> np.ndarray:
        found = self.values[metric]
        return np.stack([found.of(batch, e, self.steps[-1]) for e in rates], axis=1)

    def over(self, metric: str, batch: float, rate: float) -> np.ndarray:
        """f64[R, T]."""
        found = self.values[metric]
        return np.stack([found.of(batch, rate, step) for step in self.steps], axis=1)

    def name(self, batch: float) -> str:
        """Of a line."""
        return "gradient descent" if batch == self.batches[-1] else f"batches of {batch:g}"


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "sgd_stability"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims.

    ValueError: the run lacks something, named.
    """
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    with drawing.style("full"):
        fig = drawing.figure("full", height=4.2)
        (trace, bound), (steps, critical) = fig.subplots(2, 2)
        rows = [
            *_by_rate(trace, study, "trace", "a", "the trace at the end"),
            *_by_rate(bound, study, "necessary", "b", "what holds for all"),
            *_by_step(steps, study),
            *_exact(critical, study),
        ]
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "sgd_stability") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    by = ("batch", "learning_rate", "step")
    values = {
        name: reading.cells(run, *by, of=name, within=(0.0, np.inf), times=1.0) for name in METRICS
    }
    examples, dim = (reading.number(run, "study", name) for name in ("examples", "dim"))
    batches = (*map(float, reading.value(run, "study", "batches")), examples)
    rates, large = (
        tuple(float(one) for one in reading.value(run, "study", name))
        for name in ("learning_rates", "large_rates")
    )
    steps = values["trace"].places(batch=1.0, learning_rate=rates[0])
    if not steps or len(batches) < 3:
        raise ValueError(f"{reading.where(run)} needs rows of batch 1 and of another")
    sizes, critical = _critical(run, "trace")
    study = Study(
        *(values, batches, rates, large, steps, critical, _critical(run, "necessary")[1]),
        sizes=sizes,
        scale=reading.scale_of(run, f"<u*u - v*v, x> of dimension {dim:g}, {examples:g} examples"),
    )
    for batch in batches:
        study.ends("trace", batch)
    study.everywhere("top")
    for batch in batches:
        study.over("trace", batch, reading.nearest(rates, SHOWN))
    return study


def _critical(run: record.Run, of: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """f64[B]: batch sizes; kind -> f64[B, 2, R] of them, drawn with replacement and without."""
    by, options = ("kind", "replacement", "batch"), {"within": (0.0, np.inf), "times": 1.0}
    found = reading.cells(run, *by, of=of, rows=reading.frame(run, "critical"), **options)
    sizes = found.places(kind=next(iter(KINDS)), replacement=True) or (1,)
    cells = {
        kind: np.array([[found.of(kind, again, b) for again in (True, False)] for b in sizes])
        for kind in KINDS
    }
    return np.array(sizes, np.float64), cells


def _claims(study: Study, figure: str) -> list[Claim]:
    made = reading.judging(figure, study.scale, study.values["trace"].replicas, "")
    most = lambda metric, batch: bootstrap(study.ends(metric, batch).max(axis=1))  # noqa: E731
    one, more = study.batches[0], study.batches[-2]
    everything = np.stack([study.ends("necessary", b).max(axis=1) for b in study.batches])
    errors = [study.ends("mistake", b) for b in study.batches] + [study.everywhere("mistake")]
    errors = np.concatenate(errors, axis=1).max(axis=1)
    return [
        made(most("trace", one), "largest eta tr H / 2, batches of 1", TRACE, at_most=1.0),
        made(bootstrap(study.everywhere("top").max(axis=1)),
             "largest eta lambda_max / 2, gradient descent", TOP, at_most=1.0),
        made(bootstrap(everything.max(axis=0)), "largest side of the inequality", GENERAL,
             at_most=1.0),
        made(bootstrap(np.log10(np.maximum(errors, 1e-30))), "log10 of the largest loss", FITTED,
             at_most=-6.0),
        *_critical_claims(study, figure),
        made(most("trace", more), f"largest eta tr H / 2, batches of {more:g}", MORE, control=True,
             at_least=1.05),
        made(bootstrap(study.everywhere("trace").max(axis=1)),
             "largest eta tr H / 2, gradient descent", DESCENT, control=True, at_least=1.05),
    ]  # fmt: skip


def _critical_claims(study: Study, figure: str) -> list[Claim]:
    """Of the minima that are made up."""
    scale = study.scale.of("made-up gradients, critical learning rates")
    made = reading.judging(figure, scale, study.critical["equal"].shape[2], "")
    equal, one = study.critical["equal"], int(np.argmin(study.sizes))
    four = int(np.argmin(abs(study.sizes - 4)))
    bounds = np.stack([b.max(axis=(0, 1)) for b in study.bounds.values()]).max(axis=0)
    return [
        made(bootstrap(abs(equal[one, 0] - 1)), "equal norms, batches of 1: |eta tr H / 2 - 1|",
             TIGHT, at_most=1e-4),
        made(bootstrap(bounds - 1), "largest side of the inequality - 1", EXACT, at_most=1e-6),
        made(bootstrap(study.critical["heavy"][one, 0]), "heavy tails, batches of 1: eta tr H / 2",
             LOOSE, control=True, at_most=0.7),
        made(bootstrap(equal[four, 0]), f"equal norms, batches of {study.sizes[four]:g}: eta tr H "
             "/ 2", BATCHES, control=True, at_least=1.5),
    ]  # fmt: skip


def _by_rate(axes: Axes, study: Study, metric: str, panel: str, note: str) -> list[dict[str, Any]]:
    rows = []
    for batch, look in zip(reversed(study.batches), reversed(LOOKS[: len(study.batches)]),
                           strict=False):  # fmt: skip
        values, name = study.ends(metric, batch), study.name(batch)
        rows += rows_of(panel, name, study.rates, curve(axes, study.rates, values, look, name),
                        len(values))  # fmt: skip
    axes.axhline(1, color="#000000", ls=":", lw=0.8)
    axes.set_xlabel("learning rate $\\eta$")
    axes.set_ylim(0, None)
    axes.set_xticks(study.rates, [f"{rate:g}" for rate in study.rates])
    label = {"trace": "$\\eta\\,\\mathrm{tr}\\,H\\,/\\,2$", "necessary": "side of the inequality"}
    axes.set_ylabel(label[metric])
    axes.grid(True, axis="y")
    if metric == "trace":
        axes.legend(loc="upper left", fontsize=6)
    drawing.letter(axes, panel, note)
    return rows


def _by_step(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rate, rows = reading.nearest(study.rates, SHOWN), []
    kept = [i for i, step in enumerate(study.steps) if step >= 1]
    x = [study.steps[i] for i in kept]
    for batch, look in zip(reversed(study.batches), reversed(LOOKS[: len(study.batches)]),
                           strict=False):  # fmt: skip
        values, name = study.over("trace", batch, rate)[:, kept], study.name(batch)
        found = curve(axes, x, values, look._replace(marker=""), name)
        rows += rows_of("c", name, x, found, len(values))
    axes.axhline(1, color="#000000", ls=":", lw=0.8)
    axes.set_xscale("log")
    axes.set_xlim(1, x[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("$\\eta\\,\\mathrm{tr}\\,H\\,/\\,2$")
    axes.grid(True, axis="y")
    drawing.letter(axes, "c", f"on the way, $\\eta$ = {rate:g}")
    return rows


def _exact(axes: Axes, study: Study) -> list[dict[str, Any]]:
    rows = []
    for (kind, name), look in zip(KINDS.items(), LOOKS, strict=False):
        values = study.critical[kind][:, 0].T
        found = curve(axes, study.sizes.tolist(), values, look, name)
        rows += rows_of("d", name, study.sizes.tolist(), found, len(values))
    axes.axhline(1, color="#000000", ls=":", lw=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(study.sizes, [f"{size:g}" for size in study.sizes])
    axes.minorticks_off()
    axes.set_xlabel("batch size (with replacement)")
    axes.set_ylabel("critical $\\eta\\,\\mathrm{tr}\\,H\\,/\\,2$")
    axes.grid(True, axis="y")
    axes.legend(loc="lower right", fontsize=6)
    drawing.letter(axes, "d", "made-up minima, exactly")
    return rows


def _caption(study: Study) -> str:
    seeds = reading.count(study.values["trace"].replicas, "paired seed")
    return (
        f"{study.scale}, square loss, {study.steps[-1]:,g} steps to a loss of zero; bands are 95 % "
        f"intervals of the mean over {seeds}. Dotted: the trace law (a, c, d) and the inequality "
        "of every batch size (b)."
    )
