"""A positive matrix of low rank from measurements of which a part is arbitrarily wrong.

Descent on the mean absolute residual of U U^T, by sub-gradients with a step that falls
geometrically, finds the matrix however many columns U has, if it starts small enough; descent on
squares finds another. The directions are (1/m) sum sign(residual_i) A_i U and (1/m) sum residual_i
A_i U: gradients of 1/2 and 1/4 of the losses' means.

Reference: Ma and Fattahi 2022, arXiv 2202.08788; the details of the algorithm are our reading.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl

from dynamics import mesh as meshes
from dynamics import optim
from dynamics import task as tasks
from dynamics.data import synthetic
from dynamics.data.synthetic import Sensing as Drawn
from dynamics.record import Findings
from dynamics.types import PyTree, Task
from experiments.experiment import Job
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Robust

METHODS = ("absolute", "square")
LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "absolute": lambda found, y: jnp.abs(found - y) / 2,
    "square": lambda found, y: (found - y) ** 2 / 4,
}


def flattened(matrices: np.ndarray) -> np.ndarray:
    """f32[..., d (d + 1) / 2]: of symmetric matrices, such that products are those of matrices."""
    rows, columns = np.triu_indices(matrices.shape[-1])
    root = np.where(rows == columns, 1.0, math.sqrt(2)).astype(matrices.dtype)
    return matrices[..., rows, columns] * root


def measured(dim: int, columns: int, method: str) -> Task:
    """Measurements of U U^T: an example is a measurement's matrix, flattened, and its value.

    The loss is the mean of |residual| / 2 ("absolute") or residual^2 / 4 ("square").
    """
    init = population.zeros(u=(dim, columns))
    return tasks.of_function(_measurements, init=init, loss=LOSSES[method])


def _measurements(params: PyTree, x: jax.Array) -> jax.Array:
    u = params["u"]
    rows, others = np.triu_indices(len(u))
    root = np.where(rows == others, 1.0, math.sqrt(2)).astype(np.float32)
    return x @ ((u @ u.T)[rows, others] * root)


class Falling:
    """Theta - learning_rate decay^t g, both of the member's own."""

    def make(self, num_steps: int) -> optax.GradientTransformationExtraArgs:
        """The rule, the same for every number of steps."""
        return _FALLING

    def hyperparameters(self) -> dict[str, float]:
        """A learning rate of 1 that does not fall."""
        return {"learning_rate": 1.0, "decay": 1.0}


def _falling(h: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.scale_by_learning_rate(lambda count: h["learning_rate"] * h["decay"] ** count)


_FALLING = optim.by_hyperparameters(_falling, Falling().hyperparameters())


def spectral_start(drawn: Drawn, columns: int) -> np.ndarray:
    """f64[dim, columns] of norm 1 (of B B^T): the positive part of (1/m) sum sign(y_i) A_i."""
    slope = np.tensordot(np.sign(drawn.values), drawn.matrices.astype(np.float64), 1)
    values, vectors = np.linalg.eigh(slope)
    values, vectors = values[::-1][:columns], vectors[:, ::-1][:, :columns]
    values = np.maximum(values, 0)
    return vectors * np.sqrt(values / np.linalg.norm(values))


def measure(job: Job[Config, Robust]) -> Findings:
    """Frame ``robust``: ``error`` = |U U^T - M| at the end for each (method, columns, scale,
    replica), null where it ``diverged``.

    ``method`` is "absolute" (sub-gradients) or "square"; ``loss`` is the mean loss of the
    measurements, ``truth`` that of M itself. Cost: 2 m dim (dim + 1) a step and member.
    """
    names = ("point", "method", "columns", "scale", "replica", "error", "loss", "truth", "diverged")
    parts = [_trained(job, group).select(names) for group in populations(job)]
    return Findings({"robust": pl.concat(parts)})


def populations(job: Job[Config, Robust]) -> list[pl.DataFrame]:
    """The members of either method, from every start of every number of columns."""
    return job.members(_cells, job.study.replicas).partition_by("method", maintain_order=True)


def _cells(point: Config, study: Robust) -> list[Mapping[str, Any]]:
    rates = {"absolute": (study.learning_rate, study.decay), "square": (study.square_rate, 1.0)}
    return [
        {"method": method, "columns": columns, "scale": scale, "learning_rate": rate}
        | {"decay": decay}
        for method, (rate, decay) in rates.items()
        for columns, scale in itertools.product(study.columns, study.scales)
    ]


def _trained(job: Job[Config, Robust], group: pl.DataFrame) -> pl.DataFrame:
    """The members of a method, with what they end at."""
    study, method = job.study, group["method"][0]
    draws, widest = population.drawn(job, group, _draw), max(study.columns)
    starts = []
    for draw, columns, scale in zip(draws, group["columns"], group["scale"], strict=True):
        wide = np.pad(spectral_start(draw, columns), ((0, 0), (0, widest - columns)))
        starts.append(scale * wide)
    flat = {id(draw): flattened(draw.matrices) for draw in draws}
    x, y = np.stack([flat[id(draw)] for draw in draws]), np.stack([draw.values for draw in draws])
    net, stream = measured(study.dim, widest, method), population.own_examples(x, y)
    options: dict[str, Any] = {"rule": Falling(), "how": None, "params": {"u": np.stack(starts)}}
    trained = population.descend(job, group, net, stream, study.steps, name=method, **options)
    assert trained.state is not None
    ends = meshes.fetch(trained.state.params["u"]).astype(np.float64)
    found = [outcome(u, draw, method) for u, draw in zip(ends, draws, strict=True)]
    alone = pl.col("diverged").is_null()
    return trained.members.with_columns(
        pl.when(alone).then(pl.Series(name, [one[name] for one in found])).alias(name)
        for name in found[0]
    )


def _draw(study: Robust, seed: int) -> Drawn:
    sizes = {"n": study.measurements, "dim": study.dim, "rank": study.rank}
    return synthetic.sensing(seed, **sizes, smallest=study.smallest, outliers=study.outliers)


def outcome(u: np.ndarray, drawn: Drawn, method: str) -> dict[str, float]:
    """``error``, |U U^T - M|, and the mean losses of both, ``loss`` and ``truth``."""
    truth = drawn.factor.astype(np.float64) @ drawn.factor.T.astype(np.float64)
    losses = []
    for found in (u @ u.T, truth):
        residual = np.tensordot(drawn.matrices, found, 2) - drawn.values
        each = abs(residual) / 2 if method == "absolute" else residual**2 / 4
        losses.append(float(np.mean(each)))
    error = float(np.linalg.norm(u @ u.T - truth))
    return {"error": error, "loss": losses[0], "truth": losses[1]}
