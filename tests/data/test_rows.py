"""Parts of a dataset: an example is the same one wherever it is met, and its place is its row."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dynamics import curvature, mesh, population, scores, step, task, watch
from dynamics.data import of_arrays, subset
from dynamics.data.rows import take
from dynamics.data.stream import resident, sampled, streamed, whole
from dynamics.probes import BatchSharpness, Evaluate, KernelVelocity, Memorisation, Path
from dynamics.probes.memorisation import answers
from dynamics.types import Aux, Batch, Dataset, Task, TrainState

N, C, B = 23, 3, 4
DRAW = np.random.default_rng(0)
X, Y = DRAW.normal(size=(N, 5)).astype(np.float32), DRAW.integers(0, C, N).astype(np.int32)
DATA = of_arrays(X, Y)
TABLE = DRAW.uniform(0.5, 3, N).astype(np.float32)
PARTS = {
    "behind": np.arange(15, N),
    "every third, from the end": np.arange(N)[::-3].copy(),
    "some": np.array([7, 21, 2, 11, 3]),
}
each_part = pytest.mark.parametrize("at", PARTS.values(), ids=PARTS)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def by_row() -> Task:
    """A linear task whose logits are multiplied by the example's own entry of a table."""

    def evaluate(params: Any, extras: Any, batch: Batch, hyperparameters: Any) -> Aux:
        def predict(w: Any, x: Any) -> Any:
            return (x @ w) * extras["table"][batch.index][:, None]

        return task.of_function(predict).evaluate(params, {}, batch, hyperparameters)

    def loss(params: Any, extras: Any, batch: Batch, key: Any, hyperparameters: Any) -> Any:
        aux = evaluate(params, extras, batch, hyperparameters)
        return aux.loss.mean(), (extras, aux)

    return Task(
        lambda key, hyperparameters: (jnp.zeros((5, C)), {"table": jnp.asarray(TABLE)}),
        loss,
        evaluate,
    )


NET = by_row()
WEIGHTS = jnp.asarray(DRAW.normal(size=(5, C)), jnp.float32)
STATE = step.given(WEIGHTS, {"table": jnp.asarray(TABLE)})


def members(k: int, table: np.ndarray = TABLE) -> TrainState:
    one = population.broadcast(step.given(WEIGHTS, {"table": jnp.asarray(table)}), k)
    turned = one.params + jnp.arange(k, dtype=jnp.float32)[:, None, None] / 4
    return one.replace(params=turned)


def measured(probe: Any, net: Task, data: Dataset, state: TrainState) -> dict[str, jax.Array]:
    """What a probe's first measurement of the data says."""
    context = watch.context(net, mesh.make(), {"train": data})
    return probe.measure(context, probe.start(context, state), state)[1]


# ---- datasets and batches -----------------------------------------------------------------------


def test_examples_count_from_0_unless_they_are_given_rows() -> None:
    data = Dataset(X, Y, np.zeros(1, np.float32), np.ones(1, np.float32))
    assert data.row.dtype == np.int32 and data.file_row is data.row
    np.testing.assert_array_equal(data.row, np.arange(N))
    loaded = data.replace(file_row=data.row + 5)
    np.testing.assert_array_equal(loaded.row, np.arange(N))
    jax.tree.map(lambda x: None, data)  # trees of the form hold anything
    assert jax.eval_shape(lambda d: d, data).row.shape == (N,)


@each_part
def test_a_part_of_a_part_keeps_its_rows(at: np.ndarray) -> None:
    data = DATA.replace(file_row=DATA.row * 10)
    part = subset(subset(data, at), slice(1, 4))
    np.testing.assert_array_equal(part.row, at[1:4])
    np.testing.assert_array_equal(part.file_row, 10 * at[1:4])
    np.testing.assert_array_equal(part.x, X[at[1:4]])
    mask = np.isin(np.arange(N), at)
    np.testing.assert_array_equal(subset(data, mask).row, np.sort(at))
    for batch in (take(part, slice(None)), take(part, np.arange(3))):
        np.testing.assert_array_equal(batch.index, part.row)
        np.testing.assert_array_equal(batch.y, Y[part.row])
    other = take(part, np.array([2, 0]), labels=np.array([5, 6, 7]))
    np.testing.assert_array_equal(other.y, [7, 5])  # labels count in the part
    np.testing.assert_array_equal(other.index, part.row[[2, 0]])


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.array([0, N]), rf"positions must be 0 to {N - 1}, got 0 to {N}"),
        (np.array([-1]), "got -1 to -1"),
        (np.array([0.5]), r"positions must be integers .* got float64\[1\]"),
        (np.zeros(N, bool), "choose at least one example"),
        (np.ones(4, bool), r"a mask of 23 bools, .* got bool\[4\]"),
        (slice(4, 4), "choose at least one example"),
    ],
)
def test_positions_that_are_none(positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subset(DATA, positions)


def test_a_part_cut_by_hand_without_its_rows_is_refused() -> None:
    short = DATA.replace(x=X[:8], y=Y[:8])
    message = r"as many x, y, row and file_row, .* 'row': 23.*data.subset"
    for use in (
        lambda: subset(short, slice(3)),
        lambda: resident(short, 4, 1),
        lambda: whole(short, 1),
        lambda: scores.over_examples(scores.loss, NET, STATE, short),
    ):
        with pytest.raises(ValueError, match=message):
            use()


# ---- what is measured of a part ------------------------------------------------------------------


@each_part
@pytest.mark.parametrize("score", [scores.el2n, scores.loss, scores.grand])
def test_a_score_is_the_examples_own(score: Any, at: np.ndarray) -> None:
    """For a task that reads a table by index, in batches that are padded."""
    whole = np.asarray(scores.over_examples(score, NET, STATE, DATA, batch_size=6))
    part = scores.over_examples(score, NET, STATE, subset(DATA, at), batch_size=3)
    np.testing.assert_allclose(part, whole[at], rtol=1e-5)


@each_part
def test_elr_targets_are_the_examples_own(at: np.ndarray) -> None:
    """Of ELR itself, whose table has a row for each example: what its probe reads off a part."""
    net = task.elr(task.of_function(lambda w, x: x @ w), N, C)
    targets = np.zeros((256, C), np.float32)
    targets[:N] = DRAW.dirichlet(np.ones(C), N)
    state = step.given(WEIGHTS, {"targets": jnp.asarray(targets)})
    state = state.replace(hyperparameters={"elr_lambda": jnp.float32(3)})
    whole = scores.over_examples(answers, net, state, DATA)
    part = scores.over_examples(answers, net, state, subset(DATA, at), batch_size=3)
    for name, values in part.items():
        np.testing.assert_allclose(values, np.asarray(whole[name])[at], rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(part["target"], targets[at].argmax(axis=1))

    labels = np.stack([Y, (Y + (np.arange(N) % 2)) % C])
    probe = Memorisation(1, labels[:, at], Y[at])
    found = measured(probe, net, subset(DATA, at), population.broadcast(state, 2))
    wrong = labels[1, at] != Y[at]
    right = (targets[at].argmax(axis=1) == Y[at])[wrong].mean()
    np.testing.assert_allclose(np.asarray(found["target_correct"])[1], right, rtol=1e-6)


@each_part
def test_kernels_of_a_part_are_the_examples_own(at: np.ndarray) -> None:
    """Groups are positions in the data given; the table is read by row."""
    groups = np.array([[0, 2], [3, 1]])
    state, kernels = members(1), []
    for data, where in ((DATA, at[groups]), (subset(DATA, at), groups)):
        probe, context = KernelVelocity(1, where), watch.context(NET, mesh.make(), {"train": data})
        kernels.append(probe.measure(context, probe.start(context, state), state)[0]["kernels"])
    for one, other in zip(*kernels, strict=True):
        assert one.shape == (1, 2, C, 2, C) and np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-6)


@each_part
def test_curvature_of_a_part_is_its_own(at: np.ndarray) -> None:
    cut = curvature.cut_dataset(subset(DATA, at))
    np.testing.assert_array_equal(cut.index[0], at)
    v = jnp.asarray(DRAW.normal(size=WEIGHTS.shape), jnp.float32)
    found = curvature.of_task(NET, STATE, cut)(v)
    alone = Batch(x=jnp.asarray(X[at]), y=jnp.asarray(Y[at]), index=jnp.asarray(at))
    mean = lambda w: NET.evaluate(w, STATE.extras, alone, {}).loss.mean()  # noqa: E731
    wanted = jax.jvp(jax.grad(mean), (WEIGHTS,), (v,))[1]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


@each_part
def test_probes_of_a_part_measure_what_they_would_of_renumbered_examples(at: np.ndarray) -> None:
    """Accuracy, paths and batch sharpness: as if the table had been cut with the data."""
    part, cut = subset(DATA, at), of_arrays(X[at], Y[at])
    probes = [
        Evaluate(1, on="train", batch_size=3),
        Path(1, points=3, train="train", batches=2, batch_size=4),
        BatchSharpness(1, 2, num_batches=3),
    ]
    for probe in probes:
        here = measured(probe, NET, part, members(2))
        there = measured(probe, NET, cut, members(2, TABLE[at]))
        assert here.keys() == there.keys()
        for name, value in here.items():
            np.testing.assert_allclose(value, there[name], rtol=2e-5, atol=1e-6, err_msg=name)


# ---- what is trained on a part -------------------------------------------------------------------


@each_part
@pytest.mark.parametrize("kind", ["resident", "streamed", "sampled", "whole"])
def test_batches_of_a_part_carry_its_rows(kind: str, at: np.ndarray) -> None:
    """``rows`` and ``labels`` are by position in the part, ``index`` is the row."""
    part, m = subset(DATA, at), len(at)
    keys = jax.random.split(jax.random.key(0), 2)
    labels = DRAW.integers(0, C, (2, m)).astype(np.int32)
    rows = np.stack([DRAW.permutation(m)[:4] for _ in range(2)])
    p = np.full((2, m), 1 / m)
    made = {
        "resident": lambda: resident(part, B, 2, labels=labels, rows=rows),
        "streamed": lambda: streamed(part, B, keys, labels=labels, rows=rows),
        "sampled": lambda: sampled(part, B, 2, p, labels=labels),
        "whole": lambda: whole(part, 2, labels=labels),
    }[kind]()
    fed = next(made.host(0)) if made.host else ()
    run = jit(jax.vmap(made.batch, (None, 0, 0, 0, None)))
    found = run(made.shared, made.own, fed, keys, jnp.int32(0))
    position = {int(row): i for i, row in enumerate(at)}
    for k in range(2):
        index = np.asarray(found.index[k])
        np.testing.assert_array_equal(found.x[k], X[index])
        where = [position[int(i)] for i in index]
        np.testing.assert_array_equal(found.y[k], labels[k, where])
        if kind in ("resident", "streamed"):
            assert set(where) == set(rows[k].tolist())


def test_elr_trained_on_a_part_writes_the_rows_of_that_part() -> None:
    p = tiny.problem("mlp", num_steps=12)
    at = np.arange(5, 40, 2)
    net = task.elr(p.task, len(p.data), 4)
    p = p._replace(task=net)
    stream = resident(subset(p.data, at), 6, 1)
    found = tiny.run(p, mesh.make(), 1, stream=stream, changed={"elr_lambda": 3.0, "elr_beta": 0.7})
    assert found.state is not None
    written = np.flatnonzero(np.asarray(found.state.extras["targets"][0]).any(axis=1))
    np.testing.assert_array_equal(written, at)
