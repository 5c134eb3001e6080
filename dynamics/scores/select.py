"""Which examples to keep from a score, and how often to draw each.

High is hard. Kept examples are int32 rows of the dataset in ascending order. Ties are broken at
random by ``seed``: by index would prefer some classes where data are sorted by class. With
``labels`` every class keeps its share. Scores may be infinite (never learned is hardest), not NaN.
numpy only; the cost is that of a sort.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Integer

from dynamics import counts

_TIES, _CLASSES, _STRATA, _DRAWS = range(4)  # what a seed is used for, each independent


def keep(
    scores: Float[np.ndarray, "n"],
    count: int,
    which: Literal["highest", "lowest"],
    *,
    labels: Integer[np.ndarray, "n"] | None = None,
    seed: int = 0,
) -> Int[np.ndarray, "{count}"]:
    """The ``count`` examples with the highest or lowest score.

    With ``labels``, of each class the ``quotas`` highest or lowest. For one seed the highest and
    the n - count lowest are all examples, and without labels a smaller subset is part of a larger.
    ValueError: NaN scores, a count outside 1..n, labels that don't fit.
    """
    if which not in ("highest", "lowest"):
        raise ValueError(f"which must be 'highest' or 'lowest', got {which!r}")
    _check(scores, count)
    offset = 0 if which == "lowest" else len(scores) - count
    return window(scores, count, offset=offset, labels=labels, seed=seed)


def window(
    scores: Float[np.ndarray, "n"],
    count: int,
    *,
    offset: int | None = None,
    drop: int | None = None,
    labels: Integer[np.ndarray, "n"] | None = None,
    seed: int = 0,
) -> Int[np.ndarray, "{count}"]:
    """``count`` neighbours in the order of the score: the ``offset`` lowest are left out, and the
    ``drop`` highest; offset + count + drop = n, so exactly one of the two is given.

    With ``labels``, a window in each class: ``quotas`` wide, and of its other examples the part
    offset / (n - count), by largest remainder, is left out below it. ValueError: both or neither of
    offset and drop, either outside 0..n - count, and whatever ``keep`` refuses.

    Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, figure 2, which counts by offset.
    """
    _check(scores, count)
    if (offset is None) == (drop is None):
        raise ValueError(
            "exactly one of offset (the lowest left out) and drop (the highest left out) must be "
            f"given, got offset={offset} and drop={drop}"
        )
    counts.check(None, offset=offset, drop=drop)
    counts.check(0, seed=seed)
    rest = len(scores) - count
    name, value = ("drop", drop) if offset is None else ("offset", offset)
    if value is None or not 0 <= value <= rest:
        raise ValueError(
            f"{name} must be in 0..{rest}, what {count} of {len(scores)} examples leave out, got "
            f"{value}: keep fewer examples or leave out fewer"
        )
    order = np.lexsort((_chance(len(scores), seed, _TIES), scores))
    return _window(order, count, value if drop is None else rest - value, labels, seed)


def random(
    n: int, count: int, *, labels: Integer[np.ndarray, "n"] | None = None, seed: int = 0
) -> Int[np.ndarray, "{count}"]:
    """``count`` of ``n`` examples, every subset equally likely; with ``labels``, ``quotas`` of each
    class. ValueError: a count outside 1..n, labels that don't fit.
    """
    _check_count(count, n)
    return _window(_chance(n, seed, _DRAWS), count, 0, labels, seed)


def quotas(labels: Integer[np.ndarray, "n"], count: int, seed: int = 0) -> Int[np.ndarray, "c"]:
    """How many of ``count`` examples each class gets, classes in ascending order.

    The class's share count * size / n, rounded down; what is missing to ``count`` goes one each to
    the largest remainders, equal ones by chance. ValueError: a count outside 1..n, or labels that
    are not one integer for each example.
    """
    _check_count(count, len(labels))
    return _shares(_classes(labels, len(labels))[1], count, seed)


def coverage_centric(
    scores: Float[np.ndarray, "n"],
    count: int,
    *,
    cutoff: float,
    strata: int = 50,
    seed: int = 0,
) -> Int[np.ndarray, "{count}"]:
    """Coverage-centric selection: without the floor(cutoff n) highest, the range of the score is
    cut into ``strata`` of equal width, and each gets an equal part of ``count`` as far as it can.

    From the smallest stratum up: min(size, budget left // strata left), drawn uniformly within it.
    What small strata and the divisions leave over goes on to the larger, and the last takes it all,
    so the sum is exactly ``count``. Strata of equal size are taken in random order; infinite scores
    belong to the stratum at their end of the finite ones.

    Reference: Zheng et al. 2023, arXiv 2210.15809, algorithm 1. Their code cuts off by the margin
    and stratifies by a second score; here it is one score, of which high is hard.
    ValueError: a cutoff outside 0..1 or that leaves fewer than ``count``, no strata, NaN scores.
    """
    n = len(scores)
    _check(scores, count)
    if not 0 <= cutoff <= 1:
        raise ValueError(f"cutoff must be a fraction of the examples, 0..1, got {cutoff}")
    counts.check(strata=strata)
    left = n - math.floor(round(cutoff * n, 6))  # 0.29 * 100 is 28.999...
    if count > left:
        raise ValueError(
            f"count must be at most {left}, what a cutoff of {cutoff:g} leaves of {n} examples, "
            f"got {count}: keep fewer examples or cut off fewer"
        )
    rows = keep(scores, left, "lowest", seed=seed)
    stratum = _strata(scores[rows].astype(np.float64), strata)
    sizes = np.bincount(stratum, minlength=strata)
    budget, rest = np.zeros_like(sizes), count
    for done, i in enumerate(np.lexsort((_chance(strata, seed, _STRATA), sizes))):
        budget[i] = min(sizes[i], rest // (strata - done))
        rest -= budget[i]
    drawn = _of_each(_chance(left, seed, _DRAWS), stratum, np.zeros_like(budget), budget)
    return rows[np.sort(drawn)]


def probabilities(
    scores: Float[np.ndarray, "n"], *, uniform: float = 0.1
) -> Float[np.ndarray, "n"]:
    """f64[n]: (1 - uniform) s_i / sum(s) + uniform / n, the probability of drawing each example;
    1 / n if all scores are 0.

    The uniform part bounds the weights 1 / (n p_i) by 1 / uniform; with ``uniform=0`` an example of
    score 0 is never drawn. ``gradient_variance`` says which scores are best. ValueError: a score
    that is negative or not finite, ``uniform`` outside 0..1.

    Reference: Needell, Srebro and Ward 2014, arXiv 1310.5715, for the mixture (half of it uniform).
    """
    if not 0 <= uniform <= 1:
        raise ValueError(f"uniform must be a fraction of the draws, 0..1, got {uniform}")
    s = _lengths("scores", scores)
    largest = s.max()
    s = s / largest if largest > 0 else np.ones(len(s))
    return (1 - uniform) * (s / s.sum()) + uniform / len(s)


def gradient_variance(
    norms: Float[np.ndarray, "n"],
    probabilities: Float[np.ndarray, "n"] | None = None,
    *,
    mean_norm: float,
) -> float:
    """The trace of the covariance of g_i / (n p_i), where i is drawn with probability p_i (None:
    uniform): (1 / n^2) sum_i ||g_i||^2 / p_i - ||g||^2, with g the mean gradient.

    ``norms`` are the ||g_i||, ``mean_norm`` is ||g||. A batch of b independent draws has 1 / b of
    it. Smallest for p_i proportional to ||g_i||: (mean ||g_i||)^2 - ||g||^2. ValueError:
    probabilities that don't sum to 1, or 0 where the gradient is not: the estimator is then biased.

    Reference: Zhao and Zhang 2015, arXiv 1401.2753, for the optimum; Needell, Srebro and Ward 2014,
    arXiv 1310.5715; in deep learning Katharopoulos and Fleuret 2018, arXiv 1803.00942, and Lu et
    al. 2023, arXiv 2302.14772, the data half of PA&DA.
    """
    norms = _lengths("norms", norms)
    n = len(norms)
    p = np.full(n, 1 / n) if probabilities is None else _lengths("probabilities", probabilities)
    if p.shape != norms.shape or not abs(p.sum() - 1) < 1e-4:
        raise ValueError(
            f"probabilities must be {n} numbers that sum to 1, one for each norm, got {len(p)} "
            f"that sum to {p.sum():g}"
        )
    seen = norms > 0
    if never := int((p[seen] == 0).sum()):
        raise ValueError(
            f"probabilities must be positive where the gradient is not 0, got {never} that are 0: "
            "mix in a uniform part"
        )
    return float((norms[seen] ** 2 / p[seen]).sum() / n**2 - mean_norm**2)


def _window(
    order: np.ndarray, count: int, offset: int, labels: np.ndarray | None, seed: int
) -> np.ndarray:
    """The places offset..offset + count - 1 of an order, or of the order within each class."""
    if labels is None:
        return np.sort(order[offset : offset + count]).astype(np.int32)
    place, sizes = _classes(labels, len(order))
    quota = _shares(sizes, count, seed)
    below = _shares(sizes - quota, offset, seed)
    return np.sort(_of_each(order, place, below, quota)).astype(np.int32)


def _of_each(
    order: np.ndarray, group: np.ndarray, first: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """Of each group g, in the given order, its members first[g]..first[g] + count[g] - 1."""
    order = order[np.argsort(group[order], kind="stable")]
    sizes = np.bincount(group, minlength=len(count))
    place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    low, high = np.repeat(first, sizes), np.repeat(first + count, sizes)
    return order[(low <= place) & (place < high)]


def _shares(sizes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` <= sum(sizes) in proportion to sizes, never more than a size."""
    share, remainder = np.divmod(int(count) * sizes, max(int(sizes.sum()), 1))
    order = np.lexsort((_chance(len(sizes), seed, _CLASSES), -remainder))
    share[order[: count - share.sum()]] += 1
    return share


def _strata(scores: np.ndarray, strata: int) -> np.ndarray:
    """The stratum 0..strata - 1 of each score, all of equal width over the finite ones."""
    finite = scores[np.isfinite(scores)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    width = (high - low) / strata or 1.0
    return np.clip(np.floor((scores - low) / width), 0, strata - 1).astype(np.int64)


def _chance(n: int, seed: int, purpose: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, purpose])).permutation(n)


def _check(scores: np.ndarray, count: int) -> None:
    n = len(scores)
    _check_count(count, n)
    if np.isnan(scores).any():
        raise ValueError(f"scores must be numbers, got {int(np.isnan(scores).sum())} NaN of {n}")


def _check_count(count: int, n: int) -> None:
    counts.check(None, n=n, count=count)
    if not 1 <= count <= n:
        raise ValueError(f"count must be in 1..{n}, got {count}")


def _classes(labels: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The class of each example, as its place among the sorted classes, and the classes' sizes."""
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be {n} integers, one for each example, got {labels.dtype} of shape "
            f"{labels.shape}"
        )
    _, place, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    return place, sizes


def _lengths(name: str, values: np.ndarray) -> np.ndarray:
    """Checked, in float64."""
    if not len(values) or not np.isfinite(values).all() or (values < 0).any():
        wrong = int((~(values >= 0) | np.isinf(values)).sum())
        raise ValueError(
            f"{name} must be finite and not negative, got {wrong} others of {len(values)}"
        )
    return values.astype(np.float64)
