"""What lies between pairs of replicas."""

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Shaped

from dynamics import landscape, population
from dynamics import mesh as meshes
from dynamics.data.rows import subset, take
from dynamics.probes.evaluate import measured
from dynamics.scores.examples import over_examples
from dynamics.types import Batch, Context, PyTree, TrainState


@dataclass(frozen=True, eq=False)
class Path:
    """The arrays ``loss`` and ``accuracy`` f32[K, A, N]: every example of the data ``on``, on the
    straight path from each replica half way to its partner.

    Replicas k and k + K/2 are partners: where k went the fraction ``alphas(points)`` of the path,
    the other is as far from its own end, so both together are the whole path (``whole``), and
    ``landscape.barrier`` of means over any examples is their barrier. Where a network has batch
    statistics, they are re-estimated at each place from batches of the data ``train``. Replicas may
    have their own ``labels``. Cost: (points + 1) / 2 forward passes of the data, and of the
    batches, for each replica. ValueError: an odd number of replicas, an even one of points, batch
    statistics without ``train``.
    """

    every: int | Collection[int]
    on: str = "train"
    name: str = "path"
    points: int = 11
    labels: Shaped[np.ndarray, "k n ..."] | None = None
    train: str | None = None
    batches: int = 50
    batch_size: int = 128
    dims: tuple[str, ...] = ("place", "example")

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        for name in {self.on} if self.train is None else {self.on, self.train}:
            context.examples(name)
        k = population.size(state)
        if k % 2 or self.points % 2 == 0 or self.points < 3:
            raise ValueError(
                f"a path needs pairs of members and an odd number of points, got "
                f"{k} members and {self.points} points"
            )
        if self.train is None and landscape.has_statistics(context.task, state):
            raise ValueError("give the training data: batch statistics are re-estimated on it")
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Losses and correctness along the first half of each replica's path."""
        partners = functools.partial(_other_half_first, mesh=context.mesh)
        params, extras = jax.tree.map(partners, (state.params, state.extras))
        partner = dataclasses.replace(state, params=params, extras=extras)
        known = landscape.has_statistics(context.task, state)
        batches = self._batches(context) if known else []
        found, data = [], context.examples(self.on)
        for alpha in alphas(self.points)[: self.points // 2 + 1]:
            here = landscape.between(state, partner, float(alpha))
            here = landscape.reestimated(context.task, here, batches, context.each)
            found.append(
                over_examples(
                    measured(data),
                    context.task,
                    here,
                    data,
                    labels=self.labels,
                    batch_size=self.batch_size,
                    each=context.each,
                )
            )
        return carry, jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *found)

    def _batches(self, context: Context) -> list[Batch]:
        """The same at every place and step; only these rows travel to the device."""
        assert self.train is not None
        train = context.examples(self.train)
        order = np.random.Generator(np.random.PCG64(0)).permutation(len(train)).astype(np.int32)
        size = min(self.batch_size, len(order))
        starts = [i * size % (len(order) - size + 1) for i in range(self.batches)]

        def batch(rows: np.ndarray) -> Batch:
            return take(jax.tree.map(jnp.asarray, subset(train, rows)), slice(None))

        return [batch(order[s : s + size]) for s in starts]


def _other_half_first(x: jax.Array, mesh: Mesh) -> jax.Array:
    """x[k + K/2] at k, by way of the host: small programs with collectives in them, several in
    flight, deadlock on CPU devices.
    """
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
