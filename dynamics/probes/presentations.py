"""The examples of a batch, presented one after the other where one of them is in it twice."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from dynamics.losses import answered, counted, labelled
from dynamics.types import Aux, PyTree


def places(aux: Aux, num_examples: int) -> Int[Array, "b"]:
    """Where the entries of a batch are counted: ``aux.index``, or ``num_examples`` for those that
    are no presentation.

    That is an index outside 0..num_examples - 1, no label at all (``IGNORED``), or logits that are
    no answer at one of its labels (NaN, of a run that diverged).
    """
    sane = answered(aux.logits)
    if aux.y.shape == sane.shape:
        sane = sane | ~counted(aux.y)
    known = labelled(aux.y) & sane.reshape(len(sane), -1).all(axis=1)
    known = known & (aux.index >= 0) & (aux.index < num_examples)
    return jnp.where(known, aux.index, num_examples)


def in_turn(
    index: Int[Array, "b"],
    num_examples: int,
    carry: PyTree,
    present: Callable[[PyTree, jax.Array], PyTree],
) -> PyTree:
    """``carry = present(carry, at)`` until every entry of a batch had its turn.

    ``at`` i32[b] is the index of the entries whose turn it is, all different, and ``num_examples``
    elsewhere: gathers there may give anything, scatters do nothing. Entries of the same example
    follow each other in the order of the batch; those whose index is outside 0..num_examples - 1
    have no turn. Cost: a sort, and one call of ``present`` where no example is repeated, as in the
    batches of ``order.batch_rows``.
    """
    here = (index >= 0) & (index < num_examples)
    turn = jnp.where(here, _earlier(index), 0)

    def one(t: jax.Array | int, carry: PyTree) -> PyTree:
        return present(carry, jnp.where(here & (turn == t), index, num_examples))

    return jax.lax.fori_loop(1, turn.max() + 1, one, one(0, carry))


def _earlier(index: Int[Array, "b"]) -> Int[Array, "b"]:
    """How many entries before it are equal to each entry."""
    place = jnp.arange(len(index), dtype=jnp.int32)
    ordered, came_from = jax.lax.sort((index, place), num_keys=1, is_stable=True)
    begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    first = jax.lax.cummax(jnp.where(begins, place, 0))  # of the run of equal ones it is in
    return jnp.zeros_like(place).at[came_from].set(place - first)
