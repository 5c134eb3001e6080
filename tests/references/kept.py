"""The states of a run at the steps where something was measured."""

import dataclasses

import jax
import jax.numpy as jnp

from dynamics import step


@dataclasses.dataclass(frozen=True)
class Kept:
    """A StateProbe that keeps parameters and extras."""

    every: object
    name: str = "kept"

    def start(self, state, each):
        return ()

    def measure(self, carry, state, each):
        # copies: the state is given up to the next step
        leaves = jax.tree.leaves((state.params, state.extras))
        return carry, {str(i): jnp.copy(x) for i, x in enumerate(leaves)}


def state(results, at, replica):
    """What was kept of one replica after ``at`` steps."""
    tree = jax.tree.structure((results.state.params, results.state.extras))
    leaves = [results.arrays[f"kept.{i}@{at}"][replica] for i in range(tree.num_leaves)]
    return step.given(*jax.tree.unflatten(tree, [jnp.asarray(x) for x in leaves]))
