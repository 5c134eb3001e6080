"""What becomes of wrong labels: against a slow reference, autodiff, and cases made by hand."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from references import memorisation as reference

from dynamics import losses, mesh, population, step, task, watch
from dynamics.data import corrupt
from dynamics.data.stream import doubled
from dynamics.probes import Memorisation
from dynamics.probes.memorisation import answers
from dynamics.types import Aux, Batch, Dataset, Results, Task

N, C = 40, 4  # of the tiny problems, whose classes are equally frequent
CLEAN = np.asarray(tiny.images().y)
LABELS = np.stack([corrupt.symmetric(CLEAN, rate, C, seed=0).labels for rate in (0.5, 0.2)])
SCALARS = {"elr_lambda": [3.0, 7.0], "elr_beta": [0.7, 0.9]}
FRACTIONS = ("wrong_correct", "wrong_memorised", "wrong_other")
NAN = np.nan


# ---- answers that are given ---------------------------------------------------------------------


def linear() -> Task:
    """Its logits are the inputs, times the matrix that is its only parameter."""

    def evaluate(params: Any, extras: Any, batch: Batch, hyperparameters: Any) -> Aux:
        z = batch.x @ params
        return Aux(loss=losses.cross_entropy(z, batch.y), logits=z, y=batch.y, index=batch.index)

    def unused(*args: Any) -> Any:
        raise AssertionError("a probe that predicts has no use for this")

    return Task(unused, unused, evaluate)


LINEAR = linear()
ANSWERS = jax.jit(functools.partial(answers, LINEAR))


def inputs(z: Any) -> Dataset:
    """Examples whose inputs are logits."""
    z = np.asarray(z, np.float32)
    n, none, one = len(z), np.zeros((1,), np.float32), np.ones((1,), np.float32)
    nobody = np.full(n, -1, np.int32)  # labels are each replica's
    return Dataset(x=z, y=nobody, mean=none, std=one)


def measured(
    z: Any, labels: Any, clean: Any, params: Any = None, tables: Any = (), strength: Any = None
) -> dict[str, np.ndarray]:
    """The metrics [K] of logits ``z @ params[k]``, with tables [K, rows, C] of targets."""
    labels = np.asarray(labels, np.int32)
    k, c = len(labels), np.shape(z)[1]
    params = np.broadcast_to(np.eye(c), (k, c, c)) if params is None else params
    tables = [jnp.asarray(table, jnp.float32) for table in tables]
    targets = tables[0] if len(tables) == 1 else {str(i): t for i, t in enumerate(tables)}
    state = jax.vmap(step.given)(jnp.asarray(params, jnp.float32))
    extras = {"targets": targets} if tables else {}
    state = dataclasses.replace(state, step=jnp.int32(0), extras=extras)
    if strength is not None:
        h = {"elr_lambda": jnp.asarray(strength, jnp.float32)}
        state = dataclasses.replace(state, hyperparameters=h)
    context = watch.context(LINEAR, mesh.make(), {"train": inputs(z)})
    probe = Memorisation(1, labels, np.asarray(clean, np.int32), batch_size=64)
    carry, found = probe.measure(context, probe.start(context, state), state)
    assert carry == ()
    assert all(value.shape == (k,) and value.dtype == jnp.float32 for value in found.values())
    return {name: np.asarray(value) for name, value in found.items()}


def check(found: Any, wanted: list[dict[str, float]]) -> None:
    """``wanted`` has a dict for each replica."""
    assert found.keys() == wanted[0].keys()
    for name, value in found.items():
        expected = [one[name] for one in wanted]
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=name)


def add_to_one(found: Any) -> None:
    total = np.sum([np.asarray(found[name], np.float64) for name in FRACTIONS], axis=0)
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@pytest.mark.parametrize("tables", [0, 1, 2])
def test_random_answers_against_the_reference(tables: int) -> None:
    """Replicas have their own answers, labels, targets and lambda; a row was never visited."""
    draw, n = np.random.default_rng(tables), 150
    clean = draw.integers(0, C, n)
    labels = np.stack([corrupt.symmetric(clean, rate, C, seed=0).labels for rate in (0.5, 0.2)])
    z, params = draw.normal(0, 2, (n, C)).astype(np.float32), draw.normal(0, 1, (2, C, C))
    z[0] = 0  # all classes tie
    given = [draw.dirichlet(np.ones(C), (2, n + 24)) * 0.9 for _ in range(tables)]
    for table in given:
        table[0, 5] = table[1, 7] = 0
    strength = [3.0, 7.0] if tables == 1 else None
    found = measured(z, labels, clean, params, given, strength)
    logits = [z.astype(np.float64) @ p.astype(np.float32).astype(np.float64) for p in params]
    wanted = [
        reference.summary(
            *(logits[k], labels[k], clean),
            targets=[table[k] for table in given] or None,
            strength=None if strength is None else strength[k],
        )
        for k in range(2)
    ]
    check(found, wanted)
    add_to_one(found)
    assert all(value[0] != value[1] for value in found.values())  # each replica has its own


def test_each_case_by_hand() -> None:
    """Six examples, four labels of which are wrong."""
    clean, labels = [0, 1, 2, 3, 0, 1], [0, 1, 1, 1, 1, 2]
    says = [0, 0, 2, 1, 3, 2]  # right; wrong; as it is; as labelled; neither; as labelled
    z = 5.0 * np.eye(4)[says]
    found = measured(z, [labels], clean)
    assert [found[name][0] for name in FRACTIONS] == [0.25, 0.5, 0.25]
    assert found["clean_correct"][0] == 0.5
    # losses: small, large | large, small, large, small; pairs ordered 2, tied 4, the other way 2
    assert found["loss_auc"][0] == 0.5
    assert not {"target_correct", "precision", "recall", "held_clean", "held_wrong"} & set(found)


def test_labels_that_noise_left_as_they_were_are_not_wrong() -> None:
    """Symmetric noise that draws from all classes: what it redrew, and W, are not the same."""
    noise = corrupt.symmetric_including(CLEAN, 1.0, C, seed=0)  # all are drawn anew
    agreeing = noise.labels == CLEAN
    assert 2 < agreeing.sum() < N - 2
    found = measured(5.0 * np.eye(C)[noise.labels], [noise.labels], CLEAN)
    assert [found[name][0] for name in FRACTIONS] == [0, 1, 0]
    assert found["clean_correct"][0] == 1
    found = measured(5.0 * np.eye(C)[CLEAN], [noise.labels], CLEAN)
    assert [found[name][0] for name in FRACTIONS] == [1, 0, 0]
    assert found["clean_correct"][0] == 1
    assert found["loss_auc"][0] == 1
    drawn = np.where(agreeing, (CLEAN + 1) % C, CLEAN)  # wrong where the label was kept
    found = measured(5.0 * np.eye(C)[drawn], [noise.labels], CLEAN)
    assert [found["wrong_correct"][0], found["clean_correct"][0]] == [1, 0]


def test_fractions_of_nothing_are_nan() -> None:
    """No wrong label; no right one; both with targets that differ from some labels."""
    z = np.random.default_rng(0).normal(0, 2, (N, C)).astype(np.float32)
    labels = np.stack([CLEAN, (CLEAN + 1) % C])
    held = np.tile(np.eye(C)[(CLEAN + (CLEAN == 0)) % C][None], (2, 1, 1))  # of class 0 to 1
    found = measured(z, labels, CLEAN, tables=[held], strength=[3.0, 3.0])
    of_wrong = [*FRACTIONS, "fit_wrong", "held_wrong", "target_correct", "recall"]
    of_clean = ["clean_correct", "fit_clean", "held_clean"]
    assert {name for name, value in found.items() if np.isnan(value[0])} == {*of_wrong, "loss_auc"}
    assert {name for name, value in found.items() if np.isnan(value[1])} == {*of_clean, "loss_auc"}
    # class 0 is held to 1: flagged where the label is 0, and where it is 1 it is not
    assert [float(x) for x in found["precision"]] == [0, 1]
    assert [float(x) for x in (found["recall"][1], found["target_correct"][1])] == [0.75, 0.75]
    wanted = [reference.summary(z, y, CLEAN, targets=[t], strength=3.0)
              for y, t in zip(labels, held, strict=True)]  # fmt: skip
    check(found, wanted)


def test_what_was_never_visited_is_not_flagged() -> None:
    """No target says nothing, and not the first class."""
    z, table = np.zeros((N, C), np.float32), np.zeros((1, N, C))
    found = measured(z, LABELS[:1], CLEAN, tables=[table], strength=[3.0])
    assert np.isnan(found["precision"][0])
    assert [found[name][0] for name in ("recall", "target_correct")] == [0, 0]
    assert [found[name][0] for name in ("held_clean", "held_wrong")] == [0, 0]
    wrong = np.flatnonzero(LABELS[0] != CLEAN)
    table[0, wrong[0], CLEAN[wrong[0]]] = 1e-6  # one is, and however little it is held
    found = measured(z, LABELS[:1], CLEAN, tables=[table], strength=[3.0])
    assert found["precision"][0] == 1
    np.testing.assert_allclose(found["recall"], 1 / len(wrong), rtol=1e-6)
    np.testing.assert_allclose(found["target_correct"], 1 / len(wrong), rtol=1e-6)


def test_the_targets_of_two_networks_add_up() -> None:
    """Where they disagree, the one that is surer decides; one visit of one network is enough."""
    z, tables = np.zeros((3, C), np.float32), np.zeros((2, 1, 3, C))
    tables[0, 0, :2, 0] = 0.3, 0.2
    tables[1, 0, :2, 1] = 0.2, 0.3
    tables[1, 0, 2, 3] = 0.1
    found = measured(z, [[1, 1, 3]], [0, 1, 3], tables=tables, strength=[3.0])
    # held to 0, 1 and 3: the first alone is called wrong, and is
    assert [found[name][0] for name in ("precision", "recall", "target_correct")] == [1, 1, 1]
    assert "held_wrong" not in found


# ---- the coefficients are gradients -------------------------------------------------------------


def test_coefficients_are_the_norms_of_gradients_in_the_logits() -> None:
    draw = np.random.default_rng(0)
    z = jnp.asarray(draw.normal(0, 2, (N, C)), jnp.float32)
    t = jnp.asarray(0.97 * draw.dirichlet(np.ones(C), N), jnp.float32)
    y, strength = jnp.asarray(LABELS[0]), jnp.float32(3)
    p = jax.nn.softmax(z)
    assert 1e-4 < float(p.min()) and float(p.max()) < 1 - 1e-4  # inside the clip of the loss
    state = step.given(jnp.eye(C), {"targets": jnp.pad(t, ((0, 8), (0, 0)))})
    state = dataclasses.replace(state, hyperparameters={"elr_lambda": strength})
    found = ANSWERS(state, Batch(x=z, y=y, index=jnp.arange(N)))
    fit = jax.jit(jax.grad(lambda z: losses.cross_entropy(z, y).sum()))(z)
    held = jax.jit(jax.grad(lambda z: strength * losses.elr(z, t).sum()))(z)
    np.testing.assert_allclose(found["fit"], np.linalg.norm(fit, axis=1), rtol=2e-5)
    np.testing.assert_allclose(found["held"], np.linalg.norm(held, axis=1), rtol=2e-5)
    np.testing.assert_array_equal(found["predicted"], np.argmax(z, axis=1))
    np.testing.assert_array_equal(found["target"], np.argmax(t, axis=1))
    np.testing.assert_array_equal(found["loss"], losses.cross_entropy(z, y))


# ---- runs ---------------------------------------------------------------------------------------

MAKE = {"elr": task.elr, "elr_plus": task.elr_plus}


@pytest.fixture(scope="module", params=MAKE)
def trained(request: Any) -> tuple[str, tiny.Problem, Results, Results]:
    """Twenty steps of two replicas with their own wrong labels: watched, and not."""
    name, p = request.param, tiny.problem("mlp", learning_rate=0.1)
    p = p._replace(task=MAKE[name](p.task, N, C))
    stream = tiny.batches(p, 2, labels=LABELS)
    stream = doubled(stream) if name == "elr_plus" else stream
    options = {"stream": stream, "changed": SCALARS}
    probe = Memorisation(8, LABELS, CLEAN, batch_size=16)
    watched = tiny.run(p, mesh.make(), 2, probes=[probe], **options)
    return name, p, watched, tiny.run(p, mesh.make(), 2, **options)


def at(results: Results, done: int) -> dict[str, np.ndarray]:
    """The metrics [K] after so many steps."""
    rows = results.measured["memory"]
    here = rows.filter(rows["step"] == done).drop("step", "member")
    return {name: here[name].to_numpy() for name in here.columns}


def test_a_run_against_the_reference(trained: Any) -> None:
    """After the last step, from the state that was left: logits, targets and lambda of each."""
    name, p, results, _ = trained
    x = (p.data.x.astype(np.float32) - p.data.mean) / p.data.std
    batch = Batch(x=jnp.asarray(x), y=jnp.asarray(CLEAN), index=jnp.arange(N))
    wanted = []
    for k in range(2):
        state = population.take(results.state, k)
        aux = p.task.evaluate(state.params, state.extras, batch, state.hyperparameters)
        tables = [np.asarray(t) for t in jax.tree.leaves(state.extras.get("targets", ()))]
        assert len(tables) == {"elr": 1, "elr_plus": 2}[name]
        strength = SCALARS["elr_lambda"][k] if name == "elr" else None
        options = {"targets": tables or None, "strength": strength}
        wanted.append(reference.summary(np.asarray(aux.logits), LABELS[k], CLEAN, **options))
    found = at(results, 20)
    check(found, wanted)
    add_to_one(found)


def test_when_it_is_measured_and_what_of_the_start(trained: Any) -> None:
    name, _, results, _ = trained
    due = results.measured["memory"].select("step", "member")
    np.testing.assert_array_equal(due, [(t, k) for t in (0, 8, 16, 20) for k in range(2)])
    start = at(results, 0)
    add_to_one(start)
    assert np.isnan(start["precision"]).all()  # no example was visited
    np.testing.assert_array_equal(start["recall"], [0, 0])
    np.testing.assert_array_equal(start["target_correct"], [0, 0])
    assert (at(results, 8)["recall"] > 0).all()
    if name == "elr":
        np.testing.assert_array_equal(start["held_wrong"], [0, 0])
        assert (at(results, 8)["held_wrong"] > 0).all()


def test_watching_changes_no_bit(trained: Any) -> None:
    _, _, watched, alone = trained
    for x, y in zip(tiny.leaves(watched), tiny.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)
    assert watched.rows.equals(alone.rows)


@pytest.mark.parametrize(
    ("labels", "clean"),
    [(LABELS[:, :39], CLEAN[:39]), (np.tile(LABELS, (1, 2)), np.tile(CLEAN, 2))],
)
def test_labels_of_other_data_are_refused(labels: Any, clean: Any) -> None:
    p = tiny.problem("mlp")
    probe = Memorisation(5, labels, clean)
    message = rf"memory needs labels \(2, 40\), .* and clean \(40,\), got \(2, {len(clean)}\)"
    with pytest.raises(ValueError, match=message):
        tiny.run(p, mesh.make(), 2, probes=[probe])


def test_labels_of_another_population_are_refused() -> None:
    p = tiny.problem("mlp")
    with pytest.raises(ValueError, match="labels"):
        tiny.run(p, mesh.make(), 2, probes=[Memorisation(5, LABELS[:1], CLEAN)])
