"""Lanczos and probes driven from the host: the same numbers, nothing in a loop, one compilation."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import curvature as ref

from dynamics import curvature, population
from dynamics.curvature import drive
from dynamics.curvature.operator import Operator

VALUES = np.float32([10, 9.5, 9, *np.linspace(-4, 3, 97)])


def diagonal(values: Any) -> Operator:
    return Operator(jnp.multiply, jnp.asarray(values), jnp.asarray(values))


def test_it_goes_on_until_the_residual_is_small() -> None:
    for tolerance in (1e-1, 1e-3, 1e-5):
        found = curvature.converge(diagonal(VALUES), jax.random.key(0), tolerance=tolerance)
        assert float(found.residuals[0]) <= tolerance * float(found.values[0])
        assert abs(float(found.values[0]) - 10) <= tolerance * 10 + 1e-5
    several = curvature.converge(diagonal(VALUES), jax.random.key(1), num=3)
    np.testing.assert_allclose(several.values, [10, 9.5, 9], rtol=1e-5)
    assert several.vectors.shape == (3, 100)
    least = curvature.converge(diagonal(VALUES), jax.random.key(1), smallest=True)
    np.testing.assert_allclose(least.values, -4, rtol=1e-3)


def test_it_does_not_stop_when_the_value_stops_changing() -> None:
    """Two eigenvalues 0.1% apart: a value at rest is not one that has arrived."""
    values = np.float32([10, 9.99, *np.linspace(0, 9, 198)])
    op = diagonal(values)
    start = jnp.ones(200).at[0].set(1e-3)
    state = curvature.begin(op, start, 40)
    step, seen = jax.jit(curvature.extend), []
    for _ in range(40):
        state = step(op, state)
        seen.append(float(curvature.ritz(state).values[0]))
    at_rest = next(i for i in range(1, 40) if abs(seen[i] / seen[i - 1] - 1) < 1e-3)
    found = curvature.converge(op, jax.random.key(0), tolerance=1e-4)
    assert 10 - seen[at_rest] > 5e-3  # what the other rule reports
    np.testing.assert_allclose(found.values[0], 10, rtol=1e-4)
    assert float(found.residuals[0]) <= 1e-3


def test_what_did_not_converge_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = curvature.converge(diagonal(VALUES), jax.random.key(0), most=3)
    assert "above 0.001 of its value after 3 products" in caplog.text
    assert float(found.residuals[0]) > 1e-3 * float(found.values[0])


def test_from_a_warm_start_it_is_short_and_not_fooled() -> None:
    calls = []

    def apply(data: jax.Array, v: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return data * v

    op = Operator(apply, jnp.asarray(VALUES), jnp.asarray(VALUES))
    old = jnp.zeros(100).at[0].set(1.0)
    counts = []
    for warm in (None, old):
        calls.clear()
        found = curvature.converge(op, jax.random.key(0), warm=warm)
        jax.effects_barrier()
        counts.append(len(calls))
        np.testing.assert_allclose(found.values, 10, rtol=1e-3)
    assert counts[1] < counts[0] / 1.5
    crossed = np.float32([9.5, 10, 9, *VALUES[3:]])
    found = curvature.converge(diagonal(crossed), jax.random.key(0), warm=old, tolerance=1e-4)
    np.testing.assert_allclose(found.values, 10, rtol=1e-4)


def test_breakdowns_end_it() -> None:
    for values in (np.full(9, 3.0), np.array([3.0] + [0.0] * 8), np.zeros(9)):
        op = diagonal(np.float32(values))
        found = curvature.converge(op, jax.random.key(0), num=2)
        expected = np.sort(values)[::-1][:2]
        np.testing.assert_allclose(found.values, expected, atol=1e-5)


def test_driven_from_outside_it_is_the_same() -> None:
    op, key = diagonal(VALUES), jax.random.key(3)
    start = curvature.random(op, key)
    inside = jax.jit(curvature.lanczos, static_argnums=2)(op, start, 8)
    outside = drive.lanczos(op, start, 8)
    np.testing.assert_allclose(outside.alpha, inside.alpha, rtol=1e-5)
    np.testing.assert_allclose(outside.basis, inside.basis, atol=1e-5)
    expected = curvature.trace(op, key, 6)
    np.testing.assert_allclose(drive.mean(curvature.trace_probe, op, key, 6), expected, rtol=1e-5)
    found = drive.density(op, key, num=5, k=12)
    moment = curvature.functional(found, lambda t: t)
    np.testing.assert_allclose(moment.value, VALUES.sum(), rtol=1e-4)  # exact for signs
    with pytest.raises(ValueError, match="num must be at least 2"):
        drive.mean(curvature.trace_probe, op, key, 1)


def test_a_convolution_is_in_no_loop() -> None:
    """The step that is driven, and what is written out, have none around a convolution."""
    draw = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(draw.normal(size=(3, 3, 1, 2)), jnp.float32),
        "head": jnp.asarray(draw.normal(size=(2, 3)), jnp.float32),
    }
    batch = (draw.normal(size=(8, 6, 6, 1)).astype(np.float32), draw.integers(0, 3, 8))

    def loss(params: Any, batch: Any) -> jax.Array:
        h = jax.lax.conv_general_dilated(
            batch[0], params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return ref.cross_entropy(jnp.tanh(h).mean(axis=(1, 2)) @ params["head"], batch)

    op = curvature.hessian(loss, params, curvature.cut(batch, 4), unroll=True)
    rolled = curvature.hessian(loss, params, curvature.cut(batch, 4))
    state, key = curvature.begin(op, params, 4), jax.random.key(0)
    clean = {
        "extend": lambda: curvature.extend(op, state),
        "sharpness": lambda: curvature.sharpness(op, key, k=2, unroll=True),
        "trace": lambda: curvature.trace(op, key, 2, unroll=True),
        "xtrace": lambda: curvature.xtrace(op, key, 4, unroll=True),
        "density": lambda: curvature.density(op, key, num=2, k=2, unroll=True),
    }
    for name, fn in clean.items():
        assert not looped(jax.make_jaxpr(fn)()), name
    assert looped(jax.make_jaxpr(lambda: curvature.sharpness(op, key, k=2))())
    assert looped(jax.make_jaxpr(lambda: curvature.extend(rolled, state))())
    found = curvature.converge(op, key, tolerance=1e-4)
    alone = jax.jit(curvature.sharpness, static_argnames="k")(rolled, key, k=30)
    np.testing.assert_allclose(found.values[0], alone.value, rtol=1e-3)


def looped(jaxpr: Any) -> bool:
    """Whether a convolution sits inside a scan or a while."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in inner.eqns:
        subs = list(jax.extend.core.jaxprs_in_params(eqn.params))
        if eqn.primitive.name in ("scan", "while"):
            if any(population.has_convolution(sub) for sub in subs):
                return True
        elif any(looped(sub) for sub in subs):
            return True
    return False


def test_new_parameters_compile_nothing() -> None:
    traces = []

    def loss(params: Any, batch: Any) -> jax.Array:
        traces.append(1)
        return ref.ce(params, batch)

    params = jax.tree.map(lambda x: x.astype(np.float32), ref.init(0, (8, 5, 3)))
    draw = np.random.default_rng(0)
    batch = (draw.normal(size=(6, 8)).astype(np.float32), draw.integers(0, 3, 6))
    counts = []
    for scale in (1.0, 1.5, 2.0):
        here = jax.tree.map(lambda x, s=scale: s * x, params)
        op = curvature.hessian(loss, here, curvature.cut(batch))
        before = len(traces)
        curvature.converge(op, jax.random.key(0), most=20)
        counts.append(len(traces) - before)
    assert counts[0] > 0 and counts[1:] == [0, 0]


def test_bad_input_is_refused() -> None:
    op, key = diagonal(VALUES), jax.random.key(0)
    with pytest.raises(ValueError, match="num must be in 1..60, the most products, got 0"):
        curvature.converge(op, key, num=0)
    with pytest.raises(ValueError, match="tolerance must be > 0, got 0"):
        curvature.converge(op, key, tolerance=0.0)
