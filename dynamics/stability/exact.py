"""Models whose sharpness is a norm of their parameters, where they fit every example.

Of the loss 1/2 mean (f(x_i) - y_i)^2: another scaling scales all of it. Data are whitened if
(1/n) sum x_i x_i^T = I, and symmetric if -x is among them with x, as often;
``data.synthetic.symmetric`` has both.

Reference: Wu and Su 2023, arXiv 2305.17490, and Wu, Wang and Su 2022, arXiv 2207.02628, for the
norms that sharpness bounds; the identities are ours.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Sharpness(NamedTuple):
    """Of a Hessian."""

    trace: Float[Array, ""]
    largest: Float[Array, ""]
    frobenius: Float[Array, ""]


def of_gradients(x: Float[Array, "n p"]) -> Sharpness:
    """Of H = (1/n) sum x_i x_i^T, x_i the gradient of output i: any model that fits every example.

    Cost: n p min(n, p).
    """
    n, p = x.shape
    values = jnp.linalg.eigvalsh(x @ x.T if n <= p else x.T @ x) / n
    return Sharpness(jnp.sum(x**2) / n, values[-1], jnp.sqrt(jnp.sum(values**2)))


def difference(u: Float[Array, "d"], v: Float[Array, "d"]) -> Sharpness:
    """Of f = <u*u - v*v, x> on whitened data: 4 |(u, v)|^2, 4 max (u_j^2 + v_j^2), ..."""
    return _diagonal(4 * (u**2 + v**2))


def product(u: Float[Array, "d"], v: Float[Array, "d"]) -> Sharpness:
    """Of f = <u*v, x> on whitened data: the trace is |u|^2 + |v|^2 >= 2 |u*v|_1.

    So a bound on the trace (SGD, one example a batch) bounds an l1 norm of the function, one on
    the largest eigenvalue (gradient descent) only the largest entry.
    """
    return _diagonal(u**2 + v**2)


def _diagonal(curvature: Float[Array, "d"]) -> Sharpness:
    return Sharpness(curvature.sum(), curvature.max(), jnp.sqrt(jnp.sum(curvature**2)))


def relu_gradients(
    w: Float[Array, "m d"], a: Float[Array, "m"], x: Float[Array, "n d"]
) -> Float[Array, "n p"]:
    """Of f = sum_j a_j max(<w_j, x>, 0) by (w, a), p = m d + m; x on no kink."""
    inner = x @ w.T
    active = (inner > 0).astype(x.dtype)
    by_w = (active * a[None])[:, :, None] * x[:, None, :]
    return jnp.concatenate([by_w.reshape(len(x), -1), active * inner], axis=1)


def relu_trace(w: Float[Array, "m d"], a: Float[Array, "m"]) -> Float[Array, ""]:
    """``1/2 sum_j (|w_j|^2 + d a_j^2)``: tr H of the two-layer net on symmetric, whitened data.

    At least sqrt(d) times the ``path_norm``, which depends on the function alone; equal to it if
    the net is ``balanced``.
    """
    return (jnp.sum(w**2) + w.shape[1] * jnp.sum(a**2)) / 2


def path_norm(w: Float[Array, "m d"], a: Float[Array, "m"]) -> Float[Array, ""]:
    """``sum_j |a_j| |w_j|``."""
    return jnp.sum(jnp.abs(a) * jnp.linalg.norm(w, axis=1))


def balanced(
    w: Float[Array, "m d"], a: Float[Array, "m"]
) -> tuple[Float[Array, "m d"], Float[Array, "m"]]:
    """The same function with the least trace: (w_j / s_j, s_j a_j).

    s_j^2 = |w_j| / (sqrt(d) |a_j|). No neuron may be zero in either layer.
    """
    root = jnp.sqrt(jnp.asarray(w.shape[1], w.dtype))
    s = jnp.sqrt(jnp.linalg.norm(w, axis=1) / (root * jnp.abs(a)))
    return w / s[:, None], s * a
