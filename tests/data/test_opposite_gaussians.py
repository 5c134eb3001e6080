"""Two Gaussians around v and -v, and labels of which some are drawn anew."""

import math

import numpy as np
import pytest

from dynamics.data.synthetic import opposite_gaussians

N, DIM, SIGMA, FLIP = 40_000, 6, 0.5, 0.4


@pytest.fixture(scope="module")
def drawn():
    return opposite_gaussians(0, n=N, dim=DIM, sigma=SIGMA, flip=FLIP)


def test_inputs_are_v_and_noise_with_the_sign_of_the_clean_label(drawn):
    data, noisy = drawn
    folded = data.x * (2 * noisy.clean - 1)[:, None]  # eps* x = v - sigma z
    v = np.eye(DIM)[0]
    np.testing.assert_allclose(folded.mean(0), v, rtol=0, atol=4 * SIGMA / math.sqrt(N))
    np.testing.assert_allclose(np.cov(folded.T), SIGMA**2 * np.eye(DIM), atol=0.01)
    assert abs(noisy.clean.mean() - 0.5) < 4 * 0.5 / math.sqrt(N)
    assert data.x.dtype == np.float32 and data.y.dtype == np.int32
    np.testing.assert_array_equal((data.x - data.mean) / data.std, data.x)


def test_half_of_the_labels_drawn_anew_are_wrong_whatever_the_input(drawn):
    data, noisy = drawn
    np.testing.assert_array_equal(data.y, noisy.labels)
    np.testing.assert_array_equal(noisy.mask, noisy.labels != noisy.clean)
    assert set(noisy.labels) == {0, 1}
    for part in (noisy.clean == 0, noisy.clean == 1, data.x[:, 3] > 0.3):
        rate, error = noisy.mask[part].mean(), math.sqrt(0.2 * 0.8 / part.sum())
        assert abs(rate - FLIP / 2) < 4 * error


def test_the_direction_v_is_right_as_often_as_said(drawn):
    data, noisy = drawn
    p = 0.5 * math.erfc(-1 / SIGMA / math.sqrt(2))
    right = ((data.x[:, 0] > 0) == noisy.clean).mean()
    assert abs(right - p) < 4 * math.sqrt(p * (1 - p) / N)


def test_a_longer_draw_begins_with_the_shorter_one(drawn):
    data, noisy = drawn
    short, few = opposite_gaussians(0, n=100, dim=DIM, sigma=SIGMA, flip=FLIP)
    np.testing.assert_array_equal(short.x, data.x[:100])
    np.testing.assert_array_equal(few.labels, noisy.labels[:100])
    np.testing.assert_array_equal(few.clean, noisy.clean[:100])
    other, _ = opposite_gaussians(1, n=100, dim=DIM, sigma=SIGMA, flip=FLIP)
    assert (other.x != short.x).all()


def test_a_seed_flips_at_a_higher_rate_what_it_flips_at_a_lower_one():
    low, high = (
        opposite_gaussians(3, n=2000, dim=2, sigma=1.0, flip=flip)[1].mask for flip in (0.2, 0.5)
    )
    assert (high[low]).all() and high.sum() > low.sum() > 0
    assert not opposite_gaussians(3, n=2000, dim=2, sigma=1.0, flip=0.0)[1].mask.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sigma": 0.0}, "need sigma > 0 and flip from 0 to 1, got 0.0 and 0.4"),
        ({"flip": 1.5}, "need sigma > 0 and flip from 0 to 1, got 1.0 and 1.5"),
        ({"n": 0}, "n must be >= 1, got 0"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        opposite_gaussians(0, **{"n": 5, "dim": 2, "sigma": 1.0, "flip": 0.4} | wrong)
