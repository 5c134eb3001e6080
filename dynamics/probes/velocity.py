"""How fast the tangent kernel of chosen examples turns between measurements."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics.data.stream import normalise
from dynamics.kernel import ntk, velocity
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True, eq=False)
class KernelVelocity:
    """``<name>.velocity@<step>`` f32[K, G]: 1 - cos(K_before, K_now) of each group's kernel.

    ``groups[g]`` are the rows of ``data`` (m of them) whose (m C) x (m C) kernel is followed, for
    all replicas alike, or ``groups[k, g]`` for each its own. The first measurement has nothing
    before it and is nan. Cost: m C gradients of one example for each group and replica, and the
    memory of the last kernels, 4 (m C)^2 bytes for each. ValueError: groups of another number of
    replicas, rows that are not in ``data``.
    """

    task: Task
    data: Dataset
    groups: Int[np.ndarray, "*k g m"]
    every: int | Collection[int]
    name: str = "kernel"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Kernels of zeros, whose velocity is nan."""
        replicas = {len(state.step), *self.groups.shape[:-2]}
        if self.groups.ndim not in (2, 3) or len(replicas) > 1:
            raise ValueError(
                "groups must be rows [g, m], or [k, g, m] with k the number of replicas, "
                f"{len(state.step)}, got {list(self.groups.shape)}"
            )
        if self.groups.size and not 0 <= self.groups.min() <= self.groups.max() < len(self.data):
            raise ValueError(f"groups must hold rows 0 to {len(self.data) - 1} of the data")
        first = (state, self._stored(state)[0])
        one = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), first)
        kernel = jax.eval_shape(self._kernel, one).shape
        shape = (len(state.step), *kernel)
        return [jnp.zeros(shape, jnp.float32) for _ in range(self.groups.shape[-2])]

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The kernels now, and how they turned."""
        run = each(self._turned)
        now, turned = [], []
        for before, stored in zip(carry, self._stored(state), strict=True):
            kernel, moved = run(((state, stored), before))
            now.append(kernel)
            turned.append(moved)
        return now, {"velocity": jnp.stack(turned, axis=1)}

    def _turned(self, own: tuple) -> tuple[jax.Array, jax.Array]:
        one, before = own
        kernel = self._kernel(one)
        return kernel, velocity(before, kernel)

    def _kernel(self, one: tuple) -> jax.Array:
        state, (x, y, rows) = one
        x = normalise(x, self.data.mean, self.data.std)
        return ntk(self.task, state, Batch(x=x, y=y.astype(jnp.int32), index=rows))

    def _stored(self, state: TrainState) -> list[tuple]:
        """Of each group, the examples as stored, with a replica axis."""
        k = len(state.step)
        shape = (k, *self.groups.shape[-2:])
        groups = np.broadcast_to(self.groups, shape)
        x, y = np.asarray(self.data.x), np.asarray(self.data.y)
        return [(x[rows], y[rows], rows.astype(np.int32)) for rows in groups.swapaxes(0, 1)]
