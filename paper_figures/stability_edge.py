"""The edge of stability: the sharpness of the training loss over each optimizer's own threshold,
and the loss, in full-batch training.

Above, the largest eigenvalue of the Hessian (for Adam and RMSProp of the preconditioned one) over
the threshold beyond which the optimizer's step would diverge on a quadratic; below, the loss. A
column for each optimizer, a line for each initialisation; of gradient descent a lower rate, too.

Reference: Cohen et al. 2021, arXiv 2103.00065, and 2022, arXiv 2207.14484, on our data and model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Claim, Estimate, Scale
from paper_figures import draw as drawing
from paper_figures import reading
from paper_figures.draw import Look
from paper_figures.reading import Said, row

EXPERIMENT = "stability"
STUDY = "Edge"
PRESET = "digits"
TOGETHER = ()

COHEN = "Cohen et al. 2021, arXiv 2103.00065"
ADAPTIVE = "Cohen et al. 2022, arXiv 2207.14484"
RULES = {  # name, gates of the mean ratio, source
    "gd": ("gradient descent", 0.06, COHEN),
    "heavy_ball": ("heavy ball", 0.12, COHEN),
    "nesterov": ("Nesterov", 0.07, COHEN),
    "adam": ("Adam", 0.08, ADAPTIVE),
    "rmsprop": ("RMSProp", 0.15, ADAPTIVE),
}
LOOKS = {"run": Look("#0072B2", ""), "control": Look("#E69F00", "", "--")}

HOVERS = "At its edge the sharpness of {} hovers at the threshold."
FALLS = Said("Before the edge the loss of gradient descent falls at every step.", COHEN)
RISES = Said("At the edge it does not, and yet falls over longer times.", COHEN)
BELOW = Said("At a lower rate the sharpness stays below the (higher) threshold.", COHEN)


class Study(NamedTuple):
    """What is drawn of a run, checked."""

    steps: dict[str, np.ndarray]  # rule -> [T]
    ratio: dict[str, np.ndarray]  # rule -> [R, T]
    reached: dict[str, np.ndarray]  # rule -> bool[R, T]
    loss: dict[str, np.ndarray]  # rule -> [R, steps]
    rises: dict[str, np.ndarray]  # rule -> [R, 2]: before and after
    scale: Scale


def draw(
    runs: Sequence[record.Run], folder: Path | str, *, name: str = "stability_edge"
) -> tuple[dict[str, Path], list[Claim]]:
    """Write the figure of one run; its files, and its claims. ValueError: it lacks something."""
    run = reading.only(runs)
    study = _study(run)
    claims = _claims(study, name)
    rules = [rule for rule in RULES if rule in study.ratio]
    with drawing.style("full"):
        fig = drawing.figure("full", height=3.2)
        places = fig.subplots(2, len(rules), sharex=True, sharey="row", squeeze=False)
        rows: list[dict[str, Any]] = []
        for i, rule in enumerate(rules):
            rows += _ratio(places[0, i], "abcde"[i], study, rule)
            _loss(places[1, i], study, rule)
        places[0, 0].set_ylabel("sharpness / threshold")
        places[1, 0].set_ylabel("training loss")
        drawing.caption(fig, _caption(study))
        paths = drawing.save(
            *(fig, folder, name),
            table=reading.table(rows),
            claims=claims,
            fingerprints=[run.fingerprint],
        )
    return paths, claims


def measure(runs: Sequence[record.Run], *, figure: str = "stability_edge") -> list[Claim]:
    """The claims alone, nothing drawn or written."""
    return _claims(_study(reading.only(runs)), figure)


def _study(run: record.Run) -> Study:
    """Everything the figure needs from the run, or one ValueError that says what it lacks."""
    edge = reading.frame(run)
    known = {rule for (rule,) in reading.columns(run, "rule")}
    wanted = [rule for rule in (*RULES, "control") if rule in known]
    if not set(wanted) - {"control"}:
        raise ValueError(f"{reading.where(run)} has no rule of {list(RULES)}")
    found: dict[str, dict[str, np.ndarray]] = {n: {} for n in ("steps", "ratio", "reached", "loss")}
    for rule in wanted:
        mine = edge.filter(pl.col("rule") == rule)
        options = {"rows": mine.filter(pl.col("step") > 0), "within": (-1e6, 1e6), "times": 1.0}
        for column in ("ratio", "reached"):
            cells = reading.cells(run, "step", of=column, **options)
            places = [key[0] for key in sorted(cells.values)]
            found[column][rule] = np.stack([cells.of(s) for s in places], axis=1)
        found["reached"][rule] = found["reached"][rule] > 0
        found["steps"][rule] = np.array(places)
        found["loss"][rule] = _losses(run, rule)
    both = {rule: _both(run, rule) for rule in wanted}
    return Study(**found, rises=both, scale=reading.scale(run))


def _losses(run: record.Run, rule: str) -> np.ndarray:
    """f64[R, steps]: the loss of each run of a rule before every step."""
    mine = reading.frame(run, "loss").filter(pl.col("rule") == rule).sort("replica", "step")
    parts = [part["loss"].to_numpy() for part in mine.partition_by("replica")]
    if not parts or len({len(part) for part in parts}) > 1:
        raise ValueError(f"{reading.where(run)} lacks losses of rule {rule!r} (did it diverge?)")
    return np.stack(parts)


def _both(run: record.Run, rule: str) -> np.ndarray:
    """f64[R, 2]: the parts of the steps that raise the loss, before the edge and at it."""
    mine = reading.frame(run, "rises").filter(pl.col("rule") == rule)
    return mine.select("before", "after").cast(pl.Float64).to_numpy()


def _claims(study: Study, figure: str) -> list[Claim]:
    seeds = len(next(iter(study.ratio.values())))
    made = reading.judging(figure, study.scale, seeds, "of the threshold")
    parts = reading.judging(figure, study.scale, seeds, "of the steps")
    claims = []
    for rule, (name, gate, paper) in RULES.items():
        if rule not in study.ratio or not study.reached[rule].any(axis=1).all():
            continue
        mean = [r[at].mean() for r, at in zip(study.ratio[rule], study.reached[rule], strict=True)]
        off = statistics.bootstrap(np.abs(np.array(mean) - 1))
        said = Said(HOVERS.format(name), paper)
        claims.append(made(off, f"|sharpness / threshold - 1|, {name}", said, at_most=gate))
    if "gd" in study.rises and study.reached["gd"].any(axis=1).all():
        before, after = (statistics.bootstrap(study.rises["gd"][:, i]) for i in (0, 1))
        claims.append(parts(before, "loss rises before the edge", FALLS, at_most=0.0))
        claims.append(parts(after, "loss rises at the edge", RISES, at_least=0.1))
    if "control" in study.ratio:
        last = statistics.bootstrap(study.ratio["control"][:, -1])
        quantity = "sharpness / threshold in the end, gradient descent at a lower rate"
        claims.append(made(last, quantity, BELOW, control=True, at_most=0.8))
    return claims


def _ratio(axes: Axes, letter: str, study: Study, rule: str) -> list[dict[str, Any]]:
    axes.axhline(1, color="#000000", ls=":", lw=0.8)
    rows = []
    for which, look in (
        (rule, LOOKS["run"]),
        *([("control", LOOKS["control"])] if rule == "gd" else []),
    ):
        if which not in study.ratio:
            continue
        for k, values in enumerate(study.ratio[which]):
            axes.plot(study.steps[which], values, look.line, color=look.color, lw=0.8)
            rows += [
                row(letter, f"{which}, run {k}", s, Estimate(v, np.nan, np.nan), 1)
                for s, v in zip(study.steps[which], values, strict=True)
            ]
    axes.set_ylim(0, 1.5)
    axes.grid(True, axis="y")
    drawing.letter(axes, letter, RULES[rule][0])
    return rows


def _loss(axes: Axes, study: Study, rule: str) -> None:
    look = LOOKS["run"]
    for values in study.loss[rule]:
        axes.plot(np.arange(1, len(values) + 1), values, color=look.color, lw=0.6)
    axes.set_yscale("log")
    axes.set_xlabel("step")


def _caption(study: Study) -> str:
    seeds = len(next(iter(study.ratio.values())))
    control = " Dashed: gradient descent at a lower rate." if "control" in study.ratio else ""
    return (
        f"{study.scale}; {reading.count(seeds, 'initialisation')} on the same examples, full "
        "batch, 1/2 squared distance to one-hot labels. Adam and RMSProp: the preconditioned "
        f"Hessian.{control}"
    )
