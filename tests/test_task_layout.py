"""Where a task's extras lie is the task's to say, and which dataset its tables are for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec

from dynamics import fit, mesh, task
from dynamics.data.stream import doubled, resident, sampled, streamed, whole
from dynamics.plan import Planned
from dynamics.task.multiscale import multiscale
from dynamics.types import Task, Written

N, C = 40, 4
SCALARS: dict[str, Any] = {"elr_lambda": 3.0, "elr_beta": 0.7, "z_loss": 0.0}
ROWS = PartitionSpec("replica", ("data", "model"))
COPIES = PartitionSpec("replica")


@dataclass(frozen=True)
class Tables:
    """A task of one's own: a table, a count, and something like the parameters."""

    inner: Task
    num_examples: int
    words: Any

    def init(self, key: Any, hyperparameters: Any) -> Any:
        params, extras = self.inner.init(key, hyperparameters)
        table = jnp.zeros((self.num_examples, 2))
        return params, {"within": extras, "seen": table, "count": 0, "copy": dict(params)}

    def loss(self, params: Any, extras: Any, batch: Any, key: Any, hyperparameters: Any) -> Any:
        total, (_, aux) = self.inner.loss(params, extras["within"], batch, key, hyperparameters)
        seen = Written(batch.index, extras["seen"][batch.index] + 1)
        return total, (extras | {"seen": seen, "count": extras["count"] + 1}, aux)

    def evaluate(self, params: Any, extras: Any, batch: Any, hyperparameters: Any) -> Any:
        return self.inner.evaluate(params, extras["within"], batch, hyperparameters)

    def layout(self, extras: Any) -> Any:
        return dict(self.words)


def made(words: Any) -> Task:
    """Hashable, although its words are a dict."""
    return task.of_methods(Tables(tiny.problem("mlp").task, N, tuple(words.items())))


DECLARED = {"within": "parameters", "seen": "examples", "count": "replicated", "copy": "parameters"}


def specs(net: Task, rules: Any, shape: tuple[int, int, int] = (2, 2, 2)) -> Any:
    """Of each leaf of the extras of two replicas, by its path."""
    p = tiny.problem("mlp")._replace(task=net)
    where = mesh.make(*shape)
    state = jax.eval_shape(lambda: tiny.start(p, where, 2, **SCALARS))
    found = mesh.shardings(state, where, rules, net.layout)
    leaves = jax.tree_util.tree_leaves_with_path((found.extras, found.params, found.opt_state))
    return {jax.tree_util.keystr(k, simple=True, separator="/"): v.spec for k, v in leaves}


@pytest.mark.parametrize("rules", [mesh.TENSOR_PARALLEL, mesh.FULLY_SHARDED])
def test_extras_lie_as_the_task_says(rules: Any) -> None:
    found = specs(made(DECLARED), rules)
    assert found["0/seen"] == ROWS and found["0/count"] == COPIES
    copies = {name: spec for name, spec in found.items() if name.startswith("0/copy")}
    assert len(copies) == 6
    for name, spec in copies.items():
        assert spec == found[name.replace("0/copy", "1")]
    assert any(spec != COPIES for spec in copies.values())
    everything = specs(made(DECLARED)._replace(layout=lambda extras: "replicated"), rules)
    assert all(s == COPIES for name, s in everything.items() if name.startswith("0/"))
    by_rules = specs(made(DECLARED)._replace(layout=Task._field_defaults["layout"]), rules)
    assert by_rules["0/seen"] == COPIES and by_rules["0/copy/head/kernel"] != COPIES


@pytest.mark.parametrize("rules", [mesh.TENSOR_PARALLEL, mesh.FULLY_SHARDED])
@pytest.mark.parametrize("name", ["elr", "elr_plus", "z_loss", "elr of tables"])
def test_the_tables_of_this_library_declare_themselves(name: str, rules: Any) -> None:
    inner = tiny.problem("mlp").task
    net = {
        "elr": lambda: task.elr(inner, N, C),
        "elr_plus": lambda: task.elr_plus(inner, N, C),
        "z_loss": lambda: task.z_loss(task.elr(inner, N, C)),
        "elr of tables": lambda: task.elr(made(DECLARED), N, C),
    }[name]()
    found = specs(net, rules)
    tables = [spec for path, spec in found.items() if re.search("^0/(targets|seen)", path)]
    assert len(tables) == (1 if name in ("elr", "z_loss") else 2)
    assert all(spec == ROWS for spec in tables)
    for path, spec in found.items():
        if path.startswith("0/averages"):
            assert spec == found[path.replace("0/averages", "1")]
        if path == "0/steps":
            assert spec == COPIES


def test_a_wrong_declaration_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be of .*'examples'.* got 'rows'"):
        specs(made(DECLARED | {"seen": "rows"}), mesh.FULLY_SHARDED)
    with pytest.raises(ValueError, match="count"):  # nothing is said of it
        words = {name: word for name, word in DECLARED.items() if name != "count"}
        specs(made(words), mesh.FULLY_SHARDED)


def test_a_table_of_ones_own_is_split_and_written() -> None:
    p = tiny.problem("mlp", num_steps=5)._replace(task=made(DECLARED))
    found = tiny.run(p, mesh.make(1, 4, 2), 1)
    assert found.state is not None
    table = found.state.extras["seen"]
    assert table.addressable_shards[0].data.shape == (1, N // 8, 2)
    np.testing.assert_array_equal(np.asarray(table)[0], 1)  # an epoch
    assert np.asarray(found.state.extras["count"])[0] == 5


def test_the_mesh_names_no_feature() -> None:
    nets = (task.elr, task.elr_plus, lambda net, n, c: tiny.problem("convnet").task)
    tasks = [make(tiny.problem("mlp").task, N, C) for make in nets]
    named = {name for net in tasks for name in jax.eval_shape(net.init, jax.random.key(0), {})[1]}
    assert named == {"targets", "averages", "steps", "inner", "batch_stats"}
    text = Path(mesh.__file__).read_text()
    for word in (named - {"steps", "averages"}) | {"elr", "z_loss"}:  # two are plain English
        assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), word
    for pattern, _ in (*mesh.TENSOR_PARALLEL, *mesh.FULLY_SHARDED):
        assert not any(re.search(word, pattern) for word in named), pattern


# ---- the number of examples ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["resident", "streamed", "sampled", "whole", "doubled"])
def test_a_stream_knows_its_dataset(how: str) -> None:
    data, keys = tiny.images(N), jax.random.split(jax.random.key(0), 2)
    stream = {
        "resident": lambda: resident(data, 8, 2, rows=np.tile(np.arange(9), (2, 1))),
        "streamed": lambda: streamed(data, 8, keys),
        "sampled": lambda: sampled(data, 8, 2, np.full((2, N), 1 / N)),
        "whole": lambda: whole(data, 2),
        "doubled": lambda: doubled(resident(data, 8, 2)),
    }[how]()
    assert stream.num_examples == N and stream.batch_size == {"whole": N, "doubled": 16}.get(how, 8)


@pytest.mark.parametrize("wrap", [lambda net: net, task.z_loss, multiscale])
@pytest.mark.parametrize("make", [task.elr, task.elr_plus])
@pytest.mark.parametrize("n", [N - 1, N + 1, 4096])
def test_a_table_for_another_dataset_is_refused(make: Any, n: int, wrap: Any) -> None:
    """Too short, every example beyond it is held to its last row; too long, rows are another's."""
    p = tiny.problem("mlp")
    p = p._replace(task=wrap(make(p.task, n, C)))
    traced = []

    def loss(*args: Any) -> Any:
        traced.append(args)
        return wrap(make(p.task, n, C)).loss(*args)

    net, where = p.task._replace(loss=loss), mesh.make()
    state = fit.init(net, p.optimizer, jax.random.split(jax.random.key(0), 1), SCALARS, where)
    with pytest.raises(ValueError, match=f"tables for {n} examples, the stream's dataset has {N}"):
        fit.fit(net, p.optimizer, state, tiny.batches(p, 1), 5, where)
    assert not traced
    with pytest.raises(ValueError, match=f"inside has tables for {n} examples, got {N}"):
        make(p.task, N, C)


def test_where_one_of_them_is_not_known_nothing_is_checked() -> None:
    p = tiny.problem("mlp", num_steps=1)
    stream = tiny.batches(p, 1)._replace(num_examples=None)
    held = p._replace(task=task.elr(p.task, 41, C))
    tiny.run(held, mesh.make(), 1, stream=stream, changed=SCALARS)
    assert p.task.num_examples is None
    where = mesh.make(devices=mesh.topology("cpu:8"))
    with pytest.raises(ValueError, match="tables for 41"):  # a plan is refused, too
        tiny.run(held, where, 1, changed=SCALARS)
    with pytest.raises(Planned):
        tiny.run(p._replace(task=task.elr(p.task, N, C)), where, 1, changed=SCALARS)
