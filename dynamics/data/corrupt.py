"""Label noise: some labels replaced, and the record of which are wrong now.

Every model draws new labels and ends in ``noisy``; an example without a label (``IGNORED``) stays
so, and counts in no rate. Draws rank or reduce the raw output of PCG64,
which numpy guarantees: one seed gives the same noise on every machine and version.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Integer
from numpy.typing import ArrayLike

from dynamics.types import IGNORED

log = logging.getLogger(__name__)

# truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse
CIFAR10_CONFUSED = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}
# The blocks of 5 consecutive labels that published code calls superclasses ...
CIFAR100_BLOCKS = tuple(tuple(range(first, first + 5)) for first in range(0, 100, 5))
# ... and the superclass of each of the 100 labels, which are in alphabetical order.
_COARSE = """
4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5
5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15
13 16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13
"""
CIFAR100_SUPERCLASSES = tuple(
    tuple(fine for fine, coarse in enumerate(_COARSE.split()) if int(coarse) == k)
    for k in range(20)
)


class Noisy(NamedTuple):
    """Labels to train on, and what only the experimenter knows about them."""

    labels: Int32[np.ndarray, "n"]
    clean: Int32[np.ndarray, "n"]
    mask: Bool[np.ndarray, "n"]  # True where the label is wrong now
    rate: float  # the part of the labels that is wrong: the mean of the mask


def noisy(clean: Integer[np.ndarray, "n"], labels: Integer[np.ndarray, "n"]) -> Noisy:
    """What every noise model returns, from the labels before and after."""
    mask = labels != clean
    rate = float(mask[clean != IGNORED].mean())
    return Noisy(labels.astype(np.int32), clean.astype(np.int32), mask, rate)


def symmetric(y: ArrayLike, rate: float, num_classes: int, seed: int) -> Noisy:
    """Exactly round(rate n) labels become another class, each of the others equally likely.

    With one seed, what is flipped at a lower rate is flipped at a higher one, to the same labels.
    """
    y = check(y, rate, num_classes)
    shift = _words("symmetric shift", len(y), seed) % np.uint64(num_classes - 1) + 1
    return _shifted(y, rate, num_classes, seed, shift)


def symmetric_including(y: ArrayLike, rate: float, num_classes: int, seed: int) -> Noisy:
    """Exactly round(rate n) labels are drawn anew from all classes, the true one among them.

    About rate (1 - 1/num_classes) of the labels end up wrong: what the literature calls symmetric
    noise of that rate. Nested in the rate as ``symmetric`` is, and in the same examples.

    Reference: Liu et al. 2020, arXiv 2007.00151, whose code draws ceil(rate n); so does DivideMix.
    """
    y = check(y, rate, num_classes)
    shift = _words("symmetric including", len(y), seed) % np.uint64(num_classes)
    return _shifted(y, rate, num_classes, seed, shift)


def asymmetric_cifar10(y: ArrayLike, rate: float, seed: int) -> Noisy:
    """Exactly ceil(rate n_c) labels of each of five classes become the class it is confused with.

    Trucks become automobiles, birds airplanes, deer horses, cats dogs and dogs cats; on balanced
    data about rate / 2 of all labels end up wrong. Nested in the rate. ValueError: rate >= 0.5,
    where cats and dogs change places.

    Reference: Patrini et al. 2017, arXiv 1609.03683, section 5; counts as in the code of Liu et al.
    2020, arXiv 2007.00151.
    """
    y = check(y, rate, 10)
    if rate >= 0.5:
        raise ValueError(f"rate must be < 0.5, beyond which cats and dogs swap, got {rate!r}")
    return _renamed(y, CIFAR10_CONFUSED, lambda count: math.ceil(rate * count), seed)


def circular(y: ArrayLike, rate: float, blocks: Sequence[Sequence[int]], seed: int) -> Noisy:
    """Exactly round(rate n_c) labels of each class become the next one of its block, the last the
    first. Nested in the rate.

    ``CIFAR100_BLOCKS`` reproduces what the literature calls asymmetric noise on CIFAR-100, whose
    blocks are neighbours in the alphabet (published code draws the counts at random);
    ``CIFAR100_SUPERCLASSES`` are the true superclasses. ValueError: a label in two blocks, or none.
    """
    y = integers(y)
    members = [label for block in blocks for label in block]
    check(y, rate, int(max([1, *members, *y])) + 1)
    lost = set(np.unique(y).tolist()) - set(members) - {IGNORED}
    if lost or len(set(members)) < len(members) or any(len(block) < 2 for block in blocks):
        raise ValueError(
            f"blocks must hold every label once, in blocks of 2 or more; missing {sorted(lost)}, "
            f"got {[list(block) for block in blocks]}"
        )
    following = {
        a: b for block in blocks for a, b in zip(block, [*block[1:], block[0]], strict=True)
    }
    return _renamed(y, following, lambda count: round(rate * count), seed)


def transition(y: ArrayLike, matrix: Float[np.ndarray, "c c"], seed: int) -> Noisy:
    """Each label i becomes j with probability ``matrix[i, j]``, independently of the others.

    The rate is that of the draw; its expectation is the mean of 1 - matrix[i, i] over the labels.
    ValueError: rows that are no distributions.
    """
    y = check(y, 0.0, len(matrix))
    rows = np.asarray(matrix, np.float64)
    if (rows < 0).any() or not np.allclose(rows.sum(axis=1), 1, atol=1e-6):
        raise ValueError(f"rows of the matrix must be >= 0 and sum to 1, got {rows.sum(axis=1)}")
    ends = np.cumsum(rows / rows.sum(axis=1, keepdims=True), axis=1)
    uniform = (_words("transition", len(y), seed) >> np.uint64(11)) * 2.0**-53
    known = y != IGNORED
    some = np.where(known, y, 0)
    labels = (uniform[:, None] >= ends[some]).sum(axis=1)
    last = np.array([np.flatnonzero(row)[-1] for row in rows])  # where rounding leaves ends < 1
    return noisy(y.astype(np.int64), np.where(known, np.minimum(labels, last[some]), IGNORED))


def _renamed(y: np.ndarray, to: dict[int, int], count: Callable[[int], int], seed: int) -> Noisy:
    """Of each class, ``count(its size)`` examples get another label."""
    clean, labels = y.astype(np.int64), y.astype(np.int64)
    order = np.argsort(_words("flip", len(y), seed), kind="stable")
    for label, other in to.items():
        mine = order[clean[order] == label]
        labels[mine[: count(len(mine))]] = other
    return noisy(clean, labels)


def _shifted(y: np.ndarray, rate: float, num_classes: int, seed: int, shift: np.ndarray) -> Noisy:
    """The labels of round(rate n) examples moved on by ``shift``, modulo the number of classes."""
    clean = y.astype(np.int64)
    order = np.argsort(_words("flip", len(y), seed), kind="stable")
    order = order[clean[order] != IGNORED]
    chosen = order[: round(rate * len(order))]
    labels = clean.copy()
    labels[chosen] = (clean[chosen] + shift[chosen].astype(np.int64)) % num_classes
    return noisy(clean, labels)


def integers(y: ArrayLike) -> np.ndarray:
    """Labels [n] on the host, from a list or any array. ValueError: they are no integers [n]."""
    y = np.asarray(y)
    if not np.issubdtype(y.dtype, np.integer) or y.ndim != 1:
        raise ValueError(f"y must be integer labels [n], got {y.dtype}{list(y.shape)}")
    return y


def check(y: ArrayLike, rate: float, num_classes: int) -> np.ndarray:
    """Labels [n] on the host; ValueError unless they, rate and number of classes go together."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2 for a label to be wrong, got {num_classes}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be >= 0 and <= 1, got {rate!r}")
    y = integers(y)
    known = y[y != IGNORED]
    if not len(known):
        raise ValueError("y must hold at least one label, got none")
    if known.min() < 0 or known.max() >= num_classes:
        raise ValueError(
            f"y must be labels from 0 to {num_classes - 1}, got {known.min()} to {known.max()}"
        )
    if rate and (nobody := num_classes - len(np.unique(known))):
        log.warning(
            "%d of %d classes have no example, and wrong labels may name them: number the classes "
            "that there are from 0 without gaps",
            nobody,
            num_classes,
        )
    return y


def _words(purpose: str, n: int, seed: int) -> np.ndarray:
    """As many independent 64-bit words; modulo a number of classes they are uniform to 1e-17."""
    return np.random.PCG64([int.from_bytes(purpose.encode()), seed]).random_raw(n)
