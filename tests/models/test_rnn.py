import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import RNN, make

X = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
TOKENS = np.random.default_rng(0).integers(0, 9, (3, 6)).astype(np.int32)


def initialised(config, x):
    """Moved off the initialisation, so that biases count."""
    module = make(config, 2)
    variables = module.init(jax.random.key(0), jnp.asarray(x), train=False)
    return module, jax.tree.map(lambda p: p + 0.1, variables)


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
def test_against_a_loop(cell):
    config = RNN(cell=cell, width=5, depth=2)
    module, variables = initialised(config, X)
    got = jax.jit(lambda x: module.apply(variables, x, train=False))(jnp.asarray(X))
    np.testing.assert_allclose(got, slow(config, variables["params"], X), rtol=1e-5, atol=1e-6)


def test_images_are_read_by_rows():
    module, variables = initialised(RNN(width=5), X)
    x = jnp.asarray(X)
    expected = module.apply(variables, x, train=False)
    for image in (x[..., None], x.reshape(3, 6, 2, 2)):
        np.testing.assert_array_equal(module.apply(variables, image, train=False), expected)


def test_tokens_are_rows_of_the_embedding():
    config = RNN(width=5, num_tokens=9)
    module, variables = initialised(config, TOKENS)
    embedded = np.asarray(variables["params"]["token_embedding"])[TOKENS]
    got = module.apply(variables, jnp.asarray(TOKENS), train=False)
    np.testing.assert_allclose(
        got, slow(config, variables["params"], embedded), rtol=1e-5, atol=1e-6
    )
    outside = module.apply(variables, jnp.full((1, 6), 9), train=False)
    assert np.isnan(outside).all()
