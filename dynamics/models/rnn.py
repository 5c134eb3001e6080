"""Recurrent nets that read a sequence and answer at its end."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from dynamics.config import Count, Positive, frozen
from dynamics.models.layers import (
    Activation,
    Dense,
    Parametrisation,
    Precision,
    activate,
    compute_type,
    floats,
    gain,
    tokens,
    weight,
)


@frozen
class RNN:
    """Stacked recurrent layers; the last state of the top one is read out."""

    cell: Literal["elman", "gru"] = "elman"
    """Recurrence: the simple network of Elman or gated recurrent units."""
    width: Count = 128
    """Units in each layer."""
    depth: Count = 1
    """Stacked layers."""
    activation: Activation = "tanh"
    """Nonlinearity of the state (elman) or of the candidate state (gru)."""
    num_tokens: Count | None = None
    """Vocabulary of integer input [B, T]; None for float sequences [B, T, D] and images."""
    bias: bool = True
    """Whether the layers have additive biases."""
    parametrisation: Parametrisation = "standard"
    """Where 1/sqrt(fan_in) sits: in the initial weights (standard) or in the forward pass (ntk)."""
    init_scale: Positive = 1.0
    """Factor on the standard deviation of every weight matrix at initialisation."""
    zero_head: bool = False
    """Whether the output layer's weights start at zero."""
    precision: Precision = "float32"
    """Compute type; parameters and logits are float32 either way."""


class RNNModule(nn.Module):
    """logits = h_T W + b, h_T the state of the top layer after the last of T steps.

    Parameters: ``layer_<i>/input/kernel`` f32[D, G width], ``layer_<i>/input/bias``,
    ``layer_<i>/recurrent/kernel`` f32[width, G width] with G = 1 (elman) or 3 (gru: reset, update,
    candidate), ``head/kernel`` f32[width, C], ``head/bias``, and for tokens ``token_embedding``
    f32[num_tokens, width].
    """

    config: RNN
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B C"]:
        """Logits of float sequences [B, T, D], of images read by rows, or of tokens [B, T].

        An image [B, H, W] or [B, H, W, C] is a sequence of T = H rows of D = W C numbers.
        """
        c = self.config
        h = self._sequence(x)
        for i in range(c.depth):
            h = Layer(c, name=f"layer_{i}")(h)
        return Dense(self.num_outputs, c, bias=c.bias, head=True, name="head")(h[:, -1])

    def _sequence(self, x: Num[Array, "B ..."]) -> Float[Array, "B T D"]:
        c = self.config
        if c.num_tokens is not None:
            # a row of the table answers a one-hot input, so its fan-in is 1
            shape = (c.num_tokens, c.width)
            table = weight(self, "token_embedding", shape, c, fan_in=1)
            return jnp.take(table, tokens(x, "RNN with num_tokens"), axis=0)
        if x.ndim not in (3, 4):
            raise ValueError(
                f"RNN reads sequences [B, T, D] or images [B, H, W, C], got {x.dtype}"
                f"{list(x.shape)}; for tokens set num_tokens"
            )
        return floats(x, "RNN").reshape(*x.shape[:2], -1)


class Layer(nn.Module):
    """One recurrent layer, from h_0 = 0: all states.

    elman:  h_t = activation(x_t W + b + h_{t-1} U)
    gru:    r, z = sigmoid(x_t W_{r,z} + b_{r,z} + h_{t-1} U_{r,z})
            n    = activation(x_t W_n + b_n + r * (h_{t-1} U_n))
            h_t  = (1 - z) * n + z * h_{t-1}

    W and U have the gain of the activation in an elman cell, so that the second moment of its
    state grows linearly in t for relu; and gain 1 in a gru.

    Reference: Elman 1990, Finding structure in time; Cho et al. 2014, arXiv 1406.1078, eq. 5-8,
    with the reset gate applied after U_n as in cuDNN, and without a bias there.
    """

    config: RNN

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """The states after each step."""
        c = self.config
        features, factor = (3 * c.width, 1.0) if c.cell == "gru" else (c.width, gain(c.activation))
        drive = Dense(features, c, gain=factor, bias=c.bias, name="input")(x)

        def step(layer: "Layer", h: Array, drive: Array) -> tuple[Array, Array]:
            feedback = Dense(features, c, gain=factor, bias=False, name="recurrent")(h)
            h = update(c, h, drive, feedback)
            return h, h

        scan = nn.scan(
            step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
        )
        _, states = scan(self, jnp.zeros((x.shape[0], c.width), compute_type(c)), drive)
        return states


def update(
    config: RNN, h: Float[Array, "B H"], drive: Float[Array, "B G"], feedback: Float[Array, "B G"]
) -> Float[Array, "B H"]:
    """The next state from the current one, x_t W + b and h U."""
    if config.cell == "elman":
        return activate(drive + feedback, config.activation)
    drive_r, drive_z, drive_n = jnp.split(drive, 3, axis=-1)
    feedback_r, feedback_z, feedback_n = jnp.split(feedback, 3, axis=-1)
    r = jax.nn.sigmoid(drive_r + feedback_r)
    z = jax.nn.sigmoid(drive_z + feedback_z)
    n = activate(drive_n + r * feedback_n, config.activation)
    return (1 - z) * n + z * h
