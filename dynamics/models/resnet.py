"""Residual nets for small images (32x32): 3x3 stem with stride 1 and no max-pool."""

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

# depth -> (blocks of each stage, bottleneck blocks); depth counts the layers on the longest path.
STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
    8: ((1, 1, 1), False),
    14: ((2, 2, 2), False),
    20: ((3, 3, 3), False),
    32: ((5, 5, 5), False),
    44: ((7, 7, 7), False),
    56: ((9, 9, 9), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
}


@frozen
class ResNet:
    """Residual stages of width, 2 width, 4 width, (8 width) channels, each halving the image."""

    depth: Literal[8, 14, 20, 32, 44, 56, 18, 34, 50] = 18
    """Layers. 18, 34 and 50 have four stages (50 of bottleneck blocks), the others three."""
    width: Count = 64
    """Channels of the stem and the first stage: 64 for 18, 34 and 50 in the literature, else 16."""
    activation: Activation = "relu"
    """Nonlinearity."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation after each convolution; batch ties the examples of a batch in training."""
    groups: Count = 8
    """Groups of the group norm; must divide width where it is used."""
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
            raise ValueError(f"ResNet.groups must divide width {self.width}, got {self.groups}")


class ResNetModule(nn.Module):
    """Stem, residual blocks, mean over space, output layer with bias.

    Convolutions have no bias. The first block of every stage but the first has stride 2; a block
    whose shape changes has a 1x1 convolution and a norm on its shortcut (option B). The stride of
    a bottleneck block is on its 3x3 convolution.

    Parameters: ``stem_conv/kernel``, ``stem_norm/{scale,bias}``; for blocks j = 0, 1, ... counted
    through all stages ``block_<j>/conv_<i>/kernel`` and ``block_<j>/norm_<i>/{scale,bias}`` with
    i < 2 (i < 3 in bottleneck blocks), ``block_<j>/shortcut_conv/kernel`` and
    ``block_<j>/shortcut_norm/{scale,bias}`` where the shape changes; ``head/{kernel,bias}``.
    Batch statistics: ``.../<name of a norm>/{mean,var}``.

    Reference: He et al. 2016, arXiv 1512.03385, table 1 (18, 34, 50) and section 4.2 (the rest).
    """

    config: ResNet
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B C"]:
        """Logits of float images [B, H, W, C] or [B, H, W]."""
        c = self.config
        h = images(x, "ResNet")
        h = Conv(c.width, c, gain=gain(c.activation), bias=False, name="stem_conv")(h)
        h = normalise(h, c.norm, name="stem_norm", train=train, groups=c.groups)
        h = activate(h, c.activation)
        stages, bottleneck = STAGES[c.depth]
        strides = [(s, 2 if s and b == 0 else 1) for s, n in enumerate(stages) for b in range(n)]
        for j, (stage, stride) in enumerate(strides):
            block = Block(c, c.width * 2**stage, stride, bottleneck, name=f"block_{j}")
            h = block(h, train=train)
        h = h.astype(jnp.float32).mean((1, 2))
        return Dense(self.num_outputs, c, head=True, name="head")(h)


class Block(nn.Module):
    """activation(shortcut(x) + branch(x)).

    The branch is 3x3, 3x3 (basic) or 1x1, 3x3, 1x1 with four times the channels (bottleneck). A
    bottleneck's last norm starts with scale 0, so that the block starts as its shortcut (Goyal et
    al. 2017, arXiv 1706.02677, section 5.1).
    """

    config: ResNet
    channels: int
    stride: int
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], *, train: bool) -> Float[Array, "B h w D"]:
        """The block's output, with the image divided by ``stride``."""
        c, n, stride = self.config, self.channels, self.stride
        basic = [(3, n, stride), (3, n, 1)]
        branch = [(1, n, 1), (3, n, stride), (1, 4 * n, 1)] if self.bottleneck else basic

        def conv_norm(x, size, channels, stride, prefix, suffix, zero=False):
            conv = Conv(
                channels,
                c,
                size=size,
                stride=stride,
                gain=gain(c.activation),
                bias=False,
                name=f"{prefix}conv{suffix}",
            )
            name = f"{prefix}norm{suffix}"
            return normalise(
                conv(x), c.norm, name=name, train=train, groups=c.groups, zero_scale=zero
            )

        h = x
        for i, (size, channels, step) in enumerate(branch):
            last = i == len(branch) - 1
            h = conv_norm(h, size, channels, step, "", f"_{i}", last and self.bottleneck)
            h = h if last else activate(h, c.activation)
        if x.shape != h.shape:
            x = conv_norm(x, 1, h.shape[-1], stride, "shortcut_", "")
        return activate(x + h, c.activation)
