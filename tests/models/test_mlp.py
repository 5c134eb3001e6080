import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import MLP, Linear, make

X = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)


def test_linear_is_a_matrix():
    module = make(Linear(), 4)
    y, variables = module.init_with_output(jax.random.key(0), jnp.asarray(X), train=False)
    head = variables["params"]["head"]
    head["bias"] = jnp.arange(4.0)
    y = module.apply(variables, jnp.asarray(X), train=True)
    np.testing.assert_allclose(
        y, X.reshape(7, 6) @ np.asarray(head["kernel"]) + np.arange(4), rtol=1e-5, atol=1e-6
    )
    bare = make(Linear(bias=False), 4).init(jax.random.key(0), jnp.asarray(X), train=False)
    assert set(bare["params"]["head"]) == {"kernel"}


@pytest.mark.parametrize("parametrisation", ["standard", "ntk"])
def test_mlp_against_numpy(parametrisation):
    module = make(MLP(width=5, depth=2, parametrisation=parametrisation), 4)
    variables = module.init(jax.random.key(0), jnp.asarray(X), train=False)
    moved = jax.tree.map(lambda p: p + 0.1, variables)
    p = {n: (np.asarray(v["kernel"]), np.asarray(v["bias"])) for n, v in moved["params"].items()}
    h = X.reshape(7, 6)
    for name, g in (("dense_0", 2**0.5), ("dense_1", 2**0.5), ("head", 1)):
        factor = g / np.sqrt(h.shape[1]) if parametrisation == "ntk" else 1
        h = h @ p[name][0] * factor + p[name][1]
        h = h if name == "head" else np.maximum(h, 0)
    got = module.apply(moved, jnp.asarray(X), train=False)
    np.testing.assert_allclose(got, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [4, 16])
def test_logits_have_unit_variance_at_any_width(width, jit):
    """E over weights of a logit's square is |x|^2 / D, whatever the widths and the depth."""
    module = make(MLP(width=width, depth=3), 2)
    x = jnp.asarray(X[:1])
    x = x * jnp.sqrt(x.size / (x**2).sum())

    def square(key):
        y = module.apply(module.init(key, x, train=False), x, train=False)
        return (y**2).mean()

    squares = jit(jax.vmap(square))(jax.random.split(jax.random.key(0), 4000))
    error = float(squares.std()) / np.sqrt(len(squares))
    assert abs(float(squares.mean()) - 1) < 4 * error and error < 0.1


def test_dropout_is_random_in_training_only(jit):
    module = make(MLP(width=16, depth=1, dropout=0.5, bias=False, activation="identity"), 3)
    x = jnp.asarray(X)
    variables = module.init(jax.random.key(0), x, train=False)
    clean = module.apply(variables, x, train=False)
    keys = jax.random.split(jax.random.key(1), 1000)
    noisy = jax.vmap(lambda key: module.apply(variables, x, train=True, rngs={"dropout": key}))
    y = np.asarray(jit(noisy)(keys))
    assert not np.array_equal(y[0], y[1])
    assert (np.abs(y.mean(0) - clean) < 5 * y.std(0) / np.sqrt(len(y))).all()
