"""Consistency over scales, and the task that is trained with it."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from references import segmentation as reference

from dynamics import losses, task
from dynamics.task.multiscale import consistency, multiscale
from dynamics.types import Batch

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0, 1.5, (3, 4, 3, 5, 3)).astype(np.float32)
X = GENERATOR.normal(size=(4, 8, 8)).astype(np.float32)
BATCH = Batch(
    x=jnp.asarray(X),
    y=jnp.asarray((X > 0).astype(np.int32)),
    index=jnp.arange(4, dtype=jnp.int32),
)
KEY = jax.random.key(0)
# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Pixels(nn.Module):
    """Logits of each pixel from a 3x3 neighbourhood, in training mode times a remembered number."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        count = self.variable("batch_stats", "count", lambda: jnp.zeros(()))
        if train:
            count.value = count.value + x.shape[1]
        return nn.Conv(3, (3, 3))(x[..., None])


@pytest.fixture(scope="module")
def net() -> Any:
    made = task.classification(Pixels(), (8, 8))
    return made, *made.init(KEY, {})


# ---- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["pixel", "image"])
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.8])
def test_consistency_against_loops(per: Any, rho: float) -> None:
    found = consistency(jnp.asarray(LOGITS), rho=rho, per=per)
    np.testing.assert_allclose(found, reference.consistency(LOGITS, rho, per), rtol=2e-5)


def test_the_masks_differ() -> None:
    pixel, image = (reference.consistency(LOGITS, 0.6, per) for per in ("pixel", "image"))
    assert (pixel > 0).all() and (image > 1.5 * pixel).any()


def test_it_is_the_jensen_shannon_divergence() -> None:
    """H(mean p) - mean H(p): at most log s, 0 where the scales agree."""
    p = np.exp(LOGITS - LOGITS.max(axis=-1, keepdims=True)).astype(np.float64)
    p /= p.sum(axis=-1, keepdims=True)
    entropy = lambda p: -(p * np.log(p)).sum(axis=-1)  # noqa: E731
    wanted = (entropy(p.mean(axis=0)) - entropy(p).mean(axis=0)).mean(axis=(1, 2))
    np.testing.assert_allclose(consistency(jnp.asarray(LOGITS), rho=0.0), wanted, rtol=1e-5)
    same = jnp.asarray(np.broadcast_to(LOGITS[:1], LOGITS.shape))
    np.testing.assert_allclose(consistency(same, rho=0.0), 0, atol=1e-6)
    apart = 200 * np.eye(3, dtype=np.float32)[:, None, None, None]  # sure of different classes
    found = consistency(jnp.asarray(np.broadcast_to(apart, (3, 1, 2, 2, 3))), rho=0.0)
    np.testing.assert_allclose(found, math.log(3), rtol=1e-6)


def test_the_gradient_flows_through_the_mean_and_is_finite() -> None:
    gradient = jax.grad(lambda z: consistency(z, rho=0.0).sum())(jnp.asarray(LOGITS))
    assert np.isfinite(gradient).all()
    p = jax.nn.softmax(jnp.asarray(LOGITS), axis=-1)
    log_q = jnp.log(p.mean(axis=0))[None]
    # d JSD / d z_k = p_k (log p_k - log q - KL_k) / s: the term through q cancels
    change = jnp.log(p) - log_q
    wanted = p * (change - (p * change).sum(axis=-1, keepdims=True)) / 3 / 15
    np.testing.assert_allclose(gradient, wanted, rtol=1e-3, atol=1e-6)
    extreme = jax.grad(lambda z: consistency(z, rho=0.0).sum())(jnp.asarray(1e4 * LOGITS))
    assert np.isfinite(extreme).all()


# ---- the task -----------------------------------------------------------------------------------


def trained(net: Any, weight: float, **options: Any) -> Any:
    plain, params, extras = net
    made = multiscale(plain, **options)

    def loss(params: Any) -> Any:
        return made.loss(params, extras, BATCH, KEY, {"consistency": jnp.float32(weight)})

    return jit(jax.value_and_grad(loss, has_aux=True))(params)


def scaled(net: Any, scale: float) -> np.ndarray:
    """The logits at a scale, resized back."""
    plain, params, extras = net
    side = round(8 * scale)
    x = jax.image.resize(BATCH.x, (4, side, side), "bilinear")
    other = BATCH.replace(x=x, y=jnp.zeros((4, side, side), jnp.int32))
    logits = jit(plain.evaluate)(params, extras, other, {}).logits
    return np.asarray(jax.image.resize(logits, (4, 8, 8, 3), "bilinear"))


def test_weight_zero_is_the_task(net: Any) -> None:
    plain, params, extras = net
    (loss, (_, aux)), grads = trained(net, 0.0)
    (wanted, (_, seen)), its = jit(
        jax.value_and_grad(lambda p: plain.loss(p, extras, BATCH, KEY, {}), has_aux=True)
    )(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    np.testing.assert_allclose(aux.logits, seen.logits, rtol=1e-6)
    np.testing.assert_allclose(aux.loss, seen.loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(its), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scales", [(0.75, 1.0, 1.5), (0.5, 2.0)])
def test_the_loss_is_cross_entropy_plus_weighted_consistency(net: Any, scales: Any) -> None:
    logits = np.stack([scaled(net, scale) for scale in sorted(scales)])
    extra = consistency(jnp.asarray(logits), rho=0.4).mean()
    assert extra > 1e-4
    native = losses.cross_entropy(jnp.asarray(scaled(net, 1.0)), BATCH.y).mean()
    (loss, (_, aux)), _ = trained(net, 2.0, scales=scales, rho=0.4)
    np.testing.assert_allclose(aux.scalars["consistency"], extra, rtol=1e-4)
    np.testing.assert_allclose(loss, native + 2 * extra, rtol=1e-5)
    over = np.mean([losses.cross_entropy(jnp.asarray(z), BATCH.y).mean() for z in logits])
    (loss, (_, aux)), _ = trained(net, 2.0, scales=scales, rho=0.4, cross_entropy="scales")
    np.testing.assert_allclose(loss, over + 2 * extra, rtol=1e-5)
    np.testing.assert_allclose(aux.loss.mean(), over, rtol=1e-5)
    assert abs(over - native) > 1e-3


def test_evaluation_returns_the_log_of_the_mean_probability(net: Any) -> None:
    plain, params, extras = net
    made = multiscale(plain, scales=(0.5, 1.0, 2.0))
    aux = jit(made.evaluate)(params, extras, BATCH, {})
    p = [jax.nn.softmax(jnp.asarray(scaled(net, s)), axis=-1) for s in (0.5, 1.0, 2.0)]
    np.testing.assert_allclose(jax.nn.softmax(aux.logits, axis=-1), sum(p) / 3, rtol=1e-5)
    wanted = -jnp.log(jnp.take_along_axis(sum(p) / 3, BATCH.y[..., None], axis=-1))
    np.testing.assert_allclose(aux.loss, wanted.mean(axis=(1, 2, 3)), rtol=1e-5)
    alone = multiscale(plain, scales=(1.0,)).evaluate(params, extras, BATCH, {})
    seen = plain.evaluate(params, extras, BATCH, {})
    np.testing.assert_allclose(alone.loss, seen.loss, rtol=1e-5)
    np.testing.assert_array_equal(alone.logits.argmax(axis=-1), seen.logits.argmax(axis=-1))


def test_batch_statistics_see_every_scale(net: Any) -> None:
    (_, (extras, _)), _ = trained(net, 1.0)
    assert extras["batch_stats"]["count"] == 6 + 8 + 12


def test_weights_of_examples_weigh_both_terms(net: Any) -> None:
    plain, params, extras = net
    made = multiscale(plain, rho=0.4)
    weight = jnp.asarray([4.0, 0.0, 0.0, 0.0])
    loss = jit(lambda b: made.loss(params, extras, b, KEY, {"consistency": jnp.float32(1)})[0])
    one = jax.tree.map(lambda x: x[:1], BATCH)
    np.testing.assert_allclose(loss(BATCH.replace(weight=weight)), loss(one), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales must be one or more different numbers > 0, got ()"),
        ({"scales": (1.0, 0.0)}, "scales must be one or more different numbers > 0, got (1.0, 0.0"),
        ({"scales": (1.0, 1.0)}, "different numbers"),
        ({"rho": 1.5}, "rho must be >= 0 and <= 1, got 1.5"),
    ],
)
def test_bad_options_are_refused(net: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        multiscale(net[0], **options)


def test_what_does_not_fit_is_refused_when_traced(net: Any) -> None:
    plain, params, extras = net
    made = multiscale(plain)
    with pytest.raises(ValueError, match=r"reads the hyperparameter 'consistency', .*\['rate'\]"):
        made.loss(params, extras, BATCH, KEY, {"rate": jnp.float32(1)})
    flat = BATCH.replace(y=BATCH.index)
    with pytest.raises(ValueError, match=r"a label for every pixel.*got \[4, 8, 8\] and \[4\]"):
        made.evaluate(params, extras, flat, {})
