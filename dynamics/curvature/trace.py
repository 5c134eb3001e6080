"""Traces, norms and diagonals from products with random vectors, each with its standard error.

Every function runs ``num`` probes, ``probe_batch`` at a time: more at once are faster on an
accelerator and take as much more memory (on a CPU 8 to 32 times for 10). ``unroll`` writes them
out, for convolutions on a CPU; ``drive.mean`` calls one compiled probe from outside.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics import counts
from dynamics.curvature import vectors
from dynamics.curvature.operator import Draw, Operator, draw_packed, packed, unpack
from dynamics.types import Key, PyTree

Sample = Callable[[Operator, Key], PyTree]
"""One probe: ``sample(operator, key)``, a tree whose mean over keys is wanted."""


class Estimate(NamedTuple):
    """The mean over probes, and its standard error."""

    value: PyTree
    error: PyTree


def trace(
    operator: Operator,
    key: Key,
    num: int = 32,
    *,
    draw: Draw = "signs",
    probe_batch: int = 1,
    unroll: bool = False,
) -> Estimate:
    """``tr A``, the mean of v'Av.

    One probe's variance is 2 (||A||_F^2 - sum_i A_ii^2) with signs, 2 ||A||_F^2 with normal
    entries. Where the trace is small against ||A||_F (cross-entropy at initialisation) the error
    says so, and nothing does better; where few eigenvalues make it, see ``xtrace``. Cost: ``num``
    products.

    Reference: Hutchinson 1990, Communications in Statistics 19, 433-450.
    """
    sample = partial(trace_probe, draw=draw)
    return mean(sample, operator, key, num, probe_batch=probe_batch, unroll=unroll)


def frobenius_squared(
    operator: Operator,
    key: Key,
    num: int = 32,
    *,
    draw: Draw = "signs",
    probe_batch: int = 1,
    unroll: bool = False,
) -> Estimate:
    """``||A||_F^2 = tr A^2``, the mean of ||Av||^2.

    One probe's variance is that of the trace of A^2: 2 (||A^2||_F^2 - sum_i (A^2)_ii^2) with signs.
    Cost: ``num`` products.
    """
    sample = partial(square_probe, draw=draw)
    return mean(sample, operator, key, num, probe_batch=probe_batch, unroll=unroll)


def frobenius(
    operator: Operator,
    key: Key,
    num: int = 32,
    *,
    draw: Draw = "signs",
    probe_batch: int = 1,
    unroll: bool = False,
) -> Estimate:
    """``||A||_F``: the root of ``frobenius_squared``, its error to first order.

    Too small by about error^2 / (2 value).
    """
    more = {"probe_batch": probe_batch, "unroll": unroll}
    squared = frobenius_squared(operator, key, num, draw=draw, **more)
    norm = jnp.sqrt(squared.value)
    return Estimate(norm, squared.error / (2 * norm))


def diagonal(
    operator: Operator,
    key: Key,
    num: int = 100,
    *,
    draw: Draw = "signs",
    probe_batch: int = 1,
    unroll: bool = False,
) -> Estimate:
    """The diagonal of A, the mean of v * Av: value and error are trees like the vectors.

    Relative to the diagonal's norm the error is sqrt((||A||_F^2 - sum A_ii^2) / num) / ||diag A||
    with signs: a hundred probes may leave 60% (cross-entropy at initialisation). Cost: ``num``
    products, four vectors.

    Reference: Bekas, Kokiopoulou and Saad 2007, Applied Numerical Mathematics 57, 1214-1229.
    """
    sample = partial(diagonal_probe, draw=draw)
    return mean(sample, operator, key, num, probe_batch=probe_batch, unroll=unroll)


def xtrace(operator: Operator, key: Key, num: int = 32, *, unroll: bool = False) -> Estimate:
    """``tr A`` by leave-one-out projections: exact on the range of A's sketch, Hutchinson beyond.

    Better than ``trace`` at equal ``num`` where eigenvalues decay or all have one sign (trained
    networks, Gauss-Newton: half the error or less), no better or worse where the trace is small
    against the norm (cross-entropy at initialisation). The error comes from estimates that are not
    independent, and is too small by a quarter (decaying) to a third (nothing decays). Cost: ``num``
    products, num / 2 of them each time side by side in memory: num n numbers, in one piece; for
    small or unsharded parameters. ValueError: num odd or < 4, or num / 2 > n; a sharded operator.

    Reference: Epperly, Tropp and Webber 2024, arXiv 2301.07825, algorithm 2 and section 2.3.
    """
    if operator.sharded:
        raise ValueError("xtrace needs vectors in one piece, the operator is sharded: use trace")
    flat, size = packed(operator), num // 2
    if num % 2 or size < 2 or size > flat.like.size:
        raise ValueError(f"num must be even, in 4..{2 * flat.like.size}, got {num}")

    def normal(key: Key) -> jax.Array:
        v = draw_packed(operator, key)
        return v * jnp.sqrt(flat.size / vectors.dot(v, v))

    omega = jax.vmap(normal)(jax.random.split(key, size))  # rows of length sqrt(n)
    y = _each(flat, omega, unroll)
    q, r = jnp.linalg.qr(y.T)
    z = _each(flat, q.T, unroll).T
    with jax.default_matmul_precision("highest"):
        found = _leave_one_out(flat.size, omega.T, y.T, q, r, z)
    return Estimate(found.mean(), found.std(ddof=1) / jnp.sqrt(size))


def trace_probe(operator: Operator, key: Key, draw: Draw = "signs") -> Float[Array, ""]:
    """``v'Av`` of one random v."""
    v = draw_packed(operator, key, draw)
    return vectors.dot(v, packed(operator)(v))


def square_probe(operator: Operator, key: Key, draw: Draw = "signs") -> Float[Array, ""]:
    """``||Av||^2`` of one random v."""
    product = packed(operator)(draw_packed(operator, key, draw))
    return vectors.dot(product, product)


def diagonal_probe(operator: Operator, key: Key, draw: Draw = "signs") -> PyTree:
    """``v * Av`` of one random v."""
    v = draw_packed(operator, key, draw)
    return unpack(operator, jax.tree.map(jnp.multiply, v, packed(operator)(v)))


def mean(
    sample: Sample,
    operator: Operator,
    key: Key,
    num: int,
    *,
    probe_batch: int = 1,
    unroll: bool = False,
) -> Estimate:
    """The mean of ``sample(operator, key_i)`` over num keys split from ``key``, and its error.

    Nothing is kept of single probes (Welford's recursion). ValueError: num < 2, which has no error;
    a probe_batch that does not divide it.
    """
    counts.check(0, num=num, probe_batch=probe_batch)
    if num < 2:
        raise ValueError(f"num must be at least 2, one probe has no standard error, got {num}")
    if probe_batch < 1 or num % probe_batch:
        raise ValueError(f"probe_batch must divide num, {num}, got {probe_batch}")

    def together(keys: Key) -> PyTree:
        if probe_batch == 1:
            return jax.tree.map(lambda x: x[None], sample(operator, keys[0]))
        return jax.vmap(lambda key: sample(operator, key))(keys)

    keys = jax.random.split(key, (num // probe_batch, probe_batch))
    state = welford_start(sample, operator, key)
    if unroll:
        for i in range(num // probe_batch):
            state = welford(state, together(keys[i]))
    else:
        state = jax.lax.scan(lambda s, keys: (welford(s, together(keys)), None), state, keys)[0]
    return welford_end(state)


def of_samples(samples: PyTree) -> Estimate:
    """Mean and standard error over the leading axis of every leaf."""
    num = len(jax.tree.leaves(samples)[0])
    return Estimate(
        jax.tree.map(lambda x: x.mean(axis=0), samples),
        jax.tree.map(lambda x: x.std(axis=0, ddof=1) / num**0.5, samples),
    )


def welford_start(sample: Sample, operator: Operator, key: Key) -> tuple:
    """Count, mean and squared deviations of no sample."""
    shapes = jax.eval_shape(sample, operator, key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jnp.zeros(()), zeros, jax.tree.map(jnp.copy, zeros)


def welford(state: tuple, new: PyTree) -> tuple:
    """The same with a chunk of samples, [c, ...], taken in."""
    count, means, squares = state
    c = jax.tree.leaves(new)[0].shape[0]
    ours = jax.tree.map(lambda x: x.mean(axis=0), new)
    after = count + c

    def deviations(old: jax.Array, mean: jax.Array, x: jax.Array, chunk: jax.Array) -> jax.Array:
        inside = jnp.sum((x - chunk[None]) ** 2, axis=0)
        return old + inside + (chunk - mean) ** 2 * (count * c / after).astype(x.dtype)

    def moved(mean: jax.Array, chunk: jax.Array) -> jax.Array:
        return mean + (chunk - mean) * (c / after).astype(mean.dtype)

    squares = jax.tree.map(deviations, squares, means, new, ours)
    return after, jax.tree.map(moved, means, ours), squares


def welford_end(state: tuple) -> Estimate:
    """Mean and standard error."""
    count, means, squares = state
    factor = 1 / (count * (count - 1))
    return Estimate(means, jax.tree.map(lambda x: jnp.sqrt(x * factor.astype(x.dtype)), squares))


def _each(operator: Operator, rows: Float[Array, "m n"], unroll: bool) -> Float[Array, "m n"]:
    if unroll:
        return jnp.stack([operator(row) for row in rows])
    return jax.lax.map(operator, rows)


def _leave_one_out(
    n: Float[Array, ""] | int,
    omega: Float[Array, "n m"],
    y: Float[Array, "n m"],
    q: Float[Array, "n m"],
    r: Float[Array, "m m"],
    z: Float[Array, "n m"],
) -> Float[Array, "m"]:
    """The m estimates, each with the basis of the others.

    Without omega_i the range of the sketch is that of Q (I - s_i s_i') Q', s_i the i-th column of
    R^-T at length 1. So with x_i = (I - s_i s_i') Q' omega_i the estimate is tr H - s_i' H s_i +
    c_i (omega_i' y_i - 2 x_i' Z' omega_i + x_i' H x_i), H = Q'Z, and c_i makes a random vector of
    the rest of the space out of one of length sqrt(n).
    """
    m = r.shape[0]
    diagonal = jnp.abs(jnp.diagonal(r))
    least = jnp.finfo(r.dtype).eps * jnp.where(diagonal.max() > 0, diagonal.max(), 1)
    r = r + jnp.diag(jnp.where(diagonal < least, least, 0))  # a sketch of lower rank
    s = jax.scipy.linalg.solve_triangular(r, jnp.eye(m, dtype=r.dtype), trans="T")
    s = s / jnp.linalg.norm(s, axis=0, keepdims=True)
    h, w, t = q.T @ z, q.T @ omega, z.T @ omega
    x = w - s * jnp.sum(s * w, axis=0, keepdims=True)
    inside = jnp.trace(h) - jnp.sum(s * (h @ s), axis=0)
    beyond = jnp.sum(omega * y, axis=0) - 2 * jnp.sum(x * t, axis=0) + jnp.sum(x * (h @ x), axis=0)
    rest = jnp.sum(omega**2, axis=0) - jnp.sum(x**2, axis=0)
    free = n - m + 1
    return inside + jnp.where(free > 0, free / rest, 0) * beyond
