"""Traces, norms and diagonals: their means, their variances, their errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import curvature as ref

from dynamics import curvature
from dynamics.curvature.operator import Draw, Operator
from dynamics.curvature.trace import Sample


def of_matrix(a: Any) -> Operator:
    return Operator(jnp.matmul, jnp.asarray(a, jnp.float32), jnp.zeros(len(a)))


def estimator(fn: Any) -> Any:
    return jax.jit(fn, static_argnums=2, static_argnames=("draw", "probe_batch", "unroll"))


trace, diagonal = estimator(curvature.trace), estimator(curvature.diagonal)
frobenius_squared = estimator(curvature.frobenius_squared)
NUM = 2000


def samples(sample: Sample, op: Operator, draw: Draw, num: int = NUM) -> np.ndarray:
    keys = jax.random.split(jax.random.key(5), num)
    run = jax.jit(lambda op, keys: jax.lax.map(lambda key: sample(op, key, draw), keys))  # type: ignore
    return np.asarray(run(op, keys), np.float64)


@pytest.mark.parametrize("draw", ["signs", "normal"])
@pytest.mark.parametrize("steps", [0, 3000])
def test_hutchinsons_mean_and_variance(draw: Draw, steps: int) -> None:
    """Check 6: over 2000 probes of a network's Hessian, against the exact formulas."""
    a = ref.dense("mse", steps)
    each = samples(curvature.trace_probe, of_matrix(a), draw)
    assert abs(each.mean() / np.trace(a) - 1) < 0.05
    assert 0.85 < each.var(ddof=1) / ref.trace_variance(a, draw) < 1.15


def test_the_squared_norm_has_the_variance_of_the_trace_of_the_square() -> None:
    a = ref.dense("mse", 0)
    each = samples(curvature.square_probe, of_matrix(a), "signs")
    assert abs(each.mean() / np.sum(a**2) - 1) < 0.05
    assert 0.85 < each.var(ddof=1) / ref.trace_variance(a @ a, "signs") < 1.15


def test_the_standard_errors_are_those_of_the_samples() -> None:
    """One program over all probes, in chunks or written out: the mean and error of the samples."""
    op, key = of_matrix(ref.symmetric(40)), jax.random.key(3)
    each = np.asarray([curvature.trace_probe(op, k) for k in jax.random.split(key, 12)])
    expected = [each.mean(), each.std(ddof=1) / np.sqrt(12)]
    for options in ({}, {"probe_batch": 4}, {"unroll": True}):
        np.testing.assert_allclose(trace(op, key, 12, **options), expected, rtol=2e-5)
    np.testing.assert_allclose(curvature.of_samples(jnp.asarray(each)), expected, rtol=2e-5)


def test_errors_cover() -> None:
    """The truth is within two errors for most keys, and not within a third of one. XTrace's are
    too small by as much as it says: its estimates are not independent."""
    a = ref.symmetric(60) + 2 * np.eye(60)
    op = of_matrix(a)
    keys = jax.random.split(jax.random.key(0), 200)

    def apart(fn: Any, truth: float) -> np.ndarray:
        """In errors."""
        found = jax.jit(lambda keys: jax.lax.map(lambda k: fn(op, k, 30), keys))(keys)
        return np.abs(np.asarray(found.value) - truth) / np.asarray(found.error)

    for fn, truth in (
        (curvature.trace, np.trace(a)),
        (curvature.frobenius, np.linalg.norm(a)),
    ):
        z = apart(fn, truth)
        assert 0.88 < np.mean(z < 2) and np.mean(z < 1 / 3) < 0.5
    z = apart(curvature.xtrace, np.trace(a))
    assert 1.3 < np.sqrt(np.mean(z**2)) < 1.7


def test_the_diagonal_and_its_error() -> None:
    """A tree like the vectors; the relative error of m probes is the formula's."""
    a = ref.symmetric(48) + np.diag(np.linspace(1, 5, 48))

    def apply(matrix: jax.Array, v: Any) -> Any:
        out = matrix @ jnp.concatenate([v["a"].reshape(-1), v["b"]])
        return {"a": out[:40].reshape(8, 5), "b": out[40:]}

    like = {"a": jnp.zeros((8, 5)), "b": jnp.zeros(8)}
    op = Operator(apply, jnp.asarray(a, jnp.float32), like)
    found = [diagonal(op, jax.random.key(i), 50) for i in range(20)]
    assert found[0].value["a"].shape == found[0].error["a"].shape == (8, 5)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(f.value)]) for f in found]
    apart = [np.linalg.norm(x - np.diag(a)) for x in flat]
    relative = np.sqrt(np.mean(np.square(apart))) / np.linalg.norm(np.diag(a))
    assert 0.85 < relative / ref.diagonal_error(a, 50) < 1.15
    errors = np.mean([sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(f.error)) for f in found])
    assert 0.85 < errors / np.mean(np.square(apart)) < 1.15


def test_the_diagonal_of_a_diagonal_is_exact() -> None:
    values = np.float32([3, -1, 2, 0.5])
    found = diagonal(of_matrix(np.diag(values)), jax.random.key(0), 4)
    np.testing.assert_allclose(found.value, values, rtol=1e-6)
    np.testing.assert_allclose(found.error, 0, atol=1e-6)


# ---- XTrace -------------------------------------------------------------------------------------


def test_xtrace_is_the_algorithm_without_its_shortcuts() -> None:
    a = ref.symmetric(30)
    key, size = jax.random.key(4), 8
    with jax.enable_x64(True):
        op = Operator(jnp.matmul, jnp.asarray(a), jnp.zeros(30))
        rows = [curvature.random(op, k) for k in jax.random.split(key, size)]
        omega = np.stack([np.asarray(v) * np.sqrt(30) / np.linalg.norm(v) for v in rows], axis=1)
        found = curvature.xtrace(op, key, 2 * size)
    np.testing.assert_allclose(found, ref.xtrace(a, omega), rtol=1e-10)


def test_xtrace_is_exact_at_low_rank() -> None:
    """Also where the sketch has a lower rank than vectors, and of nothing."""
    op = of_matrix(ref.with_eigenvalues(np.array([5, 3, -1] + [0] * 37)))
    for num in (8, 20):
        found = curvature.xtrace(op, jax.random.key(1), num)
        np.testing.assert_allclose(found.value, 7, rtol=1e-4)
        assert float(found.error) < 1e-3
    nothing = curvature.xtrace(of_matrix(np.zeros((20, 20))), jax.random.key(1), 8)
    np.testing.assert_array_equal(nothing, [0, 0])


def test_xtrace_wins_where_eigenvalues_decay_and_not_where_they_cancel() -> None:
    """RMS error over 40 keys at equal products: trained, at most 0.75 of Hutchinson's; for
    cross-entropy at initialisation, no better."""
    keys = jax.random.split(jax.random.key(0), 40)

    @jax.jit
    def both(op: Operator) -> Any:
        def one(key: Any) -> Any:
            return curvature.trace(op, key, 60).value, curvature.xtrace(op, key, 60).value

        return jax.lax.map(one, keys)

    ratios = {}
    for name, steps in (("mse", 3000), ("ce", 0)):
        a = ref.dense(name, steps)
        apart = np.asarray(both(of_matrix(a))) - np.trace(a)
        hutchinson, xtrace = np.sqrt(np.mean(apart**2, axis=1))
        ratios[name] = xtrace / hutchinson
    assert ratios["mse"] < 0.75 and ratios["ce"] > 0.9, ratios


def test_masked_entries_count_for_nothing() -> None:
    """The trace, norm and dimension of the block alone, and probes that see no other."""
    a, inside = ref.symmetric(30) + 2 * np.eye(30), np.arange(30) < 12
    block = a[:12, :12]
    op = Operator(
        lambda a, v: jnp.asarray(inside, jnp.float32) * (a @ v),
        jnp.asarray(a, jnp.float32),
        jnp.zeros(30),
        jnp.asarray(inside, jnp.float32),
    )
    for fn in (curvature.trace, curvature.xtrace):
        found = fn(op, jax.random.key(0), 22)
        assert abs(float(found.value) - np.trace(block)) < 4 * float(found.error)
    found = curvature.frobenius_squared(op, jax.random.key(0), 200)
    assert abs(float(found.value) - np.sum(block**2)) < 4 * float(found.error)
    assert float(found.error) < 0.1 * np.sum(block**2)


def test_bad_input_is_refused() -> None:
    op, key = of_matrix(np.eye(6)), jax.random.key(0)
    with pytest.raises(ValueError, match="num must be at least 2, one probe has no standard error"):
        curvature.trace(op, key, 1)
    with pytest.raises(ValueError, match="probe_batch must divide num, 8, got 3"):
        curvature.trace(op, key, 8, probe_batch=3)
    for num in (7, 2, 14):
        with pytest.raises(ValueError, match=r"num must be even, in 4..12, got"):
            curvature.xtrace(op, key, num)
    with pytest.raises(ValueError, match="xtrace needs vectors in one piece"):
        curvature.xtrace(op.replace(sharded=True), key, 4)  # type: ignore
