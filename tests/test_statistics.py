"""Closed forms and brute force, then invariances, then the coverage of the intervals."""

import collections
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from dynamics import statistics


def resampled_means(values):
    """Every one of the n^n resamples, in pure Python: mean -> probability."""
    n = len(values)
    out = collections.Counter()
    for resample in itertools.product(values, repeat=n):
        out[round(math.fsum(resample) / n, 12)] += 1
    return {mean: count / n**n for mean, count in sorted(out.items())}


def quantile(distribution, probability):
    reached = 0.0
    for value, weight in distribution.items():
        reached += weight
        if reached >= probability - 1e-12:
            return value
    raise AssertionError(probability)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_few_values_give_the_exact_quantiles_of_all_resamples(n, level):
    values = np.random.default_rng(n).normal(size=n).round(3)
    distribution = resampled_means(values.tolist())
    t = scipy.stats.t.ppf(0.5 + level / 2, n - 1) * math.sqrt(n / (n - 1))
    tail = scipy.stats.norm.cdf(-t)
    mirrored = {-m: w for m, w in reversed(distribution.items())}
    got = statistics.bootstrap(values, level=level)
    assert got.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert got.low == pytest.approx(quantile(distribution, tail), abs=1e-11)
    assert got.high == pytest.approx(-quantile(mirrored, tail), abs=1e-11)


def test_drawn_resamples_agree_with_the_enumerated_ones():
    values = np.random.default_rng(0).normal(size=8)
    exact = statistics.bootstrap(values)
    drawn = statistics.bootstrap(values, num_resamples=6_000)  # of 6,435 multisets: not enumerated
    assert exact != drawn
    assert drawn == pytest.approx(exact, abs=0.06)


def test_many_values_give_the_normal_interval():
    values = np.random.default_rng(0).normal(size=4_000)
    mean, low, high = statistics.bootstrap(values, num_resamples=2_000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low - mean, high - mean) == pytest.approx((-half, half), rel=0.08)


@pytest.mark.parametrize("n", [1, 2, 5, 8, 10, 31])
def test_swapping_mirrors_and_shuffling_changes_nothing(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(2, n))
    one, other = statistics.paired(a, b), statistics.paired(b, a)
    assert (one.mean, one.low, one.high) == (-other.mean, -other.high, -other.low)
    assert one.p_value == other.p_value
    np.testing.assert_array_equal(one.differences, -other.differences)
    order = rng.permutation(n)
    assert statistics.paired(a[order], b[order])[:5] == one[:5]


def test_scaling_scales_and_shifting_shifts():
    values = np.random.default_rng(0).normal(size=10)
    base = np.array(statistics.bootstrap(values))
    np.testing.assert_allclose(statistics.bootstrap(values * 100), base * 100, rtol=1e-12)
    np.testing.assert_allclose(statistics.bootstrap(values + 3), base + 3, rtol=1e-12)


def test_equal_values_have_an_interval_of_no_width_and_one_value_none():
    assert statistics.bootstrap([0.1] * 6) == (0.1, 0.1, 0.1)
    assert statistics.bootstrap([0.1] * 30) == pytest.approx((0.1, 0.1, 0.1), rel=1e-15)
    assert statistics.bootstrap([0.3]) == (0.3, -math.inf, math.inf)
    got = statistics.paired([1.0], [0.5])
    assert got[:5] == (0.5, -math.inf, math.inf, 1, 1.0)


@pytest.mark.parametrize(("n", "expected"), [(3, 0.75), (5, 0.93), (10, 0.95)])
def test_coverage_on_normal_data(n, expected):
    trials = 600
    rng = np.random.default_rng(n)
    hits = 0
    for values in rng.normal(1.0, 2.0, size=(trials, n)):
        _, low, high = statistics.bootstrap(values, num_resamples=1_000)
        hits += low <= 1.0 <= high
    assert abs(hits / trials - expected) <= 4 * math.sqrt(expected * (1 - expected) / trials)


def test_sign_test_closed_forms():
    assert statistics.sign_test([1.0] * 10) == 2 / 1024
    assert statistics.sign_test([1.0] * 9 + [-1.0]) == 22 / 1024
    assert statistics.sign_test([1.0, -1.0]) == 1.0
    assert statistics.sign_test([0.0, 0.0]) == 1.0
    assert statistics.sign_test([0.0] * 5 + [2.0] * 5) == 2 / 32
    assert statistics.sign_test([-1.0] * 2_000) == 0.0  # 2^-1999: below the smallest float


@pytest.mark.parametrize(("positive", "negative"), [(7, 3), (3, 7), (5, 5), (31, 12), (0, 4)])
def test_sign_test_is_the_binomial_test(positive, negative):
    differences = [0.5] * positive + [-2.0] * negative + [0.0] * 3
    reference = scipy.stats.binomtest(positive, positive + negative, 0.5).pvalue
    assert statistics.sign_test(differences) == pytest.approx(reference, rel=1e-12)


def test_paired_says_what_is_wrong():
    with pytest.raises(ValueError, match="as many values of a as of b, got 3 and 2"):
        statistics.paired([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="b must be finite, got nan at 1"):
        statistics.paired([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(ValueError, match="a must be finite, got inf at 0"):
        statistics.paired([math.inf], [1.0])
    with pytest.raises(ValueError, match="a must be a vector of at least one value"):
        statistics.paired([], [])
    with pytest.raises(ValueError, match=r"values must be a vector .* got \(2, 2\)"):
        statistics.bootstrap(np.ones((2, 2)))
    with pytest.raises(ValueError, match="level must be between 0 and 1, got 95.0"):
        statistics.bootstrap([1.0, 2.0], level=95.0)
    with pytest.raises(ValueError, match="num_resamples must be >= 2, got 0"):
        statistics.bootstrap([1.0, 2.0], num_resamples=0)


def test_jackknife_of_the_mean_is_students_interval():
    values = np.random.default_rng(0).normal(size=7)
    got = statistics.jackknife(np.mean, values)
    reference = scipy.stats.t.interval(0.95, 6, values.mean(), scipy.stats.sem(values))
    assert got.mean == pytest.approx(values.mean(), rel=1e-12)
    assert (got.low, got.high) == pytest.approx(reference, rel=1e-10)
    assert statistics.jackknife(np.mean, [2.0]) == (2.0, -math.inf, math.inf)
    with pytest.raises(ValueError, match=r"R >= 1, got shape \(0, 4\)"):
        statistics.jackknife(np.mean, np.ones((0, 4)))


def test_jackknife_covers_the_correlation_of_averaged_scores():
    """Averages of 8 noisy copies of two scores: the truth is what many such averages give."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=60)

    def correlate(both):
        average = both.mean(axis=0)
        return statistics.spearman(average[:, 0], average[:, 1])

    draws = [truth[:, None] + rng.normal(size=(8, 60, 2)) for _ in range(300)]
    expected = np.mean([correlate(draw) for draw in draws])
    estimates = [statistics.jackknife(correlate, draw) for draw in draws]
    coverage = np.mean([e.low <= expected <= e.high for e in estimates])
    assert 0.9 <= coverage <= 1.0


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 9, 30, 1_346])
@pytest.mark.parametrize("probability", [0.001, 0.025, 0.3, 0.5, 0.9, 0.975, 0.9999])
def test_student_quantile(dof, probability):
    reference = scipy.stats.t.ppf(probability, dof)
    got = statistics.student_quantile(probability, dof)
    assert got == pytest.approx(reference, rel=1e-9, abs=1e-12)


def test_student_quantile_says_what_is_wrong():
    with pytest.raises(ValueError, match="got 1.0 and 3"):
        statistics.student_quantile(1.0, 3)
    with pytest.raises(ValueError, match="got 0.5 and 0"):
        statistics.student_quantile(0.5, 0)


@pytest.mark.parametrize("seed", range(4))
def test_ranks_and_spearman_with_ties(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 6, size=(2, 40)).astype(float)
    np.testing.assert_array_equal(statistics.ranks(a), scipy.stats.rankdata(a))
    reference = scipy.stats.spearmanr(a, b).statistic
    assert statistics.spearman(a, b) == pytest.approx(reference, rel=1e-12, abs=1e-15)


def test_spearman_closed_form_and_invariances():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50))
    d = statistics.ranks(a) - statistics.ranks(b)
    closed = 1 - 6 * np.sum(d**2) / (50 * (50**2 - 1))  # no ties
    rho = statistics.spearman(a, b)
    assert rho == pytest.approx(closed, rel=1e-12)
    assert statistics.spearman(np.exp(a), b**3) == rho
    assert statistics.spearman(-a, b) == pytest.approx(-rho, rel=1e-12)
    assert statistics.spearman(b, a) == rho
    order = rng.permutation(50)
    assert statistics.spearman(a[order], b[order]) == pytest.approx(rho, rel=1e-12)
    assert statistics.spearman(a, a) == 1.0
    assert math.isnan(statistics.spearman(a, np.ones(50)))
    assert statistics.spearman([1.0, math.inf], [0.0, 1.0]) == 1.0  # never learned: forgets inf


def test_spearman_says_what_is_wrong():
    with pytest.raises(ValueError, match="got 2 and 3"):
        statistics.spearman([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="must be numbers, got nan at 0"):
        statistics.spearman([math.nan, 2], [1, 2])


@pytest.mark.parametrize("seed", range(4))
def test_auc_by_counting_pairs(seed):
    rng = np.random.default_rng(seed)
    scores, mask = rng.integers(0, 8, size=30).astype(float), rng.random(30) < 0.3
    pairs = [(x > y) + 0.5 * (x == y) for x in scores[mask] for y in scores[~mask]]
    value = statistics.auc(scores, mask)
    assert value == pytest.approx(np.mean(pairs), rel=1e-12)
    assert statistics.auc(np.exp(scores), mask) == value
    assert statistics.auc(-scores, mask) == pytest.approx(1 - value, rel=1e-12)
    assert statistics.auc(scores, ~mask) == pytest.approx(1 - value, rel=1e-12)
    assert statistics.auc(np.zeros(30), mask) == 0.5
    assert statistics.auc(mask.astype(float), mask) == 1.0


def test_auc_says_what_is_wrong():
    with pytest.raises(ValueError, match="got 2 true and 0 false"):
        statistics.auc([1.0, 2.0], np.array([True, True]))
    with pytest.raises(ValueError, match=r"mask must be bool\[2\], got int64"):
        statistics.auc([1.0, 2.0], np.array([1, 0]))


@pytest.mark.parametrize("seed", range(4))
def test_precision_and_recall_by_counting(seed):
    found, wrong = np.random.default_rng(seed).random((2, 40)) < 0.4
    both = sum(1 for f, w in zip(found, wrong, strict=True) if f and w)
    wanted = (both / sum(found), both / sum(wrong))
    assert statistics.precision_recall(found, wrong) == wanted
    assert statistics.precision_recall(wrong, found) == wanted[::-1]
    assert statistics.precision_recall(list(found), list(wrong)) == wanted
    assert statistics.precision_recall(wrong, wrong) == (1.0, 1.0)


def test_precision_and_recall_of_nothing():
    some, none = np.array([True, False]), np.array([False, False])
    precision, recall = statistics.precision_recall(none, some)
    assert math.isnan(precision) and recall == 0
    precision, recall = statistics.precision_recall(some, none)
    assert precision == 0 and math.isnan(recall)
    assert all(map(math.isnan, statistics.precision_recall(none, none)))


def test_precision_and_recall_say_what_is_wrong():
    mask = np.array([True, False])
    with pytest.raises(ValueError, match=r"got found int64 of shape \(2,\)"):
        statistics.precision_recall(np.array([1, 0]), mask)
    with pytest.raises(ValueError, match=r"got found bool of shape \(1,\) where .* shape \(2,\)"):
        statistics.precision_recall(mask[:1], mask)


def judged(effect, **gate):
    return statistics.judge(
        statistics.Estimate(effect, effect - 1, effect + 1),
        figure="f", paper="p", statement="s", quantity="q", seeds=3, scale="made up",
        unit="points", **gate,
    )  # fmt: skip


def test_a_claim_holds_by_its_effect_alone():
    assert judged(0.5, at_least=0.5).holds
    assert not judged(0.49, at_least=0.5).holds
    assert not judged(-0.5, at_least=0.5).holds
    assert judged(-5.0, at_most=-5.0).holds
    assert not judged(5.0, at_most=-5.0).holds
    assert not judged(math.nan, at_least=0.5).holds
    assert not judged(math.nan, at_most=0.5).holds
    claim = judged(2.0, at_least=0.5)
    assert (claim.effect, claim.interval, claim.gate) == (2.0, (1.0, 3.0), ">= +0.5")
    assert claim.holds is True
    for gate in ({}, {"at_least": 1.0, "at_most": 2.0}):
        with pytest.raises(ValueError, match="a gate is one of"):
            judged(1.0, **gate)


def test_jax_is_not_imported():
    code = "import sys, dynamics.statistics; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- averages over replicas ---------------------------------------------------------------------


def test_averages_over_replicas_leave_out_what_is_missing():
    nan, inf = np.nan, np.inf
    values = [[1.0, nan, nan, 4.0, 5.0], [3.0, 2.0, nan, inf, 5.0], [8.0, 6.0, nan, 1.0, 5.0]]
    mean, error = statistics.over_replicas(values)
    np.testing.assert_allclose(mean, [4.0, 4.0, nan, inf, 5.0])
    np.testing.assert_allclose(error, [np.sqrt(13 / 3), np.sqrt(8 / 2), nan, nan, 0.0])
    one, unknown = statistics.over_replicas([[2.0, nan]])
    np.testing.assert_array_equal(one, [2.0, nan])
    assert np.isnan(unknown).all()


def test_the_standard_error_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=(7, 3, 5))
    mean, error = statistics.over_replicas(values)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(error, scipy.stats.sem(values, axis=0))
