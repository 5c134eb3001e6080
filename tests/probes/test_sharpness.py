"""Probes of curvature: against dense Hessians, thresholds, and in nets of every kind."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from dynamics import curvature, mesh, optim
from dynamics.data.stream import resident
from dynamics.probes import BatchSharpness, Sharpness
from dynamics.probes.sharpness import adam, preconditioner
from dynamics.types import TrainState


def dense(p: tiny.Problem, state: TrainState, weights: Any = None) -> np.ndarray:
    """Eigenvalues of the Hessian of the mean loss of the data, of one replica."""
    batch = jax.tree.map(lambda x: x[0], curvature.cut_dataset(p.data))
    flat, back = ravel_pytree(state.params)

    def loss(flat: jax.Array) -> jax.Array:
        return p.task.evaluate(back(flat), state.extras, batch, state.hyperparameters).loss.mean()

    hessian = np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)
    if weights is not None:
        scale = 1 / np.sqrt(np.asarray(ravel_pytree(weights)[0], np.float64))
        hessian = scale[:, None] * hessian * scale[None]
    return np.linalg.eigvalsh(hessian)


def one(state: TrainState, k: int) -> TrainState:
    return jax.tree.map(lambda x: x[k], state)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_both_ends_are_those_of_the_dense_hessian(kind: str) -> None:
    p = tiny.problem(kind, num_steps=6)
    probe = Sharpness(p.task, p.data, (0, 6), p.train, 6, cold=24, warm=20)
    found = tiny.run(p, mesh.make(), 2, probes=[probe])
    start = tiny.start(p, mesh.make(), 2)
    for step, state in ((0, start), (6, found.state)):
        rows = found.rows["step"] == step
        rows &= ~np.isnan(found.rows["sharpness.value"])
        for k in range(2):
            here = rows & (found.rows["replica"] == k)
            values = dense(p, one(state, k))
            assert abs(found.rows["sharpness.value"][here][0] - values[-1]) < 2e-3 * values[-1]
            assert abs(found.rows["sharpness.smallest"][here][0] - values[0]) < 2e-2 * values[-1]
            ratio = found.rows["sharpness.value"][here] / found.rows["sharpness.ratio"][here]
            expected = (2 + 2 * 0.9) / ((1 + 2 * 0.9) * 0.02) - 1e-3  # Nesterov, L2
            np.testing.assert_allclose(ratio, expected, rtol=1e-5)


def test_of_adam_it_is_preconditioned() -> None:
    p = tiny.problem("mlp", num_steps=8, rule="adam", learning_rate=1e-2, weight_decay=0.0)
    probe = Sharpness(p.task, p.data, (0, 8), p.train, 8, preconditioned=True, cold=40, warm=40)
    found = tiny.run(p, mesh.make(), 1, probes=[probe])
    state = one(found.state, 0)
    values = dense(p, state, preconditioner(state))
    rows = found.rows["step"] == 8
    np.testing.assert_allclose(found.rows["sharpness.value"][rows][-1], values[-1], rtol=2e-3)
    np.testing.assert_allclose(
        found.rows["sharpness.ratio"][rows][-1], values[-1] / (3.8 / 0.1 / 1e-2), rtol=2e-3
    )
    first = found.rows["step"] == 0
    assert np.isnan(found.rows["sharpness.value"][first]).all()  # no moments yet
    moments = adam(state.opt_state)
    assert moments is not None and int(moments.count) == 8


def test_watching_changes_no_bit_and_a_cut_run_is_the_same(tmp_path: Any) -> None:
    from dynamics.record import Recorder

    p = tiny.problem("mlp", num_steps=12)
    probe = Sharpness(p.task, p.data, 4, p.train, 12)
    plain, watched = tiny.run(p, mesh.make(), 2), tiny.run(p, mesh.make(), 2, probes=[probe])
    for a, b in zip(tiny.leaves(plain), tiny.leaves(watched), strict=True):
        np.testing.assert_array_equal(a, b)
    store = Recorder(tmp_path / "cut", ())
    tiny.run(p._replace(num_steps=8), mesh.make(), 2, probes=[probe], store=store)
    tiny.assert_equal(watched, tiny.run(p, mesh.make(), 2, probes=[probe], store=store))


def test_it_needs_the_moments_of_adam() -> None:
    p = tiny.problem("mlp")
    probe = Sharpness(p.task, p.data, 5, preconditioned=True)
    with pytest.raises(ValueError, match="the optimizer has no moments of Adam"):
        tiny.run(p, mesh.make(), 1, probes=[probe])


def test_batch_sharpness_of_all_examples_is_along_the_gradient() -> None:
    """One batch of everything: all three are g'Hg / |g|^2, and minibatches are not."""
    p = tiny.problem("mlp", num_steps=3)
    probes = [
        BatchSharpness(p.task, p.data, len(p.data), (3,), num_batches=2),
        BatchSharpness(p.task, p.data, 4, (3,), num_batches=64, name="small"),
        Sharpness(p.task, p.data, (3,), cold=24),
    ]
    found = tiny.run(p, mesh.make(), 1, probes=probes)
    state = one(found.state, 0)
    operator = curvature.of_task(p.task, state, curvature.cut_dataset(p.data))
    loss = curvature.mean_loss(p.task)
    batch = jax.tree.map(lambda x: x[0], curvature.cut_dataset(p.data))
    g = jax.grad(loss)(state.params, batch, state.extras, state.hyperparameters)
    flat, image = ravel_pytree(g)[0], ravel_pytree(operator(g))[0]
    expected = float(flat @ image / (flat @ flat))
    row = {name: values[-1] for name, values in found.rows.items()}
    for name in ("value", "interaction", "noise"):
        np.testing.assert_allclose(row[f"batch.{name}"], expected, rtol=1e-3)
    assert row["small.noise"] > 1.2 * row["small.interaction"]  # |grad L|^2 < E|g|^2
    assert row["small.error"] > 0
    with pytest.raises(ValueError, match="batch_size must be from 1 to 40, got 41"):
        tiny.run(p, mesh.make(), 1, probes=[dataclasses.replace(probes[0], batch_size=41)])


def test_own_rates_have_their_own_thresholds() -> None:
    p = tiny.problem("mlp", num_steps=2, momentum=0.0, nesterov=False, weight_decay=0.0)
    probe = Sharpness(p.task, p.data, (2,), p.train, 2)
    changed = {"learning_rate": [0.01, 0.1]}
    found = tiny.run(
        p, mesh.make(), 2, probes=[probe], changed=changed, stream=resident(p.data, 8, 2)
    )
    rows = found.rows["step"] == 2
    threshold = found.rows["sharpness.value"][rows] / found.rows["sharpness.ratio"][rows]
    np.testing.assert_allclose(threshold, [200, 20], rtol=1e-5)


def test_its_threshold_is_that_of_the_schedule() -> None:
    schedule = optim.Steps(milestones=(0.5,), decay=0.1)
    p = tiny.problem("mlp", num_steps=4, momentum=0.0, nesterov=False, weight_decay=0.0)
    train = dataclasses.replace(p.train, schedule=schedule)
    p = p._replace(train=train, optimizer=optim.make(train, 4))
    probe = Sharpness(p.task, p.data, 1, train, 4)
    found = tiny.run(p, mesh.make(), 1, probes=[probe])
    there = ~np.isnan(found.rows["sharpness.ratio"])
    threshold = found.rows["sharpness.value"][there] / found.rows["sharpness.ratio"][there]
    np.testing.assert_allclose(threshold, [100, 100, 1000, 1000, 1000], rtol=1e-5)
    assert jnp.isfinite(found.rows["sharpness.residual"][there]).all()
