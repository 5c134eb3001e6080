"""Kernel ridge regression, and what becomes of it when it is fitted to its own predictions.

All functions are of symmetric positive semi-definite kernels, in the dtype of their inputs; ``y``
may have axes behind the examples (outputs), and students differ in their coefficients c alone:
f(x) = k(x, X) c. That ``ridge`` is > 0 is not checked: it may be traced.

Reference: Borup and Andersen 2021, arXiv 2102.13088; for alpha = 0 Mobahi et al. 2020, arXiv
2002.05715. Here alpha weighs the ground truth, and 1 - alpha the student before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gaussian(
    x: Float[Array, "n d"], z: Float[Array, "m d"], gamma: float | Float[Array, ""]
) -> Float[Array, "n m"]:
    """``exp(-gamma ||x_i - z_j||^2)``. Cost: n m d numbers."""
    return jnp.exp(-gamma * jnp.sum((x[:, None] - z[None]) ** 2, axis=-1))


def fit(
    kernel: Float[Array, "n n"], y: Float[Array, "n ..."], ridge: float | Float[Array, ""]
) -> Float[Array, "n ..."]:
    """``(K + ridge I)^-1 y``: the coefficients of least 1/2 ||f(X) - y||^2 + ridge/2 ||f||_H^2.

    Cost: a Cholesky factor, n^3 / 3.
    """
    return _solve(_factor(kernel, ridge), y)


def predict(
    kernel: Float[Array, "m n"], coefficients: Float[Array, "n ..."]
) -> Float[Array, "m ..."]:
    """``k(x, X) c`` at the m places of the rows of ``kernel``."""
    return jnp.tensordot(kernel, coefficients, 1)


def distill(
    kernel: Float[Array, "n n"],
    y: Float[Array, "n ..."],
    alphas: Float[Array, "t"],
    ridge: float | Float[Array, ""],
) -> Float[Array, "t n ..."]:
    """The coefficients of t students, each fitted to ``alpha_t y + (1 - alpha_t) y_before``.

    ``y_before`` are the predictions of the one before on the training examples; the first, who has
    none before, is fitted to y, so that ``alphas[0]`` changes nothing. Cost: one factor and t
    solves.
    """
    factor = _factor(kernel, ridge)

    def student(before: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = _solve(factor, alpha * y + (1 - alpha) * before)
        return predict(kernel, found), found

    return jax.lax.scan(student, y, alphas)[1]


def shrinkage(
    eigenvalues: Float[Array, "n"], alphas: Float[Array, "t"], ridge: float | Float[Array, ""]
) -> Float[Array, "t n"]:
    """What is left of each eigendirection of the kernel in the predictions of student t.

    B_1 = a, B_t = a ((1 - alpha_t) B_(t-1) + alpha_t) with a = d / (d + ridge): student t predicts
    V diag(B_t) V' y on the training examples, for K = V diag(d) V'. With alpha = 0 this is a^t,
    which vanishes, the smaller eigenvalues first; with alpha = 1 it stays a.
    """
    a = eigenvalues / (eigenvalues + ridge)

    def student(before: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = a * ((1 - alpha) * before + alpha)
        return found, found

    return jax.lax.scan(student, jnp.ones_like(a), alphas)[1]


def limit(
    kernel: Float[Array, "n n"],
    y: Float[Array, "n ..."],
    alpha: float | Float[Array, ""],
    ridge: float | Float[Array, ""],
) -> Float[Array, "n ..."]:
    """The coefficients of the last of infinitely many students: those of ``ridge / alpha``.

    Students come nearer by a factor of (1 - alpha) max(a) each; alpha = 0 ends at zero.
    """
    return alpha * fit(alpha * kernel, y, ridge)


def best_weight(
    plain: Float[Array, "*m"], student: Float[Array, "*m"], y: Float[Array, "*m"]
) -> Float[Array, ""]:
    """``<y - h, f - h> / ||f - h||^2``: the alpha of least ||alpha f + (1 - alpha) h - y||^2.

    f are the predictions of the student of alpha = 1, plain regression, h of the one of alpha = 0,
    and a student of alpha between is exactly their mixture; for networks it is nearly so, which
    saves the grid search. The examples must be held out: on those trained on it is too large. It
    may leave [0, 1]; clip it if that is unwanted. NaN where f = h.
    """
    apart = plain - student
    return jnp.sum((y - student) * apart) / jnp.sum(apart**2)


def _factor(kernel: jax.Array, ridge: Any) -> jax.Array:
    shifted = kernel + ridge * jnp.eye(len(kernel), dtype=kernel.dtype)
    return jax.scipy.linalg.cholesky(shifted, lower=True)


def _solve(factor: jax.Array, y: jax.Array) -> jax.Array:
    found = jax.scipy.linalg.cho_solve((factor, True), y.reshape(len(y), -1))
    return found.reshape(y.shape)
