"""Trees of arrays as vectors: no leaf changes its shape, since it may be sharded."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.types import PyTree


def dot(v: PyTree, w: PyTree) -> Float[Array, ""]:
    """``<v, w>``."""
    return total(jax.tree.map(lambda x, y: _contract(x, y, x.ndim), v, w))


def total(tree: PyTree) -> jax.Array:
    """The sum of the leaves, which have one shape."""
    first, *others = jax.tree.leaves(tree)
    for other in others:
        first = first + other
    return first


def minus(v: PyTree, factor: jax.Array, w: PyTree) -> PyTree:
    """``v - factor w``."""
    return jax.tree.map(lambda x, y: x - factor * y, v, w)


def scaled(factor: jax.Array, v: PyTree) -> PyTree:
    """``factor v``."""
    return jax.tree.map(lambda x: factor * x, v)


def coefficients(basis: PyTree, v: PyTree) -> Float[Array, "k"]:
    """``<q_i, v>`` of the k rows of a basis, a tree with leaves [k, ...]."""
    return total(jax.tree.map(lambda q, x: _contract(q, x, x.ndim), basis, v))


def combination(weights: Float[Array, "k"], basis: PyTree) -> PyTree:
    """``sum_i weights_i q_i``."""
    return jax.tree.map(lambda q: jnp.tensordot(weights, q, 1, precision="highest"), basis)


def _contract(a: jax.Array, b: jax.Array, axes: int) -> jax.Array:
    """Over the last ``axes`` axes of a and all of b, without a reshape: they may be sharded."""
    here = tuple(range(a.ndim - axes, a.ndim))
    return jnp.tensordot(a, b, (here, tuple(range(axes))), precision="highest")
