"""Shapes and the noise of their outlines, against a slow reference."""

import numpy as np
import pytest
from references import segmentation as reference

from dynamics.data.shapes import GAP, HALF_WIDTH, IGNORED, RADIUS, outlines, shapes


@pytest.fixture(scope="module")
def data():
    return shapes(3, n=40)


def test_the_dataset(data):
    assert data.x.shape == data.y.shape == (40, 32, 32)
    assert data.x.dtype == np.float32 and data.y.dtype == np.int32
    assert (data.mean.shape, data.std.shape) == ((1, 1), (1, 1))
    assert (data.mean == 0).all() and (data.std == 1).all()
    np.testing.assert_array_equal(data.row, np.arange(40))
    for c, intensity in enumerate((0.0, 1.0, -1.0)):
        noise = data.x[data.y == c] - intensity
        assert abs(noise.mean()) < 4 * 0.5 / np.sqrt(noise.size)
        assert abs(noise.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * noise.size)


def test_sizes_and_places_are_as_stated(data):
    for y in data.y:
        disk, square = (np.argwhere(y == c) for c in (1, 2))
        assert np.pi * (RADIUS[0] - 1) ** 2 < len(disk) < np.pi * (RADIUS[1] + 1) ** 2
        sides = np.ptp(square, axis=0) + 1
        assert (sides >= 2 * HALF_WIDTH[0]).all() and (sides <= 2 * HALF_WIDTH[1] + 1).all()
        assert len(square) == sides.prod()
        apart = np.sqrt(((disk[:, None] - square[None]) ** 2).sum(axis=-1)).min()
        assert apart >= GAP
    areas = (data.y == 1).sum(axis=(1, 2))
    assert np.ptp(areas) > 40  # they differ


def test_a_longer_set_begins_with_the_shorter_and_seeds_differ(data):
    again, other = shapes(3, n=5), shapes(4, n=5)
    np.testing.assert_array_equal(again.x, data.x[:5])
    np.testing.assert_array_equal(again.y, data.y[:5])
    assert (other.y != again.y).any() and (other.x != again.x).mean() > 0.99


@pytest.mark.parametrize("iterations", [(1,), (1, 2), (3,)])
def test_outlines_are_eroded_or_dilated(data, iterations):
    noisy = outlines(data.y, 7, iterations=iterations)
    assert noisy.labels.dtype == noisy.clean.dtype == np.int32
    np.testing.assert_array_equal(noisy.clean, data.y)
    np.testing.assert_array_equal(noisy.mask, noisy.labels != data.y)
    assert noisy.rate == noisy.mask.mean() > 0.02
    kinds = set()
    for clean, labels in zip(data.y, noisy.labels, strict=True):
        fits = [
            (grows, k)
            for grows in (False, True)
            for k in iterations
            if (reference.moved(clean, grows, k) == labels).all()
        ]
        assert len(fits) == 1
        kinds.add(fits[0])
    assert len(kinds) == 2 * len(iterations)  # all of them occur


def test_the_seed_determines_the_noise(data):
    a, b, c = (outlines(data.y, seed).labels for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_growth_takes_background_only_and_ignored_pixels_stay():
    y = np.zeros((30, 9, 9), np.int32)
    y[:, 2:5, 2:5], y[:, 2:5, 5:8] = 1, 2
    y[:, 0] = y[:, 8] = IGNORED
    for labels in outlines(y, 0, iterations=(2,)).labels:
        assert (labels[[0, 8]] == IGNORED).all() and (labels[1:8] != IGNORED).all()
        if (labels == 1).sum() > 9:  # grown: neither has taken a pixel of the other
            assert (labels[2:5, 2:5] == 1).all() and (labels[2:5, 5:8] == 2).all()
        else:
            assert ((labels[1:8] != 0) <= (y[0, 1:8] != 0)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes(0, n=0), "n must be >= 1, got 0"),
        (lambda: shapes(0, n=1, size=16), "size must be >= 32, got 16"),
        (lambda: shapes(0, n=1, noise=-0.5), "noise must be >= 0, got -0.5"),
        (lambda: outlines(np.zeros((1, 4, 4), int), 0, iterations=()), r"iterations must .* \(\)"),
        (lambda: outlines(np.zeros((1, 4, 4), int), 0, iterations=(0, 1)), r">= 1, got \(0, 1\)"),
    ],
)
def test_bad_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
