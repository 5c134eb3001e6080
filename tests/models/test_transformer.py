import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import Transformer, make
from dynamics.models.transformer import causal_attention

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


def test_attention_against_a_loop():
    query, key, value = (np.random.default_rng(i).normal(size=(2, 4, 3, 5)) for i in range(3))
    expected = np.zeros_like(value)
    for b, t, h in np.ndindex(2, 4, 3):
        weights = np.exp([query[b, t, h] @ key[b, s, h] / np.sqrt(5) for s in range(t + 1)])
        expected[b, t, h] = weights / weights.sum() @ value[b, : t + 1, h]
    arrays = (jnp.asarray(a, jnp.float32) for a in (query, key, value))
    np.testing.assert_allclose(causal_attention(*arrays), expected, rtol=1e-5, atol=1e-6)


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


def test_tied_logits_are_products_with_the_embeddings(initialised, jit):
    module, variables = initialised(dataclasses.replace(CONFIG, tied=True, bias=True))
    assert "head" not in variables["params"]
    run = jit(
        lambda x: module.apply(
            variables, x, train=False, capture_intermediates=lambda m, _: m.name == "final_norm"
        )
    )
    logits, seen = run(jnp.asarray(TOKENS))
    h = np.asarray(seen["intermediates"]["final_norm"]["__call__"][0])
    expected = h @ np.asarray(variables["params"]["token_embedding"]).T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


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
