"""Plans: what the compiler says of a machine that is not here, read a second time by hand."""

import importlib.util
import re
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh
from test_mesh import collectives as groups_of

from dynamics import mesh, plan
from dynamics.probes import AreaUnderMargin, Evaluate, Sharpness
from runner import command as cli
from runner import plan as words

RULES = {"tp": mesh.TENSOR_PARALLEL, "fsdp": mesh.FULLY_SHARDED}


def there(name: str, *shape: int) -> Mesh:
    return mesh.make(*shape, devices=mesh.topology(name))


def planned(kind: str, where: Mesh, replicas: int, **options: Any) -> plan.Planned:
    with pytest.raises(plan.Planned, match="fit can compile for it, not run") as caught:
        tiny.run(tiny.problem(kind), where, replicas, **options)
    return caught.value


def sent(text: str) -> dict[str, int]:
    """Bytes of all results of each kind of collective in an HLO text, by another parser."""
    width, out = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}, {}
    for line in text.splitlines():
        for kind in ("all-reduce", "all-gather", "reduce-scatter", "all-to-all"):
            before, found, _ = line.partition(f" {kind}(")
            for name, dims in re.findall(r"(\w+)\[([0-9,]*)\]", before) if found else ():
                size = np.prod([int(d) for d in dims.split(",") if d], dtype=int)
                out[kind] = out.get(kind, 0) + width[name] * int(size)
    return out


@pytest.fixture(scope="module", params=["mlp", "convnet", "transformer"])
def both(request: Any) -> dict[str, tuple[plan.Plan, str, Any]]:
    """On 2 x 4 x 1 devices by both rules: the plan, the HLO text, the memory."""
    where, found = there("cpu:8", 2, 4, 1), {}
    for name, rules in RULES.items():
        run = planned(request.param, where, 2, rules=rules, how="vmap")
        chunk = run._chunk()
        compiled = chunk.compiled(mesh.placed(run._state, chunk.program.where))[1]
        found[name] = run.compile(), compiled.as_text(), compiled.memory_analysis()
    return found


def test_it_says_what_the_compiled_program_says(both: Any) -> None:
    for found, text, memory in both.values():
        step = found.programs[0]
        assert step.arguments == memory.argument_size_in_bytes
        grown = memory.output_size_in_bytes - memory.alias_size_in_bytes
        assert step.temporary == memory.temp_size_in_bytes + grown
        by_hand = sent(text)
        assert by_hand and by_hand == {
            kind: sum(c.count * c.bytes for c in step.collectives if c.kind == kind)
            for kind in by_hand
        }
        # devices 0 to 3 are one replica's, 4 to 7 the other's
        assert all(len({d // 4 for d in group}) == 1 for group in groups_of(text, 8))
        assert {axis for c in step.collectives for axis in c.axes} == {"data"}


def test_what_each_rule_moves(both: Any) -> None:
    """Copies are reduced, as large as the parameters; parts are gathered, and take less memory."""
    copies, parts = both["tp"][0], both["fsdp"][0]

    def moved(found: plan.Plan, kind: str) -> int:
        return sum(c.count * c.bytes for c in found.programs[0].collectives if c.kind == kind)

    # of places beyond the sequence there is no gradient
    assert 0.9 * copies.params <= moved(copies, "all-reduce") <= 1.5 * copies.params
    assert moved(parts, "all-gather") >= moved(copies, "all-gather") + 0.4 * copies.params
    assert parts.params < 0.5 * copies.params and parts.optimizer < 0.5 * copies.optimizer


def test_what_a_chip_holds() -> None:
    where = there("cpu:8", 2, 2, 2)
    found = planned("mlp", where, 4).compile()
    shapes = jax.eval_shape(lambda: tiny.start(tiny.problem("mlp"), mesh.make(), 4))
    whole = sum(x.size * 4 for x in jax.tree.leaves(shapes.params))
    kernels = sum(x.size * 4 for x in jax.tree.leaves(shapes.params) if x.ndim == 3)
    assert found.params == kernels // 4 + (whole - kernels) // 2  # two replicas; halves of kernels
    assert found.optimizer >= found.params  # momentum and counts
    data = tiny.images()
    assert found.data >= data.x.nbytes + data.y.nbytes
    assert found.peak >= found.programs[0].temporary + found.params


def test_probes_are_compiled_or_named() -> None:
    p, where = tiny.problem("mlp"), there("cpu:8", 2, 4, 1)
    probes = [Evaluate(5), AreaUnderMargin(len(p.data), 5), Sharpness(5)]
    found = planned("mlp", where, 2, probes=probes).compile()
    names = [program.name for program in found.programs]
    assert names == ["step", "test", "aum", "sharpness"] and not found.unplanned
    assert not any("replica" in c.axes for one in found.programs for c in one.collectives)


def test_a_program_for_every_batch_is_compiled_once(monkeypatch: Any) -> None:
    count, compiled = [], jax.stages.Lowered.compile
    monkeypatch.setattr(
        jax.stages.Lowered, "compile", lambda *a, **k: count.append(1) or compiled(*a, **k)
    )
    test = Evaluate(5, batch_size=10)  # 4 batches
    found = planned("mlp", there("cpu:4", 2, 2, 1), 2, probes=[test]).compile()
    assert len(count) == len(found.programs) == 2


def test_scores_are_split_over_the_data_axis() -> None:
    """Four devices of a replica do a quarter of the work each; of an odd batch each does all."""

    def flops(devices: int, size: int) -> float:
        probe = Evaluate(5, batch_size=size)
        run = planned("mlp", there("cpu:4", 1, devices, 1), 1, probes=[probe])
        return run.compile().programs[1].flops

    assert flops(4, 40) < 0.4 * flops(1, 40)
    assert flops(4, 5) > 0.9 * flops(1, 5)


@pytest.mark.parametrize("kind", ["convnet"])
def test_a_step_that_is_dispatched(kind: str) -> None:
    found = planned(kind, there("cpu:8", 2, 4, 1), 4).compile(probes=False)
    assert found.programs[0].flops > 0 and found.programs[0].collectives


def test_the_reader_of_groups() -> None:
    where = there("cpu:8", 2, 2, 2)
    lines = {
        "%a = f32[4] all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to": ("model",),
        "%a = f32[4] all-reduce(%x), replica_groups=[4,2]<=[2,2,2]T(0,2,1), to": ("data",),
        "%a = f32[4] all-reduce(%x), replica_groups=[2,4]<=[8], use": ("data", "model"),
        "%a = f32[4] all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0), to": ("replica",),
        "%a = f32[4] all-reduce(%x), replica_groups={}, to": ("replica", "data", "model"),
        "%a = f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to": ("data", "model"),
        "%a = f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'a'}, to": ("replica",),
        "%a = f32[4] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(2)2}, to": ("data",),
        "%a = f32[4] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) "
        "{'a'}, to": ("model",),
        "%a = f32[4] collective-permute(%x), source_target_pairs={{0,2},{2,0}}": ("data",),
    }
    for line, axes in lines.items():
        (found,) = plan.collectives(line, where)
        assert (found.axes, found.bytes, found.count) == (axes, 16, 1), line
    one = "%g = f32[4] all-gather(%x), channel_id={}, replica_groups=[4,2]<=[8]"
    text = "\n".join(one.format(channel) for channel in (3, 3, 4))
    assert [c.count for c in plan.collectives(text, where)] == [2]
    pair = "%s = (bf16[8,2]{1,0}, bf16[32,2]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]"
    with pytest.raises(ValueError, match="groups of a collective can't be read: %a = f32"):
        plan.collectives("%a = f32[4] all-reduce(%x), replica_groups=some_day, to", where)
    (found,) = plan.collectives(f"{pair}\n%d = bf16[32,2] all-gather-done(%s)", where)
    assert (found.kind, found.bytes, found.count) == ("all-gather", 128, 1)
    ring = "collective-permute-start(%x), channel_id=9, source_target_pairs={{0,2},{2,0}}"
    text = f"%p = (f32[8,2]{{1,0}}, f32[8,2]{{1,0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) {ring}"
    assert plan.collectives(text, where)[0].bytes == 64
    two = "%r = (f32[8]{0}, f32[4]{0}) all-reduce-start(%x, %y), replica_groups=[2,4]<=[8]"
    assert plan.collectives(two, where)[0].bytes == 48


def test_times_and_meshes() -> None:
    chip = words.Chip(memory=1e9, flops=1e12, bandwidth=1e11, links=1e10)
    reduced = plan.Collective("all-reduce", ("data",), 10**8, 2)
    program = plan.Program("step", 0, 0, 1e9, 1e8, (reduced,))
    t = words.times(program, chip, {"replica": 2, "data": 4, "model": 1})
    np.testing.assert_allclose(t, [1e-3, 1e-3, 2 * 1.5 * 1e8 / 1e10])
    assert t.largest == "interconnect"
    over_all = [m for m in words.meshes_of(4, 2, 2) if np.prod(m) == 4]
    assert over_all == [(1, 1, 4), (1, 2, 2), (2, 1, 2), (2, 2, 1)]


def test_the_best_of_the_meshes_that_divide() -> None:
    """More chips only where they help, parts of parameters only where copies don't fit."""
    chip = words.CHIPS["v5e"]
    small = {"params": 4e8, "state": 8e8, "data": 1e8, "flops": 4e12, "moved": 1e10, "kept": 3e9}
    ten = plan.Work(replicas=10, batch_size=128, **small)
    assert words.ranked(ten, 16, chip)[0] == (10, 1, 1)  # 2 x 8 x 1 would exchange gradients
    assert words.ranked(ten, 16, chip, 13)[0] == (2, 8, 1)  # where four hosts have four chips each
    assert words.ranked(ten._replace(replicas=16), 16, chip)[0] == (16, 1, 1)
    alone = ten._replace(replicas=1, params=4e7, state=8e7, flops=4e14)
    assert words.ranked(alone, 16, chip)[0] == (1, 16, 1)
    large = ten._replace(replicas=1, params=2e10, state=6e10)
    best = words.ranked(large, 16, chip)[0]
    assert best[2] > 1 and words.estimate(large, best, chip)[0] <= chip.memory


@pytest.mark.parametrize("kind", ["mlp", "convnet", "transformer"])
def test_work_is_what_the_compiler_counts(kind: str) -> None:
    """Products are most of the FLOPs of a step, and counted without a compiler."""
    run = planned(kind, there("cpu:1"), 1)
    work, (step, *_) = run.work(), run.compile(probes=False).programs
    assert 0.3 * step.flops < work.flops <= 1.1 * step.flops
    shapes = jax.eval_shape(lambda: tiny.start(tiny.problem(kind), mesh.make(), 1))
    assert work.params == sum(x.size * 4 for x in jax.tree.leaves(shapes.params))
    assert 0 < work.kept < work.moved


def test_products_in_loops_count_as_often_as_they_run() -> None:
    def twice(w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (x @ w, None), w, None, length=3)[0]

    flops, moved, kept = plan.counted(jax.make_jaxpr(jax.jit(twice))(np.ones((8, 8), np.float32)))
    assert (flops, moved, kept) == (3 * 2 * 8**3, 3 * 3 * 256, 3 * 256)


def test_what_does_not_fit_is_said() -> None:
    found = planned("mlp", there("cpu:8", 1, 4, 2), 4).compile()
    small = words.Chip(memory=1e3, flops=1e12, bandwidth=1e11, links=1e10)
    text = "\n".join(words.report(found, "v0:8", small))
    assert "IT DOES NOT FIT: each chip holds 4 members" in text
    assert "parameters" in text and "over data" in text and "bound by" in text


def test_the_command(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(mesh, "start", lambda **_: None)  # of this process
    small = ["--data.num-train", "200", "--train.batch-size", "20", "--score.replicas", "2"]
    command = ["plan", "data_diet", "--topology", "cpu:4", *small, "--model", "mlp"]
    assert cli.main([*command, "--model.width", "8", "--mesh", "2", "2", "1"]) == 0
    out = capsys.readouterr().out
    assert "cpu:4, 4 chips as 2 x 2 x 1 (replica, data, model); 20 members, batch 20" in out
    assert "all-reduce" in out and "over data" in out and "peak of all programs" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "plan needs --topology, as v5e:4x4"),
        (["--topology", "v9:4x4"], "topology must be cpu:N or one of v4:2x2x1, v5e:4x4, v5p:4x4x4"),
        (["--topology", "cpu:2", "--mesh", "4", "1", "1"], "needs 4 devices, that machine has 2"),
    ],
)
def test_refusals(flags: list[str], message: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(mesh, "start", lambda **_: None)
    assert cli.main(["plan", "data_diet", *flags]) == 2
    assert message in capsys.readouterr().err


def test_without_libtpu(monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="to compile for v5e:4x4 install libtpu"):
        mesh.topology("v5e:4x4")


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_for_a_tpu() -> None:
    where = there("v5e:4x4", 2, 8, 1)
    found = planned("mlp", where, 4).compile()
    assert "TPU" in where.devices.flat[0].device_kind
    step = found.programs[0]
    assert step.flops > 0 and {c.axes for c in step.collectives} == {("data",)}
    with pytest.raises(ValueError, match="libtpu has no topology 'v5e:3x7'"):
        mesh.topology("v5e:3x7")


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("kind", ["convnet", "transformer"])
def test_what_each_rule_moves_on_a_tpu(kind: str) -> None:
    where, found = there("v5e:4x4", 2, 4, 1), {}
    for name, rules in RULES.items():
        found[name] = planned(kind, where, 2, rules=rules).compile(probes=False)
    copies, parts = (found[name].programs[0].collectives for name in RULES)
    assert {axis for c in (*copies, *parts) for axis in c.axes} == {"data"}
    largest = max(copies, key=lambda c: c.bytes)
    assert largest.kind == "all-reduce" and largest.bytes >= 0.5 * found["tp"].params
    gathered = [
        sum(c.bytes * c.count for c in cs if c.kind == "all-gather") for cs in (copies, parts)
    ]
    assert gathered[1] > gathered[0] and found["fsdp"].params < 0.5 * found["tp"].params
