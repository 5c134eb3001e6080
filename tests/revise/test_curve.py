"""The onset of memorisation on a class's curve: closed forms, and what the fit recovers."""

import math

import numpy as np
import pytest

from dynamics.revise import Curve, Detection
from dynamics.revise.curve import (
    detected,
    fit,
    fitted,
    leading,
    onset,
    relative_change,
    slope,
    value,
)

CURVES = [Curve(0.6, 0.5, 1.0), Curve(0.9, 1.3, 0.4), Curve(0.3, 0.05, 0.9)]


def moment(b: float, c: float, drop: float) -> float:
    """The t at which t^(c-1) exp(-b (t^c - 1)) has fallen to 1 - drop, by bisection."""
    low, high = 1.0, 1e9
    for _ in range(200):
        t = math.sqrt(low * high)
        remains = t ** (c - 1) * math.exp(-min(b * (t**c - 1), 700.0))
        low, high = (t, high) if remains > 1 - drop else (low, t)
    return low


@pytest.mark.parametrize("curve", CURVES)
def test_the_slope_is_the_derivative(curve: Curve) -> None:
    t = np.linspace(1.0, 40.0, 50)
    h = 1e-4  # roundings of the difference are eps / h, its truncation h^2
    numeric = (value(t + h, curve) - value(t - h, curve)) / (2 * h)
    np.testing.assert_allclose(slope(t, curve), numeric, rtol=1e-7, atol=2e-12)
    a, b, c = curve
    np.testing.assert_allclose(value(t, curve), a * (1 - np.exp(-b * t**c)), rtol=1e-12)


@pytest.mark.parametrize("curve", CURVES)
def test_the_relative_change_is_that_of_the_slope_whatever_a_is(curve: Curve) -> None:
    t = np.arange(1.0, 31.0)
    for a in (curve.a, 1e-3):
        at = slope(t, curve._replace(a=a))
        wanted = np.abs(at[0] - at) / np.abs(at[0])
        np.testing.assert_allclose(relative_change(t, curve.b, curve.c), wanted, rtol=0, atol=3e-16)
    assert relative_change(np.array([1.0]), curve.b, curve.c)[0] == 0
    assert (np.diff(relative_change(t, curve.b, curve.c)) >= 0).all()


def test_it_is_defined_where_the_slope_underflows_or_vanishes() -> None:
    t = np.array([1.0, 2.0, 100.0])
    np.testing.assert_array_equal(relative_change(t, 2000.0, 1.0), [0, 1, 1])
    np.testing.assert_allclose(relative_change(t, 0.0, 0.0), 1 - 1 / t, rtol=1e-15)
    np.testing.assert_array_equal(relative_change(t, 0.0, 1.0), 0)


def test_the_exponential_with_rate_one_half_is_left_in_epoch_six() -> None:
    assert 1 + math.log(10) / 0.5 == pytest.approx(5.605, abs=1e-3)
    assert onset(Curve(0.7, 0.5, 1.0), 0.9) == 6


@pytest.mark.parametrize("drop", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("b", "c"), [(0.5, 1.0), (0.1, 1.0), (1.0, 0.5), (2.0, 0.1), (0.3, 0.8)])
def test_the_onset_is_the_first_epoch_after_the_moment(b: float, c: float, drop: float) -> None:
    exact = moment(b, c, drop)
    if c == 1:
        assert exact == pytest.approx(1 - math.log(1 - drop) / b, rel=1e-9)
    assert onset(Curve(1.0, b, c), drop) == math.floor(exact) + 1


def test_a_curve_that_does_not_bend_has_no_onset() -> None:
    assert onset(Curve(0.5, 0.0, 1.0)) is None
    assert onset(Curve(0.5, 0.5, 1.0), horizon=5) is None


def test_the_fit_recovers_the_onset_from_noisy_points() -> None:
    generator = np.random.default_rng(0)
    errors = []
    for curve in (Curve(0.6, 0.5, 1.0), Curve(0.65, 0.3, 1.0), Curve(0.7, 0.6, 0.8)):
        true = onset(curve)
        assert true is not None
        clean = value(np.arange(1.0, 21.0), curve)
        np.testing.assert_allclose(value(np.arange(1.0, 21.0), fit(clean)), clean, atol=1e-5)
        for _ in range(10):
            found = onset(fit(np.clip(clean + generator.normal(0, 0.005, 20), 0, 1)))
            assert found is not None
            errors.append(abs(found - true))
    assert max(errors) <= 2
    assert np.mean(errors) <= 1


def test_the_fit_stays_concave_where_a_free_exponent_would_not() -> None:
    """A curve with an inflection: free, its exponent is 3 and the slope at t = 1 next to nothing,
    so that every ratio to it explodes."""
    t = np.arange(1.0, 16.0)
    curve = 0.6 * (1 - np.exp(-0.002 * t**3))
    found = fit(curve)
    assert found.c <= 1 and 0 <= found.a <= 1
    assert (np.diff(slope(t, found)) <= 0).all()
    sigmoid = slope(t, Curve(0.6, 0.002, 3.0))
    assert (np.abs(sigmoid[0] - sigmoid) / sigmoid[0]).max() > 10


def test_late_points_count_more() -> None:
    curve = np.concatenate([np.full(5, 0.7), np.full(5, 0.5)])  # no f falls
    t = np.arange(1.0, 11.0)
    even, late = (value(t, fit(curve, last_weight=w))[-1] for w in (1.0, 100.0))
    np.testing.assert_allclose(even, 0.6, atol=1e-3)
    np.testing.assert_allclose(late, 0.5, atol=1e-2)


def test_the_plateau_before_a_class_is_learned_is_dropped() -> None:
    curve = np.array([0.0, 0.02, 0.05, 0.3, 0.5, 0.09, 0.6])
    assert leading(curve, Detection()) == 3
    assert leading(curve, Detection(plateau=0.0)) == 0
    assert leading(curve, Detection(plateau_by="increment")) == 3
    assert leading(0.1 * curve, Detection()) == 7  # never reached
    assert leading(0.1 * curve, Detection(plateau_by="increment")) == 6  # one point is left
    found = fitted(
        np.concatenate([np.zeros(4), value(np.arange(1.0, 9.0), CURVES[0])]), Detection()
    )
    assert found is not None and found[0] == 4
    np.testing.assert_allclose(found[1], CURVES[0], atol=1e-3)


def test_a_class_is_detected_when_its_curve_has_bent_and_not_before() -> None:
    curve = value(np.arange(1.0, 15.0), CURVES[0])
    late = np.concatenate([np.zeros(3), curve])
    assert [detected(curve[:n], Detection()) for n in range(1, 15)] == [
        n >= 6 for n in range(1, 15)
    ]
    assert [detected(late[:n], Detection()) for n in range(1, 15)] == [n >= 9 for n in range(1, 15)]
    assert not detected(curve[:6], Detection(min_points=7))
    assert not detected(curve[:6], Detection(drop=0.95))
    assert not detected(np.append(curve, np.nan), Detection())
    assert not detected(0.02 * np.arange(1.0, 21.0), Detection())  # a line never bends


@pytest.mark.parametrize(
    "curve", [[0.1, 0.2], [0.1, np.nan, 0.3], [0.1, 0.2, 1.2], [-0.1, 0.2, 0.3]]
)
def test_what_is_no_curve_is_refused(curve: list[float]) -> None:
    with pytest.raises(ValueError, match="curve must be three or more numbers from 0 to 1, got"):
        fit(np.array(curve))
