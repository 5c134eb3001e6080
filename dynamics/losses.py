"""Per-example losses: ``(logits, labels) -> f32[...]``, never averaged here; and what labels mean.

Labels are integers, one for each row of logits, or ``IGNORED``, whose loss is 0: everywhere in this
project a place without a label gives no gradient and is left out of every mean. Losses to numbers
take floats: ``squared_error`` targets, ``soft_cross_entropy`` probabilities. ValueError, when
traced: labels of another kind or shape.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from dynamics.types import IGNORED, Leaf

PROBABLE = 1e-4  # the least probability in ELR
Labels = Shaped[Array, "..."]  # [*b], of the leading shape of the logits; checked when traced


def cross_entropy(logits: Float[Array, "*b classes"], labels: Labels) -> Float[Array, "*b"]:
    """``-log softmax(logits)[label]`` in nats, as log(1 + sum_{k != label} exp(z_k - z_label)).

    In that form an example the network is sure of keeps its digits, in the loss and in the
    gradient, where logsumexp(z) - z_label would round them away.
    """
    return _where_counted(jax.nn.softplus(log_odds_against(logits, labels)), labels)


def soft_cross_entropy(
    logits: Float[Array, "*b classes"], targets: Shaped[Array, "..."]
) -> Float[Array, "*b"]:
    """``-sum_k t_k log softmax(logits)_k`` in nats, of target probabilities in the logits' shape.

    With a onehot target it is ``cross_entropy``; its least value is the entropy of t, not 0.
    """
    if not jnp.issubdtype(targets.dtype, jnp.floating) or targets.shape != logits.shape:
        raise ValueError(
            f"soft labels must be probabilities in the shape of the logits, floats {logits.shape}, "
            f"got {targets.dtype} {targets.shape}: cross_entropy takes one integer an example"
        )
    return -jnp.sum(targets.astype(logits.dtype) * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def label_smoothing(
    logits: Float[Array, "*b classes"], labels: Labels, *, epsilon: float = 0.1
) -> Float[Array, "*b"]:
    """``(1 - epsilon) CE(label) + epsilon mean_k CE(k)``: the target is mixed with the uniform one.

    Reference: Szegedy et al. 2016, arXiv 1512.00567, section 7.
    """
    everywhere = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)
    mixed = (1 - epsilon) * cross_entropy(logits, labels) + epsilon * everywhere
    return _where_counted(mixed, labels)


def generalised_cross_entropy(
    logits: Float[Array, "*b classes"], labels: Labels, *, q: float = 0.7
) -> Float[Array, "*b"]:
    """``(1 - p^q) / q`` of the label's probability p: cross-entropy for q -> 0, 1 - p for q = 1.

    Reference: Zhang and Sabuncu 2018, arXiv 1805.07836, eq. 6.
    """
    return -jnp.expm1(-q * cross_entropy(logits, labels)) / q


def symmetric_cross_entropy(
    logits: Float[Array, "*b classes"],
    labels: Labels,
    *,
    forward: float = 0.1,
    reverse: float = 1.0,
    log_zero: float = -4.0,
) -> Float[Array, "*b"]:
    """``forward CE + reverse RCE``, RCE = -sum_k p_k log y_k = -log_zero (1 - p), log 0 = log_zero.

    Reference: Wang et al. 2019, arXiv 1908.06112, section 3; defaults as for their CIFAR-10.
    """
    wrong = jax.nn.sigmoid(log_odds_against(logits, labels))
    both = forward * cross_entropy(logits, labels) - reverse * log_zero * wrong
    return _where_counted(both, labels)


def squared_error(logits: Float[Array, "*b outputs"], labels: Labels) -> Float[Array, "*b"]:
    """``0.5 * ||logits - t||^2``, t = onehot(label) of integers, or the target itself of floats.

    Float targets have the shape of the logits, or one number for each example where there is one
    output: (n,) beside logits (n, 1). Nothing is broadcast.
    """
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        onehot = at_label(logits, labels).astype(logits.dtype)
        return _where_counted(0.5 * jnp.sum((logits - onehot) ** 2, axis=-1), labels)
    targets = labels[..., None] if (*labels.shape, 1) == logits.shape else labels
    if targets.shape != logits.shape:
        raise ValueError(
            f"float labels must be targets in the shape of the logits, {logits.shape}, or one for "
            f"each example of a single output, got {labels.shape}"
        )
    return 0.5 * jnp.sum((logits - targets.astype(logits.dtype)) ** 2, axis=-1)


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


# ---- labels and logits --------------------------------------------------------------------------


def log_odds_against(logits: Float[Array, "*b classes"], labels: Labels) -> Float[Array, "*b"]:
    """``log((1 - p) / p)`` of the label's probability p."""
    here = at_label(logits, labels)
    shifted = logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    chosen = jnp.sum(jnp.where(here, shifted, 0), axis=-1)
    return jax.nn.logsumexp(without_label(shifted, labels), axis=-1) - chosen


def without_label(logits: Float[Array, "*b classes"], labels: Labels) -> Float[Array, "*b classes"]:
    """The logits, with the least finite number at the label and instead of -inf."""
    low = jnp.finfo(logits.dtype).min
    return jnp.where(at_label(logits, labels), low, jnp.maximum(logits, low))


def at_label(logits: Float[Array, "*b classes"], labels: Labels) -> Bool[Array, "*b classes"]:
    """True at the label, False elsewhere, in the shape of the logits; nowhere if it is IGNORED.

    A comparison, not a gather: XLA can't partition a gather from logits that are split over both
    the data and the model axis (it aborts the process).
    """
    _check_classes(logits, labels)
    if logits.shape[-1] < 2:
        raise ValueError(
            f"labels of classes need an output for each class, got logits {logits.shape}: two "
            "classes are two outputs, one output is for squared_error to float targets"
        )
    classes = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
    return classes == labels[..., None]


def counted(labels: Leaf) -> Bool[Any, "..."]:
    """True where there is a label: not where an integer is IGNORED."""
    if not jnp.issubdtype(labels.dtype, jnp.signedinteger):  # -100 is no unsigned number
        return (np if isinstance(labels, np.ndarray) else jnp).ones(labels.shape, bool)
    return labels != IGNORED


def labelled(labels: Leaf) -> Bool[Any, "b"]:
    """True for the examples that have a label at all, of labels [b, ...]."""
    return counted(labels).reshape(labels.shape[0], -1).any(axis=1)


def over_labels(
    values: Float[Array, "b ..."], labels: Labels, *, none: float = 0.0
) -> Float[Array, "b"]:
    """The mean of an example's ``values`` over the labels that count; ``none`` where none does.

    Integer labels in the shape of the values say which do. Others, soft labels and targets, count
    everywhere.
    """
    b = values.shape[0]
    if labels.shape != values.shape or not jnp.issubdtype(labels.dtype, jnp.signedinteger):
        return values.reshape(b, -1).mean(axis=1)
    here = counted(labels)
    if values.ndim == 1:
        return jnp.where(here, values, none)
    mean = jnp.where(here, values, 0).reshape(b, -1).mean(axis=1)
    count = here.reshape(b, -1).sum(axis=1)
    places = values[0].size / jnp.maximum(count, 1).astype(jnp.float32)  # exactly 1 if all count
    return jnp.where(count > 0, mean * places.astype(mean.dtype), none)


def answered(logits: Float[Array, "*b classes"]) -> Bool[Array, "*b"]:
    """Where softmax(logits) exists: no NaN, no +inf, and not all are -inf."""
    return jnp.isfinite(logits.max(axis=-1))


def predictions(logits: Float[Array, "*b classes"]) -> Int[Array, "*b"]:
    """The most likely class, the first of ties; -1 where there is no answer (``answered``)."""
    return jnp.where(answered(logits), logits.argmax(axis=-1), -1).astype(jnp.int32)


def correct(logits: Float[Array, "*b classes"], labels: Labels) -> Float[Array, "*b"]:
    """1 where the most likely class is the label, 0 where it isn't; NaN where there is no answer
    (argmax would call NaN class 0) or the label is IGNORED. Of soft labels, the likeliest class.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        if labels.shape != logits.shape:
            raise ValueError(
                f"accuracy needs labels that are classes, or their probabilities {logits.shape}, "
                f"got {labels.dtype} {labels.shape}"
            )
        right = logits.argmax(axis=-1) == labels.argmax(axis=-1)
        return jnp.where(answered(logits), right.astype(jnp.float32), jnp.nan)
    _check_classes(logits, labels)
    right = logits.argmax(axis=-1) == labels.astype(jnp.int32)
    known = answered(logits) & counted(labels)
    return jnp.where(known, right.astype(jnp.float32), jnp.nan)


def _where_counted(values: Float[Array, "*b"], labels: Labels) -> Float[Array, "*b"]:
    return jnp.where(counted(labels), values, 0)


def _check_classes(logits: Leaf, labels: Leaf) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels of classes must be integers {logits.shape[:-1]}, one for each row of logits "
            f"{logits.shape}, got {labels.dtype} {labels.shape}: floats are for squared_error "
            "(targets) and soft_cross_entropy (probabilities)"
        )
