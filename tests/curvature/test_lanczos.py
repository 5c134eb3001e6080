"""Lanczos: known spectra, dense Hessians, bounds, breakdowns, warm starts."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import curvature as ref

from dynamics import curvature
from dynamics.curvature.operator import Operator


def diagonal(values: Any) -> Operator:
    return Operator(jnp.multiply, jnp.asarray(values), jnp.asarray(values))


def of_matrix(a: Any) -> Operator:
    return Operator(jnp.matmul, jnp.asarray(a), jnp.zeros(len(a), jnp.asarray(a).dtype))


run = jax.jit(curvature.lanczos, static_argnums=2, static_argnames=("reorthogonalise", "unroll"))
sharpness = jax.jit(curvature.sharpness, static_argnames=("k", "unroll"))
pairs = jax.jit(curvature.eigenpairs, static_argnums=2, static_argnames="smallest")


@partial(jax.jit, static_argnames="k")
def from_starts(op: Operator, keys: Any, warm: Any, *, k: int) -> Any:
    return jax.vmap(lambda key: curvature.sharpness(op, key, k=k, warm=warm))(keys)


SPREAD = np.concatenate([[10, 9], np.linspace(-1, 3, 298)])


def test_a_quadratic_with_two_values_apart() -> None:
    """Check 1: float32, 30 steps."""
    op = diagonal(SPREAD.astype(np.float32))
    found = pairs(op, run(op, curvature.random(op, jax.random.key(1)), 30), 2)
    np.testing.assert_allclose(found.values, [10, 9], rtol=1e-5)
    assert np.all(np.asarray(found.residuals) < 1e-3)
    vectors = np.abs(np.asarray(found.vectors))
    np.testing.assert_allclose([vectors[0, 0], vectors[1, 1]], 1, rtol=1e-5)
    end = sharpness(op, jax.random.key(1), k=30)
    np.testing.assert_allclose(end.value, 10, rtol=1e-5)
    assert -1 <= float(end.smallest) <= -1 + float(end.smallest_residual)


def test_the_residual_is_the_residual_and_a_bound() -> None:
    """Check 3: |value - lambda| <= beta_k |s_k| = ||A x - value x||, to 1e-10 in float64."""
    a = ref.with_eigenvalues(SPREAD[::5])
    truth = np.linalg.eigvalsh(a)
    with jax.enable_x64(True):
        op = of_matrix(a)
        state = run(op, jnp.asarray(np.random.default_rng(0).normal(size=len(a))), 12)
        found = pairs(op, state, 12)
    values, bounds, x = (np.asarray(f) for f in found)
    for value, bound, vector in zip(values, bounds, x, strict=True):
        assert abs(np.linalg.norm(a @ vector - value * vector) - bound) < 1e-10
        assert np.abs(truth - value).min() <= bound + 1e-10
    np.testing.assert_allclose(x @ x.T, np.eye(12), atol=1e-12)
    assert truth[0] <= values.min() and values.max() <= truth[-1] + 1e-12


def test_the_basis_stays_orthonormal_and_without_care_does_not() -> None:
    op = diagonal(SPREAD.astype(np.float32))
    state = run(op, curvature.random(op, jax.random.key(1)), 60)
    basis = np.asarray(state.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(60), atol=2e-6)
    bare = run(op, curvature.random(op, jax.random.key(1)), 60, reorthogonalise=False)
    assert bare.basis is None
    found, loose = curvature.ritz(state), curvature.ritz(bare)
    assert np.sum(np.abs(np.asarray(found.values) - 10) < 1e-3) == 1
    assert np.sum(np.abs(np.asarray(loose.values) - 10) < 1e-3) > 1  # copies
    np.testing.assert_allclose(loose.values[0], 10, rtol=1e-5)


CASES = [("mse", 0), ("mse", 3000), ("ce", 0), ("ce", 3000)]


@pytest.mark.parametrize(("name", "steps"), CASES)
def test_the_largest_eigenvalue_of_a_network(name: str, steps: int) -> None:
    """Check 5: 25 steps from each of 5 starts, within 1e-3 of the dense one and never above."""
    a = ref.dense(name, steps)
    truth = np.linalg.eigvalsh(a)
    with jax.enable_x64(True):
        found = from_starts(of_matrix(a), jax.random.split(jax.random.key(0), 5), None, k=25)
    errors = np.asarray(found.value) / truth[-1] - 1
    assert np.all(np.abs(errors) < 1e-3) and np.all(errors < 1e-12)
    assert np.all(np.asarray(found.value) + np.asarray(found.residual) >= truth[-1] * (1 - 1e-12))
    assert np.all(np.asarray(found.smallest) >= truth[0] - 1e-12)


def test_of_the_loss_itself_in_float32() -> None:
    """Ritz values of products in float32, against the dense Hessian in float64."""
    truth = np.linalg.eigvalsh(ref.dense("ce", 0))
    params, batch = jax.tree.map(
        lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x,
        (ref.trained("ce", 0), ref.digits()),
    )
    op = curvature.hessian(ref.ce, params, curvature.cut(batch, 50))
    found = sharpness(op, jax.random.key(0), k=30)
    np.testing.assert_allclose(found.value, truth[-1], rtol=1e-5)
    assert float(found.smallest) < -0.25 * float(found.value)  # indefinite at initialisation
    assert {x.shape for x in jax.tree.leaves(found.vector)} == {(64, 16), (16, 10), (16,), (10,)}


def test_the_largest_is_algebraic() -> None:
    """Not the largest magnitude, which power iteration would give."""
    found = sharpness(diagonal(np.float32([-10, -1, 0.5, 2])), jax.random.key(0), k=4)
    np.testing.assert_allclose([found.value, found.smallest], [2, -10], rtol=1e-5)


# ---- breakdown ----------------------------------------------------------------------------------

RANK_ONE = np.float32([3, *np.zeros(29)])
CLUSTERS = np.float32([1] * 10 + [2] * 20)
BROKEN = {
    "3 I": (np.full(40, 3, np.float32), None),
    "rank one from its vector": (RANK_ONE, 0),
    "rank one from its kernel": (RANK_ONE, 3),
    "rank one": (RANK_ONE, None),
    "two clusters": (CLUSTERS, None),
    "two clusters from a vector": (CLUSTERS, 0),
    "rank four": (np.float32([-2, 1, 4, 5, *np.zeros(36)]), None),
    "zero": (np.zeros(30, np.float32), None),
}


@pytest.mark.parametrize("reorthogonalise", [True, False], ids=["restart", "cut"])
@pytest.mark.parametrize("case", BROKEN)
def test_breakdown_leaves_the_spectrum(case: str, reorthogonalise: bool) -> None:
    """Check 7: every Ritz value is an eigenvalue, to 1e-4; its residual says where T was cut."""
    values, from_ = BROKEN[case]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(len(values),) * 2))[0]
    op = of_matrix((rotation * values.astype(float)) @ rotation.T.astype(float))
    op = jax.tree.map(lambda x: x.astype(jnp.float32), op)
    start = curvature.random(op, jax.random.key(2))
    if from_ is not None:
        start = jnp.asarray(rotation[:, from_], jnp.float32)
    state = run(op, start, 8, reorthogonalise=reorthogonalise)
    found = curvature.ritz(state)
    count = int(found.count)
    inside, bounds = np.asarray(found.values)[:count], np.asarray(found.residuals)[:count]
    apart = np.abs(inside[:, None] - values).min(axis=1)
    assert np.all(apart <= 1e-4 + bounds) and np.sum(apart > 1e-4) <= 1
    assert np.all(np.isnan(np.asarray(found.values)[count:]))
    if reorthogonalise:
        assert count == 8 and int(state.block[-1]) > 0
        basis = np.asarray(state.basis)
        np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=2e-6)
        np.testing.assert_allclose(inside[0], values.max(), atol=1e-4)


def test_multiplicities_are_found_by_restarting() -> None:
    op = of_matrix(np.diag(np.float32([5, 5, 5, 1, 1, 0])))
    found = pairs(op, run(op, jnp.ones(6), 6), 6)
    np.testing.assert_allclose(found.values, [5, 5, 5, 1, 1, 0], atol=1e-5)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-5)


def test_more_steps_than_dimensions() -> None:
    """It ends when there is nothing left, and what is not there is NaN."""
    op = diagonal(np.float32([1, 2, 3]))
    state = run(op, jnp.ones(3), 7)
    found = curvature.ritz(state)
    assert int(found.count) == 3 and not bool(state.alive)
    np.testing.assert_allclose(found.values[:3], [3, 2, 1], rtol=1e-6)
    assert np.all(np.isnan(np.asarray(found.values)[3:]))
    end = sharpness(op, jax.random.key(0))
    np.testing.assert_allclose([end.value, end.smallest], [3, 1], rtol=1e-6)
    np.testing.assert_array_equal(state.block, [0, 0, 0, -1, -1, -1, -1])


def test_restarts_have_a_key() -> None:
    op = diagonal(np.full(12, 3, np.float32))
    rows = [run(op, jnp.ones(12), 3, key=jax.random.key(k)).basis for k in (0, 0, 1)]
    np.testing.assert_array_equal(rows[0], rows[1])
    assert float(jnp.abs(rows[0] - rows[2]).max()) > 0.1


def test_what_is_not_finite_stays_so() -> None:
    """A diverged replica has no sharpness, and raises nothing."""
    op = diagonal(np.float32([1, np.nan, 2]))
    assert np.isnan(float(sharpness(op, jax.random.key(0), k=3).value))


# ---- warm starts --------------------------------------------------------------------------------


def test_a_warm_start_is_better_at_the_same_cost() -> None:
    """6 products from the vector of 20 steps ago, against 6 from a random one."""
    old = np.linalg.eigh(ref.dense("mse", 3000))[1][:, -1]
    a = ref.dense("mse", 3020)
    op, keys = of_matrix(np.float32(a)), jax.random.split(jax.random.key(0), 16)
    found = {
        name: 1 - np.asarray(from_starts(op, keys, start, k=6).value) / np.linalg.eigvalsh(a)[-1]
        for name, start in (("warm", jnp.asarray(old, jnp.float32)), ("cold", None))
    }
    assert np.median(found["warm"]) < 1e-3 < np.median(found["cold"])
    assert np.max(found["warm"]) < np.median(found["cold"])


def test_a_warm_start_leaves_a_vector_that_is_no_longer_the_first() -> None:
    """The first two have crossed since: from the old vector itself Lanczos could not tell."""
    values = np.float32([9, 10, *np.linspace(0, 3, 50)])
    op, old = diagonal(values), jnp.zeros(52).at[0].set(1.0)
    np.testing.assert_allclose(sharpness(op, jax.random.key(0), k=8, warm=old).value, 10, rtol=1e-3)
    stuck = run(op, old, 1)
    np.testing.assert_allclose(curvature.ritz(stuck).residuals, 0, atol=1e-6)
    moved = curvature.perturbed(op, jax.random.key(0), 7 * old)
    assert 0.7 < float(jnp.linalg.norm(moved - 7 * old)) / 0.07 < 1.3


# ---- trees, loops -------------------------------------------------------------------------------


def test_the_same_on_trees_as_on_vectors() -> None:
    """``sharded`` keeps the leaves apart; T is the same."""
    draw = np.random.default_rng(0)
    shapes = {"a": (7, 5), "b": (5,), "c": {"d": (2, 3, 4)}}
    weights = jax.tree.map(
        lambda s: jnp.asarray(draw.normal(size=s), jnp.float32),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple),
    )

    def apply(weights: Any, v: Any) -> Any:
        total = sum(
            jnp.vdot(w, x) for w, x in zip(*map(jax.tree.leaves, (weights, v)), strict=True)
        )
        return jax.tree.map(lambda w, x: w * x + 0.3 * total * w, weights, v)

    start = jax.tree.map(lambda w: w + 1, weights)
    states = []
    for sharded in (False, True):
        op = Operator(apply, weights, weights, sharded=sharded)
        state = run(op, start, 10)
        vectors = pairs(op, state, 2).vectors
        states.append((state, vectors))
    (flat, x), (tree, y) = states
    np.testing.assert_allclose(flat.alpha, tree.alpha, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(flat.beta, tree.beta, rtol=1e-4, atol=1e-5)
    assert flat.basis.shape == (10, 64) and tree.basis["c"]["d"].shape == (10, 2, 3, 4)
    assert jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, y)


def test_written_out_it_is_the_same() -> None:
    op = diagonal(SPREAD.astype(np.float32))
    start = curvature.random(op, jax.random.key(0))
    rolled, written = (run(op, start, 5, unroll=unroll) for unroll in (False, True))
    np.testing.assert_allclose(rolled.alpha, written.alpha, rtol=1e-5)
    np.testing.assert_allclose(rolled.beta, written.beta, rtol=1e-5)
    for unroll in (False, True):  # a loop around the product, or none
        state = partial(curvature.lanczos, op, start, 5, unroll=unroll)
        names = {eqn.primitive.name for eqn in jax.make_jaxpr(state)().eqns}
        assert bool(names & {"scan", "while"}) is not unroll


def test_bad_input_is_refused() -> None:
    op = diagonal(np.float32([1, 2, 3]))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        curvature.lanczos(op, jnp.ones(3), 0)
    with pytest.raises(ValueError, match=r"v must be like the vectors, \(3,\), got \(4,\)"):
        curvature.lanczos(op, jnp.ones(4), 2)
    state = curvature.begin(op, jnp.ones(3), 2)
    with pytest.raises(ValueError, match=r"num must be in 1..2, the steps, got 3"):
        curvature.eigenpairs(op, state, 3)
    bare = curvature.begin(op, jnp.ones(3), 2, reorthogonalise=False)
    with pytest.raises(ValueError, match="vectors need the basis"):
        curvature.eigenpairs(op, bare)


def test_batch_sharpness_is_larger() -> None:
    """Check 24: the mean over batches of 16 of lambda_max(H_B) is at least lambda_max(H)."""
    params, (x, y) = jax.tree.map(
        lambda x: np.asarray(x, np.float32) if x.dtype == np.float64 else x,
        (ref.trained("mse", 300), ref.digits()),
    )
    x, y = x[:192], y[:192]
    batches = curvature.cut((x, y), 16)

    @jax.jit
    def both(key: Any) -> Any:
        def one(batch: Any) -> Any:
            alone = jax.tree.map(lambda x: x[None], batch)
            return curvature.sharpness(curvature.hessian(ref.mse, params, alone), key).value

        whole = curvature.sharpness(curvature.hessian(ref.mse, params, batches), key).value
        return jax.lax.map(one, jax.tree.map(jnp.asarray, batches)), whole

    of_batches, of_all = both(jax.random.key(0))
    assert float(of_batches.mean()) >= float(of_all) * 1.02
