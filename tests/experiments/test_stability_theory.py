"""The theory of stability, measured: checks 16 and 18 to 21 of the specification."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from references.stability import asymmetric, diagonal_net, logistic, subgradient, symmetric

from dynamics import config as configs
from dynamics import mesh, record
from dynamics.data import synthetic
from dynamics.record import Findings
from experiments import stability_theory as theory
from experiments.stability_theory import (
    Config,
    Diagonal,
    Perceptron,
    Robust,
    Sensing,
    diagonal,
    perceptron,
    population,
    robust,
    sensing,
)

ROOT = Path(__file__).parents[2]
TINY = {
    "diagonal": Diagonal(
        learning_rates=(0.01,), large_rates=(0.05,), examples=8, dim=12, nonzero=2, batches=(1, 3),
        steps=30, replicas=2, features=17, directions=2,
    ),
    "sensing": Sensing(
        dim=6, columns=(2, 3), width=3, steps=25, before=20, after=10, scales=(0.1, 0.3),
        replicas=2,
    ),
    "robust": Robust(
        dim=5, columns=(2, 4), measurements=60, scales=(1e-2, 0.1), steps=20, replicas=2
    ),
}  # fmt: skip


def run(study: Any, **options: Any) -> Findings:
    return theory.run(Config(study=study), None, mesh.make(1), **options)


def frame(found: Findings) -> pl.DataFrame:
    """That of the study."""
    return next(iter(found.frames.values()))


def where(found: Findings, name: str, of: str | None = None, **equal: Any) -> np.ndarray:
    """A column of the study's frame, or of another, where others have these values."""
    rows = frame(found) if of is None else found.frames[of]
    for column, value in equal.items():
        rows = rows.filter(pl.col(column) == value)
    assert len(rows), equal
    return rows[name].to_numpy()


# ---- diagonal -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converged() -> Findings:
    study = Diagonal(learning_rates=(0.008, 0.016), large_rates=(0.05, 0.14), replicas=2)
    return run(study)


def ends(table: Findings, name: str, batch: int, rate: float = 0.016) -> np.ndarray:
    return where(table, name, batch=batch, learning_rate=rate, step=40_000)


def test_one_example_a_batch_ends_where_the_trace_allows(converged: Any) -> None:  # check 16
    assert (ends(converged, "trace", 1) < 1).all() and (ends(converged, "trace", 1) > 0.6).all()
    assert (ends(converged, "trace", 20) > 1.05).all()  # gradient descent
    assert (ends(converged, "trace", 4) > 1.05).all()  # and larger batches
    small = ends(converged, "trace", 1, 0.008)
    assert (small < 0.7).all()  # far from the law nothing drives a run


def test_the_inequality_of_every_batch_size_holds_at_the_end(converged: Any) -> None:
    last = where(converged, "necessary", step=40_000)
    assert (last <= 0.86).all() and last.max() > 0.6
    assert frame(converged)["diverged"].is_null().all()
    assert where(converged, "mistake", step=40_000).max() < 1e-8
    start = where(converged, "necessary", step=0, batch=1, learning_rate=0.016)
    assert (start > 1).all()  # and not where the run begins


def test_gradient_descent_ends_where_the_largest_eigenvalue_allows(converged: Any) -> None:
    for rate, low in ((0.016, 0.1), (0.05, 0.35), (0.14, 0.7)):
        top = ends(converged, "top", 20, rate)
        assert ((low < top) & (top < 1)).all()
    start = where(converged, "top", batch=20, learning_rate=0.14, step=0)
    assert (start > 1.05).all()  # it moved there
    assert (ends(converged, "trace", 20, 0.14) > 4).all()


def test_what_is_said_of_made_up_minima(converged: Any) -> None:
    def exact(name: str, **equal: Any) -> np.ndarray:
        return where(converged, name, "critical", **equal)

    assert sorted(set(exact("batch"))) == [1, 2, 4, 8, 16, 60]
    np.testing.assert_allclose(exact("trace", kind="equal", batch=1), 1, atol=1e-9)
    assert (exact("trace", kind="equal", batch=4) > 1.5).all()
    assert (exact("trace", kind="heavy", batch=1) < 0.5).all()
    for kind in diagonal.KINDS:
        assert exact("necessary", kind=kind).max() <= 1 + 1e-9
        assert exact("error", kind=kind).max() < 1e-9
        for again, replica in itertools.product((True, False), range(2)):
            cell = {"kind": kind, "replacement": again, "replica": replica}
            gained = np.diff(exact("trace", **cell))
            assert len(gained) == 5 and (gained > 0).all()  # larger batches, larger rates


@pytest.fixture(scope="module")
def tiny() -> dict[str, Findings]:
    return {name: run(study) for name, study in TINY.items()}


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_run_on_the_diagonal_net_is_sgd(tiny: Any, batch: int) -> None:
    study = TINY["diagonal"]
    x, y = diagonal._draw(study, population.own_seed(0, 1))
    key = jax.random.fold_in(jax.random.key(0), 1)
    stream = population.own_examples(x[None], y[None])
    if batch < 8:
        stream = diagonal.minibatches(stream, batch)
    own = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    one = jax.jit(lambda t: stream.batch(stream.shared, own, (), key, t).index)
    rows = [np.asarray(one(np.int32(t))) for t in range(30)]
    assert all(len(r) == batch for r in rows)
    x, y = x.astype(np.float64), y.astype(np.float64)
    u, v = diagonal_net(x, y, np.full(12, 0.6), np.full(12, 0.6), 0.01, rows)
    slopes = np.concatenate([2 * x * u, -2 * x * v], axis=1)
    h = slopes.T @ slopes / 8
    found = {
        name: where(tiny["diagonal"], name, batch=batch, learning_rate=0.01, step=30, replica=1)
        for name in ("trace", "top", "mistake", "necessary")
    }
    np.testing.assert_allclose(found["trace"], 0.005 * np.trace(h), rtol=1e-5)
    np.testing.assert_allclose(found["top"], 0.005 * np.linalg.eigvalsh(h)[-1], rtol=1e-5)
    np.testing.assert_allclose(
        found["mistake"], np.mean((x @ (u * u - v * v) - y) ** 2) / 2, rtol=1e-3
    )
    c, lengths = (0 if batch == 8 else 1 / batch), (slopes**2).sum(axis=1)
    square = c * (lengths**2).mean() + (1 - c) * (h**2).sum()
    np.testing.assert_allclose(found["necessary"], 0.005 * square / np.trace(h), rtol=1e-5)


def test_minibatches_are_drawn_evenly_and_anew() -> None:
    data = np.zeros((1, 5, 3), np.float32)
    stream = diagonal.minibatches(population.own_examples(data), 4)
    own, key = {"x": jnp.asarray(data[0])}, jax.random.key(0)
    one = jax.jit(jax.vmap(lambda t: stream.batch(stream.shared, own, (), key, t).index))
    drawn = np.asarray(one(np.arange(4000, dtype=np.int32)))
    assert drawn.shape == (4000, 4)
    counts = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    assert abs(counts - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / drawn.size)
    assert (np.sort(drawn, axis=1)[:, 1:] == np.sort(drawn, axis=1)[:, :-1]).any()  # replaced
    assert abs(np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]) < 0.07


# ---- perceptron ---------------------------------------------------------------------------------

GAMMAS = (0.1, 1.0, 10.0, 100.0, 1e8)


def paths(limits: Findings, name: str, problem: str, method: str) -> np.ndarray:
    """[gammas, steps + 1] of replica 0."""
    cell = {"problem": problem, "method": method, "replica": 0}
    return np.stack([where(limits, name, "path", gamma=gamma, **cell) for gamma in GAMMAS])


@pytest.fixture(scope="module")
def limits() -> Findings:
    study = Perceptron(gammas=GAMMAS, replicas=2, steps=310, digits_steps=90)
    return run(study)


def test_the_table_of_the_paper(limits: Any) -> None:  # check 18
    steps = {
        (m, g): where(limits, "iterations", problem="worst", method=m, gamma=g).item()
        for m in perceptron.METHODS
        for g in GAMMAS
    }
    assert [steps["normalised", g] for g in (100.0, 10.0, 1.0, 0.1)] == [2, 2, 16, 157]
    assert steps["descent", 100.0] == 308 and steps["descent", 1e8] == 301
    assert steps["descent", 10.0] == np.inf
    own = {
        m: where(limits, "perceptron", problem="worst", method=m, gamma=1.0).item()
        for m in perceptron.METHODS
    }
    assert own == {"descent": 301, "normalised": 2}


@pytest.mark.parametrize("method", ["descent", "normalised"])
def test_at_large_steps_descent_is_the_perceptron(limits: Any, method: str) -> None:  # check 19
    cell = {"problem": "digits", "method": method}
    assert (where(limits, "distance", gamma=1e8, **cell) <= 1e-10).all()
    assert (where(limits, "distance", gamma=100.0, **cell) >= 1e-3).all()
    steps = where(limits, "iterations", gamma=1e8, **cell)
    np.testing.assert_array_equal(steps, where(limits, "perceptron", gamma=1e8, **cell))
    assert (steps < 90).all() and (steps > 10).all()


def test_two_examples_by_hand(limits: Any) -> None:
    """Theorem 4.1: f(theta_1) = gamma / 8 to rounding, |grad f(theta_1)| = sqrt(2) / 2."""
    loss, slope = (paths(limits, name, "pair", "descent") for name in ("mistake", "slope"))
    np.testing.assert_allclose(loss[3, 1], 12.5, rtol=1e-9)
    np.testing.assert_allclose(slope[3, 1], np.sqrt(2) / 2, rtol=1e-9)
    assert loss[3, 2] < 1e-10
    np.testing.assert_allclose(loss[:, 0], np.log(2))
    path = perceptron.batch_perceptron(np.array([[1.0, -1.0], [1.0, 4.0]]), 2)
    np.testing.assert_allclose(path, [[0, 0], [0.5, 0.75], [1, 0.25]])


@pytest.mark.parametrize("method", ["descent", "normalised"])
@pytest.mark.parametrize("gamma", [1.0, 100.0])
def test_logistic_descent_written_out(limits: Any, gamma: float, method: str) -> None:
    study = Perceptron(replicas=2)
    signed = perceptron.digits(study, population.own_seed(0, 0)).astype(np.float64)
    wanted = logistic(signed, gamma, 90, normalised=method == "normalised")
    margins = wanted @ signed.T
    place = GAMMAS.index(gamma)
    loss = paths(limits, "mistake", "digits", method)[place]
    np.testing.assert_allclose(loss, np.logaddexp(0, -margins).mean(axis=1), rtol=1e-6)
    wrong = paths(limits, "wrong", "digits", method)[place]
    np.testing.assert_array_equal(wrong, (margins <= 0).sum(axis=1))


def test_digits_are_signed_and_differ_by_their_noise() -> None:
    study = Perceptron(noise=1e-3)
    a, b, c = (perceptron.digits(study, seed) for seed in (5, 6, 5))
    np.testing.assert_array_equal(a, c)
    assert 0 < abs(a - b).max() < 0.02 and a.shape[1] == 65
    assert set(a[:, -1]) == {-1.0, 1.0} and np.isclose(abs(a).max(), 1, atol=0.01)


# ---- sensing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensed() -> Findings:
    return run(Sensing(replicas=2))


def test_superfluous_columns_make_a_power_law_with_a_known_constant(sensed: Any) -> None:  # 20
    for k in (3, 4, 6):
        cell = {"method": "symmetric", "columns": k}
        steps = where(sensed, "step", replica=0, **cell)
        for replica in range(2):
            errors = where(sensed, "error", replica=replica, **cell)
            constant = 4 * (0.1 * 20_000) ** 2 * errors[-1] / (k - 2)
            assert 0.98 <= constant <= 1.02
            late = steps >= 2000
            slope = np.polyfit(np.log(steps[late]), np.log(errors[late]), 1)[0]
            assert -2.05 <= slope <= -1.93
    exact = where(sensed, "error", method="symmetric", columns=2, step=20_000)
    assert (exact < 1e-25).all()


def rates(table: Findings, method: str, scale: float) -> np.ndarray:
    """By replica, of the squared error after the modified step, above its rounding."""
    found = []
    for replica in range(2):
        cell = {"method": method, "scale": scale, "replica": replica}
        steps, errors = where(table, "step", **cell), where(table, "error", **cell)
        kept = (steps > 1500) & (errors > 1e-27)
        found.append(-np.polyfit(steps[kept], np.log(errors[kept]), 1)[0])
    return np.array(found)


def test_unequal_factors_converge_at_a_rate_of_their_start(sensed: Any) -> None:
    for scale in (0.05, 0.1):
        least = where(sensed, "least", method="asymmetric", scale=scale, step=1900)
        wanted = -2 * np.log(1 - 0.1 * least**2)  # 2 eta s^2 for small steps
        np.testing.assert_allclose(rates(sensed, "asymmetric", scale), wanted, rtol=0.1)
    ratio = rates(sensed, "asymmetric", 0.1) / rates(sensed, "asymmetric", 0.05)
    assert (ratio > 3).all()
    equal = where(sensed, "error", method="balanced", step=1900)
    assert (equal > 1e-7).all()  # no linear convergence


def test_one_modified_step_frees_the_rate_of_the_start(sensed: Any) -> None:
    free = {scale: rates(sensed, "modified", scale) for scale in (0.05, 0.1)}
    np.testing.assert_allclose(free[0.1], free[0.05], rtol=0.02)
    np.testing.assert_allclose(free[0.05], -2 * np.log(1 - 0.1 * 0.6**2), rtol=0.01)
    before = {m: where(sensed, "error", method=m, step=1500) for m in ("asymmetric", "modified")}
    np.testing.assert_array_equal(before["modified"], before["asymmetric"])


def test_the_modified_step_leaves_the_product() -> None:
    rng = np.random.default_rng(0)
    f, g = rng.standard_normal((2, 7, 4)) * np.array([3.0, 0.2, 0.1, 1.0])
    new = sensing.raised(f, g, 0.6)
    np.testing.assert_allclose(new[0] @ new[1].T, f @ g.T, atol=1e-13)
    before, after = (np.linalg.svd(m)[1] for m in (f, new[0]))
    np.testing.assert_allclose(after, np.maximum(before, 0.6), rtol=1e-12)


def test_a_run_of_sensing_is_gradient_descent(tiny: Any) -> None:
    study = TINY["sensing"]
    seed = population.own_seed(0, 1)
    factor = sensing._factor(study, seed).astype(np.float64)
    m = factor @ factor.T
    np.testing.assert_allclose(np.linalg.eigvalsh(m)[-2:], [0.5, 1.0], rtol=1e-6)
    eta = float(np.float32(0.1))  # scalars of a state are float32
    for k in (2, 3):
        x = 0.1 * sensing.start(6, k, seed)[0]
        x = symmetric(m, x, eta, 25)
        cell = {"method": "symmetric", "columns": k, "step": 25, "replica": 1}
        found = where(tiny["sensing"], "error", **cell)
        np.testing.assert_allclose(found, ((x @ x.T - m) ** 2).sum(), rtol=1e-9)
    for method in ("asymmetric", "balanced", "modified"):
        f, g = sensing.start(6, 3, seed)
        f, g = 0.3 * f, 0.3 * (f if method == "balanced" else g / 3)
        f, g = asymmetric(m, f, g, eta, 20)
        if method == "modified":
            f, g = sensing.raised(f, g, 0.6)
        f, g = asymmetric(m, f, g, eta, 10)
        cell = {"method": method, "scale": 0.3, "step": 30, "replica": 1}
        found = where(tiny["sensing"], "error", **cell)
        np.testing.assert_allclose(found, ((f @ g.T - m) ** 2).sum(), rtol=1e-9)
        least = where(tiny["sensing"], "least", **cell)
        np.testing.assert_allclose(least, np.linalg.svd(f)[1][-1], rtol=1e-6)


# ---- robust -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recovered() -> Findings:
    return run(Robust(columns=(2, 20), scales=(1e-6, 0.1), replicas=1))


def test_sub_gradients_find_what_squares_do_not(recovered: Any) -> None:  # check 21
    cell = {"columns": 20, "scale": 1e-6}
    assert where(recovered, "error", method="absolute", **cell).item() < 1e-3
    assert where(recovered, "error", method="square", **cell).item() > 0.5
    assert where(recovered, "error", method="square", columns=2, scale=1e-6).item() > 0.5
    large = where(recovered, "error", method="absolute", columns=20, scale=0.1).item()
    assert large > 3 * where(recovered, "error", method="absolute", **cell).item()
    assert where(recovered, "error", method="absolute", columns=2, scale=0.1).item() < 1e-3
    loss, truth = (where(recovered, n, method="square", **cell).item() for n in ("loss", "truth"))
    assert loss < truth - 0.1  # that is why


@pytest.mark.parametrize("method", ["absolute", "square"])
def test_a_robust_run_is_the_method_written_out(tiny: Any, method: str) -> None:
    study = TINY["robust"]
    drawn = robust._draw(study, population.own_seed(0, 1))
    a, y = drawn.matrices.astype(np.float64), drawn.values.astype(np.float64)
    truth = drawn.factor.astype(np.float64) @ drawn.factor.T
    for k in (2, 4):
        u = 0.1 * robust.spectral_start(drawn, k)
        absolute = method == "absolute"
        u = subgradient(a, y, u, *((0.3, 0.995) if absolute else (0.1, 1.0)), 20, absolute)
        cell = {"method": method, "columns": k, "scale": 0.1, "replica": 1}
        found = where(tiny["robust"], "error", **cell)
        np.testing.assert_allclose(found, np.linalg.norm(u @ u.T - truth), rtol=1e-3)
        residual = np.einsum("mij,ij->m", a, u @ u.T) - y
        loss = np.mean(abs(residual) / 2 if absolute else residual**2 / 4)
        np.testing.assert_allclose(where(tiny["robust"], "loss", **cell), loss, rtol=1e-3)


def test_a_spectral_start_is_the_positive_part() -> None:
    drawn = robust._draw(TINY["robust"], 5)
    slope = np.einsum("m,mij->ij", np.sign(drawn.values), drawn.matrices.astype(np.float64))
    values, vectors = np.linalg.eigh(slope)
    positive = vectors * np.maximum(values, 0) @ vectors.T
    b = robust.spectral_start(drawn, 5)
    np.testing.assert_allclose(b @ b.T, positive / np.linalg.norm(positive), atol=1e-12)
    assert robust.spectral_start(drawn, 2).shape == (5, 2)


# ---- data ---------------------------------------------------------------------------------------


def test_measurements_are_an_isometry_on_average_and_wrong_as_often_as_said() -> None:
    drawn = synthetic.sensing(0, n=20_000, dim=4, rank=2, smallest=0.3, outliers=0.25)
    np.testing.assert_array_equal(drawn.matrices, drawn.matrices.transpose(0, 2, 1))
    z = np.random.default_rng(0).standard_normal((4, 4))
    z = z + z.T
    products = np.einsum("mij,ij->m", drawn.matrices, z)
    assert abs((products**2).mean() / (z**2).sum() - 1) < 0.05
    truth = drawn.factor @ drawn.factor.T
    off = drawn.values - np.einsum("mij,ij->m", drawn.matrices, truth)
    assert abs(off[~drawn.wrong]).max() < 1e-5 and abs(drawn.wrong.mean() - 0.25) < 0.02
    assert abs(off[drawn.wrong].mean() - 5) < 0.6 and abs(off[drawn.wrong].std() - 10) < 0.5
    clean = synthetic.sensing(0, n=50, dim=4, rank=2, smallest=0.3)
    assert not clean.wrong.any()


def test_the_worst_case_and_regressions_are_as_said() -> None:
    data = synthetic.one_against_many(5)
    np.testing.assert_array_equal(data.x, [[0.5, -1]] + [[0.5, 1]] * 4)
    assert (data.x @ np.array([1.0, 0.1]) > 0).all() and (data.y == 1).all()
    found = synthetic.sparse_regression(1, n=6, dim=9, nonzero=3)
    np.testing.assert_allclose(np.linalg.norm(found.x, axis=1), 3, rtol=1e-6)
    np.testing.assert_allclose(found.targets, found.x[:, :3].sum(axis=1), atol=1e-6)
    assert (found.weights == [1] * 3 + [0] * 6).all()


@pytest.mark.parametrize(
    ("draw", "values", "message"),
    [
        (synthetic.symmetric, {"n": 7, "dim": 2}, "n must be even and at least 2 dim = 4, got 7"),
        (synthetic.symmetric, {"n": 6, "dim": 4}, "n must be even and at least 2 dim = 8, got 6"),
        (synthetic.sparse_regression, {"n": 2, "dim": 3, "nonzero": 4}, "from 1 to dim = 3, got 4"),
        (synthetic.low_rank, {"dim": 3, "rank": 4, "smallest": 0.5}, "need rank from 1 to dim = 3"),
        (synthetic.low_rank, {"dim": 3, "rank": 1, "smallest": 0.0}, "smallest above 0"),
        (synthetic.sensing, {"n": 3, "dim": 3, "rank": 1, "outliers": 1.0}, "from 0 to below 1"),
    ],
)
def test_bad_draws(draw: Any, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(0, **values)


# ---- all of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_points_and_replicas_do_not_depend_on_one_another(tiny: Any, name: str) -> None:
    one = dataclasses.replace(TINY[name], replicas=1)
    points = configs.grid(Config(study=one), {"seed": [1, 0]})
    assert len(configs.group(points)) == 1
    found = theory.sweep(points, None, mesh.make(1))[1]
    for part, rows in tiny[name].frames.items():
        wanted = rows.filter(pl.col("replica") == 0)
        assert_frame_equal(found.frames[part], wanted, rel_tol=2e-5, abs_tol=1e-6)


def test_a_stored_run_is_the_same_and_not_computed_again(
    tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    config = Config(study=TINY["sensing"])
    first = theory.run(config, None, mesh.make(1), store=tmp_path)
    stored = record.read(tmp_path / "stability_theory" / configs.fingerprint(config))
    assert stored.done
    monkeypatch.setattr(sensing, "measure", None)  # nothing can be computed
    second = theory.run(config, None, mesh.make(1), store=tmp_path)
    for found in (first, second):
        assert_frame_equal(frame(found), frame(tiny["sensing"]), check_exact=True)


def test_a_run_that_was_killed_between_its_stages_goes_on(
    tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Float64 parameters, modified on the host, come back from the checkpoints."""
    config = Config(study=TINY["sensing"])
    with monkeypatch.context() as patched:
        patched.setattr(sensing, "raised", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            theory.run(config, None, mesh.make(1), store=tmp_path)
    found = theory.run(config, None, mesh.make(1), store=tmp_path)
    assert_frame_equal(frame(found), frame(tiny["sensing"]), check_exact=True)


def test_a_study_is_run_and_drawn_from_the_command_line(tmp_path: Path) -> None:
    runs, out = str(tmp_path / "runs"), tmp_path / "out"
    study = ("--study", "robust", "--study.steps", "20", "--study.replicas", "2", "--runs", runs)
    for command in (
        ("experiments", "stability_theory", *study),
        ("paper_figures", "robust_sensing", "--runs", runs, "--out", str(out)),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert (out / "robust_sensing.pdf").exists() and "1,200 measurements" in done.stdout


@pytest.mark.parametrize(
    ("study", "values", "message"),
    [
        (Diagonal, {"learning_rates": (0.2, 0.1)}, "learning_rates must be one or more rising"),
        (Diagonal, {"large_rates": (-0.1,)}, "large_rates must be one or more rising positive"),
        (Diagonal, {"batches": (2, 4)}, r"must be 1 and more below examples = 20, got \(2, 4\)"),
        (Diagonal, {"batches": (1, 20)}, "must be 1 and more below examples = 20"),
        (Diagonal, {"nonzero": 60}, "Diagonal.nonzero must be at most dim, got 60"),
        (Perceptron, {"gammas": ()}, "Perceptron.gammas must be one or more rising"),
        (Perceptron, {"classes": (3, 3)}, r"must be two digits, got \(3, 3\)"),
        (Sensing, {"columns": (3, 4)}, r"must begin with the rank 2 and go on, got \(3, 4\)"),
        (Sensing, {"width": 2}, "must be above rank = 2"),
        (Sensing, {"columns": (2, 30)}, "at most dim = 20"),
        (Sensing, {"scales": (0.1,)}, r"Sensing.scales must be two or more, got \(0.1,\)"),
        (Robust, {"columns": (1, 4)}, "must begin with the rank 2 and end at most at dim = 20"),
        (Robust, {"decay": 0.0}, "Robust.decay must be > 0 and <= 1, got 0.0"),
        (Robust, {"outliers": 1.5}, "Robust.outliers must be >= 0 and <= 1, got 1.5"),
    ],
)
def test_bad_values_are_refused(study: Any, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**values)


@pytest.mark.parametrize("name", TINY)
def test_a_mesh_must_take_the_population(name: str) -> None:
    with pytest.raises(ValueError, match="must be a multiple of the mesh's replica axis"):
        theory.run(Config(study=TINY[name]), None, mesh.make(7))
