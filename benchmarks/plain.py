"""The same training written by hand, in jax and in PyTorch; nothing of ours is imported."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Lap = Callable[[], None]
Side = Callable[[Lap], None]

LEARNING_RATE, MOMENTUM, CLASSES = 0.02, 0.9, 10


class Plain(NamedTuple):
    """Examples as stored and the sizes of a net: an MLP, or a convnet if there are channels."""

    x: np.ndarray
    y: np.ndarray
    mean: float
    std: float
    batch_size: int
    widths: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()

    def rows(self, steps: int) -> np.ndarray:
        """A permutation for each epoch, as the batches of so many steps: i32[steps, B]."""
        draw, n, b = np.random.default_rng(0), len(self.x), self.batch_size
        epochs = [draw.permutation(n)[: n // b * b] for _ in range(-(-steps // (n // b)))]
        return np.concatenate(epochs).reshape(-1, b)[:steps].astype(np.int32)


def scan(job: Plain, steps: int) -> Side:
    """One jitted scan a lap over a permutation made beforehand; the losses are fetched."""

    def run(lap: Lap) -> None:
        carry, step, x, y = _begin(job)
        rows = jnp.asarray(job.rows(steps))
        loop = jax.jit(
            lambda carry, rows, x, y: jax.lax.scan(lambda c, r: step(c, r, x, y), carry, rows),
            donate_argnums=0,
        )
        while True:
            carry, losses = loop(carry, rows, x, y)
            jax.device_get(losses)
            lap()

    return run


def calls(job: Plain, steps: int) -> Side:
    """The jitted step called ``steps`` times a lap; the losses are fetched at its end."""

    def run(lap: Lap) -> None:
        carry, step, x, y = _begin(job)
        rows = job.rows(steps)
        step = jax.jit(step, donate_argnums=0)
        while True:
            losses = []
            for i in range(steps):
                carry, loss = step(carry, rows[i], x, y)
                losses.append(loss)
            jax.device_get(losses)
            lap()

    return run


def _begin(job: Plain) -> tuple[Any, Callable, jax.Array, jax.Array]:
    weights = params(job)
    logits = _convnet if job.channels else mlp

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        z = logits(params, x)
        return (jax.nn.logsumexp(z, axis=1) - jnp.take_along_axis(z, y[:, None], 1)[:, 0]).mean()

    def step(carry: Any, rows: jax.Array, x: jax.Array, y: jax.Array) -> tuple:
        params, trace = carry
        batch = (x[rows].astype(jnp.float32) - job.mean) / job.std
        value, grads = jax.value_and_grad(loss)(params, batch, y[rows])
        trace = jax.tree.map(lambda t, g: MOMENTUM * t + g, trace, grads)
        params = jax.tree.map(
            lambda p, t, g: p - LEARNING_RATE * (g + MOMENTUM * t), params, trace, grads
        )
        return (params, trace), value

    carry = (weights, jax.tree.map(jnp.zeros_like, weights))
    return carry, step, jnp.asarray(job.x), jnp.asarray(job.y)


def params(job: Plain) -> list[tuple[jax.Array, jax.Array]]:
    """A (weights, bias) for every layer, the output layer last."""
    draw = np.random.default_rng(0)

    def layer(*shape: int) -> tuple[jax.Array, jax.Array]:
        w = draw.normal(size=shape, scale=math.sqrt(2 / math.prod(shape[:-1])))
        return jnp.asarray(w, jnp.float32), jnp.zeros(shape[-1])

    if job.channels:
        sizes = [job.x.shape[-1], *job.channels]
        hidden = [layer(3, 3, a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    else:
        sizes = [math.prod(job.x.shape[1:]), *job.widths]
        hidden = [layer(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return [*hidden, layer(sizes[-1], CLASSES)]


def mlp(params: Any, x: jax.Array) -> jax.Array:
    *hidden, (w_out, b_out) = params
    h = x.reshape(x.shape[0], -1)
    for w, b in hidden:
        h = jax.nn.relu(h @ w + b)
    return h @ w_out + b_out


def _convnet(params: Any, x: jax.Array) -> jax.Array:
    *convolutions, (w_out, b_out) = params
    h, layout = x, ("NHWC", "HWIO", "NHWC")
    for w, b in convolutions:
        h = jax.lax.conv_general_dilated(h, w, (1, 1), "SAME", dimension_numbers=layout)
        n, height, width, c = h.shape
        squares = jax.nn.relu(h + b).reshape(n, height // 2, 2, width // 2, 2, c)
        h = squares.mean((2, 4))
    return h.mean((1, 2)) @ w_out + b_out


def torch_loop(job: Plain, steps: int, threads: int) -> Side:
    """Normalised tensors in memory, torch.randperm, SGD; no loader, losses not kept. MLPs only."""

    def run(lap: Lap) -> None:
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # as XLA does
        x = torch.from_numpy((job.x.reshape(len(job.x), -1) - np.float32(job.mean)) / job.std)
        y = torch.from_numpy(job.y).long()
        sizes, layers = [x.shape[1], *job.widths], []
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
        net = torch.nn.Sequential(*layers, torch.nn.Linear(sizes[-1], CLASSES)).train()
        optimizer = torch.optim.SGD(
            net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True
        )
        loss, done, size = torch.nn.CrossEntropyLoss(), 0, job.batch_size
        while True:
            order = torch.randperm(len(x))
            for first in range(0, len(x) - size + 1, size):
                rows = order[first : first + size]
                optimizer.zero_grad(set_to_none=True)
                loss(net(x[rows]), y[rows]).backward()
                optimizer.step()
                done += 1
                if done % steps == 0:
                    lap()
                    torch.set_num_threads(threads)  # another side may have set its own

    return run
