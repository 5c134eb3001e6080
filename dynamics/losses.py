"""Per-example losses: ``(logits, labels) -> f32[...]``, never averaged here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """``-log softmax(logits)[label]`` in nats, as log(1 + sum_{k != label} exp(z_k - z_label)).

    In that form an example the network is sure of keeps its digits, in the loss and in the
    gradient, where logsumexp(z) - z_label would round them away.
    """
    return jax.nn.softplus(log_odds_against(logits, labels))


def log_odds_against(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """``log((1 - p) / p)`` of the label's probability p."""
    here = at_label(logits, labels)
    shifted = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    chosen = jnp.sum(jnp.where(here, shifted, 0), axis=-1)
    return jax.nn.logsumexp(without_label(shifted, labels), axis=-1) - chosen


def without_label(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Float[Array, "*b classes"]:
    """The logits, with the least finite number at the label and instead of -inf."""
    low = jnp.finfo(logits.dtype).min
    return jnp.where(at_label(logits, labels), low, jnp.maximum(logits, low))


def squared_error(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """``0.5 * ||logits - onehot(label)||^2``."""
    onehot = at_label(logits, labels).astype(logits.dtype)
    return 0.5 * jnp.sum((logits - onehot) ** 2, axis=-1)


def at_label(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Bool[Array, "*b classes"]:
    """True at the label, False elsewhere, in the shape of the logits.

    A comparison, not a gather: XLA can't partition a gather from logits that are split over both
    the data and the model axis (it aborts the process).
    """
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return classes == labels[..., None]
