"""AUM, the area under the margin: by how much an example's label won, all through training."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics.probes.presentations import places
from dynamics.scores.forward import at_margin, per_example
from dynamics.types import Aux, PyTree, TrainState


@dataclass(frozen=True)
class AreaUnderMargin:
    """The array ``margin`` f32[K, N]: the mean of ``z_y - max_{k != y} z_k``; low is bad.

    Over all presentations of an example, of the logits that trained it (training mode, augmented,
    before the update), in their units. NaN: never presented. Where an example has several labels,
    its margin is the mean over them.

    ``num_examples`` is the size N of the dataset, also where replicas train on a subset: results
    are in its order, and what lies beyond is not counted. An example that is twice in a batch is
    presented twice; one whose logits are NaN, or that has no label, is not. Cost: no forward pass;
    8 N bytes a replica.

    Reference: Pleiss et al. 2020, arXiv 2001.10528. They stop before the first drop of the learning
    rate: measure it at that step.
    """

    num_examples: int
    every: int | Collection[int]
    name: str = "aum"
    dims: tuple[str, ...] = ("example",)

    def init(self, state: TrainState) -> PyTree:
        """Nothing presented."""
        n = self.num_examples
        return {"count": jnp.zeros(n, jnp.int32), "total": jnp.zeros(n, jnp.float32)}

    def fold(self, carry: PyTree, aux: Aux) -> tuple[PyTree, dict[str, jax.Array]]:
        """One batch taken in; ``margin`` f32[N] up to here."""
        margin = per_example(at_margin(aux.logits, aux.y), aux.y)
        at = places(aux, self.num_examples)
        count = carry["count"].at[at].add(1)
        total = carry["total"].at[at].add(margin)
        return {"count": count, "total": total}, {"margin": total / count.astype(jnp.float32)}
