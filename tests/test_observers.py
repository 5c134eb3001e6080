"""Observers: what they find against closed forms, and that nothing changes without them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_step import BATCHES, KEY, MLP, SCALARS, SGD, Scalar, numbers, quadratic, run, same

from dynamics import mesh, step
from dynamics.observers import GradientNoise, LearningRate, Norms
from dynamics.types import Aux, Batch, Info, Observer, Task

BATCH = numbers([[1, 2, 3, 4], [0, 0, 1, 1]])
ALL = (Norms(layers=True), LearningRate(), GradientNoise())


def test_they_are_observers() -> None:
    assert all(isinstance(one, Observer) for one in ALL)
    assert len({hash(one) for one in ALL}) == 3


def test_norms_and_rate_on_a_quadratic() -> None:
    """The gradient at (1, -2, 0.5) is (1, -6, 0.25) E x^2, the update -0.01 of it."""
    observers = (Norms(layers=True), LearningRate())
    found = run(quadratic(), optax.sgd(0.01), BATCH, scalars={}, observers=observers).metrics
    g = np.array([1, -6, 0.25]) * 7.5
    wanted = {
        "norms.gradient": np.linalg.norm(g),
        "norms.gradient_l1": np.abs(g).sum(),
        "norms.update": 0.01 * np.linalg.norm(g),
        "norms.gradient/a": np.linalg.norm(g[:2]),
        "norms.gradient_l1/a": np.abs(g[:2]).sum(),
        "norms.update/a": 0.01 * np.linalg.norm(g[:2]),
        "norms.gradient/b": g[2],
        "norms.gradient_l1/b": g[2],
        "norms.update/b": 0.01 * g[2],
        "learning_rate.length": 0.01,
        "learning_rate.along": 0.01,
    }
    assert found.keys() == {"loss", *wanted}
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-5, err_msg=name)


def test_kernel_and_bias_are_one_layer() -> None:
    found = run(MLP, SGD, observers=(Norms(layers=True),)).metrics
    layers = {name.partition("/")[2] for name in found if name.startswith("norms.update/")}
    assert layers == set(step.init(MLP, SGD, KEY, SCALARS).params)
    whole = sum(found[f"norms.gradient/{layer}"] ** 2 for layer in layers)
    np.testing.assert_allclose(found["norms.gradient"] ** 2, whole, rtol=1e-5)


def test_sums_of_half_precision_are_float32() -> None:
    ones = {"w": jnp.ones(300_000, jnp.bfloat16)}
    few = jnp.zeros(1)
    info = Info(aux=Aux(loss=few, logits=few, y=few, index=few), grads=ones, updates=ones)
    found = Norms().observe(step.given({}), info)
    assert found["gradient_l1"] == 300_000 and found["gradient"].dtype == jnp.float32
    np.testing.assert_allclose(found["gradient"], np.sqrt(300_000), rtol=1e-6)
    assert LearningRate().observe(step.given({}), info)["along"] == -1


def test_the_rate_along_a_gradient_is_not_the_length_of_a_step() -> None:
    """Momentum: after g0 = 30, g1 = 1 the update is -0.1 (0.9 g0 + g1), whatever lies along g1."""
    found = run(Scalar.task(), optax.sgd(0.1, momentum=0.9), BATCH, scalars={}, observers=ALL[1:2])
    w0, w1 = 2.0, 2 - 0.1 * 30
    g0, g1 = 2 * w0 * 7.5, 2 * w1 * 0.5
    np.testing.assert_allclose(found.metrics["learning_rate.length"][0], 0.1, rtol=1e-6)
    u = -0.1 * (0.9 * g0 + g1)
    np.testing.assert_allclose(found.metrics["learning_rate.length"][1], abs(u / g1), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["learning_rate.along"][1], -u / g1, rtol=1e-5)


def regression(n: int, d: int) -> Task:
    """Of 0.5 |w - x|^2 the gradient of an example is w - x: mean w - E x, covariance that of x."""

    def init(key: Any, hyperparameters: Any) -> Any:
        return {"w": jnp.full(d, 0.3)}, {}

    def loss(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
        value = 0.5 * jnp.sum((params["w"][None] - batch.x) ** 2, axis=1)
        aux = Aux(loss=value, logits=value[:, None], y=batch.y, index=batch.index)
        return value.mean(), (extras, aux)

    return Task(init, loss, lambda p, e, b, h: loss(p, e, b, KEY, h)[1][1])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_gradient_noise(accumulate: int) -> None:
    """One step by hand; over many steps at fixed weights both means within 4 standard errors."""
    steps, size, d = 4000, 8, 3
    scale = np.array([1.0, 0.5, 2.0])
    x = np.random.default_rng(1).normal(size=(steps, size, d)) * scale
    zeros = np.zeros((steps, size), np.int32)
    batches = Batch(x=jnp.asarray(x, jnp.float32), y=jnp.asarray(zeros), index=jnp.asarray(zeros))
    still = optax.scale(0.0)
    options: dict[str, Any] = {"accumulate": accumulate, "observers": (GradientNoise(),)}
    found = run(regression(steps, d), still, batches, scalars={}, **options).metrics
    g = 0.3 - x[0].mean(axis=0)
    parts = 0.3 - x[0].reshape(accumulate, -1, d).mean(axis=1)
    s, b = np.mean(np.sum(parts**2, axis=1)), size // accumulate
    squared = (size * g @ g - b * s) / (size - b)
    np.testing.assert_allclose(found["noise.squared"][0], squared, rtol=1e-4)
    trace = (s - g @ g) / (1 / b - 1 / size)
    np.testing.assert_allclose(found["noise.trace"][0], trace, rtol=1e-4)
    for name, wanted in (("squared", 3 * 0.3**2), ("trace", np.sum(scale**2))):
        values = np.asarray(found[f"noise.{name}"], np.float64)
        assert abs(values.mean() - wanted) < 4 * values.std() / np.sqrt(steps), name


def test_noise_needs_microbatches() -> None:
    with pytest.raises(ValueError, match="noise compares microbatches: accumulate must be"):
        run(MLP, SGD, observers=(GradientNoise(),))


class Twice:
    """Says what it sees of the state, as an array."""

    name = "norms"

    def observe(self, state: Any, info: Info) -> dict[str, jax.Array]:
        return {"grads": jax.tree.leaves(info.grads)[0], "step": state.step}


def test_wrong_observers_are_one_error() -> None:
    with pytest.raises(ValueError, match="two observers are named 'norms': names must differ"):
        step.make(MLP, SGD, observers=(Norms(), Twice()))
    with pytest.raises(ValueError, match="norms.grads must be a scalar"):
        run(MLP, SGD, observers=(Twice(),))


def test_without_observers_the_program_is_the_same() -> None:
    """What is not asked for is not computed; what is asked for costs no gradient."""
    state = step.init(MLP, SGD, KEY, SCALARS)
    batch = jax.tree.map(lambda x: x[0], BATCHES)

    def compiled(**options: Any) -> Any:
        made = step.make(MLP, SGD, accumulate=2, **options)
        return jax.jit(made).lower(state, batch).compile()

    bare, empty, all_ = compiled(), compiled(observers=()), compiled(observers=ALL)
    flops = [one.cost_analysis()["flops"] for one in (bare, empty, all_)]
    assert flops[0] == flops[1] < flops[2] < 1.7 * flops[0]
    same(bare(state, batch), empty(state, batch))


def test_fit_writes_what_they_find() -> None:
    """In the rows of the steps, each replica's own; the state is that of a run without."""
    p = tiny.problem("mlp", num_steps=5)
    here = mesh.make(2)
    found = tiny.run(p, here, 4, observers=ALL, accumulate=2)
    plain = tiny.run(p, here, 4, accumulate=2)
    for x, y in zip(tiny.leaves(found), tiny.leaves(plain), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for name in ("norms.gradient", "norms.update/head", "learning_rate.along", "noise.trace"):
        values = np.asarray(found.rows[name])
        assert np.isfinite(values).sum() == 5 * 4 and len(np.unique(values)) == 5 * 4
    with pytest.raises(ValueError, match="two probes are named 'norms'"):
        tiny.run(p, here, 4, observers=(Norms(), Norms()))
