"""Networks that were not made here: a function, a flax module, a module that is a pytree."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from references import losses as by_hand
from references import scores as reference

from dynamics import step, task
from dynamics.data import of_arrays
from dynamics.data.rows import take
from dynamics.scores import el2n, grand, over_examples
from dynamics.types import Dataset

N, K = 7, 3
GENERATOR = np.random.default_rng(0)
LABELS = GENERATOR.integers(0, K, N)
IMAGES = of_arrays(GENERATOR.normal(size=(N, 6, 6, 2)).astype(np.float32), LABELS)
TOKENS = of_arrays(GENERATOR.integers(0, 9, (N, 5)), LABELS)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape) / np.sqrt(np.prod(shape[:-1])), jnp.float32)


def plain() -> Any:
    """A dictionary of matrices."""

    def predict(p: Any, x: Any) -> Any:
        h = jax.nn.relu(x.reshape(len(x), -1) @ p["w1"] + p["b1"][None])
        return h @ p["w2"] * jax.nn.softplus(p["temperature"])

    params = {"w1": normal(72, 8), "b1": normal(8), "w2": normal(8, K), "temperature": normal()}
    return predict, params, IMAGES, {"w1", "w2"}


def listed() -> Any:
    """A list of pairs and None, as one writes it; numpy arrays."""

    def predict(p: Any, x: Any) -> Any:
        h = x.reshape(len(x), -1)
        for w, b in p[:-1]:
            h = jnp.tanh(jnp.einsum("bi,io->bo", h, w) + b)
        return jnp.einsum("bi,oi->bo", h, p[-1][0])

    layers = [(normal(72, 8), normal(1, 8)), (normal(8, 8), normal(1, 8)), (normal(K, 8), None)]
    return predict, jax.tree.map(np.asarray, layers), IMAGES, {"0/0", "1/0", "2/0"}


def flax() -> Any:
    """With its own layers, called as flax modules are."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
            x = nn.LayerNorm()(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x))
            x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=3)(x)).mean((1, 2))
            x = nn.DenseGeneral((2, 3))(x)
            x = nn.DenseGeneral(5, axis=(-2, -1))(x)
            return nn.Dense(K, param_dtype=jnp.float32)(x)

    net = Net()
    params = net.init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
    names = ("Conv_0", "ConvTranspose_0", "Conv_1", "DenseGeneral_0", "DenseGeneral_1", "Dense_0")
    return net.apply, params, IMAGES, {f"params/{n}/kernel" for n in names}


def attention() -> Any:
    """flax's own attention, embedding and tied output."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            embed = nn.Embed(9, 6)
            h = embed(x)
            h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h))
            return embed.attend(nn.LayerNorm()(h).mean(axis=1))[:, :K]

    net = Net()
    params = net.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32))
    heads = ("query", "key", "value", "out")
    names = {f"params/MultiHeadDotProductAttention_0/{n}/kernel" for n in heads}
    return net.apply, params, TOKENS, {"params/Embed_0/embedding"} | names


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """As equinox writes it: weight [out, in], for one example."""

    weight: Any
    bias: Any
    features: int = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any) -> Any:
        y = self.weight @ x
        return y if self.bias is None else y + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Conv:
    """Channels first, of one image without a batch."""

    weight: Any

    def __call__(self, x: Any) -> Any:
        return jax.lax.conv_general_dilated(x[None], self.weight, (1, 1), "SAME")[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    conv: Conv
    layers: list[Linear]
    scale: Any
    steps: Any  # an integer that nobody differentiates
    activation: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, x: Any) -> Any:
        h = self.activation(self.conv(x.transpose(2, 0, 1))).mean((1, 2)) * self.scale
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h)


def module() -> Any:
    """One example at a time; ``jax.vmap`` makes the batch."""
    layers = [Linear(normal(5, 4), normal(5), 5), Linear(normal(K, 5), None, K)]
    net = Module(Conv(normal(4, 2, 3, 3)), layers, normal(4), jnp.int32(3), jnp.tanh)
    names = {"conv/weight", "layers/0/weight", "layers/1/weight"}
    return lambda net, x: jax.vmap(net)(x), net, IMAGES, names


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Reader:
    """Reads one token after another."""

    table: Any
    layer: Linear

    def __call__(self, tokens: Any) -> Any:
        return self.layer(jnp.tanh(jax.vmap(lambda t: self.table[t])(tokens)).sum(axis=0))


def reader() -> Any:
    net = Reader(normal(9, 4), Linear(normal(K, 4), normal(K), K))
    return lambda net, x: jax.vmap(net)(x), net, TOKENS, {"table", "layer/weight"}


def looped() -> Any:
    """One example at a time, for memory."""
    predict, params, data, names = plain()
    return lambda p, x: jax.lax.map(lambda x: predict(p, x[None])[0], x), params, data, names


MAKERS = {m.__name__: m for m in (plain, listed, flax, attention, module, reader, looped)}


@pytest.mark.parametrize("name", MAKERS)
def test_scores_of_a_network_made_elsewhere(name: str, caplog: Any) -> None:
    predict, params, data, factored = MAKERS[name]()
    net, state = task.of_function(predict), step.given(params)
    batch = take(jax.tree.map(jnp.asarray, data), jnp.arange(N))
    logits = net.evaluate(params, {}, batch, {}).logits
    wanted = [by_hand.el2n([float(v) for v in z], y) for z, y in zip(logits, LABELS, strict=True)]
    np.testing.assert_allclose(over_examples(el2n, net, state, data), wanted, rtol=1e-5)
    if name == "module":  # the reference differentiates every leaf
        params = dataclasses.replace(params, steps=jnp.float32(3))
    wanted = reference.grand(net, step.given(params), batch)
    with caplog.at_level(logging.WARNING):
        found = over_examples(grand, net, state, data, batch_size=4)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    names = {jax.tree_util.keystr(p, simple=True, separator="/"): jnp.ndim(x) for p, x in leaves}
    biases = ("bias", "0/1", "1/1")
    matrices = {n for n, ndim in names.items() if ndim > 1 and not n.endswith(biases)}
    warned = {n for n in matrices if repr(n) in caplog.text}
    assert matrices - warned == factored


def test_to_train_it_init_is_needed() -> None:
    predict, params, data, _ = plain()
    with pytest.raises(ValueError, match="needs init="):
        task.of_function(predict).init(jax.random.key(0), {})
    assert isinstance(data, Dataset) and params
