"""What is kept: by score, ties by chance, never by place."""

from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chi2

from dynamics.scores import keep

FEW = settings(derandomize=True, deadline=None, max_examples=25)
few_values = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.sampled_from([-1.5, -0.0, 0.0, 2.0, np.inf])
)


def test_highest_and_lowest() -> None:
    scores = np.array([0.3, 0.9, 0.1, 0.5, -2.0])
    np.testing.assert_array_equal(keep(scores, 2, "highest"), [1, 3])
    np.testing.assert_array_equal(keep(scores, 2, "lowest"), [2, 4])
    np.testing.assert_array_equal(keep(scores, 5, "lowest"), np.arange(5))
    np.testing.assert_array_equal(keep(scores, 1, "highest"), [1])


@pytest.mark.parametrize("which", ["highest", "lowest"])
@FEW
@given(scores=few_values, data=st.data(), seed=st.integers(0, 2**31 - 1))
def test_what_is_kept_is_not_worse_than_what_is_not(which: Any, scores: Any, data: Any, seed: int) -> None:  # noqa: E501  # fmt: skip
    count = data.draw(st.integers(1, len(scores)))
    before = scores.copy()
    kept = keep(scores, count, which, seed=seed)
    np.testing.assert_array_equal(scores, before)
    assert kept.dtype == np.int32 and len(kept) == count
    assert (np.diff(kept) > 0).all() and 0 <= kept[0] and kept[-1] < len(scores)
    left = np.delete(scores, kept)
    if len(left):
        inside = scores[kept]
        worst = inside.min() >= left.max() if which == "highest" else inside.max() <= left.min()
        assert worst
    np.testing.assert_array_equal(kept, keep(scores, count, which, seed=seed))
    more = keep(scores, min(count + 3, len(scores)), which, seed=seed)
    assert set(kept) <= set(more)  # subsets of one score and seed are nested


def test_the_highest_are_the_lowest_of_the_negative() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    np.testing.assert_array_equal(keep(scores, 20, "highest"), keep(-scores, 20, "lowest"))
    rest = np.setdiff1d(np.arange(50), keep(scores, 20, "highest"))
    np.testing.assert_array_equal(rest, keep(scores, 30, "lowest"))


@pytest.mark.parametrize("which", ["highest", "lowest"])
def test_ties_are_broken_by_chance(which: Any) -> None:
    """Of 40 tied examples 10 are kept: each as often as any other, over 2000 seeds."""
    scores = np.ones(50)
    scores[:5], scores[45:] = 2.0, 0.0
    seeds, best = 2000, range(5) if which == "highest" else range(45, 50)
    counts = np.zeros(50)
    for seed in range(seeds):
        kept = keep(scores, 15, which, seed=seed)
        assert set(best) <= set(kept)
        counts[kept] += 1
    tied, share = counts[5:45], 10 / 40
    assert counts[:5].sum() + counts[45:].sum() == 5 * seeds
    statistic = ((tied - seeds * share) ** 2).sum() / (seeds * share * (1 - share)) * 39 / 40
    assert 1e-4 < chi2.sf(statistic, 39) < 1 - 1e-4


def test_seeds_differ_only_in_ties() -> None:
    tied, different = np.zeros(30), np.arange(30.0)
    assert len({tuple(keep(tied, 10, "lowest", seed=seed)) for seed in range(20)}) == 20
    assert len({tuple(keep(different, 10, "lowest", seed=seed)) for seed in range(20)}) == 1


@pytest.mark.parametrize("count", [0, -1, 6])
def test_counts_outside_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.5, got {count}"):
        keep(np.arange(5.0), count, "highest")


def test_nan_is_refused_and_infinity_is_not() -> None:
    with pytest.raises(ValueError, match="2 NaN of 4"):
        keep(np.array([0, np.nan, 1, np.nan]), 1, "highest")
    scores = np.array([0, np.inf, -np.inf, 1])  # never learned is hardest
    np.testing.assert_array_equal(keep(scores, 2, "highest"), [1, 3])
    np.testing.assert_array_equal(keep(scores, 2, "lowest"), [0, 2])


def test_an_unknown_choice_is_no_other_choice() -> None:
    """Users have no type checker at run time: 'hardest' must not mean 'lowest'."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match="which.*'hardest'"):
            keep(np.arange(5.0), 2, "hardest")  # pyright: ignore
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
