"""Faults of the first data model, each with two more of its kind: what is absent, what is taken
for something else, what a store belongs to, and what is left of a run."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tiny

from dynamics import fit, mesh, optim, population, record
from dynamics.checkpoint import CheckpointError
from dynamics.data.stream import resident
from dynamics.probes import Evaluate, Forgetting
from dynamics.record import Findings, Recorder
from dynamics.types import Results, TrainState

STEPS, EVERY = 6, 3
RATES = np.array([0.02, 1e30], np.float32)


@dataclasses.dataclass(frozen=True)
class Weights:
    """A StateProbe whose metrics are no numbers where they have reason to be."""

    every: Any = EVERY
    name: str = "weights"

    def start(self, context: Any, state: TrainState) -> jax.Array:
        return jnp.full(len(state.diverged), jnp.nan)

    def measure(self, context: Any, carry: jax.Array, state: TrainState) -> Any:
        size = sum(
            jnp.abs(x).sum(axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(state.params)
        )
        return size, {"moved": size - carry, "size": size, "inverse": 0 * size - jnp.inf}


@dataclasses.dataclass(frozen=True)
class Counted:
    """A StepProbe: the steps it saw, as a scalar and as an array."""

    every: Any = 1
    name: str = "counted"

    def init(self, state: TrainState) -> jax.Array:
        return jnp.float32(0)

    def fold(self, carry: jax.Array, aux: Any) -> Any:
        return carry + 1, {"steps": carry + 1, "twice": jnp.stack([carry + 1, carry + 1])}


def problem(**train: Any) -> tiny.Problem:
    return tiny.problem("mlp", STEPS, **{"momentum": 0.0, "nesterov": False} | train)


def probes(p: tiny.Problem) -> list[Any]:
    return [Evaluate(EVERY), Weights(), Counted(), Forgetting(len(p.data), EVERY)]


def run(p: tiny.Problem | None = None, rates: Any = RATES, **options: Any) -> Results:
    p = p or problem()
    options = {"probes": probes(p), "how": "map", "changed": {"learning_rate": rates}} | options
    return tiny.run(p, mesh.make(), len(rates), **options)


@pytest.fixture(scope="module")
def ran() -> Results:
    return run()


@pytest.fixture(scope="module")
def at(ran: Results) -> int:
    """Where the second member diverged: its first update is much too large."""
    assert ran.status["status"].to_list() == ["finished", "diverged"]
    step = ran.status["step"].to_list()
    assert step[0] == STEPS and 0 <= step[1] < EVERY
    return step[1]


def steps(frame: pl.DataFrame, member: int) -> list[int]:
    return frame.filter(pl.col("member") == member)["step"].to_list()


# ---- 1. a row is of what it is of, whatever its numbers -----------------------------------------


def test_a_diverged_members_steps_are_not_taken_for_measurements(ran: Results, at: int) -> None:
    """Training rows whose loss was not a number were read as rows of a probe, step 3 twice."""
    for name in ("test", "weights"):
        assert steps(ran.measured[name], 0) == [0, 3, 6]
        assert steps(ran.measured[name], 1) == [0]
    assert steps(ran.measured["counted"], 0) == [1, 2, 3, 4, 5, 6]
    assert steps(ran.measured["counted"], 1) == list(range(1, at + 1))
    assert steps(ran.rows, 0) == list(range(STEPS)) and steps(ran.rows, 1) == list(range(at))
    assert ran.rows.columns == ["step", "member", "loss"]
    assert ran.rows["loss"].is_finite().all() and ran.measured["test"]["loss"].is_finite().all()


def test_a_healthy_metric_that_is_no_number_is_a_measurement(ran: Results) -> None:
    """As a speed is before the first step, or a logarithm of nothing."""
    rows = ran.measured["weights"].filter(pl.col("member") == 0)
    assert rows["moved"].is_nan().to_list() == [True, False, False]
    assert rows["inverse"].to_list() == [-np.inf] * 3
    assert not any(
        frame[c].is_null().any() for frame in ran.measured.values() for c in frame.columns
    )


@pytest.mark.parametrize("rates", [[1e30, 1e30], [np.nan, np.inf]])
def test_a_population_of_which_nothing_is_left_has_its_frames(tmp_path: Any, rates: Any) -> None:
    """Without rows, if so, but with their columns: stored, taken up again, or neither."""
    p = problem()
    options: Any = {"rates": np.array(rates, np.float32), "record_every": STEPS}
    options["probes"] = [Weights((2, 5)), Counted((4,))]
    found = run(p, **options)
    assert found.status["status"].to_list() == ["diverged"] * 2
    assert found.measured["weights"].columns == ["step", "member", "inverse", "moved", "size"]
    assert found.measured["counted"].columns == ["step", "member", "steps"]
    assert len(found.measured["counted"]) == 0 == len(found.measured["weights"].filter(step=5))
    for _ in range(2):
        tiny.assert_equal(found, run(p, store=Recorder(tmp_path, ()), **options))
    first = run(p, rates=options["rates"], probes=[Weights()])
    assert steps(first.measured["weights"], 0) == steps(first.measured["weights"], 1) == [0]


# ---- 2. what was measured until then is kept ----------------------------------------------------


def test_what_a_member_measured_before_it_diverged_is_kept(ran: Results, at: int) -> None:
    """Also where a metric is no number: it was measured."""
    alone = run(rates=RATES[:1])
    for name, frame in ran.measured.items():
        first = frame.filter(member=0)
        tiny.assert_frame(first, alone.measured[name], name)
    rows = ran.measured["weights"].filter(member=1)
    assert len(rows) == 1 and np.isnan(rows["moved"][0]) and rows["size"][0] > 0
    assert len(ran.measured["counted"].filter(member=1)) == at
    both = ran.arrays["counted", "twice"]
    assert both.dims == ("step", "member", "axis_0")
    np.testing.assert_array_equal(both.coords["step"], np.arange(1, STEPS + 1))


def late(p: tiny.Problem, step: int) -> Any:
    """A stream whose inputs are no numbers for member 1 from a step on."""
    plain = resident(p.data, tiny.BATCH, 2)
    own = {**plain.own, "bad": np.array([False, True])}

    def batch(shared: Any, own: Any, fed: Any, key: Any, now: Any) -> Any:
        mine = {name: value for name, value in own.items() if name != "bad"}
        found = plain.batch(shared, mine, fed, key, now)
        return found.replace(x=jnp.where(own["bad"] & (now >= step), jnp.nan, found.x))

    return plain._replace(batch=batch, own=own)


@pytest.mark.parametrize("bad", range(STEPS))
def test_a_member_is_measured_up_to_the_step_it_diverged_at(bad: int) -> None:
    """At whatever step that is, the last one too; and what it measured is its own."""
    p = problem()
    found = run(p, rates=np.full(2, 0.02, np.float32), stream=late(p, bad))
    assert found.status.rows() == [(0, "finished", STEPS), (1, "diverged", bad)]
    assert steps(found.rows, 1) == list(range(bad))
    for name, due in (("test", [0, 3, 6]), ("counted", [1, 2, 3, 4, 5, 6])):
        assert steps(found.measured[name], 0) == due
        assert steps(found.measured[name], 1) == [step for step in due if step <= bad]
    calm = run(p, rates=np.full(2, 0.02, np.float32), stream=late(p, 10 * STEPS))
    for name, frame in calm.measured.items():
        kept = frame.filter((pl.col("member") == 0) | (pl.col("step") <= bad))
        tiny.assert_frame(found.measured[name], kept, name)


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_stored_cut_and_continued_it_is_the_same(tmp_path: Path, cut: int) -> None:
    """Where a member diverges before the cut, at it, and after it."""
    p = problem()
    options: Any = {"rates": np.full(2, 0.02, np.float32), "stream": late(p, 3)}
    options["probes"] = [Evaluate((0, 3, 6)), Counted((2, 3, 4))]
    whole = run(p, **options)
    for done in (cut, STEPS, STEPS):
        part = p._replace(num_steps=done)
        found = run(part, store=Recorder(tmp_path, ()), checkpoint_every=2, **options)
    tiny.assert_equal(whole, found)
    live = record.read(tmp_path)
    for name, frame in ({"rows": whole.rows} | whole.measured).items():
        tiny.assert_frame(live.frames[name], frame, name)
    for key, array in whole.arrays.items():
        tiny.assert_array(live.arrays[".".join(key)], array)


# ---- 4. a store is one run's --------------------------------------------------------------------


def test_one_more_stateless_probe_is_refused_and_the_store_is_as_it_was(tmp_path: Path) -> None:
    """It came back without that probe's columns, and said nothing."""
    p = problem()
    few = probes(p)[:1]
    whole = run(p, probes=few, store=Recorder(tmp_path, ()))
    with pytest.raises(CheckpointError, match=r"are \['test'\], now \['test', 'weights'\]"):
        run(p, probes=[*few, Weights()], store=Recorder(tmp_path, ()))
    again = run(p, probes=few, store=Recorder(tmp_path, ()))
    tiny.assert_equal(whole, again)


@pytest.mark.parametrize("kind", ["dataset", "labels", "batch size", "order"])
def test_a_run_is_not_continued_on_something_else_of_the_same_shapes(
    tmp_path: Path, kind: str
) -> None:
    p = problem()
    labels = np.tile(p.data.y, (2, 1))
    begun: Any = {"rates": RATES[:1].repeat(2), "probes": []}
    stream = resident(p.data, tiny.BATCH, 2, labels=labels)
    part = p._replace(num_steps=2)
    run(part, store=Recorder(tmp_path, ()), stream=stream, **begun)
    reverse = p.data.replace(x=p.data.x[::-1].copy(), y=p.data.y[::-1].copy())
    other, words = {
        "dataset": ({"stream": resident(reverse, 8, 2, labels=labels)}, "its data are other"),
        "labels": ({"stream": resident(p.data, 8, 2, labels=labels[:, ::-1].copy())}, "'labels'"),
        "batch size": ({"stream": resident(p.data, 4, 2, labels=labels)}, "batch size is 8, now 4"),
        "order": ({"stream": stream, "seed": 5}, "the order of its batches"),
    }[kind]
    with pytest.raises(CheckpointError, match=words):
        run(p, store=Recorder(tmp_path, ()), **other, **begun)


def test_a_probe_of_the_same_name_that_measures_something_else_is_refused(tmp_path: Path) -> None:
    """Or the same at other steps, or on other data: rows of two kinds would stand in one frame."""
    p = problem()
    part = p._replace(num_steps=2)
    run(part, probes=[Evaluate(2)], store=Recorder(tmp_path, ()))
    data = {"train": p.data, "test": p.data}
    other_data = data | {"test": tiny.images(seed=9)}
    for other, seen, words in (
        (Weights(2, name="test"), data, "kind of its 'test' is Evaluate, now Weights"),
        (Evaluate(3), data, "every of its 'test' is 2, now 3"),
        (Evaluate(2), other_data, "its data sets differ in 'test'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            run(p, probes=[other], data=seen, store=Recorder(tmp_path, ()))


# ---- 5. the state is a thing of its own ---------------------------------------------------------


def equal(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: Any) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("stored") / "run"
    found = run(rates=RATES[:1].repeat(2), store=Recorder(folder, ()), checkpoint_every=2)
    return folder, found


def test_the_state_is_loaded_without_the_carries_of_its_probes(stored: Any) -> None:
    folder, found = stored
    state = fit.load(folder)
    equal(state.params, found.state.params)
    equal(state.hyperparameters, found.state.hyperparameters)
    equal((state.step, state.diverged), (found.state.step, found.state.diverged))
    equal(jax.random.key_data(state.key), jax.random.key_data(found.state.key))
    assert state.opt_state == () and state.extras == {}
    earlier = fit.load(folder, 4)
    assert np.max(np.asarray(earlier.step)) == 4
    with pytest.raises(CheckpointError, match=r"has no checkpoint 3, it has \[2, 4, 6\]"):
        fit.load(folder, 3)
    for nothing in (folder / "nothing", folder.parent):
        with pytest.raises(CheckpointError, match=f"{nothing} has no checkpoints"):
            fit.load(nothing)
        assert not (nothing / "checkpoints").exists()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_a_loaded_state_trains_on_whatever_mesh_it_is_put_on(stored: Any, shape: Any) -> None:
    """From the step it was stored at: as the run would have gone on, without its probes."""
    folder, found = stored
    p, where = problem(), mesh.make(*shape)
    like = tiny.start(p, where, 2)
    state = fit.load(folder, 4, like=like)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert jax.tree.structure(state) == jax.tree.structure(like)
    on = fit.fit(p.task, p.optimizer, state, tiny.batches(p, 2), STEPS, where)
    for x, y in zip(tiny.leaves(on), tiny.leaves(found), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)
    if shape == (1, 1, 1):
        equal(tiny.leaves(on), tiny.leaves(found))
    other = tiny.problem("mlp", rule=optim.Adam)
    with pytest.raises(CheckpointError, match="does not fit this run: state.opt_state"):
        fit.load(folder, like=tiny.start(other, where, 2))


def test_a_damaged_checkpoint_gives_way_to_the_newest_intact_one(
    stored: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stored[0], folder)
    for damaged, left in ((6, 4), (4, 2)):
        file = next((folder / "checkpoints" / str(damaged) / "state").rglob("*_METADATA"))
        file.write_bytes(b"")
        state = fit.load(folder)
        assert np.max(np.asarray(state.step)) == left
        with pytest.raises(CheckpointError, match=f"checkpoint {damaged} in .* is damaged"):
            fit.load(folder, damaged)
    assert not (folder / "damaged").exists()  # whoever reads changes nothing
    shutil.rmtree(folder / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is intact"):
        fit.load(folder)


def containers() -> dict[str, Any]:
    number = iter(range(100))
    x = lambda: jnp.full((2, 3), next(number), jnp.float32)  # noqa: E731
    return {"a.b": x(), "a": {"b": x()}, "pair": (x(), [x(), {"deep": (x(),)}]), "empty": {}}


@pytest.mark.parametrize("extras", [{}, (), containers()], ids=["{}", "()", "nested"])
def test_a_saved_state_comes_back_whatever_its_extras_are_made_of(
    tmp_path: Path, extras: Any
) -> None:
    p = problem()
    state = tiny.start(p, mesh.make(), 2).replace(extras=extras)
    fit.save(tmp_path / "weights", state)
    found, whole = fit.load(tmp_path / "weights"), fit.load(tmp_path / "weights", like=state)
    for one in (found, whole):
        assert jax.tree.structure((one.params, one.extras)) == jax.tree.structure(
            (state.params, state.extras)
        )
        equal((one.params, one.extras), (state.params, state.extras))
    equal(whole.opt_state, state.opt_state)


def test_what_is_saved_again_stays_unless_it_was_damaged(tmp_path: Path) -> None:
    state = tiny.start(problem(), mesh.make(), 2)
    fit.save(tmp_path, state)
    (seal,) = (tmp_path / "checksums").iterdir()
    before = seal.stat().st_mtime_ns
    fit.save(tmp_path, state)
    assert seal.stat().st_mtime_ns == before
    file = max((tmp_path / "checkpoints").rglob("*"), key=lambda f: f.stat().st_size * f.is_file())
    file.write_bytes(file.read_bytes()[:-3])
    fit.save(tmp_path, state)
    equal(fit.load(tmp_path).params, state.params)
    assert (tmp_path / "damaged").is_dir()


def test_the_weights_of_a_group_and_of_stages_outlive_it(tmp_path: Path) -> None:
    """They were removed with the group's directory when the run succeeded."""
    p, made = problem(), {}

    def compute(points: Any, recorder: Any) -> list[Findings]:
        stage = recorder.stage("train")
        found = run(p, rates=np.float32(points), probes=[], store=stage)
        assert found.state is not None
        made.update(state=found.state, group=recorder.path)
        one = [population.take(found.state, [k]) for k in range(len(points))]
        return [Findings({"rows": found.rows}, {}, {"last": state}) for state in one]

    def keep(home: Path, found: Findings) -> None:
        fit.save(home / "weights" / "last", found.weights["last"])

    points = (0.02, 0.03)
    record.completed(tmp_path, points, compute, {}, keep)
    homes = sorted(path.parent for path in tmp_path.glob("*/done.json"))
    assert len(homes) == 2 and not made["group"].exists()
    rates = []
    for home in homes:
        state = fit.load(home / "weights" / "last")
        rates.append(round(float(state.hyperparameters["learning_rate"][0]), 4))
        k = points.index(rates[-1])
        equal(state.params, jax.tree.map(lambda x, k=k: x[k : k + 1], made["state"].params))
        assert record.read(home).done
    assert sorted(rates) == [0.02, 0.03]
