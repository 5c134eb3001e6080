"""The straight path between two states, and the barrier on it."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dynamics.types import LOSS, Batch, Each, Leaf, Task, TrainState, Written


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

    For batch norm with momentum 0.9, 50 batches leave 0.5 % of the old statistics. Tables with a
    row for each example stay as they are, and so do states without statistics. Cost: one forward
    pass of each batch for each replica.
    """
    if not has_statistics(task, state):
        return state
    run = each(_TrainingMode(task).seen)
    for batch in batches:
        state = run(state, batch)
    return state


def has_statistics(task: Task, state: TrainState) -> bool:
    """Whether the module of a population's states remembers anything of its batches."""
    _, extras = jax.eval_shape(jax.vmap(task.network), state.params, state.extras)
    return bool(jax.tree.leaves(extras))


@dataclasses.dataclass(frozen=True)
class _TrainingMode:
    """A task in training mode: equal ones are compiled once."""

    task: Task

    def seen(self, state: TrainState, batch: Batch) -> TrainState:
        """The state with the extras that the batch leaves, tables as they were."""

        def kept(new: Leaf | Written, old: Leaf) -> Leaf:
            return old if isinstance(new, Written) else new

        key = jax.random.fold_in(state.key, LOSS)
        _, (extras, _) = self.task.loss(
            state.params, state.extras, batch, key, state.hyperparameters
        )
        is_table = lambda leaf: isinstance(leaf, Written)  # noqa: E731
        extras = jax.tree.map(kept, extras, state.extras, is_leaf=is_table)
        return dataclasses.replace(state, extras=extras)


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
