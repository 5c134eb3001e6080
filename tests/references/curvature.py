"""Curvature as written on paper: dense matrices in float64, and every formula in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

N = 200


@functools.cache
def digits():
    data = load_digits()
    x = (data.data[:N] - data.data[:N].mean()) / 16
    return x, data.target[:N].astype(np.int32)


def init(seed=0, widths=(64, 16, 10)):
    draw = np.random.default_rng(seed)
    return {
        f"layer_{i}": {
            "kernel": draw.normal(size=(a, b)) / np.sqrt(a),
            "bias": 0.1 * draw.normal(size=b),
        }
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    }


def predict(params, batch):
    h, last = batch[0], len(params) - 1
    for i in range(last + 1):
        layer = params[f"layer_{i}"]
        h = h @ layer["kernel"] + layer["bias"][None]
        h = jnp.tanh(h) if i < last else h
    return h


def squares(outputs, batch):
    target = jax.nn.one_hot(batch[1], outputs.shape[-1], dtype=outputs.dtype)
    return (jnp.sum((outputs - target) ** 2, axis=-1) / 2).mean()


def cross_entropy(outputs, batch):
    logs = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(logs, batch[1][:, None], axis=1).mean()


def mse(params, batch):
    return squares(predict(params, batch), batch)


def ce(params, batch):
    return cross_entropy(predict(params, batch), batch)


LOSSES = {"mse": mse, "ce": ce}


@functools.cache
def trained(name, steps):
    """Full-batch gradient descent at 0.2, float64, from ``init()``."""
    with jax.enable_x64(True):
        batch, params = jax.tree.map(jnp.asarray, (digits(), init()))

        def step(params, _):
            gradient = jax.grad(LOSSES[name])(params, batch)
            return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient), None

        run = jax.jit(lambda params: jax.lax.scan(step, params, length=steps)[0])
        return jax.tree.map(np.asarray, run(params))


def dense_of(fn, params):
    """The Hessian of ``fn`` in all parameters, [n, n], float64."""
    with jax.enable_x64(True):
        flat, back = ravel_pytree(jax.tree.map(jnp.asarray, params))
        return np.asarray(jax.jit(jax.hessian(lambda flat: fn(back(flat))))(flat))


@functools.cache
def dense(name, steps):
    batch = digits()
    return dense_of(lambda p: LOSSES[name](p, batch), trained(name, steps))


def gauss_newton(params, batch, output_hessian):
    """``mean_x J' H_x J``: J of one example's outputs, H_x [classes, classes] from its outputs."""
    with jax.enable_x64(True):
        params, batch = jax.tree.map(jnp.asarray, (params, batch))
        flat, back = ravel_pytree(params)
        outputs = np.asarray(predict(params, batch))
        jacobian = np.asarray(jax.jit(jax.jacobian(lambda f: predict(back(f), batch)))(flat))
    total = sum(j.T @ output_hessian(z) @ j for j, z in zip(jacobian, outputs, strict=True))
    return total / len(outputs)


def categorical(z):
    """E_{y ~ softmax(z)} of the outer product of d log p(y) / dz, label by label."""
    p = np.exp(z - z.max())
    p = p / p.sum()
    return sum(p[y] * np.outer(np.eye(len(z))[y] - p, np.eye(len(z))[y] - p) for y in range(len(z)))


def trace_variance(a, draw):
    """Of v'Av: Var = 2 ||A||_F^2 for normal v; without the diagonal's part for signs."""
    diagonal = 0 if draw == "normal" else np.sum(np.diag(a) ** 2)
    return 2 * (np.sum(a**2) - diagonal)


def diagonal_error(a, num):
    """||estimate - diag|| relative to ||diag||, root mean square, of signs."""
    diagonal = np.diag(a)
    return np.sqrt((np.sum(a**2) - np.sum(diagonal**2)) / num) / np.linalg.norm(diagonal)


def xtrace(a, omega):
    """Algorithm 2 of arXiv 2301.07825 without its shortcuts: a QR for each vector left out."""
    n, m = omega.shape
    y, found = a @ omega, []
    for i in range(m):
        q = np.linalg.qr(np.delete(y, i, axis=1))[0]
        rest = omega[:, i] - q @ (q.T @ omega[:, i])
        rest *= np.sqrt(n - m + 1) / np.linalg.norm(rest)
        found.append(np.trace(q.T @ a @ q) + rest @ a @ rest)
    return np.mean(found), np.std(found, ddof=1) / np.sqrt(m)


def symmetric(n, seed=0):
    a = np.random.default_rng(seed).normal(size=(n, n))
    return (a + a.T) / 2


def with_eigenvalues(values, seed=0):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return (q * values) @ q.T
