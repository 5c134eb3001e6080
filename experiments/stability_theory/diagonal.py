"""Minibatches on a diagonal linear net: the trace law of SGD, and where it ends.

f(x) = <u*u - v*v, x>, the loss 1/2 mean (f(x_i) - y_i)^2, more weights than examples, so every
minimum that a run ends at fits all of them and ``dynamics.stability.sgd`` is exact there. With one
example a batch the trace of the Hessian ends at 2 / eta at most; with more it does not, and
gradient descent keeps to the largest eigenvalue only. ``necessary`` holds for all.

Reference: Wu and Su 2023, arXiv 2305.17490.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import task
from dynamics.data import synthetic
from dynamics.record import Findings
from dynamics.stability import sgd
from dynamics.training import Trained
from dynamics.types import ORDER, Batch, Key, PyTree, Stream, Task, TrainState
from experiments.experiment import Job
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Diagonal
from experiments.stability_theory.population import Look

MEASURED = 60  # steps at which a run is looked at, about
KINDS = ("equal", "normal", "heavy")  # gradients of the minima whose critical rates are computed


def net(dim: int) -> Task:
    """Of x with a real target."""
    init = population.zeros(u=(dim,), v=(dim,))
    return task.of_function(_output, init=init, loss=_half_square)


def _output(params: PyTree, x: jax.Array) -> jax.Array:
    return x @ (params["u"] ** 2 - params["v"] ** 2)


def _half_square(output: jax.Array, y: jax.Array) -> jax.Array:
    return (output - y) ** 2 / 2


def minibatches(stream: Stream, batch_size: int) -> Stream:
    """Independent draws from the batch of another stream: ``noise_factor`` 1 / batch_size.

    Not the epochs of ``resident``, in which batches depend on one another: the operator of the
    theory is of independent ones.
    """

    def batch(shared: PyTree, own: PyTree, fed: PyTree, key: Key, step: jax.Array) -> Batch:
        drawn = jax.random.fold_in(jax.random.fold_in(key, ORDER), step)
        rows = jax.random.randint(drawn, (batch_size,), 0, stream.batch_size, jnp.int32)
        return jax.tree.map(lambda a: a[rows], stream.batch(shared, own, fed, key, step))

    return stream._replace(batch=batch, batch_size=batch_size)


def gradients(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """Of the outputs, [n, 2 dim]."""
    return jnp.concatenate([2 * x * u[None], -2 * x * v[None]], axis=1)


def look(c: float, member: tuple[TrainState, PyTree]) -> dict[str, jax.Array]:
    """``trace``: eta tr H / 2 of (1/n) sum of squared gradients; ``top``: eta lambda_max / 2;
    ``necessary``: the bound of ``sgd``; ``mistake``: the mean loss of all examples.

    Cost: of the Gram matrix of the examples' gradients.
    """
    state, data = member
    u, v, x = state.params["u"], state.params["v"], data["x"]
    eta, slopes = state.hyperparameters["learning_rate"], gradients(u, v, x)
    return {
        "trace": eta / 2 * jnp.sum(slopes**2) / len(x),
        "top": eta / 2 * sgd.modes(slopes).curvature[-1],
        "necessary": sgd.necessary(slopes, eta, c),
        "mistake": jnp.mean((x @ (u**2 - v**2) - data["y"]) ** 2) / 2,
    }


def measure(job: Job[Config, Diagonal]) -> Findings:
    """Frames ``diagonal``, for each (batch, learning_rate, step, replica) what ``look`` says and
    ``diverged``, the step (null: never), and ``critical``; batch = examples is gradient descent.

    ``critical``, for each (kind, batch, replacement, replica), of made-up minima at their critical
    learning rates, in float64 and exactly: ``trace`` (eta tr H / 2), ``necessary`` (at most 1) and
    ``error`` (of the rate, relative), batches drawn with replacement or without.
    """
    seen = [_trained(job, group).measured["look"] for group in populations(job)]
    names = ("batch", "learning_rate", "replica", "step", "trace", "top", "necessary", "mistake")
    frame = pl.concat(seen).select("point", *names, "diverged")
    rows = []
    with jax.enable_x64(True):
        for p, (point, study) in enumerate(zip(job.points, job.studies, strict=True)):
            rows += [{"point": p, **row} for row in _critical(study, point.seed)]
    return Findings({"diagonal": frame, "critical": pl.DataFrame(rows)})


def populations(job: Job[Config, Diagonal]) -> list[pl.DataFrame]:
    """The members of every batch size, at every learning rate; gradient descent at larger ones."""
    members = job.members(_cells, job.study.replicas)
    return members.partition_by("batch", maintain_order=True)


def _cells(point: Config, study: Diagonal) -> list[Mapping[str, Any]]:
    rates = dict.fromkeys(study.batches, study.learning_rates)
    rates[study.examples] = tuple(sorted({*study.learning_rates, *study.large_rates}))
    return [
        {"batch": batch, "learning_rate": rate, "start": study.start}
        for batch, some in rates.items()
        for rate in some
    ]


def _trained(job: Job[Config, Diagonal], group: pl.DataFrame) -> Trained:
    """The members of a batch size."""
    study, batch = job.study, int(group["batch"][0])
    data = population.drawn(job, group, _draw)
    stream = population.own_examples(*map(np.stack, zip(*data, strict=True)))
    full = batch == study.examples
    seen = functools.partial(look, 0.0 if full else sgd.noise_factor(batch, study.examples))
    start = np.stack([np.full(study.dim, value) for value in group["start"]])
    options: dict[str, Any] = {"name": f"batch {batch}", "params": {"u": start, "v": start}}
    options["probes"] = [Look(seen, stream.own, population.logarithmic(study.steps, MEASURED))]
    stream = stream if full else minibatches(stream, batch)
    return population.descend(job, group, net(study.dim), stream, study.steps, **options)


def _draw(study: Diagonal, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs f32[n, dim] and targets f32[n]."""
    sizes = {"n": study.examples, "dim": study.dim, "nonzero": study.nonzero}
    found = synthetic.sparse_regression(seed, **sizes)
    return found.x, found.targets


def _critical(study: Diagonal, seed: int) -> list[dict[str, Any]]:
    """Rows of the critical learning rates of made-up minima."""
    n, rows = study.features, []
    rate, bound = jax.jit(sgd.critical_learning_rate), jax.jit(sgd.necessary)
    for kind, replica in itertools.product(KINDS, range(study.replicas)):
        x = jnp.asarray(_features(kind, n, study.directions, [seed, replica]))
        trace = float(jnp.mean(jnp.sum(x**2, axis=1)))
        for batch, again in itertools.product((1, 2, 4, 8, 16, n), (True, False)):
            c = sgd.noise_factor(batch, n, replacement=again)
            eta, error = map(float, rate(x, c))
            row = {"kind": kind, "batch": batch, "replacement": again, "replica": replica}
            row |= {"trace": eta * trace / 2, "necessary": float(bound(x, eta, c))}
            rows.append({**row, "error": error / eta})
    return rows


def _features(kind: str, n: int, p: int, seed: Sequence[int]) -> np.ndarray:
    """f64[n, p]: gradients of equal norms, normal ones, or ones of heavy-tailed norms."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    scales = {
        "equal": 1 / np.linalg.norm(x, axis=1),
        "normal": np.ones(n),
        "heavy": np.abs(rng.standard_t(3, size=n)),
    }
    return x * scales[kind][:, None]
