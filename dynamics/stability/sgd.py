"""When minibatch SGD can stay at a minimum that fits every example: linear stability, exactly.

At such a minimum of the mean of the square losses 1/2 (f_i - y_i)^2 the Hessian is H = (1/n) sum
x_i x_i^T, x_i the gradient of the output f_i. A step on a random batch is linear in the distance to
the minimum, and the second moment P of that distance moves by

    Phi(P) = (I - eta H) P (I - eta H) + eta^2 c ((1/n) sum (x_i^T P x_i) x_i x_i^T - H P H),

c = ``noise_factor``: the minimum is stable in mean square if no eigenvalue of Phi exceeds 1. For
a batch of all examples c = 0, and that is lambda_max <= 2 / eta. To be stable almost surely is
less: a run may stay a little above the bound of the mean square.

Reference: Wu and Su 2023, arXiv 2305.17490 (tr H <= 2 / eta: of batches of one example);
Ma and Ying 2021, arXiv 2105.13462, for the operator. The necessary condition, the critical learning
rate as an eigenvalue and all constants are ours.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.types import PyTree

Examples = Float[Array, "n p"]  # gradients of the outputs, one a row
Scalar = Any  # a number, traced or not
ROUNDING = 64  # units of rounding of the largest eigenvalue that count as none


def noise_factor(batch_size: int, examples: int, *, replacement: bool = True) -> float:
    """c: 1 / B for independent draws, (n - B) / (B (n - 1)) without replacement in a batch.

    Batches are independent of one another; epochs in which each example comes once are another
    matter. ValueError: a batch of none, or without replacement of more than all.
    """
    most = float("inf") if replacement else examples
    if not (examples >= 1 and 1 <= batch_size <= most):
        raise ValueError(
            f"batch_size must be from 1 to {most:g} of at least one example, got {batch_size} of "
            f"{examples}"
        )
    if replacement or examples == 1:
        return 1 / batch_size if replacement else 0.0
    return (examples - batch_size) / (batch_size * (examples - 1))


class Modes(NamedTuple):
    """The examples in the eigenbasis of their H, at most min(n, p) directions."""

    x: jax.Array  # [n r]: 0 in directions that no example has
    curvature: jax.Array  # [r]: eigenvalues of H, rising, 0 in those directions
    moves: jax.Array  # bool[r]


def modes(x: Examples) -> Modes:
    """The directions in which SGD moves; from the smaller of the two Gram matrices.

    Cost: n p min(n, p) for the matrix, min(n, p)^3 for its eigenvectors.
    """
    n, p = x.shape
    gram = x @ x.T if n <= p else x.T @ x
    values, vectors = jnp.linalg.eigh(gram)
    moves = values > ROUNDING * jnp.finfo(x.dtype).eps * values[-1]
    values = jnp.where(moves, values, 0)
    turned = vectors * jnp.sqrt(values)[None] if n <= p else x @ vectors
    return Modes(jnp.where(moves[None], turned, 0), values / n, moves)


def mean_square(x: Examples, learning_rate: Scalar, c: Scalar) -> Callable[[jax.Array], jax.Array]:
    """Phi, of symmetric matrices [r r] in the coordinates of ``modes``. Cost of a call: n r^2.

    It is symmetric for the inner product tr(P Q), and keeps positive matrices positive.
    """
    found = modes(x)
    kept = 1 - learning_rate * found.curvature
    twice = kept[:, None] * kept[None] - learning_rate**2 * c * _outer(found.curvature)

    def phi(p: jax.Array) -> jax.Array:
        return twice * p + learning_rate**2 * c * _spread(found.x, p)

    return phi


def spectral_radius(
    x: Examples, learning_rate: Scalar, c: Scalar, *, num_iterations: int = 2000
) -> tuple[jax.Array, jax.Array]:
    """(rho(Phi), its error): the factor by which the second moment of the distance grows in a step.

    Of the directions that some example has; the others stand still whatever the learning rate. Its
    eigenvector is positive definite or a limit of such, so power iteration from the identity
    finds it; the error is the norm of the residual, and an eigenvalue lies within it.
    Cost: num_iterations n min(n, p)^2 at most.
    """
    start = jnp.diag(modes(x).moves.astype(x.dtype))
    return _largest(mean_square(x, learning_rate, c), start, num_iterations)


def critical_learning_rate(
    x: Examples, c: Scalar, *, num_iterations: int = 2000
) -> tuple[jax.Array, jax.Array]:
    """(eta, its error) up to which SGD is stable in mean square: rho(Phi) = 1 there.

    1 / rho of P -> ((1 - c) HPH + (c / n) sum (x_i^T P x_i) x_i x_i^T)_ab / (h_a + h_b) in the
    eigenbasis of H. For Phi - 1 = eta (eta T - L), L(P) = HP + PH, and T and the inverse of L
    keep positive matrices positive, so that eta T - L decays if and only if eta times the largest
    eigenvalue of L^-1 T is below 1. L^(-1/2) T L^(-1/2) has the same ones and is symmetric, so the
    error is a residual again. Derivation ours. Cost: as ``spectral_radius``.
    """
    found = modes(x)
    sums = found.curvature[:, None] + found.curvature[None]
    there = _outer(found.moves)
    root = jnp.where(there, 1 / jnp.sqrt(jnp.where(there, sums, 1)), 0)

    def moved(p: jax.Array) -> jax.Array:
        p = root * p
        return root * ((1 - c) * _outer(found.curvature) * p + c * _spread(found.x, p))

    value, error = _largest(moved, jnp.diag(found.moves.astype(x.dtype)), num_iterations)
    return 1 / value, error / value**2


def necessary(x: Examples, learning_rate: Scalar, c: Scalar) -> jax.Array:
    """``(eta / 2) (c (1/n) sum |x_i|^4 + (1 - c) |H|_F^2) / tr H``: at most 1 where SGD is stable.

    In mean square, for every batch size, as c says. For c = 1, batches of one example, it implies
    tr H <= 2 / eta, the headline of Wu and Su; for larger batches that is false (see ``by_trace``),
    and for a batch of all examples this is weaker than lambda_max <= 2 / eta.

    Proof (ours): stability gives a positive definite Q with Phi(Q) <= Q, whose trace against Q^-1
    is this, by (x^T Q x)(x^T Q^-1 x) >= |x|^4 and tr(H Q H Q^-1) >= |H|_F^2.
    """
    lengths = jnp.sum(x**2, axis=1)
    square = c * jnp.mean(lengths**2) + (1 - c) * _frobenius_squared(x)
    return learning_rate / 2 * square / jnp.mean(lengths)


def by_trace(x: Examples, learning_rate: Scalar, c: Scalar) -> jax.Array:
    """``(eta / 2) (c (tr H)^2 + (1 - c) |H|_F^2) / tr H``: at most ``necessary``, from norms only.

    (eta / 2) tr H for batches of one example.
    """
    trace = jnp.mean(jnp.sum(x**2, axis=1))
    return learning_rate / 2 * (c * trace + (1 - c) * _frobenius_squared(x) / trace)


def _frobenius_squared(x: jax.Array) -> jax.Array:
    gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
    return jnp.sum(gram**2) / x.shape[0] ** 2


def _outer(a: jax.Array) -> jax.Array:
    return a[:, None] * a[None]


def _spread(x: jax.Array, p: jax.Array) -> jax.Array:
    """``(1/n) sum (x_i^T P x_i) x_i x_i^T``."""
    lengths = jnp.sum((x @ p) * x, axis=1)
    return (x * lengths[:, None]).T @ x / x.shape[0]


def _largest(
    apply: Callable[[jax.Array], jax.Array], start: jax.Array, num_iterations: int
) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalue of a symmetric map that keeps positive matrices positive."""

    def value(p: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        image = apply(p)
        rayleigh = jnp.sum(p * image)
        return rayleigh, jnp.linalg.norm(image - rayleigh * p), image

    def go(carry: tuple) -> jax.Array:
        i, _, rayleigh, error = carry
        return (i < num_iterations) & (error > enough * jnp.abs(rayleigh))

    def one(carry: tuple) -> tuple:
        i, p, _, _ = carry
        rayleigh, error, image = value(p)
        return i + 1, image / jnp.linalg.norm(image), rayleigh, error

    start = start / jnp.linalg.norm(start)
    enough = jnp.finfo(start.dtype).eps ** 0.75  # the value's own error is about its square
    nothing = jnp.zeros((), start.dtype)
    _, _, rayleigh, error = jax.lax.while_loop(go, one, (0, start, nothing, nothing + jnp.inf))
    return rayleigh, error


# ---- the top direction alone, and what batches say of it ----------------------------------------


def break_even(curvatures: Float[Array, "n"], learning_rate: Scalar, batch_size: int) -> jax.Array:
    """``(1 - eta lambda)^2 + eta^2 s^2 (n - B) / (B (n - 1))``: the growth of E psi^2 in a step.

    In a model of the top direction alone: psi is the place along it, ``curvatures`` are the second
    derivatives of the examples' losses there, lambda and s^2 their mean and variance. The
    break-even point of a run is where this first is 1; batches are drawn without replacement.

    Reference: Jastrzebski et al. 2020, arXiv 2002.09572, section 3.
    """
    c = noise_factor(batch_size, curvatures.shape[0], replacement=False)
    mean, variance = jnp.mean(curvatures), jnp.var(curvatures)
    return (1 - learning_rate * mean) ** 2 + learning_rate**2 * variance * c


class Along(NamedTuple):
    """Batches' gradients g against a Hessian."""

    curvature: Float[Array, "m"]  # g^T H g
    squared: Float[Array, "m"]  # |g|^2


def along(
    gradient: Callable[[PyTree], PyTree],
    product: Callable[[PyTree, PyTree], PyTree],
    batches: PyTree,
) -> Along:
    """For batches with leaves [m, ...]: ``gradient(batch)``, and ``product(batch, v)`` = H v.

    Where the product uses its batch, H is the batch's own (for ``batch_sharpness``); else that of
    the loss on all examples (for ``interaction`` and ``gradient_noise``). One batch after another.
    Cost: a gradient and a product for each.
    """

    def one(batch: PyTree) -> Along:
        g = gradient(batch)
        return Along(_dot(g, product(batch, g)), _dot(g, g))

    return jax.lax.map(one, batches)


def batch_sharpness(found: Along) -> tuple[jax.Array, jax.Array]:
    """``E_B[g^T H_B g / |g|^2]`` and its standard error, H_B the batch's own Hessian.

    Reference: Andreyev and Beneventano 2024, arXiv 2412.20553, who see it rise to 2 / eta.
    """
    ratios = found.curvature / found.squared
    m = ratios.shape[0]
    return ratios.mean(), jnp.std(ratios, ddof=1) / math.sqrt(m)


def interaction(found: Along) -> jax.Array:
    """``E[g^T H g] / E|g|^2 = tr(H S) / tr(S)``, S = E[g g^T]: the interaction-aware sharpness.

    Reference: Lee and Jang 2023, A new characterization of the edge of stability based on a
    sharpness measure aware of batch gradient distribution (ICLR).
    """
    return found.curvature.sum() / found.squared.sum()


def gradient_noise(found: Along, squared: Float[Array, ""]) -> jax.Array:
    """``E[g^T H g] / |grad L|^2``, ``squared`` = |grad L|^2 of the loss on all examples.

    It is 2 / eta wherever E L stands still to second order in eta, whatever the sharpness: it says
    that a run oscillates, and certifies no edge.

    Reference: the gradient-noise interaction of Andreyev and Beneventano 2024, arXiv 2412.20553.
    """
    return found.curvature.mean() / squared


def _dot(a: PyTree, b: PyTree) -> jax.Array:
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return jax.tree.reduce(jnp.add, products)
