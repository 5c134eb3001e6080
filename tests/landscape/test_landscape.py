"""Paths between states: what lies on them, their barriers, and batch statistics on the way."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from dynamics import models, step, task
from dynamics.calls import by_value
from dynamics.landscape import barrier, between, reestimated
from dynamics.types import Batch, TrainState

ALPHAS = np.linspace(0, 1, 11)
GENERATOR = np.random.default_rng(0)
N, K = 24, 3
X = jnp.asarray(3 + 2 * GENERATOR.normal(size=(N, 4, 4)), jnp.float32)
Y = jnp.asarray(GENERATOR.integers(0, K, N), jnp.int32)
BATCH = Batch(x=X, y=Y, index=jnp.arange(N))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


def state(params: Any, extras: Any = None) -> TrainState:
    return step.given(params, extras)


# ---- between ----


def test_ends_and_middle() -> None:
    a, b = (state({"w": normal(3, 2), "b": normal(2)}, {"mean": normal(2)}) for _ in range(2))
    start, middle, end = (between(a, b, alpha) for alpha in (0.0, 0.5, 1.0))
    for name, tree in (("params", lambda s: s.params), ("extras", lambda s: s.extras)):
        leaves = [jax.tree.leaves(tree(s)) for s in (a, b, start, middle, end)]
        for x, y, first, half, last in zip(*leaves, strict=True):
            np.testing.assert_array_equal(first, x, err_msg=name)
            np.testing.assert_allclose(half, (x + y) / 2, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(last, y, rtol=1e-6, atol=1e-7)


def test_between_a_state_and_itself_is_itself() -> None:
    a = state({"w": normal(3, 2) * 1e3}, {"count": jnp.int32(5)})
    for alpha in ALPHAS:
        found = between(a, a, alpha)
        np.testing.assert_array_equal(found.params["w"], a.params["w"])
        assert found.extras["count"] == 5


def test_what_is_no_number_stays_the_starts() -> None:
    """Step, key and counters: those of ``start``; types are kept."""
    a = state({"w": normal(3).astype(jnp.bfloat16)}, {"count": jnp.int32(5)})
    b = state({"w": normal(3).astype(jnp.bfloat16)}, {"count": jnp.int32(9)})
    b = b.replace(step=jnp.int32(7), key=jax.random.key(3))
    found = between(a, b, 0.25)
    assert found.params["w"].dtype == jnp.bfloat16
    assert found.extras["count"] == 5 and found.step == 0
    assert (jax.random.key_data(found.key) == jax.random.key_data(a.key)).all()


# ---- barrier ----


def test_a_double_well() -> None:
    """E11: (w^2 - 1)^2 between -1 and 1 has a barrier of 1, at the middle."""
    w = np.array([between(state(-jnp.ones(())), state(jnp.ones(())), a).params for a in ALPHAS])
    risk = (w**2 - 1) ** 2
    assert barrier(risk, ALPHAS) == pytest.approx(1, abs=1e-6)
    assert risk.argmax() == 5


def test_identical_ends() -> None:
    values = np.full((11, 4), GENERATOR.random(4))
    np.testing.assert_array_equal(barrier(values, ALPHAS), np.zeros(4))


@functools.cache
def linear() -> Any:
    return task.classification(models.make(models.Linear(), K), (4, 4))


def test_a_convex_model_has_none() -> None:
    """E11: the loss of a linear model, between any two weights."""
    net = linear()
    shapes = jax.eval_shape(net.init, jax.random.key(0), {})[0]
    risk = jax.jit(lambda s: net.evaluate(s.params, {}, BATCH, {}).loss)
    for _ in range(3):
        a, b = (state(jax.tree.map(lambda x: 3 * normal(*x.shape), shapes)) for _ in range(2))
        values = np.stack([np.asarray(risk(between(a, b, alpha)), np.float64) for alpha in ALPHAS])
        assert barrier(values.mean(axis=1), ALPHAS) <= 1e-6
        assert (barrier(values, ALPHAS) <= 1e-6 * values.max(axis=0)).all()  # each example, too
        assert values.mean(axis=1)[5] < values.mean(axis=1)[[0, 10]].mean() - 0.1


def test_against_the_definition() -> None:
    alphas = np.array([0, 0.1, 0.35, 0.9, 1])
    values = GENERATOR.random((5, 2, 3))
    wanted = np.zeros((2, 3))
    for k in range(2):
        for i in range(3):
            r = values[:, k, i]
            wanted[k, i] = max(r[j] - (1 - a) * r[0] - a * r[-1] for j, a in enumerate(alphas))
    found = barrier(values, alphas)
    np.testing.assert_allclose(found, np.maximum(wanted, 0), rtol=1e-12)
    np.testing.assert_allclose(barrier(values + 5, alphas), found, rtol=1e-12)
    np.testing.assert_allclose(barrier(3 * values, alphas), 3 * found, rtol=1e-12)
    tilted = values + alphas[:, None, None]
    np.testing.assert_allclose(barrier(tilted, alphas), found, rtol=1e-12)
    np.testing.assert_allclose(barrier(values[::-1], 1 - alphas[::-1]), found, rtol=1e-12)


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(
    ("alphas", "count"),
    [
        *(([0, 0.5], 4), ([0, 0.5, 0.5, 1], 4), ([0.1, 0.5, 0.7, 1], 4), ([0, 0.7, 0.5, 1], 4)),
        *(([0, 0.5, 0.9], 3), ([0, np.nan, 1], 3), ([0], 1), ([], 0)),
    ],
)
def test_other_places_are_refused(alphas: list[float], count: int, unchecked: Any) -> None:
    with pytest.raises(ValueError, match="alphas must rise from 0 to 1, one for each value"):
        barrier(np.zeros(count), np.array(alphas))


def test_the_ends_alone_have_no_barrier() -> None:
    np.testing.assert_array_equal(
        barrier(GENERATOR.random((2, 3)), np.array([0.0, 1])), np.zeros(3)
    )


def test_what_is_not_a_number_shows() -> None:
    values = np.zeros((3, 2))
    values[1, 0] = np.nan
    np.testing.assert_array_equal(barrier(values, np.array([0, 0.5, 1])), [np.nan, 0])


# ---- batch statistics ----


def each(fn: Any) -> Any:
    """Of ``fit``, in miniature."""
    return jax.jit(lambda own, *shared: jax.vmap(lambda one: fn(one, *shared))(own))


@functools.cache
def convnet() -> Any:
    net = task.classification(models.make(models.Convnet(channels=(3,), norm="batch"), K), (4, 4))
    replicas = [state(*net.init(jax.random.key(s), {})) for s in (0, 1)]
    return net, jax.tree.map(lambda *xs: jnp.stack(xs), *replicas)


def test_statistics_become_those_of_the_data() -> None:
    """The mean and variance of the convolution's output, to 0.9^n of what they were."""
    net, states = convnet()
    found = reestimated(net, states, [BATCH] * 100, each).extras["batch_stats"]["norm_0"]
    for k in range(2):
        kernel = states.params["conv_0"]["kernel"][k]
        out = jax.lax.conv_general_dilated(
            *(X[..., None], kernel, (1, 1), [(1, 1)] * 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        out = np.asarray(out, np.float64)
        atol = 1.1 * 0.9**100 * np.abs(out.var(axis=(0, 1, 2))).max()
        np.testing.assert_allclose(found["mean"][k], out.mean(axis=(0, 1, 2)), rtol=1e-4, atol=atol)
        np.testing.assert_allclose(found["var"][k], out.var(axis=(0, 1, 2)), rtol=1e-4, atol=atol)


def test_nothing_else_changes_and_each_batch_counts() -> None:
    net, states = convnet()
    halves = [jax.tree.map(lambda x: x[:12], BATCH), jax.tree.map(lambda x: x[12:], BATCH)]
    found = reestimated(net, states, halves, each)
    for x, y in zip(jax.tree.leaves(found.params), jax.tree.leaves(states.params), strict=True):
        np.testing.assert_array_equal(x, y)
    by_hand = states
    for half in halves:
        extras = []
        for k in range(2):
            one = jax.tree.map(lambda x: x[k], by_hand)  # noqa: B023
            extras.append(net.loss(one.params, one.extras, half, jax.random.key(0), {})[1][0])
        by_hand = by_hand.replace(extras=jax.tree.map(lambda *xs: jnp.stack(xs), *extras))
    for x, y in zip(jax.tree.leaves(found.extras), jax.tree.leaves(by_hand.extras), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    reverse = reestimated(net, states, halves[::-1], each)
    assert not np.array_equal(jax.tree.leaves(reverse.extras)[0], jax.tree.leaves(found.extras)[0])


def test_states_without_extras_come_back_untouched() -> None:
    def never(fn: Any) -> Any:
        raise AssertionError

    a = state({"w": normal(3)})
    assert reestimated(linear(), a, [BATCH], never) is a


def test_it_is_compiled_once_for_a_task() -> None:
    net, states = convnet()
    seen = []

    def counted(fn: Any) -> Any:
        seen.append(fn)
        return lambda own, *shared: own

    for _ in range(3):
        reestimated(net, states, [BATCH], counted)
    assert len(set(map(by_value, seen))) == 1
