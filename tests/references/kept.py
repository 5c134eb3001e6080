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

    def start(self, context, state):
        return ()

    def measure(self, context, carry, state):
        leaves = jax.tree.leaves((state.params, state.extras))
        return carry, {str(i): x for i, x in enumerate(leaves)}


def state(results, at, replica):
    """What was kept of one replica after ``at`` steps."""
    tree = jax.tree.structure((results.state.params, results.state.extras))
    arrays = [results.arrays["kept", str(i)].at(step=at) for i in range(tree.num_leaves)]
    leaves = [jnp.asarray(array.values[replica]) for array in arrays]
    return step.given(*jax.tree.unflatten(tree, leaves))
