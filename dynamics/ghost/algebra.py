"""Norms and inner products of gradients in factored form.

A weight's gradient is A^T D: A [T, m] the rows that met the weight, D [T, n] the derivatives of the
results. The axis G counts pieces of the weight that work side by side: the groups of a convolution,
batched products. A is a list of blocks of columns, [G, T, m_j] each, or the positions of ones.
"""

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.ghost.factors import Factors, Part
from dynamics.ghost.uses import Convolution, Lookup, Product

EXACT = jax.lax.Precision.HIGHEST


def norms(found: Factors) -> Float[Array, "b"]:
    """``||g_i||_2`` over all leaves, [B]; squares neither overflow nor underflow.

    Cost: for each weight the smaller of T^2 (m + n) and T m n multiply-adds an example.
    """
    pieces = [jax.vmap(_length)(g) for g in found.gradients.values()]
    pieces += [jax.vmap(_length_of_parts)(parts) for parts in found.parts.values()]
    each = jnp.stack(pieces, axis=1)
    largest = each.max(axis=1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)
    return unit[:, 0] * jnp.sqrt(jnp.sum((each / unit) ** 2, axis=1))


def products(one: Factors, other: Factors) -> Float[Array, "b c"]:
    """``<g_i, h_j>`` of all gradients of ``one`` with all of ``other``, of the same function.

    Cost: for each weight the smaller of B C T^2 (m + n) and (B + C) T m n + B C m n, where the
    second also needs the gradients' memory.
    """
    total = jnp.zeros((), jnp.float32)
    for name, left in one.gradients.items():
        flat = (g.reshape(len(g), -1).astype(jnp.float32) for g in (left, other.gradients[name]))
        total = total + _all_pairs(*flat)
    for name, left in one.parts.items():
        total = total + _products_of_parts(left, other.parts[name])
    return total


# One example


Side = tuple[jax.Array, ...] | jax.Array  # blocks [G, T, m_j], or the positions i32[T] of ones


class _Rows(NamedTuple):
    """A and D of one use."""

    a: Side
    d: Side


def _length(gradient: jax.Array) -> jax.Array:
    flat = gradient.reshape(-1).astype(jnp.float32)
    unit = _unit(flat)
    return unit * jnp.sqrt(jnp.sum((flat / unit) ** 2))


def _unit(x: jax.Array) -> jax.Array:
    """The largest magnitude, or 1: to divide by before squaring."""
    largest = jnp.abs(x).max(initial=0)
    return jnp.where(largest > 0, largest, 1)


def _length_of_parts(parts: tuple[Part, ...]) -> jax.Array:
    unit = jnp.stack([_unit(part.d) for part in parts]).max()
    rows = _joined([_rows(part.a, part.d / unit, part) for part in parts])
    t, m, n = _sizes(rows)
    if _dense(rows) and m * n < t * (m + n):
        squared = jnp.sum(_made(rows[0]) ** 2)
    else:
        squared = _meet_all(rows, rows)
    return unit * jnp.sqrt(jnp.maximum(squared, 0))


def _dense(rows: list[_Rows]) -> bool:
    """Whether there are one A and one D, both of numbers."""
    return len(rows) == 1 and all(isinstance(side, tuple) for side in rows[0])


def _sizes(rows: list[_Rows]) -> tuple[int, int, int]:
    """T of all uses, and the widths of A and D, where a one-hot row is 1 wide."""

    def width(side: Side) -> int:
        return sum(block.shape[-1] for block in side) if isinstance(side, tuple) else 1

    t = sum(r.d[0].shape[-2] if isinstance(r.d, tuple) else r.d.shape[-1] for r in rows)
    return t, max(width(r.a) for r in rows), max(width(r.d) for r in rows)


def _made(rows: _Rows) -> jax.Array:
    """The gradient, [G, m, n]."""
    (d,) = rows.d if len(rows.d) == 1 else (jnp.concatenate(rows.d, axis=-1),)
    made = [jnp.einsum("gtm,gtn->gmn", a, d, precision=EXACT) for a in rows.a]
    return jnp.concatenate(made, axis=1)


def _meet_all(left: list[_Rows], right: list[_Rows]) -> jax.Array:
    """The inner product of two gradients, each the sum over its uses."""
    return sum((_meet(u, v) for u in left for v in right), jnp.float32(0))


def _meet(u: _Rows, v: _Rows) -> jax.Array:
    """``<A_u^T D_u, A_v^T D_v>``."""
    return jnp.sum(_gram(u.a, v.a) * _gram(u.d, v.d))


def _gram(left: Side, right: Side) -> jax.Array:
    """Inner products of rows [G, T, S]; positions stand for one-hot rows."""
    if not isinstance(left, tuple) and not isinstance(right, tuple):
        return (left[:, None] == right[None, :]).astype(jnp.float32)[None]
    if not isinstance(left, tuple):
        return _gram(right, left).swapaxes(1, 2)
    if not isinstance(right, tuple):
        return jnp.take(jnp.concatenate(left, axis=-1), right, axis=-1, mode="fill", fill_value=0)
    pairs = zip(left, right, strict=True)
    each = [jnp.einsum("gtm,gsm->gts", a, b, precision=EXACT) for a, b in pairs]
    return sum(each[1:], each[0])


def _joined(rows: list[_Rows]) -> list[_Rows]:
    """Uses that are all dense as one, with all their rows."""
    if len(rows) == 1 or not all(_dense([r]) and len(r.a) == len(r.d) == 1 for r in rows):
        return rows
    a, d = (
        jnp.concatenate([side[0] for side in sides], axis=1) for sides in zip(*rows, strict=True)
    )
    return [_Rows((a,), (d,))]


def _rows(a: jax.Array, d: jax.Array, part: Part) -> _Rows:
    """The rows of one use by one example."""
    kind = part.kind
    if isinstance(kind, Lookup):
        at = a.reshape(-1)
        at = jnp.clip(at, 0, kind.rows - 1) if kind.clipped else at
        found = _Rows(at, (d.reshape(1, len(at), -1),))
    elif isinstance(kind, Product):
        found = _product(a, d, kind)
    else:
        found = _patches(a, d, kind)
    return _Rows(found.d, found.a) if part.swapped else found


def _product(a: jax.Array, d: jax.Array, kind: Product) -> _Rows:
    """[G, T, m] and [G, T, n] of a dot_general, columns in the order of the weight's axes."""
    rows, groups, left = kind.rows[1], kind.groups[1], kind.left[1]
    g, t, m = (math.prod(a.shape[i] for i in axes) for axes in (groups, left, rows))
    a = a.transpose(*groups, *left, *rows).reshape(g, t, m).astype(jnp.float32)
    if kind.weight_first:  # results are [groups, columns of the weight, positions]
        i, j = len(groups), len(groups) + len(kind.left[0])
        d = d.transpose(*range(i), *range(j, d.ndim), *range(i, j))
    return _Rows((a,), (d.reshape(g, t, -1),))


def _patches(x: jax.Array, d: jax.Array, kind: Convolution) -> _Rows:
    """The inputs at each place of the kernel [G, T, C / G], and [G, T, F / G], of a convolution."""
    x = x.transpose(kind.lhs[0], *kind.lhs[2:], kind.lhs[1]).astype(jnp.float32)
    d = d.transpose(kind.out[0], *kind.out[2:], kind.out[1])
    edges = zip(kind.padding, kind.input_dilation, strict=True)
    edges = [(low, high, apart - 1) for (low, high), apart in edges]
    x = jax.lax.pad(x, jnp.float32(0), [(0, 0, 0), *edges, (0, 0, 0)])
    n, *out, _ = d.shape
    t = n * math.prod(out)

    def grouped(v: jax.Array) -> jax.Array:
        return v.reshape(t, kind.groups, -1).transpose(1, 0, 2)

    def at(place: tuple[int, ...]) -> jax.Array:
        start = [p * apart for p, apart in zip(place, kind.kernel_dilation, strict=True)]
        steps = zip(start, out, kind.strides, strict=True)
        stop = [s + (count - 1) * stride + 1 for s, count, stride in steps]
        return jax.lax.slice(x, (0, *start, 0), (n, *stop, x.shape[-1]), (1, *kind.strides, 1))

    places = itertools.product(*map(range, kind.kernel))
    return _Rows(tuple(grouped(at(place)) for place in places), (grouped(d),))


# Many examples


def _products_of_parts(left: tuple[Part, ...], right: tuple[Part, ...]) -> jax.Array:
    def rows(parts: tuple[Part, ...]) -> list[_Rows]:
        return _joined([_rows(part.a, part.d, part) for part in parts])

    one, other = jax.vmap(rows)(left), jax.vmap(rows)(right)
    b, c = len(left[0].d), len(right[0].d)
    t, m, n = _sizes(one)
    if _dense(one) and (b + c) * t * m * n + b * c * m * n < b * c * t**2 * (m + n):
        flat = (jax.vmap(_made)(r[0]).reshape(k, -1) for r, k in ((one, b), (other, c)))
        return _all_pairs(*flat)
    return jax.vmap(lambda u: jax.vmap(lambda v: _meet_all(u, v))(other))(one)


def _all_pairs(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right.T, precision=EXACT)
