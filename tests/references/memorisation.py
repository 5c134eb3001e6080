"""What becomes of wrong labels, one example after the other, in float64.

``logits``, ``labels`` and ``clean`` are lists with an entry for each example; ``targets`` has one
list for each table of targets (ELR one, ELR+ two), whose entries are the examples' rows.
"""

import math

import numpy as np
from references.elr import gradient, softmax


def predicted(z):
    return max(range(len(z)), key=lambda c: z[c])  # the first of ties


def cross_entropy(z, y):
    return -math.log(softmax(z)[y])


def fit(z, y):
    """||p - y||"""
    difference = [p - (c == y) for c, p in enumerate(softmax(z))]
    return math.sqrt(sum(d * d for d in difference))


def held(z, t, strength):
    """||lambda g||, g of lemma 2"""
    return strength * math.sqrt(sum(g * g for g in gradient(z, t)))


def target(rows):
    """The class that the targets of one example add up to the most for; None: there are none."""
    total = [sum(float(x) for x in column) for column in zip(*rows, strict=True)]
    return predicted(total) if any(total) else None


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def area(losses, wrong):
    """P(the loss of a wrong label > that of a right one) + half P(equal), pair by pair."""
    bad = [loss for loss, w in zip(losses, wrong, strict=True) if w]
    good = [loss for loss, w in zip(losses, wrong, strict=True) if not w]
    return mean((a > b) + (a == b) / 2 for a in bad for b in good)


def summary(logits, labels, clean, targets=None, strength=None):
    """Every metric of one replica."""
    n = range(len(labels))
    bad = [i for i in n if labels[i] != clean[i]]
    good = [i for i in n if labels[i] == clean[i]]
    says = [predicted(logits[i]) for i in n]
    memorised = [i for i in bad if says[i] == labels[i]]
    learned = [i for i in bad if says[i] == clean[i]]
    wrong = [i in bad for i in n]
    out = {
        "wrong_correct": mean(i in learned for i in bad),
        "wrong_memorised": mean(i in memorised for i in bad),
        "wrong_other": mean(i not in memorised and i not in learned for i in bad),
        "clean_correct": mean(says[i] == clean[i] for i in good),
        "loss_auc": area([cross_entropy(logits[i], labels[i]) for i in n], wrong),
        "fit_clean": mean(fit(logits[i], labels[i]) for i in good),
        "fit_wrong": mean(fit(logits[i], labels[i]) for i in bad),
    }
    if targets is None:
        return out
    holds = [target([table[i] for table in targets]) for i in n]
    flagged = [i for i in n if holds[i] is not None and holds[i] != labels[i]]
    out["target_correct"] = mean(holds[i] == clean[i] for i in bad)
    out["precision"] = mean(i in bad for i in flagged)
    out["recall"] = mean(i in flagged for i in bad)
    if strength is not None and len(targets) == 1:
        size = [held(np.asarray(logits[i]), targets[0][i], strength) for i in n]
        out["held_clean"] = mean(size[i] for i in good)
        out["held_wrong"] = mean(size[i] for i in bad)
    return out
