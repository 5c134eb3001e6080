"""A small convolutional net: 3x3 convolutions, each halving the image."""

from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from dynamics.config import Count, Positive, frozen
from dynamics.models.layers import (
    Activation,
    Conv,
    Dense,
    Parametrisation,
    Precision,
    activate,
    gain,
    images,
    normalise,
)

Pool = Literal["average", "max"]


@frozen
class Convnet:
    """A block per entry of channels: 3x3 convolution, norm, activation, 2x2 pool."""

    channels: tuple[Count, ...] = (32, 64)
    """Channels of each block."""
    activation: Activation = "relu"
    """Nonlinearity of each block."""
    norm: Literal["none", "batch", "group"] = "none"
    """Normalisation between convolution and activation; batch ties the examples of a batch."""
    groups: Count = 8
    """Groups of the group norm; must divide every entry of channels where it is used."""
    pool: Pool = "average"
    """How 2x2 pixels become one; an odd last row or column is dropped."""
    bias: bool = True
    """Whether the output layer, and convolutions without a norm, have additive biases."""
    parametrisation: Parametrisation = "standard"
    """Where 1/sqrt(fan_in) sits: in the initial weights (standard) or in the forward pass (ntk)."""
    init_scale: Positive = 1.0
    """Factor on the standard deviation of every weight tensor at initialisation."""
    zero_head: bool = False
    """Whether the output layer's weights start at zero."""
    precision: Precision = "float32"
    """Compute type; parameters, norms and logits are float32 either way."""

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("Convnet.channels must name at least one block, got ()")
        if self.norm == "group" and any(c % self.groups for c in self.channels):
            raise ValueError(
                f"Convnet.groups must divide every entry of channels {self.channels}, "
                f"got {self.groups}"
            )


class ConvnetModule(nn.Module):
    """h <- pool(activation(norm(conv(h)))) per block; logits = mean over space(h) W + b.

    Parameters: ``conv_<i>/kernel`` f32[3, 3, C_in, channels[i]]; without a norm ``conv_<i>/bias``,
    with one ``norm_<i>/scale`` and ``norm_<i>/bias``; ``head/kernel`` f32[channels[-1], C],
    ``head/bias``.
    Batch statistics: ``norm_<i>/mean``, ``norm_<i>/var``.
    """

    config: Convnet
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B C"]:
        """Logits of float images [B, H, W, C] or [B, H, W]."""
        c = self.config
        h = images(x, "Convnet")
        if min(h.shape[1:3]) < 2 ** len(c.channels):
            raise ValueError(
                f"Convnet with {len(c.channels)} poolings reads images of at least "
                f"{2 ** len(c.channels)} pixels a side, got {list(x.shape)}"
            )
        bias = c.bias and c.norm == "none"  # a norm has its own
        for i, channels in enumerate(c.channels):
            h = Conv(channels, c, gain=gain(c.activation), bias=bias, name=f"conv_{i}")(h)
            h = normalise(h, c.norm, name=f"norm_{i}", train=train, groups=c.groups)
            h = pool(activate(h, c.activation), c.pool)
        h = h.astype(jnp.float32).mean((1, 2))
        return Dense(self.num_outputs, c, bias=c.bias, head=True, name="head")(h)


def pool(x: Float[Array, "B H W C"], kind: Pool) -> Float[Array, "B h w C"]:
    """The mean or maximum of each 2x2 square; reshaped, so derivatives of any order are cheap."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return squares.mean((2, 4)) if kind == "average" else squares.max((2, 4))
