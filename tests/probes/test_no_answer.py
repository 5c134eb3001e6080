"""A network whose logits are NaN has no accuracy, no stream of answers and no mask."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tiny

from dynamics import losses, mesh, population, scores, step, task, watch
from dynamics.data import of_arrays
from dynamics.probes import (
    AreaUnderMargin,
    Cartography,
    Evaluate,
    Forgetting,
    Memorisation,
    Path,
    Score,
)
from dynamics.revise import Correction
from dynamics.revise.pixels import corrected, counts, iou, prediction
from dynamics.types import Aux
from experiments.segmentation_noise.measuring import fates, mean_iou

N, C = 12, 4
DRAW = np.random.default_rng(0)
NAN, INF = np.nan, np.inf
STREAMING = (Forgetting, AreaUnderMargin, Cartography)
Z, Y = DRAW.normal(0, 2, (N, C)).astype(np.float32), DRAW.integers(0, C, N).astype(np.int32)
LINEAR = task.of_function(lambda w, x: x @ w)


def measured(probe: Any, data: Any, *scales: float) -> dict[str, np.ndarray]:
    """What a probe measures on networks whose logits are the inputs, times a number each."""
    given = [population.broadcast(step.given(jnp.eye(C) * scale), 1) for scale in scales]
    context = watch.context(LINEAR, mesh.make(), {"test": data, "train": data})
    found = probe.measure(context, (), population.concatenate(given))[1]
    return {name: np.asarray(value) for name, value in found.items()}


# ---- what an answer is ---------------------------------------------------------------------------

ROWS = {
    (1.0, 3, 2): 1,
    (2.0, 2, 0): 0,  # the first of ties
    (-INF, 1, 0): 1,  # a class that is ruled out
    (NAN, 1, 2): -1,
    (0.0, 1, NAN): -1,
    (INF, 1, 2): -1,
    (INF, INF, 2): -1,
    (-INF, -INF, -INF): -1,
    (NAN, NAN, NAN): -1,
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "compiled"])
def test_there_is_no_answer_where_softmax_has_none(wrap: Any) -> None:
    z, wanted = jnp.asarray(list(ROWS), jnp.float32), np.array(list(ROWS.values()))
    np.testing.assert_array_equal(wrap(losses.predictions)(z), wanted)
    np.testing.assert_array_equal(wrap(losses.answered)(z), wanted >= 0)
    p = np.asarray(jax.nn.softmax(z, axis=-1))
    np.testing.assert_array_equal(np.isfinite(p).all(axis=-1), wanted >= 0)
    y = jnp.asarray([1, 1, 1, 0, 0, 0, 0, 0, 0])
    right = [1, 0, 1] + [NAN] * 6
    np.testing.assert_array_equal(wrap(losses.correct)(z, y), right)
    np.testing.assert_array_equal(wrap(losses.correct)(z, jax.nn.one_hot(y, 3)), right)
    np.testing.assert_array_equal(losses.correct(z[:1], jnp.asarray([losses.IGNORED])), [NAN])


# ---- probes of the state -------------------------------------------------------------------------


def test_accuracies_of_healthy_networks_keep_their_bits_beside_one_without() -> None:
    data = of_arrays(Z, Y)
    found = measured(Evaluate(1, batch_size=5), data, 1.0, NAN, -1.0)
    for k, sign in ((0, 1), (2, -1)):
        wanted = ((sign * Z).argmax(axis=1) == Y).astype(np.float32).mean()
        assert found["accuracy"][k] == wanted
    assert np.isnan(found["accuracy"][1]) and np.isnan(found["loss"][1])


def test_one_example_without_an_answer_takes_the_accuracy_away() -> None:
    """Not the accuracy of the rest, nor that of class 0."""
    x = Z.copy()
    x[3, 2] = INF
    data = of_arrays(Z, Y).replace(x=x)  # of_arrays refuses it
    found = measured(Evaluate(1), data, 1.0)
    assert np.isnan(found["accuracy"]).all()


def test_a_path_through_nan_has_no_accuracy_there() -> None:
    found = measured(Path(1, points=3), of_arrays(Z, Y), 1.0, NAN, -1.0, 1.0)["accuracy"]
    np.testing.assert_array_equal(found[0, 0], Z.argmax(axis=1) == Y)  # the ends of a healthy pair
    np.testing.assert_array_equal(found[2, 0], (-Z).argmax(axis=1) == Y)
    assert np.isnan(found[[1, 3]]).all()


def test_no_part_of_wrong_labels_is_anything_without_answers() -> None:
    clean = np.where(np.arange(N) < 5, (Y + 1) % C, Y).astype(np.int32)
    labels = np.stack([Y, Y])
    found = measured(Memorisation(1, labels, clean), of_arrays(Z, Y), 1.0, NAN)
    parts = ("wrong_correct", "wrong_memorised", "wrong_other", "clean_correct")
    assert all(np.isnan(found[name][1]) for name in parts)
    answer, wrong = Z.argmax(axis=1), clean != Y
    wanted = [(answer == clean)[wrong].mean(), (answer == Y)[wrong].mean()]
    np.testing.assert_allclose([found[name][0] for name in parts[:2]], wanted, rtol=1e-6)
    np.testing.assert_allclose(sum(found[name][0] for name in parts[:3]), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["el2n", "entropy", "l1_error", "probability_margin", "loss"])
def test_scores_of_nan_are_nan(name: str) -> None:
    found = measured(Score(getattr(scores, name), 1, name), of_arrays(Z, Y), 1.0, NAN)["score"]
    assert np.isnan(found[1]).all() and np.isfinite(found[0]).all()


def test_a_run_that_diverges_takes_no_digit_from_the_one_beside_it() -> None:
    """Through ``fit``: it measures nothing from there on, and the stream of answers stops."""
    p = tiny.problem("mlp", num_steps=12)
    n = len(p.data)

    def run(rate: float) -> Any:
        probes = [Evaluate(6), *(make(n, 12) for make in STREAMING)]
        changed = {"learning_rate": np.float32([0.02, rate])}
        return tiny.run(p, mesh.make(), 2, probes=probes, changed=changed)

    healthy, broken = run(0.02), run(1e30)
    assert healthy.status["status"].to_list() == ["finished"] * 2
    assert broken.status["status"].to_list() == ["finished", "diverged"]
    at = broken.status["step"][1]
    assert at < 6
    for probe, metric in healthy.arrays:
        mine, wanted = (tiny.at(r, probe, metric, 12)[0] for r in (broken, healthy))
        np.testing.assert_array_equal(mine, wanted, err_msg=f"{probe} {metric}")
    seen = tiny.at(broken, "cartography", "confidence", 12)[1]
    assert np.isfinite(seen).sum() <= (at + 1) * tiny.BATCH
    np.testing.assert_array_equal(np.isnan(tiny.at(broken, "aum", "margin", 12)[1]), np.isnan(seen))
    mine, wanted = (r.measured["test"].filter(pl.col("member") == 0) for r in (broken, healthy))
    assert mine.equals(wanted) and mine["accuracy"].is_finite().all()
    other = broken.measured["test"].filter(pl.col("member") == 1)
    assert other["step"].to_list() == [0]


# ---- probes of the steps -------------------------------------------------------------------------


def aux(index: Any, z: Any, y: Any) -> Aux:
    z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.int32)
    return Aux(loss=jnp.zeros(len(y)), logits=z, y=y, index=jnp.asarray(index, jnp.int32))


def folded(probe: Any, steps: Any) -> Any:
    carry, metrics = probe.init(step.given({})), {}
    for one in steps:
        carry, metrics = probe.fold(carry, one)
    return carry, metrics


def assert_same(a: Any, b: Any) -> None:
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def batches(count: int = 6) -> list[Aux]:
    """Of five entries with an example in them twice."""
    draw = np.random.default_rng(1)
    found = []
    for _ in range(count):
        index = draw.permutation(N)[:5]
        index[4] = index[1]
        found.append(aux(index, draw.normal(0, 2, (5, C)), draw.integers(0, C, 5)))
    return found


@pytest.mark.parametrize("make", STREAMING)
def test_what_is_no_answer_is_no_presentation(make: Any) -> None:
    """Metrics and carry are those of the same steps without it, bit for bit."""
    probe, steps = make(N, 1), batches()
    wanted = folded(probe, steps)
    for bad in (NAN, INF):
        nothing = aux(range(N), np.full((N, C), bad), np.zeros(N))  # class 0, says argmax
        assert_same(folded(probe, [*steps[:3], nothing, *steps[3:], nothing]), wanted)
    one = jax.tree.map(lambda x: jnp.concatenate([x[:2], x[:1], x[2:]]), steps[0])
    one = dataclasses.replace(one, logits=one.logits.at[2, 1].set(NAN))
    assert_same(folded(probe, [one, *steps[1:]]), wanted)  # beside answers, of the same example


@pytest.mark.parametrize("make", STREAMING)
@pytest.mark.parametrize("wrong", [-1, -N, N, N + 3, -(2**31), 2**31 - 1])
def test_what_is_no_example_is_not_counted_as_another(make: Any, wrong: int) -> None:
    probe, steps = make(N, 1), batches()
    wanted = folded(probe, steps)
    outside = aux([wrong] * 5, np.tile(Z[:1], (5, 1)), [0] * 5)
    assert_same(folded(probe, [outside, *steps, outside]), wanted)


def test_nothing_but_nan_is_nothing() -> None:
    for make in STREAMING:
        _, found = folded(make(4, 1), [aux(range(4), np.full((4, 4), NAN), range(4))])
        assert all(np.isnan(value).all() for value in found.values())


@pytest.mark.parametrize("make", [AreaUnderMargin, Cartography])
def test_one_token_without_an_answer_takes_the_presentation_away(make: Any) -> None:
    z, y = DRAW.normal(size=(2, 3, C)).astype(np.float32), DRAW.integers(0, C, (2, 3))
    broken = z.copy()
    broken[1, 2, 0] = NAN
    assert_same(
        folded(make(2, 1), [aux([0, 1], broken, y)]), folded(make(2, 1), [aux([0], z[:1], y[:1])])
    )
    unlabelled = np.where(np.arange(6).reshape(2, 3) == 5, losses.IGNORED, y)
    _, found = folded(make(2, 1), [aux([0, 1], broken, unlabelled)])  # it has no label: no matter
    assert all(np.isfinite(value).all() for value in found.values())


# ---- masks ---------------------------------------------------------------------------------------


def test_masks_without_an_answer_agree_with_nothing_and_correct_nothing() -> None:
    z = jnp.asarray(DRAW.normal(0, 3, (2, 4, 4, 3)), jnp.float32).at[1].set(NAN)
    labels = jnp.asarray(DRAW.integers(0, 3, (2, 4, 4)))
    found, sure = prediction(z)
    assert (np.asarray(found)[1] == -1).all() and np.isnan(np.asarray(sure)[1]).all()
    np.testing.assert_array_equal(counts(found, labels, 3), counts(found[:1], labels[:1], 3))
    assert np.isnan(np.asarray(iou(counts(found[1:], labels[1:], 3)))).all()
    active = jnp.asarray([False, True, True])
    for rule in ("both", "prediction"):
        correction = Correction(confidence=0.1, rule=rule, present=False)
        after = corrected(labels, found, sure, active, correction)
        np.testing.assert_array_equal(after[1], labels[1])


def test_iou_and_fates_of_a_network_without_answers_are_nan() -> None:
    clean = DRAW.integers(0, 3, (2, 5, 5))
    labels = np.where(DRAW.random((3, 2, 5, 5)) < 0.3, (clean + 1) % 3, clean)
    predicted = np.stack([DRAW.integers(0, 3, (2, 5, 5))] * 3)
    whole = mean_iou(predicted, clean), fates(predicted, labels, clean)
    predicted[1] = -1
    found = mean_iou(predicted, clean), fates(predicted, labels, clean)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(np.isnan(one), [False, True, False])
        np.testing.assert_array_equal(one[[0, 2]], other[[0, 2]])
