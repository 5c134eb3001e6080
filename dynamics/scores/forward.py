"""Scores that cost one forward pass: functions of an example's logits and label.

All are in evaluation mode and in the order of the batch. Where an example has several labels (a
token each) its score is the mean over them, as its loss is. Places whose label is ``IGNORED`` are
left out, and where an example has no other its score is NaN. Logits may be -inf; 1 - p is never
computed from p, so the easiest examples keep their digits.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from dynamics.losses import (
    Labels,
    at_label,
    cross_entropy,
    labelled,
    log_odds_against,
    over_labels,
    without_label,
)
from dynamics.types import Batch, Task, TrainState

HARD: Mapping[str, Literal["high", "low"]] = {
    "el2n": "high",
    "loss": "high",
    "entropy": "high",
    "probability": "low",
    "l1_error": "high",
    "logit_margin": "low",
    "probability_margin": "low",
    "grand": "high",
    "grand_last_layer": "high",
    "input_norm": "high",
    "tracin": "high",
    "vog": "high",
    "pvi": "low",
    "forgetting": "high",
    "aum": "low",
    "confidence": "low",
    "variability": "high",
    "correctness": "low",
}
"""Which end of a score its authors call hard, influential, ambiguous or suspicious."""


def el2n(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``||softmax(f(x)) - onehot(y)||_2``, in [0, sqrt 2]; high is hard.

    Computed as (1 - p_y) sqrt(1 + sum_{k != y} q_k^2), q the other classes' probabilities given
    that the label is wrong: easy examples keep their digits. Cost: one forward pass.

    Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, definition 2.
    """
    z = _logits(task, state, batch)
    wrong = jax.nn.sigmoid(log_odds_against(z, batch.y))
    others = jax.nn.softmax(without_label(z, batch.y))
    return per_example(wrong * jnp.sqrt(1 + jnp.sum(others**2, axis=-1)), batch.y)


def loss(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """The task's own loss of each example, unweighted; high is hard.

    In nats where the task is cross-entropy, -log p_y. Cost: one forward pass.
    """
    found = task.evaluate(state.params, state.extras, batch, state.hyperparameters).loss
    return jnp.where(labelled(batch.y), found, jnp.nan)


def entropy(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``-sum_k p_k log p_k`` of p = softmax(f(x)), in nats, in [0, log K]; high is hard.

    It knows no label, only where there is one. Computed as c + sum_k p_k (z_top - z_k) with
    c = -log p_top, where nothing cancels. Cost: one forward pass.
    """
    z = _logits(task, state, batch)
    surprise = cross_entropy(z, z.argmax(axis=-1))
    gap = z.max(axis=-1, keepdims=True) - z
    p = jnp.exp(-gap - surprise[..., None])
    return per_example(surprise + jnp.sum(p * jnp.where(p > 0, gap, 0), axis=-1), batch.y)


def probability(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``p_y``, in [0, 1]; low is hard. Cost: one forward pass."""
    return per_example(at_probability(_logits(task, state, batch), batch.y), batch.y)


def l1_error(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``||softmax(f(x)) - onehot(y)||_1 = 2 (1 - p_y)``, in [0, 2]; high is hard.

    Cost: one forward pass.
    """
    z = _logits(task, state, batch)
    return per_example(2 * jax.nn.sigmoid(log_odds_against(z, batch.y)), batch.y)


def logit_margin(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``z_y - max_{k != y} z_k``, in the units of the logits; low is hard, negative is misjudged.

    Cost: one forward pass. Reference: Pleiss et al. 2020, arXiv 2001.10528 (there of the
    training-mode logits: ``probes.AreaUnderMargin`` is its mean over presentations).
    """
    return per_example(at_margin(_logits(task, state, batch), batch.y), batch.y)


def probability_margin(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``p_y - max_{k != y} p_k``, in [-1, 1]; low is hard, negative is misjudged.

    Computed as p_top (1 - exp(-|m|)) with the sign of the logit margin m: near ties keep their
    digits. Cost: one forward pass.
    """
    z = _logits(task, state, batch)
    margin, top = at_margin(z, batch.y), jax.nn.softmax(z).max(axis=-1)
    return per_example(-jnp.sign(margin) * top * jnp.expm1(-jnp.abs(margin)), batch.y)


def at_probability(logits: Float[Array, "*b classes"], labels: Labels) -> Float[Array, "*b"]:
    """The label's probability, from its odds."""
    return jax.nn.sigmoid(-log_odds_against(logits, labels))


def at_margin(logits: Float[Array, "*b classes"], labels: Labels) -> Float[Array, "*b"]:
    """The label's logit less the largest other one; infinite if all others are -inf."""
    here = at_label(logits, labels)
    other = jnp.where(here, -jnp.inf, logits).max(axis=-1)
    return jnp.sum(jnp.where(here, logits, 0), axis=-1) - other


def per_example(values: Shaped[Array, "b ..."], labels: Labels) -> Float[Array, "b"]:
    """The mean over the labels of each example that count, in float32; NaN where none does."""
    return over_labels(values.astype(jnp.float32), labels, none=jnp.nan)


def _logits(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b ... classes"]:
    return task.evaluate(state.params, state.extras, batch, state.hyperparameters).logits
