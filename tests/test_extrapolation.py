"""Learning-rate sensitivity, and extrapolation with its prediction interval."""

import math

import numpy as np
import pytest

from dynamics.statistics import extrapolate, learning_rate_sensitivity, student_quantile

RATES = [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([3, 2, 1, 2], (2 + 1 + 0 + 1) / 4),
        ([3, 2, 1, 9], (2 + 1 + 0 + 4) / 4),  # clipped at the initial loss
        ([3, 2, 1, NAN], (2 + 1 + 0 + 4) / 4),
        ([3, 2, 1, INF], (2 + 1 + 0 + 4) / 4),
        ([3, 2, 1, -INF], (2 + 1 + 0 + 4) / 4),
        ([9, 9, 9, 9], 0.0),
        ([NAN, NAN, NAN, NAN], 0.0),
        ([5, 5, 4, 5], 0.75),
    ],
)
def test_sensitivity_as_defined(losses, wanted):
    assert learning_rate_sensitivity(RATES[:4], losses, 5.0) == pytest.approx(wanted, abs=1e-15)


def test_sensitivity_of_many_runs_is_that_of_each():
    rng = np.random.default_rng(0)
    losses, initial = rng.uniform(1, 6, (3, 2, 7)), rng.uniform(4, 5, (3, 2))
    found = learning_rate_sensitivity(RATES, losses, initial)
    assert found.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        kept = [min(loss, initial[i, j]) for loss in losses[i, j]]
        assert found[i, j] == pytest.approx(sum(kept) / 7 - min(kept), abs=1e-14)


def test_sensitivity_does_not_see_a_shift_of_the_loss():
    losses = np.array([3.0, 2, 1, 2, 4, 8, 9])
    shifted = learning_rate_sensitivity(RATES, losses + 0.5, 5.5)
    assert shifted == pytest.approx(learning_rate_sensitivity(RATES, losses, 5.0), abs=1e-14)


@pytest.mark.parametrize(
    ("rates", "losses", "initial", "message"),
    [
        ([0.1, 0.2, 0.3, 0.4], [1, 1, 1, 1], 2.0, "equal factors"),
        ([0.1, 0.01], [1, 1], 2.0, "equal factors"),
        ([0.0, 0.1], [1, 1], 2.0, "equal factors"),
        ([0.1], [1], 2.0, "two or more"),
        ([0.1, 1.0], [1, 1, 1], 2.0, "one a rate"),
        ([0.1, 1.0], [1, 1], NAN, "initial finite"),
        ([0.1, 1.0], [[1, 1], [1, 1]], 2.0, "one a rate"),
    ],
)
def test_other_rates_and_shapes_are_refused(rates, losses, initial, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_sensitivity(rates, losses, initial)


def test_a_quadratic_in_logarithms_is_continued_exactly():
    x = np.array([6e3, 1.2e4, 2.4e4, 5e4, 1e5])
    curve = lambda x: np.exp(0.3 + 0.2 * np.log(x) + 0.05 * np.log(x) ** 2)  # noqa: E731
    at = np.array([1e6, 1e3])
    found = extrapolate(x, curve(x), at)
    for values in found:
        np.testing.assert_allclose(values, curve(at), rtol=1e-9)


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_the_interval_is_that_of_the_textbook(degree):
    """The inverse of X^T X formed as it is printed, with powers that are not centred."""
    rng = np.random.default_rng(1)
    x, at = np.exp(rng.uniform(0, 2, 8)), np.exp(2.5)
    y = np.exp(0.1 + 0.7 * np.log(x) + 0.1 * rng.normal(size=8))
    design, a = (np.vander(np.log(np.atleast_1d(v)), degree + 1) for v in (x, at))
    inverse = np.linalg.inv(design.T @ design)
    coefficients = inverse @ design.T @ np.log(y)
    dof = 8 - degree - 1
    s = np.sqrt(np.sum((np.log(y) - design @ coefficients) ** 2) / dof)
    half = student_quantile(0.95, dof) * s * np.sqrt(1 + (a @ inverse @ a.T)[0, 0])
    middle = (a @ coefficients)[0]
    found = extrapolate(x, y, [at], degree=degree, level=0.9)
    wanted = np.exp([middle, middle - half, middle + half])
    np.testing.assert_allclose([v[0] for v in found], wanted, rtol=1e-9)


def test_the_interval_holds_one_more_measurement_as_often_as_it_says():
    """2,000 draws of six points and one beyond them: within 4 standard errors of 90 %."""
    rng, x, draws = np.random.default_rng(2), np.linspace(0, 3, 6), 2000
    inside = 0
    for _ in range(draws):
        noise = 0.3 * rng.normal(size=7)
        curve = lambda x, e: np.exp(1 - 0.5 * x + 0.4 * x**2 + e)  # noqa: E731
        found = extrapolate(np.exp(x), curve(x, noise[:6]), [math.exp(4.0)], level=0.9)
        inside += found.low[0] <= curve(4.0, noise[6]) <= found.high[0]
    assert abs(inside / draws - 0.9) <= 4 * math.sqrt(0.9 * 0.1 / draws)


def test_units_do_not_matter():
    x, y = np.array([1.0, 2, 5, 9, 20]), np.array([3.0, 5, 4, 9, 11])
    one, other = extrapolate(x, y, [50.0]), extrapolate(1e3 * x, 7 * y, [5e4])
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(7 * a, b, rtol=1e-9)


@pytest.mark.parametrize(
    ("x", "y", "at", "message"),
    [
        ([1, 2, 3, 4], [1, 2, 0, 4], [5], "y must be positive"),
        ([1, 2, 3, 4], [1, 2, 3, 4], [-5], "at must be positive"),
        ([1, 2, 3], [1, 2, 3], [5], "more than 3 different x"),
        ([1, 1, 2, 2], [1, 2, 3, 4], [5], "more than 3 different x"),
        ([1, 2, 3, 4], [1, 2, 3], [5], "as many y as x"),
        ([1, 2, 3, NAN], [1, 2, 3, 4], [5], "x must be finite"),
    ],
)
def test_what_can_not_be_fitted_is_refused(x, y, at, message):
    with pytest.raises(ValueError, match=message):
        extrapolate(x, y, at)
