import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.models import Convnet, make
from dynamics.models.convnet import pool
from dynamics.models.layers import Conv

X = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)


@pytest.mark.parametrize(("kind", "reduce"), [("average", np.mean), ("max", np.max)])
def test_pool_against_numpy(kind, reduce):
    y = pool(jnp.asarray(X), kind)
    assert y.shape == (2, 2, 3, 3)
    for i, j in np.ndindex(2, 3):
        square = X[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(y[:, i, j], reduce(square, (1, 2)), rtol=1e-5)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_one_block_is_conv_norm_activation_pool(norm, jit):
    config = Convnet(channels=(4,), norm=norm, activation="tanh")
    module, x = make(config, 3), jnp.asarray(X[..., 0])  # the channel axis is added
    y, variables = jit(lambda x: module.init_with_output(jax.random.key(0), x, train=False))(x)
    params = variables["params"]
    conv = Conv(4, config, bias=norm == "none")
    h = jit(lambda x: conv.apply({"params": params["conv_0"]}, x))(x[..., None])
    h = np.tanh(h / (1 if norm == "none" else np.sqrt(1 + 1e-5)))  # the first running average
    h = (h[:, 0:4:2, 0:6:2] + h[:, 1:4:2, 0:6:2] + h[:, 0:4:2, 1:6:2] + h[:, 1:4:2, 1:6:2]) / 4
    expected = h.mean((1, 2)) @ np.asarray(params["head"]["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
