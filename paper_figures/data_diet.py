"""What the figures of ``experiments.data_diet`` share: sources, scores, labels."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import polars as pl

from dynamics import record, statistics
from dynamics.statistics import Estimate, Scale
from paper_figures import reading
from paper_figures.reading import Key, Said, array, columns, index, key_of, number, percent, where

PAPER = "Paul, Ganguli & Dziugaite 2021, arXiv 2107.07075"
KIRSCH = "Kirsch 2023, arXiv 2303.14753"

BEREFT = " Open markers: some class has no example left."
OURS = f"ours, after {PAPER}"


def said(statement: str, paper: str = PAPER) -> Said:
    """What this paper says, or another."""
    return Said(statement, paper)


def scale(run: record.Run, *, noise: bool = True, net: bool = True) -> Scale:
    """Data, size, labels, model, as in "digits, 1,347 examples, clean labels, MLP 2 x 128"."""
    return reading.scale(run, *([labels(run)] if noise else []), net=net)


def labels(run: record.Run) -> str:
    """``clean labels`` or ``20 % wrong labels``."""
    noise = number(run, "noise")
    return f"{percent(noise)} wrong labels" if noise else "clean labels"


def bereft(run: record.Run, *by: str) -> set[Key]:
    """The cells in which some class has no example left."""
    return {key_of(raw) for *raw, rarest in columns(run, *by, "rarest") if not rarest}


class Draws(NamedTuple):
    """Which scoring runs trained on the same labels, and what an interval of theirs is over."""

    runs: list[np.ndarray]  # i64[r] each: the places of a draw's runs among the replicas
    alike: bool  # whether the labels are clean, so that all runs are of one data set

    @property
    def count(self) -> int:
        """The least number of runs on the same labels."""
        return sum(map(len, self.runs)) if self.alike else min(map(len, self.runs))

    @property
    def first(self) -> np.ndarray:
        """i64[r]: the runs on the labels of the first draw."""
        return np.concatenate(self.runs) if self.alike else self.runs[0]

    @property
    def seeds(self) -> int:
        """What an interval is over: runs, or draws of wrong labels and runs."""
        return self.count if self.alike else len(self.runs)

    def each(self, statistic: Callable[[np.ndarray, int], float], replicas: np.ndarray) -> list:
        """``statistic(runs [r, ...] on the same labels, their draw)``, of all or of each draw."""
        if self.alike:
            return [statistic(replicas[self.first], 0)]
        return [statistic(replicas[mine], d) for d, mine in enumerate(self.runs)]

    def estimate(
        self, statistic: Callable[[np.ndarray, int], float], replicas: np.ndarray
    ) -> Estimate:
        """``each`` averaged over draws, the interval over them: wrong labels and runs both vary.

        Of clean labels, the statistic of all runs, the interval by leaving out one at a time.
        """
        if self.alike:
            return statistics.jackknife(lambda some: statistic(some, 0), replicas[self.first])
        return statistics.bootstrap(self.each(statistic, replicas))


def draws(run: record.Run) -> Draws:
    """The draws of a run's scores."""
    found: dict[int, list[int]] = {}
    numbers = reading.columns(run, "draw", "replica", rows=reading.frame(run, "scored"))
    for draw, replica in sorted(set(numbers)):
        found.setdefault(draw, []).append(replica)
    return Draws([np.array(found[d]) for d in sorted(found)], not number(run, "noise"))


def varied(run: record.Run, seeds: int, noise: float, what: str = "paired seed") -> str:
    """What differs between paired seeds, and what does not: words for a caption."""
    runs = reading.count(number(run, "score", "replicas"), "scoring run")
    wrong = " and wrong labels" if noise else ""
    return f"{reading.count(seeds, what)}, each with {runs}{wrong} of its own, on one split"


def scores(run: record.Run, *names: str) -> list[np.ndarray]:
    """f64[R, N] each: scores of the same examples by the same replicas, none of which diverged."""
    found = {name: array(run, name, 2) for name in names}
    check(run, found)
    return list(found.values())


def check(run: record.Run, found: Mapping[str, np.ndarray]) -> None:
    """ValueError unless scores are of the same examples by the same replicas, none diverged."""
    shapes = {name: value.shape for name, value in found.items()}
    shapes["index"] = (len(next(iter(found.values()))), len(index(run)))
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"{where(run)}: its scores must be by the same replicas of the same examples, "
            f"got {shapes}"
        )
    runs = reading.frame(run, "scored").filter(pl.col("diverged").is_not_null())
    if len(runs):
        raise ValueError(f"{where(run)}: scoring replica {runs['replica'].min()} diverged")


def correlation(a: np.ndarray, b: np.ndarray, draws: Draws) -> Estimate:
    """Spearman between averages over the runs on the same labels; its interval is ``draws``'.

    ``a`` is [R, N]; ``b`` is [R, N] of the same replicas, or [1, N] and certain.
    """
    both = np.stack([a, np.broadcast_to(b, a.shape)], axis=1)

    def statistic(replicas: np.ndarray, _: int) -> float:
        x, y = replicas.mean(axis=0)
        return statistics.spearman(x, y)

    return clipped(draws.estimate(statistic, both), -1.0, 1.0)


def clipped(estimate: Estimate, low: float, high: float) -> Estimate:
    """An interval that cannot leave a range; one without ends is left alone."""
    if not np.isfinite(estimate.low):
        return estimate
    return Estimate(estimate.mean, max(estimate.low, low), min(estimate.high, high))
