"""Label noise: how many, which, to what; and that a seed and a rate determine it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from dynamics.data.corrupt import (
    CIFAR10_CONFUSED,
    CIFAR100_BLOCKS,
    CIFAR100_SUPERCLASSES,
    asymmetric_cifar10,
    circular,
    noisy,
    symmetric,
    symmetric_including,
    transition,
)

MODELS = [symmetric, symmetric_including]
cases = given(
    n=st.integers(1, 300),
    num_classes=st.integers(2, 12),
    rate=st.floats(0, 1),
    seed=st.integers(0, 2**31 - 1),
)
FEW = settings(derandomize=True, deadline=None, max_examples=100)


def labels(n, num_classes, seed=0):
    return np.random.default_rng(seed).integers(0, num_classes, n).astype(np.int32)


@FEW
@cases
def test_symmetric_flips_exactly_that_many_to_another_class(n, num_classes, rate, seed):
    y = labels(n, num_classes)
    before = y.copy()
    out = symmetric(y, rate, num_classes, seed)
    np.testing.assert_array_equal(y, before)
    np.testing.assert_array_equal(out.clean, y)
    np.testing.assert_array_equal(out.mask, out.labels != y)
    assert out.mask.sum() == round(rate * n)
    assert out.rate == out.mask.sum() / n
    assert out.labels.dtype == out.clean.dtype == np.int32 and out.mask.dtype == bool
    assert 0 <= out.labels.min() and out.labels.max() < num_classes


@FEW
@cases
def test_symmetric_including_redraws_at_most_that_many(n, num_classes, rate, seed):
    y = labels(n, num_classes)
    out = symmetric_including(y, rate, num_classes, seed)
    assert out.mask.sum() <= round(rate * n)
    assert not (out.mask & ~symmetric(y, rate, num_classes, seed).mask).any()  # the same examples
    assert 0 <= out.labels.min() and out.labels.max() < num_classes


@pytest.mark.parametrize("model", MODELS)
@FEW
@cases
def test_a_lower_rate_is_part_of_a_higher_one(model, n, num_classes, rate, seed):
    y = labels(n, num_classes)
    low, high = (model(y, r, num_classes, seed) for r in (rate / 2, rate))
    assert not (low.mask & ~high.mask).any()
    np.testing.assert_array_equal(low.labels[low.mask], high.labels[low.mask])


@pytest.mark.parametrize("model, including", [(symmetric, 0), (symmetric_including, 1)])
def test_new_labels_are_uniform(model, including):
    """Chi-square of (true class, new class) counts, at a level of 1e-4."""
    num_classes, n = 7, 70_000
    y = np.repeat(np.arange(num_classes), n // num_classes)
    out = model(y, 1.0, num_classes, 3)
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (y, out.labels), 1)
    if not including:
        np.testing.assert_array_equal(np.diag(counts), 0)
    expected = n / num_classes / (num_classes - 1 + including)
    cells = counts[~np.eye(num_classes, dtype=bool)] if not including else counts
    statistic = ((cells - expected) ** 2 / expected).sum()
    freedom = num_classes * (num_classes - 2 + including)
    assert chi2.ppf(1e-4, freedom) < statistic < chi2.ppf(1 - 1e-4, freedom)


def test_which_examples_are_flipped_is_uniform():
    """Each of 50 examples is flipped in 0.3 of 2000 seeds; chi-square at a level of 1e-4."""
    y, seeds = labels(50, 10), 2000
    counts = sum(symmetric(y, 0.3, 10, seed).mask.astype(float) for seed in range(seeds))
    variance = seeds * 0.3 * 0.7 * 50 / 49  # 15 of 50 without replacement
    statistic = ((counts - 0.3 * seeds) ** 2 / variance).sum()
    assert chi2.ppf(1e-4, 49) < statistic < chi2.ppf(1 - 1e-4, 49)


@pytest.mark.parametrize("num_classes", [10, 100])
@pytest.mark.parametrize("rate", [0.2, 0.4, 0.6, 0.8])
def test_symmetric_including_leaves_its_known_part_wrong(rate, num_classes):
    """ELR's noise: r (1 - 1/C) of the labels are wrong; within 4 standard errors."""
    n, p = 50_000, 1 - 1 / num_classes
    out = symmetric_including(labels(n, num_classes), rate, num_classes, 0)
    assert abs(out.rate - rate * p) < 4 * np.sqrt(rate * p * (1 - p) / n)


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_determines_the_noise(model):
    y = labels(1000, 10)
    one, again, other = (model(y, 0.4, 10, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.labels, again.labels)
    assert (one.labels != other.labels).any()


def test_the_noise_of_seed_0_is_this_on_every_machine():
    """If this fails, noise changed for every seed: all results with label noise must be redone."""
    y = np.arange(12) % 3
    assert symmetric(y, 0.5, 3, 0).labels.tolist() == [0, 0, 1, 1, 2, 2, 1, 1, 2, 0, 2, 2]
    including = symmetric_including(y, 0.5, 3, 0)
    assert including.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 1, 2, 0, 2, 2]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "y, rate, num_classes, message",
    [
        ([0, 1], 1.01, 2, "rate must be >= 0 and <= 1, got 1.01"),
        ([0, 1], -0.1, 2, "rate must be >= 0 and <= 1, got -0.1"),
        ([0, 1], float("nan"), 2, "rate must be .*, got nan"),
        ([0, 2], 0.5, 2, "y must be labels from 0 to 1, got 0 to 2"),
        ([-1, 1], 0.5, 2, "y must be labels from 0 to 1, got -1 to 1"),
        ([0, 0], 0.5, 1, "num_classes must be >= 2 for a label to be wrong, got 1"),
        ([], 0.5, 2, "y must hold at least one label, got none"),
    ],
)
def test_bad_arguments(model, y, rate, num_classes, message):
    with pytest.raises(ValueError, match=message):
        model(np.array(y, np.int32), rate, num_classes, 0)


def test_noisy_compares_before_and_after():
    out = noisy(np.array([0, 1, 2, 3]), np.array([0, 2, 2, 0]))
    assert out.mask.tolist() == [False, True, False, True] and out.rate == 0.5
    assert out.labels.tolist() == [0, 2, 2, 0] and out.clean.tolist() == [0, 1, 2, 3]


# ---- noise that knows the classes ---------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.4, 0.49])
def test_asymmetric_noise_of_cifar10(rate):
    y = labels(5_000, 10)
    out = asymmetric_cifar10(y, rate, 3)
    for label in range(10):
        mine = y == label
        flipped = math.ceil(rate * mine.sum()) if label in CIFAR10_CONFUSED else 0
        assert (out.mask & mine).sum() == flipped
        assert (out.labels[out.mask & mine] == CIFAR10_CONFUSED.get(label, -1)).all()
    assert out.rate == pytest.approx(rate / 2, abs=0.02)
    less = asymmetric_cifar10(y, rate / 2, 3)
    assert not (less.mask & ~out.mask).any()


def test_superclasses_are_twenty_fives_and_not_neighbours_in_the_alphabet():
    for blocks in (CIFAR100_BLOCKS, CIFAR100_SUPERCLASSES):
        assert [len(block) for block in blocks] == [5] * 20
        assert sorted(label for block in blocks for label in block) == list(range(100))
    coarse = {fine: k for k, block in enumerate(CIFAR100_SUPERCLASSES) for fine in block}
    following = [(b[i], b[(i + 1) % 5]) for b in CIFAR100_BLOCKS for i in range(5)]
    assert sum(coarse[a] == coarse[b] for a, b in following) == 6


@pytest.mark.parametrize("blocks", [CIFAR100_BLOCKS, CIFAR100_SUPERCLASSES])
def test_circular_noise_stays_in_its_block(blocks):
    y = np.tile(np.arange(100), 40)
    out = circular(y, 0.3, blocks, 0)
    assert out.mask.sum() == 100 * 12
    home = {label: k for k, block in enumerate(blocks) for label in block}
    for a, b in zip(y[out.mask], out.labels[out.mask], strict=True):
        assert home[a] == home[b] and blocks[home[a]].index(b) == (blocks[home[a]].index(a) + 1) % 5


def test_transition_draws_from_its_rows():
    matrix = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    y = np.repeat(np.arange(3), 20_000)
    out = transition(y, matrix, 1)
    for label, row in enumerate(matrix):
        counts = np.bincount(out.labels[y == label], minlength=3)
        assert (counts[row == 0] == 0).all()
        some = row > 0
        statistic = (((counts - 20_000 * row)[some] ** 2) / (20_000 * row[some])).sum()
        assert chi2.sf(statistic, max(some.sum() - 1, 1)) > 1e-3
    assert out.rate == pytest.approx((0.3 + 0 + 0.5) / 3, abs=0.01)
    np.testing.assert_array_equal(transition(y, np.eye(3), 1).labels, y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: asymmetric_cifar10(y, 0.5, 0), "rate must be < 0.5"),
        (lambda y: circular(y, 0.3, [[0, 1]], 0), "missing"),
        (lambda y: circular(y, 0.3, [[0, 1, 2], [2, 3]], 0), "every label once"),
        (lambda y: transition(y, np.full((4, 4), 0.3), 0), "sum to 1"),
        (lambda y: transition(y, np.eye(3), 0), "y must be labels from 0 to 2"),
    ],
)
def test_impossible_noise_that_knows_the_classes_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.array([0, 1, 2, 3]))
