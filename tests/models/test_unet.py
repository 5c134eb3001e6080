"""The U-Net: its upsampling, its paths, what it refuses."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics import task
from dynamics.models import Unet, make
from dynamics.models.unet import doubled, halved
from dynamics.types import Batch

X = np.random.default_rng(0).normal(size=(2, 8, 12)).astype(np.float32)


@pytest.mark.parametrize(("kind", "reduce"), [("average", np.mean), ("max", np.max)])
def test_halved_against_numpy(kind, reduce):
    y = halved(jnp.asarray(X[..., None]), kind)[..., 0]
    for i, j in np.ndindex(4, 6):
        square = X[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_allclose(y[:, i, j], reduce(square, (1, 2)), rtol=1e-6)


def test_nearest_repeats_every_pixel():
    x = jnp.asarray(X[..., None])
    y = doubled(x, "nearest")
    np.testing.assert_array_equal(y, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


def test_bilinear_mixes_neighbours_nine_to_three_to_one(jit):
    y = jit(lambda x: doubled(x, "bilinear"))(jnp.asarray(X[..., None]))[..., 0]
    padded = np.pad(X, ((0, 0), (1, 1), (1, 1)), mode="edge")
    for i, j in ((0, 0), (3, 8), (7, 11)):
        for di, dj in np.ndindex(2, 2):
            r, c = i + 1, j + 1
            a, b = r + 2 * di - 1, c + 2 * dj - 1
            near, rows, columns = padded[:, r, c], padded[:, a, c], padded[:, r, b]
            wanted = (9 * near + 3 * rows + 3 * columns + padded[:, a, b]) / 16
            np.testing.assert_allclose(y[:, 2 * i + di, 2 * j + dj], wanted, rtol=1e-5, atol=1e-6)


def test_channels_are_those_documented():
    shapes = jax.eval_shape(
        lambda: make(Unet(norm="none"), 3).init(jax.random.key(0), jnp.asarray(X), train=False)
    )["params"]
    found = {name: part["kernel"].shape[-2:] for name, part in shapes.items()}
    assert found == {
        "down_0_0_conv": (1, 8), "down_0_1_conv": (8, 8),
        "down_1_0_conv": (8, 16), "down_1_1_conv": (16, 16),
        "bottom_conv": (16, 32),
        "up_1_conv": (48, 16), "up_0_conv": (24, 8), "head": (8, 3),
    }  # fmt: skip


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
def test_how_far_a_pixel_sees(upsampling, jit):
    """A pixel's logits depend on those within the receptive field and on no other image; the long
    way round through the bottom reaches further than the convolutions at full resolution."""
    module = make(Unet(width=2, levels=1, convs=1, norm="none", upsampling=upsampling), 2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 24, 24)).astype(np.float32))
    variables = jit(lambda x: module.init(jax.random.key(3), x, train=False))(x)

    def pixel(x):
        return module.apply(variables, x, train=False)[0, 12, 12].sum()

    found = np.asarray(jit(jax.grad(pixel))(x))
    assert not found[1].any()
    rows, columns = np.nonzero(found[0])
    reach = max(np.abs(rows - 12).max(), np.abs(columns - 12).max())
    assert 3 < reach <= 8


def test_a_label_for_every_pixel_trains(jit):
    """Class of a pixel: the sign of the image there. A few steps of descent lower the loss."""
    net = task.classification(make(Unet(width=4, levels=1, groups=2), 2), X.shape[1:])
    y = jnp.asarray((X > 0).astype(np.int32))
    batch = Batch(x=jnp.asarray(X), y=y, index=jnp.arange(2, dtype=jnp.int32))
    key = jax.random.key(0)
    params, extras = jit(net.init)(key, {})
    gradient = jit(jax.value_and_grad(net.loss, has_aux=True))
    losses = []
    for _ in range(20):
        (loss, (_, aux)), grads = gradient(params, extras, batch, key, {})
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        losses.append(float(loss))
    assert aux.logits.shape == (2, 8, 12, 2) and aux.loss.shape == (2,)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_parametrisations_precisions_and_modes(norm, jit):
    """The same key: ntk computes what standard does, bfloat16 nearly so, an untrained head 0; batch
    norm alone remembers, and ties the images of a batch in training mode."""
    config = Unet(width=2, levels=1, convs=1, norm=norm, groups=2)
    changes = [{}, {"parametrisation": "ntk"}, {"precision": "bfloat16"}, {"zero_head": True}]

    @jit
    def outputs(x):
        modules = [make(dataclasses.replace(config, **change), 3) for change in changes]
        made = [module.init_with_output(jax.random.key(0), x, train=False) for module in modules]
        variables = made[0][1]
        one = lambda x: modules[0].apply(variables, x, train=True, mutable=["batch_stats"])  # noqa: E731
        (trained, new), (moved, _) = one(x), one(x.at[1].set(0.0))
        return [logits for logits, _ in made], dict(new), trained[0] - moved[0]

    (a, b, c, d), new, tied = outputs(jnp.asarray(X))
    assert a.shape == (2, 8, 12, 3) and a.dtype == c.dtype == jnp.float32
    scale = float(jnp.abs(a).max())
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(a, c, rtol=0, atol=8 * 2**-8 * scale)  # a handful of roundings
    assert (a != c).any() and not d.any()
    assert bool(new) == bool(np.abs(tied).max() > 1e-3) == (norm == "batch")


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (Unet(), (2, 10, 12), "2 levels reads images whose sides are multiples of 4, got [2, 10"),
        (Unet(levels=1), (2, 8, 7), "1 levels reads images whose sides are multiples of 2, got"),
        (Unet(), (2, 12), "Unet reads images [B, H, W, C] or [B, H, W]"),
    ],
)
def test_images_it_cannot_halve_are_refused(config, shape, message):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda x: make(config, 2).init(jax.random.key(0), x, train=False), x)


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match=r"Unet\.groups must divide width 6, got 4"):
        Unet(width=6)
