"""How sharp the loss is along the gradients of batches."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics import curvature
from dynamics.probes.sharpness import whole
from dynamics.stability import sgd
from dynamics.types import PROBE, Batch, Context, PyTree, Task, TrainState


@dataclass(frozen=True)
class BatchSharpness:
    """Along the gradients g of ``num_batches`` random batches of ``batch_size``, each f32[K]:

    ``value``, E[g'H_B g / |g|^2] with the batch's own Hessian, and its ``error`` (standard);
    ``interaction``, E[g'H g] / E|g|^2 with that of all the data ``on`` (IAS); and ``noise``,
    E[g'H g] / |grad L|^2 (GNI). Compare ``value`` and ``interaction`` with 2 / eta; ``noise`` is
    2 / eta wherever the loss stands still, at an edge or not.

    The loss is the mean in evaluation mode; batches are drawn without replacement, anew at each
    measurement. Cost: two gradients and two Hessian products of a batch for each, and a product
    of the data. ValueError: a batch of more than the data.

    Reference: ``dynamics.stability.sgd``.
    """

    every: int | Collection[int]
    batch_size: int
    on: str = "train"
    num_batches: int = 32
    name: str = "batch"

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        if not 1 <= self.batch_size <= (n := len(context.examples(self.on))):
            raise ValueError(f"{self.name}.batch_size must be from 1 to {n}, got {self.batch_size}")
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The three measures, f32[K]."""
        batches = _Batches(context.task, self.batch_size, self.num_batches)
        return carry, context.each(batches.measured)(state, whole(context, self.on))


@dataclass(frozen=True)
class _Batches:
    """What is compiled of the probe, for one member: equal ones once."""

    task: Task
    batch_size: int
    num_batches: int

    def measured(self, state: TrainState, whole: Batch) -> dict[str, jax.Array]:
        """The measures of one member, over random batches of the whole data [1, n, ...]."""
        loss, task, batch_size = curvature.mean_loss(self.task), self.task, self.batch_size
        rest = (state.extras, state.hyperparameters)
        everything = jax.tree.map(lambda x: x[0], whole)
        key = jax.random.fold_in(jax.random.fold_in(state.key, PROBE), state.step)
        drawn = jax.vmap(lambda k: jax.random.permutation(k, len(everything.index))[:batch_size])
        rows = drawn(jax.random.split(key, self.num_batches))

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
