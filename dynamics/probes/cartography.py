"""Data maps: how sure a network was of an example's label during training, and how steadily."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics.losses import correct
from dynamics.probes.presentations import in_turn, places
from dynamics.scores.forward import at_probability, per_example
from dynamics.scores.vog import welford
from dynamics.types import Aux, PyTree, TrainState


@dataclass(frozen=True)
class Cartography:
    """The arrays ``confidence``, ``variability`` and ``correctness`` f32[K, N] of presentations.

    ``confidence``: the mean of p_y; low is hard. ``variability``: its standard deviation (1/n);
    high is ambiguous. ``correctness``: how often p_y was the largest (the first of ties). All of
    the logits that trained the example (training mode, augmented, before the update). NaN: never
    presented. Where an example has several labels, p_y and correctness are the means over them.

    ``num_examples`` is the size N of the dataset, also where replicas train on a subset: results
    are in its order, and what lies beyond is not counted. An example that is twice in a batch is
    presented twice; one whose logits are NaN, or that has no label, is not. Cost: no forward pass;
    16 N bytes a replica.

    Reference: Swayamdipta et al. 2020, arXiv 2009.10795. Their formulas have the parameters at the
    end of each epoch, here it is those that the presentation is about to change.
    """

    num_examples: int
    every: int | Collection[int]
    name: str = "cartography"
    dims: tuple[str, ...] = ("example",)

    def init(self, state: TrainState) -> PyTree:
        """Nothing presented."""
        zeros = jnp.zeros(self.num_examples, jnp.float32)
        count = jnp.zeros(self.num_examples, jnp.int32)
        return {"count": count, "mean": zeros, "m2": zeros, "correct": zeros}

    def fold(self, carry: PyTree, aux: Aux) -> tuple[PyTree, dict[str, jax.Array]]:
        """One batch taken in; the three metrics f32[N] up to here."""
        p = per_example(at_probability(aux.logits, aux.y), aux.y)
        right = per_example(correct(aux.logits, aux.y), aux.y)

        def present(carry: PyTree, at: jax.Array) -> PyTree:
            count = carry["count"].at[at].add(1)
            mean, m2 = welford(count[at], carry["mean"][at], carry["m2"][at], p)
            return {
                "count": count,
                "mean": carry["mean"].at[at].set(mean),
                "m2": carry["m2"].at[at].set(m2),
                "correct": carry["correct"].at[at].add(right),
            }

        carry = in_turn(places(aux, self.num_examples), self.num_examples, carry, present)
        count = carry["count"]
        times = count.astype(jnp.float32)
        return carry, {
            "confidence": jnp.where(count > 0, carry["mean"], jnp.nan),
            "variability": jnp.sqrt(carry["m2"] / times),
            "correctness": carry["correct"] / times,
        }
