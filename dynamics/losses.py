"""Per-example losses: ``(logits, labels) -> f32[...]``, never averaged here."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """``-log softmax(logits)[label]`` in nats."""
    chosen = jnp.sum(jnp.where(at_label(logits, labels), logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen


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
