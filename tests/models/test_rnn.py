import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import RNN, make

X = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 9, (3, 6)).astype(np.int32)


def initialised(config, x, jit):
    """Moved off the initialisation, so that biases count."""
    module = make(config, 2)
    variables = jit(lambda x: module.init(jax.random.key(0), x, train=False))(jnp.asarray(x))
    variables = jax.tree.map(lambda p: p + 0.1, variables)
    return variables, jit(lambda x: module.apply(variables, x, train=False))


def slow(config, params, x):
    """The recurrences of the docstring, one step and one layer at a time, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    n = config.width
    for i in range(config.depth):
        layer, states, h = p[f"layer_{i}"], [], np.zeros((x.shape[0], n))
        for t in range(x.shape[1]):
            a = x[:, t] @ layer["input"]["kernel"] + layer["input"]["bias"]
            b = h @ layer["recurrent"]["kernel"]
            if config.cell == "elman":
                h = np.tanh(a + b)
            else:
                r = 1 / (1 + np.exp(-a[:, :n] - b[:, :n]))
                z = 1 / (1 + np.exp(-a[:, n : 2 * n] - b[:, n : 2 * n]))
                h = (1 - z) * np.tanh(a[:, 2 * n :] + r * b[:, 2 * n :]) + z * h
            states.append(h)
        x = np.stack(states, 1)
    return x[:, -1] @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize("cell", ["elman", "gru"])
def test_against_a_loop(cell, jit):
    config = RNN(cell=cell, width=5, depth=2)
    variables, apply = initialised(config, X, jit)
    got = apply(jnp.asarray(X))
    np.testing.assert_allclose(got, slow(config, variables["params"], X), rtol=1e-5, atol=1e-6)


def test_images_are_read_by_rows(jit):
    _, apply = initialised(RNN(width=5), X, jit)
    x = jnp.asarray(X)
    for image in (x[..., None], x.reshape(3, 6, 2, 2)):
        np.testing.assert_array_equal(apply(image), apply(x))


def test_tokens_are_rows_of_the_embedding(jit):
    config = RNN(width=5, num_tokens=9)
    variables, apply = initialised(config, TOKENS, jit)
    embedded = np.asarray(variables["params"]["token_embedding"])[TOKENS]
    got = apply(jnp.asarray(TOKENS))
    np.testing.assert_allclose(
        got, slow(config, variables["params"], embedded), rtol=1e-5, atol=1e-6
    )
    outside = apply(jnp.full((3, 6), 9))
    assert np.isnan(outside).all()
