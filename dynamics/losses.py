"""Per-example losses: ``(logits, labels) -> f32[...]``, never averaged here."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PROBABLE = 1e-4  # the least probability in ELR


def cross_entropy(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """``-log softmax(logits)[label]`` in nats, as log(1 + sum_{k != label} exp(z_k - z_label)).

    In that form an example the network is sure of keeps its digits, in the loss and in the
    gradient, where logsumexp(z) - z_label would round them away.
    """
    return jax.nn.softplus(log_odds_against(logits, labels))


def label_smoothing(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"], *, epsilon: float = 0.1
) -> Float[Array, "*b"]:
    """``(1 - epsilon) CE(label) + epsilon mean_k CE(k)``: the target is mixed with the uniform one.

    Reference: Szegedy et al. 2016, arXiv 1512.00567, section 7.
    """
    everywhere = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    return (1 - epsilon) * cross_entropy(logits, labels) + epsilon * everywhere


def generalised_cross_entropy(
    logits: Float[Array, "*b classes"], labels: Int[Array, "*b"], *, q: float = 0.7
) -> Float[Array, "*b"]:
    """``(1 - p^q) / q`` of the label's probability p: cross-entropy for q -> 0, 1 - p for q = 1.

    Reference: Zhang and Sabuncu 2018, arXiv 1805.07836, eq. 6.
    """
    return -jnp.expm1(-q * cross_entropy(logits, labels)) / q


def symmetric_cross_entropy(
    logits: Float[Array, "*b classes"],
    labels: Int[Array, "*b"],
    *,
    forward: float = 0.1,
    reverse: float = 1.0,
    log_zero: float = -4.0,
) -> Float[Array, "*b"]:
    """``forward CE + reverse RCE``, RCE = -sum_k p_k log y_k = -log_zero (1 - p), log 0 = log_zero.

    Reference: Wang et al. 2019, arXiv 1908.06112, section 3; defaults as for their CIFAR-10.
    """
    wrong = jax.nn.sigmoid(log_odds_against(logits, labels))
    return forward * cross_entropy(logits, labels) - reverse * log_zero * wrong


def elr(
    logits: Float[Array, "*b classes"], targets: Float[Array, "*b classes"]
) -> Float[Array, "*b"]:
    """``log(1 - <p, t>)``, the term of early-learning regularization, p = clip(softmax(logits)).

    To be added to the cross-entropy, lambda times. Negative, so total losses are too: for 10
    classes it ends at -6.909. For a t that is constant its gradient is p_c (<p, t> - t_c) /
    (1 - <p, t>), which adds to zero over the classes (inside the clip, 1e-4 to 1 - 1e-4).

    Reference: Liu et al. 2020, arXiv 2007.00151, eq. 6 and lemma 2; the clip is their code's.
    """
    return jnp.log1p(-jnp.sum(_clipped(logits) * targets, axis=-1))


def elr_targets(
    logits: Float[Array, "*b classes"], targets: Float[Array, "*b classes"], beta: Any
) -> Float[Array, "*b classes"]:
    """``beta t + (1 - beta) p / sum(p)``, p = clip(softmax(logits)) held constant.

    After k visits from t = 0 the targets add to 1 - beta^k: a warm-up that can't be left out.

    Reference: Liu et al. 2020, arXiv 2007.00151, eq. 9; their code divides by the sum.
    """
    p = jax.lax.stop_gradient(_clipped(logits))
    return beta * targets + (1 - beta) * p / p.sum(axis=-1, keepdims=True)


def _clipped(logits: Float[Array, "*b classes"]) -> Float[Array, "*b classes"]:
    """Probabilities in float32 at least: in bfloat16 1 - 1e-4 is 1."""
    wide = logits if logits.dtype == jnp.float64 else logits.astype(jnp.float32)
    return jnp.clip(jax.nn.softmax(wide, axis=-1), PROBABLE, 1 - PROBABLE)


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
