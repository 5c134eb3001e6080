"""The singular values of features [n, D]: how many directions they fill, and losses made of them.

All are pure functions with exact gradients, of one replica, in float32 at least. None centres the
features of a dataset: what published probes do to each example is ``unit`` and ``centred``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CODE_WEIGHTS = (1.0, 0.04, 0.001)


def unit(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """``f / ||f||`` of each example; a row of zeros stays zero, and has gradient zero."""
    f = _wide(features)
    squares = jnp.sum(f**2, axis=1, keepdims=True)
    there = squares > 0
    return jnp.where(there, f / jnp.sqrt(jnp.where(there, squares, 1)), 0)


def centred(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """``f - mean_j f_j`` of each example: over its own features, not over the examples.

    The probe of Chen et al. 2023, arXiv 2309.17002, takes ``centred(unit(f))``; their code does.
    """
    f = _wide(features)
    return f - f.mean(axis=1, keepdims=True)


def shares(features: Float[Array, "n d"]) -> Float[Array, "k"]:
    """``q_j = sigma_j / sum(sigma)`` of the k = min(n, d) singular values, the largest first.

    They are the same for rotated, scaled and reordered features; NaN if all features are 0. Cost:
    singular values, O(n d min(n, d)).
    """
    f = _wide(features)
    if not f.size:
        raise ValueError(f"features must be [n, d] with n, d >= 1, got shape {f.shape}")
    sigma = jnp.linalg.svd(f, compute_uv=False)
    return sigma / sigma.sum()


def singular_value_entropy(features: Float[Array, "n d"]) -> Float[Array, ""]:
    """SVE, ``-sum_j q_j log q_j`` of the shares q, in nats: 0 for rank one, at most log min(n, d).

    Its exponential is the effective rank. It grows with the label noise of what the features were
    trained on, and says nearly the same as ``largest_singular_value_ratio``. The gradient leaves
    out singular values that are exactly 0, where it is infinite.

    Reference: Chen et al. 2023, arXiv 2309.17002; Roy and Vetterli 2007, The effective rank.
    """
    q = shares(features)
    return -jnp.sum(q * jnp.log(jnp.where(q > 0, q, 1)))


def largest_singular_value_ratio(features: Float[Array, "n d"]) -> Float[Array, ""]:
    """LSVR, ``-log(sigma_1 / sum(sigma))``, in nats: 0 for rank one, log min(n, d) at the most.

    Reference: Chen et al. 2023, arXiv 2309.17002.
    """
    return -jnp.log(shares(features)[0])


def consistency(z: Float[Array, "b d"], f: Float[Array, "b d"]) -> Float[Array, ""]:
    """``mean_{ij} (z_ij / ||z_i|| - f_ij / ||f_i||)^2``, f held constant: at most 4 / d.

    The mean is over features too, so it is small: of the order 1 / d.
    """
    return jnp.mean((unit(z) - jax.lax.stop_gradient(unit(f))) ** 2)


def covariance(z: Float[Array, "b d"]) -> Float[Array, ""]:
    """``(1 / d) sum_{i != j} C_ij^2``, C = Z^T Z / (b - 1) of z centred over the batch.

    Not normalised: twice the features are 16 times the penalty. ValueError: a batch of one.

    Reference: Bardes, Ponce and LeCun 2021, arXiv 2105.04906, eq. 4.
    """
    z = _wide(z)
    b, d = z.shape
    if b < 2:
        raise ValueError(f"the covariance of a batch needs b >= 2 examples, got shape {z.shape}")
    z = z - z.mean(axis=0, keepdims=True)
    squares = (z.T @ z / (b - 1)) ** 2
    return jnp.sum(jnp.where(jnp.eye(d, dtype=bool), 0, squares)) / d


def dominance(z: Float[Array, "b d"], *, top: int = 1) -> Float[Array, ""]:
    """The mean of the ``top`` largest shares ``sigma_k / sum(sigma)``, z uncentred.

    With ``top=1`` it is exp(-LSVR). ValueError: more than there are singular values.
    """
    if not 1 <= top <= min(z.shape):
        raise ValueError(f"top must be in 1..{min(z.shape)} for features {z.shape}, got {top}")
    return shares(z)[:top].mean()


def nmtune(
    z: Float[Array, "b d"],
    f: Float[Array, "b d"],
    weights: Sequence[float] = CODE_WEIGHTS,
    *,
    top: int = 5,
) -> Float[Array, ""]:
    """``w_1 consistency(z, f) + w_2 covariance(z) - w_3 dominance(z)``, to be added to a loss.

    z are the features that are tuned, f the frozen ones of the same examples. The defaults are what
    the authors' code adds; the paper's form is ``0.01 * nmtune(z, f, (1.0, 1.0, 1.0), top=1)``.
    Cost: the singular values of z. ValueError: not three weights; a batch of fewer than ``top``.

    Reference: Chen et al. 2023, arXiv 2309.17002.
    """
    if len(weights) != 3:
        raise ValueError(
            f"weights must be three, of consistency, covariance and dominance, got {weights}"
        )
    near, spread, dominant = weights
    return near * consistency(z, f) + spread * covariance(z) - dominant * dominance(z, top=top)


def _wide(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """In float32 if it came in less: there are no singular values in half precision."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
