"""What the figures of ``experiments.transformer_stability`` share: names, looks, what is read."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from dynamics import record, statistics
from dynamics.statistics import Estimate, Scale
from paper_figures import reading
from paper_figures.draw import Look
from paper_figures.reading import Cells

PAPER = "Wortsman et al. 2023, arXiv 2309.14322"
OURS = f"ours, after {PAPER}"

NAMES = {  # of the interventions, in the order they are drawn in
    "none": "recipe",
    "qk_norm": "query-key norm",
    "z_loss": "z-loss",
    "no_decay": "no weight decay",
    "scaled_decay": "decay times rate",
    "mu_param": "muParam, simple",
    "long_warmup": "long warm-up",
}
LOOKS = {
    "none": Look("#D55E00", "s"),
    "qk_norm": Look("#0072B2", "o"),
    "z_loss": Look("#E69F00", "D", "--"),
    "no_decay": Look("#777777", "x", ":"),
    "scaled_decay": Look("#009E73", "^", "--"),
    "mu_param": Look("#CC79A7", "P", "-."),
    "long_warmup": Look("#56B4E9", "v", "-."),
}


def cells(run: record.Run, column: str, *steps: int) -> Cells:
    """A column at some steps by width, intervention, rate and step; infinite of a run that
    diverged, then or later, and where it is nan. Before the first step they all are alike: finite.

    ValueError: no row of a step, or what ``reading.cells`` refuses.
    """
    frame, by = reading.frame(run, whole=False), ["width", "intervention", "rate"]
    reading.columns(run, *by, "replica", "step", "diverged", column, rows=frame)
    there = frame.filter(pl.col("step").is_in(steps))
    if missing := sorted(set(steps) - set(there["step"].to_list())):
        raise ValueError(f"{reading.where(run)} has no rows of step {missing[0]}")
    there = there.filter(pl.col("diverged").is_null() | (pl.col("step") == 0))
    there = there.select(*by, "replica", "step", pl.col(column).fill_nan(np.inf))
    ended = frame.filter(pl.col("diverged").is_not_null()).select(*by, "replica", "diverged")
    lost = ended.unique().join(pl.DataFrame({"step": steps}), how="cross")
    lost = lost.filter(pl.col("step") > 0).with_columns(pl.lit(np.inf).alias(column))
    rows = pl.concat([there, lost.select(there.columns)], how="vertical_relaxed")
    return reading.cells(
        run, *by, "step", rows=rows, of=column, within=(-np.inf, np.inf), times=1.0
    )


def values(found: Cells, place: int) -> tuple:
    """The different values, rising, of one part of the keys."""
    return tuple(sorted({key[place] for key in found.values}))


def interventions(run: record.Run, found: Cells) -> tuple[str, ...]:
    """Those of the run in the order of NAMES. ValueError: one that has no name."""
    there = set(values(found, 1))
    if unknown := sorted(there - NAMES.keys()):
        raise ValueError(
            f"{reading.where(run)}: interventions must be of {list(NAMES)}, got {unknown[0]!r}"
        )
    return tuple(name for name in NAMES if name in there)


def difference(a: np.ndarray, b: np.ndarray) -> Estimate | statistics.Paired:
    """A - b over paired replicas; nan if either has a replica that has no number."""
    if not np.isfinite([a, b]).all():
        return Estimate(np.nan, np.nan, np.nan)
    return statistics.paired(a, b)


def geometric(values: np.ndarray) -> Estimate:
    """10^(mean of log10) over replicas and its interval; nan if a value has no logarithm."""
    return power(logarithms(values))


def ratio(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The geometric mean of a / b over paired replicas, and its interval."""
    return power(logarithms(a) - logarithms(b))


def logarithms(values: np.ndarray) -> np.ndarray:
    """log10; nan where there is none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.log10(np.asarray(values, np.float64))
    return np.where(np.isfinite(found), found, np.nan)


def power(exponents: np.ndarray) -> Estimate:
    """10^mean, and 10 to the ends of the interval of the mean; nan if an exponent is."""
    if np.isnan(exponents).any():
        return Estimate(np.nan, np.nan, np.nan)
    mean, low, high = statistics.bootstrap(exponents)
    return Estimate(10.0**mean, 10.0**low, 10.0**high if high < 300 else np.inf)


def line(axes: Axes, x: Sequence[float], found: Sequence[Estimate], look: Look, label: str) -> None:
    """Means with markers and their intervals as a band; nothing where a mean is not finite."""
    mean, low, high = np.array(found).T
    mean = np.where(np.isfinite(mean), mean, np.nan)
    axes.plot(x, mean, look.line, color=look.color, marker=look.marker, label=label, zorder=3)
    if np.isfinite([low, high]).all() and (low > 0).all():
        axes.fill_between(x, low, high, color=look.color, alpha=0.15, lw=0)


def scale(run: record.Run) -> Scale:
    """Text, size and net, as in "Python's docstrings, 17,189 windows of 32 bytes, 2 blocks"; and
    how many members diverged, which these figures count rather than leave out.
    """
    source = reading.value(run, "data", "source")
    name = str(reading.value(run, "data", "file")).rpartition("/")[2].partition(".")[0]
    words = ["Python's docstrings" if source == "docstrings" else name]
    context = f"{reading.number(run, 'data', 'context'):g}"
    words.append(f"{len(reading.index(run)):,} windows of {context} bytes")
    words.append(reading.count(reading.number(run, "depth"), "block"))
    members = reading.frame(run, whole=False).unique(["width", "intervention", "rate", "replica"])
    lost = members["diverged"].is_not_null().sum()
    return Scale(", ".join(words), f"{lost} of {len(members)} members diverged" if lost else "")
