"""Data that are revised while a network trains on them: when, from when on, and what continues."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import losses

from dynamics import fit, mesh, population
from dynamics.data.stream import resident, streamed
from dynamics.probes import Evaluate
from dynamics.record import Recorder
from dynamics.types import Batch, Results, TrainState

N, C, K = 40, 4, 2
STEPS = 20
CLEAN = np.asarray(tiny.images().y)
GIVEN = np.stack([(CLEAN + 1) % C, CLEAN])  # each replica's own


@dataclasses.dataclass(frozen=True)
class Shift:
    """Adds one to the labels, modulo the number of classes, and counts how often; ``broken`` may
    do something to what it returns."""

    every: Any = 7
    name: str = "shift"
    broken: Any = staticmethod(lambda own: own)

    def start(self, context: Any, own: Any, state: TrainState) -> Any:
        assert own["labels"].shape == (K, N)
        return np.zeros(K, np.int32)

    def revise(self, context: Any, carry: Any, own: Any, state: TrainState) -> Any:
        times, labels = carry + 1, (own["labels"] + 1) % C
        metrics = {"times": times.astype(jnp.float32), "labels": labels}
        return times, self.broken({**own, "labels": labels}), metrics


@dataclasses.dataclass(frozen=True)
class Learned:
    """Labels become what the network itself predicts, for every replica by ``each``."""

    predict: Any
    data: Any
    every: Any = 5
    name: str = "learned"

    def start(self, context: Any, own: Any, state: TrainState) -> Any:
        return {"changed": np.zeros(population.size(state), np.int32)}

    def revise(self, context: Any, carry: Any, own: Any, state: TrainState) -> Any:
        labels = context.each(self.predict)(state, self.data.x, self.data.mean, self.data.std)
        changed = (labels != own["labels"]).sum(axis=1, dtype=jnp.int32)
        carry = {"changed": carry["changed"] + changed}
        return carry, {**own, "labels": labels}, {"changed": changed.astype(jnp.float32)}


def learned(p: tiny.Problem, **options: Any) -> Learned:
    def predict(state: TrainState, x: Any, mean: Any, std: Any) -> jax.Array:
        x = (x.astype(jnp.float32) - mean[None]) / std[None]
        batch = Batch(x=x, y=jnp.zeros(len(x), jnp.int32), index=jnp.arange(len(x)))
        aux = p.task.evaluate(state.params, state.extras, batch, state.hyperparameters)
        return aux.logits.argmax(axis=-1).astype(jnp.int32)

    return Learned(predict, p.data, **options)


def run(
    p: tiny.Problem, revision: Any = None, labels: Any = GIVEN, where: Any = None, **options: Any
) -> Results:
    stream = options.pop("stream", None) or tiny.batches(p, K, labels=labels)
    return tiny.run(p, where or mesh.make(), K, revision=revision, stream=stream, **options)


@pytest.fixture(scope="module")
def p() -> tiny.Problem:
    return tiny.problem("mlp", STEPS)


@pytest.fixture(scope="module")
def plain(p: tiny.Problem) -> Results:
    """Never revised."""
    return run(p)


@pytest.fixture(scope="module")
def made() -> tuple[tiny.Problem, Results]:
    """Labels that each replica predicts itself, and that change."""
    p = tiny.problem("mlp", STEPS, learning_rate=0.2)
    found = run(p, learned(p))
    changed = tiny.by_member(found.measured["learned"], "changed")
    assert (changed.sum(axis=0) > 5).all()
    return p, found


# ---- what the steps are trained on --------------------------------------------------------------


def test_labels_change_for_the_steps_after_and_not_before(p: tiny.Problem, plain: Results) -> None:
    """Up to the revision the run is one that is never revised; from it on, one that goes on from
    there with the new labels."""
    revised = run(p, Shift(every=(7,)))
    np.testing.assert_array_equal(losses(revised)[:7], losses(plain)[:7])
    assert (losses(revised)[7] != losses(plain)[7]).all()
    until = run(p._replace(num_steps=7))
    onwards = run(p, labels=(GIVEN + 1) % C, state=until.state)
    np.testing.assert_array_equal(losses(revised)[7:], losses(onwards))
    for x, y in zip(tiny.leaves(revised), tiny.leaves(onwards), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])  # a loop in a program, a program a step
def test_revised_labels_are_as_those_from_the_start(kind: str) -> None:
    """Where the parameters hardly move only the labels matter, and each step's loss tells them."""
    p = tiny.problem(kind, 8, learning_rate=1e-30, momentum=0.0, nesterov=False, weight_decay=0.0)
    revised, after = run(p, Shift(every=(3,))), run(p, labels=(GIVEN + 1) % C)
    np.testing.assert_array_equal(losses(revised)[3:], losses(after)[3:])
    assert (losses(revised)[:3] != losses(after)[:3]).all()


def test_each_revision_starts_from_the_last(p: tiny.Problem) -> None:
    found = run(p, Shift(every=4))
    for times in range(1, 6):
        expected = (GIVEN + times) % C
        labels = found.arrays["shift", "labels"].at(step=4 * times)
        np.testing.assert_array_equal(labels.values, expected)


def test_what_is_trained_on_may_be_revised_too(p: tiny.Problem) -> None:
    """Which examples, as labels: here only the first half of them after 5 steps."""

    class Drop:
        name, every = "drop", (5,)

        def start(self, context: Any, own: Any, state: Any) -> Any:
            return ()

        def revise(self, context: Any, carry: Any, own: Any, state: Any) -> Any:
            return carry, {**own, "size": own["size"] // 2}, {}

    rows = np.stack([np.arange(N), np.arange(N)[::-1]])
    found = run(p, Drop(), stream=resident(p.data, tiny.BATCH, K, rows=rows))
    until = run(p._replace(num_steps=5), stream=resident(p.data, tiny.BATCH, K, rows=rows))
    half = resident(p.data, tiny.BATCH, K, rows=rows, sizes=np.full(K, N // 2))
    onwards = run(p, state=until.state, stream=half)
    np.testing.assert_array_equal(losses(found)[5:], losses(onwards))
    assert set(found.rows.columns) == {"step", "member", "loss"} and not found.measured


# ---- when ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (7, [7, 14]),
        (5, [5, 10, 15, 20]),  # also at the last step, where it falls on it
        (21, []),
        ((0, 3, 20, 30), [3, 20]),  # never before the first step, nor after the last
    ],
)
def test_cadence(p: tiny.Problem, plain: Results, every: Any, due: list[int]) -> None:
    found = run(p, Shift(every), probes=[Evaluate(10)])
    if not due:
        assert "shift" not in found.measured and not found.arrays
        np.testing.assert_array_equal(losses(found), losses(plain))
        return
    rows = found.measured["shift"]
    np.testing.assert_array_equal(rows["step"], np.repeat(due, K))
    np.testing.assert_array_equal(rows["member"], np.tile(np.arange(K), len(due)))
    np.testing.assert_array_equal(rows["times"], np.repeat(np.arange(1, len(due) + 1), K))
    assert set(found.arrays) == {("shift", "labels")}
    np.testing.assert_array_equal(found.arrays["shift", "labels"].coords["step"], due)
    np.testing.assert_array_equal(found.measured["test"]["step"], np.repeat([0, 10, 20], K))


def test_it_runs_after_the_probes_and_changes_no_state(p: tiny.Problem, plain: Results) -> None:
    """A revision at the last step leaves everything but its metrics as it was."""
    heard = []

    @dataclasses.dataclass(frozen=True)
    class Heard(Shift):
        def revise(self, context: Any, carry: Any, own: Any, state: TrainState) -> Any:
            heard.append(("revised", int(state.step)))
            return super().revise(context, carry, own, state)

    class Watching:
        name, every = "watching", 10

        def start(self, context: Any, state: Any) -> Any:
            return ()

        def measure(self, context: Any, carry: Any, state: Any) -> Any:
            heard.append(("measured", int(state.step)))
            return carry, {}

    found = run(p, Heard(20), probes=[Watching()])
    assert heard == [("measured", 0), ("measured", 10), ("measured", 20), ("revised", 20)]
    for x, y in zip(tiny.leaves(found), tiny.leaves(plain), strict=True):
        np.testing.assert_array_equal(x, y)


# ---- what is stored -----------------------------------------------------------------------------


def test_a_run_cut_and_continued_has_the_same_bits(p: tiny.Problem, tmp_path: Any) -> None:
    """Cut before any revision, at the end of a step that is followed by one, and between two."""
    options: Any = {"probes": [Evaluate((5, 20))]}
    whole = run(p, Shift(7), **options)
    for done in (3, 7, 15, STEPS, STEPS):  # and once more, when nothing is left to do
        store = Recorder(tmp_path / "run", ())
        part = run(p._replace(num_steps=done), Shift(7), store=store, checkpoint_every=4, **options)
        assert part.state is not None and int(part.state.step) == done
    tiny.assert_equal(whole, part)


def test_labels_made_by_the_network_are_continued_too(
    made: tuple[tiny.Problem, Results], tmp_path: Any
) -> None:
    """The labels of a checkpoint are not those the stream begins with."""
    p, whole = made
    for done in (11, STEPS):
        part = run(p._replace(num_steps=done), learned(p), store=Recorder(tmp_path / "run", ()))
    tiny.assert_equal(whole, part)


# ---- where --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "devices"), [("map", 2), ("dispatch", 1)])
def test_the_ways_to_run_a_population(
    made: tuple[tiny.Problem, Results], how: Any, devices: int
) -> None:
    """A replica on each of two devices, or a program call for every step."""
    p, whole = made
    found = run(p, learned(p), where=mesh.make(devices), how=how)
    np.testing.assert_allclose(losses(found), losses(whole), rtol=1e-5, atol=2e-6)
    tiny.assert_frame(found.measured["learned"], whole.measured["learned"])


def test_the_loss_is_traced_as_often_as_without(p: tiny.Problem) -> None:
    """New data are arguments of the same program: nothing is compiled again."""
    count = 0

    def loss(*args: Any) -> Any:
        nonlocal count
        count += 1
        return p.task.loss(*args)

    run(p._replace(task=p.task._replace(loss=loss)), Shift(3))
    assert count == 2


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken",
    [
        lambda own: {**own, "labels": own["labels"][:, :30]},
        lambda own: {**own, "labels": own["labels"].astype(jnp.float32)},
        lambda own: {"size": own["size"]},
    ],
)
def test_own_of_another_shape_is_refused(p: tiny.Problem, broken: Any) -> None:
    message = r"revision 'shift' must keep the shapes \{'labels': 'int32\(2, 40\)'.*, got \{"
    with pytest.raises(ValueError, match=message):
        run(p, Shift(7, broken=broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": Shift(0)}, "every of 'shift' must be at least 1, got 0"),
        ({"probes": "shift"}, "two probes are named 'shift': names must differ"),
        ({"stream": "host"}, "'shift' needs data that lie on the device.*use data.stream.resident"),
    ],
)
def test_refusals_before_compilation(p: tiny.Problem, options: Any, message: str) -> None:
    state = tiny.start(p, mesh.make(), K)
    untraced = p.task._replace(loss=None)  # would fail if it were traced
    stream = tiny.batches(p, K, labels=GIVEN)
    if "stream" in options:
        keys = jax.random.split(jax.random.key(0), K)
        stream = streamed(p.data, tiny.BATCH, keys, labels=GIVEN)
    probes = [Evaluate(5, name="shift")] if "probes" in options else []
    more = {"revision": options.get("revision", Shift()), "probes": probes}
    with pytest.raises(ValueError, match=message):
        fit.fit(untraced, p.optimizer, state, stream, STEPS, mesh.make(), **more)
