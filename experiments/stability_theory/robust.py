"""A positive matrix of low rank from measurements of which a part is arbitrarily wrong.

Descent on the mean absolute residual of U U^T, by sub-gradients with a step that falls
geometrically, finds the matrix however many columns U has, if it starts small enough; descent on
squares finds another. The directions are (1/m) sum sign(residual_i) A_i U and (1/m) sum residual_i
A_i U: gradients of 1/2 and 1/4 of the losses' means.

Reference: Ma and Fattahi 2022, arXiv 2202.08788; the details of the algorithm are our reading.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dynamics import fit, optim
from dynamics import mesh as meshes
from dynamics import task as tasks
from dynamics.data import synthetic
from dynamics.data.synthetic import Sensing as Drawn
from dynamics.record import Recorder, Table
from dynamics.types import Key, PyTree, Task
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Robust

METHODS = ("absolute", "square")


def flattened(matrices: np.ndarray) -> np.ndarray:
    """f32[..., d (d + 1) / 2]: of symmetric matrices, such that products are those of matrices."""
    rows, columns = np.triu_indices(matrices.shape[-1])
    root = np.where(rows == columns, 1.0, math.sqrt(2)).astype(matrices.dtype)
    return matrices[..., rows, columns] * root


def measured(dim: int, columns: int, method: str) -> Task:
    """The residuals of U U^T: an example is a measurement's matrix, flattened, and its value.

    The mean over them of |residual| / 2 ("absolute") or residual^2 / 4 ("square").
    """
    losses: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
        "absolute": lambda residual, _: jnp.abs(residual) / 2,
        "square": lambda residual, _: residual**2 / 4,
    }
    rows, others = np.triu_indices(dim)
    root = np.where(rows == others, 1.0, math.sqrt(2)).astype(np.float32)

    def init(key: Key) -> PyTree:
        return jnp.zeros((dim, columns))

    def predict(u: PyTree, x: jax.Array) -> jax.Array:
        return x[:, :-1] @ ((u @ u.T)[rows, others] * root) - x[:, -1]

    return tasks.of_function(predict, init=init, loss=losses[method])


def falling(h: Mapping[str, Any]) -> optax.GradientTransformation:
    """Theta - learning_rate decay^t g, both of the replica's own."""
    return optax.scale_by_learning_rate(lambda count: h["learning_rate"] * h["decay"] ** count)


def spectral_start(drawn: Drawn, columns: int) -> np.ndarray:
    """f64[dim, columns] of norm 1 (of B B^T): the positive part of (1/m) sum sign(y_i) A_i."""
    slope = np.tensordot(np.sign(drawn.values), drawn.matrices.astype(np.float64), 1)
    values, vectors = np.linalg.eigh(slope)
    values, vectors = values[::-1][:columns], vectors[:, ::-1][:, :columns]
    values = np.maximum(values, 0)
    return vectors * np.sqrt(values / np.linalg.norm(values))


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows: ``error`` = |U U^T - M| at the end for each (method, columns, scale, replica).

    ``method`` is "absolute" (sub-gradients) or "square"; ``loss`` is the mean loss of the
    measurements, ``truth`` that of M itself. Cost: 2 m dim (dim + 1) a step and replica.
    """
    first = _choices(points[0])
    k = len(points) * len(first.columns) * len(first.scales) * first.replicas
    if mesh is not None:
        meshes.check(mesh, k, first.measurements)
    drawn = {
        (p, r): _draw(_choices(point), point.seed, r)
        for p, point in enumerate(points)
        for r in range(first.replicas)
    }
    rows = [row for m in METHODS for row in _trained(points, drawn, m, mesh, recorder)]
    names = ("point", "method", "columns", "scale", "replica", "error", "loss", "truth")
    found = population.columns(names, rows)
    owner = found.pop("point")
    tables = [{n: v[owner == p] for n, v in found.items()} for p in range(len(points))]
    return [Table({"stage": np.full(len(t["error"]), "robust")} | t, {}) for t in tables]


def _choices(point: Config) -> Robust:
    assert isinstance(point.study, Robust)
    return point.study


def _draw(choices: Robust, seed: int, replica: int) -> Drawn:
    own = population.own_seed(seed, replica)
    sizes = {"n": choices.measurements, "dim": choices.dim, "rank": choices.rank}
    return synthetic.sensing(own, **sizes, smallest=choices.smallest, outliers=choices.outliers)


def _trained(
    points: Sequence[Config],
    drawn: Mapping[tuple[int, int], Drawn],
    method: str,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[tuple]:
    first = _choices(points[0])
    cells = [
        (p, c, scale, r)
        for p in range(len(points))
        for c in first.columns
        for scale in first.scales
        for r in range(first.replicas)
    ]
    widest, own = max(first.columns), [_choices(points[p]) for p, *_ in cells]
    starts = [
        scale * np.pad(spectral_start(drawn[p, r], c), ((0, 0), (0, widest - c)))
        for p, c, scale, r in cells
    ]
    data = {key: np.column_stack([flattened(d.matrices), d.values]) for key, d in drawn.items()}
    absolute = method == "absolute"
    scalars = {
        "learning_rate": [o.learning_rate if absolute else o.square_rate for o in own],
        "decay": [o.decay if absolute else 1.0 for o in own],
    }
    optimizer = optim.by_hyperparameters(falling, {name: 1.0 for name in scalars})
    net, keys = measured(first.dim, widest, method), jax.random.split(jax.random.key(0), len(cells))
    mesh = mesh or meshes.for_population(len(cells))
    state = fit.init(net, optimizer, keys, scalars, mesh)
    stream = population.stream(np.stack([data[p, r] for p, _, _, r in cells]))
    results = fit.fit(
        *(net, optimizer, population.started(state, np.stack(starts)), stream, first.steps, mesh),
        store=None if recorder is None else recorder.stage(method),
        name=f"robust, {method}",
        record_every=first.steps,
    )
    assert results.state is not None
    return [
        (p, method, c, scale, r, *_outcome(np.asarray(u, np.float64), drawn[p, r], absolute))
        for (p, c, scale, r), u in zip(cells, meshes.fetch(results.state.params), strict=True)
    ]


def _outcome(u: np.ndarray, drawn: Drawn, absolute: bool) -> tuple[float, float, float]:
    """|U U^T - M|, and the mean losses of both."""
    truth = drawn.factor.astype(np.float64) @ drawn.factor.T.astype(np.float64)
    losses = []
    for found in (u @ u.T, truth):
        residual = np.tensordot(drawn.matrices, found, 2) - drawn.values
        losses.append(float(np.mean(abs(residual) / 2 if absolute else residual**2 / 4)))
    return float(np.linalg.norm(u @ u.T - truth)), losses[0], losses[1]
