"""The density of a spectrum by stochastic Lanczos quadrature.

Reference: Ubaru, Chen and Saad 2017, SIAM J. Matrix Anal. Appl. 38, 1075-1099; for networks
Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from dynamics import counts
from dynamics.curvature.lanczos import Krylov, lanczos, ritz
from dynamics.curvature.operator import Draw, Operator, random
from dynamics.curvature.trace import Estimate, of_samples
from dynamics.types import Key

RESOLVED = 4096  # roundings: the narrowest spectrum that is told from one point


@struct.dataclass
class Density:
    """Point masses: of each probe k of them, whose weights have the sum 1."""

    nodes: Float[Array, "*probes k"]
    weights: Float[Array, "*probes k"]
    size: Float[Array, ""]  # the dimension n


def density(
    operator: Operator,
    key: Key,
    *,
    num: int = 10,
    k: int = 80,
    draw: Draw = "signs",
    probe_batch: int = 1,
    reorthogonalise: bool = False,
    unroll: bool = False,
) -> Density:
    """The density of the eigenvalues of A, 1/n sum_i delta(t - lambda_i), from num random starts.

    k resolves it (and finds the edges), num lowers the error of what is between: one start leaves
    the trace off by 5 to 80%. For its start v a probe is exact in v' A^m v for m <= 2 k - 1.
    Without reorthogonalising, five times cheaper for large k, moments and shape are the same, but
    eigenvalues that stand out appear more than once, with the weight of one between them: count
    them only with it. Cost: num k products; three vectors, or k of them.
    """
    counts.check(num=num)

    def probe(key: Key) -> tuple[jax.Array, jax.Array]:
        start = random(operator, jax.random.fold_in(key, 0), draw)
        more = {"reorthogonalise": reorthogonalise, "unroll": unroll}
        return quadrature(lanczos(operator, start, k, key=jax.random.fold_in(key, 1), **more))

    keys = jax.random.split(key, num)
    if unroll:
        found = [probe(key) for key in keys]
        nodes, weights = (jnp.stack(x) for x in zip(*found, strict=True))
    else:
        # a vmap over one would turn branches that are rarely taken into work
        batch = probe_batch if probe_batch > 1 else None
        nodes, weights = jax.lax.map(probe, keys, batch_size=batch)
    return Density(nodes, weights, jnp.asarray(operator.size, nodes.dtype))


def quadrature(state: Krylov) -> tuple[Float[Array, "k"], Float[Array, "k"]]:
    """Nodes and weights of the Gauss rule of v' f(A) v / ||v||^2, v the start.

    The weights are S_1j^2. Where Lanczos broke down the rule is exact, and later rows weigh 0.
    """
    found = ritz(state)
    real = jnp.arange(len(found.values)) < found.count
    return (
        jnp.where(real, found.values, found.values[0]),
        jnp.where(real, found.rows[:, 0] ** 2, 0),
    )


def functional(density: Density, fn: Callable[[jax.Array], jax.Array]) -> Estimate:
    """``tr f(A) = sum_i f(lambda_i)`` and its standard error over the probes (NaN of one).

    ``moments`` are those of f(t) = t^m. Exact but for the probes up to degree 2 k - 1; an f that is
    not smooth (a count of eigenvalues beyond a threshold) is off at its jumps by their weights.
    """
    each = density.size * jnp.sum(density.weights * fn(density.nodes), axis=-1)
    return of_samples(each)


def edges(density: Density) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The least and the largest node: within the spectrum."""
    return density.nodes.min(), density.nodes.max()


def _extent(density: Density) -> Float[Array, ""]:
    """The width of the spectrum, edge to edge; of one point what floats there can resolve.

    Eigenvalues that are equal come out apart by rounding, and a Gaussian as narrow as that falls
    between the places of any grid.
    """
    low, high = edges(density)
    largest = jnp.maximum(jnp.abs(low), jnp.abs(high))
    least = jnp.where(largest > 0, RESOLVED * jnp.finfo(largest.dtype).eps * largest, 1.0)
    return jnp.maximum(high - low, least.astype(largest.dtype))


def grid(density: Density, num: int = 1000, *, margin: float = 0.05) -> Float[Array, "num"]:
    """Places over the spectrum and ``margin`` of its width on either side."""
    low, high = edges(density)
    extent = _extent(density)
    beyond = margin * extent + (extent - (high - low)) / 2
    return jnp.linspace(low - beyond, high + beyond, num)


def smooth(
    density: Density, at: Float[Array, "t"], *, width: float | None = None
) -> Float[Array, "t"]:
    """The density at the places ``at``, every point mass a Gaussian: it integrates to 1.

    Their standard deviation is ``width`` times the width of the spectrum, edge to edge; by default
    1 / ((k - 1) sqrt(8 log 3)), what k nodes resolve (the sum of neighbouring Gaussians then has no
    dips). A spectrum of one point has the width that its floats resolve (5e-4 of it in float32; 1
    if it is 0). Cost: num k t exponentials.

    Reference: for the default Papyan 2019, arXiv 1901.08244, appendix.
    """
    if width is not None and not width > 0:
        raise ValueError(f"width must be > 0, relative to the spectrum's, got {width}")
    k = density.nodes.shape[-1]
    relative = 1 / (max(k - 1, 1) * (8 * jnp.log(3.0)) ** 0.5) if width is None else width
    sigma = relative * _extent(density)
    nodes, weights = density.nodes.reshape(-1), density.weights.reshape(-1)

    def one(t: jax.Array) -> jax.Array:
        return jnp.sum(weights * jax.scipy.stats.norm.pdf(t, nodes, sigma)) / weights.sum()

    return jax.vmap(one)(at)
