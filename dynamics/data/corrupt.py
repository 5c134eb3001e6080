"""Label noise: some labels replaced, and the record of which are wrong now.

Every model draws new labels and ends in ``noisy``. Draws rank or reduce the raw output of PCG64,
which numpy guarantees: one seed gives the same noise on every machine and version.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer


class Noisy(NamedTuple):
    """Labels to train on, and what only the experimenter knows about them."""

    labels: Int32[np.ndarray, "n"]
    clean: Int32[np.ndarray, "n"]
    mask: Bool[np.ndarray, "n"]  # True where the label is wrong now
    rate: float  # the part that is wrong: the mean of the mask


def noisy(clean: Integer[np.ndarray, "n"], labels: Integer[np.ndarray, "n"]) -> Noisy:
    """What every noise model returns, from the labels before and after."""
    mask = labels != clean
    return Noisy(labels.astype(np.int32), clean.astype(np.int32), mask, float(mask.mean()))


def symmetric(y: Integer[np.ndarray, "n"], rate: float, num_classes: int, seed: int) -> Noisy:
    """Exactly round(rate n) labels become another class, each of the others equally likely.

    With one seed, what is flipped at a lower rate is flipped at a higher one, to the same labels.
    """
    shift = _words("symmetric shift", len(y), seed) % np.uint64(max(num_classes - 1, 1)) + 1
    return _shifted(y, rate, num_classes, seed, shift)


def symmetric_including(
    y: Integer[np.ndarray, "n"], rate: float, num_classes: int, seed: int
) -> Noisy:
    """Exactly round(rate n) labels are drawn anew from all classes, the true one among them.

    About rate (1 - 1/num_classes) of the labels end up wrong: what the literature calls symmetric
    noise of that rate. Nested in the rate as ``symmetric`` is, and in the same examples.

    Reference: Liu et al. 2020, arXiv 2007.00151, whose code draws ceil(rate n); so does DivideMix.
    """
    shift = _words("symmetric including", len(y), seed) % np.uint64(max(num_classes, 1))
    return _shifted(y, rate, num_classes, seed, shift)


def _shifted(y: np.ndarray, rate: float, num_classes: int, seed: int, shift: np.ndarray) -> Noisy:
    """The labels of round(rate n) examples moved on by ``shift``, modulo the number of classes."""
    check(y, rate, num_classes)
    chosen = np.argsort(_words("flip", len(y), seed), kind="stable")[: round(rate * len(y))]
    clean = y.astype(np.int64)
    labels = clean.copy()
    labels[chosen] = (clean[chosen] + shift[chosen].astype(np.int64)) % num_classes
    return noisy(clean, labels)


def check(y: np.ndarray, rate: float, num_classes: int) -> None:
    """ValueError unless labels, rate and number of classes go together."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2 for a label to be wrong, got {num_classes}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be >= 0 and <= 1, got {rate!r}")
    if not len(y):
        raise ValueError("y must hold at least one label, got none")
    if y.min() < 0 or y.max() >= num_classes:
        raise ValueError(
            f"y must be labels from 0 to {num_classes - 1}, got {y.min()} to {y.max()}"
        )


def _words(purpose: str, n: int, seed: int) -> np.ndarray:
    """As many independent 64-bit words; modulo a number of classes they are uniform to 1e-17."""
    return np.random.PCG64([int.from_bytes(purpose.encode()), seed]).random_raw(n)
