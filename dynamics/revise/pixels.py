"""Labels of pixels: how they agree with predictions, and how predictions replace them.

Pure functions of one replica. Labels are i32[n, h, w]; a pixel labelled IGNORED belongs to no class
and stays so.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dynamics.config import Fraction, Positive, frozen
from dynamics.losses import predictions
from dynamics.types import IGNORED


@frozen
class Correction:
    """Which labels a prediction replaces, in the images that hold a class being corrected."""

    confidence: Fraction = 0.7
    """Probability above which a prediction replaces a label"""
    temperature: Positive = 1.0
    """Logits are divided by this before the softmax that gives the probability"""
    rule: Literal["both", "prediction"] = "both"
    """Whether label and prediction must be background or corrected classes, or the prediction"""
    present: bool = True
    """Whether the prediction must be background or a class that the image's label holds"""
    guard: bool = False
    """Whether an image stays as it is that would lose half its foreground and be 95 % background"""


def counts(
    predicted: Int[Array, "n h w"], labels: Int[Array, "n h w"], num_classes: int
) -> Int[Array, "c 3"]:
    """Pixels of each class that are both predicted and labelled so, labelled, and predicted.

    Pixels without a label (IGNORED) or without a prediction (-1: logits that are no numbers) count
    nowhere. Exact up to 2^31 pixels; sums of counts are those of the union.
    """
    valid = (labels != IGNORED) & (predicted >= 0)
    classes = jnp.arange(num_classes, dtype=jnp.int32)[:, None, None, None]
    truth, found = (labels[None] == classes) & valid[None], (predicted[None] == classes)
    found = found & valid[None]
    both = jnp.stack([truth & found, truth, found], axis=1)
    return both.sum(axis=(2, 3, 4), dtype=jnp.int32)


def iou(counts: Int[Array, "*k c 3"]) -> Float[Array, "*k c"]:
    """Intersection over union TP / (T + P - TP) of each class; NaN for one that is nowhere."""
    hit, truth, found = (counts[..., i].astype(jnp.float32) for i in range(3))
    union = truth + found - hit
    return jnp.where(union > 0, hit / jnp.maximum(union, 1.0), jnp.nan)


def prediction(
    logits: Float[Array, "n h w c"], temperature: float = 1.0
) -> tuple[Int[Array, "n h w"], Float[Array, "n h w"]]:
    """The most likely class of each pixel and its probability, softmax(logits / temperature).

    -1 and NaN where the logits are no answer, which corrects nothing.
    """
    top = jax.nn.softmax(logits / temperature, axis=-1).max(axis=-1)
    return predictions(logits), top


def corrected(
    labels: Int[Array, "n h w"],
    predicted: Int[Array, "n h w"],
    confidence: Float[Array, "n h w"],
    active: Bool[Array, "c"],
    correction: Correction,
) -> Int[Array, "n h w"]:
    """Labels after the confident predictions of the ``active`` classes have replaced some.

    A pixel takes the predicted class where its probability exceeds ``correction.confidence``, both
    label and prediction are background (0) or active (by the rule "prediction" the prediction
    alone), and the prediction is background or in the image's labels already. An image that holds
    no active class stays as it is, as does one that the guard protects.

    Reference: Liu et al. 2022, arXiv 2110.03740, section 3.2; rule "both" and 0.7 are their medical
    images', "prediction", temperature 3, 0.8 and the guard their natural images'.
    """
    classes = jnp.arange(len(active), dtype=jnp.int32)
    here = (labels[..., None] == classes[None, None, None]).any(axis=(1, 2))  # [n, c]
    background = classes == 0
    allowed = active | background
    may = jnp.broadcast_to(allowed[None], here.shape)
    if correction.present:
        may = may & (here | background[None])
    change = (confidence > correction.confidence) & (labels != IGNORED)
    change &= jax.vmap(lambda ok, at: ok[at])(may, predicted)
    if correction.rule == "both":
        change &= allowed[jnp.clip(labels, 0, len(active) - 1)]
    change &= (here & (active & ~background)[None]).any(axis=1)[:, None, None]
    after = jnp.where(change, predicted, labels)
    if correction.guard:
        after = jnp.where(_emptied(labels, after)[:, None, None], labels, after)
    return after


def _emptied(before: Int[Array, "n h w"], after: Int[Array, "n h w"]) -> Bool[Array, "n"]:
    """Images with less than half their foreground left and more than 95 % background."""
    old, new = (((y != 0) & (y != IGNORED)).sum(axis=(1, 2)) for y in (before, after))
    background = (after == 0).mean(axis=(1, 2))
    return (2 * new < old) & (background > 0.95)
