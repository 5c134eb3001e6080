"""What is kept: by score, ties by chance, never by place."""

import math
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chi2

from dynamics.scores.select import coverage_centric, keep, quotas, random, window

FEW = settings(derandomize=True, deadline=None, max_examples=25)
few_values = hnp.arrays(
    np.float32, st.integers(1, 40), elements=st.sampled_from([-1.5, -0.0, 0.0, 2.0, np.inf])
)

labels_of = lambda n: hnp.arrays(np.int32, n, elements=st.integers(3, 7))  # noqa: E731
seeds_ = st.integers(0, 2**31 - 1)


def uniform(counts: np.ndarray, trials: int, share: float) -> bool:
    """Whether examples kept without replacement, ``share`` of them each time, are kept alike."""
    m = len(counts)
    spread = trials * share * (1 - share) * m / (m - 1)
    statistic = ((counts - trials * share) ** 2).sum() / spread
    return 1e-4 < chi2.sf(statistic, m - 1) < 1 - 1e-4


def assert_rows(rows: np.ndarray, count: int, n: int) -> None:
    assert rows.dtype == np.int32 and len(rows) == count
    assert (np.diff(rows) > 0).all() and 0 <= rows[0] and rows[-1] < n


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# ---- the highest or lowest ----------------------------------------------------------------------


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
    assert_rows(kept, count, len(scores))
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
    assert counts[:5].sum() + counts[45:].sum() == 5 * seeds
    assert uniform(counts[5:45], seeds, 10 / 40)


def test_seeds_differ_only_in_ties() -> None:
    tied, different = np.zeros(30), np.arange(30.0)
    assert len({tuple(keep(tied, 10, "lowest", seed=seed)) for seed in range(20)}) == 20
    assert len({tuple(keep(different, 10, "lowest", seed=seed)) for seed in range(20)}) == 1


def test_never_learned_is_hardest() -> None:
    scores = np.array([0, np.inf, -np.inf, 1])
    np.testing.assert_array_equal(keep(scores, 2, "highest"), [1, 3])
    np.testing.assert_array_equal(keep(scores, 2, "lowest"), [0, 2])


@pytest.mark.parametrize("count", [1, 13, 39])
def test_the_highest_and_the_other_lowest_are_all_examples(count: int) -> None:
    """With one seed, ties included."""
    scores = np.random.default_rng(1).integers(0, 3, 40).astype(np.float32)
    high, low = keep(scores, count, "highest", seed=3), keep(scores, 40 - count, "lowest", seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate([high, low])), np.arange(40))


def test_an_unknown_choice_is_no_other_choice(unchecked: Any) -> None:
    """Users have no type checker at run time: 'hardest' must not mean 'lowest'."""
    with pytest.raises(ValueError, match="which.*'hardest'"):
        keep(np.arange(5.0), 2, "hardest")  # pyright: ignore


# ---- of each class ------------------------------------------------------------------------------


def test_quotas_by_hand() -> None:
    labels = np.repeat([9, 2, 5], [50, 30, 20])
    np.testing.assert_array_equal(quotas(labels, 10), [3, 2, 5])  # classes 2, 5, 9
    np.testing.assert_array_equal(quotas(labels, 3), [1, 1, 1])  # 0.9, 0.6, 1.5: two to give
    np.testing.assert_array_equal(quotas(labels, 1), [0, 0, 1])
    np.testing.assert_array_equal(quotas(labels, 99), [30, 20, 49])  # 29.7, 19.8, 49.5
    np.testing.assert_array_equal(quotas(labels.astype(np.uint8), 100), [30, 20, 50])


@FEW
@given(labels=st.integers(1, 60).flatmap(labels_of), data=st.data(), seed=seeds_)
def test_quotas_are_shares(labels: Any, data: Any, seed: int) -> None:
    n = len(labels)
    count = data.draw(st.integers(1, n))
    sizes = np.unique(labels, return_counts=True)[1]
    found = quotas(labels, count, seed)
    assert found.sum() == count and (found >= 0).all() and (found <= sizes).all()
    assert (np.abs(found - count * sizes / n) < 1).all()
    np.testing.assert_array_equal(found, quotas(labels[::-1], count, seed))


def test_equal_remainders_are_broken_by_chance() -> None:
    labels = np.arange(40) % 8
    counts = sum(quotas(labels, 11, seed) - 1 for seed in range(2000))
    assert uniform(np.asarray(counts), 2000, 3 / 8)


@pytest.mark.parametrize("which", ["highest", "lowest"])
@FEW
@given(scores=few_values, data=st.data(), seed=seeds_)
def test_each_class_keeps_its_own_best(which: Any, scores: Any, data: Any, seed: int) -> None:
    n = len(scores)
    labels, count = data.draw(labels_of(n)), data.draw(st.integers(1, n))
    kept = keep(scores, count, which, labels=labels, seed=seed)
    assert_rows(kept, count, n)
    classes, found = np.unique(labels), quotas(labels, count, seed)
    for c, quota in zip(classes, found, strict=True):
        inside = scores[kept][labels[kept] == c]
        left = np.delete(scores, kept)[np.delete(labels, kept) == c]
        assert len(inside) == quota
        if len(inside) and len(left):
            high, low = (inside, left) if which == "highest" else (left, inside)
            assert high.min() >= low.max()
    one = np.zeros(n, np.int64)
    plain = keep(scores, count, which, seed=seed)
    np.testing.assert_array_equal(keep(scores, count, which, labels=one, seed=seed), plain)


def test_ties_within_a_class_are_broken_by_chance() -> None:
    scores, labels = np.zeros(40), np.repeat([0, 1], [30, 10])
    counts = np.zeros(40)
    for seed in range(2000):
        counts[keep(scores, 8, "highest", labels=labels, seed=seed)] += 1
    assert counts[:30].sum() == 6 * 2000
    assert uniform(counts[:30], 2000, 6 / 30) and uniform(counts[30:], 2000, 2 / 10)


# ---- a window -----------------------------------------------------------------------------------


def test_a_window_by_hand() -> None:
    scores = np.array([0.3, 0.9, 0.1, 0.5, -2.0, np.inf])  # ascending: 4 2 0 3 1 5
    np.testing.assert_array_equal(window(scores, 2, offset=0), [2, 4])
    np.testing.assert_array_equal(window(scores, 2, offset=1), [0, 2])
    np.testing.assert_array_equal(window(scores, 2, drop=1), [1, 3])
    np.testing.assert_array_equal(window(scores, 2, drop=0), [1, 5])
    np.testing.assert_array_equal(window(scores, 6, offset=0), np.arange(6))
    labels = np.array([0, 1, 0, 1, 0, 1])  # 0: 4 2 0; 1: 3 1 5
    np.testing.assert_array_equal(window(scores, 2, offset=2, labels=labels), [1, 2])
    np.testing.assert_array_equal(window(scores, 2, drop=0, labels=labels), [0, 5])


@pytest.mark.parametrize("balanced", [False, True])
@FEW
@given(scores=few_values, data=st.data(), seed=seeds_)
def test_windows_are_what_is_left_between(balanced: bool, scores: Any, data: Any, seed: int) -> None:  # noqa: E501  # fmt: skip
    n = len(scores)
    count = data.draw(st.integers(1, n))
    offset, drop = data.draw(st.integers(0, n - count).map(lambda low: (low, n - count - low)))
    options = {"labels": data.draw(labels_of(n)) if balanced else None, "seed": seed}
    rows = window(scores, count, offset=offset, **options)
    assert_rows(rows, count, n)
    np.testing.assert_array_equal(rows, window(scores, count, drop=drop, **options))
    for which, ends in (("lowest", (0, n - count)), ("highest", (n - count, 0))):
        wanted = keep(scores, count, which, **options)
        np.testing.assert_array_equal(window(scores, count, offset=ends[0], **options), wanted)
        np.testing.assert_array_equal(window(scores, count, drop=ends[1], **options), wanted)
    if not balanced:
        both = keep(scores, offset + count, "lowest", seed=seed)
        below = keep(scores, offset, "lowest", seed=seed) if offset else []
        np.testing.assert_array_equal(rows, np.setdiff1d(both, below))
        return
    labels = options["labels"]
    for c, quota in zip(np.unique(labels), quotas(labels, count, seed), strict=True):
        own = np.sort(scores[labels == c])
        found = np.sort(scores[rows][labels[rows] == c])
        assert len(found) == quota
        if quota < len(own):  # some neighbours, about offset / (n - count) of the others below
            share = offset * (len(own) - quota) / (n - count)
            low = {math.floor(share), math.ceil(share)}
            assert any(np.array_equal(found, own[i : i + quota]) for i in low)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["offset=None", "drop=None", "exactly one"]),
        ({"offset": 0, "drop": 3}, ["offset=0", "drop=3"]),  # even if they agree
        ({"offset": 0, "drop": 0}, ["offset=0", "drop=0"]),
        ({"offset": 4}, ["offset", "0..3", "got 4"]),
        ({"offset": -1}, ["offset", "0..3", "got -1"]),
        ({"drop": 4}, ["drop", "0..3", "got 4"]),
        ({"drop": -1}, ["drop", "0..3", "got -1"]),
    ],
)
def test_windows_that_are_not_there(options: Any, words: Any) -> None:
    with pytest.raises(ValueError) as error:
        window(np.arange(5.0), 2, **options)
    assert all(word in str(error.value) for word in words), error.value


# ---- coverage -----------------------------------------------------------------------------------


def allocation(scores: Any, count: int, cutoff: float, strata: int) -> list[tuple[int, int]]:
    """(size, budget) of each stratum, as the paper's algorithm reads."""
    kept = sorted(float(s) for s in scores)[: len(scores) - math.floor(cutoff * len(scores))]
    step = (kept[-1] - kept[0]) / strata
    sizes = []
    for i in range(strata):
        start, end = kept[0] + i * step, kept[0] + (i + 1) * step
        inside = [s for s in kept if start <= s and (s < end or i == strata - 1)]
        sizes.append(len(inside))
    found, budget = [], count
    for i, size in enumerate(sorted(sizes)):
        share = min(size, budget // (strata - i))
        found.append((size, share))
        budget -= share
    return found


def test_coverage_by_hand() -> None:
    """Strata of 1, 2 and 7 examples, and two hardest that are cut off; 6 = 1 + 2 + 3."""
    scores = np.array([0.0, 9.0, 4.0, 5.0, *np.linspace(6.5, 8.9, 6), 50.0, 60.0])
    for seed in range(20):
        rows = coverage_centric(scores, 6, cutoff=2 / 12, strata=3, seed=seed)
        assert_rows(rows, 6, 12)
        assert {0, 2, 3} < set(rows) and rows[-1] < 10
    np.testing.assert_array_equal(coverage_centric(scores, 10, cutoff=2 / 12), np.arange(10))


@FEW
@given(seed=st.integers(0, 999), data=st.data())
def test_coverage_is_the_papers_algorithm(seed: int, data: Any) -> None:
    generator = np.random.default_rng(seed)
    n = data.draw(st.integers(1, 80))
    scores = generator.exponential(size=n).astype(np.float32)
    cutoff = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5]))
    left = n - math.floor(cutoff * n)
    count, strata = data.draw(st.integers(1, left)), data.draw(st.integers(1, 60))
    rows = coverage_centric(scores, count, cutoff=cutoff, strata=strata, seed=seed)
    assert_rows(rows, count, n)
    easy = keep(scores, left, "lowest")
    assert set(rows) <= set(easy)
    low, high = float(scores[easy].min()), float(scores[easy].max())
    place = np.zeros(left, int)
    if high > low:
        width = (high - low) / strata
        place = np.minimum((scores[easy].astype(np.float64) - low) // width, strata - 1).astype(int)
    sizes = np.bincount(place, minlength=strata)
    taken = np.bincount(place[np.isin(easy, rows)], minlength=strata)
    found = sorted(zip(sizes.tolist(), taken.tolist(), strict=True))
    if high > low:
        assert found == sorted(allocation(scores, count, cutoff, strata))
    assert sum(share for _, share in found) == count


def test_strata_are_drawn_from_uniformly() -> None:
    """Also where the cutoff went through a tie, and among strata of one size."""
    scores = np.repeat([0.0, 0.1, 1.0, 2.0], [10, 10, 20, 30])  # 0 and 0.1 are one stratum of two
    counts = np.zeros(70)
    for seed in range(2000):
        rows = coverage_centric(scores, 25, cutoff=20 / 70, strata=2, seed=seed)
        assert len(rows) == 25
        counts[rows] += 1
    # 20 below, 30 above: 12 + 13; of the 30 ties at the top 10 survive the cutoff
    assert counts[:20].sum() == 2000 * 12 and uniform(counts[:20], 2000, 12 / 20)
    assert uniform(counts[20:40], 2000, 13 / 30)
    assert abs(counts[40:].sum() / counts[20:40].sum() - 10 / 20) < 0.02
    counts = np.zeros(40)
    for seed in range(2000):
        rows = coverage_centric(np.arange(40.0), 7, cutoff=0.0, strata=4, seed=seed)
        counts[rows] += 1
    assert uniform(counts.reshape(4, 10).sum(axis=1) - 2000, 2000, 3 / 4)


def test_a_score_with_few_values_has_few_strata() -> None:
    equal = coverage_centric(np.ones(9), 4, cutoff=0.0)
    assert_rows(equal, 4, 9)
    never = np.array([0, 1, 2, 3, np.inf, np.inf, -np.inf])  # beside 3, and beside 0
    for seed in range(10):
        rows = coverage_centric(never, 4, cutoff=0.0, strata=3, seed=seed)
        assert {1} < set(rows) and len({0, 6} & set(rows)) == 1
        assert len({2, 3, 4, 5} & set(rows)) == 2
    assert_rows(coverage_centric(np.full(5, np.inf), 2, cutoff=0.0), 2, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cutoff": 1.5}, ["cutoff", "0..1", "1.5"]),
        ({"cutoff": -0.1}, ["cutoff", "0..1", "-0.1"]),
        ({"cutoff": float("nan")}, ["cutoff", "nan"]),
        ({"cutoff": 0.5}, ["count", "at most 5", "cutoff", "10 examples", "got 6"]),
        ({"cutoff": 1.0}, ["count", "at most 0"]),
        ({"cutoff": 0.1, "strata": 0}, ["strata", "0"]),
    ],
)
def test_coverage_that_is_not_there(options: Any, words: Any) -> None:
    with pytest.raises(ValueError) as error:
        coverage_centric(np.arange(10.0), 6, **options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_cutoff_is_counted_in_decimals() -> None:
    """0.29 of 100 examples are 29, though 0.29 * 100 < 29 in floating point."""
    rows = coverage_centric(np.arange(100.0), 71, cutoff=0.29)
    np.testing.assert_array_equal(rows, np.arange(71))


# ---- at random ----------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [None, np.repeat([4, 1], [30, 10])], ids=["all", "balanced"])
def test_random_subsets_are_uniform(labels: Any) -> None:
    counts = np.zeros(40)
    for seed in range(2000):
        rows = random(40, 12, labels=labels, seed=seed)
        assert_rows(rows, 12, 40)
        counts[rows] += 1
    if labels is None:
        assert uniform(counts, 2000, 12 / 40)
    else:
        assert counts[:30].sum() == 9 * 2000
        assert uniform(counts[:30], 2000, 9 / 30) and uniform(counts[30:], 2000, 3 / 10)
    np.testing.assert_array_equal(random(40, 12, seed=5), random(40, 12, seed=5))
    np.testing.assert_array_equal(random(40, 40, labels=labels), np.arange(40))


def test_a_random_subset_is_no_tie_break() -> None:
    """With one seed, the baseline of a tied score is independent of that score's subset."""
    shared = 0
    for seed in range(200):
        tied = keep(np.zeros(40), 20, "lowest", seed=seed)
        shared += len(np.intersect1d(random(40, 20, seed=seed), tied))
    assert abs(shared / 200 - 10) < 4 * np.sqrt(20 * 20 * 20 * 20 / (40**2 * 39) / 200)


# ---- refusals all of them share -----------------------------------------------------------------

SCORES, NAN = np.arange(5.0), np.array([0, np.nan, 1, np.nan, 2])
LABELS = np.arange(5)
CHOICES = {
    "keep": lambda scores, count, **o: keep(scores, count, "lowest", **o),
    "window": lambda scores, count, **o: window(scores, count, offset=0, **o),
    "coverage": lambda scores, count: coverage_centric(scores, count, cutoff=0.1),
    "random": lambda scores, count, **o: random(len(scores), count, **o),
    "quotas": lambda scores, count, labels=LABELS: quotas(labels, count),
}


@pytest.mark.parametrize("name", CHOICES)
def test_counts_and_nan_are_refused_everywhere(name: str) -> None:
    for count in (0, -1, 6):
        with pytest.raises(ValueError, match=rf"1\.\.5, got {count}"):
            CHOICES[name](SCORES, count)
    if name not in ("random", "quotas"):
        with pytest.raises(ValueError, match="2 NaN of 5"):
            CHOICES[name](NAN, 1)


@pytest.mark.parametrize("name", ["keep", "window", "random", "quotas"])
def test_labels_that_do_not_fit_are_refused(unchecked: Any, name: str) -> None:
    wrong = [np.zeros((5, 2), int), np.zeros(5)]
    wrong += [np.zeros(4, int)] if name != "quotas" else []
    for labels in wrong:
        with pytest.raises(ValueError, match=rf"labels.*integers.*{labels.dtype} of shape \("):
            CHOICES[name](SCORES, 2, labels=labels)
