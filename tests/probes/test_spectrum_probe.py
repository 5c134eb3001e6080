"""The spectrum while training: against dense Hessians, and the same by either loop."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from jax.flatten_util import ravel_pytree

from dynamics import curvature, mesh
from dynamics.probes import Spectrum, spectrum
from dynamics.types import TrainState


def dense(p: tiny.Problem, state: TrainState) -> np.ndarray:
    """The Hessian of the mean loss of the data, of one replica."""
    batch = jax.tree.map(lambda x: x[0], curvature.cut_dataset(p.data))
    flat, back = ravel_pytree(state.params)

    def loss(flat: jax.Array) -> jax.Array:
        return p.task.evaluate(back(flat), state.extras, batch, state.hyperparameters).loss.mean()

    return np.asarray(jax.jit(jax.hessian(loss))(flat), np.float64)


def test_moments_are_those_of_the_dense_hessian() -> None:
    p = tiny.problem("mlp", num_steps=4)
    probes = [
        Spectrum(p.task, p.data, (4,), k=12, num=64, batch_size=8),
        Spectrum(p.task, p.data, (4,), k=1, num=64, name="trace"),
    ]
    found = tiny.run(p, mesh.make(), 2, probes=probes)
    rows = {name: values[found.rows["step"] == 4] for name, values in found.rows.items()}
    nodes, weights = (found.arrays[f"spectrum.{n}@4"] for n in ("nodes", "weights"))
    assert nodes.shape == weights.shape == (2, 64, 12)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    for k in range(2):
        hessian = dense(p, jax.tree.map(lambda x: x[k], found.state))  # noqa: B023
        at = np.flatnonzero((rows["replica"] == k) & ~np.isnan(rows["spectrum.trace"]))[0]
        one = {name: values[at] for name, values in rows.items()}
        square = hessian @ hessian
        offset = 4 * one["spectrum.trace_error"]
        assert abs(one["spectrum.trace"] - np.trace(hessian)) < offset < 0.5 * np.trace(hessian)
        assert (
            abs(one["spectrum.frobenius"] - np.trace(square)) < 4 * one["spectrum.frobenius_error"]
        )
        # one probe's variance with signs is 2 (|H|_F^2 - sum H_ii^2)
        expected = np.sqrt(2 * (np.trace(square) - (np.diag(hessian) ** 2).sum()) / 64)
        assert 0.6 < one["spectrum.trace_error"] / expected < 1.5
        values = np.linalg.eigvalsh(hessian)
        assert values[0] - 1e-4 <= nodes[k].min() and nodes[k].max() <= values[-1] * (1 + 1e-4)
        assert nodes[k].max() > 0.99 * values[-1]
        # the same vectors, and one step of Lanczos is Hutchinson's product
        np.testing.assert_allclose(one["trace.trace"], one["spectrum.trace"], rtol=1e-3)
        assert np.isnan(one["trace.frobenius"]) and one["trace.trace_error"] > 0


def test_driven_from_outside_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What convolutions on a CPU need gives the same nodes."""
    p = tiny.problem("mlp", num_steps=1)
    probe = Spectrum(p.task, p.data, (1,), k=4, num=2)
    inside = tiny.run(p, mesh.make(), 2, probes=[probe])
    monkeypatch.setattr(spectrum, "convolves", lambda *_: True)
    outside = tiny.run(p, mesh.make(), 2, probes=[probe])
    for name in ("nodes", "weights"):
        a, b = (run.arrays[f"spectrum.{name}@1"] for run in (inside, outside))
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(inside.state.params), jax.tree.leaves(outside.state.params), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_refusals() -> None:
    p = tiny.problem("mlp")
    probe = Spectrum(p.task, p.data, 5)
    with pytest.raises(ValueError, match="spectrum.num must be at least 2, one has no error"):
        tiny.run(p, mesh.make(), 1, probes=[dataclasses.replace(probe, num=1)])
    with pytest.raises(ValueError, match="spectrum.k must be at least 1, got 0"):
        tiny.run(p, mesh.make(), 1, probes=[dataclasses.replace(probe, k=0)])
