"""The theory of early learning, measured: checks A3, A4, A4b, A5 and A10 of the specification."""

import dataclasses
import math
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
from references.early_learning import descend

from dynamics import config as configs
from dynamics import losses, mesh, record
from dynamics.data import synthetic
from dynamics.record import Findings
from dynamics.types import INIT
from experiments import early_learning_theory as theory
from experiments.early_learning_theory import Basin, Config, Distillation, Phases, basin, phases
from experiments.stability_theory import population

ROOT = Path(__file__).parents[2]
LAST = -1
TINY = Phases(
    lambdas=(0.0, 3.0), examples=30, dim=20, control=8, steps=40, tested=50, replicas=2
)  # fmt: skip


def of(found: Findings, name: str, elr_lambda: float, dim: int = 380) -> np.ndarray:
    """f64[replicas, steps] of a column."""
    rows = found.frames["phases"].filter(pl.col("elr_lambda") == elr_lambda, pl.col("dim") == dim)
    parts = rows.sort("replica", "step").partition_by("replica")
    return np.stack([part[name].to_numpy() for part in parts])


# ---- phases -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short() -> Findings:
    """3000 steps."""
    study = Phases(lambdas=(0.0, 1.0, 3.0), steps=3000, replicas=5, control=100)
    return theory.run(Config(study=study), None, mesh.make(1))


@pytest.fixture(scope="module")
def long() -> Findings:
    """40 000 steps."""
    study = Phases(lambdas=(0.0, 1.0, 3.0), steps=40_000, replicas=2, control=100)
    return theory.run(Config(study=study), None, mesh.make(1))


def test_wrong_labels_are_first_corrected_and_then_memorised(short: Any) -> None:  # A4
    corrected, test = of(short, "corrected", 0.0), of(short, "test", 0.0)
    assert (corrected.max(axis=1) >= 0.95).all()
    assert (corrected[:, LAST] <= 0.02).all()
    assert (of(short, "memorised", 0.0)[:, LAST] >= 0.98).all()
    assert (test.max(axis=1) - test[:, LAST] >= 0.08).all()
    start = corrected[:, 0]  # a start orthogonal to v knows nothing
    assert abs(start.mean() - 0.5) < 0.1


def test_at_first_descent_goes_along_v(short: Any) -> None:  # A4; 1 / 6 in the theory
    cosine, along = of(short, "cosine", 0.0), of(short, "along", 0.0)
    early = np.logical_and.accumulate(along < 0.1, axis=1)  # until T
    assert early[:, 0].all() and (along[:, 0] == 0).all()
    assert (cosine[early] >= 0.8).all()
    assert (cosine[:, LAST] < 0.5).all()  # and later elsewhere
    norm = of(short, "norm", 0.0)
    np.testing.assert_allclose(norm[:, 0], 2, rtol=1e-6)


def test_gradients_of_clean_examples_vanish_and_those_of_wrong_ones_grow(short: Any) -> None:
    """Proposition 5, from 0 to T."""
    along = of(short, "along", 0.0)
    for name, sign in (("kappa_clean", -1), ("kappa_wrong", 1)):
        kappa = of(short, name, 0.0)
        at = (along >= 0.1).argmax(axis=1)
        change = kappa[np.arange(len(kappa)), at] - kappa[:, 0]
        assert (sign * change > 0.05).all()
        assert (kappa[:, LAST] < 0.2).all()  # in the end all of them


def test_regularization_holds_what_was_learned_early(short: Any) -> None:  # A4b
    assert (of(short, "corrected", 3.0)[:, LAST] >= 0.98).all()
    assert (of(short, "memorised", 3.0)[:, LAST] <= 0.02).all()
    assert (of(short, "test", 3.0)[:, LAST] >= 0.98).all()


def test_seeds_are_paired(short: Any) -> None:
    for name in ("test", "corrected", "along", "norm", "kappa_wrong"):
        np.testing.assert_array_equal(of(short, name, 0.0)[:, 0], of(short, name, 3.0)[:, 0])
    assert len(set(of(short, "kappa_wrong", 0.0)[:, 0])) == 5


@pytest.mark.slow
def test_up_to_two_regularization_only_delays(long: Any, short: Any) -> None:  # A5
    assert (of(long, "memorised", 1.0)[:, LAST] >= 0.9).all()
    assert (of(long, "memorised", 3.0)[:, LAST] <= 0.02).all()
    delayed = of(short, "memorised", 0.0)[:, LAST] - of(short, "memorised", 1.0)[:, LAST]
    assert (delayed >= 0.1).all()  # after 3000 steps lambda = 1 looks better than it is


@pytest.mark.slow
def test_in_few_dimensions_not_all_wrong_labels_can_be_fitted(long: Any) -> None:
    """The negative control of memorising: 400 examples in 100 dimensions."""
    memorised = of(long, "memorised", 0.0, 100)[:, LAST]
    assert ((0.2 < memorised) & (memorised < 0.7)).all()
    assert (of(long, "clean", 0.0, 100)[:, LAST] < 1).all()
    assert (of(long, "corrected", 0.0, 100).max(axis=1) >= 0.95).all()  # learned early all the same
    assert (of(long, "memorised", 0.0)[:, LAST] == 1).all()


@pytest.fixture(scope="module")
def tiny() -> Findings:
    return theory.run(Config(study=TINY), None, mesh.make(1))


@pytest.mark.parametrize("held", [0.0, 3.0])
def test_a_run_is_gradient_descent(tiny: Any, held: float) -> None:
    """Against the update written out, of an early-learning run and of cross-entropy."""
    drawn = phases._draw(20, TINY, population.own_seed(0, 1))
    root = jax.random.fold_in(jax.random.key(0), 1)
    theta, _ = phases.logistic(20).init(jax.random.fold_in(root, INIT), {})
    eps = 2.0 * drawn.noisy - 1
    steps = np.unique(tiny.frames["phases"]["step"])
    wanted = descend(theta, drawn.x, eps, TINY.steps, TINY.learning_rate, held, TINY.beta)
    wrong = drawn.noisy != drawn.clean
    for i, t in enumerate(steps):
        now, said = wanted[t], wanted[t]["said"]
        expected = {name: now[name] for name in ("cosine", "norm", "along")}
        expected |= {"kappa_clean": now["kappa"][~wrong].mean()}
        expected |= {"kappa_wrong": now["kappa"][wrong].mean()}
        expected |= {"corrected": (said == drawn.clean)[wrong].mean()}
        expected |= {"memorised": (said == drawn.noisy)[wrong].mean()}
        expected |= {"clean": (said == drawn.clean)[~wrong].mean()}
        expected |= {"test": ((drawn.test_x @ now["theta"] > 0) == drawn.test_y).mean()}
        for name, value in expected.items():
            found = of(tiny, name, held, 20)[1, i]
            np.testing.assert_allclose(found, value, rtol=2e-4, atol=1e-5, err_msg=f"{name}@{t}")


def test_points_and_replicas_do_not_depend_on_one_another(tiny: Any) -> None:
    one = dataclasses.replace(TINY, replicas=1)
    points = configs.grid(Config(study=one), {"study.flip": [0.2, 0.4], "seed": [1, 0]})
    assert len(configs.group(points)) == 1
    found = theory.sweep(points, None, mesh.make(1))[3]
    for name in ("cosine", "norm", "memorised", "test", "wrong", "bound"):
        for held, dim in ((0.0, 20), (3.0, 20), (0.0, 8)):
            a, b = of(found, name, held, dim), of(tiny, name, held, dim)[:1]
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_stored_run_is_the_same_and_not_computed_again(
    tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    config = Config(study=TINY)
    first = theory.run(config, None, mesh.make(1), store=tmp_path)
    stored = record.read(tmp_path / "early_learning_theory" / configs.fingerprint(config))
    assert stored.done
    monkeypatch.setattr(phases, "measure", None)  # nothing can be computed
    second = theory.run(config, None, mesh.make(1), store=tmp_path)
    for found in (first, second):
        assert_frame_equal(found.frames["phases"], tiny.frames["phases"], check_exact=True)


# ---- the bound ----------------------------------------------------------------------------------


def test_the_bound_is_two_tails_of_a_binomial() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n, dim, flip in ((400, 380, 0.4), (400, 330, 0.4), (50, 45, 0.5), (10, 10, 1.0)):
        wanted = 2 * stats.binom.cdf(n - dim, n, flip / 2)
        np.testing.assert_allclose(phases.separability_bound(n, dim, flip), wanted, rtol=1e-10)
    assert phases.separability_bound(400, 380, 0.4) < 1e-10
    assert phases.separability_bound(400, 100, 0.4) > 1  # says nothing
    assert phases.separability_bound(5, 6, 0.4) == 0


@pytest.mark.parametrize(("n", "dim"), [(8, 6), (12, 9), (30, 25), (12, 3)])
def test_planes_fail_no_more_often_than_the_bound_allows(n: int, dim: int) -> None:
    """Whether all noisy labels can be fitted is a linear program, solved for each draw."""
    optimize = pytest.importorskip("scipy.optimize")
    trials, failed, flip = 300, 0, 0.5
    for seed in range(trials):
        data, _ = synthetic.opposite_gaussians(seed, n=n, dim=dim, sigma=0.5, flip=flip)
        signed = (2.0 * data.y - 1)[:, None] * data.x
        found = optimize.linprog(
            np.zeros(dim), A_ub=-signed, b_ub=-np.ones(n), bounds=(None, None), method="highs"
        )
        failed += found.status == 2  # infeasible
    part, bound = failed / trials, min(phases.separability_bound(n, dim, flip), 1.0)
    assert part <= bound + 4 * math.sqrt(max(bound * (1 - bound), 1e-12) / trials)
    if dim < n / 2:
        assert part > 0.3 and bound == 1  # where planes do fail, the bound does not say otherwise


def test_the_bound_allows_what_cover_counted() -> None:
    """Labels that are random altogether: P = P[Bin(n - 1, 1/2) <= n - 1 - dim], exactly."""
    for n in (2, 5, 11):
        for dim in range(1, n + 1):
            exact = sum(math.comb(n - 1, k) for k in range(n - dim)) / 2 ** (n - 1)
            assert exact <= phases.separability_bound(n, dim, 1.0)


@pytest.mark.parametrize("wrong", [(0, 1, 0.4), (5, 0, 0.4), (5, 5, 1.2)])
def test_bad_sizes(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="need examples and dim >= 1 and flip from 0 to 1"):
        phases.separability_bound(*wrong)


# ---- the basin ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def basins() -> Findings:
    return theory.run(Config(study=Basin(lambdas=(1.0, 1.9, 2.1, 3.0, 5.0, 7.0))), None)


def threshold(basins: Findings, case: str, elr_lambda: float) -> tuple[float, float]:
    """Measured and predicted."""
    rows = basins.frames["basin"].filter(pl.col("case") == case, pl.col("elr_lambda") == elr_lambda)
    return rows.select("measured", "predicted").row(0)


@pytest.mark.parametrize("case", ["two classes", "many classes"])
def test_the_basin_begins_where_the_formula_says(basins: Any, case: str) -> None:  # A3
    for elr_lambda, wanted in ((3.0, 0.75), (5.0, 0.625), (7.0, 0.5833)):
        measured, predicted = threshold(basins, case, elr_lambda)
        assert abs(measured - wanted) <= 0.005
        np.testing.assert_allclose(predicted, wanted, atol=1e-4)


@pytest.mark.parametrize("case", ["two classes", "many classes"])
def test_below_two_there_is_no_basin(basins: Any, case: str) -> None:  # A3
    true = basins.arrays["true"].at(case=case, step=4000)
    starts = true.coords["start"]
    true = true.at(start=starts[np.argmin(abs(starts - 0.99))])
    assert true.dims == ("elr_lambda",)
    assert true.at(elr_lambda=1.0).values < 0.1 and true.at(elr_lambda=1.9).values < 0.1
    assert true.at(elr_lambda=2.1).values > 0.9


def test_the_formula_asks_for_the_rest_to_be_at_the_label(basins: Any) -> None:
    """Spread over nine classes the basin is another: measured .731, .460 and .363."""
    for elr_lambda, wanted in ((3.0, 0.731), (5.0, 0.460), (7.0, 0.363)):
        assert abs(threshold(basins, "spread", elr_lambda)[0] - wanted) <= 0.005


def test_starts_are_as_asked(basins: Any) -> None:
    for case in ("two classes", "many classes", "spread"):
        true = basins.arrays["true"].at(case=case, step=0)
        assert true.dims == ("elr_lambda", "start") and true.values.shape == (6, 200)
        np.testing.assert_allclose(
            true.values, np.broadcast_to(true.coords["start"], true.values.shape), 1e-4
        )


@pytest.mark.parametrize("elr_lambda", [2.5, 3.0, 5.0, 10.0])
def test_the_force_changes_sign_at_the_threshold(elr_lambda: float) -> None:
    """From the gradient of the losses, with targets that agree with the prediction."""
    with jax.enable_x64(True):

        def force(q: float) -> float:
            logits = jnp.log(jnp.array([[q, 1 - q]]))
            label = jnp.array([1], jnp.int32)

            def total(z: jax.Array) -> jax.Array:
                each = losses.cross_entropy(z, label)
                return (each + elr_lambda * losses.elr(z, jax.nn.softmax(logits))).sum()

            return float(jnp.array([-1.0, 1.0]) @ jax.grad(total)(logits)[0])

        q = basin.threshold(elr_lambda)
        assert abs(force(q)) < 1e-12
        assert force(q + 0.01) > 1e-4 and force(q - 0.01) < -1e-4


def test_the_threshold() -> None:
    wanted = {0.0: 1.0, 2.0: 1.0, 2.5: 0.8333, 3.0: 0.75, 5.0: 0.625, 7.0: 0.5833, 10.0: 0.5556}
    for elr_lambda, value in wanted.items():
        assert round(basin.threshold(elr_lambda), 4) == value
    with pytest.raises(ValueError, match="elr_lambda must be >= 0, got -1.0"):
        basin.threshold(-1.0)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [((0, 0, 1, 1), 0.5), ((0, 0, 0, 0), 1.0), ((1, 1, 1, 1), 0.0), ((0, 1, 0, 1), 0.75)],
)
def test_the_place_between(held: tuple, wanted: float) -> None:
    starts = np.array([0.125, 0.375, 0.625, 0.875])
    assert basin._between(starts, np.array(held, bool)) == wanted


# ---- distillation -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled() -> Findings:
    return theory.run(Config(study=Distillation()), None)


def lost(found: Findings, method: str, step: int | None, alpha: float | None = None) -> np.ndarray:
    """By replica."""
    rows = found.frames["distillation"].filter(
        pl.col("method") == method, pl.col("step").eq_missing(step)
    )
    rows = rows if alpha is None else rows.filter(pl.col("alpha") == alpha)
    return rows.sort("replica")["loss"].to_numpy()


def test_ground_truth_dampens_the_regularization(distilled: Any) -> None:  # A10
    first, last = lost(distilled, "fixed", 1, 0.0), lost(distilled, "fixed", 10, 0.0)
    assert lost(distilled, "fixed", 3, 0.0).mean() < first.mean() - 0.01  # it helps
    assert last.mean() > first.mean() + 0.03  # ... and then fits nothing
    some = lost(distilled, "fixed", 10, 0.35)
    assert some.mean() < first.mean() - 0.01
    np.testing.assert_allclose(some, lost(distilled, "limit", None, 0.35), rtol=0.02, atol=1e-3)
    truth = np.sin(2 * np.pi * np.linspace(0, 1, 101))
    np.testing.assert_allclose(lost(distilled, "limit", None, 0.0), (truth**2).mean(), rtol=1e-6)


def test_ground_truth_alone_changes_nothing(distilled: Any) -> None:
    for step in (2, 10, None):
        method = "fixed" if step else "limit"
        same = lost(distilled, method, step, 1.0)
        np.testing.assert_allclose(same, lost(distilled, "fixed", 1, 1.0), rtol=1e-4)


def test_the_weight_from_held_out_examples_needs_no_grid(distilled: Any) -> None:
    best = lost(distilled, "best", 10)
    for alpha in Distillation().alphas:
        assert best.mean() < lost(distilled, "fixed", 10, alpha).mean()
    rows = distilled.frames["distillation"].filter(pl.col("method") == "best")
    weights, own = (rows.filter(pl.col("step") == 2)[n].to_numpy() for n in ("alpha", "training"))
    assert rows.filter(pl.col("step") == 1)["alpha"].is_null().all()
    assert (own > weights).mean() > 0.95 and (own > 1).all()  # the training examples' is too large


def test_arrays_are_of_one_problem(distilled: Any) -> None:
    found, alphas = distilled.arrays, Distillation().alphas
    arrays = {name: array.values for name, array in found.items()}
    n, steps = 11, 10
    assert arrays["shrinkage"].shape == (len(alphas), steps, n)
    assert arrays["curves"].shape == (len(alphas), steps, 101)
    d = arrays["eigenvalues"]
    assert (np.diff(d) < 0).all()
    np.testing.assert_allclose(arrays["shrinkage"][0, 3], (d / (d + 0.2)) ** 4, rtol=1e-4)
    kernel = np.exp(-80 * (arrays["x"][:, None] - arrays["x"]) ** 2)
    wide = np.exp(-80 * (found["curves"].coords["x"][:, None] - arrays["x"]) ** 2)
    plain = wide @ np.linalg.solve(kernel + 0.2 * np.eye(n), arrays["y"])
    np.testing.assert_allclose(arrays["curves"][2, 0], plain, rtol=0, atol=1e-4)


def test_a_study_is_run_and_drawn_from_the_command_line(tmp_path: Path) -> None:
    runs, out = str(tmp_path / "runs"), tmp_path / "out"
    study = ("--study", "distillation", "--study.replicas", "3", "--runs", runs)
    for command in (
        ("experiments", "early_learning_theory", *study),
        ("paper_figures", "self_distillation", "--runs", runs, "--out", str(out)),
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert (out / "self_distillation.pdf").exists() and "claims on 11 values" in done.stdout


# ---- configs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("study", "values", "message"),
    [
        (Phases, {"lambdas": (1.0, 2.0)}, r"Phases.lambdas must begin with 0, got \(1.0, 2.0\)"),
        (Phases, {"lambdas": (0.0, 2.0, 2.0)}, "must be one or more rising values"),
        (Phases, {"dim": 1}, "Phases.dim must be >= 2, got 1"),
        (Phases, {"flip": 1.5}, "Phases.flip must be >= 0 and <= 1, got 1.5"),
        (Basin, {"lambdas": ()}, "Basin.lambdas must be one or more rising values"),
        (Distillation, {"alphas": (0.0, 0.5)}, "Distillation.alphas must hold 0 and 1"),
    ],
)
def test_bad_values_are_refused(study: Any, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(**values)


def test_a_mesh_must_take_the_population() -> None:
    with pytest.raises(ValueError, match="the number of members must be a multiple"):
        theory.run(Config(study=TINY), None, mesh.make(3))
    with pytest.raises(ValueError, match="the number of members must be a multiple"):
        theory.run(Config(study=Basin(lambdas=(3.0,), starts=5)), None, mesh.make(2))
