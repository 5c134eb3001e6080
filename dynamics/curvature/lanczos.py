"""Lanczos: eigenvalues at the ends of a spectrum, with bounds on their errors.

After k products T = Q'AQ is tridiagonal, its eigenvalues (the Ritz values) lie within the spectrum,
and each is within its residual, known for free, of an eigenvalue. The basis has leaves [k, ...],
which on a CPU is twice as fast as [..., k].

Reference: Golub and Van Loan 2013, Matrix Computations, sections 10.1 and 10.3; Parlett 1998, The
Symmetric Eigenvalue Problem, chapter 13.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dynamics import counts
from dynamics.curvature import vectors
from dynamics.curvature.operator import Operator, draw_packed, masked, pack, packed, random, unpack
from dynamics.types import Key, Leaf, PyTree

TWICE = 30  # rows up to which a basis is projected out twice
SEGMENTS = 4  # of a basis, of which those with rows are read


@struct.dataclass
class Krylov:
    """Where Lanczos stands: ``step`` of at most k products are done."""

    alpha: Leaf  # f[k]: the diagonal of T
    beta: Leaf  # f[k]: beside it; the last belongs to the residual; 0 where it broke down
    block: Leaf  # i[k]: restarts after a breakdown before this row; -1: no such row
    basis: PyTree | None  # [k, ...]: orthonormal rows; None: not kept
    before: PyTree  # the last row
    here: PyTree  # the row the next product is made with
    alive: Leaf  # b[]: False: the rows span all there is, or it broke down without a basis
    step: Leaf  # i[]
    key: Leaf  # of restarts


class Ritz(NamedTuple):
    """Eigenvalues of T, the largest first; NaN where there are fewer than k."""

    values: Float[Array, "k"]
    residuals: Float[Array, "k"]  # ||A x - value x||: an eigenvalue is so near
    rows: Float[Array, "k k"]  # [j, i]: what row i of the basis has in x_j
    count: Int[Array, ""]


class Pairs(NamedTuple):
    """Eigenvalues, how far from one each may be, and their vectors, of length 1."""

    values: Float[Array, "n"]
    residuals: Float[Array, "n"]
    vectors: PyTree  # [n, ...]


class Sharpness(NamedTuple):
    """Both ends of a spectrum."""

    value: Float[Array, ""]  # the largest algebraic eigenvalue
    residual: Float[Array, ""]
    vector: PyTree  # its eigenvector, to start the next from
    smallest: Float[Array, ""]
    smallest_residual: Float[Array, ""]


def sharpness(
    operator: Operator,
    key: Key,
    *,
    k: int = 20,
    warm: PyTree | None = None,
    unroll: bool = False,
) -> Sharpness:
    """The largest algebraic eigenvalue, and the smallest, by k products.

    Both come from inside the spectrum: value <= lambda_max, up to rounding, and some eigenvalue is
    within the residual (the error is near residual^2 / gap once it is the largest). Where the
    residual is not small, k was too few; that the value stopped changing says nothing. From a
    random start k = 20 gives 1e-3 in nearly all cases; from ``warm``, the vector found a few steps
    of training ago, k = 6 to 8 does. It is the largest eigenvalue, not the largest magnitude.

    Cost: k products, k + 1 vectors of memory. ``unroll`` writes the loop out (convolutions on a
    CPU); ``converge`` drives it from outside.
    """
    again = jax.random.fold_in(key, 1)
    krylov = lanczos(operator, start(operator, key, warm), k, key=again, unroll=unroll)
    top, bottom = eigenpairs(operator, krylov, 1), _ends(ritz(krylov), 1, smallest=True)
    vector = jax.tree.map(lambda x: x[0], top.vectors)
    return Sharpness(top.values[0], top.residuals[0], vector, bottom[0][0], bottom[1][0])


def start(operator: Operator, key: Key, warm: PyTree | None = None) -> PyTree:
    """A random vector, or ``warm`` perturbed."""
    key = jax.random.fold_in(key, 0)
    return random(operator, key) if warm is None else perturbed(operator, key, warm)


def perturbed(operator: Operator, key: Key, vector: PyTree, noise: float = 1e-2) -> PyTree:
    """``vector`` with noise of ``noise`` times its length.

    From an exact eigenvector Lanczos could not leave it, when another one has become the largest.
    """
    v = pack(operator, vector)
    length = jnp.sqrt(vectors.dot(v, v) / operator.size)
    v = vectors.minus(v, -noise * length, draw_packed(operator, key))
    return unpack(operator, v)


def lanczos(
    operator: Operator,
    v: PyTree,
    k: int,
    *,
    key: Key | None = None,
    reorthogonalise: bool = True,
    unroll: bool = False,
) -> Krylov:
    """T and its basis after k steps from v.

    With ``reorthogonalise`` every new row is made orthogonal to all before; without, the basis is
    not kept, copies of eigenvalues that have converged appear, and only ``quadrature`` and the
    extreme values are to be trusted. Where the rows span an invariant space (beta <= 50 eps ||T||)
    it starts again from a random vector orthogonal to them, or, without a basis or when nothing is
    left, ends: ``block`` says so. Cost: k products, 2.5 k^2 n flops to reorthogonalise, or 5.
    """
    state = begin(operator, v, k, key=key, reorthogonalise=reorthogonalise)
    if unroll:
        for _ in range(k):
            state = extend(operator, state)
        return state
    return jax.lax.fori_loop(0, k, lambda _, state: extend(operator, state), state)


def begin(
    operator: Operator,
    v: PyTree,
    k: int,
    *,
    key: Key | None = None,
    reorthogonalise: bool = True,
) -> Krylov:
    """Room for k steps, and none done. ValueError: k < 1, or a v that is not like the vectors.

    ``extend`` does one: it may be compiled by itself and called from a loop outside.
    """
    counts.check(k=k)
    shapes = [jax.tree.map(lambda x: x.shape, tree) for tree in (v, operator.like)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"v must be like the vectors, {shapes[1]}, got {shapes[0]}")
    inner = packed(operator)
    v, like = jax.tree.map(lambda x, y: x.astype(y.dtype), v, operator.like), inner.like
    here = masked(inner, pack(operator, v))
    length = jnp.sqrt(vectors.dot(here, here))
    alive = ~(length <= 0)
    here = vectors.scaled(jnp.where(alive, 1 / length, 0), here)
    empty = jnp.zeros(k, length.dtype)
    basis = jax.tree.map(lambda x: jnp.zeros((k, *x.shape), x.dtype), like)
    return Krylov(
        alpha=empty,
        beta=empty,
        block=jnp.full(k, -1, jnp.int32),
        basis=basis if reorthogonalise else None,
        before=jax.tree.map(jnp.zeros_like, here),
        here=here,
        alive=alive,
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(0) if key is None else key,
    )


def extend(operator: Operator, state: Krylov) -> Krylov:
    """One more step: one product."""
    j, here = state.step, state.here
    beta_before = jnp.where(j > 0, state.beta[j - 1], 0)
    u = packed(operator)(here)
    alpha = vectors.dot(here, u)
    u = vectors.minus(vectors.minus(u, alpha, here), beta_before, state.before)
    if state.basis is None:
        basis, u = None, _local(_local(u, here, state.before), here, state.before)
    else:
        basis = jax.tree.map(lambda q, x: q.at[j].set(x), state.basis, here)
        u = _project_out(u, basis, j)
    length = jnp.sqrt(vectors.dot(u, u))
    scale = jnp.max(jnp.abs(state.alpha) + state.beta).clip(jnp.abs(alpha) + beta_before)
    broken = length <= 50 * jnp.finfo(length.dtype).eps * scale
    after = vectors.scaled(jnp.where(broken, 0, 1 / length), u)
    if basis is None:  # nothing is known to be orthogonal to
        alive = jnp.logical_and(state.alive, ~broken)
    else:
        fresh, key = jnp.logical_and(broken, state.alive), jax.random.fold_in(state.key, j)
        after, alive = jax.lax.cond(
            fresh, lambda: _restart(operator, basis, j, key), lambda: (after, state.alive)
        )
    block = jnp.where(j > 0, state.block[j - 1] + (beta_before <= 0).astype(jnp.int32), 0)
    return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        alpha=state.alpha.at[j].set(alpha),
        beta=state.beta.at[j].set(jnp.where(broken, 0, length)),
        block=state.block.at[j].set(jnp.where(state.alive, block, -1)),
        basis=basis,
        before=here,
        here=after,
        alive=alive,
        step=j + 1,
    )


def _local(u: PyTree, here: PyTree, before: PyTree) -> PyTree:
    """Orthogonal to the last two rows, however short."""
    u = vectors.minus(u, vectors.dot(here, u), here)
    return vectors.minus(u, vectors.dot(before, u), before)


def _project_out(u: PyTree, basis: PyTree, j: jax.Array) -> PyTree:
    """``u - Q'Q u`` of the rows up to j; those after are zero.

    Twice for few rows. For many, where reading the basis takes longer than the products, once: u is
    orthogonal to it but for rounding, by the recurrence, and 2e-5 is left of that in float32; up to
    the root of eps (3e-4) T is as accurate as with an exact basis (Simon 1984, Linear Algebra and
    its Applications 61, 101-131). The branches save what is empty, and keep XLA (jax 0.10, CPU)
    from copying the basis three times a step when its leaves are matrices.
    """
    k = jax.tree.leaves(basis)[0].shape[0]
    passes = 2 if k <= TWICE else 1

    def of_first(rows: int, u: PyTree, basis: PyTree) -> PyTree:
        basis = jax.tree.map(lambda q: q[:rows], basis)
        for _ in range(passes):
            taken = vectors.combination(vectors.coefficients(basis, u), basis)
            u = jax.tree.map(jnp.subtract, u, taken)
        return u

    rows = [-(-k * i // SEGMENTS) for i in range(1, SEGMENTS + 1)]
    segment = jnp.sum(j >= jnp.array(rows, j.dtype), dtype=jnp.int32)
    return jax.lax.switch(segment, [partial(of_first, r) for r in rows], u, basis)


def _restart(operator: Operator, basis: PyTree, j: jax.Array, key: Key) -> tuple[PyTree, jax.Array]:
    """A random row orthogonal to the basis; zero, and False, if there is none."""
    v = draw_packed(operator, key)
    v = vectors.scaled(1 / jnp.sqrt(vectors.dot(v, v)), v)
    v = _project_out(v, basis, j)
    length = jnp.sqrt(vectors.dot(v, v))
    there = length > 100 * jnp.finfo(length.dtype).eps
    return vectors.scaled(jnp.where(there, 1 / length, 0), v), there


# ---- what T says --------------------------------------------------------------------------------


def ritz(state: Krylov) -> Ritz:
    """Eigenvalues of T, with bounds: ``|value - lambda| <= residual = beta_k |s_k|``."""
    there = state.block >= 0
    count = there.sum()
    beta = jnp.where(there, state.beta, 0)
    alpha = jnp.where(there, state.alpha, 0)
    beside = jnp.where(there[1:], beta[:-1], 0)
    width = jnp.max(jnp.abs(alpha)) + 2 * jnp.max(beta)
    nowhere = jnp.where(width > 0, -2 * width, -1)  # rows that are not there sort last
    t = jnp.diag(jnp.where(there, alpha, nowhere)) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(t)
    values, rows = values[::-1], vectors.T[::-1]
    last = jnp.maximum(count - 1, 0)
    residuals = beta[last] * jnp.abs(rows[:, last])
    real = jnp.arange(len(values)) < count
    return Ritz(jnp.where(real, values, jnp.nan), jnp.where(real, residuals, jnp.nan), rows, count)


def eigenpairs(operator: Operator, state: Krylov, num: int = 1, *, smallest: bool = False) -> Pairs:
    """The ``num`` largest (or smallest) Ritz values, that one first, with residuals and vectors.

    Of an eigenvalue with several vectors, one is found before a breakdown. ValueError: more than
    there were steps; no basis.
    """
    k = len(state.alpha)
    if not 1 <= num <= k:
        raise ValueError(f"num must be in 1..{k}, the steps, got {num}")
    if state.basis is None:
        raise ValueError("vectors need the basis: lanczos(..., reorthogonalise=True)")
    values, residuals, rows = _ends(ritz(state), num, smallest=smallest)
    found = jax.tree.map(lambda q: jnp.tensordot(rows, q, 1, precision="highest"), state.basis)
    return Pairs(values, residuals, jax.vmap(partial(unpack, operator))(found))


def _ends(found: Ritz, num: int, *, smallest: bool) -> tuple[Any, Any, Any]:
    """Values, residuals and rows of one end."""
    order = jnp.arange(num)
    if smallest:
        order = jnp.where(found.count > order, found.count - 1 - order, order)
    return found.values[order], found.residuals[order], found.rows[order]
