import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special

from dynamics.models import Linear
from dynamics.models.layers import Conv, Dense, activate, gain, normalise

X = np.random.default_rng(0).normal(1, 2, (5, 3, 2, 4)).astype(np.float32)


class Normalised(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, *, train):
        return normalise(x, self.kind, name="norm", train=train, groups=2)


def test_activations():
    x = np.linspace(-3, 3, 13)
    expected = {
        "relu": np.maximum(x, 0),
        "gelu": x * (1 + special.erf(x / math.sqrt(2))) / 2,
        "silu": x / (1 + np.exp(-x)),
        "tanh": np.tanh(x),
        "erf": special.erf(x),
        "identity": x,
    }
    for kind, y in expected.items():
        np.testing.assert_allclose(
            activate(jnp.asarray(x, jnp.float32), kind), y, rtol=1e-5, atol=1e-6
        )


def test_gain_preserves_the_second_moment_of_relu():
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    second = weights @ np.maximum(nodes, 0) ** 2 / weights.sum()
    assert gain("relu") ** 2 * second == pytest.approx(1)
    assert gain("tanh") == gain("identity") == 1


def test_norms_against_numpy():
    def standardised(x, axes, eps):
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        return (x - mean) / np.sqrt(var + eps)

    x = X.astype(np.float64)
    expected = {
        "batch": standardised(x, (0, 1, 2), 1e-5),
        "group": standardised(x.reshape(5, 3, 2, 2, 2), (1, 2, 4), 1e-5).reshape(x.shape),
        "layer": standardised(x, (3,), 1e-6),
        "none": x,
    }
    for kind, y in expected.items():
        module = Normalised(kind)
        variables = module.init(jax.random.key(0), jnp.asarray(X), train=False)
        got, _ = module.apply(variables, jnp.asarray(X), train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_running_averages():
    module = Normalised("batch")
    variables = module.init(jax.random.key(0), jnp.asarray(X), train=False)
    for _ in range(2):
        _, new = module.apply(variables, jnp.asarray(X), train=True, mutable=["batch_stats"])
        variables = {**variables, **new}
    stats = {name: np.asarray(value) for name, value in variables["batch_stats"]["norm"].items()}
    np.testing.assert_allclose(stats["mean"], 0.19 * X.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.81 + 0.19 * X.var((0, 1, 2)), rtol=1e-5)
    got = module.apply(variables, jnp.asarray(X), train=False)
    expected = (X - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_against_numpy(size, stride):
    module = Conv(3, Linear(), size=size, stride=stride)
    x = X[:, :, :, :2]
    y, variables = module.init_with_output(jax.random.key(0), jnp.asarray(x))
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    expected = np.zeros((5, math.ceil(3 / stride), math.ceil(2 / stride), 3))
    for i, j in np.ndindex(expected.shape[1:3]):
        window = padded[:, i * stride : i * stride + size, j * stride : j * stride + size]
        expected[:, i, j] = np.tensordot(window, kernel, 3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parametrisation", ["standard", "ntk"])
@pytest.mark.parametrize(("layer", "fan_in"), [(Dense, 4), (Conv, 36)])
def test_weights_of_both_parametrisations(layer, fan_in, parametrisation):
    """Standard deviations are as documented, and the parametrisations share their Gaussians."""
    x, key = jnp.asarray(X), jax.random.key(0)

    def kernel(**fields):
        return layer(300, Linear(**fields), gain=3.0).init(key, x)["params"]["kernel"]

    gaussian = np.asarray(kernel(parametrisation="ntk"))
    assert abs(gaussian.std() - 1) < 4 / np.sqrt(2 * gaussian.size)
    std = 3.0 / math.sqrt(fan_in) if parametrisation == "standard" else 1.0
    found = kernel(parametrisation=parametrisation, init_scale=0.5)
    np.testing.assert_allclose(found, 0.5 * std * gaussian, rtol=1e-5)
