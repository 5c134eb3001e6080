"""The spectrum while training: against dense Hessians, and the same by either loop."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from dynamics import curvature, mesh, population, watch
from dynamics.probes import Spectrum
from dynamics.types import Results, TrainState


def dense(p: tiny.Problem, state: TrainState) -> np.ndarray:
    """The Hessian of the mean loss of the data, of one replica."""
    batch = jax.tree.map(lambda x: x[0], curvature.cut_dataset(p.data))
    flat, back = ravel_pytree(state.params)

    def loss(flat: jax.Array) -> jax.Array:
        return p.task.evaluate(back(flat), state.extras, batch, state.hyperparameters).loss.mean()

    return np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)


def nodes_of(results: Results, step: int, name: str) -> np.ndarray:
    return results.arrays["spectrum", name].at(step=step).values


def test_moments_are_those_of_the_dense_hessian() -> None:
    p = tiny.problem("mlp", num_steps=4)
    probes = [
        Spectrum((4,), k=12, num=64, batch_size=8),
        Spectrum((4,), k=1, num=64, name="trace"),
    ]
    found = tiny.run(p, mesh.make(), 2, probes=probes)
    nodes, weights = (nodes_of(found, 4, name) for name in ("nodes", "weights"))
    assert found.arrays["spectrum", "nodes"].dims == ("step", "member", "vector", "node")
    assert nodes.shape == weights.shape == (2, 64, 12)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    for k in range(2):
        hessian = dense(p, population.take(found.state, k))
        one, trace = (found.measured[name].row(k, named=True) for name in ("spectrum", "trace"))
        assert (one["step"], one["member"]) == (trace["step"], trace["member"]) == (4, k)
        square = hessian @ hessian
        offset = 4 * one["trace_error"]
        assert abs(one["trace"] - np.trace(hessian)) < offset < 0.5 * np.trace(hessian)
        assert abs(one["frobenius"] - np.trace(square)) < 4 * one["frobenius_error"]
        # one probe's variance with signs is 2 (|H|_F^2 - sum H_ii^2)
        expected = np.sqrt(2 * (np.trace(square) - (np.diag(hessian) ** 2).sum()) / 64)
        assert 0.6 < one["trace_error"] / expected < 1.5
        values = np.linalg.eigvalsh(hessian)
        assert values[0] - 1e-4 <= nodes[k].min() and nodes[k].max() <= values[-1] * (1 + 1e-4)
        assert nodes[k].max() > 0.99 * values[-1]
        # the same vectors, and one step of Lanczos is Hutchinson's product
        np.testing.assert_allclose(trace["trace"], one["trace"], rtol=1e-3)
        assert "frobenius" not in trace and trace["trace_error"] > 0


def test_watching_changes_no_bit() -> None:
    p = tiny.problem("mlp", num_steps=2)
    watched = tiny.run(p, mesh.make(), 2, probes=[Spectrum(1, k=4, num=2)])
    for a, b in zip(tiny.leaves(watched), tiny.leaves(tiny.run(p, mesh.make(), 2)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_driven_from_outside_it_is_the_same() -> None:
    """What convolutions on a CPU need gives the same nodes."""
    p = tiny.problem("mlp", num_steps=1)
    probe, state = Spectrum((1,), k=4, num=2), tiny.start(p, mesh.make(), 2)
    context = watch.context(p.task, mesh.make(), {"train": p.data})
    _, inside = probe.measure(context, probe.start(context, state), state)
    context.convolves = True
    _, outside = probe.measure(context, probe.start(context, state), state)
    assert inside.keys() == outside.keys() >= {"nodes", "weights", "trace", "frobenius"}
    for name, value in inside.items():
        np.testing.assert_allclose(value, outside[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_refusals() -> None:
    p = tiny.problem("mlp")
    probe = Spectrum(5)
    with pytest.raises(ValueError, match="spectrum.num must be at least 2, one has no error"):
        tiny.run(p, mesh.make(), 1, probes=[dataclasses.replace(probe, num=1)])
    with pytest.raises(ValueError, match="spectrum.k must be at least 1, got 0"):
        tiny.run(p, mesh.make(), 1, probes=[dataclasses.replace(probe, k=0)])
