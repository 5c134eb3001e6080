"""Importance sampling: the variance it has is the one computed, and no bias comes with it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from references import scores as reference
from scipy.stats import chi2

from dynamics import mesh, population
from dynamics.data.rows import take
from dynamics.data.stream import sampled
from dynamics.scores.select import gradient_variance, probabilities

FEW = settings(derandomize=True, deadline=None, max_examples=50)
STEPS = 3000
# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# ---- probabilities ------------------------------------------------------------------------------


def test_probabilities_by_hand() -> None:
    scores = np.array([3.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(probabilities(scores, uniform=0.0), [0.75, 0.25, 0, 0])
    np.testing.assert_allclose(probabilities(scores, uniform=0.2), [0.65, 0.25, 0.05, 0.05])
    np.testing.assert_array_equal(probabilities(scores, uniform=1.0), np.full(4, 0.25))
    np.testing.assert_array_equal(probabilities(np.zeros(5)), np.full(5, 0.2))
    tiny_scores, large = scores * 1e-320, scores * 5e307
    np.testing.assert_allclose(probabilities(tiny_scores), probabilities(scores), rtol=1e-3)
    np.testing.assert_allclose(probabilities(large), probabilities(scores))


@FEW
@given(
    scores=st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=50),
    uniform=st.floats(0, 1),
)
def test_the_uniform_part_bounds_the_weights(scores: Any, uniform: float) -> None:
    p = probabilities(np.array(scores, np.float32), uniform=uniform)
    assert p.dtype == np.float64 and abs(p.sum() - 1) < 1e-12 and (p >= 0).all()
    assert (p * len(p) >= uniform * (1 - 1e-12)).all()  # 1 / (n p) <= 1 / uniform


@pytest.mark.parametrize(
    ("scores", "uniform", "words"),
    [
        ([0.0, -1.0], 0.1, ["scores", "not negative", "1 others of 2"]),
        ([np.nan, np.inf], 0.1, ["scores", "finite", "2 others of 2"]),
        ([1.0], 1.1, ["uniform", "0..1", "1.1"]),
        ([1.0], -0.1, ["uniform", "0..1", "-0.1"]),
    ],
)
def test_what_is_no_score_is_refused(scores: Any, uniform: float, words: Any) -> None:
    with pytest.raises(ValueError) as error:
        probabilities(np.array(scores), uniform=uniform)
    assert all(word in str(error.value) for word in words), error.value


# ---- the variance -------------------------------------------------------------------------------


@functools.cache
def trained() -> Any:
    """A task, a state of 20 steps, all examples as one batch and their gradients in float64."""
    p = tiny.problem("mlp")
    state = tiny.run(p, mesh.make(), 1).state
    assert state is not None
    key = jax.random.key(0)
    state = population.take(state, 0).replace(key=())
    state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state).replace(key=key)
    data = jax.tree.map(jnp.asarray, p.data)
    batch = take(data, jnp.arange(len(p.data)))
    return p, state, batch, reference.gradients(p.task, state, batch)


def enumerated(gradients: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and trace of the covariance of g_i / (n p_i) from all i."""
    seen = p > 0
    estimates = gradients[seen] / (len(p) * p[seen, None])
    mean = (p[seen, None] * estimates).sum(axis=0)
    return mean, float((p[seen] * ((estimates - mean) ** 2).sum(axis=1)).sum())


def norms_of(gradients: np.ndarray) -> tuple[np.ndarray, float]:
    return np.linalg.norm(gradients, axis=1), float(np.linalg.norm(gradients.mean(axis=0)))


@pytest.mark.parametrize("source", ["network", "random", "zeros"])
def test_the_variance_is_that_of_all_draws(source: str) -> None:
    generator = np.random.default_rng(0)
    gradients = trained()[3] if source == "network" else generator.normal(size=(30, 7))
    if source == "zeros":
        gradients[::3] = 0
    norms, mean_norm = norms_of(gradients)
    n = len(norms)
    chances = [probabilities(norms), probabilities(norms, uniform=0.0), np.full(n, 1 / n)]
    chances += list(generator.dirichlet(np.ones(n), 5))
    for p in chances:
        mean, trace = enumerated(gradients, p)
        np.testing.assert_allclose(mean, gradients.mean(axis=0), rtol=1e-9, atol=1e-12)
        found = gradient_variance(norms, p, mean_norm=mean_norm)
        np.testing.assert_allclose(found, trace, rtol=1e-9)
    plain = gradient_variance(norms, mean_norm=mean_norm)
    np.testing.assert_allclose(plain, enumerated(gradients, np.full(n, 1 / n))[1], rtol=1e-9)


def test_nothing_beats_the_length_of_the_gradient() -> None:
    norms, mean_norm = norms_of(trained()[3])
    best = gradient_variance(norms, probabilities(norms, uniform=0.0), mean_norm=mean_norm)
    np.testing.assert_allclose(best, norms.mean() ** 2 - mean_norm**2, rtol=1e-9)
    generator = np.random.default_rng(1)
    for spread in (0.3, 1, 10, 1000):  # anything, and close to the best
        for p in generator.dirichlet(spread * norms / norms.mean(), 200):
            p = np.maximum(p, 1e-12) / np.maximum(p, 1e-12).sum()
            assert gradient_variance(norms, p, mean_norm=mean_norm) > best
    mixed = [
        gradient_variance(norms, probabilities(norms, uniform=u), mean_norm=mean_norm)
        for u in (0.0, 0.1, 0.5, 1.0)
    ]
    assert mixed == sorted(mixed)
    np.testing.assert_allclose(mixed[-1], gradient_variance(norms, mean_norm=mean_norm), rtol=1e-9)


@pytest.mark.parametrize(
    ("norms", "p", "words"),
    [
        ([1.0, 2.0], [0.5, 0.6], ["2 numbers that sum to 1", "sum to 1.1"]),
        ([1.0, 2.0], [0.5, 0.5, 0.0], ["2 numbers", "got 3"]),
        ([1.0, 2.0], [1.0, 0.0], ["positive", "1 that are 0", "uniform"]),
        ([1.0, 2.0], [1.5, -0.5], ["probabilities", "not negative"]),
        ([1.0, -2.0], [0.5, 0.5], ["norms", "not negative"]),
    ],
)
def test_what_has_no_variance_is_refused(norms: Any, p: Any, words: Any) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError) as error:
            gradient_variance(np.array(norms), np.array(p), mean_norm=0.5)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert all(word in str(error.value) for word in words), error.value


# ---- the stream ---------------------------------------------------------------------------------


@functools.cache
def measured() -> dict[str, Any]:
    """Gradients of the weighted loss of STEPS drawn batches: by importance, and uniformly."""
    p, state, _, gradients = trained()
    norms, mean_norm = norms_of(gradients)
    n = len(norms)
    chances = np.stack([probabilities(norms), np.full(n, 1 / n)])
    made = sampled(p.data, tiny.BATCH, 2, chances)
    shared = jax.tree.map(jnp.asarray, made.shared)

    def gradient(own: Any, key: Any, step: Any) -> Any:
        batch = made.batch(shared, own, (), key, step)

        def loss(params: Any) -> Any:
            return p.task.loss(params, state.extras, batch, key, state.hyperparameters)[0]

        parts = jax.tree.leaves(jax.grad(loss)(state.params))
        return batch, jnp.concatenate([part.ravel() for part in parts])

    run = jit(jax.vmap(jax.vmap(gradient, (None, None, 0)), (0, 0, None)))
    batch, found = run(made.own, jax.random.split(jax.random.key(3), 2), jnp.arange(STEPS))
    formula = [gradient_variance(norms, c, mean_norm=mean_norm) / tiny.BATCH for c in chances]
    return {
        "batch": jax.tree.map(np.asarray, batch),
        "gradients": np.asarray(found, np.float64),
        "formula": formula,
        "chances": chances,
        "mean": gradients.mean(axis=0),
    }


@pytest.mark.parametrize("s", [0, 1], ids=["importance", "uniform"])
def test_weighted_batches_are_unbiased(s: int) -> None:
    """Along random directions and the gradient's own, and in length."""
    found = measured()
    draws, mean = found["gradients"][s], found["mean"]
    directions = np.random.default_rng(0).normal(size=(20, len(mean)))
    directions = np.concatenate([directions, mean[None]])
    along = (draws - mean) @ directions.T
    error = along.std(axis=0, ddof=1) / np.sqrt(STEPS)
    assert (np.abs(along.mean(axis=0)) < 4 * error).all()
    length = np.linalg.norm(draws.mean(axis=0) - mean)
    assert length**2 < 2 * found["formula"][s] / STEPS


def test_the_measured_variance_is_the_formulas() -> None:
    found = measured()
    squares = ((found["gradients"] - found["mean"]) ** 2).sum(axis=2)
    error = squares.std(axis=1, ddof=1) / np.sqrt(STEPS)
    assert (np.abs(squares.mean(axis=1) - found["formula"]) < 4 * error).all()
    gain = squares[1].mean() - squares[0].mean()
    assert gain > 4 * np.hypot(*error)


@pytest.mark.parametrize("s", [0, 1], ids=["importance", "uniform"])
def test_draws_follow_the_probabilities(s: int) -> None:
    found = measured()
    drawn, p = found["batch"].index[s], found["chances"][s]
    counts, wanted = np.bincount(drawn.ravel(), minlength=len(p)), drawn.size * p
    statistic = ((counts - wanted) ** 2 / wanted).sum()
    assert 1e-4 < chi2.sf(statistic, len(p) - 1) < 1 - 1e-4
    weight = found["batch"].weight[s]
    np.testing.assert_allclose(weight, 1 / (len(p) * p[drawn]), rtol=1e-5)
    assert (weight <= 10).all() and (s == 0 or (weight == 1).all())
    first = drawn[:, 0]  # places of a batch, and batches, are independent draws
    again = (drawn[:, 1] == first).sum(), (first[1:] == first[:-1]).sum()
    chance = (p**2).sum()
    assert (np.abs(np.array(again) / STEPS - chance) < 4 * np.sqrt(chance / STEPS)).all()


def test_what_has_no_chance_is_never_drawn() -> None:
    p = trained()[0]
    chances = np.random.default_rng(2).random((1, len(p.data)))
    never = np.r_[0:7, 20:25, 38:40]
    chances[:, never] = 0
    chances /= chances.sum()
    made = sampled(p.data, tiny.BATCH, 1, chances)
    shared = jax.tree.map(jnp.asarray, made.shared)
    own = jax.tree.map(lambda x: jnp.asarray(x[0]), made.own)

    def drawn(step: Any) -> Any:
        return made.batch(shared, own, (), jax.random.key(0), step).index

    rows = jit(jax.vmap(drawn))(jnp.arange(STEPS))
    assert set(np.unique(rows)) == set(range(len(p.data))) - set(never.tolist())


def test_a_run_on_drawn_batches() -> None:
    """Training works, on the mean of weight * loss; uniform draws need no weights."""
    p, _, _, gradients = trained()
    norms = norms_of(gradients)[0]
    n = len(norms)
    longer = p._replace(num_steps=40)
    stream = sampled(p.data, tiny.BATCH, 2, np.stack([probabilities(norms), np.full(n, 1 / n)]))
    state = tiny.start(longer, mesh.make(), 2)
    results = tiny.run(longer, mesh.make(), 2, state=state, stream=stream)
    loss = results.rows["loss"].to_numpy().reshape(40, 2)
    assert np.isfinite(loss).all()
    assert (loss[-10:].mean(axis=0) < 0.8 * loss[:5].mean(axis=0)).all()

    def first(params: Any, extras: Any, key: Any, own: Any) -> Any:
        shared = jax.tree.map(jnp.asarray, stream.shared)
        batch = stream.batch(shared, own, (), key, jnp.int32(0))
        return batch, p.task.evaluate(params, extras, batch, {}).loss

    batch, each = jit(jax.vmap(first))(state.params, state.extras, state.key, stream.own)
    assert (batch.weight[0] != 1).all() and (batch.weight[1] == 1).all()
    np.testing.assert_allclose(loss[0], (batch.weight * each).mean(axis=1), rtol=1e-5)
