"""How sharp the loss is along the gradients of batches."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dynamics import curvature
from dynamics.stability import sgd
from dynamics.types import PROBE, Batch, Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True)
class BatchSharpness:
    """Along the gradients g of ``num_batches`` random batches of ``batch_size``, each f32[K]:

    ``value``, E[g'H_B g / |g|^2] with the batch's own Hessian, and its ``error`` (standard);
    ``interaction``, E[g'H g] / E|g|^2 with that of all ``data`` (IAS); and ``noise``,
    E[g'H g] / |grad L|^2 (GNI). Compare ``value`` and ``interaction`` with 2 / eta; ``noise`` is
    2 / eta wherever the loss stands still, at an edge or not.

    The loss is the mean in evaluation mode; batches are drawn without replacement, anew at each
    measurement. Cost: two gradients and two Hessian products of a batch for each, and a product
    of the data. ValueError: a batch of more than the data.

    Reference: ``dynamics.stability.sgd``.
    """

    task: Task
    data: Dataset
    batch_size: int
    every: int | Collection[int]
    num_batches: int = 32
    name: str = "batch"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        if not 1 <= self.batch_size <= len(self.data):
            raise ValueError(
                f"{self.name}.batch_size must be from 1 to {len(self.data)}, got {self.batch_size}"
            )
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The three measures, f32[K]."""
        fn = _measured(self.task, self.batch_size, self.num_batches)
        return carry, each(fn)(state, self._whole)

    @functools.cached_property
    def _whole(self) -> Batch:
        return curvature.cut_dataset(self.data)


@functools.lru_cache(maxsize=64)
def _measured(task: Task, batch_size: int, num_batches: int) -> Callable[..., Any]:
    loss = curvature.mean_loss(task)

    def measured(state: TrainState, whole: Batch) -> dict[str, jax.Array]:
        rest = (state.extras, state.hyperparameters)
        everything = jax.tree.map(lambda x: x[0], whole)
        key = jax.random.fold_in(jax.random.fold_in(state.key, PROBE), state.step)
        drawn = jax.vmap(lambda k: jax.random.permutation(k, len(everything.index))[:batch_size])
        rows = drawn(jax.random.split(key, num_batches))

        def of(rows: jax.Array) -> Batch:
            return jax.tree.map(lambda x: x[rows], everything)

        def gradient(rows: jax.Array) -> PyTree:
            return jax.grad(loss)(state.params, of(rows), *rest)

        def own(rows: jax.Array, v: PyTree) -> PyTree:
            batch = jax.tree.map(lambda x: x[None], of(rows))
            return curvature.of_task(task, state, batch)(v)

        hessian = curvature.of_task(task, state, whole)
        mine = sgd.along(gradient, own, rows)
        full = sgd.along(gradient, lambda _, v: hessian(v), rows)
        g = jax.grad(loss)(state.params, everything, *rest)
        squared = sum(jnp.sum(x**2) for x in jax.tree.leaves(g))
        value, error = sgd.batch_sharpness(mine)
        return {
            "value": value,
            "error": error,
            "interaction": sgd.interaction(full),
            "noise": sgd.gradient_noise(full, jnp.asarray(squared)),
        }

    return measured
