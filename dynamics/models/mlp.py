"""The linear model and the multilayer perceptron."""

import math

from flax import linen as nn
from jaxtyping import Array, Float, Num

from dynamics.config import Count, Positive, frozen
from dynamics.models.layers import (
    Activation,
    Dense,
    DropRate,
    Parametrisation,
    Precision,
    activate,
    floats,
    gain,
)


@frozen
class Linear:
    """logits = x W + b on the flattened input."""

    bias: bool = True
    """Whether logits have an additive bias."""
    parametrisation: Parametrisation = "standard"
    """Where 1/sqrt(fan_in) sits: in the initial weights (standard) or in the forward pass (ntk)."""
    init_scale: Positive = 1.0
    """Factor on the standard deviation of the initial weights."""
    zero_head: bool = False
    """Whether the weights start at zero."""
    precision: Precision = "float32"
    """Compute type. The one layer is an output layer, so it is float32 either way."""


@frozen
class MLP:
    """Hidden layers of equal width on the flattened input."""

    width: Count = 128
    """Units in each hidden layer."""
    depth: Count = 2
    """Hidden layers."""
    activation: Activation = "relu"
    """Nonlinearity after each hidden layer."""
    bias: bool = True
    """Whether the layers have additive biases."""
    dropout: DropRate = 0.0
    """Fraction of hidden units dropped in training."""
    parametrisation: Parametrisation = "standard"
    """Where 1/sqrt(fan_in) sits: in the initial weights (standard) or in the forward pass (ntk)."""
    init_scale: Positive = 1.0
    """Factor on the standard deviation of every weight matrix at initialisation."""
    zero_head: bool = False
    """Whether the output layer's weights start at zero."""
    precision: Precision = "float32"
    """Compute type; parameters, norms and logits are float32 either way."""


class LinearModule(nn.Module):
    """logits = x W + b.

    Parameters: ``head/kernel`` f32[D, C], ``head/bias`` f32[C].
    """

    config: Linear
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B C"]:
        """Logits of float inputs, all axes but the first flattened."""
        x = _flat(x, "Linear")
        return Dense(self.num_outputs, self.config, bias=self.config.bias, head=True, name="head")(
            x
        )


class MLPModule(nn.Module):
    """h_{i+1} = activation(h_i W_i + b_i), h_0 = x; logits = h_depth W + b.

    Parameters: ``dense_<i>/kernel`` f32[D, width] and ``dense_<i>/bias`` f32[width] for i = 0 ..
    depth - 1, ``head/kernel`` f32[width, C], ``head/bias`` f32[C].
    """

    config: MLP
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B C"]:
        """Logits of float inputs, all axes but the first flattened."""
        c = self.config
        h = _flat(x, "MLP")
        for i in range(c.depth):
            h = Dense(c.width, c, gain=gain(c.activation), bias=c.bias, name=f"dense_{i}")(h)
            h = activate(h, c.activation)
            h = nn.Dropout(c.dropout, deterministic=not train)(h)
        return Dense(self.num_outputs, c, bias=c.bias, head=True, name="head")(h)


def _flat(x: Num[Array, "B ..."], model: str) -> Float[Array, "B D"]:
    return floats(x, model).reshape(x.shape[0], math.prod(x.shape[1:]))
