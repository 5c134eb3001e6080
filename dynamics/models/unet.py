"""A small U-Net: a label for every pixel, from what is around it at several scales."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from dynamics.config import Count, Positive, frozen
from dynamics.models.convnet import Pool
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

Upsampling = Literal["nearest", "bilinear"]


@frozen
class Unet:
    """Levels of 3x3 convolutions that halve the image, and as many that double it again.

    With width 8 and 2 levels the channels are 8-8 | 16-16 | 32 | 16 | 8.
    """

    width: Count = 8
    """Channels at full resolution; every halving of the image doubles them."""
    levels: Count = 2
    """Halvings; the sides of an image must be multiples of 2^levels."""
    convs: Count = 2
    """Convolutions of a level on the way down; at the bottom and on the way up there is one."""
    activation: Activation = "relu"
    """Nonlinearity after each convolution."""
    norm: Literal["none", "batch", "group"] = "group"
    """Normalisation between convolution and activation; batch ties the images of a batch."""
    groups: Count = 4
    """Groups of the group norm; must divide the width where it is used."""
    pool: Pool = "max"
    """How 2x2 pixels become one."""
    upsampling: Upsampling = "bilinear"
    """How one pixel becomes 2x2."""
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
        if self.norm == "group" and self.width % self.groups:
            raise ValueError(f"Unet.groups must divide width {self.width}, got {self.groups}")


class UnetModule(nn.Module):
    """Down: h_l = block(h), h = halved(h_l); bottom: h = block(h); up: block([h_l, doubled(h)]).

    Logits are h W + b. A block is activation(norm(conv(h))), ``convs`` times on the way down.

    Parameters: ``down_<l>_<i>_conv/kernel`` f32[3, 3, C, width 2^l] for level l and convolution i,
    ``bottom_conv/kernel``, ``up_<l>_conv/kernel``; without a norm their ``bias``, with one
    ``..._norm/scale`` and ``..._norm/bias``; ``head/kernel`` f32[width, C], ``head/bias``.
    Batch statistics: ``..._norm/mean``, ``..._norm/var``.

    Reference: Ronneberger et al. 2015, arXiv 1505.04597, whose convolutions are not padded and
    whose levels have two on the way up as well.
    """

    config: Unet
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B H W C"]:
        """Logits of every pixel of float images [B, H, W, C] or [B, H, W]."""
        c = self.config
        h, sides = images(x, "Unet"), 2**c.levels
        if h.shape[1] % sides or h.shape[2] % sides:
            raise ValueError(
                f"Unet with {c.levels} levels reads images whose sides are multiples of {sides}, "
                f"got {list(x.shape)}"
            )

        def block(h: jax.Array, channels: int, name: str) -> jax.Array:
            bias = c.bias and c.norm == "none"  # a norm has its own
            h = Conv(channels, c, gain=gain(c.activation), bias=bias, name=f"{name}_conv")(h)
            h = normalise(h, c.norm, name=f"{name}_norm", train=train, groups=c.groups)
            return activate(h, c.activation)

        kept = []
        for level in range(c.levels):
            for i in range(c.convs):
                h = block(h, c.width * 2**level, f"down_{level}_{i}")
            kept.append(h)
            h = halved(h, c.pool)
        h = block(h, c.width * 2**c.levels, "bottom")
        for level in reversed(range(c.levels)):
            h = jnp.concatenate([kept[level], doubled(h, c.upsampling)], axis=-1)
            h = block(h, c.width * 2**level, f"up_{level}")
        h = h.astype(jnp.float32)
        return Dense(self.num_outputs, c, bias=c.bias, head=True, name="head")(h)


def halved(x: Float[Array, "B H W C"], kind: Pool) -> Float[Array, "B h w C"]:
    """The mean or maximum of each 2x2 square of an image with even sides.

    The maximum is of two at a time: the gradient of one over both axes divides by how many equal
    it, which is 0 where the compiler computes them twice with different roundings.
    """
    batch, height, width, channels = x.shape
    squares = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    if kind == "average":
        return squares.mean((2, 4))
    rows = jnp.maximum(squares[:, :, 0], squares[:, :, 1])
    return jnp.maximum(rows[:, :, :, 0], rows[:, :, :, 1])


def doubled(x: Float[Array, "B h w C"], kind: Upsampling) -> Float[Array, "B H W C"]:
    """Every pixel four times (nearest), or the four mixed 9:3:3:1 with their neighbours."""
    batch, height, width, channels = x.shape
    shape = (batch, 2 * height, 2 * width, channels)
    if kind == "bilinear":
        return jax.image.resize(x, shape, "bilinear")
    squares = x[:, :, None, :, None, :]
    return jnp.broadcast_to(squares, (batch, height, 2, width, 2, channels)).reshape(shape)
