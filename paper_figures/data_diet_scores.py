"""The per-example scores of a Data Diet run: their names, their hard ends, their averages."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dynamics import record, statistics
from dynamics.statistics import Estimate
from paper_figures import data_diet, reading
from paper_figures.data_diet import Draws

LABELS = {  # as the arrays name them -> as the reader sees them
    "el2n": "EL2N",
    "grand": "GraNd",
    "loss": "loss",
    "entropy": "entropy",
    "logit_margin": "margin",
    "pvi": "PVI",
    "tracin": "TracIn-self",
    "aum": "AUM",
    "confidence": "confidence",
    "forgetting": "forgetting",
    "variability": "variability",
    "vog": "VoG",
    "input_norm": "input norm",
}
LOW = ("logit_margin", "pvi", "aum", "confidence")  # hard is the low end; of all others the high


class Score(NamedTuple):
    """What one number for each example is."""

    kind: str  # as the arrays name it
    epoch: float | None = None  # after which it was taken; None: of no single epoch

    @property
    def label(self) -> str:
        """``EL2N @ 5``: as the reader sees it."""
        return LABELS[self.kind] + ("" if self.epoch is None else f" @ {self.epoch:g}")


class Scores(NamedTuple):
    """What a run scored."""

    run: record.Run
    early: float  # the epoch that the study says
    epochs: tuple[float, ...]  # rising; the last ends the scoring runs
    replicas: int
    draws: Draws

    @property
    def last(self) -> float:
        """The epoch that ends the scoring runs."""
        return self.epochs[-1]

    def has(self, score: Score) -> bool:
        """Whether the run has the score."""
        found = self.run.arrays.get(score.kind)
        return found is not None and (
            score.epoch is None or score.epoch in found.coords.get("epoch", ())
        )

    def hard(self, score: Score) -> np.ndarray:
        """f64[R, N], [1, N] of the input norm: high is hard, whatever the score.

        An example that a run was not yet shown has NaN, one it never learned infinity.
        """
        kind, epoch = score
        ndim = 1 if kind == "input_norm" else 2
        at = {} if epoch is None else {"epoch": epoch}
        found = np.atleast_2d(reading.array(self.run, kind, ndim, finite=False, **at))
        shape = (len(found) if ndim == 1 else self.replicas, len(reading.index(self.run)))
        if found.shape != shape:
            raise ValueError(
                f"{reading.where(self.run)}: {score.label} must be of {shape[0]} replicas and "
                f"{shape[1]} examples, got shape {found.shape}"
            )
        return -found if kind in LOW else found

    def averages(self, *some: Score) -> list[np.ndarray]:
        """f64[scores, N] each: averages over the runs on the same labels, of all or each draw."""
        return self.draws.each(lambda mine, _: average(mine), self._together(*some))  # pyright: ignore

    def estimate(self, statistic: Callable[[np.ndarray, int], float], *some: Score) -> Estimate:
        """A statistic of (averages f64[scores, N], their draw); its interval is ``draws``'."""
        return self.draws.estimate(
            lambda mine, draw: statistic(average(mine), draw), self._together(*some)
        )

    def _together(self, *some: Score) -> np.ndarray:
        """f64[R, scores, N]."""
        found = [self.hard(score) for score in some]
        return np.stack([np.broadcast_to(f, (self.replicas, f.shape[1])) for f in found], axis=1)


def read(run: record.Run) -> Scores:
    """The scores of a run of study Ranking. ValueError: a replica diverged, or EL2N is lacking."""
    epochs = reading.value(run, "score", "epochs")
    if not isinstance(epochs, list | tuple) or not epochs:
        raise ValueError(f"{reading.where(run)}: 'score.epochs' must be a list, got {epochs!r}")
    early = reading.number(run, "study", "scored_at")
    el2n = reading.array(run, "el2n", 2, epoch=early)
    data_diet.check(run, {"el2n": el2n})
    draws = data_diet.draws(run)
    if sum(map(len, draws.runs)) != len(el2n):
        raise ValueError(
            f"{reading.where(run)}: frame 'scored' must have a row for each of {len(el2n)} "
            f"replicas, got {sum(map(len, draws.runs))}"
        )
    return Scores(run, early, tuple(sorted(float(e) for e in epochs)), len(el2n), draws)


def average(replicas: np.ndarray) -> np.ndarray:
    """f64[...] of [R, ...]: the mean of those that are numbers, infinity where none is."""
    mean, _ = statistics.over_replicas(replicas)
    return np.where(np.isnan(mean), np.inf, mean)


def parts(replicas: np.ndarray, count: int) -> np.ndarray:
    """[R, ...] of [R, ...]: averages over ``count`` replicas in a row, the last before the first.

    Row i and row i + count share no replica if 2 count <= R.
    """
    turned = np.concatenate([replicas, replicas])
    return np.stack([average(turned[i : i + count]) for i in range(len(replicas))])


def flags(run: record.Run, draws: Draws, name: str = "mislabelled") -> np.ndarray:
    """bool[D, N]: the examples whose labels are wrong in each draw."""
    stored, shape = run.arrays.get(name), (len(draws.runs), len(reading.index(run)))
    found = None if stored is None else stored.values
    if found is None or found.dtype != bool or found.shape != shape:
        got = "none" if found is None else f"{found.dtype} of shape {found.shape}"
        wanted = f"bool[{shape[0]}, {shape[1]}]"
        raise ValueError(f"{reading.where(run)}: array {name!r} must be {wanted}, got {got}")
    return found


def size(estimate: Estimate) -> Estimate:
    """The absolute value, and an interval of it."""
    mean, low, high = estimate
    if not np.isfinite(low):
        return Estimate(abs(mean), low, high)
    least = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return Estimate(abs(mean), least, max(abs(low), abs(high)))
