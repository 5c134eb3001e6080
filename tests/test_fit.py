"""The loop: what it may and may not change, what it records, what it refuses."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dynamics import fit, mesh, population, scores
from dynamics.checkpoint import CheckpointError
from dynamics.data.stream import resident, streamed
from dynamics.probes import Evaluate, Score
from dynamics.record import Recorder, RecordError
from dynamics.types import Aux, TrainState

KINDS = ("mlp", "convnet", "transformer")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A StepProbe: how often each example was presented, and its last loss."""

    n: int
    every: Any = 5
    name: str = "seen"

    def init(self, state: TrainState) -> Any:
        return jnp.zeros(self.n, jnp.int32), jnp.zeros(self.n)

    def fold(self, carry: Any, aux: Aux) -> Any:
        count, last = carry
        carry = count.at[aux.index].add(1), last.at[aux.index].set(aux.loss)
        return carry, {"total": carry[0].sum().astype(jnp.float32), "count": carry[0]}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(kind: str) -> Any:
    """An unwatched, unstored run of two replicas on one device."""
    p = tiny.problem(kind)
    return p, tiny.run(p, mesh.make(), 2)


def test_watching_and_storing_change_no_bit(plain: Any, tmp_path: Any) -> None:
    p, unwatched = plain
    probes = (
        Evaluate(7, batch_size=16),
        Seen(len(p.data), 3),
    )
    watched = tiny.run(p, mesh.make(), 2, probes=probes)
    stored = tiny.run(
        p, mesh.make(), 2, probes=probes, checkpoint_every=6, store=Recorder(tmp_path / "a", ())
    )
    for x, y in zip(tiny.leaves(unwatched), tiny.leaves(watched), strict=True):
        np.testing.assert_array_equal(x, y)
    tiny.assert_equal(watched, stored)
    tiny.assert_frame(watched.rows, unwatched.rows)


def test_a_run_cut_and_continued_has_the_same_bits(plain: Any, tmp_path: Any) -> None:
    p, whole = plain
    for cut in (7, 13, 20):
        part = p._replace(num_steps=cut)
        store = Recorder(tmp_path / "run", ())
        tiny.run(part, mesh.make(), 2, checkpoint_every=5, store=store)
    tiny.assert_equal(whole, tiny.run(p, mesh.make(), 2, store=Recorder(tmp_path / "run", ())))


def test_replica_0_does_not_depend_on_its_companions(kind: str) -> None:
    p = tiny.problem(kind)
    keys = jax.random.split(jax.random.key(0), 4)
    scalars = p.rule.hyperparameters()

    def train(keys: Any) -> Any:
        state = fit.init(p.task, p.optimizer, keys, scalars, mesh.make())
        return tiny.run(p, mesh.make(), len(keys), state=state, how="vmap")

    together, others = train(keys), train(keys[jnp.array([0, 3, 3, 2])])
    alone = tiny.run(
        p,
        mesh.make(),
        1,
        state=fit.init(p.task, p.optimizer, keys[:1], scalars, mesh.make()),
    )
    for x, y, z in zip(*map(tiny.leaves, (together, others, alone)), strict=True):
        np.testing.assert_array_equal(x[0], y[0])
        np.testing.assert_allclose(x[0], z[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("how", ["vmap", "map", "dispatch"])
def test_the_ways_to_run_a_population_agree(kind: str, plain: Any, how: Any) -> None:
    p, reference = plain
    other = tiny.run(p, mesh.make(2), 2, how=how)
    for x, y in zip(tiny.leaves(reference), tiny.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_rows_and_arrays(plain: Any) -> None:
    p, _ = plain
    probe = Seen(len(p.data), 5)
    results = tiny.run(
        p,
        mesh.make(),
        2,
        probes=(probe, Evaluate(10, batch_size=16)),
        record_every=4,
    )
    rows, tested, seen = results.rows, results.measured["test"], results.measured["seen"]
    assert rows.columns == ["step", "member", "loss"]
    np.testing.assert_array_equal(rows["step"], np.repeat(np.arange(0, 20, 4), 2))
    np.testing.assert_array_equal(rows["member"], np.tile([0, 1], 5))
    np.testing.assert_array_equal(tested["step"], np.repeat([0, 10, 20], 2))
    np.testing.assert_array_equal(seen["step"], np.repeat([5, 10, 15, 20], 2))
    np.testing.assert_array_equal(seen["total"], tiny.BATCH * seen["step"].to_numpy())
    for frame in (rows, tested, seen):  # absence is never NaN
        assert np.isfinite(frame.to_numpy()).all()
    # 40 examples in batches of 8: after each 5 steps every example was presented equally often
    assert results.measured.keys() == {"test", "seen"} and [*results.arrays] == [("seen", "count")]
    count = results.arrays["seen", "count"]
    assert count.dims == ("step", "member", "axis_0") and count.values.shape == (4, 2, 40)
    np.testing.assert_array_equal(count.coords["step"], [5, 10, 15, 20])
    np.testing.assert_array_equal(count.at(step=10).values, np.full((2, 40), 2))
    assert results.status.rows() == [(0, "finished", 20), (1, "finished", 20)]


def test_scores_of_a_population_are_those_of_its_members() -> None:
    p = tiny.problem("mlp")
    labels = np.stack([p.data.y, (p.data.y + 1) % 4])
    probe = Score(scores.el2n, (0, 20), "el2n", labels=labels, batch_size=16)
    results = tiny.run(p, mesh.make(2), 2, probes=(probe,))
    array = results.arrays["el2n", "score"]
    assert [*results.arrays] == [("el2n", "score")] and array.dims[:2] == ("step", "member")
    np.testing.assert_array_equal(array.coords["step"], [0, 20])
    found = array.at(step=20).values
    assert results.state is not None
    for replica in range(2):
        member = population.take(results.state, replica)
        data = p.data.replace(y=labels[replica])
        alone = scores.over_examples(scores.el2n, p.task, member, data, batch_size=7)
        np.testing.assert_allclose(found[replica], alone, rtol=1e-5)


def test_a_diverged_replica_is_frozen_and_disturbs_nobody(caplog: Any) -> None:
    p = tiny.problem("mlp", momentum=0.0)
    rates = np.array([0.02, 1e25, 0.02], np.float32)
    with caplog.at_level(logging.WARNING, "dynamics"):
        results = tiny.run(p, mesh.make(), 3, changed={"learning_rate": rates}, how="map")
    calm = tiny.run(
        p, mesh.make(), 3, changed={"learning_rate": np.full(3, 0.02, np.float32)}, how="map"
    )
    assert results.status["status"].to_list() == ["finished", "diverged", "finished"]
    at = results.status["step"].to_list()
    assert at[0] == at[2] == 20 and 0 < at[1] < 20
    assert [r.getMessage() for r in caplog.records] == [
        f"member 1 diverged: its loss, gradient or update at step {at[1]} is not finite"
    ]
    own = results.rows["step"].to_numpy()[results.rows["member"].to_numpy() == 1]
    np.testing.assert_array_equal(own, np.arange(at[1]))  # its rows end where it diverged
    for x, y in zip(tiny.leaves(results), tiny.leaves(calm), strict=True):
        np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
    until = p._replace(num_steps=int(at[1]))
    frozen = tiny.run(until, mesh.make(), 3, changed={"learning_rate": rates}, how="map")
    for x, y in zip(tiny.leaves(results), tiny.leaves(frozen), strict=True):
        np.testing.assert_array_equal(x[1], y[1])
    np.testing.assert_array_equal(np.asarray(results.state.step), [20, 20, 20])  # pyright: ignore


def test_an_update_that_overflows_at_the_last_step_is_said_and_not_kept(caplog: Any) -> None:
    p = tiny.problem("mlp", momentum=0.0, num_steps=1)
    rates = np.array([np.inf, 0.02], np.float32)
    with caplog.at_level(logging.WARNING, "dynamics"):
        results = tiny.run(p, mesh.make(), 2, changed={"learning_rate": rates})
    assert results.status.rows() == [(0, "diverged", 0), (1, "finished", 1)]
    assert results.rows["member"].to_list() == [1] and results.rows["loss"].is_finite().all()
    assert all(np.isfinite(x).all() for x in tiny.leaves(results))
    assert [r.getMessage() for r in caplog.records] == [
        "member 0 diverged: its loss, gradient or update at step 0 is not finite"
    ]


def test_batches_from_the_host_train_the_same_network() -> None:
    p = tiny.problem("mlp")
    keys = jax.random.split(jax.random.key(0), 2)
    rows = np.stack([np.arange(0, 40, 2), np.arange(1, 40, 2)])
    sizes = np.array([16, 20])
    options = {"rows": rows, "sizes": sizes}
    state = tiny.start(p, mesh.make(), 2)
    a = tiny.run(p, mesh.make(), 2, state=state, stream=resident(p.data, 8, 2, **options))
    b = tiny.run(p, mesh.make(), 2, state=state, stream=streamed(p.data, 8, keys, **options))
    for x, y in zip(tiny.leaves(a), tiny.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_the_loss_is_traced_twice_however_long_the_run() -> None:
    p = tiny.problem("mlp")
    count = 0

    def loss(*args: Any) -> Any:
        nonlocal count
        count += 1
        return p.task.loss(*args)

    counted = p._replace(task=p.task._replace(loss=loss), num_steps=61)
    probes = (Seen(40, 7), Evaluate(11))
    tiny.run(counted, mesh.make(), 2, probes=probes)
    assert count == 2


def test_accumulation_is_the_same_step() -> None:
    p = tiny.problem("mlp")
    whole = tiny.run(p, mesh.make(), 2)
    parts = tiny.run(p, mesh.make(), 2, accumulate=4)
    for x, y in zip(tiny.leaves(whole), tiny.leaves(parts), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-6)


def test_golden_20_steps() -> None:
    """If this fails and you meant to change the step, the order, the initialisation or the loss,
    print the new numbers and say why in the commit; otherwise something changed by accident."""
    results = tiny.run(tiny.problem("mlp"), mesh.make(), 1)
    np.testing.assert_allclose(tiny.losses(results)[[0, 1, 10, 19], 0], GOLDEN, rtol=1e-5)


GOLDEN = [1.1983175, 1.3690051, 0.9165092, 0.7086844]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 3}, "accumulate must divide the batch size 8, got 3"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"record_every": -1}, "record_every must be at least 1, got -1"),
        ({"probes": (Seen(40, 0),)}, "every of 'seen' must be at least 1, got 0"),
        ({"probes": (Seen(40), Seen(40))}, "two probes are named 'seen'"),
        ({"probes": (Seen(40, name="rows"),)}, "a probe may not be named 'rows'"),
        ({"probes": (Seen(40, name="a/b"),)}, "named by letters, digits and _ . @ .*, got 'a/b'"),
        ({"probes": (Seen(40, name=""),)}, "named by letters, digits and _ . @ .*, got ''"),
        ({"probes": (Seen(40, name="../x"),)}, "named by letters, digits .*, got '../x'"),
    ],
)
def test_refusals_before_compilation(options: Any, message: str) -> None:
    p = tiny.problem("mlp")
    state = tiny.start(p, mesh.make(), 2)
    untraced = p.task._replace(loss=None)  # would fail if it were traced
    with pytest.raises(ValueError, match=message):
        fit.fit(untraced, p.optimizer, state, tiny.batches(p, 2), 20, mesh.make(), **options)


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    p = tiny.problem("mlp")
    state = tiny.start(p, mesh.make(), 2)
    with pytest.raises(ValueError, match="the stream is for 3 members, the state has 2"):
        fit.fit(p.task, p.optimizer, state, tiny.batches(p, 3), 20, mesh.make())
    with pytest.raises(ValueError, match="num_steps must be at least 0, got -2"):
        fit.fit(p.task, p.optimizer, state, tiny.batches(p, 2), -2, mesh.make())
    done = tiny.run(p, mesh.make(), 2).state
    with pytest.raises(ValueError, match="num_steps is 5, but 20 steps are already done"):
        fit.fit(p.task, p.optimizer, done, tiny.batches(p, 2), 5, mesh.make())  # pyright: ignore
    with pytest.raises(ValueError, match="members must be a multiple of the mesh's replica axis"):
        tiny.start(p, mesh.make(2), 3)
    with pytest.raises(ValueError, match="batch size must be a multiple of the mesh's data axis"):
        tiny.run(p, mesh.make(1, 3, 1), 1)
    with pytest.raises(ValueError, match="learning_rate must be one number or 2, one a member"):
        tiny.start(p, mesh.make(), 2, learning_rate=np.ones(3))
    with pytest.raises(ValueError, match="reads the hyperparameter 'learning_rate'"):
        bare = fit.init(
            p.task, p.optimizer, jax.random.split(jax.random.key(0), 2), {}, mesh.make()
        )
        fit.fit(p.task, p.optimizer, bare, tiny.batches(p, 2), 5, mesh.make())


def test_the_checkpoints_of_another_run_are_not_taken_up(tmp_path: Any) -> None:
    p = tiny.problem("mlp")
    tiny.run(p._replace(num_steps=4), mesh.make(), 2, store=Recorder(tmp_path, ()))
    for other, words in (
        ({"seed": 1}, "its keys, and so the order of its batches, are other than these"),
        ({"changed": {"learning_rate": 0.5}}, "its hyperparameters differ in 'learning_rate'"),
    ):
        with pytest.raises(CheckpointError, match=f"{tmp_path} holds another run: {words}. Give"):
            tiny.run(p, mesh.make(), 2, store=Recorder(tmp_path, ()), **other)
    with pytest.raises(RecordError, match="holds a run of another config"):
        Recorder(tmp_path, ("another",))
