"""Norms and inner products of gradients in factored form.

A weight's gradient is A^T D: A [T, m] the rows that met the weight, D [T, n] the derivatives of the
results. The axis G counts pieces of the weight that work side by side: the groups of a convolution,
batched products. A is a list of blocks of columns, [G, T, m_j] each, or the positions of ones.

Inner products of rows square what they sum: where the T outer products of one example cancel to the
fraction e of their size, a length has a relative error of about 1e-7 / e^2; 1e-7 / e if the
gradient is made.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dynamics.ghost.factors import Factors, Part
from dynamics.ghost.uses import Convolution, Lookup, Product

EXACT = jax.lax.Precision.HIGHEST
AT_ONCE = 16  # examples whose patches are in memory (measured: 1.3 times faster than 64 on a CPU)


def norms(found: Factors) -> Float[Array, "b"]:
    """``||g_i||_2`` over all leaves, [B]; squares neither overflow nor underflow.

    Cost: for each weight the smaller of T^2 (m + n) and T m n multiply-adds an example.
    """
    pieces = [jax.vmap(_length)(g) for g in found.gradients.values()]
    pieces += [_lengths(parts) for parts in found.parts.values()]
    each = jnp.stack(pieces, axis=1)
    largest = each.max(axis=1, keepdims=True)
    unit = jnp.where(largest > 0, largest, 1)
    return unit[:, 0] * jnp.sqrt(jnp.sum((each / unit) ** 2, axis=1))


def _lengths(parts: tuple[Part, ...]) -> jax.Array:
    """Patches of convolutions are large: those of a few examples at a time stay in the cache."""
    large = any(isinstance(part.kind, Convolution) for part in parts)
    if large and len(parts[0].d) > AT_ONCE:
        return jax.lax.map(_length_of_parts, parts, batch_size=AT_ONCE)
    return jax.vmap(_length_of_parts)(parts)


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


@struct.dataclass
class _OneHot:
    """Rows of zeros but for a one at ``index`` i32[T]; ``size`` columns."""

    index: jax.Array
    size: int = struct.field(pytree_node=False)


Side = tuple[jax.Array, ...] | _OneHot  # blocks of columns [G, T, m_j]


class _Rows(NamedTuple):
    """A and D of one use."""

    a: Side
    d: Side


def _length(gradient: jax.Array) -> jax.Array:
    flat = gradient.reshape(-1).astype(jnp.float32)
    unit = _unit(flat)
    return unit * jnp.sqrt(jnp.sum((flat / unit) ** 2))


def _unit(x: jax.Array) -> jax.Array:
    """The largest magnitude, or 1 if it is 0, not finite or of positions: to divide by."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.float32(1)
    largest = jnp.abs(x).max(initial=0).astype(jnp.float32)
    return jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)


def _length_of_parts(parts: tuple[Part, ...]) -> jax.Array:
    units = [(_unit(part.a), _unit(part.d)) for part in parts]
    each = jnp.stack([a * d for a, d in units])
    whole = _unit(each)
    rows = []
    for part, (a, d), share in zip(parts, units, each / whole, strict=True):
        scaled = part.a if isinstance(part.kind, Lookup) else part.a.astype(jnp.float32) / a
        rows.append(_rows(scaled, part.d / d * share, part))
    rows = _joined(rows)
    t, entries, width = _sizes(rows)
    squared = jnp.sum(_made(rows) ** 2) if entries < t * width else _meet_all(rows, rows)
    return whole * jnp.sqrt(jnp.maximum(squared, 0))


def _sizes(rows: list[_Rows]) -> tuple[int, int, int]:
    """T of all uses, m n of the gradient, and m + n, where a one-hot row is 1 wide."""

    def widths(side: Side) -> tuple[int, int, int]:
        if isinstance(side, _OneHot):
            return side.index.shape[-1], side.size, 1
        m = sum(block.shape[-1] for block in side)
        return side[0].shape[-2], m, m

    found = [(widths(r.a), widths(r.d)) for r in rows]
    (_, m, _), (_, n, _) = found[0]
    return sum(a[0] for a, _ in found), m * n, max(a[2] + d[2] for a, d in found)


def _made(rows: list[_Rows]) -> jax.Array:
    """The gradient, [G, m, n]: the sum over its uses."""
    return sum((_outer(r.a, r.d) for r in rows), jnp.float32(0))


def _outer(a: Side, d: Side) -> jax.Array:
    """A^T D."""
    if isinstance(d, _OneHot):
        return _outer(d, a).swapaxes(1, 2)
    whole = jnp.concatenate(d, axis=-1)
    if isinstance(a, _OneHot):
        return jnp.zeros((1, a.size, whole.shape[-1])).at[0, a.index].add(whole[0])
    made = [jnp.einsum("gtm,gtn->gmn", block, whole, precision=EXACT) for block in a]
    return jnp.concatenate(made, axis=1)


def _meet_all(left: list[_Rows], right: list[_Rows]) -> jax.Array:
    """The inner product of two gradients, each the sum over its uses."""
    pairs = itertools.product(left, right)
    return sum((jnp.sum(_gram(u.a, v.a) * _gram(u.d, v.d)) for u, v in pairs), jnp.float32(0))


def _gram(left: Side, right: Side) -> jax.Array:
    """Inner products of rows [G, T, S]."""
    if isinstance(left, _OneHot) and isinstance(right, _OneHot):
        return (left.index[:, None] == right.index[None, :]).astype(jnp.float32)[None]
    if isinstance(left, _OneHot):
        return _gram(right, left).swapaxes(1, 2)
    if isinstance(right, _OneHot):
        return jnp.take(jnp.concatenate(left, axis=-1), right.index, axis=-1)
    pairs = zip(left, right, strict=True)
    each = [jnp.einsum("gtm,gsm->gts", a, b, precision=EXACT) for a, b in pairs]
    return sum(each[1:], each[0])


def _joined(rows: list[_Rows]) -> list[_Rows]:
    """Uses of one kind as one, with all their rows."""
    kinds: dict[Any, list[_Rows]] = {}
    for r in rows:
        kinds.setdefault((isinstance(r.a, _OneHot), isinstance(r.d, _OneHot)), []).append(r)

    def all_rows(*xs: jax.Array) -> jax.Array:
        return jnp.concatenate(xs, axis=max(xs[0].ndim - 2, 0))

    return [jax.tree.map(all_rows, *same) for same in kinds.values()]


def _rows(a: jax.Array, d: jax.Array, part: Part) -> _Rows:
    """The rows of one use by one example."""
    if part.loops:
        apart, *inner = part.loops
        of_round = dataclasses.replace(part, loops=tuple(inner))
        each = jax.vmap(lambda a, d: _rows(a, d, of_round))(a, d)
        return jax.tree.map(functools.partial(_of_all_rounds, apart), each)
    kind = part.kind
    if isinstance(kind, Lookup):
        at = a[..., kind.column].reshape(-1).astype(jnp.int32)
        inside = jnp.clip(at, 0, kind.rows - 1)
        d = d.reshape(1, len(at), math.prod(d.shape) // max(len(at), 1))
        if not kind.clipped:
            d = jnp.where((at == inside)[None, :, None], d, 0)
        found = _Rows(_OneHot(inside, kind.rows), (d,))
    elif isinstance(kind, Product):
        found = _product(a, d, kind)
    else:
        found = _patches(a, d, kind)
    return _Rows(found.d, found.a) if part.swapped else found


def _of_all_rounds(apart: bool, x: jax.Array) -> jax.Array:
    """[L, G, T, m] as rows of the same pieces of the weight, or of pieces apart; [L, T] as rows."""
    if x.ndim == 2:
        return x.reshape(-1)
    length, g, t, m = x.shape
    if apart:
        return x.reshape(length * g, t, m)
    return x.swapaxes(0, 1).reshape(g, length * t, m)


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
    t, entries, width = _sizes(one)
    if (b + c) * t * entries + b * c * entries < b * c * t**2 * width:
        return _all_pairs(*(jax.vmap(_made)(r).reshape(k, -1) for r, k in ((one, b), (other, c))))
    return jax.vmap(lambda u: jax.vmap(lambda v: _meet_all(u, v))(other))(one)


def _all_pairs(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right.T, precision=EXACT)
