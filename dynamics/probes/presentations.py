"""The examples of a batch, presented one after the other where one of them is in it twice."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dynamics.types import PyTree


def in_turn(
    index: Int[Array, "b"],
    num_examples: int,
    carry: PyTree,
    present: Callable[[PyTree, jax.Array], PyTree],
) -> PyTree:
    """``carry = present(carry, at)`` until every entry of a batch had its turn.

    ``at`` i32[b] is the index of the entries whose turn it is, all different, and ``num_examples``
    elsewhere: gathers there may give anything, scatters do nothing. Entries of the same example
    follow each other in the order of the batch. Cost: a sort, and one call of ``present`` where no
    example is repeated, as in the batches of ``order.batch_rows``.
    """
    turn = _earlier(index)

    def one(t: jax.Array | int, carry: PyTree) -> PyTree:
        return present(carry, jnp.where(turn == t, index, num_examples))

    return jax.lax.fori_loop(1, turn.max() + 1, one, one(0, carry))


def _earlier(index: Int[Array, "b"]) -> Int[Array, "b"]:
    """How many entries before it are equal to each entry."""
    place = jnp.arange(len(index), dtype=jnp.int32)
    ordered, came_from = jax.lax.sort((index, place), num_keys=1, is_stable=True)
    begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    first = jax.lax.cummax(jnp.where(begins, place, 0))  # of the run of equal ones it is in
    return jnp.zeros_like(place).at[came_from].set(place - first)
