"""What the presentations of one example say about it, from the list of them, in float64."""

import math

from references.forward import logit_margin, probability


def history(steps, example):
    """The (logits, label) of an example at each of its presentations.

    ``steps`` is a list of (index, logits, labels) of batches, in the order they were trained on.
    """
    out = []
    for index, logits, labels in steps:
        for i, where in enumerate(index):
            if where == example:
                out.append((logits[i], labels[i]))
    return out


def correct(seen):
    return [max(range(len(z)), key=lambda k: z[k]) == y for z, y in seen]  # the first of ties


def forgetting(seen):
    right = correct(seen)
    if not right:
        return math.nan
    if not any(right):
        return math.inf
    return sum(a and not b for a, b in zip(right, right[1:], strict=False))


def aum(seen):
    return math.fsum(logit_margin(z, y) for z, y in seen) / len(seen) if seen else math.nan


def confidence(seen):
    return math.fsum(probability(z, y) for z, y in seen) / len(seen) if seen else math.nan


def variability(seen):
    mean = confidence(seen)
    squares = math.fsum((probability(z, y) - mean) ** 2 for z, y in seen)
    return math.sqrt(squares / len(seen)) if seen else math.nan


def correctness(seen):
    return sum(correct(seen)) / len(seen) if seen else math.nan


METRICS = {
    "forgetting.events": forgetting,
    "aum.margin": aum,
    "cartography.confidence": confidence,
    "cartography.variability": variability,
    "cartography.correctness": correctness,
}
