"""PVI: bits by hand, blank inputs, and a null model that learns the class prior."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dynamics import fit, mesh, models, optim, population, scores, task
from dynamics.data import DataConfig, load, subset
from dynamics.data.rows import take
from dynamics.data.stream import resident
from dynamics.types import Dataset


def test_bits_by_hand() -> None:
    """Sure and right against one of four: 2 bits. No better than the null model: 0."""
    p, null = np.array([1.0, 0.25, 0.5, 1 / 8, 0.0]), np.array([0.25, 0.25, 0.25, 0.25, 0.25])
    with np.errstate(divide="ignore"):
        nats, null_nats = -np.log(p), -np.log(null)
    wanted = [2, 0, 1, -1, -math.inf]
    np.testing.assert_allclose(scores.pvi(nats, null_nats), wanted, rtol=1e-12)
    there = (jnp.asarray(x, jnp.float32) for x in (nats, null_nats))
    found = scores.pvi(*there)
    assert isinstance(found, jax.Array) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_blank_inputs_say_nothing(kind: str) -> None:
    p = tiny.problem(kind)
    before = p.data.x.copy()
    blank = scores.blank(p.data)
    found = take(jax.tree.map(jnp.asarray, blank), jnp.arange(len(blank), dtype=jnp.int32))
    real = take(jax.tree.map(jnp.asarray, p.data), jnp.arange(len(blank), dtype=jnp.int32))
    assert found.x.shape == real.x.shape and found.x.dtype == real.x.dtype
    np.testing.assert_array_equal(found.x, np.zeros(p.data.x.shape))  # 0, not about 0
    np.testing.assert_array_equal(found.y, real.y)
    np.testing.assert_array_equal(blank.row, p.data.row)
    np.testing.assert_array_equal(p.data.x, before)


def test_blank_colour_images_have_the_mean_of_each_channel() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    mean = np.array([[[120.3, 99.7, 1.1]]], np.float32)
    data = Dataset(x=x, y=np.zeros(5, np.int32), mean=mean, std=mean)
    blank = scores.blank(data)
    np.testing.assert_array_equal(blank.x, np.broadcast_to(mean, x.shape))
    assert blank.x.base is not None and blank.x.strides[0] == 0  # no memory


def losses(data: Dataset, batch_size: int, num_steps: int, **fields: Any) -> np.ndarray:
    """Of two replicas of a linear model trained on ``data``, in nats f32[2, n]."""
    net = task.of_dataset(models.make(models.Linear(), 10), data)
    rule = optim.SGD(**fields)
    optimizer, here = rule.make(num_steps), mesh.make()
    keys = jax.random.split(jax.random.key(0), 2)
    state = fit.init(net, optimizer, keys, rule.hyperparameters(), here)
    stream = resident(data, batch_size, 2)
    results = fit.fit(net, optimizer, state, stream, num_steps, here)
    assert results.state is not None
    members = [population.take(results.state, r) for r in range(2)]
    each = [np.asarray(scores.over_examples(scores.loss, net, m, data)) for m in members]
    return np.stack(each)


def test_the_null_model_learns_the_class_prior() -> None:
    """E13: trained on blank inputs its probabilities are the frequencies of the labels, so the
    mean PVI is at most H(Y) bits, whatever the model; what a model gets wrong has negative PVI."""
    digits = load(DataConfig(num_train=200)).train
    few = np.flatnonzero((digits.y < 3) | (np.arange(200) % 3 == 0))  # not all equally frequent
    data = subset(digits, few)
    n = len(data)
    null = losses(scores.blank(data), n, 300, learning_rate=1.0, momentum=0.9)
    count = np.bincount(data.y, minlength=10)
    prior = count / n
    assert count.min() > 0 and count.max() > 2 * count.min()
    np.testing.assert_allclose(null, np.broadcast_to(-np.log(prior[data.y]), null.shape), rtol=1e-4)
    bits = -(prior * np.log2(prior)).sum()
    for steps in (5, 200):
        loss = losses(data, 20, steps, learning_rate=0.02)
        found = scores.pvi(loss, null)
        np.testing.assert_allclose(found.mean(), bits - loss.mean() / math.log(2), rtol=1e-4)
        assert (found.mean(axis=1) <= bits + 1e-4).all()
        assert ((found < 0) == (loss > null)).all()
    assert (found.mean(axis=1) > 0.8 * bits).all()
