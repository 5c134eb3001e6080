"""A decoder-only transformer with pre-LayerNorm and learned positions."""

import math

import jax
import jax.numpy as jnp
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
    compute_type,
    gain,
    normalise,
    tokens,
    weight,
)


@frozen
class Transformer:
    """Causal blocks of attention and an MLP; the vocabulary is the number of outputs."""

    width: Count = 128
    """Size of the residual stream."""
    depth: Count = 2
    """Blocks."""
    num_heads: Count = 4
    """Attention heads; must divide width."""
    max_length: Count = 256
    """The longest sequence, in tokens."""
    mlp_factor: Count = 4
    """Hidden units of a block's MLP, in multiples of width."""
    activation: Activation = "gelu"
    """Nonlinearity of the MLPs."""
    qk_norm: bool = False
    """Whether queries and keys are layer-normalised per head, which bounds attention logits."""
    tied: bool = False
    """Whether the output layer's weights are the token embeddings."""
    bias: bool = False
    """Whether dense layers and norms have additive biases."""
    dropout: DropRate = 0.0
    """Fraction of the embeddings and of each branch dropped in training."""
    parametrisation: Parametrisation = "standard"
    """Where 1/sqrt(fan_in) sits: in the initial weights (standard) or in the forward pass (ntk)."""
    init_scale: Positive = 1.0
    """Factor on the standard deviation of every weight matrix and embedding at initialisation."""
    zero_head: bool = False
    """Whether the output layer's weights start at zero; not with tied."""
    precision: Precision = "float32"
    """Compute type; parameters, norms, softmax and logits are float32 either way."""

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"Transformer.num_heads must divide width {self.width}, got {self.num_heads}"
            )
        if self.tied and self.zero_head:
            raise ValueError("Transformer.zero_head must be False if tied: embeddings are not zero")


class TransformerModule(nn.Module):
    """logits_t = LN(h_t) W, h the residual stream after all blocks; causal.

    Parameters: ``token_embedding`` f32[C, width], ``position_embedding`` f32[max_length, width],
    for each block i ``block_<i>/attention_norm/scale``,
    ``block_<i>/attention/{query,key,value,out}/kernel`` f32[width, width] (heads lie side by side
    in the outputs of query, key and value, and in the inputs of out), with qk_norm
    ``block_<i>/attention/{query_norm,key_norm}/scale`` f32[width / num_heads],
    ``block_<i>/mlp_norm/scale``, ``block_<i>/mlp/up/kernel`` f32[width, mlp_factor width],
    ``block_<i>/mlp/down/kernel``; ``final_norm/scale``, and unless tied ``head/kernel``
    f32[width, C]. With bias, every ``kernel`` and ``scale`` has a ``bias`` beside it (the tied
    output layer has none).

    Embeddings have standard deviation init_scale / sqrt(width). Small-scale proxies of Wortsman
    et al. 2023, arXiv 2309.14322, use this architecture with rotary positions.

    Reference: Vaswani et al. 2017, arXiv 1706.03762; pre-LayerNorm: Xiong et al. 2020, 2002.04745;
    qk_norm: Dehghani et al. 2023, arXiv 2302.05442, section 2.
    """

    config: Transformer
    num_outputs: int

    @nn.compact
    def __call__(self, x: Num[Array, "B ..."], *, train: bool) -> Float[Array, "B T C"]:
        """Logits of integer tokens [B, T]; those at t depend on tokens 0 .. t alone."""
        c = self.config
        x = tokens(x, "Transformer")
        if x.shape[1] > c.max_length:
            raise ValueError(
                f"Transformer reads at most max_length = {c.max_length} tokens, got {x.shape[1]}"
            )
        shape = (self.num_outputs, c.width)
        table = weight(self, "token_embedding", shape, c, fan_in=c.width)
        shape = (c.max_length, c.width)
        positions = weight(self, "position_embedding", shape, c, fan_in=c.width)
        h = jnp.take(table, x, axis=0) + positions[None, : x.shape[1]]
        h = nn.Dropout(c.dropout, deterministic=not train)(h.astype(compute_type(c)))
        for i in range(c.depth):
            h = Block(c, name=f"block_{i}")(h, train=train)
        h = normalise(h, "layer", name="final_norm", train=train, bias=c.bias)
        if c.tied:
            return h.astype(jnp.float32) @ table.T
        return Dense(self.num_outputs, c, bias=c.bias, head=True, name="head")(h)


class Block(nn.Module):
    """h <- h + attention(LN(h)); h <- h + mlp(LN(h))."""

    config: Transformer

    @nn.compact
    def __call__(self, h: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        """The residual stream after the block."""
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=not train)
        x = normalise(h, "layer", name="attention_norm", train=train, bias=c.bias)
        h = h + drop(Attention(c, name="attention")(x))
        x = normalise(h, "layer", name="mlp_norm", train=train, bias=c.bias)
        return h + drop(FeedForward(c, name="mlp")(x))


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: Transformer

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What each position gathers from itself and those before it."""
        c = self.config
        heads = (*x.shape[:2], c.num_heads, c.width // c.num_heads)
        query, key, value = (
            Dense(c.width, c, bias=c.bias, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        if c.qk_norm:
            query = normalise(query, "layer", name="query_norm", train=False, bias=c.bias)
            key = normalise(key, "layer", name="key_norm", train=False, bias=c.bias)
        gathered = causal_attention(query, key, value).reshape(x.shape)
        return Dense(c.width, c, bias=c.bias, name="out")(gathered)


class FeedForward(nn.Module):
    """activation(x W_up) W_down."""

    config: Transformer

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The MLP of each position."""
        c = self.config
        hidden = c.mlp_factor * c.width
        h = Dense(hidden, c, gain=gain(c.activation), bias=c.bias, name="up")(x)
        return Dense(c.width, c, bias=c.bias, name="down")(activate(h, c.activation))


def causal_attention(
    query: Float[Array, "B T H K"], key: Float[Array, "B T H K"], value: Float[Array, "B T H K"]
) -> Float[Array, "B T H K"]:
    """sum_{s <= t} softmax_s(<query_t, key_s> / sqrt(K)) value_s; the softmax in float32."""
    logits = jnp.einsum("bthk,bshk->bhts", query, key, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(query.shape[-1])
    past = jnp.tril(jnp.ones((1, 1, *logits.shape[2:]), bool))
    share = jax.nn.softmax(jnp.where(past, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", share.astype(value.dtype), value)
