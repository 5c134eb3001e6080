"""Probes of curvature: against dense Hessians, thresholds, and in nets of every kind."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from dynamics import curvature, mesh, optim, population, watch
from dynamics.data.stream import resident
from dynamics.optim.adam import moments
from dynamics.probes import BatchSharpness, Sharpness
from dynamics.types import Results, TrainState


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


def measured(results: Results, step: int, member: int, probe: str = "sharpness") -> dict[str, Any]:
    """The one row that a probe has of a member at a step."""
    rows = results.measured[probe]
    (row,) = rows.filter((rows["step"] == step) & (rows["member"] == member)).rows(named=True)
    return row


@pytest.mark.parametrize(("kind", "size"), [("mlp", None), ("mlp", 16), ("convnet", None)])
def test_both_ends_are_those_of_the_dense_hessian(kind: str, size: int | None) -> None:
    """Also in microbatches, 16, 16 and 8 of the 40 examples."""
    p = tiny.problem(kind, num_steps=6)
    probe = Sharpness((0, 6), rule=p.rule, num_steps=6, cold=24, warm=20, batch_size=size)
    found = tiny.run(p, mesh.make(), 2, probes=[probe])
    start = tiny.start(p, mesh.make(), 2)
    for step, state in ((0, start), (6, found.state)):
        for k in range(2):
            here = measured(found, step, k)
            values = dense(p, population.take(state, k))
            assert abs(here["value"] - values[-1]) < 2e-3 * values[-1]
            assert abs(here["smallest"] - values[0]) < 2e-2 * values[-1]
            expected = (2 + 2 * 0.9) / ((1 + 2 * 0.9) * 0.02) - 1e-3  # Nesterov, L2
            np.testing.assert_allclose(here["value"] / here["ratio"], expected, rtol=1e-5)


def test_of_adam_it_is_preconditioned() -> None:
    p = tiny.problem("mlp", num_steps=8, rule=optim.Adam, learning_rate=1e-2, weight_decay=0.0)
    probe = Sharpness((0, 8), rule=p.rule, num_steps=8, cold=40, warm=40)
    found = tiny.run(p, mesh.make(), 1, probes=[probe])
    state = population.take(found.state, 0)
    values = dense(p, state, p.rule.preconditioner(state.opt_state, state.hyperparameters))
    last = measured(found, 8, 0)
    np.testing.assert_allclose(last["value"], values[-1], rtol=2e-3)
    np.testing.assert_allclose(last["ratio"], values[-1] / (3.8 / 0.1 / 1e-2), rtol=2e-3)
    assert found.measured["sharpness"]["step"].to_list() == [8]  # no moments before the first step
    assert int(moments(state.opt_state).count) == 8


def test_watching_changes_no_bit_and_a_cut_run_is_the_same(tmp_path: Any) -> None:
    from dynamics.record import Recorder

    p = tiny.problem("mlp", num_steps=12)
    probe = Sharpness(4, rule=p.rule, num_steps=12)
    plain, watched = tiny.run(p, mesh.make(), 2), tiny.run(p, mesh.make(), 2, probes=[probe])
    for a, b in zip(tiny.leaves(plain), tiny.leaves(watched), strict=True):
        np.testing.assert_array_equal(a, b)
    store = Recorder(tmp_path / "cut", ())
    tiny.run(p._replace(num_steps=8), mesh.make(), 2, probes=[probe], store=store)
    tiny.assert_equal(watched, tiny.run(p, mesh.make(), 2, probes=[probe], store=store))


def test_it_needs_the_moments_of_adam() -> None:
    p = tiny.problem("mlp")
    probe = Sharpness(5, rule=optim.Adam(), num_steps=20)
    with pytest.raises(ValueError, match="the optimizer must have one Adam, got 0"):
        tiny.run(p, mesh.make(), 1, probes=[probe])
    probe = Sharpness(5, rule=optim.SGD(base_fan_in=8), num_steps=20)
    context = watch.context(p.task, mesh.make(), {"train": p.data})
    with pytest.raises(ValueError, match="base_fan_in must be 0 for a threshold, got 8"):
        probe.start(context, tiny.start(p, mesh.make(), 1))


def test_batch_sharpness_of_all_examples_is_along_the_gradient() -> None:
    """One batch of everything: all three are g'Hg / |g|^2, and minibatches are not."""
    p = tiny.problem("mlp", num_steps=3)
    probes = [
        BatchSharpness((3,), len(p.data), num_batches=2),
        BatchSharpness((3,), 4, num_batches=64, name="small"),
        Sharpness((3,), cold=24),
    ]
    found = tiny.run(p, mesh.make(), 1, probes=probes)
    state = population.take(found.state, 0)
    operator = curvature.of_task(p.task, state, curvature.cut_dataset(p.data))
    loss = curvature.mean_loss(p.task)
    batch = jax.tree.map(lambda x: x[0], curvature.cut_dataset(p.data))
    g = jax.grad(loss)(state.params, batch, state.extras, state.hyperparameters)
    flat, image = ravel_pytree(g)[0], ravel_pytree(operator(g))[0]
    expected = float(flat @ image / (flat @ flat))
    whole, small = measured(found, 3, 0, "batch"), measured(found, 3, 0, "small")
    for name in ("value", "interaction", "noise"):
        np.testing.assert_allclose(whole[name], expected, rtol=1e-3)
    assert small["noise"] > 1.2 * small["interaction"]  # |grad L|^2 < E|g|^2
    assert small["error"] > 0
    with pytest.raises(ValueError, match="batch_size must be from 1 to 40, got 41"):
        tiny.run(p, mesh.make(), 1, probes=[dataclasses.replace(probes[0], batch_size=41)])


def test_own_rates_have_their_own_thresholds() -> None:
    p = tiny.problem("mlp", num_steps=2, momentum=0.0, nesterov=False, weight_decay=0.0)
    probe = Sharpness((2,), rule=p.rule, num_steps=2)
    changed = {"learning_rate": [0.01, 0.1]}
    found = tiny.run(
        p, mesh.make(), 2, probes=[probe], changed=changed, stream=resident(p.data, 8, 2)
    )
    rows = found.measured["sharpness"]
    assert rows["step"].to_list() == [2, 2]
    np.testing.assert_allclose(rows["value"] / rows["ratio"], [200, 20], rtol=1e-5)


def test_its_threshold_is_that_of_the_schedule() -> None:
    schedule = optim.Steps(milestones=(0.5,), decay=0.1)
    p = tiny.problem("mlp", num_steps=4, momentum=0.0, nesterov=False, weight_decay=0.0)
    rule = dataclasses.replace(p.rule, schedule=schedule)
    p = p._replace(rule=rule, optimizer=rule.make(4))
    probe = Sharpness(1, rule=rule, num_steps=4)
    found = tiny.run(p, mesh.make(), 1, probes=[probe])
    rows = found.measured["sharpness"]
    assert rows["step"].to_list() == [0, 1, 2, 3, 4]
    threshold = rows["value"] / rows["ratio"]
    np.testing.assert_allclose(threshold, [100, 100, 1000, 1000, 1000], rtol=1e-5)
    assert rows["residual"].is_finite().all()
