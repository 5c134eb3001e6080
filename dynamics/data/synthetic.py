"""Problems with known answers, as datasets.

x is float32 [n dim] and its mean and std are 0 and 1, so that normalising leaves it as stated. A
longer dataset of one seed begins with the shorter one: draw once and cut train and test from it.
The draws are those of numpy's Generator, which may change between versions of numpy.
"""

import math

import numpy as np
from jaxtyping import Float32

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
    index = np.arange(len(y), dtype=np.int32)
    return Dataset(x=x, y=y, index=index, mean=np.zeros(1, np.float32), std=np.ones(1, np.float32))
