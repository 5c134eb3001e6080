"""Every model of ``dynamics.models``: GraNd, products and what is factored, against gradients."""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ghost as reference

from dynamics import ghost, models, step, task
from dynamics.scores.grand import gradients, grand, grand_last_layer
from dynamics.types import Batch

B, K, V, T = 4, 3, 5, 6
TRANSFORMER = {"width": 8, "depth": 1, "num_heads": 2, "max_length": 8}
CONFIGS: dict[str, Any] = {
    "linear": models.Linear(),
    "linear, ntk, no bias": models.Linear(bias=False, parametrisation="ntk"),
    "mlp": models.MLP(width=5, depth=2),
    "mlp, ntk, no bias": models.MLP(width=5, depth=1, bias=False, parametrisation="ntk"),
    "convnet": models.Convnet(channels=(3, 4)),
    "convnet, no bias": models.Convnet(channels=(3,), bias=False, activation="erf"),
    "convnet, batch": models.Convnet(channels=(3,), norm="batch", pool="max"),
    "convnet, group": models.Convnet(channels=(4,), norm="group", groups=2, pool="max"),
    "convnet, ntk": models.Convnet(channels=(3,), parametrisation="ntk"),
    "resnet 8": models.ResNet(depth=8, width=4),
    "resnet 8, group, ntk": models.ResNet(
        depth=8, width=4, norm="group", groups=2, parametrisation="ntk"
    ),
    "resnet 18": models.ResNet(depth=18, width=4),
    "resnet 50": models.ResNet(depth=50, width=4),
    "elman": models.RNN(width=5),
    "elman, ntk": models.RNN(width=5, parametrisation="ntk", activation="relu"),
    "gru": models.RNN(width=5, cell="gru", depth=2),
    "token rnn": models.RNN(width=5, cell="gru", num_tokens=V),
    "transformer": models.Transformer(**TRANSFORMER | {"depth": 2}),
    "transformer, tied": models.Transformer(**TRANSFORMER, tied=True),
    "transformer, qk_norm": models.Transformer(**TRANSFORMER, qk_norm=True),
    "transformer, ntk": models.Transformer(
        **TRANSFORMER, tied=True, bias=True, parametrisation="ntk"
    ),
}
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n == "resnet 50" else n for n in CONFIGS]


OPTIMISED = {"xla_backend_optimization_level": 3}


def jit(name: str) -> Any:
    """Without optimisation, XLA may not find the maximum among the numbers it is the maximum of:
    it computes them again, otherwise rounded, and the gradient is lost."""
    pooled = "max" in repr(CONFIGS[name]).split("pool=")[-1]
    return functools.partial(jax.jit, compiler_options=OPTIMISED) if pooled else reference.jit


@functools.cache
def made(name: str) -> tuple[Any, Any, Batch]:
    """A task, a state in which nothing is at its special initial value, and a batch."""
    config, generator = CONFIGS[name], np.random.default_rng(list(CONFIGS).index(name))

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(generator.normal(size=shape), jnp.float32)

    text = getattr(config, "num_tokens", None) or isinstance(config, models.Transformer)
    x = jnp.asarray(generator.integers(0, V, (B, T)), jnp.int32) if text else normal(B, 8, 8)
    outputs = V if isinstance(config, models.Transformer) else K
    shape = (B, T) if isinstance(config, models.Transformer) else (B,)
    y = jnp.asarray(generator.integers(0, outputs, shape), jnp.int32)
    net = task.classification(models.make(config, outputs), x.shape[1:], input_dtype=x.dtype)

    def moved(leaf: Any) -> jax.Array:
        noise = normal(*leaf.shape)
        if leaf.ndim < 2:
            return 1 + 0.3 * noise  # of batch statistics, norms, and biases
        if config.parametrisation == "ntk":
            return noise
        return noise / math.sqrt(math.prod(leaf.shape[:-1]))

    params, extras = jax.tree.map(moved, jax.eval_shape(net.init, jax.random.key(0), {}))
    extras = jax.tree.map(jnp.abs, extras)
    return net, step.given(params, extras), Batch(x=x, y=y, index=jnp.arange(B))


@functools.cache
def wanted(name: str) -> np.ndarray:
    net, state, batch = made(name)

    def loss(params: Any, extras: Any, one: Any) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], one)
        return net.evaluate(params, extras, alone, {}).loss[0]

    return reference.gradients(loss, state.params, state.extras, batch, jit=jit(name))


@functools.cache
def found(name: str) -> tuple[np.ndarray, np.ndarray]:
    net, state, batch = made(name)

    def run(state: Any, batch: Batch) -> Any:
        each = gradients(net, state, batch)
        return ghost.norms(each), ghost.products(each, each)

    norms, products = jit(name)(run)(state, batch)
    return np.asarray(norms), np.asarray(products)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_products_are_those_of_the_gradients(name: str) -> None:
    each, (norms, products) = wanted(name), found(name)
    np.testing.assert_allclose(norms, reference.norms(each), rtol=1e-5)
    inner = each @ each.T
    np.testing.assert_allclose(products, inner, rtol=1e-5, atol=1e-6 * np.abs(inner).max())


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_is_factored(name: str, caplog: Any) -> None:
    """And only vectors, which are added or multiplied, have their gradients made; no warning."""
    net, state, batch = made(name)
    with caplog.at_level(logging.WARNING):
        each = jax.eval_shape(functools.partial(gradients, net), state, batch)
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    sizes = {jax.tree_util.keystr(p, simple=True, separator="/"): x.ndim for p, x in leaves}
    matrices = {n for n, ndim in sizes.items() if ndim > 1 and "position" not in n}
    assert set(each.parts) == matrices
    assert set(each.gradients) == sizes.keys() - each.parts.keys()
    assert not caplog.records


@pytest.mark.parametrize("name", ["linear", "mlp", "convnet, batch", "gru", "transformer, tied"])
def test_their_mean_is_the_gradient_of_the_batch(name: str) -> None:
    """E6: the mean over i and j of <g_i, g_j> is ||mean gradient||^2."""
    net, state, batch = made(name)

    def loss(params: Any) -> jax.Array:
        return net.evaluate(params, state.extras, batch, {}).loss.mean()

    whole = jax.tree.leaves(jit(name)(jax.grad(loss))(state.params))
    length = sum((np.asarray(g, np.float64) ** 2).sum() for g in whole)
    np.testing.assert_allclose(found(name)[1].mean(dtype=np.float64), length, rtol=1e-5)


@pytest.mark.parametrize("name", ["linear", "mlp", "convnet", "resnet 8", "gru"])
def test_grand_of_the_last_layer(name: str) -> None:
    """E2: EL2N sqrt(||h||^2 + 1), h what the layer reads: a column of its gradient tells."""
    net, state, batch = made(name)
    norms = reference.jit(functools.partial(grand_last_layer, net))(state, batch)
    head = jax.tree.map(jnp.zeros_like, state.params["head"])

    def logits(head: Any) -> jax.Array:
        return net.evaluate(state.params | {"head": head}, state.extras, batch, {}).logits[:, 0]

    h = reference.jit(jax.jacrev(logits))(head)["kernel"][..., 0]
    z = net.evaluate(state.params, state.extras, batch, {}).logits
    error = np.linalg.norm(jax.nn.softmax(z) - jax.nn.one_hot(batch.y, K), axis=1)
    np.testing.assert_allclose(norms, error * np.sqrt((h**2).sum(axis=1) + 1), rtol=1e-5)


def test_a_name_that_nothing_has_is_refused() -> None:
    net, state, batch = made("mlp")
    names = "'dense_0/bias', 'dense_0/kernel', .*'head/kernel'"
    with pytest.raises(
        ValueError, match=f"no parameter has 'tail' in its path; there are .{names}"
    ):
        grand(net, state, batch, only="tail")


@pytest.mark.parametrize("only", ["kernel", "dense_1/", "bias$", "^head"])
def test_some_parameters(only: str) -> None:
    net, state, batch = made("mlp")
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]
    sizes = [x.size for _, x in leaves]
    split = np.split(wanted("mlp"), np.cumsum(sizes)[:-1], axis=1)
    test = {"kernel": "kernel", "dense_1/": "dense_1/", "bias$": "bias", "^head": "head"}[only]
    chosen = np.concatenate([g for n, g in zip(names, split, strict=True) if test in n], axis=1)
    norms = reference.jit(functools.partial(grand, net, only=only))(state, batch)
    np.testing.assert_allclose(norms, reference.norms(chosen), rtol=1e-5)
