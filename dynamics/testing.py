"""Contracts: what a task, a probe, a revision, a score or an optimizer of one's own must keep.

Each function trains something small and raises an AssertionError that says what is broken; a test
of one's own is one line. They take seconds on a CPU. Equality is to the bit where the same program
runs, and within ``CLOSE`` where another one does.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dynamics import fit, optim, population, step
from dynamics import mesh as meshes
from dynamics.checkpoint import CheckpointError
from dynamics.config import frozen
from dynamics.data.rows import subset, take
from dynamics.data.stream import resident
from dynamics.record import Recorder
from dynamics.scores import over_examples
from dynamics.types import (
    Aux,
    Batch,
    Dataset,
    Probe,
    PyTree,
    Results,
    Revision,
    Stream,
    Task,
    TrainState,
    Written,
)

CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32, another order of sums
STEPS, CUT, BATCH, MEMBERS = 6, 3, 8, 4


@frozen
class _Nothing:
    """The config of a run that is stored for a moment."""


@dataclasses.dataclass
class _Case:
    """Something small that can be trained in several ways."""

    task: Task
    optimizer: Any
    hyperparameters: Mapping[str, Any]
    data: Mapping[str, Dataset]
    stream: Callable[[int], Stream]
    probes: Callable[[], Sequence[Probe]] = lambda: ()
    revision: Callable[[], Revision | None] = lambda: None

    def begun(self, mesh: Mesh, members: int) -> TrainState:
        keys = jax.random.split(jax.random.key(0), MEMBERS)[:members]
        return fit.init(self.task, self.optimizer, keys, self.hyperparameters, mesh)

    def run(
        self, mesh: Mesh, members: int = MEMBERS, steps: int = STEPS, **options: Any
    ) -> Results:
        return fit.fit(
            self.task,
            self.optimizer,
            self.begun(mesh, members),
            self.stream(members),
            steps,
            mesh,
            **{"probes": self.probes(), "revision": self.revision(), "data": self.data} | options,
        )


def check_task(
    task: Task,
    data: Dataset,
    hyperparameters: Mapping[str, float] = {},
    *,
    batch_size: int = BATCH,
    stream: Callable[[Stream], Stream] = lambda stream: stream,
    independent: bool = True,
) -> None:
    """Assert that a task keeps its contract on examples of its kind.

    ``init`` is a function of the key; the loss is a finite scalar with a gradient like the
    parameters; ``extras`` keep their shapes and types; ``aux`` has a loss for each example, its
    logits, labels and index; in evaluation mode an example's loss depends on no other example (with
    ``independent``); the task trains as one member as it does among others, under every way of
    running a population and on every mesh that this machine has, resumes to the bit, and is traced
    once. ``stream`` wraps the batches that the task is fed (``data.stream.doubled``).
    """
    scalars = {name: jnp.float32(value) for name, value in hyperparameters.items()}
    key = jax.random.key(1)
    batch = _batch(data, np.arange(min(batch_size, len(data))))
    params, extras = task.init(key, scalars)
    _equal((params, extras), task.init(key, scalars), "init with the same key and hyperparameters")
    for leaf in jax.tree.leaves(params):
        assert jnp.issubdtype(leaf.dtype, jnp.floating), f"a parameter has type {leaf.dtype}"
    gradient = jax.value_and_grad(task.loss, has_aux=True)
    (loss, (after, aux)), grads = gradient(params, extras, batch, key, scalars)
    assert loss.shape == () and bool(jnp.isfinite(loss)), f"the loss must be one number: {loss}"
    _alike(grads, params, "the gradient")
    _alike(_settled(after, extras), extras, "extras after a step")
    _check_aux(aux, batch, "loss")
    _check_aux(task.evaluate(params, extras, batch, scalars), batch, "evaluate")
    task.network(params, extras)
    if independent:
        _check_independent(task, params, extras, data, scalars)
    feed = lambda k: stream(resident(data, batch_size, k))  # noqa: E731
    rule = optim.SGD(learning_rate=1e-3)
    given = {**rule.hyperparameters(), **hyperparameters}
    _check_runs(_Case(task, rule.make(STEPS), given, {"train": data, "test": data}, feed))


def check_optimizer(
    optimizer: optax.GradientTransformation, hyperparameters: Mapping[str, float] = {}
) -> None:
    """Assert that an optax transformation trains populations as it trains one network.

    On least squares with a matrix, a vector and a number as parameters: updates keep their types,
    the optimizer's state its structure; a member among others is the member alone; all ways and
    meshes agree; it resumes to the bit and is traced once; a member whose loss is not finite is
    frozen with finite weights.
    """
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(40, 3))
    data = _dataset(x, y.astype(np.float32))
    case = _Case(
        LEAST_SQUARES, optimizer, hyperparameters, {"train": data}, lambda k: resident(data, 8, k)
    )
    state = population.take(case.begun(meshes.make(), 1), 0)
    after = step.make(LEAST_SQUARES, optimizer)(state, _batch(data, np.arange(8)))[0]
    _alike(after, state, "the state after a step")
    _check_runs(case)
    broken = _dataset(np.where(np.arange(40)[:, None] >= 0, np.float32(1e30), x), data.y)
    lost = dataclasses.replace(case, stream=lambda k: resident(broken, 8, k)).run(meshes.make(), 1)
    assert lost.state is not None
    for leaf in jax.tree.leaves(lost.state.params):
        assert np.isfinite(np.asarray(leaf)).all(), "weights of a diverged member are not finite"


def check_probe(
    make: Callable[[], Probe],
    task: Task,
    data: Dataset,
    hyperparameters: Mapping[str, float] = {},
    *,
    rule: Any = None,
    members: Callable[[int], Callable[[], Probe]] | None = None,
) -> None:
    """Assert that a probe keeps its contract; ``make()`` makes it anew.

    It measures what it says at its cadence, with a leading member axis; watching changes no bit of
    the run; a member among others has the metrics of the member alone; a run that is cut and
    continued has the same measurements to the bit; an equal probe traces nothing again. A probe
    that holds something for each member is given as ``members(k)``, which makes it for k of them.
    """
    rule = rule or optim.SGD(learning_rate=1e-3)
    given = {**rule.hyperparameters(), **hyperparameters}
    of = members or (lambda k: make)
    case = _Case(task, rule.make(STEPS), given, {"train": data, "test": data},
                 lambda k: resident(data, BATCH, k))  # fmt: skip
    mesh = meshes.make()
    bare = case.run(mesh)
    watched = dataclasses.replace(case, probes=lambda: [of(MEMBERS)()]).run(mesh)
    _equal(bare.state, watched.state, "the state of a run, watched or not")
    name = of(MEMBERS)().name
    measured = name in watched.measured or any(key[0] == name for key in watched.arrays)
    assert measured, f"the probe {name!r} measured nothing in {STEPS} steps"
    for (_, metric), array in watched.arrays.items():
        assert array.values.shape[1] == MEMBERS, f"{metric} has no member axis: {array.dims}"
    alone = dataclasses.replace(case, probes=lambda: [of(1)()]).run(mesh, 1)
    _close_results(_first(watched), _first(alone), "a member among others and alone")
    _check_cut(dataclasses.replace(case, probes=lambda: [of(MEMBERS)()]), mesh, watched)


def check_revision(
    make: Callable[[], Revision],
    task: Task,
    data: Dataset,
    stream: Callable[[int], Stream],
    hyperparameters: Mapping[str, float] = {},
) -> None:
    """Assert that a revision keeps the shapes of what it revises, and is resumed to the bit."""
    rule = optim.SGD(learning_rate=1e-3)
    given = {**rule.hyperparameters(), **hyperparameters}
    case = _Case(task, rule.make(STEPS), given, {"train": data, "test": data}, stream,
                 revision=make)  # fmt: skip
    mesh = meshes.make()
    _check_cut(case, mesh, case.run(mesh))


def check_score(
    score: Callable[[Task, TrainState, Batch], PyTree],
    task: Task,
    data: Dataset,
    hyperparameters: Mapping[str, float] = {},
) -> None:
    """Assert that a score is a number, or several, for each example, which depends on no other one.

    The same examples in another order, in batches of another size, in a part of the data, and of a
    member of a population have the same scores.
    """
    rule = optim.SGD()
    case = _Case(task, rule.make(1), {**rule.hyperparameters(), **hyperparameters}, {},
                 lambda k: resident(data, BATCH, k))  # fmt: skip
    mesh, n = meshes.make(), len(data)
    states = case.begun(mesh, 2)
    one = population.take(states, 0)
    whole = over_examples(score, task, one, data)
    for name, values in _named(whole).items():
        assert values.shape[:1] == (n,), f"{name} must have a row an example, got {values.shape}"
    again = over_examples(score, task, one, data, batch_size=max(1, n // 3))
    _close(whole, again, "scores in batches of another size")
    order = np.random.default_rng(0).permutation(n)[: max(2, n // 2)]
    part = over_examples(score, task, one, subset(data, order))
    _close(jax.tree.map(lambda x: x[order], whole), part, "scores of a part, in another order")
    from dynamics.watch import each_member

    both = over_examples(score, task, states, data, each=each_member(mesh, "map"))
    _close(whole, jax.tree.map(lambda x: x[0], both), "scores of a member of a population")


# ---- what every training keeps ------------------------------------------------------------------


def _check_runs(case: _Case) -> None:
    """One member is what it is among others; every way and mesh agrees; cut, it is the same."""
    mesh = meshes.make()
    # the bits of one member alone: on a CPU those of the way that is chosen for its kind of model
    how = None if jax.default_backend() == "cpu" else "map"
    whole = case.run(mesh, how=how)
    alone = case.run(mesh, 1)
    _equal(_first(whole).state, alone.state, "a member among others and alone")
    assert _first(whole).rows.equals(alone.rows), "a member's rows among others and alone differ"
    for other in ("map", "vmap"):
        _close_results(whole, case.run(mesh, how=other), f"a population by {other} and as chosen")
    for shape in _meshes():
        _close_results(whole, case.run(meshes.make(*shape)), f"mesh {shape} and one device")
    _check_cut(case, mesh, whole, how=how)
    _check_traces(case, mesh)


def _check_cut(case: _Case, mesh: Mesh, whole: Results, **options: Any) -> None:
    """A run that is cut and continued, from a store, is the whole run, to the bit."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "run")
        for steps in (CUT, STEPS):
            try:
                found = case.run(mesh, steps=steps, store=Recorder(path, _Nothing()), **options)
            except CheckpointError as error:
                raise AssertionError(
                    f"what is made anew is not equal to itself: {error}"
                ) from error
    _equal(whole.state, found.state, "the state of a run, cut or not")
    assert whole.rows.equals(found.rows), "the rows of a run, cut or not, differ"
    for name, frame in found.measured.items():
        # what was measured because the first part ended there is of the cut alone
        kept = frame.filter(frame["step"].is_in(whole.measured[name]["step"].unique()))
        assert kept.equals(whole.measured[name]), f"what {name} measured, cut or not, differs"


def _check_traces(case: _Case, mesh: Mesh) -> None:
    """A second run of the same parts traces no loss."""
    count = [0]

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return case.task.loss(*arguments)

    again = dataclasses.replace(case, task=case.task._replace(loss=counted))
    again.run(mesh)
    first = count[0]
    again.run(mesh)
    assert count[0] == first, f"a second run of the same parts traced the loss {count[0] - first} x"


def _meshes() -> list[tuple[int, int, int]]:
    """The shapes of meshes that this machine has, beside one device."""
    shapes = [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 2, 2)]
    return [shape for shape in shapes if np.prod(shape) <= len(jax.devices())]


def _check_aux(aux: Aux, batch: Batch, where: str) -> None:
    b = len(batch.index)
    assert aux.loss.shape == (b,), f"{where}: aux.loss must be [{b}], got {aux.loss.shape}"
    assert len(aux.logits) == b, f"{where}: aux.logits must have {b} rows, got {aux.logits.shape}"
    assert aux.y.shape == batch.y.shape, f"{where}: aux.y must be the labels, got {aux.y.shape}"
    _equal(aux.index, batch.index, f"{where}: aux.index and the batch's index")


def _check_independent(
    task: Task, params: PyTree, extras: PyTree, data: Dataset, scalars: Mapping[str, Any]
) -> None:
    """The losses of examples, in another order and beside others."""
    n = min(BATCH, len(data))
    losses = task.evaluate(params, extras, _batch(data, np.arange(n)), scalars).loss
    order = np.arange(n)[::-1][: max(1, n // 2)].copy()
    some = task.evaluate(params, extras, _batch(data, order), scalars).loss
    _close(losses[order], some, "losses in evaluation mode, of other batches")


def _batch(data: Dataset, positions: np.ndarray) -> Batch:
    return jax.tree.map(jnp.asarray, take(data, positions))


def _settled(after: PyTree, before: PyTree) -> PyTree:
    def one(new: Any, old: Any) -> Any:
        return old if isinstance(new, Written) else new

    return jax.tree.map(one, after, before, is_leaf=lambda x: isinstance(x, Written))


def _first(results: Results) -> Results:
    """The results of the first member."""
    assert results.state is not None
    measured = {n: f.filter(f["member"] == 0) for n, f in results.measured.items()}
    arrays = {k: a._replace(values=a.values[:, :1]) for k, a in results.arrays.items()}
    rows = results.rows.filter(results.rows["member"] == 0)
    return Results(rows, measured, arrays, results.status, population.take(results.state, [0]))


def _alike(tree: PyTree, like: PyTree, what: str) -> None:
    shapes = lambda t: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), t)  # noqa: E731
    assert jax.tree.structure(tree) == jax.tree.structure(like), f"{what}: another structure"
    assert shapes(tree) == shapes(like), f"{what}: {shapes(tree)} where {shapes(like)} was"


def _named(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(at): leaf for at, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _numbers(tree: PyTree) -> dict[str, np.ndarray]:
    """Path -> leaf on the host, keys as integers."""

    def plain(x: Any) -> np.ndarray:
        key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x)

    return {name: plain(x) for name, x in _named(tree).items()}


def _equal(a: PyTree, b: PyTree, what: str) -> None:
    one, other = _numbers(a), _numbers(b)
    assert one.keys() == other.keys(), f"{what}: other parts"
    for name in one:
        same = np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f")
        assert same, f"{what} differ at {name or 'the value'}"


def _close(a: PyTree, b: PyTree, what: str) -> None:
    one, other = _numbers(a), _numbers(b)
    assert one.keys() == other.keys(), f"{what}: other parts"
    for name in one:
        near = np.allclose(one[name], other[name], **CLOSE, equal_nan=True)
        off = "" if near else f" by {np.abs(one[name] - other[name]).max():.3g}"
        assert near, f"{what} differ at {name or 'the value'}{off}"


def _close_results(a: Results, b: Results, what: str) -> None:
    assert a.state is not None and b.state is not None
    _close((a.state.params, a.state.extras), (b.state.params, b.state.extras), what)
    for name, frame in a.measured.items():
        other = b.measured[name]
        assert frame.columns == other.columns, f"{what}: {name} measured other metrics"
        for column in frame.columns:
            _close(frame[column].to_numpy(), other[column].to_numpy(), f"{what}, {name}.{column}")
    for key, array in a.arrays.items():
        _close(array.values, b.arrays[key].values, f"{what}, {'.'.join(key)}")


# ---- least squares, for optimizers --------------------------------------------------------------


def _dataset(x: np.ndarray, y: np.ndarray) -> Dataset:
    rows = np.arange(len(x), dtype=np.int32)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    return Dataset(x=x, y=y, row=rows, file_row=rows, mean=zero, std=one)


def _init(key: jax.Array, hyperparameters: Any) -> tuple[PyTree, PyTree]:
    params = {"kernel": 0.1 * jax.random.normal(key, (5, 3)), "bias": jnp.zeros(3)}
    return params | {"scale": jnp.float32(1)}, {}


def _evaluate(params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Any) -> Aux:
    out = params["scale"] * (batch.x @ params["kernel"] + params["bias"][None])
    each = 0.5 * jnp.sum((out - batch.y) ** 2, axis=-1)
    return Aux(loss=each, logits=out, y=batch.y, index=batch.index)


def _loss(
    params: PyTree, extras: PyTree, batch: Batch, key: jax.Array, hyperparameters: Any
) -> tuple[jax.Array, tuple[PyTree, Aux]]:
    aux = _evaluate(params, extras, batch, hyperparameters)
    return aux.loss.mean(), (extras, aux)


LEAST_SQUARES = Task(_init, _loss, _evaluate)
