"""Meshes: the same trajectory on all of them, and nothing between replicas."""

import itertools
import re
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from dynamics import mesh
from dynamics.chunk import Chunk
from dynamics.record import Recorder

SHAPES = [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


@pytest.fixture(scope="module")
def reference(request: Any) -> Any:
    p = tiny.problem(request.param)
    return p, tiny.run(p, mesh.make(), 8)


def cases() -> list[Any]:
    """The MLP on every mesh; what compiles longer once where everything is split, else slow."""
    rules = {"tp": mesh.TENSOR_PARALLEL, "fsdp": mesh.FULLY_SHARDED}
    found = []
    for kind, shape, rule in itertools.product(("mlp", "convnet", "transformer"), SHAPES, rules):
        if rule == "fsdp" and shape[1] == 1:
            continue  # nothing to shard over data
        one = "tp" if kind == "convnet" else "fsdp"
        quick = kind == "mlp" or (shape, rule) == ((2, 2, 2), one)
        marks = () if quick else pytest.mark.slow
        name = f"{kind}-{'x'.join(map(str, shape))}-{rule}"
        found.append(pytest.param(kind, shape, rules[rule], id=name, marks=marks))
    return found


@pytest.mark.parametrize(("reference", "shape", "rules"), cases(), indirect=["reference"])
def test_every_mesh_gives_the_same_trajectory(reference: Any, shape: Any, rules: Any) -> None:
    """Every loss within 2e-6 of itself, every array of the final state within 2e-6 of its norm."""
    p, expected = reference
    here = mesh.make(*shape)
    found = tiny.run(p, here, 8, rules=rules)
    np.testing.assert_allclose(found.rows["loss"], expected.rows["loss"], rtol=2e-6)
    for x, y in zip(tiny.leaves(found), tiny.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= 2e-6 * np.linalg.norm(y)
    if shape == (2, 2, 2):
        assert _groups(p, here, rules) and all(
            len({device // 4 for device in group}) == 1 for group in _groups(p, here, rules)
        )


def _groups(p: Any, here: Any, rules: Any) -> list[list[int]]:
    """The devices of each collective in the compiled chunk; device // 4 is its replica group."""
    state = tiny.start(p, here, 8)
    chunk = Chunk(p.task, p.optimizer, state, tiny.batches(p, 8), here, rules=rules, how="vmap")
    rest = (chunk.own, ())
    text = chunk.program.loop.lower(state, rest, np.int32(1), chunk.shared).compile().as_text()
    return collectives(text, 8)


def collectives(text: str, devices: int) -> list[list[int]]:
    """The device groups of every collective in an HLO text."""
    groups: list[list[int]] = []
    for line in text.splitlines():
        if not re.search(r"= .*(all-reduce|all-gather|all-to-all|reduce-scatter)(-start)?\(", line):
            continue
        if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
            groups += [
                [int(d) for d in g.split(",")] for g in re.findall(r"\{([\d,]+)\}", found[1])
            ]
        elif found := re.search(
            r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", line
        ):
            dims = [int(d) for d in found[3].split(",")]
            order = np.arange(int(np.prod(dims))).reshape(dims)
            if found[5]:
                order = order.transpose([int(d) for d in found[5].split(",")])
            groups += order.reshape(int(found[1]), int(found[2])).tolist()
        else:
            groups.append(list(range(devices)))
    return groups


def test_no_collective_when_replicas_alone_are_spread() -> None:
    p = tiny.problem("mlp")
    assert _groups(p, mesh.make(8), mesh.TENSOR_PARALLEL) == []


def test_the_collective_parser_sees_what_crosses_replicas() -> None:
    """The negative control: a mean over replicas must be found."""
    here = mesh.make(8)
    x = jax.device_put(np.ones((8, 4), np.float32), mesh.over_replicas(here))
    text = jax.jit(lambda x: x.mean(axis=0)).lower(x).compile().as_text()
    assert collectives(text, 8) == [list(range(8))]


def test_saved_on_one_mesh_restored_on_another(tmp_path: Any) -> None:
    p = tiny.problem("mlp")
    whole = tiny.run(p, mesh.make(), 4)
    path = tmp_path / "run"
    tiny.run(p._replace(num_steps=8), mesh.make(2, 2, 2), 4, store=Recorder(path, ()))
    again = tiny.run(p, mesh.make(4), 4, store=Recorder(path, ()))
    for x, y in zip(tiny.leaves(whole), tiny.leaves(again), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_fully_sharded_parameters_are_spread() -> None:
    p = tiny.problem("transformer")
    here = mesh.make(2, 4, 1)
    where = mesh.shardings(jax.eval_shape(lambda: tiny.start(p, here, 2)), here, mesh.FULLY_SHARDED)
    state = tiny.start(p, here, 2)
    sizes = jax.tree.map(
        lambda x, s: np.prod(s.shard_shape(x.shape)) / x.size, state.params, where.params
    )
    big = [
        f for f, x in zip(*map(jax.tree.leaves, (sizes, state.params)), strict=True) if x.size > 64
    ]
    assert big and max(big) == 1 / 8


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 1, 1), r"needs 16 devices, this machine has 8 \(set JAX_NUM_CPU_DEVICES for more\)"),
        ((0, 1, 1), "mesh axis replica must be at least 1, got 0"),
    ],
)
def test_impossible_meshes_are_refused(shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mesh.make(*shape)


def test_a_foreign_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="the mesh must have the axes"):
        mesh.check(jax.make_mesh((8,), ("x",)), 8)


def test_rules_must_cover_every_leaf() -> None:
    p = tiny.problem("mlp")
    state = tiny.start(p, mesh.make(), 1)
    with pytest.raises(ValueError, match="no sharding rule matches 'params/dense_0/bias'"):
        mesh.shardings(state, mesh.make(), (("kernel", mesh.replicated),))


def test_replicas_take_the_devices_that_divide_them() -> None:
    assert mesh.for_population(6).shape["replica"] == 6
    assert mesh.for_population(9).shape["replica"] == 3
    assert mesh.for_population(11).shape["replica"] == 1
