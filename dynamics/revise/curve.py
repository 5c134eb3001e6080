"""When a class's training curve says that its annotation errors begin to be memorised.

The curve is fitted with f(t) = a (1 - exp(-b t^c)), t = 1, 2, ... in epochs; a class is past its
early learning when f' has fallen to a small part of f'(1). Everything here is numpy, float64.

Reference: Liu et al. 2022, arXiv 2110.03740, section 3.1 and its code.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from dynamics.config import Count, Fraction, Positive, frozen


@frozen
class Detection:
    """When a class counts as learned."""

    drop: Fraction = 0.9
    """Relative fall of the fitted slope since t = 1 above which the class is detected"""
    min_points: Count = 5
    """Points of the curve that a fit needs; it has three parameters"""
    plateau: Fraction = 0.1
    """Leading points of the curve below this (or that rise by less) are dropped; 0 drops none"""
    plateau_by: Literal["level", "increment"] = "level"
    """What is compared with plateau: the value, or its increase from the point before, as in the
    published code"""
    last_weight: Positive = 10.0
    """Weight of the last residual of the fit over that of the first, in a geometric sequence"""


class Curve(NamedTuple):
    """f(t) = a (1 - exp(-b t^c))."""

    a: float
    b: float
    c: float


def value(t: Float[np.ndarray, "*n"], curve: Curve) -> Float[np.ndarray, "*n"]:
    """f(t) = a (1 - exp(-b t^c))."""
    return -curve.a * np.expm1(-curve.b * t**curve.c)


def slope(t: Float[np.ndarray, "*n"], curve: Curve) -> Float[np.ndarray, "*n"]:
    """f'(t) = a b c t^(c-1) exp(-b t^c)."""
    a, b, c = curve
    return a * b * c * t ** (c - 1) * np.exp(-b * t**c)


def relative_change(t: Float[np.ndarray, "*n"], b: float, c: float) -> Float[np.ndarray, "*n"]:
    """|f'(1) - f'(t)| / |f'(1)| = 1 - t^(c-1) exp(-b (t^c - 1)) for t >= 1, b >= 0, c <= 1.

    Independent of a, and defined where f' itself is 0 or underflows. It rises from 0 at t = 1.
    """
    return -np.expm1((c - 1) * np.log(t) - b * (t**c - 1))


def onset(curve: Curve, drop: float = 0.9, *, horizon: int = 10_000) -> int | None:
    """The first epoch t = 1, 2, ... whose ``relative_change`` exceeds ``drop``.

    None: none up to the horizon. With c = 1 it is the first t > 1 - log(1 - drop) / b.
    """
    passed = relative_change(np.arange(1.0, horizon + 1), curve.b, curve.c) > drop
    return int(passed.argmax()) + 1 if passed.any() else None


def leading(curve: Float[np.ndarray, "n"], detection: Detection) -> int:
    """How many of the first points are a plateau, before the class is learned at all.

    By level, the points before the first one >= ``plateau``. By increment, those before the first
    rise >= ``plateau``; where there is none, all but the last.
    """
    if not detection.plateau:
        return 0
    if detection.plateau_by == "level":
        reached = curve >= detection.plateau
        return int(reached.argmax()) if reached.any() else len(curve)
    rises = np.diff(curve) >= detection.plateau
    return int(rises.argmax()) + 1 if rises.any() else max(len(curve) - 1, 0)


def fit(curve: Float[np.ndarray, "n"], *, last_weight: float = 10.0) -> Curve:
    """The least-squares fit to values at t = 1..n, with 0 <= a <= 1, b >= 0 and 0 <= c <= 1.

    With c <= 1 the fit is concave, so that its slope only falls; with a larger exponent the slope
    at t = 1 can be next to nothing and every ratio to it explodes. Residuals are weighted by
    geomspace(1, last_weight, n), so that late points count. Trust-region reflective, from
    (1, 1, 1), as scipy's curve_fit with bounds. Cost: some ms. ValueError: fewer than 3 points, or
    values outside 0..1.
    """
    if len(curve) < 3 or not (np.isfinite(curve).all() and 0 <= curve.min() <= curve.max() <= 1):
        raise ValueError(f"curve must be three or more numbers from 0 to 1, got {curve}")
    t, weight = np.arange(1.0, len(curve) + 1), np.geomspace(1.0, last_weight, len(curve))
    observed = curve.astype(np.float64)

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return weight * (value(t, Curve(*parameters.tolist())) - observed)

    bounds = ([0.0, 0.0, 0.0], [1.0, math.inf, 1.0])
    found = least_squares(residuals, (1.0, 1.0, 1.0), bounds=bounds, method="trf", max_nfev=400)
    return Curve(*found.x.tolist())


def fitted(curve: Float[np.ndarray, "n"], detection: Detection) -> tuple[int, Curve] | None:
    """The length of the plateau and the fit to what follows it; None: too few points, or a NaN."""
    first = leading(curve, detection)
    rest = curve[first:]
    if len(rest) < max(3, detection.min_points) or np.isnan(rest).any():
        return None
    return first, fit(rest, last_weight=detection.last_weight)


def detected(curve: Float[np.ndarray, "n"], detection: Detection) -> bool:
    """Whether a class whose IoU was ``curve`` in epochs 1..n is past its early learning now."""
    found = fitted(curve, detection)
    if found is None:
        return False
    first, (_, b, c) = found
    now = np.float64(len(curve) - first)
    return bool(relative_change(np.array([now]), b, c)[0] > detection.drop)
