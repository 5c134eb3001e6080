"""The straight path between two states, and the barrier on it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dynamics.types import LOSS, Batch, Each, Task, TrainState


def between(start: TrainState, end: TrainState, alpha: float) -> TrainState:
    """``start`` with parameters and floating extras ``(1 - alpha) start + alpha end``.

    Batch statistics of the middle are not the middle of the batch statistics: ``reestimated``.
    """

    def mixed(a: jax.Array, b: jax.Array) -> jax.Array:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        return a + jnp.asarray(alpha, a.dtype) * (b - a)

    params = jax.tree.map(mixed, start.params, end.params)
    extras = jax.tree.map(mixed, start.extras, end.extras)
    return dataclasses.replace(start, params=params, extras=extras)


def reestimated(task: Task, state: TrainState, batches: Iterable[Batch], each: Each) -> TrainState:
    """A population's states with the extras that training mode makes of these batches.

    For batch norm with momentum 0.9, 50 batches leave 0.5 % of the old statistics. States without
    extras come back as they are. Cost: one forward pass of each batch for each replica.
    """
    if not jax.tree.leaves(state.extras):
        return state
    run = each(_training_mode(task))
    for batch in batches:
        state = run(state, batch)
    return state


@functools.lru_cache(maxsize=16)
def _training_mode(task: Task) -> Callable[[TrainState, Batch], TrainState]:
    """One function for one task, so that it is compiled once."""

    def one(state: TrainState, batch: Batch) -> TrainState:
        key = jax.random.fold_in(state.key, LOSS)
        _, (extras, _) = task.loss(state.params, state.extras, batch, key, state.hyperparameters)
        return dataclasses.replace(state, extras=extras)

    return one


def barrier(
    values: Float[np.ndarray, "a *k"], alphas: Float[np.ndarray, "a"]
) -> Float[np.ndarray, "*k"]:
    """``sup_a { R(a) - (1 - a) R(0) - a R(1) }`` over the given points of the path, never below 0.

    ``values[i]`` is the risk R (an error or a loss) at ``alphas[i]``, rising from 0 to 1.
    ValueError: other alphas.

    Reference: Frankle et al. 2020, arXiv 1912.05671, section 2; on subsets of the training set
    Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, section 5.
    """
    ends = (alphas[0], alphas[-1]) if len(alphas) == len(values) and len(alphas) else ()
    if ends != (0, 1) or not np.all(np.diff(alphas) > 0):
        raise ValueError(f"alphas must rise from 0 to 1, one for each value, got {alphas}")
    a = np.asarray(alphas, np.float64).reshape(-1, *(1,) * (np.ndim(values) - 1))
    line = values[0] + a * (values[-1] - values[0])  # level, to the bit, between equal ends
    return np.asarray((values - line)[1:-1].max(axis=0, initial=0.0))
