"""Symmetric maps on trees of arrays, maps made of others, and random vectors for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from dynamics.curvature import vectors
from dynamics.types import Key, PyTree

Draw = Literal["signs", "normal"]


@struct.dataclass(eq=False)
class Operator:
    """A symmetric map on trees like ``like``: ``operator(v)`` is A v.

    A pytree, to be handed to compiled functions. ``product(data, v)`` is static; those of this
    package are equal for equal losses, so that new parameters compile nothing.
    """

    product: Callable[[PyTree, PyTree], PyTree] = struct.field(pytree_node=False)
    data: PyTree  # what the product reads
    like: PyTree  # f[...]: shapes and dtypes of the vectors; None where a leaf is left out
    mask: PyTree | None = None  # f[...] 0 or 1, like ``like``: vectors are zero elsewhere
    sharded: bool = struct.field(pytree_node=False, default=False)
    """Whether Lanczos and the estimators keep every leaf as it lies. Otherwise they work on f[n],
    which compiles in seconds where 40 leaves take a minute."""

    def __call__(self, v: PyTree) -> PyTree:
        """``A v``."""
        return self.product(self.data, v)

    @property
    def size(self) -> Any:
        """The dimension of the space: the number of entries that are not masked."""
        if self.mask is None:
            return sum(x.size for x in jax.tree.leaves(self.like))
        return sum(x.sum() for x in jax.tree.leaves(self.mask))


def operator(apply: Callable[[PyTree], PyTree], like: PyTree, *, sharded: bool = False) -> Operator:
    """Any symmetric ``apply`` on trees like ``like``; arrays it closes over are compiled in."""
    return Operator(_Closure(apply), (), like, sharded=sharded)


def preconditioned(operator: Operator, diagonal: PyTree) -> Operator:
    """``v -> P^-1/2 A P^-1/2 v``, P = diag(``diagonal``) > 0, a tree like the vectors.

    It has the eigenvalues of P^-1 A, which is not symmetric: Lanczos on that would be wrong. For
    the sharpness an adaptive optimizer sees, P is what the same step divides by. ValueError:
    another tree.
    """
    if jax.tree.structure(diagonal) != jax.tree.structure(operator.like):
        raise ValueError(
            f"the diagonal must be a tree like the vectors, {jax.tree.structure(operator.like)}, "
            f"got {jax.tree.structure(diagonal)}"
        )
    scale = jax.tree.map(lambda p, x: jax.lax.rsqrt(p.astype(x.dtype)), diagonal, operator.like)
    return operator.replace(product=_scaled, data=(operator, scale))  # pyright: ignore


def packed(operator: Operator) -> Operator:
    """The same map on vectors f[n]; where parameters are sharded, the map itself."""
    if operator.sharded:
        return operator
    mask = None if operator.mask is None else _flat(operator.mask)
    return Operator(_Packed(), operator, _flat(operator.like), mask)


def pack(operator: Operator, v: PyTree) -> PyTree:
    """A tree like the vectors as ``packed(operator)`` takes it."""
    return v if operator.sharded else _flat(v)


def unpack(operator: Operator, v: PyTree) -> PyTree:
    """A vector of ``packed(operator)`` as a tree."""
    return v if operator.sharded else ravel_pytree(operator.like)[1](v)


def asymmetry(operator: Operator, key: Key) -> Float[Array, ""]:
    """``|Av - A'v| / |Av|`` of a random v: below 1e-5 for what may be called symmetric in float32.

    Beyond, the map is no Hessian or computes in half precision, and what Lanczos makes of it is
    wrong without a sign. Cost: the product and its transpose, about four products.
    """
    inner = packed(operator)
    v = draw_packed(operator, key)
    product, transpose = jax.vjp(inner, v)
    apart = jax.tree.map(jnp.subtract, product, transpose(v)[0])
    return jnp.sqrt(vectors.dot(apart, apart) / vectors.dot(product, product))


# ---- random vectors -----------------------------------------------------------------------------


def random(operator: Operator, key: Key, draw: Draw = "normal") -> PyTree:
    """A vector of independent entries of mean 0 and variance 1: Gaussians or signs."""
    return unpack(operator, draw_packed(operator, key, draw))


def draw_packed(operator: Operator, key: Key, draw: Draw = "normal") -> PyTree:
    """The same as ``packed(operator)`` takes it."""
    if draw not in ("signs", "normal"):
        raise ValueError(f"draw must be 'signs' or 'normal', got {draw!r}")
    fn = jax.random.rademacher if draw == "signs" else jax.random.normal
    inner = packed(operator)
    leaves, tree = jax.tree.flatten(inner.like)
    keys = jax.random.split(key, len(leaves))
    drawn = [fn(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return masked(inner, jax.tree.unflatten(tree, drawn))


def masked(operator: Operator, v: PyTree) -> PyTree:
    """``v`` with zeros outside the mask."""
    return v if operator.mask is None else jax.tree.map(jnp.multiply, operator.mask, v)


# ---- products -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Closure:
    apply: Callable[[PyTree], PyTree]

    def __call__(self, data: tuple, v: PyTree) -> PyTree:
        return self.apply(v)


def _scaled(data: tuple[Operator, PyTree], v: PyTree) -> PyTree:
    inner, scale = data
    return jax.tree.map(jnp.multiply, scale, inner(jax.tree.map(jnp.multiply, scale, v)))


@dataclass(frozen=True)
class _Packed:
    def __call__(self, inner: Operator, v: jax.Array) -> jax.Array:
        return _flat(inner(unpack(inner, v)))


def _flat(tree: PyTree) -> jax.Array:
    return ravel_pytree(tree)[0]
