"""Crop and flip: every outcome possible, each as likely as it should be."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scipy.stats import chi2

from dynamics.data.augment import crop_and_flip

H, W, C = 4, 7, 2
MANY = 5000
IMAGE = np.arange(H * W * C, dtype=np.float32).reshape(H, W, C)


def outcomes(pad):
    """{bytes: (down, right, flipped)} of every crop of the padded image."""
    padded = np.pad(IMAGE, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    side = range(2 * pad + 1)
    crops = {(i, j): padded[i : i + H, j : j + W] for i in side for j in side}
    return {
        (crop[:, ::-1] if flip else crop).tobytes(): (*at, flip)
        for at, crop in crops.items()
        for flip in (0, 1)
    }


@functools.cache
def compiled(pad):
    return jax.jit(crop_and_flip(pad))


def drawn(pad, seed=0):
    x = jnp.broadcast_to(IMAGE, (MANY, H, W, C))
    return np.asarray(compiled(pad)(jax.random.key(seed), x))


def test_all_crops_and_flips_are_equally_likely():
    known, count = outcomes(2), MANY
    assert len(known) == 50  # the image has no symmetry that would merge two
    counts = dict.fromkeys(known.values(), 0)
    for image in drawn(2):
        counts[known[image.tobytes()]] += 1  # KeyError: not a crop at all
    found = np.array(list(counts.values()))
    assert chi2.sf(((found - count / 50) ** 2 / (count / 50)).sum(), 49) > 1e-4


def test_each_image_has_its_own_draw():
    """Neighbours in a batch agree no more often than chance."""
    known = outcomes(2)
    found = np.array([known[image.tobytes()] for image in drawn(2)])
    same = (found[1:] == found[:-1]).mean(axis=0)
    for rate, chance in zip(same, (1 / 5, 1 / 5, 1 / 2), strict=True):
        assert abs(rate - chance) < 4 * np.sqrt(chance * (1 - chance) / MANY)


def test_no_padding_only_flips():
    found = drawn(0)
    flipped = (found == IMAGE[:, ::-1]).all(axis=(1, 2, 3))
    assert (flipped | (found == IMAGE).all(axis=(1, 2, 3))).all() and 0 < flipped.sum() < MANY


def test_the_key_is_all_that_is_random():
    np.testing.assert_array_equal(drawn(2), drawn(2))
    assert (drawn(2) != drawn(2, seed=1)).any()


def test_images_do_not_mix():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, H, W, C)), jnp.float32)
    augment = jax.jit(crop_and_flip(1))
    before, after = (augment(jax.random.key(0), z) for z in (x, x.at[1].set(0)))
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[2], after[2])


def test_grey_images_without_a_channel_axis():
    """Digits and MNIST are [B, H, W]; ``Train.augment`` may be asked of them, too."""
    x = jnp.broadcast_to(IMAGE[..., 0], (8, H, W))
    grey = np.asarray(compiled(2)(jax.random.key(0), x))
    colour = np.asarray(compiled(2)(jax.random.key(0), x[..., None]))
    np.testing.assert_array_equal(grey, colour[..., 0])


@pytest.fixture
def unchecked():
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_what_is_no_image_is_refused(unchecked):
    with pytest.raises(ValueError, match="crop_and_flip"):
        crop_and_flip(1)(jax.random.key(0), jnp.zeros((4, 7)))
