import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from dynamics.models import Transformer, make

VOCABULARY = 7
CONFIG = Transformer(width=8, depth=1, num_heads=2, max_length=5, qk_norm=True)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 5)).astype(np.int32)


@pytest.fixture(scope="module")
def initialised(jit):
    """The module and its variables, compiled once for each config."""

    @functools.cache
    def made(config):
        module = make(config, VOCABULARY)
        init = jit(lambda key: module.init(key, jnp.asarray(TOKENS), train=False))
        return module, init(jax.random.key(0))

    return made


def test_causality(initialised, jit):
    """Logits at t have nonzero gradients for positions up to t, exactly zero ones after it."""
    module, variables = initialised(CONFIG)
    direction = jax.random.normal(jax.random.key(1), (VOCABULARY,))

    def projected(positions):
        params = {**variables["params"], "position_embedding": positions}
        logits = module.apply({"params": params}, jnp.asarray(TOKENS[:1]), train=False)
        return logits[0] @ direction

    jacobian = jit(jax.jacrev(projected))(variables["params"]["position_embedding"])
    influence = np.abs(np.asarray(jacobian)).max(-1)
    past = np.tril(np.ones((5, 5), bool))
    assert (influence[past] > 0).all()
    assert (influence[~past] == 0).all()


def test_shorter_sequences_have_the_same_logits(initialised, jit):
    module, variables = initialised(CONFIG)
    run = jit(lambda x: module.apply(variables, x, train=False))
    whole, part = (run(jnp.asarray(TOKENS[:, :t])) for t in (5, 3))
    np.testing.assert_allclose(whole[:, :3], part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_qk_norm_makes_the_scale_of_queries_irrelevant(qk_norm, initialised, jit):
    module, variables = initialised(dataclasses.replace(CONFIG, qk_norm=qk_norm))
    params = variables["params"]
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, p: 100 * p if path[-2:-1] and path[-2].key == "query" else p, params
    )

    @jit
    def run(params):
        return module.apply(
            {"params": params},
            jnp.asarray(TOKENS),
            train=False,
            capture_intermediates=lambda m, _: m.name in {"query", "query_norm", "key", "key_norm"},
        )

    (before, _), (after, seen) = run(params), run(scaled)
    suffix = "_norm" if qk_norm else ""
    attention = seen["intermediates"]["block_0"]["attention"]
    query, key = (
        np.asarray(attention[name + suffix]["__call__"][0]).reshape(3, 5, 2, 4)
        for name in ("query", "key")
    )
    largest = np.abs(np.einsum("bthk,bshk->bhts", query, key)).max() / np.sqrt(4)
    if qk_norm:
        np.testing.assert_allclose(before, after, rtol=1e-4, atol=1e-4)
        assert largest <= np.sqrt(4) * (1 + 1e-6)
    else:
        assert np.abs(before - after).max() > 0.01
        assert largest > np.sqrt(4)


def slow(config, params, tokens):
    """The network of the docstrings in float64 numpy, attention one position at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def dense(q, x):
        return x @ q["kernel"] + q.get("bias", 0)

    def norm(q, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * q["scale"] + q.get("bias", 0)

    def attention(q, x):
        heads = (*x.shape[:2], config.num_heads, -1)
        query, key, value = (dense(q[n], x).reshape(heads) for n in ("query", "key", "value"))
        if config.qk_norm:
            query, key = norm(q["query_norm"], query), norm(q["key_norm"], key)
        out = np.zeros_like(value)
        for b, t, h in np.ndindex(value.shape[:3]):
            weights = special.softmax(key[b, : t + 1, h] @ query[b, t, h] / value.shape[3] ** 0.5)
            out[b, t, h] = weights @ value[b, : t + 1, h]
        return dense(q["out"], out.reshape(x.shape))

    def mlp(q, x):
        x = dense(q["up"], x)
        return dense(q["down"], x * special.ndtr(x))

    h = p["token_embedding"][tokens] + p["position_embedding"][: tokens.shape[1]]
    for i in range(config.depth):
        block = p[f"block_{i}"]
        h = h + attention(block["attention"], norm(block["attention_norm"], h))
        h = h + mlp(block["mlp"], norm(block["mlp_norm"], h))
    h = norm(p["final_norm"], h)
    return h @ p["token_embedding"].T if config.tied else dense(p["head"], h)


@pytest.mark.parametrize("fields", [{"depth": 2}, {"tied": True, "bias": True, "qk_norm": False}])
def test_against_numpy(fields, initialised, jit):
    config = dataclasses.replace(CONFIG, **fields)
    module, variables = initialised(config)
    assert ("head" in variables["params"]) != config.tied
    moved = jax.tree.map(lambda p: p + 0.1, variables)  # so that biases and scales count
    got = jit(lambda x: module.apply(moved, x, train=False))(jnp.asarray(TOKENS))
    expected = slow(config, moved["params"], TOKENS)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_random_in_training_only(initialised, jit):
    _, variables = initialised(CONFIG)
    dropping = make(dataclasses.replace(CONFIG, dropout=0.5), VOCABULARY)

    @jit
    def outputs(x):
        keys = jax.random.split(jax.random.key(1), 2)
        train = lambda k: dropping.apply(variables, x, train=True, rngs={"dropout": k})  # noqa: E731
        plain = make(CONFIG, VOCABULARY).apply(variables, x, train=True)
        return jax.vmap(train)(keys), dropping.apply(variables, x, train=False), plain

    noisy, evaluated, plain = outputs(jnp.asarray(TOKENS))
    assert not np.array_equal(noisy[0], noisy[1])
    np.testing.assert_array_equal(evaluated, plain)
