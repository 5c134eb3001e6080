"""Paired seeds, bootstrap intervals, rank statistics, and the claims a figure ends in.

numpy only, float64 throughout. Runs are few and paired: replica s of one method and replica s of
another share their initialisation, their batches and their data, so what is compared is the
difference within each pair.
"""

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

UNBOUNDED = (-math.inf, math.inf)  # the interval that one seed supports


class Scale(str):
    """What something was measured at, in words, and what part of it diverged."""

    diverged: str  # "2 of 10 seeds diverged, left out"; empty if none did

    def __new__(cls, text: str, diverged: str = "") -> "Scale":
        """The words, as any text; ``diverged`` beside them."""
        made = super().__new__(cls, text)
        made.diverged = diverged
        return made

    def of(self, text: str) -> "Scale":
        """Other words for the same members."""
        return Scale(text, self.diverged)


class Claim(NamedTuple):
    """What a paper states beside what was measured; made by ``judge``, so ``holds`` is computed."""

    figure: str
    paper: str  # authors, year, arXiv id
    statement: str  # what the paper says, in our words
    effect: float
    interval: tuple[float, float]  # over seeds; (-inf, inf) from one seed
    seeds: int
    scale: str  # the data, model and size it was measured at
    holds: bool | None  # the effect meets the gate; None: not measured, members diverged
    kind: Literal["claim", "control"]
    unit: str
    quantity: str = ""  # what the effect is, as a reader would say it: "hard - random"
    gate: str = ""  # what ``holds`` asks of the effect: ">= +0.5"
    diverged: str = ""  # what part of the members the effect is without, if any


class Estimate(NamedTuple):
    """A number and its interval over seeds."""

    mean: float
    low: float
    high: float


class Paired(NamedTuple):
    """The difference a - b over paired seeds."""

    mean: float
    low: float
    high: float
    seeds: int
    p_value: float  # two-sided sign test
    differences: np.ndarray  # f64[seeds], in the order given


def judge(
    estimate: Estimate | Paired,
    *,
    figure: str,
    paper: str,
    statement: str,
    quantity: str,
    seeds: int,
    scale: str | Scale,
    unit: str,
    kind: Literal["claim", "control"] = "claim",
    at_least: float | None = None,
    at_most: float | None = None,
) -> Claim:
    """The claim whose gate is ``at_least`` or ``at_most``; a NaN effect meets neither.

    Where the ``scale`` says that members diverged, the claim says so, and a NaN effect is not
    measured at all.
    """
    if at_least is not None and at_most is None:
        holds, gate = estimate.mean >= at_least, f">= {_signed(at_least, unit)}"
    elif at_most is not None and at_least is None:
        holds, gate = estimate.mean <= at_most, f"<= {_signed(at_most, unit)}"
    else:
        raise ValueError(f"a gate is one of at_least and at_most, got {at_least} and {at_most}")
    diverged = scale.diverged if isinstance(scale, Scale) else ""
    measured = not (diverged and math.isnan(estimate.mean))
    return Claim(
        figure=figure,
        paper=paper,
        statement=statement,
        effect=estimate.mean,
        interval=(estimate.low, estimate.high),
        seeds=seeds,
        scale=str(scale),
        holds=bool(holds) if measured else None,
        kind=kind,
        unit=unit,
        quantity=quantity,
        gate=gate,
        diverged=diverged,
    )


def _signed(value: float, unit: str) -> str:
    return f"{value:+g}" if unit == "points" and value else f"{value:g}"


def paired(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Paired:
    """mean(a - b) over paired seeds, with ``bootstrap``'s interval and the exact sign test.

    Swapping a and b negates the mean and both ends of the interval exactly; the order of the pairs
    doesn't matter.
    """
    a, b = _vector("a", a), _vector("b", b)
    if len(a) != len(b):
        raise ValueError(
            f"paired seeds need as many values of a as of b, got {len(a)} and {len(b)}"
        )
    differences = a - b
    mean, low, high = bootstrap(differences, level=level, num_resamples=num_resamples, seed=seed)
    return Paired(mean, low, high, len(differences), sign_test(differences), differences)


def sign_test(differences: ArrayLike) -> float:
    """P(a split of signs at least as uneven | either sign equally likely), zeros dropped.

    Integers until the last division. 1 if every difference is zero.
    """
    differences = _vector("differences", differences)
    positive, negative = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    n = positive + negative
    tail = sum(math.comb(n, k) for k in range(min(positive, negative) + 1))
    return min(2 * tail, 2**n) / 2**n


def bootstrap(
    values: ArrayLike, *, level: float = 0.95, num_resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """The mean, and its expanded percentile bootstrap interval.

    The interval lies between two quantiles of the means of resamples drawn with replacement. The
    plain percentile interval is too short for few seeds (a nominal 95 % covers about 84 % at n = 5
    and 90 % at n = 10 on normal data): the resampled variance has n where n - 1 is due, and a
    normal quantile stands where Student's is. So the tail is not (1 - level) / 2 but
    Phi(-sqrt(n / (n - 1)) t), t being Student's quantile with n - 1 degrees of freedom, which for
    large n is the same. No resampled mean leaves the range of the values, so the coverage is at
    most 1 - 2^(1 - n): 0.75 at n = 3, 0.94 at n = 5. One value: the interval is (-inf, inf).

    Where there are no more than ``num_resamples`` different resamples (n <= 8 by default), all are
    enumerated with their probabilities and nothing is random. Otherwise ``num_resamples`` are
    drawn, each with its mirror image, so that the interval of -values is exactly the negated one.

    Reference: Efron & Tibshirani 1993, section 13.3 (the percentile interval); Hesterberg 2015,
    arXiv 1411.5279 (its expansion).
    """
    values = np.sort(_vector("values", values))
    n = len(values)
    _check_level(level)
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be >= 2, got {num_resamples}")
    mean = math.fsum(values) / n  # correctly rounded: the same in every order
    if n == 1:
        return Estimate(mean, *UNBOUNDED)
    t = student_quantile(0.5 + level / 2, n - 1)
    tail = NormalDist().cdf(-t * math.sqrt(n / (n - 1)))
    if math.comb(2 * n - 1, n) <= num_resamples:
        means, weights = _all_resampled_means(values)
    else:
        means, weights = _resampled_means(values, num_resamples, seed)
    found = mean, _quantile(means, weights, tail), -_quantile(-means, weights, tail)
    return Estimate(*np.clip(found, values[0], values[-1]).tolist())  # a rounding can leave them


def _all_resampled_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of every multiset of n of the n values, and its probability n! / prod(k!) / n^n."""
    n = len(values)
    rows = np.array(list(itertools.combinations_with_replacement(range(n), n)))
    counts = (rows[:, :, None] == np.arange(n)).sum(axis=1)  # [multisets, n]
    factorials = np.array([math.factorial(k) for k in range(n + 1)], dtype=np.float64)
    weights = math.factorial(n) / factorials[counts].prod(axis=1) / n**n
    return _mean_rows(values[rows]), weights


def _resampled_means(
    values: np.ndarray, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng, n = np.random.default_rng(seed), len(values)
    half = -(-num_resamples // 2)
    at_once = max(1, 2**20 // n)  # 8 MB of resampled values
    means = []
    for first in range(0, half, at_once):
        rows = rng.integers(0, n, size=(min(at_once, half - first), n))
        means += [_mean_rows(values[rows]), _mean_rows(values[n - 1 - rows])]
    means = np.concatenate(means)
    return means, np.full(len(means), 1 / len(means))


def _mean_rows(rows: np.ndarray) -> np.ndarray:
    """Row means that negate exactly when the values do, whichever way a row is read."""
    return (rows.mean(axis=1) + rows[:, ::-1].mean(axis=1)) / 2


def _quantile(values: np.ndarray, weights: np.ndarray, probability: float) -> float:
    """The smallest value whose cumulative weight is at least ``probability``."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) >= probability - 1e-12
    return float(values[order][np.argmax(reached)])


def jackknife(
    statistic: Callable[[np.ndarray], float],
    replicas: ArrayLike,
    *,
    level: float = 0.95,
) -> Estimate:
    """statistic(replicas), plus or minus Student's t times the delete-one standard error.

    ``replicas`` is [R, ...] and ``statistic`` takes any number of them. For statistics of an
    average over replicas, such as the rank correlation of averaged scores, where a bootstrap is
    biased: a resample repeats replicas, averages away less noise, and so correlates less.
    One replica: the interval is (-inf, inf).

    Reference: Efron & Tibshirani 1993, equation 11.5.
    """
    replicas = np.asarray(replicas, dtype=np.float64)
    if replicas.ndim == 0 or len(replicas) == 0:
        raise ValueError(f"replicas must be [R, ...] with R >= 1, got shape {replicas.shape}")
    _check_level(level)
    n, value = len(replicas), float(statistic(replicas))
    if n == 1:
        return Estimate(value, *UNBOUNDED)
    without = np.array([statistic(np.delete(replicas, i, axis=0)) for i in range(n)])
    error = math.sqrt((n - 1) / n * float(np.sum((without - without.mean()) ** 2)))
    half = student_quantile(0.5 + level / 2, n - 1) * error
    return Estimate(value, value - half, value + half)


def over_replicas(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error f64[...] over the first axis of [R, ...], leaving out NaN.

    The mean is NaN where nothing is left; the standard error, the root of the unbiased variance
    over the number left, is NaN where fewer than two or an infinity are.
    """
    replicas = np.asarray(values, np.float64)
    there = ~np.isnan(replicas)
    count = there.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(there, replicas, 0.0).sum(axis=0) / count
        squares = np.where(there, (replicas - mean) ** 2, 0.0).sum(axis=0)
        error = np.sqrt(squares / np.where(count > 1, count - 1, np.nan) / count)
    return mean, error


def student_quantile(probability: float, dof: int) -> float:
    """The t of P(T <= t) = probability, for Student's T with ``dof`` degrees of freedom.

    Bisection in theta = atan(t / sqrt(dof)) of the finite series for P(|T| <= t).

    Reference: Abramowitz & Stegun 1964, equations 26.7.3 and 26.7.4.
    """
    if not (0 < probability < 1 and dof >= 1):
        raise ValueError(f"need 0 < probability < 1 and dof >= 1, got {probability} and {dof}")
    wanted = abs(2 * probability - 1)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, dof) < wanted else (low, middle)
    return math.copysign(math.sqrt(dof) * math.tan((low + high) / 2), probability - 0.5)


def _within(theta: float, dof: int) -> float:
    """P(|T| <= sqrt(dof) tan(theta))."""
    sine, cosine, odd = math.sin(theta), math.cos(theta), dof % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(dof // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


def ranks(values: ArrayLike) -> np.ndarray:
    """f64[n]: the ranks from 1 to n, equal values sharing the average of theirs."""
    values = _vector("values", values, finite=False)
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of the ranks, ties averaged; NaN if either is constant."""
    x, y = ranks(a), ranks(b)
    if len(x) != len(y):
        raise ValueError(f"spearman needs as many values of a as of b, got {len(x)} and {len(y)}")
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale > 0 else math.nan


def auc(scores: ArrayLike, mask: ArrayLike) -> float:
    """P(a score under the mask > one outside) + half P(equal): the area under the ROC curve."""
    scores, mask = _vector("scores", scores, finite=False), np.asarray(mask)
    if mask.dtype != bool or mask.shape != scores.shape:
        raise ValueError(
            f"mask must be bool[{len(scores)}], got {mask.dtype} of shape {mask.shape}"
        )
    inside, outside = int(mask.sum()), int((~mask).sum())
    if not inside or not outside:
        raise ValueError(f"mask must have both values, got {inside} true and {outside} false")
    above = ranks(scores)[mask].sum() - inside * (inside + 1) / 2
    return float(above / (inside * outside))


def precision_recall(found: ArrayLike, wrong: ArrayLike) -> tuple[float, float]:
    """(part of what was found that is wrong, part of what is wrong that was found), of two masks.

    NaN where there is nothing to take a part of: nothing found, or nothing wrong.
    """
    found, wrong = np.asarray(found), np.asarray(wrong)
    for name, mask in (("found", found), ("wrong", wrong)):
        if mask.dtype != bool or mask.ndim != 1 or mask.shape != wrong.shape:
            raise ValueError(
                f"found and wrong must be bool[n] of one n, got {name} {mask.dtype} of shape "
                f"{mask.shape} where wrong has shape {wrong.shape}"
            )
    both, hits, errors = (int(mask.sum()) for mask in (found & wrong, found, wrong))
    return both / hits if hits else math.nan, both / errors if errors else math.nan


def learning_rate_sensitivity(
    rates: ArrayLike, losses: ArrayLike, initial: ArrayLike | float
) -> np.ndarray:
    """The mean over rates of (min(loss, initial) - best): f64[...] from losses [..., n].

    ``initial`` [...] is the loss before training, ``best`` the least loss of any rate. A loss that
    is not finite, of a run that diverged, counts as the initial one; a network that learns at no
    rate is 0 too. Rates must rise by about equal factors (3 and 10/3 are), for the mean stands for
    one over log rate; and bracket the best one, else the number says nothing. Those of optimizers
    or parametrisations that mean different things by a rate can't be compared. ValueError: other
    rates, other shapes, an initial loss that is not finite.

    Reference: Wortsman et al. 2023, arXiv 2309.14322, section 2.2.
    """
    rates = _vector("rates", rates)
    losses, initial = np.asarray(losses, np.float64), np.asarray(initial, np.float64)
    if losses.shape != (*initial.shape, len(rates)) or not np.isfinite(initial).all():
        raise ValueError(
            f"losses must be [..., {len(rates)}], one a rate, and initial finite [...], got "
            f"{losses.shape} and {initial.tolist()}"
        )
    steps = np.diff(np.log(rates)) if (rates > 0).all() else np.zeros(1)
    if len(rates) < 2 or steps.min() <= 0 or steps.max() > 1.25 * steps.min():
        raise ValueError(
            f"rates must be two or more, rising by about equal factors, got {rates.tolist()}"
        )
    most = initial[..., None]
    clipped = np.where(np.isfinite(losses), np.minimum(losses, most), most)
    return np.asarray((clipped - clipped.min(axis=-1, keepdims=True)).mean(axis=-1))


class Extrapolation(NamedTuple):
    """A fitted curve at several places, and where one more measurement there would lie."""

    mean: np.ndarray  # f64[m]
    low: np.ndarray
    high: np.ndarray


def extrapolate(
    x: ArrayLike, y: ArrayLike, at: ArrayLike, *, degree: int = 2, level: float = 0.95
) -> Extrapolation:
    """The log of y as a polynomial in log x, by least squares, at other x; a prediction interval.

    f +- t s sqrt(1 + a (X^T X)^-1 a^T) in log y, with X the powers of log x, a those of log ``at``,
    s^2 the squared residuals over n - degree - 1, t Student's quantile with as many degrees of
    freedom. It holds one more measurement at ``at`` with probability ``level`` if log y is such a
    polynomial with independent normal errors of one size, which nothing can tell outside the
    data. Give one point, a mean of logarithms say, for each x: replicas share what the polynomial
    lacks. ValueError: numbers that are not positive, no more than degree + 1 different x.

    Reference: Draper & Smith 1998, Applied Regression Analysis, section 5.1; its use for attention
    logits: Wortsman et al. 2023, arXiv 2309.14322, section 3.3.
    """
    values = {"x": _vector("x", x), "y": _vector("y", y), "at": _vector("at", at)}
    if bad := [name for name, value in values.items() if value.min() <= 0]:
        raise ValueError(f"{bad[0]} must be positive, got {values[bad[0]].tolist()}")
    x, y, at = (np.log(value) for value in values.values())
    if degree < 0 or len(x) != len(y) or len(set(x)) <= degree + 1:
        raise ValueError(
            f"a polynomial of degree {degree} and its error need as many y as x, and more than "
            f"{degree + 1} different x, got {len(y)} and {len(set(x))} different of {len(x)}"
        )
    _check_level(level)
    middle, spread = x.mean(), x.std()
    design, there = (np.vander((v - middle) / spread, degree + 1) for v in (x, at))
    q, r = np.linalg.qr(design)
    coefficients = np.linalg.solve(r, q.T @ y)
    dof = len(x) - degree - 1
    s = math.sqrt(float(np.sum((y - design @ coefficients) ** 2)) / dof)
    reach = np.sqrt(1 + np.sum(np.linalg.solve(r.T, there.T) ** 2, axis=0))
    half = student_quantile(0.5 + level / 2, dof) * s * reach
    mean = there @ coefficients
    return Extrapolation(np.exp(mean), np.exp(mean - half), np.exp(mean + half))


def _vector(name: str, values: ArrayLike, *, finite: bool = True) -> np.ndarray:
    """``values`` as f64[n], n >= 1, without NaN and (``finite``) without infinities."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a vector of at least one value, got {array.shape}")
    bad = ~np.isfinite(array) if finite else np.isnan(array)
    if bad.any():
        where = int(np.argmax(bad))
        raise ValueError(
            f"{name} must be {'finite' if finite else 'numbers'}, got "
            f"{array[where]} at {where} ({int(bad.sum())} of {array.size})"
        )
    return array


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
