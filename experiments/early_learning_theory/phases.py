"""Logistic regression on two Gaussians with wrong labels, through the one step.

Where the paper's proof and its constants differ from what is computed here: the gradient of
log(1 + exp(-eps s)) is (tanh(s / 2) - eps) / 2, with half of the paper's argument; and descent
starts orthogonal to v, because at a few hundred dimensions the component of a random start along v
is no small number, so that the time T at which <theta, v> has grown to 1 / 10 can be zero.

Reference: Liu et al. 2020, arXiv 2007.00151, theorem 1 and appendix A.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import task
from dynamics.data import synthetic
from dynamics.record import Findings
from dynamics.types import Batch, Key, PyTree, Task, TrainState
from experiments.early_learning_theory.config import Config, Phases
from experiments.experiment import Job
from experiments.stability_theory import population
from experiments.stability_theory.population import Look, own_examples

RADIUS = 2.0  # of the sphere that descent starts on
MEASURED = 80  # steps at which a run is looked at, about
SEEN = ("along", "clean", "corrected", "cosine", "kappa_clean", "kappa_wrong", "memorised", "norm",
        "test")  # fmt: skip


class Drawn(NamedTuple):
    """Training and test examples; of a population, with a first axis for its members."""

    x: np.ndarray  # f32[n, dim]
    noisy: np.ndarray  # i32[n]: class 1 is eps = +1
    clean: np.ndarray  # i32[n]
    test_x: np.ndarray  # f32[m, dim]
    test_y: np.ndarray  # i32[m], clean


def separability_bound(examples: int, dim: int, flip: float) -> float:
    """``2 P[Bin(n, flip / 2) <= n - dim]``, at least the chance that no plane fits all labels.

    Small as soon as dim / n > 1 - flip / 2, the fraction of right labels; a bound above 1 says
    nothing, and Cover's theorem for random labels, which asks for dim / n > 1 / 2, more.

    Reference: Liu et al. 2020, arXiv 2007.00151, theorem 6, from its proof.
    """
    if not (examples >= 1 and dim >= 1 and 0 <= flip <= 1):
        raise ValueError(
            f"need examples and dim >= 1 and flip from 0 to 1, got {examples}, {dim}, {flip!r}"
        )
    wrong = flip / 2
    terms = (
        math.comb(examples, k) * wrong**k * (1 - wrong) ** (examples - k)
        for k in range(examples - dim + 1)
    )
    return 2 * math.fsum(terms)


def logistic(dim: int) -> Task:
    """The logits (0, <theta, x>): cross-entropy is log(1 + exp(-eps <theta, x>)), eps = +-1.

    theta starts on the sphere of radius 2, orthogonal to the first unit vector.
    """
    return task.of_function(_predicted, init=functools.partial(_on_sphere, dim))


def _on_sphere(dim: int, key: Key) -> PyTree:
    theta = jax.random.normal(key, (dim,)).at[0].set(0.0)
    return RADIUS * theta / jnp.linalg.norm(theta)


def _predicted(theta: PyTree, x: jax.Array) -> jax.Array:
    s = x @ theta
    return jnp.stack([jnp.zeros_like(s), s], axis=-1)


def look(net: Task, member: tuple[TrainState, Drawn]) -> dict[str, jax.Array]:
    """What the theory speaks of; the clean labels are known to it alone.

    ``cosine``: of what the step descends along and v; ``corrected`` and ``memorised``: the parts
    of the wrong-labelled examples that get their true and their noisy label; ``clean``: the part
    of the others that gets its label; ``test``: test accuracy; ``kappa_clean`` and ``kappa_wrong``:
    means of (tanh(s / 2) - eps)^2, to which gradients are proportional; ``norm``: of theta;
    ``along``: <theta, v>. NaN of no examples. Cost: one gradient of the member's data.
    """
    state, (x, noisy, clean, test_x, test_y) = member
    theta, h = state.params, state.hyperparameters
    batch = Batch(x=x, y=noisy, index=jnp.arange(len(noisy), dtype=jnp.int32))
    slope = jax.grad(lambda p: net.loss(p, state.extras, batch, state.key, h)[0])(theta)
    s, eps = x @ theta, 2 * noisy.astype(jnp.float32) - 1
    said, wrong = (s > 0).astype(jnp.int32), noisy != clean
    kappa = (jnp.tanh(s / 2) - eps) ** 2
    return {
        "cosine": -slope[0] / jnp.linalg.norm(slope),
        "corrected": _mean(said == clean, wrong),
        "memorised": _mean(said == noisy, wrong),
        "clean": _mean(said == clean, ~wrong),
        "test": jnp.mean((test_x @ theta > 0) == (test_y == 1)),
        "kappa_clean": _mean(kappa, ~wrong),
        "kappa_wrong": _mean(kappa, wrong),
        "norm": jnp.linalg.norm(theta),
        "along": theta[0],
    }


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.mean(values.astype(jnp.float32), where=where)


def measure(job: Job[Config, Phases]) -> Findings:
    """Frame ``phases``: what ``look`` says for each (dim, elr_lambda, step, replica), null of no
    examples, and ``diverged``, the step (null: never).

    ``wrong`` is the part of wrong labels, ``bound`` the ``separability_bound`` of the dimension.
    Steps are about evenly apart in their logarithm, from 0 to the last. In the dimension of the
    control there is elr_lambda 0 alone.
    """
    parts = [_seen(job, group) for group in populations(job)]
    return Findings({"phases": pl.concat(parts)})


def populations(job: Job[Config, Phases]) -> list[pl.DataFrame]:
    """The members in either dimension."""
    return job.members(_cells, job.study.replicas).partition_by("dim", maintain_order=True)


def _cells(point: Config, study: Phases) -> list[Mapping[str, Any]]:
    cells = [*((study.dim, e) for e in study.lambdas), (study.control, 0.0)]
    numbers = {"elr_beta": study.beta, "learning_rate": study.learning_rate}
    bounds = {dim: separability_bound(study.examples, dim, study.flip) for dim, _ in cells}
    return [{"dim": dim, "elr_lambda": e, "bound": bounds[dim], **numbers} for dim, e in cells]


def _seen(job: Job[Config, Phases], group: pl.DataFrame) -> pl.DataFrame:
    """The members of a dimension: what was seen of them."""
    study, dim = job.study, group["dim"][0]
    data = population.drawn(job, group, functools.partial(_draw, dim))
    own = Drawn(*map(np.stack, zip(*data, strict=True)))
    group = group.with_columns(wrong=pl.Series([(one.noisy != one.clean).mean() for one in data]))
    net, stream = task.elr(logistic(dim), study.examples, 2), own_examples(own.x, own.noisy)
    at = population.logarithmic(study.steps, MEASURED)
    options: dict[str, Any] = {"scalars": {"elr_lambda": 0.0, "elr_beta": 0.0}, "how": None}
    options["probes"] = [Look(functools.partial(look, net), own, at)]
    trained = population.descend(job, group, net, stream, study.steps, name=f"dim {dim}", **options)
    names = ("point", "dim", "elr_lambda", "replica", "step", "wrong", "bound", "diverged")
    return trained.measured["look"].select(*names, pl.col(SEEN).fill_nan(None))


def _draw(dim: int, study: Phases, seed: int) -> Drawn:
    """Training and test examples of one replica, from one draw."""
    n = study.examples
    sizes = {"n": n + study.tested, "dim": dim}
    data, noisy = synthetic.opposite_gaussians(seed, **sizes, sigma=study.sigma, flip=study.flip)
    x = np.asarray(data.x)
    return Drawn(x[:n], noisy.labels[:n], noisy.clean[:n], x[n:], noisy.clean[n:])
