"""Scores of one vector of logits, in float64 and with math.fsum."""

import math

from references.losses import cross_entropy, el2n, softmax

__all__ = ["SCORES", "el2n"]


def floats(logits):
    return [float(z) for z in logits]


def wrong(logits, label):
    """1 - p_y, as the sum of the others."""
    return math.fsum(p for k, p in enumerate(softmax(floats(logits))) if k != label)


def entropy(logits, label):
    """-log p_k is the cross-entropy of class k: exact for the sure one, too."""
    z = floats(logits)
    p = softmax(z)
    return math.fsum(p[k] * cross_entropy(z, k) for k in range(len(z)) if p[k] > 0)


def probability(logits, label):
    return softmax(floats(logits))[label]


def l1_error(logits, label):
    p = softmax(floats(logits))
    return math.fsum([wrong(logits, label), *(v for k, v in enumerate(p) if k != label)])


def logit_margin(logits, label):
    z = floats(logits)
    return z[label] - max(v for k, v in enumerate(z) if k != label)


def probability_margin(logits, label):
    p = softmax(floats(logits))
    return p[label] - max(v for k, v in enumerate(p) if k != label)


SCORES = {
    "el2n": el2n,
    "loss": cross_entropy,
    "entropy": entropy,
    "probability": probability,
    "l1_error": l1_error,
    "logit_margin": logit_margin,
    "probability_margin": probability_margin,
}
