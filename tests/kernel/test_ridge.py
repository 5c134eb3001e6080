"""Self-distillation in kernel ridge regression: the published numbers, and every identity."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynamics.kernel import ridge

# Eleven noisy values of sin(2 pi x) on [0, 1]; kernel exp(-80 (x - z)^2), ridge 0.2.
Y = [
    *(0.38476636465198066, 1.2333967683416893, 1.33232242217057, 0.6920159488889518),
    *(-0.29756145531871736, -0.24189291901377769, -0.7964485769175675, -0.9616480167034174),
    *(-0.49672509509916934, -0.3469066003991437, 0.5589512650600734),
]
GAMMA, RIDGE = 80.0, 0.2
LOSSES = {  # of students 1 to 6, and of the limit
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
}


@pytest.fixture(autouse=True)
def double() -> Any:
    with jax.enable_x64(True):
        yield


def problem() -> tuple[jax.Array, jax.Array, jax.Array]:
    """K(X, X), y, K(grid, X)."""
    x, grid = jnp.linspace(0, 1, 11)[:, None], jnp.linspace(0, 1, 101)[:, None]
    return ridge.gaussian(x, x, GAMMA), jnp.array(Y), ridge.gaussian(grid, x, GAMMA)


def loss(coefficients: jax.Array) -> float:
    _, _, wide = problem()
    truth = jnp.sin(2 * jnp.pi * jnp.linspace(0, 1, 101))
    return float(jnp.mean((ridge.predict(wide, coefficients) - truth) ** 2))


def dense(kernel: Any, y: Any, alphas: Any, penalty: float) -> list[np.ndarray]:
    """Predictions of each student on the training examples, step by step as they are defined."""
    kernel, y = np.asarray(kernel), np.asarray(y)
    smooth = kernel @ np.linalg.inv(kernel + penalty * np.eye(len(y)))
    found = [y]
    for alpha in alphas:
        found.append(smooth @ (alpha * y + (1 - alpha) * found[-1]))
    return found[1:]


@pytest.mark.parametrize("alpha", LOSSES)
def test_the_published_table(alpha: float) -> None:
    kernel, y, _ = problem()
    students = ridge.distill(kernel, y, jnp.full(6, alpha), RIDGE)
    found = [*map(loss, students), loss(ridge.limit(kernel, y, alpha, RIDGE))]
    np.testing.assert_allclose(found, LOSSES[alpha], rtol=0, atol=1e-5)


@pytest.mark.parametrize("outputs", [(), (3,)])
def test_students_are_those_of_the_definition(outputs: Any) -> None:
    kernel, _, _ = problem()
    y = jnp.array(np.random.default_rng(0).normal(size=(11, *outputs)))
    alphas = jnp.array([0.9, 0.0, 0.3, 1.0, 0.55])
    students = ridge.distill(kernel, y, alphas, RIDGE)
    assert students.shape == (5, 11, *outputs) and students.dtype == jnp.float64
    for student, wanted in zip(students, dense(kernel, y, alphas, RIDGE), strict=True):
        np.testing.assert_allclose(ridge.predict(kernel, student), wanted, rtol=0, atol=1e-10)
    np.testing.assert_allclose(students[0], ridge.fit(kernel, y, RIDGE), rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.7, 1.0])
def test_the_closed_form_in_the_eigenbasis(alpha: float) -> None:
    kernel, y, _ = problem()
    d, v = jnp.linalg.eigh(kernel)
    steps, a = 7, d / (d + RIDGE)
    left = ridge.shrinkage(d, jnp.full(steps, alpha), RIDGE)
    for t in range(1, steps + 1):
        sums = sum((1 - alpha) ** i * a ** (i + 1) for i in range(t - 1))
        wanted = (1 - alpha) ** (t - 1) * a**t + alpha * sums
        np.testing.assert_allclose(left[t - 1], wanted, rtol=0, atol=1e-10)
    students = ridge.distill(kernel, y, jnp.full(steps, alpha), RIDGE)
    for student, diagonal in zip(students, left, strict=True):
        predicted = ridge.predict(kernel, student)
        np.testing.assert_allclose(predicted, v @ (diagonal * (v.T @ y)), rtol=0, atol=1e-10)


def test_without_ground_truth_what_is_left_is_ever_sparser() -> None:
    """Ratios of consecutive diagonals grow; with all ground truth nothing changes."""
    d = jnp.linalg.eigvalsh(problem()[0])[::-1]
    ratios = [b[:-1] / b[1:] for b in ridge.shrinkage(d, jnp.zeros(5), RIDGE)]
    for before, after in zip(ratios, ratios[1:], strict=False):
        assert (after > before).all()
    same = ridge.shrinkage(d, jnp.ones(5), RIDGE)
    np.testing.assert_allclose(same, jnp.stack([same[0]] * 5), rtol=0, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 0.35, 1.0])
def test_the_limit_is_a_larger_ridge(alpha: float) -> None:
    kernel, y, _ = problem()
    limit = ridge.limit(kernel, y, alpha, RIDGE)
    np.testing.assert_allclose(limit, ridge.fit(kernel, y, RIDGE / alpha), rtol=0, atol=1e-10)
    students = ridge.distill(kernel, y, jnp.full(200, alpha), RIDGE)
    np.testing.assert_allclose(students[-1], limit, rtol=0, atol=1e-10)
    apart = [float(jnp.linalg.norm(kernel @ (s - limit))) for s in students[:12]]
    d = jnp.linalg.eigvalsh(kernel)
    rate = (1 - alpha) * float((d / (d + RIDGE)).max())
    assert all(b <= rate * a + 1e-14 for a, b in zip(apart, apart[1:], strict=False))


def test_without_ground_truth_the_limit_is_nothing() -> None:
    kernel, y, _ = problem()
    np.testing.assert_array_equal(ridge.limit(kernel, y, 0.0, RIDGE), np.zeros(11))


def test_the_best_weight_is_the_minimum_of_a_parabola() -> None:
    kernel, y, _ = problem()
    generator = np.random.default_rng(1)
    held = jnp.array(generator.random((50, 1)))
    held_y = jnp.sin(2 * jnp.pi * held[:, 0]) + 0.5 * jnp.array(generator.normal(size=50))
    cross = ridge.gaussian(held, jnp.linspace(0, 1, 11)[:, None], GAMMA)
    after = ridge.distill(kernel, y, jnp.array([1.0, 0.0]), RIDGE)
    plain, student = (ridge.predict(cross, c) for c in after)
    best = float(ridge.best_weight(plain, student, held_y))

    def error(alpha: float) -> float:
        mixed = ridge.distill(kernel, y, jnp.array([1.0, alpha]), RIDGE)[1]
        return float(jnp.mean((ridge.predict(cross, mixed) - held_y) ** 2))

    slope = (error(best + 1e-3) - error(best - 1e-3)) / 2e-3
    assert abs(slope) < 1e-10  # a student of any weight is the mixture: a parabola, exactly
    assert error(best) < min(error(a) for a in np.linspace(-1, 2, 31))
    assert np.isnan(ridge.best_weight(plain, plain, held_y))


def test_the_best_weight_on_training_examples_is_too_large() -> None:
    kernel, y, _ = problem()
    plain, student = (
        ridge.predict(kernel, c) for c in ridge.distill(kernel, y, jnp.array([1.0, 0.0]), RIDGE)
    )
    assert round(float(ridge.best_weight(plain, student, y)), 2) == 2.24


def test_numbers_keep_their_precision() -> None:
    x = jnp.linspace(0, 1, 5, dtype=jnp.float32)[:, None]
    kernel, y = ridge.gaussian(x, x, GAMMA), jnp.ones(5, jnp.float32)
    alphas = jnp.full(3, 0.5, jnp.float32)
    students = ridge.distill(kernel, y, alphas, RIDGE)
    left = ridge.shrinkage(y, alphas, RIDGE)
    limit = ridge.limit(kernel, y, 0.5, RIDGE)
    weight = ridge.best_weight(y, 2 * y, y)
    assert {a.dtype.name for a in (kernel, students, left, limit, weight)} == {"float32"}
