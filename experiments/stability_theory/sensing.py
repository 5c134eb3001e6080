"""A positive matrix M of rank r from a factor with k > r columns: what the extra ones cost.

All of M is measured (the measurements are an isometry). ``symmetric``: descent on 1/4
|X X^T - M|^2. Redundant singular values obey s <- s - eta s^3, so that |X X^T - M|^2 ends as
(k - r) / (4 eta^2 t^2), whatever the start: the constant is ours. ``asymmetric``: descent on 1/2
|F G^T - M|^2 with G smaller at the start, which converges at the rate 2 eta s^2 a step, s the
smallest singular value of F, proportional to its start; a balanced start does not. ``modified``:
after some steps the small singular values of F are raised to one value and those of G lowered,
the product unchanged, which frees the rate of the start. In float64: errors end below 1e-16.

Reference: Xiong, Ding and Du 2023, arXiv 2310.01769, theorems on both factors and section on the
modified step, whose details are our reading.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import mesh as meshes
from dynamics import task
from dynamics.data import synthetic
from dynamics.record import Findings
from dynamics.training import Trained
from dynamics.types import PyTree, Task, TrainState
from experiments.experiment import Job
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Sensing
from experiments.stability_theory.population import Look

MEASURED = 60  # steps at which a run is looked at, about
LOSSES: dict[bool, Callable[[jax.Array, jax.Array], jax.Array]] = {  # whether it is symmetric
    True: lambda square, _: square / 4,
    False: lambda square, _: square / 2,
}


def factorisation(dim: int, columns: int, *, symmetric: bool) -> Task:
    """The loss of X X^T or F G^T; the one example of a batch is u [dim, rank], M = u u^T.

    ``symmetric``: 1/4 |X X^T - M|^2, else 1/2 |F G^T - M|^2. Columns that are zero stay zero.
    """
    init = population.zeros(**dict.fromkeys("x" if symmetric else "fg", (dim, columns)))
    return task.of_function(_square, init=init, loss=LOSSES[symmetric])


def _square(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.sum(error(params, x[0]) ** 2)[None]


def error(params: PyTree, factor: jax.Array) -> jax.Array:
    """X X^T - u u^T, or F G^T - u u^T."""
    left = params["x"] if "x" in params else params["f"]
    right = params["x"] if "x" in params else params["g"]
    factor = factor.astype(left.dtype)
    return left @ right.T - factor @ factor.T


def raised(f: np.ndarray, g: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """(F B S, G B S^-1) with F = A diag(s) B^T and S = max(least / s, 1): the product is F G^T.

    Every singular value of the new F is at least ``least``. Ours, after Xiong, Ding and Du 2023.
    """
    _, s, turned = np.linalg.svd(f, full_matrices=False)
    scale = np.maximum(least / s, 1)
    return f @ turned.T * scale, g @ turned.T / scale


def look(member: tuple[TrainState, PyTree]) -> dict[str, jax.Array]:
    """``error``: |X X^T - M|^2 or |F G^T - M|^2; ``least``: the smallest singular value of F or X.

    Of X the smallest of all columns, zeros among them.
    """
    state, factor = member
    left = state.params["x"] if "x" in state.params else state.params["f"]
    gram = jnp.linalg.eigvalsh(left.T @ left)
    least = jnp.sqrt(jnp.maximum(gram[0], 0))
    return {"error": jnp.sum(error(state.params, factor) ** 2), "least": least}


def measure(job: Job[Config, Sensing]) -> Findings:
    """Frame ``sensing``: what ``look`` says, by method, columns, scale, step and replica.

    ``method`` is "symmetric", for every number of columns; or, with F of standard deviation
    ``scale`` at the start, "asymmetric", "balanced" (G as F) or "modified", which is asymmetric
    until step ``before``. Where methods share a seed they share M and F.
    """
    one, two = populations(job)
    with jax.enable_x64(True):
        parts = [_symmetric(job, one), *_asymmetric(job, two)]
    names = ("point", "method", "columns", "scale", "step", "replica", "error", "least",
             "diverged")  # fmt: skip
    return Findings({"sensing": pl.concat([part.measured["look"].select(names) for part in parts])})


def populations(job: Job[Config, Sensing]) -> list[pl.DataFrame]:
    """X of every number of columns; F and G of every start."""
    return [job.members(cells, job.study.replicas) for cells in (_of_columns, _of_starts)]


def _of_columns(point: Config, study: Sensing) -> list[Mapping[str, Any]]:
    cell = {"method": "symmetric", "scale": study.start, "learning_rate": study.learning_rate}
    return [{**cell, "columns": columns} for columns in study.columns]


def _of_starts(point: Config, study: Sensing) -> list[Mapping[str, Any]]:
    cell = {"columns": study.width, "learning_rate": study.learning_rate}
    own = {"asymmetric": study.imbalance, "balanced": None, "modified": study.imbalance}
    return [
        {**cell, "method": method, "scale": scale, "imbalance": own[method], "raised": study.raised}
        for method, scale in itertools.product(own, study.scales)
    ]


def _symmetric(job: Job[Config, Sensing], members: pl.DataFrame) -> Trained:
    study, widest, x = job.study, max(job.study.columns), []
    for member, (draw, _) in zip(members.rows(named=True), _starts(job, members), strict=True):
        wide = ((0, 0), (0, widest - member["columns"]))
        x.append(np.pad(member["scale"] * draw, wide))
    net = factorisation(study.dim, widest, symmetric=True)
    at = population.logarithmic(study.steps, MEASURED)
    return _descended(job, members, net, study.steps, at, "symmetric", params={"x": np.stack(x)})


def _asymmetric(job: Job[Config, Sensing], members: pl.DataFrame) -> list[Trained]:
    """Until the step that is modified, and after it."""
    study, pairs, until = job.study, [], job.study.before
    rows, last = members.rows(named=True), until + study.after
    for member, (f, g) in zip(rows, _starts(job, members), strict=True):
        g = f if member["imbalance"] is None else member["imbalance"] * g
        pairs.append((member["scale"] * f, member["scale"] * g))
    net = factorisation(study.dim, study.width, symmetric=False)
    at = population.logarithmic(until, MEASURED // 2)
    start = dict(zip("fg", map(np.stack, zip(*pairs, strict=True)), strict=True))
    early = _descended(job, members, net, until, at, "asymmetric", params=start)
    assert early.state is not None
    f, g = (np.array(meshes.fetch(early.state.params[name])) for name in "fg")
    for k, member in enumerate(rows):
        if member["method"] == "modified":
            f[k], g[k] = raised(f[k], g[k], member["raised"])
    start = dataclasses.replace(early.state, params={"f": jnp.asarray(f), "g": jnp.asarray(g)})
    at = np.unique(np.linspace(until, last, MEASURED // 2).round().astype(int))[1:].tolist()
    return [early, _descended(job, members, net, last, tuple(at), "modified", start=start)]


def _descended(
    job: Job[Config, Sensing],
    members: pl.DataFrame,
    net: Task,
    until: int,
    at: tuple[int, ...],
    name: str,
    **start: Any,
) -> Trained:
    """Gradient descent of every member on its own matrix until a step, seen at the steps ``at``."""
    factors = np.stack(population.drawn(job, members, _factor))
    stream = population.own_examples(factors[:, None])
    probes = [Look(look, factors, at)]
    return population.descend(job, members, net, stream, until, name=name, probes=probes, **start)


def _factor(study: Sensing, seed: int) -> np.ndarray:
    return synthetic.low_rank(seed, dim=study.dim, rank=study.rank, smallest=study.smallest)


def _starts(job: Job[Config, Sensing], members: pl.DataFrame) -> list[np.ndarray]:
    """Two matrices f64[dim, columns] of N(0, 1) for each member."""
    seeds = population.drawn(job, members, lambda study, seed: seed)
    pairs = zip(seeds, members["columns"], strict=True)
    return [start(job.study.dim, columns, seed) for seed, columns in pairs]


def start(dim: int, columns: int, seed: int) -> np.ndarray:
    """f64[2, dim, columns] of N(0, 1)."""
    return np.random.default_rng([seed, columns]).standard_normal((2, dim, columns))
