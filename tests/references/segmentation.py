"""Segmentation with wrong outlines, pixel by pixel: slow, and obviously right."""

import math

import numpy as np

IGNORED = -100


def moved(clean, grows, times):
    """One image's classes grown over background, or shrunk, by a 3 x 3 square."""
    height, width = clean.shape
    labels = clean.copy()
    for c in (1, 2):
        region = clean == c
        for _ in range(max(1, times - c + 1)):
            after = region.copy()
            for i in range(height):
                for j in range(width):
                    square = region[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
                    after[i, j] = square.any() if grows else square.all()
            region = after
        if grows:
            labels[region & (labels == 0)] = c
        else:
            labels[(clean == c) & ~region] = 0
    return labels


def counts(predicted, labels, num_classes):
    """(TP, T, P) of each class."""
    found = np.zeros((num_classes, 3), int)
    for p, y in zip(predicted.ravel(), labels.ravel(), strict=True):
        if y == IGNORED:
            continue
        found[y, 1] += 1
        found[p, 2] += 1
        found[y, 0] += p == y
    return found


def corrected(labels, predicted, confidence, active, *, tau, rule, present, guard):
    """Labels after correction, one pixel at a time."""
    after = labels.copy()
    wanted = {0} | {c for c, on in enumerate(active) if on}
    for n, image in enumerate(labels):
        here = set(image.ravel().tolist())
        if not any(c in here and active[c] for c in range(1, len(active))):
            continue
        for at in np.ndindex(*image.shape):
            p, y = int(predicted[n][at]), int(image[at])
            change = confidence[n][at] > tau and p in wanted and y != IGNORED
            if rule == "both":
                change = change and y in wanted
            if present:
                change = change and (p == 0 or p in here)
            if change:
                after[n][at] = p
        if guard:
            before_fg = sum(y not in (0, IGNORED) for y in image.ravel())
            after_fg = sum(y not in (0, IGNORED) for y in after[n].ravel())
            if after_fg < 0.5 * before_fg and (after[n] == 0).mean() > 0.95:
                after[n] = image
    return after


def consistency(logits, rho, per):
    """f64[b]: the mean over pixels of the mean over scales of KL(p_k || q), where q is sure."""
    scales, images, height, width, classes = logits.shape
    out = np.zeros(images)
    for b in range(images):
        kept, largest, divergences = [], 0.0, []
        for at in np.ndindex(height, width):
            p = [_softmax(logits[k, b][at]) for k in range(scales)]
            q = [sum(one[c] for one in p) / scales for c in range(classes)]
            kl = [sum(a * math.log(a / b) for a, b in zip(one, q, strict=True)) for one in p]
            kept.append(max(q) > rho)
            largest = max(largest, max(q))
            divergences.append(sum(kl) / scales)
        if per == "image":
            kept = [largest > rho] * len(kept)
        out[b] = sum(d for d, on in zip(divergences, kept, strict=True) if on) / len(kept)
    return out


def _softmax(z):
    exps = [math.exp(float(v) - float(max(z))) for v in z]
    return [e / sum(exps) for e in exps]
