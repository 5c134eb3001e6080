"""Scores of one forward pass: float64 references, identities, and the ends of the scale."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import forward as reference
from references import losses as by_hand

from dynamics import mesh, population, scores, step
from dynamics.losses import cross_entropy
from dynamics.probes import Score
from dynamics.types import Aux, Batch, Task

FEW = settings(derandomize=True, deadline=None, max_examples=30)
NAMES = list(reference.SCORES)
each_score = pytest.mark.parametrize("name", NAMES)
B, K = 6, 5
logits = hnp.arrays(np.float32, (B, K), elements=st.floats(-30, 30, width=32))
labels = hnp.arrays(np.int32, B, elements=st.integers(0, K - 1))
INF = math.inf


def evaluate(params: Any, extras: Any, batch: Batch, hyperparameters: Any) -> Aux:
    """A network whose logits are its inputs."""
    each = cross_entropy(batch.x, batch.y)
    each = each.reshape(len(each), -1).mean(axis=1)
    return Aux(loss=each, logits=batch.x, y=batch.y, index=batch.index)


def refused(*args: Any) -> Any:
    raise AssertionError("scores evaluate")


NET = Task(refused, refused, evaluate)
STATE = step.given({})


@functools.cache
def compiled(name: str) -> Any:
    # tiny programs spend their time in the compiler
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(functools.partial(getattr(scores, name), NET), compiler_options=options)


def score(name: str, z: Any, y: Any) -> np.ndarray:
    z, y = np.asarray(z, np.float32), np.asarray(y, np.int32)
    batch = Batch(x=jnp.asarray(z), y=jnp.asarray(y), index=jnp.arange(len(z)))
    found = np.asarray(compiled(name)(STATE, batch))
    assert found.shape == (len(z),) and found.dtype == np.float32
    return found


def expected(name: str, z: Any, y: Any) -> np.ndarray:
    return np.array([reference.SCORES[name](row, k) for row, k in zip(z, y, strict=True)])


@each_score
@FEW
@given(z=logits, y=labels)
def test_against_float64(name: str, z: Any, y: Any) -> None:
    """Of logits that are multiples of 1/64, so that their differences are exact."""
    z = np.round(z * 64) / 64
    atol = 1e-14 if name == "probability_margin" else 0  # the reference subtracts, in float64
    np.testing.assert_allclose(score(name, z, y), expected(name, z, y), rtol=1e-5, atol=atol)


@each_score
@FEW
@given(z=logits, y=labels, order=st.permutations(range(K)), rows=st.permutations(range(B)))
def test_neither_classes_nor_examples_have_an_order(
    name: str, z: Any, y: Any, order: list[int], rows: list[int]
) -> None:
    renamed = np.argsort(order)[y].astype(np.int32)
    before = score(name, z, y)
    np.testing.assert_allclose(
        score(name, z[:, order], renamed), before, rtol=1e-5, atol=4e-6 * (name == "loss")
    )
    np.testing.assert_allclose(score(name, z[rows], y[rows]), before[rows], rtol=1e-6)


@each_score
def test_a_constant_added_to_all_logits_changes_nothing(name: str) -> None:
    """The sums are exact here, so no digit need be lost."""
    rows = np.array([[0, 1, -2], [3, 3, 3], [-1, 2, 0.5], [30, 1, 2]], np.float32)
    before = score(name, rows, [0, 1, 2, 0])
    for shift in (1024, -4096, 2**19):
        np.testing.assert_allclose(score(name, rows + shift, [0, 1, 2, 0]), before, rtol=1e-6)


# ---- closed forms -------------------------------------------------------------------------------


@each_score
def test_a_uniform_prediction(name: str) -> None:
    for k in (2, 10, 100):
        wanted = {
            "el2n": math.sqrt(1 - 1 / k),
            "loss": math.log(k),
            "entropy": math.log(k),
            "probability": 1 / k,
            "l1_error": 2 * (1 - 1 / k),
            "logit_margin": 0.0,
            "probability_margin": 0.0,
        }[name]
        np.testing.assert_allclose(score(name, np.full((2, k), 1.5), [0, k - 1]), wanted, 1e-6)


def test_two_classes() -> None:
    """With m the logit margin: p = 1 / (1 + exp(-m)), EL2N = sqrt 2 (1 - p), margin tanh(m / 2)."""
    m = np.linspace(-20, 20, 41)
    z, y = np.stack([m, 0 * m], axis=1), np.zeros(41, int)
    wrong = 1 / (1 + np.exp(m))
    wanted = {
        "el2n": math.sqrt(2) * wrong,
        "loss": np.log1p(np.exp(-m)),
        "probability": 1 / (1 + np.exp(-m)),
        "l1_error": 2 * wrong,
        "logit_margin": m,
        "probability_margin": np.tanh(m / 2),
    }
    for name, values in wanted.items():
        np.testing.assert_allclose(score(name, z, y), values, rtol=1e-5)


@FEW
@given(z=logits, y=labels)
def test_identities_between_the_scores(z: Any, y: Any) -> None:
    found = {name: score(name, z, y).astype(np.float64) for name in NAMES}
    wrong = found["l1_error"] / 2
    np.testing.assert_allclose(np.exp(-found["loss"]), found["probability"], rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(wrong, 1 - found["probability"], atol=1e-6)
    assert (wrong * math.sqrt(K / (K - 1)) <= found["el2n"] * (1 + 1e-6)).all()
    assert (found["el2n"] <= math.sqrt(2) * wrong * (1 + 1e-6)).all()
    assert (found["entropy"] <= math.log(K) * (1 + 1e-6)).all() and (found["entropy"] >= 0).all()
    sure = found["probability"] > 0.5  # more than half: no other can have more
    assert (found["probability_margin"][sure] > 0).all()
    right = z.argmax(axis=-1) == y
    assert (found["logit_margin"][right] >= 0).all() and (found["logit_margin"][~right] <= 0).all()


# ---- the ends of the scale ----------------------------------------------------------------------


@each_score
@pytest.mark.parametrize("gap", [12.0, 16.5, 21.0, 30.0, 60.0])
def test_easy_examples_keep_their_digits(name: str, gap: float) -> None:
    """p_y = 1 - 1e-5 ... 1 - 1e-26: the order of the easiest examples is not lost."""
    z = [[gap, 0.0, -1.0, -2.5]]
    np.testing.assert_allclose(score(name, z, [0]), expected(name, z, [0]), rtol=1e-4)


@each_score
def test_hard_examples_keep_their_digits(name: str) -> None:
    z = [[-gap, 0.0, -1.0, -2.5] for gap in (12.0, 21.0, 60.0)]
    wanted = expected(name, z, [0, 0, 0])
    np.testing.assert_allclose(score(name, z, [0, 0, 0]), wanted, rtol=1e-5)


def test_a_near_tie_keeps_its_digits() -> None:
    """p_y - p_k = p_y (1 - exp(-m)), not a difference of two rounded probabilities."""
    for m in (2.0**-20, 3 * 2.0**-21, 7 * 2.0**-22):
        found = score("probability_margin", [[1 + m, 1, 0.25], [1, 1 + m, 0.25]], [0, 0])
        wanted = -math.expm1(-m) / (1 + math.exp(-m) + math.exp(-0.75 - m))
        np.testing.assert_allclose(found, [wanted, -wanted], rtol=1e-6)


@each_score
def test_hopeless_and_certain_examples_have_a_score(name: str) -> None:
    """p_y = 0 in float32, or exactly; and p_y = 1."""
    z = [[-INF, 0, 0], [-INF, 3, -INF], [-3e38, 3e38, 0], [-200, 0, 0], [5, -INF, -INF]]
    log2 = math.log(2)
    wanted = {
        "el2n": np.sqrt([1.5, 2, 2, 1.5, 0]),
        "loss": [INF, INF, INF, 200 + log2, 0],
        "entropy": [log2, 0, 0, log2, 0],
        "probability": [0, 0, 0, 0, 1],
        "l1_error": [2, 2, 2, 2, 0],
        "logit_margin": [-INF, -INF, -INF, -200, INF],
        "probability_margin": [-0.5, -1, -1, -0.5, 1],
    }[name]
    np.testing.assert_allclose(score(name, z, [0] * 5), wanted, rtol=1e-6)


# ---- a network, several labels, a population ----------------------------------------------------


@functools.cache
def transformer() -> Any:
    p = tiny.problem("transformer")
    assert p.data.y.shape == (40, 6)
    keys = jax.random.split(jax.random.key(1), 2)
    make = jax.vmap(
        lambda key: step.init(p.task, p.optimizer, key, {"learning_rate": jnp.ones(())})
    )
    return p, jax.jit(make)(keys)


@each_score
def test_several_labels_an_example_are_averaged(name: str) -> None:
    p, states = transformer()
    one = jax.tree.map(lambda x: x[0], states)
    found = np.asarray(
        scores.over_examples(getattr(scores, name), p.task, one, p.data, batch_size=16)
    )
    assert found.shape == (40,)
    batch = Batch(x=jnp.asarray(p.data.x, jnp.int32), y=jnp.asarray(p.data.y, jnp.int32), index=0)
    z = np.asarray(p.task.evaluate(one.params, one.extras, batch, {}).logits)
    wanted = [expected(name, rows, y).mean() for rows, y in zip(z, p.data.y, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-7)


def test_a_probe_scores_every_replica() -> None:
    """Through ``fit``, on a mesh that splits replicas, examples and features."""
    p = tiny.problem("mlp", num_steps=2)
    probes = [Score(getattr(scores, n), (2,), n, batch_size=20) for n in NAMES]
    results = tiny.run(p, mesh.make(2, 2, 2), 2, probes=probes)
    assert results.state is not None
    for replica in range(2):
        params = jax.tree.map(np.asarray, population.take(results.state, replica).params)
        for name in NAMES:
            found = results.arrays[name, "score"].at(step=2).values
            alone = scores.over_examples(getattr(scores, name), p.task, step.given(params), p.data)
            assert found.shape == (2, 40)
            np.testing.assert_allclose(found[replica], alone, rtol=1e-5, atol=1e-6, err_msg=name)


def test_every_score_says_which_end_is_hard() -> None:
    assert set(NAMES) <= set(scores.HARD) and set(scores.HARD.values()) == {"high", "low"}
    for name in ("grand", "grand_last_layer", "forgetting", "aum", "confidence", "variability"):
        assert name in scores.HARD
    for name in ("vog", "tracin", "pvi", "input_norm"):
        assert name in scores.HARD
    easy, hard = [[8.0, 0, 1, -1]], [[-1.0, 2, 1, 3]]
    for name in NAMES:
        a, b = score(name, easy, [0])[0], score(name, hard, [0])[0]
        assert (b > a) == (scores.HARD[name] == "high"), name


def test_loss_is_the_tasks_own() -> None:
    """Not the cross-entropy of the logits, whatever the task minimises."""

    def other(*args: Any) -> Aux:
        aux = evaluate(*args)
        return aux.replace(loss=aux.loss + 1)  # pyright: ignore[reportAttributeAccessIssue]

    batch = Batch(x=jnp.zeros((2, 4)), y=jnp.zeros(2, jnp.int32), index=jnp.arange(2))
    found = scores.loss(NET._replace(evaluate=other), STATE, batch)
    np.testing.assert_allclose(found, by_hand.cross_entropy([0.0] * 4, 0) + 1, rtol=1e-6)
