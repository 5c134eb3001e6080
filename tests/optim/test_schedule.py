"""Schedules: closed forms at the steps where they can be off by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.optim import Constant, Cosine, Linear, Steps, factor

FEW = settings(derandomize=True, deadline=None, max_examples=25)


def values(schedule, num_steps, steps=None):
    steps = jnp.arange(num_steps) if steps is None else jnp.array(steps)
    return np.asarray(jax.vmap(factor(schedule, num_steps))(steps))


def test_constant():
    np.testing.assert_array_equal(values(Constant(), 5), np.ones(5))


def test_steps_drop_at_their_milestones():
    found = values(Steps(milestones=(0.3, 0.6, 0.8), decay=0.2), 200)
    wanted = np.repeat([1, 0.2, 0.04, 0.008], [60, 60, 40, 40])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_milestones_at_the_ends_twice_and_in_any_order():
    np.testing.assert_allclose(values(Steps(milestones=(0.0,), decay=0.5), 4), 0.5)
    np.testing.assert_allclose(values(Steps(milestones=(1.0,), decay=0.5), 4), 1)
    twice = values(Steps(milestones=(0.5, 0.5), decay=0.5), 4)
    np.testing.assert_allclose(twice, [1, 1, 0.25, 0.25])
    turned = values(Steps(milestones=(0.75, 0.25), decay=0.5), 8)
    np.testing.assert_allclose(turned, values(Steps(milestones=(0.25, 0.75), decay=0.5), 8))
    np.testing.assert_array_equal(values(Steps(milestones=()), 4), 1)


@pytest.mark.parametrize("kind", [Cosine, Linear])
@FEW
@given(
    num_steps=st.sampled_from([1, 2, 7, 40]),
    warmup=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_warm_up_and_fall(kind, num_steps, warmup, final):
    ramp = round(warmup * num_steps)
    found = values(kind(warmup=warmup, final=final), num_steps)
    t = np.arange(num_steps)
    u = (t - ramp) / max(num_steps - ramp, 1)
    fall = (1 + np.cos(np.pi * u)) / 2 if kind is Cosine else 1 - u
    wanted = np.where(t < ramp, (t + 1) / max(ramp, 1), final + (1 - final) * fall)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert (found > 0).all() or final == 0
    assert (found <= 1).all()


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_named_steps(kind):
    """The first update is not lost, the peak is reached, the end is where it should be."""
    shape = kind(warmup=0.25, final=0.1)
    found = values(shape, 40, [0, 8, 9, 10, 25, 39, 40, 41, 1000])
    np.testing.assert_allclose(found[:2], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(found[2:4], 1)
    np.testing.assert_allclose(found[4], 0.55, rtol=1e-6)
    assert 0.1 < found[5] < 0.15
    np.testing.assert_allclose(found[6:], 0.1, rtol=1e-6)  # a run that goes on stays at the end


@pytest.mark.parametrize("schedule", [Constant(), Steps(), Cosine(warmup=0.1), Linear()])
def test_a_float32_scalar_of_a_counter(schedule):
    found = jax.jit(factor(schedule, 10))(jnp.int32(3))
    assert found.shape == () and found.dtype == jnp.float32


def test_long_runs_keep_their_steps():
    """A hundred million steps: the step as a float32 is off by a few, the factor by 1e-6."""
    steps = 10**8
    found = values(Linear(), steps, [0, steps // 4, steps // 2, steps - 1])
    np.testing.assert_allclose(found, [1, 0.75, 0.5, 0], atol=1e-6)
