"""Problems with known answers, as datasets.

x is float32 [n dim] and its mean and std are 0 and 1, so that normalising leaves it as stated. A
longer dataset of one seed begins with the shorter one: draw once and cut train and test from it.
The draws are those of numpy's Generator, which may change between versions of numpy.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from dynamics.data import corrupt
from dynamics.data.corrupt import Noisy
from dynamics.types import Dataset


def gaussian_mixture(
    seed: int, *, n: int, dim: int, num_classes: int, separation: float
) -> Dataset:
    """Equally likely classes N(mu_c, I) whose centres are ``separation`` apart, all pairs alike.

    Known: no classifier is right more often than ``bayes_accuracy``, and the linear one that takes
    the largest of the first ``num_classes`` coordinates is that good. For two classes this is
    Phi(separation / 2).
    """
    _check(n, dim, num_classes)
    if dim < num_classes:
        raise ValueError(f"dim must be >= num_classes = {num_classes}, got {dim}")
    y = _labels(seed, n, num_classes)
    x = _normal("mixture", seed, n, dim)
    x[np.arange(n), y] += separation / math.sqrt(2)
    return _dataset(x, y)


def bayes_accuracy(num_classes: int, separation: float) -> float:
    """Integral of phi(t - s / sqrt 2) Phi(t)^(num_classes - 1) dt: the most a classifier reaches.

    The coordinate of the true class must exceed those of the other classes of
    ``gaussian_mixture``. By the trapezoid rule, exact to rounding for such integrands.
    """
    centre = separation / math.sqrt(2)
    t = np.linspace(centre - 10, centre + 10, 2001)
    density = np.exp(-((t - centre) ** 2) / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in t])
    return float(np.trapezoid(density * below ** (num_classes - 1), t))


def opposite_gaussians(
    seed: int, *, n: int, dim: int, sigma: float, flip: float
) -> tuple[Dataset, Noisy]:
    """``eps* (v - sigma z)``, z ~ N(0, I), with labels eps* = +-1 that are drawn anew now and then.

    Two Gaussians around v and -v; class 1 is eps* = +1. Each label is drawn anew, +1 or -1 alike,
    with probability ``flip``. The dataset has the noisy labels, of which
    about flip / 2 are wrong (a label drawn anew is right half of the time); ``Noisy`` says which.
    v is the first unit vector: z, and the start of gradient descent on a sphere, look the same from
    every direction, so any other v of norm 1 is this one rotated.

    Known: sign(<v, x>) is right with probability Phi(1 / sigma), and no classifier more often.
    ValueError: flip that is no probability, sigma <= 0.

    Reference: Liu et al. 2020, arXiv 2007.00151, section 3 and appendix A.
    """
    _check(n, dim, 2)
    if not sigma > 0 or not 0 <= flip <= 1:
        raise ValueError(f"need sigma > 0 and flip from 0 to 1, got {sigma!r} and {flip!r}")
    clean = _labels(seed, n, 2)
    x = np.float32(-sigma) * _normal("opposite gaussians", seed, n, dim)
    x[:, 0] += 1
    x *= (2 * clean - 1).astype(np.float32)[:, None]
    wrong = np.array([[1 - flip / 2, flip / 2], [flip / 2, 1 - flip / 2]])
    noisy = corrupt.transition(clean, wrong, seed)  # one draw each, so that prefixes agree
    return _dataset(x, noisy.labels), noisy


def teacher(
    seed: int, *, n: int, dim: int, num_classes: int = 2
) -> tuple[Dataset, Float32[np.ndarray, "dim num_classes"]]:
    """Labels argmax(x @ weights) of a random linear teacher, and the teacher's weights.

    Known: realisable without a bias; ``weights`` classify every example, so a linear model reaches
    accuracy 1 in training and loses nothing to noise in testing.
    """
    _check(n, dim, num_classes)
    weights = _normal("weights", seed, dim, num_classes)
    x = _normal("teacher", seed, n, dim)
    y = np.argmax(x.astype(np.float64) @ weights.astype(np.float64), axis=1).astype(np.int32)
    return _dataset(x, y), weights


def random_labels(seed: int, *, n: int, dim: int, num_classes: int) -> Dataset:
    """Inputs from N(0, I) and uniform labels that have nothing to do with them.

    Known: on fresh examples every classifier is right 1/num_classes of the time. In training a
    linear model without bias fits all of n <= dim examples; two classes are separable with
    probability 2^(1-n) sum_{k < dim} binomial(n - 1, k): 1/2 at n = 2 dim.

    Reference: Cover 1965, Geometrical and statistical properties of systems of linear
    inequalities, theorem 1.
    """
    _check(n, dim, num_classes)
    return _dataset(_normal("random labels", seed, n, dim), _labels(seed, n, num_classes))


def symmetric(seed: int, *, n: int, dim: int) -> Dataset:
    """Inputs of which -x is one if x is, and (1/n) sum x x^T = I to rounding; all labels are 0.

    Known: a linear map w has mean (w x)^2 = |w|^2 on them, and a sum over those with <w, x> > 0 of
    any even function is half of the whole. ValueError: an n that is odd or less than 2 dim.
    """
    _check(n, dim, 2)
    if n % 2 or n < 2 * dim:
        raise ValueError(f"n must be even and at least 2 dim = {2 * dim}, got {n}")
    half = np.linalg.qr(_normal("symmetric", seed, n // 2, dim).astype(np.float64))[0]
    x = (math.sqrt(n / 2) * half).astype(np.float32)
    return _dataset(np.concatenate([x, -x]), np.zeros(n, np.int32))


def one_against_many(n: int) -> Dataset:
    """Class 1 at (1/2, -1) once and at (1/2, 1) n - 1 times: the batch perceptron's worst case.

    Known: a plane through the origin separates both from it; batch methods need a number of steps
    that grows with n, because the one example is 1 / n of a gradient, the perceptron does not.

    Reference: Tyurin 2024, arXiv 2412.08424, section 5.
    """
    _check(n, 2, 2)
    x = np.tile(np.array([0.5, 1.0], np.float32), (n, 1))
    x[0, 1] = -1
    return _dataset(x, np.ones(n, np.int32))


class Regression(NamedTuple):
    """Real targets, which a Dataset's labels are not."""

    x: Float32[np.ndarray, "n dim"]
    targets: Float32[np.ndarray, "n"]
    weights: Float32[np.ndarray, "dim"]


def sparse_regression(seed: int, *, n: int, dim: int, nonzero: int) -> Regression:
    """``targets = x @ weights``, ``nonzero`` weights of 1 before zeros; every |x| is sqrt(dim).

    Directions of x are uniform. Known: realisable; with n < dim not by these weights alone.
    """
    _check(n, dim, 2)
    if not 1 <= nonzero <= dim:
        raise ValueError(f"nonzero must be from 1 to dim = {dim}, got {nonzero}")
    x = _normal("regression", seed, n, dim).astype(np.float64)
    x *= math.sqrt(dim) / np.linalg.norm(x, axis=1, keepdims=True)
    weights = (np.arange(dim) < nonzero).astype(np.float32)
    x = x.astype(np.float32)
    return Regression(x, x @ weights, weights)


def low_rank(seed: int, *, dim: int, rank: int, smallest: float) -> Float32[np.ndarray, "dim rank"]:
    """A factor u of the positive matrix u u^T, its eigenvalues evenly from 1 to ``smallest``.

    Its directions are uniform; u is what is rounded to float32, so the rank is exact.
    """
    _check(1, dim, 2)
    if not (1 <= rank <= dim and 0 < smallest <= 1):
        raise ValueError(
            f"need rank from 1 to dim = {dim} and smallest above 0 and up to 1, got {rank} and "
            f"{smallest!r}"
        )
    directions = np.linalg.qr(_normal("low rank", seed, dim, rank).astype(np.float64))[0]
    return (directions * np.sqrt(np.linspace(1, smallest, rank))).astype(np.float32)


class Sensing(NamedTuple):
    """Linear measurements of a positive matrix of low rank."""

    matrices: Float32[np.ndarray, "m dim dim"]  # symmetric, E <A, Z>^2 = |Z|^2 for symmetric Z
    values: Float32[np.ndarray, "m"]  # <A_i, u u^T>, some of them wrong
    factor: Float32[np.ndarray, "dim rank"]  # u
    wrong: Bool[np.ndarray, "m"]


def sensing(
    seed: int, *, n: int, dim: int, rank: int, smallest: float = 0.5, outliers: float = 0.0
) -> Sensing:
    """``n`` Gaussian measurements of ``low_rank``'s matrix, to a part of which N(5, 10^2) is added.

    The symmetric parts of matrices of independent N(0, 1) entries. Each value is wrong with
    probability ``outliers``. Reference: Ma and Fattahi 2022, arXiv 2202.08788, for the model.
    """
    _check(n, dim, 2)
    if not 0 <= outliers < 1:
        raise ValueError(f"outliers must be from 0 to below 1, got {outliers!r}")
    factor = low_rank(seed, dim=dim, rank=rank, smallest=smallest)
    a = _normal("sensing", seed, n, dim, dim)
    a = (a + a.transpose(0, 2, 1)) / np.float32(2)
    truth = factor.astype(np.float64) @ factor.T.astype(np.float64)
    values = a.reshape(n, -1).astype(np.float64) @ truth.ravel()
    wrong = _generator("outliers", seed).random(n) < outliers
    values += np.where(wrong, 5 + 10 * _generator("sizes", seed).standard_normal(n), 0)
    return Sensing(a, values.astype(np.float32), factor, wrong)


def _check(n: int, dim: int, num_classes: int) -> None:
    for name, value, low in (("n", n, 1), ("dim", dim, 1), ("num_classes", num_classes, 2)):
        if value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")


def _generator(purpose: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([int.from_bytes(purpose.encode()), seed]))


def _normal(purpose: str, seed: int, *shape: int) -> np.ndarray:
    return _generator(purpose, seed).standard_normal(shape).astype(np.float32)


def _labels(seed: int, n: int, num_classes: int) -> np.ndarray:
    uniform = _generator("labels", seed).random(n)  # one draw each, so that prefixes agree
    return (uniform * num_classes).astype(np.int32)


def _dataset(x: np.ndarray, y: np.ndarray) -> Dataset:
    return Dataset(x=x, y=y, mean=np.zeros(1, np.float32), std=np.ones(1, np.float32))
