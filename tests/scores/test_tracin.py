"""TracIn: closed forms, the definition one pair at a time, and that its diagonal is itself."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from references import losses as by_hand
from references import scores as reference

from dynamics import models, step, task
from dynamics.data import of_arrays
from dynamics.data.rows import take
from dynamics.scores import over_examples
from dynamics.scores.grand import grand
from dynamics.scores.tracin import tracin, tracin_self
from dynamics.types import Batch, Dataset

N, K = 9, 3
GENERATOR = np.random.default_rng(0)
# stored with a mean and a scale, so that inputs that are not normalised would be seen
DATA = of_arrays(
    GENERATOR.normal(size=(N, 4, 4)).astype(np.float32), GENERATOR.integers(0, K, N)
).replace(mean=np.full((1, 1), 0.3, np.float32), std=np.full((1, 1), 2, np.float32))
RATES = (0.1, 0.02)
CONFIGS = {
    "linear": models.Linear(),
    "mlp": models.MLP(width=5, depth=1),
    "convnet": models.Convnet(channels=(3,), norm="batch"),
}


def batch(data: Dataset = DATA, rows: Any = range(N)) -> Batch:
    return take(jax.tree.map(jnp.asarray, data), jnp.asarray(list(rows), jnp.int32))


@functools.cache
def made(name: str) -> Any:
    """A task and two states of it."""
    net = task.of_dataset(models.make(CONFIGS[name], K), DATA)
    states = []
    for seed in (0, 1):
        params, extras = net.init(jax.random.key(seed), {})
        moved = lambda p: p + 0.3 if p.ndim == 1 else p  # noqa: E731
        states.append(step.given(jax.tree.map(moved, params), jax.tree.map(moved, extras)))
    return net, states


@functools.cache
def gradients(name: str) -> list[np.ndarray]:
    net, states = made(name)
    return [reference.gradients(net, s, batch()) for s in states]


@functools.cache
def influence(name: str) -> np.ndarray:
    return np.asarray(tracin(*made(name), RATES, DATA, batch(), batch_size=4))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_pair_is_its_definition(name: str) -> None:
    wanted = sum(eta * g @ g.T for eta, g in zip(RATES, gradients(name), strict=True))
    assert influence(name).shape == (N, N)
    np.testing.assert_allclose(influence(name), wanted, rtol=1e-5, atol=1e-6 * wanted.max())


@pytest.mark.parametrize("name", CONFIGS)
def test_an_examples_influence_on_itself(name: str) -> None:
    """E9: sum_i eta_i GraNd_i^2, which is the diagonal of the pairs."""
    net, states = made(name)
    lengths = np.stack([np.asarray(over_examples(grand, net, s, DATA)) for s in states])
    found = tracin_self(lengths, RATES)
    assert found.shape == (N,) and found.dtype == np.float64
    wanted = sum(eta * (g**2).sum(axis=1) for eta, g in zip(RATES, gradients(name), strict=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(np.diagonal(influence(name)), found, rtol=1e-5)


def test_of_a_linear_model() -> None:
    """<p - y, p' - y'> (<x, x'> + 1), summed over checkpoints."""
    net, states = made("linear")
    x = np.asarray(batch().x, np.float64).reshape(N, -1)
    wanted = np.zeros((N, N))
    for eta, state in zip(RATES, states, strict=True):
        z = np.asarray(net.evaluate(state.params, {}, batch(), {}).logits)
        p = np.array([by_hand.softmax([float(v) for v in row]) for row in z])
        error = p - np.eye(K)[np.asarray(DATA.y)]
        wanted += eta * (error @ error.T) * (x @ x.T + 1)
    np.testing.assert_allclose(influence("linear"), wanted, rtol=1e-5, atol=1e-6 * wanted.max())


def test_it_is_what_a_step_does_to_a_loss() -> None:
    """To first order: loss(z') before minus after a step of ``eta`` on z."""
    net, states = made("mlp")
    eta = 1e-3
    found = tracin(net, states[:1], [eta], DATA, batch(rows=[5, 6]))
    loss = lambda p, rows: net.evaluate(p, {}, batch(rows=rows), {}).loss  # noqa: E731
    before, after = loss(states[0].params, [5, 6]), []
    for z in range(N):
        g = jax.grad(lambda p: loss(p, [z])[0])(states[0].params)  # noqa: B023
        after.append(loss(jax.tree.map(lambda w, d: w - eta * d, states[0].params, g), [5, 6]))
    change = np.asarray(before)[None] - np.stack(after)
    np.testing.assert_allclose(found, change, rtol=0.05, atol=0.02 * np.abs(change).max())


def test_other_examples_other_batches_and_some_parameters() -> None:
    net, states = made("mlp")
    rows = [7, 2, 2]
    others = tracin(net, states, RATES, DATA, batch(rows=rows), batch_size=2)
    np.testing.assert_allclose(others, influence("mlp")[:, rows], rtol=1e-5, atol=1e-7)
    parts = [
        np.asarray(tracin(net, states, RATES, DATA, batch(rows=rows), only=only))
        for only in ("head", "dense_0")
    ]
    np.testing.assert_allclose(sum(parts), others, rtol=1e-5, atol=1e-6)
    assert np.abs(parts[0]).max() > 0 and np.abs(parts[1]).max() > 0


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_refusals(unchecked: Any) -> None:
    net, states = made("mlp")
    with pytest.raises(ValueError, match="a learning rate for each checkpoint: 3 for 2"):
        tracin_self(np.ones((2, N)), [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="give a learning rate for each state: 1 for 2"):
        tracin(net, states, [0.1], DATA, batch())
    with pytest.raises(ValueError, match="give a learning rate for each state: 0 for 0"):
        tracin(net, [], [], DATA, batch())
    with pytest.raises(ValueError, match="no parameter has 'tail' in its path"):
        tracin(net, states, RATES, DATA, batch(), only="tail")


def test_many_checkpoints_and_replicas_of_grand() -> None:
    """[c, ...] of any shape; sums in float64."""
    lengths = GENERATOR.random((50, 2, N)).astype(np.float32)
    rates = GENERATOR.random(50)
    wanted = [
        [math.fsum(r * float(g) ** 2 for r, g in zip(rates, lengths[:, k, i], strict=True))
         for i in range(N)]
        for k in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(tracin_self(lengths, list(rates)), wanted, rtol=1e-12)
