"""What lies between pairs of replicas."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics import landscape
from dynamics import mesh as meshes
from dynamics.data.stream import normalise
from dynamics.probes.evaluate import loss_and_accuracy
from dynamics.scores.examples import over_examples
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True, eq=False)
class Path:
    """``<name>.loss@<step>`` and ``.accuracy@<step>`` f32[K, A, N]: every example of ``data``, on
    the straight path from each replica half way to its partner.

    Replicas k and k + K/2 are partners: where k went the fraction ``alphas(points)`` of the path,
    the other is as far from its own end, so both together are the whole path (``whole``), and
    ``landscape.barrier`` of means over any examples is their barrier. Where a network has batch
    statistics, they are re-estimated at each place from batches of ``train``. Replicas may have
    their own ``labels``. Cost: (points + 1) / 2 forward passes of the data, and of the batches, for
    each replica. ValueError: an odd number of replicas, an even one of points, batch statistics
    without ``train``.
    """

    task: Task
    data: Dataset
    every: int | Collection[int]
    name: str = "path"
    points: int = 11
    labels: Int[np.ndarray, "k n"] | None = None
    train: Dataset | None = None
    batches: int = 50
    batch_size: int = 128

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        if len(state.step) % 2 or self.points % 2 == 0 or self.points < 3:
            raise ValueError(
                f"a path needs pairs of replicas and an odd number of points, got "
                f"{len(state.step)} replicas and {self.points} points"
            )
        if jax.tree.leaves(state.extras) and self.train is None:
            raise ValueError("give the training data: batch statistics are re-estimated on it")
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Losses and correctness along the first half of each replica's path."""
        params, extras = jax.tree.map(_other_half_first, (state.params, state.extras))
        partner = dataclasses.replace(state, params=params, extras=extras)
        batches = self._batches() if jax.tree.leaves(extras) else []
        found = []
        for alpha in alphas(self.points)[: self.points // 2 + 1]:
            here = landscape.between(state, partner, float(alpha))
            here = landscape.reestimated(self.task, here, batches, each)
            found.append(
                over_examples(
                    *(loss_and_accuracy, self.task, here, self.data),
                    labels=self.labels,
                    batch_size=self.batch_size,
                    each=each,
                )
            )
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *found)

    def _batches(self) -> list[Batch]:
        """The same at every place and step; only these rows travel to the device."""
        assert self.train is not None
        train = self.train
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(train)).astype(np.int32)
        size = min(self.batch_size, len(order))
        starts = [i * size % (len(order) - size + 1) for i in range(self.batches)]

        def batch(rows: np.ndarray) -> Batch:
            x, y = (jnp.asarray(np.asarray(v)[rows]) for v in (train.x, train.y))
            x = normalise(x, train.mean, train.std)
            return Batch(x=x, y=y.astype(jnp.int32), index=jnp.asarray(rows))

        return [batch(order[s : s + size]) for s in starts]


def _other_half_first(x: jax.Array) -> jax.Array:
    """x[k + K/2] at k, by way of the host: small programs with collectives in them, several in
    flight, deadlock on CPU devices.
    """
    mesh = x.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
    return meshes.put(np.roll(meshes.fetch(x), len(x) // 2, axis=0), x.sharding, mesh)


def alphas(points: int) -> np.ndarray:
    """The places on the whole path, f64[points]."""
    return np.linspace(0, 1, points)


def whole(values: np.ndarray) -> np.ndarray:
    """Paths of pairs [points, K/2, ...] from the halves [K, A, ...] that ``Path`` measured.

    The middle is the mean of what its two computations gave.
    """
    one, other = np.split(np.moveaxis(np.asarray(values, np.float64), 1, 0), 2, axis=1)
    middle = (one[-1:] + other[-1:]) / 2
    return np.concatenate([one[:-1], middle, other[:-1][::-1]])
