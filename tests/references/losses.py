"""Losses and their gradients in float64, one example at a time."""

import math

import numpy as np


def softmax(logits):
    """Of one vector, as a list of floats."""
    top = max(logits)
    powers = [math.exp(z - top) for z in logits]
    return [p / math.fsum(powers) for p in powers]


def cross_entropy(logits, label):
    """log(1 + sum over the other classes of exp(z_k - z_y)): no digit is lost when it is small."""
    z = [float(v) for v in logits]
    others = [v - z[label] for k, v in enumerate(z) if k != label and v > -math.inf]
    if not others:
        return 0.0
    top = max(0.0, *others)
    if top == math.inf:
        return math.inf
    if top == 0.0:
        return math.log1p(math.fsum(math.exp(v) for v in others))
    return top + math.log(math.exp(-top) + math.fsum(math.exp(v - top) for v in others))


def squared_error(logits, label):
    return 0.5 * math.fsum((float(z) - (k == label)) ** 2 for k, z in enumerate(logits))


def error(logits, label):
    """softmax - onehot, with 1 - p_y as the sum of the others."""
    p = softmax([float(z) for z in logits])
    rest = math.fsum(v for k, v in enumerate(p) if k != label)
    return np.array([-rest if k == label else v for k, v in enumerate(p)])


def el2n(logits, label):
    """hypot does not underflow."""
    return math.hypot(*error(logits, label))


def label_smoothing(logits, label, epsilon=0.1):
    each = [cross_entropy(logits, k) for k in range(len(logits))]
    return (1 - epsilon) * each[label] + epsilon * math.fsum(each) / len(each)


def generalised_cross_entropy(logits, label, q=0.7):
    return -math.expm1(-q * cross_entropy(logits, label)) / q


def symmetric_cross_entropy(logits, label, forward=0.1, reverse=1.0, log_zero=-4.0):
    p = softmax([float(z) for z in logits])
    reverse_term = math.fsum(-v * log_zero for k, v in enumerate(p) if k != label)
    return forward * cross_entropy(logits, label) + reverse * reverse_term
