"""ELR and ELR+ as tasks: what a step does to the targets, where they lie, what composes."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from references import elr as reference

from dynamics import fit, losses, mesh, models, optim, population, task
from dynamics import step as steps
from dynamics.chunk import Chunk
from dynamics.data.order import batch_rows
from dynamics.data.stream import doubled, resident
from dynamics.record import Recorder
from dynamics.types import Batch, Stream, TrainState

SCALARS = {"elr_lambda": 3.0, "elr_beta": 0.7}
N, C = 40, 4


def held(kind: str = "mlp", make: Any = task.elr, **train: Any) -> tiny.Problem:
    p = tiny.problem(kind, **train)
    return p._replace(task=make(p.task, N, C))


def start(p: tiny.Problem, where: mesh.Mesh, replicas: int = 1, **changed: Any) -> TrainState:
    return tiny.start(p, where, replicas, **SCALARS | changed)


def run(p: tiny.Problem, where: mesh.Mesh, replicas: int = 1, **options: Any) -> Any:
    changed = SCALARS | options.pop("changed", {})
    return tiny.run(p, where, replicas, changed=changed, **options)


def batch_of(stream: Stream, key: jax.Array, t: int) -> Batch:
    """What step t of the first replica is computed on."""
    shared = jax.tree.map(jnp.asarray, stream.shared)
    own = jax.tree.map(lambda x: jnp.asarray(x[0]), stream.own)
    return stream.batch(shared, own, (), key, jnp.int32(t))


def one(state: TrainState) -> TrainState:
    """The first replica."""
    return population.take(state, 0)


def test_a_run_follows_the_algorithm() -> None:
    """Against a loop with one memory entry at a time: loss, gradient and targets of every step."""
    p = held(learning_rate=0.1, momentum=0.0, nesterov=False, weight_decay=0.0, num_steps=12)
    found = run(p, mesh.make())
    begun = one(start(p, mesh.make()))
    params, memory = begun.params, {}
    stream = tiny.batches(p, 1)
    plain = tiny.problem("mlp").task
    for t in range(p.num_steps):
        batch = batch_of(stream, begun.key, t)

        def loss(params: Any, targets: Any, batch: Batch = batch) -> Any:
            z = plain.evaluate(params, {}, batch, {}).logits
            q = jnp.clip(jax.nn.softmax(z), 1e-4, 1 - 1e-4)
            regulariser = jnp.log(1 - (q * targets).sum(axis=1))
            return (losses.cross_entropy(z, batch.y) + 3 * regulariser).mean()

        z = np.asarray(plain.evaluate(params, {}, batch, {}).logits)
        targets = [
            reference.visit(memory, int(i), row, 0.7) for i, row in zip(batch.index, z, strict=True)
        ]
        value, gradient = jax.value_and_grad(loss)(params, jnp.asarray(targets, jnp.float32))
        np.testing.assert_allclose(found.rows["loss"][t], value, rtol=2e-5, atol=2e-6)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient)
    table = np.asarray(found.state.extras["targets"][0])
    for i in range(N):
        np.testing.assert_allclose(table[i], memory[i], rtol=1e-4, atol=1e-6)
    assert not table[N:].any()
    assert (found.rows["loss"] < 0).any()


def test_lambda_0_is_the_task_inside() -> None:
    p = held()
    plain = tiny.run(tiny.problem("mlp"), mesh.make(), 1)
    found = run(p, mesh.make(), changed={"elr_lambda": 0.0})
    np.testing.assert_allclose(found.rows["loss"], plain.rows["loss"], rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(found.state.params), jax.tree.leaves(plain.state.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.asarray(found.state.extras["targets"]).any()


def test_replicas_have_their_own_lambda_and_beta() -> None:
    p = held()
    both = run(p, mesh.make(2), 2, changed={"elr_lambda": [0.0, 5.0], "elr_beta": [0.9, 0.5]})
    for k in range(2):
        scalars = {"elr_lambda": [0.0, 5.0][k], "elr_beta": [0.9, 0.5][k]}
        state = start(p, mesh.make(2), 2, **scalars)
        alone = fit.fit(p.task, p.optimizer, state, tiny.batches(p, 2), p.num_steps, mesh.make(2))
        a, b = (np.asarray(x.state.extras["targets"][k]) for x in (both, alone))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["mlp", pytest.param("convnet", marks=pytest.mark.slow)])
def test_accumulation_writes_the_same_rows(kind: str) -> None:
    p = held(kind)
    whole, parts = (run(p, mesh.make(), accumulate=a, stream=None) for a in (1, 2))
    if kind == "mlp":  # batch norm sees other batches
        a, b = (np.asarray(x.state.extras["targets"]) for x in (whole, parts))
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(whole.rows["loss"], parts.rows["loss"], rtol=1e-4, atol=1e-5)
    assert (np.asarray(parts.state.extras["targets"][0, :N]).sum(axis=1) > 0).all()
    assert "batch_stats" in parts.state.extras or kind == "mlp"


def test_a_diverged_replica_keeps_its_targets() -> None:
    p = held()
    update = steps.make(p.task, p.optimizer)
    state = one(start(p, mesh.make()))
    good = batch_of(resident(p.data, tiny.BATCH, 1), state.key, 0)
    state, _, _ = update(state, good)
    before = np.asarray(state.extras["targets"])
    bad = dataclasses.replace(good, x=good.x * jnp.nan)
    state, _, _ = update(state, bad)
    after, _, _ = update(state, good)  # and whatever comes then
    np.testing.assert_array_equal(state.extras["targets"], before)
    np.testing.assert_array_equal(after.extras["targets"], before)
    assert before.any()


@pytest.mark.parametrize("make", [pytest.param(task.elr, marks=pytest.mark.slow), task.elr_plus])
def test_a_run_cut_and_continued_has_the_same_bits(make: Any, tmp_path: Any) -> None:
    p = held(make=make)
    stream = doubled(tiny.batches(p, 2)) if make is task.elr_plus else tiny.batches(p, 2)
    undisturbed = run(p, mesh.make(), 2, stream=stream)
    store = Recorder(tmp_path / "cut", ())
    run(p._replace(num_steps=9), mesh.make(), 2, stream=stream, store=store)
    continued = run(p, mesh.make(), 2, stream=stream, store=store)
    tiny.assert_equal(undisturbed, continued)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_a_step_moves_rows_and_never_the_table(shape: tuple[int, int, int]) -> None:
    """On 8 devices the table is split by example, and no collective is as large as a part of it."""
    p, n = held(), 4096
    p = p._replace(task=task.elr(tiny.problem("mlp").task, n, C), data=tiny.images(n))
    where = mesh.make(*shape)
    state = start(p, where, 2)
    table = state.extras["targets"]
    parts = shape[1] * shape[2]
    assert table.addressable_shards[0].data.shape == (2 // shape[0], n // parts, C)
    chunk = Chunk(p.task, p.optimizer, state, tiny.batches(p, 2), where)
    inside = (chunk.own, chunk._feed(0, 1))
    text = chunk.program.loop.lower(state, inside, np.int32(1), chunk.shared).compile().as_text()
    moved = {}
    for line in text.splitlines():
        found = re.search(
            r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)", line
        )
        if found:
            sizes = re.findall(r"\[([\d,]*)\]", found[1])
            moved[line[:120]] = max(
                int(np.prod([int(d) for d in s.split(",") if d])) for s in sizes
            )
    assert moved and max(moved.values()) < n // parts * C / 4, max(moved, key=moved.get)  # type: ignore
    found = fit.fit(p.task, p.optimizer, state, tiny.batches(p, 2), 10, where)
    alone = fit.fit(
        p.task, p.optimizer, start(p, mesh.make(), 2), tiny.batches(p, 2), 10, mesh.make()
    )
    a, b = (np.asarray(x.state.extras["targets"]) for x in (found, alone))
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "train"),
    [
        pytest.param("convnet", {}, marks=pytest.mark.slow),
        ("mlp", {"rule": optim.Adam, "learning_rate": 1e-3}),
    ],
)
@pytest.mark.parametrize("make", [task.elr, task.elr_plus])
def test_composes(make: Any, kind: str, train: dict[str, Any]) -> None:
    """With batch statistics, and with another optimizer."""
    p = held(kind, make, **train)
    stream = doubled(tiny.batches(p, 2)) if make is task.elr_plus else None
    found = run(p, mesh.make(), 2, stream=stream)
    assert found.rows["loss"].is_finite().all()
    assert found.rows["elr"].n_unique() > 10
    if kind == "convnet":
        extras = found.state.extras["inner"]["first"] if make is task.elr_plus else None
        assert "batch_stats" in (extras or found.state.extras)


def test_refusals() -> None:
    p = held()
    with pytest.raises(ValueError, match="reads the hyperparameter 'elr_beta'"):
        tiny.run(p, mesh.make(), 1, changed={"elr_lambda": 1.0})
    with pytest.raises(ValueError, match=r"logits of shape \(8, 5\)"):
        run(p._replace(task=task.elr(tiny.problem("mlp").task, N, 5)), mesh.make())
    with pytest.raises(ValueError, match="num_classes >= 2, got 40 and 1"):
        task.elr(p.task, N, 1)
    plus = held(make=task.elr_plus)
    with pytest.raises(ValueError, match="even batch"):
        run(plus, mesh.make(), stream=resident(p.data, 7, 1))
    tokens = tiny.problem("transformer")
    with pytest.raises(ValueError, match="must be floats, got int32"):
        run(tokens._replace(task=task.elr_plus(tokens.task, N, 8)), mesh.make())


# ---- ELR+ --------------------------------------------------------------------------------------


def test_each_network_of_a_doubled_stream_sees_every_example_once_an_epoch() -> None:
    p = tiny.problem("mlp")
    two, key = doubled(tiny.batches(p, 1)), jax.random.key(3)
    seen = [np.asarray(batch_of(two, key, t).index) for t in range(N // tiny.BATCH)]
    assert two.batch_size == 2 * tiny.BATCH
    orders = [np.concatenate([batch[k::2] for batch in seen]) for k in range(2)]
    for k, order in enumerate(orders):
        assert sorted(order) == list(range(N))
        expected = batch_rows(jax.random.fold_in(key, k), jnp.int32(0), jnp.int32(N), tiny.BATCH)
        np.testing.assert_array_equal(order[: tiny.BATCH], expected)
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize(
    "options",
    [
        {"ramp": 0, "decay": 0.9},
        {"ramp": 10, "decay": 0.9, "ramp_lambda": True},
        {"ramp": 0, "decay": 0.5, "reweight": True},
    ],
)
def test_elr_plus_follows_the_algorithm(options: dict[str, Any]) -> None:
    """Two networks, two memories, two averages, written out with soft labels."""
    inner = tiny.problem("mlp").task
    p = tiny.problem("mlp", 8, learning_rate=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)
    plus = task.elr_plus(inner, N, C, **options)
    p = p._replace(task=plus)
    stream = doubled(tiny.batches(p, 1))
    found = run(p, mesh.make(), stream=stream)
    begun = one(start(p, mesh.make()))
    nets, averages = dict(begun.params), dict(begun.params)
    memory: dict[str, dict[int, Any]] = {"first": {}, "second": {}}
    decay, ramp = options["decay"], options["ramp"]
    for t in range(p.num_steps):
        batch = batch_of(stream, begun.key, t)
        key = jax.random.fold_in(jax.random.fold_in(begun.key, 2), t)  # the step's: LOSS
        weight = 3.0 * (reference.ramp(t, ramp) if options.get("ramp_lambda") else 1.0)
        total, after = 0.0, {}
        for k, (net, other) in enumerate((("first", "second"), ("second", "first"))):
            x, y, index = batch.x[k::2], batch.y[k::2], np.asarray(batch.index[k::2])
            drawn = float(jax.random.beta(jax.random.fold_in(key, k), 1.0, 1.0))
            share = max(drawn, 1 - drawn)
            clean = Batch(x=x, y=y, index=jnp.asarray(index))
            p_other = np.asarray(
                jax.nn.softmax(inner.evaluate(averages[other], {}, clean, {}).logits)
            )
            for i, row in zip(index, p_other, strict=True):
                old = memory[net].get(int(i), np.zeros(C))
                memory[net][int(i)] = 0.7 * old + 0.3 * row
            targets = np.stack([memory[net][int(i)] for i in index])
            soft = np.eye(C)[np.asarray(y)]
            mix = lambda v, s=share: s * v + (1 - s) * v[::-1]  # noqa: E731
            wanted, aim, x = mix(soft), mix(targets), mix(x)
            if options.get("reweight"):
                wanted = wanted * aim
                wanted = wanted / wanted.sum(axis=1, keepdims=True)
            wanted, aim = jnp.asarray(wanted, jnp.float32), jnp.asarray(aim, jnp.float32)

            def loss(
                w: Any,
                x: Any = x,
                y: Any = clean,
                wanted: Any = wanted,
                aim: Any = aim,
                weight: Any = weight,
            ) -> Any:
                z = inner.evaluate(w, {}, dataclasses.replace(y, x=x), {}).logits
                q = jnp.clip(jax.nn.softmax(z), 1e-4, 1 - 1e-4)
                fit = -(wanted * jax.nn.log_softmax(z)).sum(axis=1)
                return (fit + weight * jnp.log(1 - (q * aim).sum(axis=1))).mean()

            value, gradient = jax.value_and_grad(loss)(nets[net])
            total += float(value)
            after[net] = jax.tree.map(lambda w, g: w - 0.1 * g, nets[net], gradient)
        np.testing.assert_allclose(found.rows["loss"][t], total, rtol=1e-4, atol=1e-5)
        nets = after
        gamma = decay * reference.ramp(t + 1, ramp) if ramp else min(1 - 1 / (t + 1), decay)
        averages = {
            net: jax.tree.map(lambda a, w, g=gamma: g * a + (1 - g) * w, averages[net], nets[net])
            for net in nets
        }
    for net in nets:
        table = np.asarray(found.state.extras["targets"][net][0])
        for i, expected in memory[net].items():
            np.testing.assert_allclose(table[i], expected, rtol=1e-3, atol=1e-5)


def test_elr_plus_predicts_with_the_mean_of_the_logits() -> None:
    p = held(make=task.elr_plus)
    state = one(start(p, mesh.make()))
    batch = Batch(
        x=jnp.asarray(p.data.x[:5], jnp.float32),
        y=jnp.asarray(p.data.y[:5]),
        index=jnp.arange(5),
    )
    inner = tiny.problem("mlp").task
    each = [inner.evaluate(state.params[net], {}, batch, {}).logits for net in state.params]
    found = p.task.evaluate(state.params, state.extras, batch, {})
    np.testing.assert_allclose(found.logits, (each[0] + each[1]) / 2, rtol=1e-5)
    assert np.abs(np.asarray(each[0] - each[1])).max() > 0.01


def test_the_ramp_is_the_published_one() -> None:
    values = {0: 0.0067, 10_000: 0.060, 20_000: 0.2865, 30_000: 0.7316, 40_000: 1.0, 90_000: 1.0}
    for at, expected in values.items():
        assert abs(reference.ramp(at, 40_000) - expected) < 5e-4


def test_a_model_config_alone_chooses_another_parametrisation() -> None:
    """ELR with the kernel parametrisation and a smaller initial output, from values."""
    data = tiny.images()
    net = models.make(models.MLP(width=8, parametrisation="ntk", init_scale=0.5), C)
    rule = optim.SGD(learning_rate=0.5)
    p = tiny.Problem(task.elr(task.of_dataset(net, data), N, C), rule.make(20), data, rule, 20)
    found = run(p, mesh.make())
    assert found.rows["loss"][-1] < found.rows["loss"][0]
