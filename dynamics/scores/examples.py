"""A function of a batch, run over a dataset: padded at the end, cut to size, never reordered."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics import ghost
from dynamics import mesh as meshes
from dynamics.data.stream import normalise
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState

PerExample = Callable[[Task, TrainState, Batch], PyTree]


def over_examples(
    score: PerExample,
    task: Task,
    state: TrainState,
    data: Dataset,
    *,
    labels: Int[np.ndarray, "k n"] | None = None,
    batch_size: int = 256,
    each: Each | None = None,
) -> PyTree:
    """``score(task, state, batch)`` of every example: f32[N, ...] in dataset order.

    With ``each`` (what ``fit`` hands to a StateProbe) the state is a population's, every replica
    may have its own ``labels`` (else ValueError), and the result is [K, N, ...]. Batches go to the
    device one by one as stored; the result depends on ``batch_size`` by rounding only. ValueError:
    the examples of a batch depend on each other (batch norm in training mode).
    """
    n = len(data)
    if labels is not None and (each is None or labels.shape[:2] != (len(state.step), n)):
        raise ValueError(
            f"labels must be one row of {n} for each replica of a population, got {labels.shape}; "
            "for one state, give data with other labels"
        )
    size = min(batch_size, n)
    fn = _bound(score, task)
    y = np.asarray(data.y) if labels is None else labels
    if each is not None and labels is None:
        y = np.broadcast_to(y, (len(state.step), *y.shape))
    run = _compiled(fn) if each is None else each(fn)
    x, parts = np.asarray(data.x), []
    for first in range(0, n, size):
        rows = np.minimum(np.arange(first, first + size), n - 1).astype(np.int32)
        own = np.take(y, rows, axis=0 if each is None else 1)
        parts.append(run((state, own), x[rows], rows, data.mean, data.std))
    axis = 0 if each is None else 1

    def whole(*xs: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(jnp.concatenate(xs, axis=axis), 0, n, axis=axis)

    return jax.tree.map(whole, *parts)


def losses(task: Task, state: TrainState, batch: Batch) -> jax.Array:
    """Each example's own loss in evaluation mode, f32[b]."""
    return task.evaluate(state.params, state.extras, batch, state.hyperparameters).loss


@functools.lru_cache(maxsize=64)
def _bound(score: PerExample, task: Task) -> Callable[..., Any]:
    """The same function object for the same score and task, so that it is compiled once."""

    def per_example(own: tuple, x: jax.Array, rows: jax.Array, mean: Any, std: Any) -> PyTree:
        state, y = own
        x, y, rows = meshes.split_here((x, y, rows))
        batch = Batch(x=normalise(x, mean, std), y=y.astype(jnp.int32), index=rows)
        ghost.check_independent(functools.partial(losses, task), state, batch)
        return meshes.whole_here(score(task, state, batch))

    return per_example


@functools.lru_cache(maxsize=64)
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fn)
