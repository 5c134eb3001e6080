"""Images of two shapes with a class for every pixel, and annotations whose outlines are wrong.

The smallest problem of segmentation in which a network learns a large class before a small one,
and both before the errors of their annotation. The draws of the images are those of numpy's
Generator, which may change between versions of numpy; those of the noise are the raw output of
PCG64.

Reference: the noise is that of Liu et al. 2022, arXiv 2110.03740, appendix, on a problem of our
own; they scale each region to a common size first, here the iterations are fewer where it is small.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer
from scipy import ndimage

from dynamics.types import IGNORED, Dataset

NAMES = ("background", "disk", "square")
NUM_CLASSES = len(NAMES)
RADIUS, HALF_WIDTH = (6.0, 8.5), (2.5, 4.0)
GAP = 4.0  # pixels between the two shapes
SQUARE = np.ones((3, 3), bool)


class NoisyMasks(NamedTuple):
    """Labels to train on, and what only the experimenter knows about them."""

    labels: Int32[np.ndarray, "n h w"]
    clean: Int32[np.ndarray, "n h w"]
    mask: Bool[np.ndarray, "n h w"]  # True where the label is wrong now
    rate: float  # the part that is wrong, of the pixels that have a label


def shapes(seed: int, *, n: int, size: int = 32, noise: float = 0.5) -> Dataset:
    """A disk (class 1, intensity 1) and a square (class 2, -1) in Gaussian noise (background, 0).

    x f32[n, size, size], y i32[n, size, size]. Radius and half-width are uniform in RADIUS and
    HALF_WIDTH, the places among those at least GAP apart and inside the image. Image i of a seed
    does not depend on n: draw once and cut train and test from it. ValueError: a size below 32.
    """
    for name, value, low in (("n", n, 1), ("size", size, 32), ("noise", noise, 0)):
        if value < low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
    y = np.stack([_scene(np.random.Generator(_bits("scene", seed, i)), size) for i in range(n)])
    draws = [np.random.Generator(_bits("pixels", seed, i)) for i in range(n)]
    x = np.stack([draw.standard_normal((size, size)) for draw in draws]) * noise
    x += np.array([0.0, 1.0, -1.0])[y]
    return Dataset(
        x=x.astype(np.float32),
        y=y,
        mean=np.zeros((1, 1), np.float32),
        std=np.ones((1, 1), np.float32),
    )


def outlines(
    clean: Integer[np.ndarray, "n h w"], seed: int, *, iterations: Sequence[int] = (1, 2)
) -> NoisyMasks:
    """Every image's classes are all eroded or all dilated by a 3 x 3 square, k times.

    Erosion or dilation and k, one of ``iterations``, are drawn for each image, all equally likely;
    class c = 1, 2, ... is changed max(1, k - c + 1) times. Classes grow in that order, over
    background only; what they lose becomes background. Pixels labelled IGNORED stay so.
    """
    if not iterations or min(iterations) < 1:
        raise ValueError(f"iterations must be one or more numbers >= 1, got {iterations}")
    words = _bits("outlines", seed).random_raw(2 * len(clean)).reshape(-1, 2)
    grows, which = words[:, 0] >> np.uint64(63) == 1, words[:, 1] % np.uint64(len(iterations))
    labels = np.stack(
        [
            _moved(image, bool(grow), iterations[int(k)])
            for image, grow, k in zip(clean, grows, which, strict=True)
        ]
    )
    mask = labels != clean
    return NoisyMasks(labels, clean.astype(np.int32), mask, float(mask[clean != IGNORED].mean()))


def _moved(clean: np.ndarray, grows: bool, times: int) -> np.ndarray:
    """One image's classes, all grown or all shrunk."""
    labels = clean.astype(np.int32)
    present = [int(c) for c in np.unique(clean) if c not in (0, IGNORED)]
    for c in present:
        region, k = clean == c, max(1, times - c + 1)
        if grows:
            after = ndimage.binary_dilation(region, SQUARE, iterations=k)
            labels[after & (labels == 0)] = c
        else:
            after = ndimage.binary_erosion(region, SQUARE, iterations=k, border_value=1)
            labels[region & np.logical_not(after)] = 0
    return labels


def _scene(draw: np.random.Generator, size: int) -> np.ndarray:
    """i32[size, size]: where the two shapes are."""
    rows, columns = np.mgrid[:size, :size]
    while True:
        r, h = draw.uniform(*RADIUS), draw.uniform(*HALF_WIDTH)
        (i, j), (k, m) = (draw.uniform(s, size - 1 - s, 2) for s in (r, h))
        away = np.hypot(max(abs(i - k) - h, 0.0), max(abs(j - m) - h, 0.0)) - r
        if away >= GAP:
            break
    disk = np.hypot(rows - i, columns - j) <= r
    square = np.maximum(np.abs(rows - k), np.abs(columns - m)) <= h
    return np.where(disk, 1, np.where(square, 2, 0)).astype(np.int32)


def _bits(purpose: str, *seeds: int) -> np.random.PCG64:
    return np.random.PCG64([int.from_bytes(purpose.encode()), *seeds])
