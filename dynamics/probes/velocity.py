"""How fast the tangent kernel of chosen examples turns between measurements."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from dynamics import population
from dynamics.data.rows import seen
from dynamics.kernel import ntk, velocity
from dynamics.types import Context, PyTree, Task, TrainState


@dataclass(frozen=True, eq=False)
class KernelVelocity:
    """The array ``velocity`` f32[K, G]: 1 - cos(K_before, K_now) of each group's kernel.

    ``groups[g]`` are positions in the data ``on`` (m of them) whose (m C) x (m C) kernel is
    followed, for all replicas alike, or ``groups[k, g]`` for each its own. The first measurement
    has nothing before it and leaves nothing. Cost: m C gradients of one example for each group and
    replica, and the memory of the last kernels, 4 (m C)^2 bytes for each. ValueError: groups of
    another number of replicas, positions that are not in the data.
    """

    every: int | Collection[int]
    groups: Int[np.ndarray, "*k g m"]
    on: str = "train"
    name: str = "kernel"
    dims: tuple[str, ...] = ("group",)

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Kernels of zeros, and whether there was a measurement."""
        data, k = context.examples(self.on), population.size(state)
        replicas = {k, *self.groups.shape[:-2]}
        if self.groups.ndim not in (2, 3) or len(replicas) > 1:
            raise ValueError(
                "groups must be rows [g, m], or [k, g, m] with k the number of members, "
                f"{k}, got {list(self.groups.shape)}"
            )
        if self.groups.size and not 0 <= self.groups.min() <= self.groups.max() < len(data):
            raise ValueError(f"groups must hold rows 0 to {len(data) - 1} of the data")
        nothing = context.each(_Kernel(context.task).nothing)
        zeros = [nothing((state, stored)) for stored in self._stored(context, state)]
        return {"kernels": zeros, "begun": jnp.zeros(k, bool)}

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The kernels now, and how they turned."""
        run, now, turned = context.each(_Kernel(context.task).turned), [], []
        for before, stored in zip(carry["kernels"], self._stored(context, state), strict=True):
            kernel, moved = run(((state, stored), before))
            now.append(kernel)
            turned.append(moved)
        begun = carry["begun"]
        first = not isinstance(begun, Tracer) and not bool(begun.all())
        metrics = {} if first else {"velocity": jnp.stack(turned, axis=1)}
        return {"kernels": now, "begun": jnp.ones_like(begun)}, metrics

    def _stored(self, context: Context, state: TrainState) -> list[tuple]:
        """The examples of each group as stored, with a member axis, and how they are normalised."""
        data, k = context.examples(self.on), population.size(state)
        groups = np.broadcast_to(self.groups, (k, *self.groups.shape[-2:]))
        stored = [np.asarray(v) for v in (data.x, data.y, data.row)]
        scale = [np.broadcast_to(v, (k, *np.shape(v))) for v in (data.mean, data.std)]
        return [(*(v[at] for v in stored), *scale) for at in groups.swapaxes(0, 1)]


@dataclass(frozen=True)
class _Kernel:
    """What is compiled of the probe, for one member: equal ones once."""

    task: Task

    def nothing(self, one: tuple) -> jax.Array:
        """Zeros in the kernel's shape."""
        kernel = jax.eval_shape(self.now, one)
        return jnp.zeros(kernel.shape, jnp.float32)

    def now(self, one: tuple) -> jax.Array:
        """The kernel of a group of examples."""
        state, stored = one
        return ntk(self.task, state, seen(*stored))

    def turned(self, own: tuple) -> tuple[jax.Array, jax.Array]:
        """The kernel, and how far it is from the one before."""
        one, before = own
        kernel = self.now(one)
        return kernel, velocity(before, kernel)
