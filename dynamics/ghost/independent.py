"""Whether the examples of a batch depend on each other, read off the traced program."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import Literal, jaxprs_in_params

from dynamics.types import PyTree

SIZES = (10007, 10009, 10037)  # primes: an axis of such a length is the batch, or made of it
COUPLING = ("reduce_", "arg", "cum", "sort", "top_k", "fft")


def check_independent(
    losses: Callable[[PyTree, PyTree], jax.Array], state: PyTree, batch: PyTree
) -> None:
    """ValueError if ``losses(state, batch)`` [b] sums, ranks or maximises over the batch.

    Batch norm in training mode does, and so does a mean loss; then the gradient of one example is
    not defined by that example. Traced only, for a batch of prime size: nothing is computed.
    """
    sizes = {n for x in jax.tree.leaves((state, batch)) for n in x.shape}
    size = next(s for s in SIZES if not any(n % s == 0 for n in sizes if n))
    many = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), batch)
    closed = jax.make_jaxpr(losses)(state, many)
    shape = closed.out_avals[0].shape
    found = next(_coupled(closed.jaxpr, size), None)
    if shape == (size,) and found is None:
        return
    what = f"{found} runs over the batch" if found else f"losses of {size} examples are {shape}"
    raise ValueError(
        f"the examples of a batch must not depend on each other, but {what}: score in evaluation "
        "mode (batch norm with its running statistics), with one loss for each example"
    )


def _coupled(jaxpr: Any, size: int) -> Iterator[str]:
    """Names of equations that run over the batch and that the outputs depend on."""
    live = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if live.isdisjoint(eqn.outvars):
            continue
        live |= {v for v in eqn.invars if not isinstance(v, Literal)}
        if _runs_over(eqn, size):
            yield eqn.primitive.name
        for inner in jaxprs_in_params(eqn.params):
            yield from _coupled(getattr(inner, "jaxpr", inner), size)


def _runs_over(eqn: Any, size: int) -> bool:
    """Whether a sum, maximum, sort or product of matrices takes an axis made of the batch."""
    name, params = eqn.primitive.name, eqn.params
    shapes = [v.aval.shape for v in eqn.invars]
    if name == "dot_general":
        axes = params["dimension_numbers"][0]
        return any(shapes[j][i] % size == 0 for j in (0, 1) for i in axes[j])
    if not name.startswith(COUPLING) or not shapes:
        return False
    taken = params.get("axes", params.get("axis", params.get("dimension", ())))
    taken = taken if isinstance(taken, tuple) else (taken,)
    return any(i < len(shapes[0]) and shapes[0][i] % size == 0 for i in taken if i is not None)
