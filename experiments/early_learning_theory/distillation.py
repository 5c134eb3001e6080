"""Self-distillation in kernel ridge regression, with a part of the ground truth at every step.

Reference: Borup and Andersen 2021, arXiv 2102.13088.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics.kernel import ridge
from dynamics.record import Recorder, Table
from experiments.early_learning_theory.config import Config, Distillation

GRID = 101  # places on [0, 1] at which a student is compared with the truth


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows: mean squared distance ``loss`` of student ``step`` (from 1) to sin(2 pi x) on [0, 1].

    ``method`` is "fixed" (the same ``alpha`` at every step), "limit" (step infinity of that alpha)
    or "best": at every step the weight that is best on held-out noisy examples, of replica
    ``replica``; ``alpha`` is that weight, ``training`` the one the training examples would give.
    Arrays, where nothing depends on the noise: ``eigenvalues`` f32[n], falling, and ``shrinkage``
    f32[A, T, n]; of replica 0: ``x`` and ``y`` f32[n], ``grid`` f32[G], ``curves`` f32[A, T, G].
    Everything is computed on one device, whatever the mesh.
    """
    return [_table(point) for point in points]


def _table(point: Config) -> Table:
    choices = point.study
    assert isinstance(choices, Distillation)
    y, held_x, held_y = _draw(choices, point.seed)
    x, grid = jnp.linspace(0, 1, choices.examples), jnp.linspace(0, 1, GRID)
    alphas = jnp.float32(choices.alphas)
    kernel, wide = _kernel(x, x, choices), _kernel(grid, x, choices)

    def fixed(y: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        students = ridge.distill(kernel, y, jnp.full(choices.steps, alpha), choices.ridge)
        last = ridge.limit(kernel, y, alpha, choices.ridge)
        return jax.vmap(lambda c: ridge.predict(wide, c))(students), ridge.predict(wide, last)

    over = jax.vmap(jax.vmap(fixed, (None, 0)), (0, None))  # replicas, then alphas
    curves, ends = jax.jit(over)(y, alphas)
    weights, training, best = jax.jit(jax.vmap(lambda *own: _best(choices, *own)))(
        y, held_x, held_y
    )
    columns = _columns(choices, _loss(curves), _loss(ends), weights, training, _loss(best))
    eigenvalues = jnp.linalg.eigvalsh(kernel)[::-1]
    repeated = jnp.broadcast_to(alphas[:, None], (len(alphas), choices.steps))
    left = jax.vmap(lambda a: ridge.shrinkage(eigenvalues, a, choices.ridge))(repeated)
    arrays = {"eigenvalues": eigenvalues, "shrinkage": left, "x": x, "y": y[0], "grid": grid}
    arrays["curves"] = curves[0]
    return Table(columns, {name: np.asarray(value) for name, value in arrays.items()})


def _draw(choices: Distillation, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels [R, n], and held-out examples [R, m] twice."""
    generator = np.random.Generator(np.random.PCG64(seed))
    x = np.linspace(0, 1, choices.examples)
    shape = (choices.replicas, choices.validated)
    y = np.sin(2 * np.pi * x) + choices.noise * generator.standard_normal((shape[0], len(x)))
    held = generator.random(shape)
    held_y = np.sin(2 * np.pi * held) + choices.noise * generator.standard_normal(shape)
    return jnp.float32(y), jnp.float32(held), jnp.float32(held_y)


def _kernel(a: jax.Array, b: jax.Array, choices: Distillation) -> jax.Array:
    return ridge.gaussian(a[:, None], b[:, None], choices.gamma)


def _best(
    choices: Distillation, y: jax.Array, held_x: jax.Array, held_y: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One replica: the weight of each step, the one of the training examples, the curves."""
    x, grid = jnp.linspace(0, 1, choices.examples), jnp.linspace(0, 1, GRID)
    kernel, held = _kernel(x, x, choices), _kernel(held_x, x, choices)
    plain = ridge.fit(kernel, y, choices.ridge)

    def student(before: jax.Array, _: None) -> tuple[jax.Array, tuple]:
        alone = ridge.fit(kernel, ridge.predict(kernel, before), choices.ridge)
        weight, own = (
            ridge.best_weight(ridge.predict(k, plain), ridge.predict(k, alone), labels)
            for k, labels in ((held, held_y), (kernel, y))
        )
        found = weight * plain + (1 - weight) * alone
        return found, (weight, own, found)

    _, (weights, training, found) = jax.lax.scan(student, plain, None, length=choices.steps - 1)
    curves = jnp.concatenate([plain[None], found]) @ _kernel(grid, x, choices).T
    return weights, training, curves


def _loss(curves: jax.Array) -> np.ndarray:
    """Mean squared distance to the truth over the last axis."""
    truth = np.sin(2 * np.pi * np.linspace(0, 1, GRID))
    return np.mean((np.asarray(curves, np.float64) - truth) ** 2, axis=-1)


def _columns(
    choices: Distillation,
    fixed: np.ndarray,
    ends: np.ndarray,
    weights: jax.Array,
    training: jax.Array,
    best: np.ndarray,
) -> dict[str, np.ndarray]:
    rows = []
    for r in range(choices.replicas):
        for a, alpha in enumerate(choices.alphas):
            rows += [
                ("fixed", alpha, t + 1, r, loss, math.nan) for t, loss in enumerate(fixed[r, a])
            ]
            rows.append(("limit", alpha, math.inf, r, ends[r, a], math.nan))
        own = np.concatenate([[math.nan], weights[r]]), np.concatenate([[math.nan], training[r]])
        rows += [
            ("best", w, t + 1, r, loss, trained)
            for t, (w, trained, loss) in enumerate(zip(*own, best[r], strict=True))
        ]
    names = ("method", "alpha", "step", "replica", "loss", "training")
    columns = {n: np.array(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)}
    return {"stage": np.full(len(rows), "distillation")} | columns
