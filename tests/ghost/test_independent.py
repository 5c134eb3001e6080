"""That examples which depend on each other are noticed, and that others are let through."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dynamics import ghost, losses, models, step, task
from dynamics.data import of_arrays
from dynamics.models import layers
from dynamics.scores import el2n, grand, over_examples
from dynamics.types import Batch

B, D, K = 6, 4, 3
GENERATOR = np.random.default_rng(0)
X = jnp.asarray(GENERATOR.normal(size=(B, D)), jnp.float32)
Y = jnp.asarray(GENERATOR.integers(0, K, B), jnp.int32)
W = jnp.asarray(GENERATOR.normal(size=(D, K)), jnp.float32)


def each(x: Any) -> Any:
    """One number for each example."""
    return x.reshape(x.shape[0], -1).sum(axis=1)


def checked(fn: Callable[[Any, Any], Any], x: Any = X) -> None:
    ghost.check_independent(lambda w, b: fn(b[0], w), W, (x, Y))


COUPLED = {
    "a mean loss": lambda x, w: (x @ w).mean(),
    "a mean, once for each": lambda x, w: jnp.full(len(x), (x @ w).mean()),
    "one loss for each pair": lambda x, w: x @ x.T,
    "losses of more than examples": lambda x, w: x @ w,
    "softmax over the batch": lambda x, w: each(jax.nn.softmax(x, axis=0)),
    "contrastive": lambda x, w: -jnp.diagonal(jax.nn.log_softmax(x @ x.T, axis=1)),
    "sort": lambda x, w: each(jnp.sort(x, axis=0)),
    "rank": lambda x, w: jnp.argsort(each(x)).astype(jnp.float32),
    "median": lambda x, w: each(x - jnp.median(x, axis=0, keepdims=True)),
    "maximum": lambda x, w: each(x - x.max(axis=0, keepdims=True)),
    "any": lambda x, w: each(jnp.where((x > 0).any(), x, 0)),
    "top k": lambda x, w: jax.lax.top_k(each(x), 2)[0].sum() + each(x),
    "cumsum": lambda x, w: each(jnp.cumsum(x, axis=0)),
    "cummax of a flat batch": lambda x, w: jax.lax.cummax(x.reshape(-1)).reshape(x.shape)[:, 0],
    "associative scan": lambda x, w: each(jax.lax.associative_scan(jnp.add, x)),
    "variance": lambda x, w: each(x / (1e-3 + jnp.var(x, axis=0, keepdims=True))),
    "whitened": lambda x, w: each(x @ jnp.linalg.inv(x.T @ x)),
    "rolled": lambda x, w: each(x - jnp.roll(x, 1, axis=0)),
    "rolled by a number": lambda x, w: each(x * jnp.roll(x, w[0, 0].astype(jnp.int32), axis=0)),
    "reversed": lambda x, w: each(x * x[::-1]),
    "reversed rows and places": lambda x, w: each(jnp.flip(x)),
    "the first": lambda x, w: each(x - x[:1]),
    "the last, by index": lambda x, w: each(x) * each(x)[-1],
    "the row of a number": lambda x, w: each(x - x[w[0, 0].astype(jnp.int32)][None]),
    "an order": lambda x, w: each(x * x[jnp.asarray(np.arange(len(x))[::-1])]),
    "taken": lambda x, w: each(jnp.take(x, (each(x) > 0).astype(jnp.int32), axis=0)),
    "shifted": lambda x, w: each(x * jnp.concatenate([x[1:], x[:1]])),
    "shifted and padded": lambda x, w: each(x * jnp.pad(x, ((1, 0), (0, 0)))[:-1]),
    "padded where it was cut": lambda x, w: each(x * jnp.pad(x[1:], ((0, 1), (0, 0)))),
    "differences": lambda x, w: each(jnp.concatenate([x[:1], x[1:] - x[:-1]])),
    "neighbours as channels": lambda x, w: each(
        jnp.concatenate([jnp.concatenate([x[1:], x[:-1]], axis=1), jnp.zeros((1, 2 * D))])
    ),
    "twice itself, cut elsewhere": lambda x, w: each(x * jnp.concatenate([x, x])[1 : len(x) + 1]),
    "convolution": lambda x, w: each(
        jax.lax.conv_general_dilated(x.T[:, None], w[:3, :1].T[None], (1,), "SAME")[:, 0].T
    ),
    "examples as channels": lambda x, w: each(
        jax.lax.conv_general_dilated(
            x[None, :, :], jnp.ones((len(x), len(x), 1)), (1,), "SAME"
        )[0]
    ),
    "window": lambda x, w: each(
        jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 1), (1, 1), "SAME")
    ),
    "a reduction of one's own": lambda x, w: each(
        x - jax.lax.reduce(x, 0.0, lambda a, b: jnp.sqrt(a * a + b * b), (0,))[None]
    ),
    "a window of one's own": lambda x, w: each(
        jax.lax.reduce_window(x, 0.0, lambda a, b: jnp.sqrt(a * a + b * b), (3, 1), (1, 1), "SAME")
    ),
    "reshaped across": lambda x, w: each(x.reshape(D, len(x)).T),
    "Fourier": lambda x, w: each(jnp.abs(jnp.fft.fft(x, axis=0))),
    "scan": lambda x, w: jax.lax.scan(lambda c, x: (c + x.sum(), c), 0.0, x)[1],
    "fori": lambda x, w: each(x)
    + jax.lax.fori_loop(0, len(x), lambda i, c: c + jax.lax.dynamic_index_in_dim(x, i).sum(), 0.0),
    "while": lambda x, w: jax.lax.while_loop(lambda c: c.sum() > 1, lambda c: c / 2, each(x)),
    "inside jit": lambda x, w: jax.jit(lambda x: each(x - x.mean(axis=0, keepdims=True)))(x),
    "inside checkpoint": lambda x, w: jax.checkpoint(lambda x: each(x) * x.mean())(x),
    "inside cond": lambda x, w: jax.lax.cond(
        w[0, 0] > 0, lambda x: each(x) + x.sum(), lambda x: each(x), x
    ),
    "the condition": lambda x, w: jax.lax.cond(x[0, 0] > 0, each, lambda x: -each(x), x),
    "inside a scan over time": lambda x, w: jax.lax.scan(
        lambda h, x: (h + x - x.mean(), None), jnp.zeros(len(x)), x.T
    )[0],
    "inside custom_jvp": lambda x, w: each(centred(x)),
    "all compared with each": lambda x, w: jax.lax.map(lambda one: (x @ one).max(), x),
    "batch and places flat": lambda x, w: each(
        jax.nn.softmax(x.reshape(-1)).reshape(x.shape)
    ),
}  # fmt: skip


@jax.custom_jvp
def centred(x: Any) -> Any:
    return x - x.mean(axis=0, keepdims=True)


centred.defjvp(lambda x, t: (centred(*x), t[0]))


@pytest.mark.parametrize("name", COUPLED)
def test_examples_that_meet_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must not depend on each other, but .* evaluation mode"):
        checked(COUPLED[name])


def chunked(x: Any, w: Any) -> Any:
    """As one does for memory: padded, in pieces, put together, cut."""
    padded = jnp.pad(x, ((0, -len(x) % 4), (0, 0))).reshape(-1, 4, D)
    return jax.lax.map(lambda x: each(jnp.tanh(x @ w)), padded).reshape(-1)[: len(x)]


def halves(x: Any, w: Any) -> Any:
    """The mean over an image and its mirror image, computed as one batch."""
    both = jnp.tanh(jnp.concatenate([x, x[:, ::-1]]) @ w)
    return each(both[: len(x)] + both[len(x) :]) + each(both.reshape(2, len(x), K).mean(axis=0))


def written(x: Any, w: Any) -> Any:
    def body(i: Any, out: Any) -> Any:
        return out.at[i].set(jnp.tanh(jax.lax.dynamic_index_in_dim(x, i) @ w).sum())

    return jax.lax.fori_loop(0, len(x), body, jnp.zeros(len(x)))


def running(x: Any, w: Any) -> Any:
    """As many rounds as each example needs."""
    until = lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x / 2, x)  # noqa: E731
    return each(jax.vmap(until)(x))


def own_kernels(x: Any, w: Any) -> Any:
    """A convolution with a kernel made of the example itself."""
    kernel = x[:, None, None, :2]
    one = lambda x, k: jax.lax.conv_general_dilated(x[None, None], k, (1,), "SAME")  # noqa: E731
    return each(jax.vmap(one)(x, kernel))


def gradient(x: Any, w: Any) -> Any:
    """Length of the gradients by the inputs, of a sum over the batch."""
    return each(jax.grad(lambda x: jnp.tanh(x @ w).sum())(x) ** 2)


def conv_gradient(x: Any, w: Any) -> Any:
    def one(x: Any) -> Any:
        f = lambda k: jnp.tanh(jax.lax.conv(x[None, None], k, (1,), "SAME")).sum()  # noqa: E731
        return jnp.sum(jax.grad(f)(jnp.ones((2, 1, 3))) ** 2)

    return jax.vmap(one)(x)


INDEPENDENT = {
    "product": lambda x, w: each(x @ w),
    "nothing of the batch": lambda x, w: jnp.zeros(len(x)) + w.sum(),
    "softmax": lambda x, w: each(jax.nn.log_softmax(x @ w)),
    "labels picked": lambda x, w: (x @ w)[jnp.arange(len(x)), jnp.argmax(x @ w, axis=1)],
    "labels picked along": lambda x, w: each(jnp.take_along_axis(x, jnp.argsort(x, 1), axis=1)),
    "sorted places": lambda x, w: each(jnp.sort(x, axis=1) + jnp.cumsum(x[:, ::-1], axis=1)),
    "rolled places": lambda x, w: each(x * jnp.roll(x, 1, axis=1)),
    "top k places": lambda x, w: jax.lax.top_k(x, 2)[0].sum(axis=1),
    "Fourier of places": lambda x, w: each(jnp.abs(jnp.fft.fft(x))),
    "flat batch and places": lambda x, w: each((x.reshape(-1, 1) * w[:1]).reshape(len(x), -1)),
    "flat and normalised": lambda x, w: each(
        jax.nn.softmax((x[:, :, None] * w[None, None, 0]).reshape(-1, K)).reshape(len(x), D, K)
    ),
    "vmap": lambda x, w: jax.vmap(lambda x: jnp.tanh(x @ w).max() - x.mean())(x),
    "vmap of a vmap": lambda x, w: each(jax.vmap(jax.vmap(lambda v: v * v))(x)),
    "a reduction of one's own": lambda x, w: jax.lax.reduce(
        x, 0.0, lambda a, b: jnp.sqrt(a * a + b * b), (1,)
    ),
    "a window of one's own": lambda x, w: each(
        jax.lax.reduce_window(x, 0.0, lambda a, b: jnp.sqrt(a * a + b * b), (1, 3), (1, 1), "SAME")
    ),
    "map": lambda x, w: jax.lax.map(lambda x: jnp.tanh(x @ w).max(), x),
    "map over pairs": lambda x, w: jax.lax.map(lambda i: (x[i] * x[i]).sum(), jnp.arange(len(x))),
    "map in pieces": lambda x, w: jax.lax.map(lambda x: (x @ w).max(), x, batch_size=2),
    "map in pieces of eight": lambda x, w: jax.lax.map(lambda x: (x @ w).max(), x, batch_size=8),
    "scan without memory": lambda x, w: jax.lax.scan(lambda c, x: (c, x.sum()), 0.0, x)[1],
    "scan that counts": lambda x, w: jax.lax.scan(lambda c, x: (c + 1, x.sum() * c), 0.0, x)[1],
    "scan over time": lambda x, w: jax.lax.scan(
        lambda h, x: (jnp.tanh(h + x), h), jnp.zeros(len(x)), x.T
    )[0],
    "batch statistics nobody reads": lambda x, w: jax.jit(lambda x: (each(x), x.mean()))(x)[0],
    "first rows nobody reads": lambda x, w: (each(x) * 2, x[:1] * 3)[0],
    "mean of constants": lambda x, w: each(x) * jnp.ones(len(x)).mean(),
    "cond": lambda x, w: jax.lax.cond(w[0, 0] > 0, each, lambda x: -each(x), x),
    "transposed": lambda x, w: each((w.T @ x.T).T),
    "einsum": lambda x, w: jnp.einsum("bd,dk,bk->b", x, w, x @ w),
    "cast": lambda x, w: each(jax.lax.reduce_precision(each(x), 5, 10)[:, None]),
    "chunked": chunked,
    "halves": halves,
    "written": written,
    "running": running,
    "own kernels": own_kernels,
    "gradient": gradient,
    "convolution's gradient": conv_gradient,
}  # fmt: skip


@pytest.mark.parametrize("name", INDEPENDENT)
def test_examples_apart_are_let_through(name: str) -> None:
    checked(INDEPENDENT[name])


# ---- through the scores ----


IMAGES = of_arrays(GENERATOR.normal(size=(B, 4, 4)).astype(np.float32), np.asarray(Y))
TOKENS = jnp.asarray(GENERATOR.integers(0, 5, (B, 4)), jnp.int32)


class Net(nn.Module):
    """With batch norm in the mode it was made for."""

    training: bool

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        x = layers.normalise(nn.Dense(5)(x.reshape(len(x), -1)), "batch", name="n", train=False)
        if self.training:
            mean = x.mean(axis=0, keepdims=True)
            x = (x - mean) / jnp.sqrt(jnp.square(x - mean).mean(axis=0, keepdims=True) + 1e-5)
        return nn.Dense(K)(nn.relu(x))


class Flax(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        x = nn.Dense(5)(x.reshape(len(x), -1))
        return nn.Dense(K)(nn.BatchNorm(use_running_average=False)(x))


def coupled_tasks() -> dict[str, Any]:
    mean = lambda z, y: jnp.broadcast_to(losses.cross_entropy(z, y).mean(), y.shape)  # noqa: E731
    plain = lambda p, x: x.reshape(len(x), -1) @ p["w"]  # noqa: E731
    init = lambda key: {"w": jnp.ones((16, K))}  # noqa: E731
    return {
        "batch norm in training mode": task.classification(Net(True), (4, 4)),
        "flax batch norm in training mode": training(task.classification(Flax(), (4, 4))),
        "a mean loss": task.of_function(plain, init=init, loss=mean),
        "softmax over the batch": task.of_function(
            lambda p, x: jax.nn.softmax(plain(p, x), axis=0), init=init
        ),
    }


def training(net: Any) -> Any:
    """A task that evaluates in training mode, as one by mistake does."""

    def evaluate(params: Any, extras: Any, batch: Batch, hyperparameters: Any) -> Any:
        key = jax.random.key(0)
        return net.loss(params, extras, batch, key, hyperparameters)[1][1]

    return net._replace(evaluate=evaluate)


@pytest.mark.parametrize("name", coupled_tasks())
def test_grand_and_every_score_over_examples_refuse_them(name: str) -> None:
    net = coupled_tasks()[name]
    params, extras = net.init(jax.random.key(0), {})
    state = step.given(params, extras)
    batch = Batch(x=jnp.ones((B, 4, 4)), y=Y, index=jnp.arange(B))
    for score in (
        lambda: grand(net, state, batch),
        lambda: over_examples(el2n, net, state, IMAGES),
        lambda: over_examples(grand, net, state, IMAGES),
    ):
        with pytest.raises(ValueError, match="must not depend on each other, but .* runs over the"):
            score()


def test_batch_norm_in_evaluation_mode_is_let_through() -> None:
    net = task.classification(Net(False), (4, 4))
    state = step.given(*net.init(jax.random.key(0), {}))
    assert over_examples(el2n, net, state, IMAGES).shape == (B,)


CONFIGS = {
    "linear": models.Linear(),
    "mlp": models.MLP(width=4, dropout=0.5),
    "convnet, max": models.Convnet(channels=(4,), norm="batch", pool="max"),
    "convnet, group": models.Convnet(channels=(4,), norm="group", groups=2),
    "resnet 8": models.ResNet(depth=8, width=4),
    "resnet 50": models.ResNet(depth=50, width=4),
    "elman": models.RNN(width=4),
    "gru": models.RNN(width=4, cell="gru", depth=2),
    "token rnn": models.RNN(width=4, num_tokens=5),
    "transformer": models.Transformer(width=4, num_heads=2, depth=2, max_length=6, qk_norm=True),
    "tied transformer": models.Transformer(width=4, num_heads=2, depth=1, max_length=6, tied=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_all_models_in_evaluation_mode_are_let_through(name: str) -> None:
    text = "token" in name or "transformer" in name
    x = TOKENS if text else jnp.ones((B, 4, 4))
    y = TOKENS if "transformer" in name else Y
    module = models.make(CONFIGS[name], 5)
    net = task.classification(module, x.shape[1:], input_dtype=x.dtype)
    params, extras = jax.eval_shape(net.init, jax.random.key(0), {})
    batch = Batch(x=x, y=y, index=jnp.arange(B))

    def of_batch(state: Any, batch: Batch) -> Any:
        return net.evaluate(*state, batch, {}).loss

    ghost.check_independent(of_batch, (params, extras), batch)
    vmapped = lambda state, batch: jax.vmap(  # noqa: E731
        lambda one: of_batch(state, jax.tree.map(lambda x: x[None], one))[0]
    )(batch)
    ghost.check_independent(vmapped, (params, extras), batch)
    if extras:  # batch norm, in training mode
        with pytest.raises(ValueError, match="evaluation mode"):
            ghost.check_independent(
                lambda s, b: net.loss(*s, b, jax.random.key(0), {})[1][1].loss,
                (params, extras),
                batch,
            )
