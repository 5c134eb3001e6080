"""Which labels look wrong: from losses, from running targets, or from probabilities.

On the host, in numpy and float64, in the order of the dataset, deterministic. What the labels truly
are is never used: ``statistics.precision_recall`` compares with it where it is known.
"""

import warnings
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from dynamics.types import IGNORED

ITERATIONS, TOLERANCE, LEAST_VARIANCE = 10, 1e-2, 5e-4  # of the mixture, on losses from 0 to 1


def small_loss(losses: Float[np.ndarray, "*epochs n"], *, last: int = 1) -> Float[np.ndarray, "n"]:
    """f64[n]: the probability that each label is right, by two Gaussians fitted to the losses.

    ``losses`` [n], or [epochs, n] of which the ``last`` are averaged, are those of evaluation mode
    without regularisers; each epoch's are mapped to 0..1 first. The component of the smaller mean
    is the clean one. Early in training it finds symmetric noise; once labels are memorised, and for
    asymmetric noise whose losses have one mode, it doesn't. The wider component takes both ends, so
    the very smallest losses may seem less clean than small ones. Cost: n numbers sorted and about
    ten passes. ValueError: losses that are not finite or all equal, more epochs than there are.

    Reference: Li, Socher and Hoi 2020, arXiv 2002.07394, section 3.1; the constants, and an average
    over 5 epochs for 90 % noise, are their code's. The start is exact where theirs is drawn.
    """
    epochs = np.atleast_2d(np.asarray(losses, np.float64))
    if epochs.ndim != 2 or not 1 <= last <= len(epochs):
        raise ValueError(
            f"losses must be [n] or [epochs, n] with at least last = {last} >= 1 epochs, got shape "
            f"{np.shape(losses)}"
        )
    values = np.mean([_normalised(one) for one in epochs[-last:]], axis=0)
    order = np.argsort(values, kind="stable")  # so that the order of the examples can't matter
    clean = np.empty(len(values))
    clean[order] = _smaller_mean(values[order])
    return clean


def _normalised(losses: np.ndarray) -> np.ndarray:
    """From 0 to 1."""
    if not np.isfinite(losses).all():
        bad = int((~np.isfinite(losses)).sum())
        raise ValueError(f"losses must be finite, got {bad} of {len(losses)} that are not")
    low, high = (losses.min(), losses.max()) if len(losses) else (0.0, 0.0)
    if not low < high:
        raise ValueError(
            f"losses must differ to be told apart, got {len(losses)} that are all {low:g}"
        )
    return (losses - low) / (high - low)


def _smaller_mean(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The posterior of the component with the smaller mean, of values that ascend."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    mixture: Any = GaussianMixture(
        2, max_iter=ITERATIONS, tol=TOLERANCE, reg_covar=LEAST_VARIANCE, **_two_means(values)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # ten iterations are the method's
        mixture.fit(values[:, None])
    return mixture.predict_proba(values[:, None])[:, mixture.means_.argmin()]


def _two_means(values: Float[np.ndarray, "n"]) -> dict[str, Any]:
    """Where the mixture starts: at the cut of the values that leaves the least squares within.

    Ten iterations don't forget their start, so a seeded k-means would leave the seed in the result.
    """
    n, below = len(values), np.cumsum(values)
    size = np.arange(1, n)
    between = below[:-1] ** 2 / size + (below[-1] - below[:-1]) ** 2 / (n - size)
    parts = np.split(values, [int(np.argmax(between)) + 1])
    variances = np.array([part.var() + LEAST_VARIANCE for part in parts])
    return {
        "weights_init": np.array([len(part) / n for part in parts]),
        "means_init": np.array([[part.mean()] for part in parts]),
        "precisions_init": 1 / variances[:, None, None],
    }


def relabelled(
    targets: Float[np.ndarray, "*k rows c"], labels: Integer[np.ndarray, "*k n"]
) -> Bool[np.ndarray, "*k n"]:
    """Where an example's target, a running mean of the network's own answers, prefers another
    class: its label's entry is less than the largest.

    An example that was never visited has a target of zeros and is not flagged; nor is a tie, or an
    example without a label (``IGNORED``).
    ``targets`` are ELR's ``state.extras["targets"]``, whose rows beyond n are padding. Meant for
    runs that don't memorise: under plain cross-entropy the targets follow the wrong labels.
    ValueError: targets that are not finite, fewer rows than labels, labels that are no classes.

    Reference: Liu et al. 2020, arXiv 2007.00151, whose authors compare targets with labels.
    """
    targets, labels = np.asarray(targets), np.asarray(labels)
    n = labels.shape[-1]
    if targets.shape[:-2] != labels.shape[:-1] or targets.shape[-2] < n:
        raise ValueError(
            f"targets must be [..., rows >= {n}, classes] for labels {labels.shape}, got "
            f"{targets.shape}"
        )
    targets = targets[..., :n, :]
    if not np.isfinite(targets).all():
        raise ValueError(f"targets must be finite, got {int((~np.isfinite(targets)).sum())} others")
    _check_labels(labels, targets.shape[-1])
    known = labels != IGNORED
    some = np.where(known, labels, 0).astype(np.int64)
    here = np.take_along_axis(targets, some[..., None], axis=-1)[..., 0]
    return known & (here < targets.max(axis=-1))


class Joint(NamedTuple):
    """What ``confident_joint`` counts, and which examples it counts as wrong."""

    counts: Int[np.ndarray, "c c"]  # [label, class it is confidently of]
    thresholds: Float[np.ndarray, "c"]  # infinite for a class that no label names
    confident: Int[np.ndarray, "n"]  # the class each example is confidently of, -1 for none
    flagged: Bool[np.ndarray, "n"]  # confidently of another class than its label, and argmax too


def confident_joint(
    probabilities: Float[np.ndarray, "n c"], labels: Integer[np.ndarray, "n"]
) -> Joint:
    """Counts of (label, confident class). An example is confidently of class j if p_j >= t_j, the
    mean p_j of the examples labelled j; of the likeliest such class if there are several.

    Uncalibrated, so an example that reaches no threshold isn't counted. ``flagged`` are those
    counted off the diagonal whose likeliest class is not their label either: reaching a low
    threshold of a rare class is not enough. Probabilities of a network that was trained on the same
    labels call them right: take those of a network that did not see the example (cross-validation),
    of an early epoch, or ELR's targets, normalised. Examples without a label (``IGNORED``) are of
    no class and not counted. ValueError: rows that are no distributions,
    labels that are no classes.

    Reference: Northcutt, Jiang and Chuang 2021, arXiv 1911.00068, eq. 1 and 2.
    """
    p, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if p.shape[:1] != labels.shape:
        raise ValueError(f"one row of probabilities for each label: got {p.shape}, {labels.shape}")
    bad = ~((p >= 0).all(axis=1) & (abs(p.sum(axis=1) - 1) <= 1e-3))
    if bad.any():
        raise ValueError(
            f"rows of probabilities must be >= 0 and sum to 1, got {int(bad.sum())} of {len(p)} "
            f"that don't, the first at {int(np.argmax(bad))}"
        )
    n, c = p.shape
    _check_labels(labels, c)
    rows, known = np.arange(n), labels != IGNORED
    thresholds = np.array([_threshold(p[labels == j, j]) for j in range(c)])
    above = p >= thresholds
    best = np.where(above, p, -1).argmax(axis=1)
    confident = np.where(above.any(axis=1) & known, best, -1)
    counts = np.zeros((c, c), np.int64)
    counted = rows[confident >= 0]
    np.add.at(counts, (labels[counted], confident[counted]), 1)
    surer = p.max(axis=1) > p[rows, np.where(known, labels, 0)]
    return Joint(counts, thresholds, confident, (confident >= 0) & (confident != labels) & surer)


def _threshold(p: np.ndarray) -> float:
    """The mean, which rounding mustn't lift above the largest."""
    return min(float(p.mean()), float(p.max())) if len(p) else np.inf


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        raise ValueError(f"labels must be integers, got {labels.dtype} of shape {labels.shape}")
    given = labels[labels != IGNORED]
    if given.size and (given.min() < 0 or given.max() >= num_classes):
        raise ValueError(
            f"labels must be from 0 to {num_classes - 1}, got {given.min()} to {given.max()}"
        )
