"""Lanczos and probes driven from the host: one compiled product, called as often as it takes.

For what must not sit in a compiled loop (convolutions on a CPU run 40 times slower there), and for
going on until a residual is small. Operators of equal products share their compiled programs.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from dynamics import counts
from dynamics.curvature.density import Density, quadrature
from dynamics.curvature.lanczos import Krylov, Pairs, begin, eigenpairs, extend, start
from dynamics.curvature.operator import Draw, Operator, random
from dynamics.curvature.trace import Estimate, Sample, welford, welford_end, welford_start
from dynamics.types import Key, PyTree

log = logging.getLogger(__name__)


def _started(operator: Operator, key: Key, warm: PyTree | None, most: int) -> Krylov:
    return begin(operator, start(operator, key, warm), most, key=jax.random.fold_in(key, 1))


def _taken_in(sample: Sample, operator: Operator, key: Key, state: tuple) -> tuple:
    return welford(state, jax.tree.map(lambda x: x[None], sample(operator, key)))


_start = jax.jit(_started, static_argnames="most")
_begin = jax.jit(begin, static_argnames=("k", "reorthogonalise"))
_extend = jax.jit(extend, donate_argnums=1)
_pairs = jax.jit(eigenpairs, static_argnames=("num", "smallest"))
_random = jax.jit(random, static_argnames="draw")
_quadrature = jax.jit(quadrature)
_take_in = jax.jit(_taken_in, static_argnums=0, donate_argnums=3)


def converge(
    operator: Operator,
    key: Key,
    *,
    num: int = 1,
    smallest: bool = False,
    tolerance: float = 1e-3,
    least: int = 6,
    most: int = 60,
    warm: PyTree | None = None,
) -> Pairs:
    """The ``num`` largest (or smallest) eigenpairs, each with residual <= tolerance |value|.

    It stops on the residual, or where that is rounding; never on the change of a value, which stops
    too early (values up to 8% too small). ``least`` products are made, so that from ``warm`` it
    cannot stop at a vector that is no longer the first. After ``most`` it logs a warning and
    returns what there is; the residuals say what that is worth. Cost: the products it takes, and
    ``most`` vectors of memory.
    """
    counts.check(None, num=num, least=least, most=most)
    if not 1 <= num <= most:
        raise ValueError(f"num must be in 1..{most}, the most products, got {num}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    state = _start(operator, key, warm, most=most)
    for done in range(1, most + 1):
        state = _extend(operator, state)
        if done >= max(num, min(least, most)) and _ended(state, num, smallest, tolerance):
            break
    else:
        log.warning("a residual is above %g of its value after %d products", tolerance, most)
    return _pairs(operator, state, num=num, smallest=smallest)


def lanczos(operator: Operator, v: PyTree, k: int, *, reorthogonalise: bool = True) -> Krylov:
    """``curvature.lanczos``, driven from here."""
    state = _begin(operator, v, k, reorthogonalise=reorthogonalise)
    for _ in range(k):
        state = _extend(operator, state)
    return state


def density(
    operator: Operator,
    key: Key,
    *,
    num: int = 10,
    k: int = 80,
    draw: Draw = "signs",
    reorthogonalise: bool = False,
) -> Density:
    """``curvature.density``, driven from here."""
    found = []
    for one in jax.random.split(key, num):
        v = _random(operator, one, draw=draw)
        state = lanczos(operator, v, k, reorthogonalise=reorthogonalise)
        found.append(_quadrature(state))
    nodes, weights = (jnp.stack(x) for x in zip(*found, strict=True))
    return Density(nodes, weights, jnp.asarray(operator.size, nodes.dtype))


def mean(sample: Sample, operator: Operator, key: Key, num: int) -> Estimate:
    """``curvature.mean``, driven from here: of ``trace_probe``, ``square_probe``, ...

    An equal ``sample`` is compiled once. ValueError: num < 2.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, one probe has no standard error, got {num}")
    state = welford_start(sample, operator, key)
    for one in jax.random.split(key, num):
        state = _take_in(sample, operator, one, state)
    return welford_end(state)


def _ended(state: Krylov, num: int, smallest: bool, tolerance: float) -> bool:
    """Whether the residuals are small, or nothing is left to find; the host waits for one step."""
    if not bool(state.alive):
        return True
    block = np.asarray(state.block)
    rows = int((block >= 0).sum())
    alpha, beta = np.asarray(state.alpha)[:rows], np.asarray(state.beta)[:rows]
    values, vectors = np.linalg.eigh(
        np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
    )
    which = np.arange(num) if smallest else rows - 1 - np.arange(num)
    residuals = beta[-1] * np.abs(vectors[-1, which])
    rounding = 50 * np.finfo(alpha.dtype).eps * np.abs(values).max()
    return bool(np.all(residuals <= np.maximum(tolerance * np.abs(values[which]), rounding)))
