"""Self-distillation in kernel ridge regression, with a part of the ground truth at every step.

Reference: Borup and Andersen 2021, arXiv 2102.13088.
"""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics.kernel import ridge
from dynamics.record import Array, Findings
from experiments.early_learning_theory.config import Config, Distillation
from experiments.experiment import Job

GRID = 101  # places on [0, 1] at which a student is compared with the truth


def measure(job: Job[Config, Distillation]) -> Findings:
    """Frame ``distillation``: mean squared distance ``loss`` of student ``step`` (from 1) to
    sin(2 pi x) on [0, 1].

    ``method`` is "fixed" (the same ``alpha`` at every step), "limit" (step infinity of that alpha,
    null) or "best": at every step but the first the weight that is best on held-out noisy examples,
    of replica ``replica``; ``alpha`` is that weight, ``training`` the one the training examples
    would give. Arrays, where nothing depends on the noise: ``eigenvalues`` f32[direction], falling,
    and ``shrinkage`` f32[alpha, step, direction]; of replica 0: ``x`` and ``y`` f32[example],
    ``curves`` f32[alpha, step, x]. Everything is computed on one device, whatever the mesh,
    and solved, not trained: none ``diverged``.
    """
    found = []
    for p, (point, study) in enumerate(zip(job.points, job.studies, strict=True)):
        frame, arrays = _students(study, point.seed)
        found.append((frame.with_columns(point=pl.lit(p), diverged=pl.lit(None, pl.Int64)), arrays))
    arrays = {
        name: array._replace(
            values=np.stack([own[name].values for _, own in found]), dims=("point", *array.dims)
        )
        for name, array in found[0][1].items()
    }
    return Findings({"distillation": pl.concat([frame for frame, _ in found])}, arrays)


def _students(study: Distillation, seed: int) -> tuple[pl.DataFrame, dict[str, Array]]:
    """Those of one point."""
    y, held_x, held_y = _draw(study, seed)
    x, grid = jnp.linspace(0, 1, study.examples), jnp.linspace(0, 1, GRID)
    alphas = jnp.float32(study.alphas)
    kernel, wide = _kernel(x, x, study), _kernel(grid, x, study)

    def fixed(y: jax.Array, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
        students = ridge.distill(kernel, y, jnp.full(study.steps, alpha), study.ridge)
        last = ridge.limit(kernel, y, alpha, study.ridge)
        return jax.vmap(lambda c: ridge.predict(wide, c))(students), ridge.predict(wide, last)

    over = jax.vmap(jax.vmap(fixed, (None, 0)), (0, None))  # replicas, then alphas
    curves, ends = jax.jit(over)(y, alphas)
    best = jax.jit(jax.vmap(lambda *own: _best(study, *own)))(y, held_x, held_y)
    eigenvalues = jnp.linalg.eigvalsh(kernel)[::-1]
    repeated = jnp.broadcast_to(alphas[:, None], (len(alphas), study.steps))
    left = jax.vmap(lambda a: ridge.shrinkage(eigenvalues, a, study.ridge))(repeated)
    at = {"alpha": np.array(study.alphas), "step": np.arange(study.steps) + 1}
    arrays = {
        "eigenvalues": Array(np.asarray(eigenvalues), ("direction",)),
        "shrinkage": Array(np.asarray(left), ("alpha", "step", "direction"), at),
        "x": Array(np.asarray(x), ("example",)),
        "y": Array(np.asarray(y[0]), ("example",)),
        "curves": Array(np.asarray(curves[0]), ("alpha", "step", "x"), at | {"x": np.array(grid)}),
    }
    return _frame(at, _loss(curves), _loss(ends), *best), arrays


def _frame(
    at: dict[str, np.ndarray],
    fixed: np.ndarray,
    ends: np.ndarray,
    weights: jax.Array,
    training: jax.Array,
    curves: jax.Array,
) -> pl.DataFrame:
    """The losses, and the weights of the best students, which begin with the second."""
    by = ("replica", "step")
    later = {"step": at["step"][1:]}
    best = Array(_loss(curves), by, at).frame("loss")
    for name, chosen in (("alpha", weights), ("training", training)):
        own = Array(np.asarray(chosen, np.float64), by, later).frame(name)
        best = best.join(own, on=by, how="left", maintain_order="left")
    parts = {
        "fixed": Array(fixed, ("replica", "alpha", "step"), at).frame("loss"),
        "limit": Array(ends, ("replica", "alpha"), at).frame("loss"),
        "best": best,
    }
    frames = [frame.with_columns(method=pl.lit(name)) for name, frame in parts.items()]
    return pl.concat(frames, how="diagonal")


def _draw(study: Distillation, seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Labels [R, n], and held-out examples [R, m] twice."""
    generator = np.random.Generator(np.random.PCG64(seed))
    x = np.linspace(0, 1, study.examples)
    shape = (study.replicas, study.validated)
    y = np.sin(2 * np.pi * x) + study.noise * generator.standard_normal((shape[0], len(x)))
    held = generator.random(shape)
    held_y = np.sin(2 * np.pi * held) + study.noise * generator.standard_normal(shape)
    return jnp.float32(y), jnp.float32(held), jnp.float32(held_y)


def _kernel(a: jax.Array, b: jax.Array, study: Distillation) -> jax.Array:
    return ridge.gaussian(a[:, None], b[:, None], study.gamma)


def _best(
    study: Distillation, y: jax.Array, held_x: jax.Array, held_y: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One replica: the weight of each step, the one of the training examples, the curves."""
    x, grid = jnp.linspace(0, 1, study.examples), jnp.linspace(0, 1, GRID)
    kernel, held = _kernel(x, x, study), _kernel(held_x, x, study)
    plain = ridge.fit(kernel, y, study.ridge)

    def student(before: jax.Array, _: None) -> tuple[jax.Array, tuple]:
        alone = ridge.fit(kernel, ridge.predict(kernel, before), study.ridge)
        weight, own = (
            ridge.best_weight(ridge.predict(k, plain), ridge.predict(k, alone), labels)
            for k, labels in ((held, held_y), (kernel, y))
        )
        found = weight * plain + (1 - weight) * alone
        return found, (weight, own, found)

    _, (weights, training, found) = jax.lax.scan(student, plain, None, length=study.steps - 1)
    curves = jnp.concatenate([plain[None], found]) @ _kernel(grid, x, study).T
    return weights, training, curves


def _loss(curves: jax.Array) -> np.ndarray:
    """Mean squared distance to the truth over the last axis."""
    truth = np.sin(2 * np.pi * np.linspace(0, 1, GRID))
    return np.mean((np.asarray(curves, np.float64) - truth) ** 2, axis=-1)
