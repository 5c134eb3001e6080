"""Spectral densities: exact moments, known spectra, smoothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import curvature as ref

from dynamics import curvature
from dynamics.curvature.operator import Operator


def of_matrix(a: Any) -> Operator:
    a = jnp.asarray(a)
    return Operator(jnp.matmul, a, jnp.zeros(len(a), a.dtype))


density = jax.jit(
    curvature.density,
    static_argnames=("num", "k", "draw", "probe_batch", "reorthogonalise", "unroll"),
)


@pytest.mark.parametrize("k", [3, 5, 8])
def test_a_rule_is_exact_to_its_degree_and_no_further(k: int) -> None:
    """Check 2: v' A^m v / ||v||^2 for m <= 2 k - 1, to 1e-10 in float64; m = 2 k is off."""
    a = ref.symmetric(50) / 10
    with jax.enable_x64(True):
        op = of_matrix(a)
        v = np.random.default_rng(k).normal(size=50)
        state = curvature.lanczos(op, jnp.asarray(v), k, reorthogonalise=False)
        nodes, weights = (np.asarray(x) for x in curvature.quadrature(state))
    exact, power = [], v
    for _ in range(2 * k + 1):
        exact.append(v @ power / (v @ v))
        power = a @ power
    found = [np.sum(weights * nodes**m) for m in range(2 * k + 1)]
    np.testing.assert_allclose(found[: 2 * k], exact[: 2 * k], rtol=1e-10, atol=1e-10)
    assert abs(found[2 * k] / exact[2 * k] - 1) > 1e-4


def test_moments_of_a_network_within_their_errors() -> None:
    a = ref.dense("ce", 3000)
    found = density(of_matrix(np.float32(a)), jax.random.key(0), num=16, k=30)
    assert found.nodes.shape == found.weights.shape == (16, 30) and float(found.size) == len(a)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1, rtol=1e-5)
    for m in (1, 2, 3):
        value, error = curvature.functional(found, lambda t, m=m: t**m)
        assert abs(float(value) - np.trace(np.linalg.matrix_power(a, m))) < 4 * float(error)
    low, high = curvature.edges(found)
    truth = np.linalg.eigvalsh(a)
    np.testing.assert_allclose([low, high], truth[[0, -1]], atol=2e-3 * truth[-1])


def test_without_reorthogonalising_moments_are_the_same() -> None:
    op = of_matrix(np.float32(ref.dense("ce", 3000)))
    key = jax.random.key(1)
    bare, whole = (density(op, key, num=3, k=60, reorthogonalise=r) for r in (False, True))
    for m in (1, 2):
        a, b = (curvature.functional(d, lambda t, m=m: t**m).value for d in (bare, whole))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    copies = [np.sum(np.asarray(d.nodes[0]) > 0.999 * float(d.nodes.max())) for d in (bare, whole)]
    assert copies[0] > 1 and copies[1] == 1


def test_a_semicircle() -> None:
    """A large random symmetric matrix has the density sqrt(4 - t^2) / 2 pi."""
    n = 400
    draw = np.random.default_rng(0).normal(size=(n, n))
    a = (draw + draw.T) / np.sqrt(2 * n)
    found = density(of_matrix(np.float32(a)), jax.random.key(0), num=6, k=40)
    at = jnp.linspace(-1.8, 1.8, 61)
    smooth = np.asarray(curvature.smooth(found, at, width=0.06))
    np.testing.assert_allclose(smooth, np.sqrt(4 - np.asarray(at) ** 2) / (2 * np.pi), atol=0.03)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_smoothing_is_relative_and_has_mass_one(scale: float) -> None:
    op = of_matrix(np.float32(scale * ref.symmetric(60)))
    found = density(op, jax.random.key(0), num=4, k=20)
    at = curvature.grid(found, 2000, margin=0.2)
    values = curvature.smooth(found, at)
    np.testing.assert_allclose(jnp.sum(values) * (at[1] - at[0]), 1, rtol=1e-3)
    one = density(of_matrix(np.float32(ref.symmetric(60))), jax.random.key(0), num=4, k=20)
    same = curvature.smooth(one, curvature.grid(one, 2000, margin=0.2))
    np.testing.assert_allclose(values * scale, same, rtol=2e-2, atol=1e-3 * float(same.max()))


@pytest.mark.parametrize("reorthogonalise", [False, True])
def test_a_spectrum_of_few_values_is_exact(reorthogonalise: bool) -> None:
    """Lanczos breaks down; what comes after weighs nothing, and nothing is NaN."""
    a = ref.with_eigenvalues(np.array([1.0] * 30 + [4.0] * 10))
    options = {"num": 8, "k": 10, "reorthogonalise": reorthogonalise}
    found = density(of_matrix(np.float32(a)), jax.random.key(0), **options)
    assert np.all(np.isfinite(found.nodes)) and np.all(np.isfinite(found.weights))
    upper = curvature.functional(found, lambda t: (t > 2.5).astype(t.dtype))
    assert abs(float(upper.value) - 10) < 4 * float(upper.error)
    heavy = np.asarray(found.nodes)[np.asarray(found.weights) > 1e-4]
    assert np.all(np.minimum(abs(heavy - 1), abs(heavy - 4)) < 1e-4)


@pytest.mark.parametrize("value", [3.0, -1e-4, 7e8, 0.0])
@pytest.mark.parametrize("reorthogonalise", [False, True])
def test_a_spectrum_of_one_point_has_mass_one(value: float, reorthogonalise: bool) -> None:
    """A multiple of the identity."""
    like = {"a": jnp.zeros((40, 5)), "b": jnp.zeros(100)}
    scaled = curvature.operator(lambda v: jax.tree.map(lambda x: jnp.float32(value) * x, v), like)
    more = {"num": 3, "k": 20, "reorthogonalise": reorthogonalise}
    found = curvature.density(scaled, jax.random.key(0), **more)
    at = np.asarray(curvature.grid(found), np.float64)
    mass = np.trapezoid(np.asarray(curvature.smooth(found, jnp.float32(at)), np.float64), at)
    np.testing.assert_allclose(mass, 1, rtol=2e-3)
    assert at[0] < value < at[-1]
    np.testing.assert_allclose(found.nodes, value, rtol=1e-5, atol=1e-30)


def test_chunks_and_written_out_are_the_same() -> None:
    op = of_matrix(np.float32(ref.symmetric(40)))
    first = density(op, jax.random.key(0), num=4, k=6)
    for options in ({"probe_batch": 2}, {"unroll": True}):
        found = density(op, jax.random.key(0), num=4, k=6, **options)
        np.testing.assert_allclose(found.nodes, first.nodes, rtol=1e-4, atol=1e-4)


def test_bad_input_is_refused() -> None:
    op = of_matrix(np.float32(np.diag([1, 2, 3])))
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        curvature.density(op, jax.random.key(0), num=0)
    found = curvature.density(op, jax.random.key(0), num=2, k=2)
    with pytest.raises(ValueError, match="width must be > 0, relative to the spectrum's, got 0"):
        curvature.smooth(found, jnp.zeros(3), width=0.0)
