"""What a store belongs to: what it refuses, with the words that name it, and what it does not."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from dynamics import identity, mesh, models, optim, population, task
from dynamics.checkpoint import CheckpointError
from dynamics.chunk import Chunk
from dynamics.data.augment import crop_and_flip
from dynamics.data.stream import resident, streamed
from dynamics.probes import Evaluate, Forgetting
from dynamics.record import Recorder
from dynamics.types import TrainState

K, STEPS = 2, 3
LABELS = np.stack([tiny.images().y, (tiny.images().y + 1) % 4])


class Plain:
    """A probe that is no dataclass."""

    name = "plain"

    def __init__(self, every: int = 2, scale: float = 1.0):
        self.every, self.scale = every, scale

    def start(self, context: Any, state: TrainState) -> tuple:
        return ()

    def measure(self, context: Any, carry: tuple, state: TrainState) -> tuple[tuple, dict]:
        return carry, {"seen": jnp.full(population.size(state), self.scale)}


@dataclasses.dataclass(frozen=True)
class Stay:
    """A revision that changes nothing."""

    every: int = 2
    name: str = "stay"

    def start(self, context: Any, own: Any, state: TrainState) -> tuple:
        return ()

    def revise(self, carry: tuple, own: Any, state: TrainState, each: Any) -> Any:
        return carry, own, {}


def scaled(factor: float) -> Any:
    """A function whose name is that of every other one made here."""
    return lambda params: factor * params


@dataclasses.dataclass(frozen=True)
class Called(Plain):
    function: Any = scaled(1.0)
    every: int = 2
    scale: float = 1.0
    name: str = "called"


def problem(**train: Any) -> tiny.Problem:
    return tiny.problem("mlp", STEPS, **train)


def probes(p: tiny.Problem) -> list[Any]:
    return [Evaluate(2), Forgetting(len(p.data), 2), Plain(), Called()]


def run(folder: Path, p: tiny.Problem | None = None, **options: Any) -> Any:
    """The run that is stored, but for what is given."""
    p = p or problem()
    options = {"probes": probes(p)} | options
    options.setdefault("stream", tiny.batches(p, K, labels=LABELS))
    where = options.pop("where", mesh.make())
    return tiny.run(p, where, K, store=Recorder(folder, ()), **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "run"
    run(folder)
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    shutil.copytree(stored, tmp_path / "run")
    return tmp_path / "run"


def changed(p: tiny.Problem, **fields: Any) -> list[Any]:
    """The probes, the first with other fields."""
    first, *others = probes(p)
    return [dataclasses.replace(first, **fields), *others]


def batches(**options: Any) -> Any:
    """Their stream with other options."""
    data = options.pop("data", tiny.images())
    size = options.pop("batch_size", tiny.BATCH)
    return resident(data, size, K, **{"labels": LABELS} | options)


def moved(leaf: str, by: float) -> TrainState:
    """The first state with one leaf scaled."""
    state = tiny.start(problem(), mesh.make(), K)
    params = {
        **state.params,
        "head": {**state.params["head"], leaf: by + state.params["head"][leaf]},
    }
    return state.replace(params=params)


def tanh() -> tiny.Problem:
    p = problem()
    net = models.make(models.MLP(width=8, depth=2, activation="tanh"), 4)
    return p._replace(task=task.of_dataset(net, p.data))


PROGRAM = "its model, loss, optimizer, schedule or augmentation is another"
OTHER = tiny.images()
REFUSED: dict[str, tuple[Any, str]] = {
    "dataset": (lambda p: {"stream": batches(data=tiny.images(seed=1))}, "its data are other than"),
    "labels of the dataset": (
        lambda p: {"stream": batches(data=OTHER.replace(y=OTHER.y[::-1].copy()))},
        "its data are other than these",
    ),
    "labels": (
        lambda p: {"stream": batches(labels=(LABELS + 1) % 4)},
        "its batches differ in 'labels'",
    ),
    "labels of another member": (
        lambda p: {"stream": batches(labels=LABELS[::-1].copy())},
        "its batches differ in 'labels'",
    ),
    "no labels": (
        lambda p: {"stream": tiny.batches(p, K)},
        r"its batches are \['labels', 'size'\], now \['size'\]",
    ),
    "subset": (
        lambda p: {"stream": batches(sizes=np.array([30, 40]))},
        "its batches differ in 'size'",
    ),
    "batch size": (lambda p: {"stream": batches(batch_size=4)}, "its batch size is 8, now 4"),
    "accumulate": (lambda p: {"accumulate": 2}, "its accumulate is 1, now 2"),
    "record_every": (lambda p: {"record_every": 3}, "its record_every is 1, now 3"),
    "keys": (lambda p: {"seed": 1}, "its keys, and so the order of its batches, are other"),
    "hyperparameter": (
        lambda p: {"changed": {"learning_rate": [0.02, 0.03]}},
        "its hyperparameters differ in 'learning_rate'",
    ),
    "augmentation": (lambda p: {"stream": batches(augment=crop_and_flip(1))}, PROGRAM),
    "nesterov": (lambda p: {"p": problem(nesterov=False)}, PROGRAM),
    "schedule": (
        lambda p: {"p": problem(schedule=optim.Steps(milestones=(0.5,), decay=0.1))},
        PROGRAM,
    ),
    "activation": (lambda p: {"p": tanh()}, PROGRAM),
    "initial parameters": (
        lambda p: {"state": moved("kernel", 0.01)},
        r"it began with other parameters \(params.head.kernel\)",
    ),
    "a small initial bias": (
        lambda p: {"state": moved("bias", 1e-6)},
        r"it began with other parameters \(params.head.bias\)",
    ),
    "one probe more": (
        lambda p: {"probes": [*probes(p), Evaluate(2, name="more")]},
        r"its probes and revisions are \['called', 'forgetting', 'plain', 'test'\], now \[.*'more'",
    ),
    "one probe less": (
        lambda p: {"probes": probes(p)[1:]},
        r"its probes and revisions are .*'test'\], now \['called', 'forgetting', 'plain'\]",
    ),
    "cadence": (lambda p: {"probes": changed(p, every=1)}, "every of its 'test' is 2, now 1"),
    "steps for a cadence": (
        lambda p: {"probes": changed(p, every=(0, 2))},
        r"every of its 'test' is 2, now \[0, 2\]",
    ),
    "field of a probe": (
        lambda p: {"probes": changed(p, batch_size=7)},
        "batch_size of its 'test' is .*, now 7",
    ),
    "data of a probe": (
        lambda p: {"data": {"train": p.data, "test": tiny.images(seed=2)}},
        "its data sets differ in 'test'",
    ),
    "kind of a probe": (
        lambda p: {"probes": [Forgetting(40, 2, name="test"), *probes(p)[1:]]},
        "kind of its 'test' is Evaluate, now Forgetting",
    ),
    "cadence of a plain probe": (
        lambda p: {"probes": [*probes(p)[:2], Plain(3), Called()]},
        "every of its 'plain' is 2, now 3",
    ),
    "attribute of a plain probe": (
        lambda p: {"probes": [*probes(p)[:2], Plain(scale=2.0), Called()]},
        "scale of its 'plain' is 1.0, now 2.0",
    ),
    "number in a function of a probe": (
        lambda p: {"probes": [*probes(p)[:3], Called(scaled(2.0))]},
        "function of its 'called' is .*1.0.*, now .*2.0",
    ),
    "a revision more": (
        lambda p: {"revision": Stay()},
        r"its probes and revisions are .*, now \[.*'stay'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_store_refuses_another_run(folder: Path, what: str) -> None:
    change, words = REFUSED[what]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=f"{folder} holds another run: {words}"):
        run(folder, **change(problem()))
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    same = {p.name for p in before if before[p] != after.get(p)}
    assert same <= {"provenance.json", "lock"}, "nothing of it was changed"


def test_an_optax_rule_has_its_own_rate(tmp_path: Path) -> None:
    p = problem()
    for rate in (0.01, 0.01, 0.02):
        now = p._replace(optimizer=optax.sgd(rate))
        if rate == 0.01:
            run(tmp_path, now)
        else:
            with pytest.raises(CheckpointError, match=PROGRAM):
                run(tmp_path, now)


def test_batches_from_the_host_are_of_their_data(tmp_path: Path) -> None:
    p = problem()
    keys = jax.random.split(jax.random.key(0), K)

    def stream(data: Any) -> Any:
        return streamed(data, tiny.BATCH, keys, labels=LABELS)

    run(tmp_path, stream=stream(p.data))
    run(tmp_path, stream=stream(p.data))
    with pytest.raises(CheckpointError, match="its data are other than these"):
        run(tmp_path, stream=stream(tiny.images(seed=1)))
    with pytest.raises(CheckpointError, match="its data are other than these"):  # so are labels
        run(tmp_path, stream=streamed(p.data, tiny.BATCH, keys, labels=(LABELS + 1) % 4))


# ---- what is the same run -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"where": (2, 1, 1)},
        {"where": (1, 4, 1)},
        {"where": (1, 2, 2)},
        {"where": (2, 2, 2), "how": "vmap"},
        {"how": "dispatch"},
        {"checkpoint_every": 1},
        {"name": "another"},
        {"p": "a new object"},
    ],
    ids=str,
)
def test_it_does_not_refuse(folder: Path, options: dict[str, Any]) -> None:
    options = {**options}
    if "where" in options:
        options["where"] = mesh.make(*options["where"])
    if "p" in options:
        options["p"] = problem()
    assert int(np.max(run(folder, **options).state.step)) == STEPS


def test_more_steps_of_a_constant_schedule(folder: Path) -> None:
    longer = run(folder, tiny.problem("mlp", STEPS + 2))
    assert longer.rows["step"].max() == STEPS + 1
    with pytest.raises(
        ValueError, match=f"num_steps is {STEPS}, but {STEPS + 2} steps are already"
    ):
        run(folder)


@pytest.mark.parametrize("kind", ["mlp", "convnet", "transformer"])
def test_a_program_is_the_same_on_every_mesh(kind: str) -> None:
    p, found = tiny.problem(kind, STEPS), set()
    for shape in ((1, 1, 1), (1, 4, 1), (2, 2, 2)):
        where = mesh.make(*shape)
        state = tiny.start(p, where, 4)
        stream = tiny.batches(p, 4)
        chunk = Chunk(p.task, p.optimizer, state, stream, where)
        made = identity.of_run(state, stream, chunk.program.jaxpr, [], {})
        found.add(json.dumps({n: v for n, v in made.items() if n != "first state"}))
    assert len(found) == 1


FRESH = """
import json, sys
sys.path.insert(0, "tests")
import conftest
import test_identity as t
from dynamics import identity, mesh
from dynamics.chunk import Chunk

for kind in ("mlp", "convnet", "transformer"):
    p = t.tiny.problem(kind, 3, rule=t.optim.Adam)
    state, stream = t.tiny.start(p, mesh.make(), 2), t.tiny.batches(p, 2)
    chunk = Chunk(p.task, p.optimizer, state, stream, mesh.make())
    watching = [*t.probes(p), t.Stay()]
    print(json.dumps(identity.of_run(state, stream, chunk.program.jaxpr, watching, {"n": 1})))
"""


def test_it_is_the_same_in_another_process() -> None:
    """Whatever the seed of its hashes, the addresses of its objects, and the order it made them."""
    root = Path(__file__).parent.parent
    said = []
    for seed in ("1", "2"):
        own = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(root), "JAX_NUM_CPU_DEVICES": seed}
        done = subprocess.run(
            [sys.executable, "-c", "x = [object() for _ in range(999)]\n" * int(seed) + FRESH],
            cwd=root,
            env=os.environ | own,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1] and len(said[0].splitlines()) == 3


def test_another_version_of_jax_may_write_the_program_in_other_words() -> None:
    then = {"jax": "1", "program": "a", "first state": {"w": [1.0, 2.0]}}
    assert identity.difference(then, {**then, "program": "b"}) == PROGRAM
    assert identity.difference(then, {**then, "program": "b", "jax": "2"}) is None


def test_a_first_state_may_differ_by_the_rounding_of_another_mesh_and_by_no_more() -> None:
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e6):
        leaf = scale * rng.normal(size=(2, 300))
        then = {"first state": identity.marks({"w": leaf})}
        near = {"first state": identity.marks({"w": leaf * (1 + 1e-6)})}
        far = {"first state": identity.marks({"w": leaf * (1 + 1e-2)})}
        assert identity.difference(then, near) is None
        assert identity.difference(then, far) == "it began with other parameters (w)"
    nothing = identity.marks(
        {"w": np.zeros(3), "none": np.zeros((0, 2)), "nan": np.full(2, np.nan)}
    )
    assert set(nothing) == {"w", "nan"}
    assert identity.difference({"first state": nothing}, {"first state": nothing}) is None


def test_large_leaves_are_not_fetched_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    where = mesh.over_replicas(mesh.make(2))
    leaf = jax.device_put(
        np.random.default_rng(0).normal(size=(2, 50, 7)).astype(np.float32), where
    )
    small = identity.marks([leaf])["0"]
    monkeypatch.setattr(identity, "WHOLE", 100)
    large = identity.marks([leaf])["0"]
    assert len(large) == identity.ENTRIES and large == small[: identity.ENTRIES]


# ---- programs and values ------------------------------------------------------------------------


def of(fn: Any, *args: Any) -> str:
    return identity.of_program(jax.make_jaxpr(fn)(*args))


def test_a_program_is_its_equations_and_all_constants_in_them() -> None:
    x, table, other = jnp.ones(5000), jnp.arange(5000.0), jnp.arange(5000.0).at[4000].set(1.0)

    def nested(table: Any, scale: float = 2.0) -> Any:
        inner = jax.jit(lambda x: x * table)
        body = lambda c, _: (inner(c) + np.float32(scale), None)  # noqa: E731
        return lambda x: jax.lax.scan(body, x, None, length=3)[0]

    found = of(nested(table), x)
    assert found == of(nested(table), x) == of(nested(jnp.arange(5000.0)), x)
    assert found != of(nested(other), x)
    assert found != of(nested(table, 2.0000002), x)
    assert of(jnp.sin, jnp.ones(3)) != of(jnp.sin, jnp.ones(4))
    assert of(lambda a, b: a - b, 1.0, 1.0) != of(lambda a, b: b - a, 1.0, 1.0)
    assert of(lambda a, b: (a, b), 1.0, 1.0) != of(lambda a, b: (b, a), 1.0, 1.0)
    cond = lambda one, two: lambda x: jax.lax.cond(x > 0, one, two, x)  # noqa: E731
    assert of(cond(jnp.sin, jnp.cos), 1.0) != of(cond(jnp.cos, jnp.sin), 1.0)


def test_values() -> None:
    """By value, not by object: what is equal has one description."""
    array = np.arange(3, dtype=np.float32)
    assert identity.describe(array) == identity.describe(jnp.arange(3.0))
    assert identity.describe(np.arange(3)) != identity.describe(np.arange(3).astype(np.int32))
    assert identity.describe({3, 1, 2}) == identity.describe(frozenset((2, 3, 1))) == [1, 2, 3]
    assert identity.describe(np.int32(4)) == identity.describe(4) == 4
    assert identity.describe(range(3)) == identity.describe([0, 1, 2]) == [0, 1, 2]
    assert identity.describe(scaled(1.0)) == identity.describe(scaled(1.0))
    assert identity.describe(scaled(1.0)) != identity.describe(scaled(2.0))
    key = jax.random.key(0)
    assert identity.describe(key) != identity.describe(jax.random.key(1))
    assert identity.describe(Plain(3).start) == identity.describe(Plain(3).start)
    assert identity.digest({"a": array}) != identity.digest({"b": array})
    assert identity.digest(np.arange(4)) != identity.digest(np.arange(4).reshape(2, 2))
    json.dumps(identity.describe([array, scaled, Plain(), None, key, {"a": (1, 2.0, "x")}]))
