"""A function of a batch, run over a dataset: padded at the end, cut to size, never reordered."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from dynamics import counts, ghost, population
from dynamics import mesh as meshes
from dynamics.data.rows import check_classes, checked, class_range, seen, take
from dynamics.task import by_value
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState

PerExample = Callable[[Task, TrainState, Batch], PyTree]


def over_examples(
    score: PerExample,
    task: Task,
    state: TrainState,
    data: Dataset,
    *,
    labels: Shaped[np.ndarray, "k n ..."] | None = None,
    batch_size: int = 256,
    each: Each | None = None,
) -> PyTree:
    """``score(task, state, batch)`` of every example: f32[N, ...] in dataset order.

    With ``each`` (what ``fit`` hands to a StateProbe) the state is a population's, every replica
    may have its own ``labels``, one for each example of ``data`` (else ValueError), and the result
    is [K, N, ...]. Batches, whose ``index`` is ``data.row``, go to the device one by one as stored;
    the result depends on ``batch_size`` by rounding only. ValueError: the examples of a batch
    depend on each other (batch norm in training mode); labels that are no classes of the network.
    """
    n = checked(data)
    counts.check(batch_size=batch_size)
    if not isinstance(state, TrainState):
        raise ValueError(
            f"state must be a TrainState, got {type(state).__name__}: step.given(params, extras) "
            "makes one of parameters"
        )
    if labels is not None and (each is None or labels.shape[:2] != (population.size(state), n)):
        raise ValueError(
            f"labels must be one row of {n} for each member of a population, got {labels.shape}; "
            "for one state, give data with other labels"
        )
    if each is None:  # a run checks the labels of its data sets at its start
        batch = jax.eval_shape(lambda: take(data, np.arange(min(2, n))))
        parts_of = (state.params, state.extras, batch, state.hyperparameters)
        aux = jax.eval_shape(task.evaluate, *parts_of)
        check_classes(class_range(data.y), aux.logits, aux.y)
    size = min(batch_size, n)
    fn = by_value(_PerExample(by_value(score), task).scored)
    y = np.asarray(data.y) if labels is None else labels
    if each is not None and labels is None:
        y = np.broadcast_to(y, (population.size(state), *y.shape))
    run = functools.partial(_run, fn) if each is None else each(fn)
    x, row, parts = np.asarray(data.x), np.asarray(data.row), []
    for first in range(0, n, size):
        at = np.minimum(np.arange(first, first + size), n - 1)
        own = np.take(y, at, axis=0 if each is None else 1)
        parts.append(run((state, own), x[at], row[at], data.mean, data.std))
    axis = 0 if each is None else 1

    def whole(*xs: jax.Array) -> jax.Array:
        return jax.lax.slice_in_dim(jnp.concatenate(xs, axis=axis), 0, n, axis=axis)

    return jax.tree.map(whole, *parts)


def losses(task: Task, state: TrainState, batch: Batch) -> jax.Array:
    """Each example's own loss in evaluation mode, f32[b]."""
    return task.evaluate(state.params, state.extras, batch, state.hyperparameters).loss


@dataclass(frozen=True)
class _PerExample:
    """A score of a task: equal ones are compiled once."""

    score: PerExample
    task: Task

    def scored(self, own: tuple, x: jax.Array, row: jax.Array, mean: Any, std: Any) -> PyTree:
        """The score of each example of a batch as stored, for one state."""
        state, y = own
        x, y, row = meshes.split_here((x, y, row))
        batch = seen(x, y, row, mean, std)
        ghost.check_independent(functools.partial(losses, self.task), state, batch)
        return meshes.whole_here(self.score(self.task, state, batch))


@functools.partial(jax.jit, static_argnums=0)
def _run(fn: Callable[..., Any], *arguments: Any) -> PyTree:
    return fn(*arguments)
