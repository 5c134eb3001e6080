import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import Convnet, make
from dynamics.models.convnet import pool

X = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)


@pytest.mark.parametrize(("kind", "reduce"), [("average", np.mean), ("max", np.max)])
def test_pool_against_numpy(kind, reduce):
    y = pool(jnp.asarray(X), kind)
    assert y.shape == (2, 2, 3, 3)
    for i, j in np.ndindex(2, 3):
        square = X[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(y[:, i, j], reduce(square, (1, 2)), rtol=1e-5)


def test_a_missing_channel_axis_is_added():
    module, x = make(Convnet(channels=(2,)), 3), jnp.asarray(X[..., 0])
    variables = module.init(jax.random.key(0), x, train=False)
    assert variables["params"]["conv_0"]["kernel"].shape == (3, 3, 1, 2)
    a, b = (module.apply(variables, v, train=False) for v in (x, x[..., None]))
    np.testing.assert_array_equal(a, b)


def test_mean_over_space_forgets_the_place():
    """Without padding effects: an image and its shift by one pool have the same logits."""
    module = make(Convnet(channels=(4,)), 3)
    x = np.zeros((1, 12, 12, 1), np.float32)
    x[:, 4:8, 4:8] = X[:1, :4, :4, :1]
    variables = module.init(jax.random.key(0), jnp.asarray(x), train=False)
    a, b = (
        module.apply(variables, jnp.asarray(v), train=False) for v in (x, np.roll(x, 2, (1, 2)))
    )
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
