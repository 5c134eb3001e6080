"""What the figures of ``experiments.data_diet`` share: sources, scores, labels."""

from collections.abc import Mapping

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


def correlation(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Spearman between averages over scoring replicas; its interval is over the replicas.

    ``a`` is [R, N]; ``b`` is [R, N] of the same replicas, or [1, N] and certain.
    """
    both = np.stack([a, np.broadcast_to(b, a.shape)], axis=1)

    def statistic(replicas: np.ndarray) -> float:
        x, y = replicas.mean(axis=0)
        return statistics.spearman(x, y)

    rho, low, high = statistics.jackknife(statistic, both)
    return Estimate(rho, max(low, -1.0), min(high, 1.0)) if len(a) > 1 else Estimate(rho, low, high)
