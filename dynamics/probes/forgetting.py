"""Forgetting: how often an example that was classified correctly no longer was."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics.losses import correct
from dynamics.probes.presentations import in_turn, places
from dynamics.types import Aux, PyTree, TrainState


@dataclass(frozen=True)
class Forgetting:
    """The array ``events`` f32[K, N]: 1 -> 0 transitions of correctness; high is hard.

    Between consecutive presentations of an example, on the logits that trained it (training mode,
    augmented, before the update; argmax, the first of ties), starting from "incorrect". Infinity:
    presented, never correct. NaN: never presented.

    ``num_examples`` is the size N of the dataset, also where replicas train on a subset: results
    are in its order, and what lies beyond is not counted. An example that is twice in a batch is
    presented twice; one whose logits are NaN, or that has no label, is not. Cost: no forward pass;
    6 N bytes a replica. ValueError, when traced: several labels an example, or no classes.

    Reference: Toneva et al. 2019, arXiv 1812.05159; infinity as in Paul, Ganguli and
    Dziugaite 2021, arXiv 2107.07075 (Toneva et al. count the number of epochs instead).
    """

    num_examples: int
    every: int | Collection[int]
    name: str = "forgetting"
    dims: tuple[str, ...] = ("example",)

    def init(self, state: TrainState) -> PyTree:
        """Nothing presented, nothing correct."""
        never = jnp.zeros(self.num_examples, bool)
        events = jnp.zeros(self.num_examples, jnp.int32)
        return {"presented": never, "correct": never, "events": events}

    def fold(self, carry: PyTree, aux: Aux) -> tuple[PyTree, dict[str, jax.Array]]:
        """One batch taken in; ``events`` f32[N] up to here."""
        if aux.y.ndim != 1:
            raise ValueError(f"{self.name} needs one label an example, got labels {aux.y.shape}")
        right = correct(aux.logits, aux.y) == 1

        def present(carry: PyTree, at: jax.Array) -> PyTree:
            forgotten = carry["correct"][at] & ~right
            return {
                "presented": carry["presented"].at[at].set(True),
                "correct": carry["correct"].at[at].set(right),
                "events": carry["events"].at[at].add(forgotten.astype(jnp.int32)),
            }

        carry = in_turn(places(aux, self.num_examples), self.num_examples, carry, present)
        learned = carry["correct"] | (carry["events"] > 0)  # forgotten means learned before
        events = jnp.where(learned, carry["events"].astype(jnp.float32), jnp.inf)
        return carry, {"events": jnp.where(carry["presented"], events, jnp.nan)}
