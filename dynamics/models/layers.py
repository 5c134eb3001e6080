"""What the nets share: Dense and Conv in two parametrisations, norms, activations, input checks.

A weight tensor W with ``fan_in`` inputs per output acts on the layer as

    standard:  W = init_scale * gain / sqrt(fan_in) * G           and is used as it is
    ntk:       W = init_scale * G       and is used as gain / sqrt(fan_in) * W

with G of independent N(0, 1) entries drawn from the same key, so at initialisation both are the
same function and only training tells them apart. ``gain`` is sqrt(2) in front of a relu (He et al.
2015, arXiv 1502.01852, eq. 10) and 1 elsewhere, the output layer included (LeCun et al. 1998,
Efficient BackProp, eq. 16). Gaussians are not truncated. Biases start at 0 and enter with factor 1.

Reference: Jacot et al. 2018, arXiv 1806.07572, section 2.1, who scale biases by a free constant
and draw them from N(0, 1).
"""

import math
from typing import Annotated, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from dynamics.config import Range

Activation = Literal["relu", "gelu", "silu", "tanh", "erf", "identity"]
Parametrisation = Literal["standard", "ntk"]
Precision = Literal["float32", "bfloat16"]
Norm = Literal["none", "batch", "group", "layer"]
DropRate = Annotated[float, Range(low=0.0, below=1.0)]


@runtime_checkable
class Scaled(Protocol):
    """The fields every model's config has: what a layer must know of it."""

    @property
    def parametrisation(self) -> Parametrisation: ...  # noqa: D102

    @property
    def init_scale(self) -> float: ...  # noqa: D102

    @property
    def zero_head(self) -> bool: ...  # noqa: D102

    @property
    def precision(self) -> Precision: ...  # noqa: D102


def activate(x: Float[Array, "*shape"], kind: Activation) -> Float[Array, "*shape"]:
    """``kind`` elementwise; gelu is x Phi(x) itself (arXiv 1606.08415), not its tanh fit."""
    match kind:
        case "relu":
            return jax.nn.relu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "silu":
            return jax.nn.silu(x)
        case "tanh":
            return jnp.tanh(x)
        case "erf":
            return jax.lax.erf(x)
        case "identity":
            return x


def gain(kind: Activation) -> float:
    """sqrt(2) for relu, which halves the second moment of a centred Gaussian; 1 otherwise."""
    return math.sqrt(2) if kind == "relu" else 1.0


def compute_type(config: Scaled) -> jnp.dtype:
    """What activations are stored and multiplied in; parameters and logits stay float32."""
    return jnp.dtype(config.precision)


def weight(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    config: Scaled,
    *,
    fan_in: int,
    gain: float = 1.0,
    zero: bool = False,
) -> Float[Array, "..."]:
    """The parameter ``name`` of ``module``, as the layer uses it (see the top of the file)."""
    std = gain / math.sqrt(fan_in)
    ntk = config.parametrisation == "ntk"
    scale = config.init_scale * (1.0 if ntk else std)

    def draw(key: Array) -> Float[Array, "..."]:
        if zero:
            return jnp.zeros(shape, jnp.float32)
        # flat: the numbers are the same, a 4-D draw compiles up to ten times longer on CPU
        return scale * jax.random.normal(key, (math.prod(shape),), jnp.float32).reshape(shape)

    value = module.param(name, draw)
    return value * std if ntk else value


class Dense(nn.Module):
    """y = x W + b over the last axis.

    ``head`` marks the output layer: float32 whatever the compute type, and W = 0 at initialisation
    if the config says ``zero_head``.

    Parameters: ``kernel`` f32[D, F], ``bias`` f32[F].
    """

    features: int
    config: Scaled
    gain: float = 1.0
    bias: bool = True
    head: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """The layer in the compute type."""
        dtype = jnp.dtype(jnp.float32) if self.head else compute_type(self.config)
        fan_in = x.shape[-1]
        zero = self.head and self.config.zero_head
        kernel = weight(
            self,
            "kernel",
            (fan_in, self.features),
            self.config,
            fan_in=fan_in,
            gain=self.gain,
            zero=zero,
        )
        return _shifted(self, x.astype(dtype) @ kernel.astype(dtype))


class Conv(nn.Module):
    """A 2-D convolution over [B, H, W, C], zero-padded by half the kernel on every side.

    Parameters: ``kernel`` f32[k, k, C, F], ``bias`` f32[F].
    """

    features: int
    config: Scaled
    size: int = 3
    stride: int = 1
    gain: float = 1.0
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        """The layer in the compute type; for odd kernels a side n becomes ceil(n / stride)."""
        dtype = compute_type(self.config)
        shape = (self.size, self.size, x.shape[-1], self.features)
        fan_in = math.prod(shape[:-1])
        kernel = weight(self, "kernel", shape, self.config, fan_in=fan_in, gain=self.gain)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            kernel.astype(dtype),
            window_strides=(self.stride, self.stride),
            padding=[(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return _shifted(self, y)


def _shifted(module: Dense | Conv, y: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
    if not module.bias:
        return y
    bias = module.param("bias", nn.initializers.zeros, (module.features,), jnp.float32)
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def normalise(
    x: Float[Array, "B *shape"],
    kind: Norm,
    *,
    name: str,
    train: bool,
    groups: int = 1,
    bias: bool = True,
    zero_scale: bool = False,
) -> Float[Array, "B *shape"]:
    """(x - mean) / sqrt(var + eps) * scale + bias, computed in float32, returned as ``x`` came.

    batch:  statistics over all axes but the last of the batch (train) or of the running average
            (eval), momentum 0.9, eps 1e-5, both biased; Ioffe & Szegedy 2015, arXiv 1502.03167
    group:  over space and channels / groups of one example, eps 1e-5; Wu & He 2018, 1803.08494
    layer:  over the last axis, eps 1e-6; Ba et al. 2016, arXiv 1607.06450

    Parameters: ``name/scale``, ``name/bias``; batch statistics: ``name/mean``, ``name/var``.
    """
    scale = nn.initializers.zeros if zero_scale else nn.initializers.ones
    match kind:
        case "none":
            return x
        case "batch":
            norm = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                use_bias=bias,
                scale_init=scale,
                name=name,
            )
        case "group":
            norm = nn.GroupNorm(groups, epsilon=1e-5, use_bias=bias, scale_init=scale, name=name)
        case "layer":
            norm = nn.LayerNorm(epsilon=1e-6, use_bias=bias, scale_init=scale, name=name)
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def floats(x: Num[Array, "..."], model: str) -> Float[Array, "..."]:
    """``x``, or ValueError if it holds integers: images are normalised where data is used."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{model} reads normalised floats, got {x.dtype}{list(x.shape)}")
    return x


def images(x: Num[Array, "..."], model: str) -> Float[Array, "B H W C"]:
    """Float images with a channel axis, added if there is none; ValueError for anything else."""
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{model} reads images [B, H, W, C] or [B, H, W], got {x.dtype}{list(x.shape)}"
        )
    x = floats(x, model)
    return x[..., None] if x.ndim == 3 else x


def tokens(x: Num[Array, "..."], model: str) -> Num[Array, "B T"]:
    """Integer tokens, or ValueError; one outside the vocabulary makes the logits nan."""
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{model} reads integer tokens [B, T], got {x.dtype}{list(x.shape)}")
    return x
