"""The smallest problems that still have every part: shared by the tests of the loop."""

from typing import Any, NamedTuple

import jax
import numpy as np

from dynamics import fit, models, optim, task
from dynamics.data.stream import resident
from dynamics.record import Array
from dynamics.types import Dataset, Results, Stream, Task, TrainState

BATCH = 8


class Problem(NamedTuple):
    task: Task
    optimizer: Any
    data: Dataset
    rule: optim.Optimizer
    num_steps: int


def images(n: int = 40, size: int = 6, seed: int = 0) -> Dataset:
    """Made-up uint8 images whose label shifts their brightness."""
    generator = np.random.default_rng(seed)
    y = (np.arange(n) % 4).astype(np.int32)
    x = np.clip(generator.normal(100, 20, (n, size, size)) + 30 * y[:, None, None], 0, 255)
    x = x.astype(np.uint8)
    mean, std = np.full((1, 1), x.mean(), np.float32), np.full((1, 1), x.std(), np.float32)
    return Dataset(x=x, y=y, mean=mean, std=std)


def tokens(n: int = 40, length: int = 6, seed: int = 0) -> Dataset:
    """Made-up token sequences; the label of a place is the next token."""
    text = np.random.default_rng(seed).integers(0, 8, (n, length + 1)).astype(np.uint8)
    nothing = np.zeros(0, np.float32)
    return Dataset(x=text[:, :-1], y=text[:, 1:], mean=nothing, std=nothing)


def problem(
    kind: str, num_steps: int = 20, rule: type[optim.SGD | optim.Adam] = optim.SGD, **fields: Any
) -> Problem:
    data, outputs = (tokens(), 8) if kind == "transformer" else (images(), 4)
    net = {
        "mlp": models.MLP(width=8, depth=2),
        "convnet": models.Convnet(channels=(4, 8), norm="batch"),
        "transformer": models.Transformer(width=8, depth=1, num_heads=2, max_length=8),
    }[kind]
    numbers: dict[str, Any] = {"learning_rate": 0.02, "weight_decay": 1e-3}
    settings = rule(**numbers | fields)
    made = task.of_dataset(models.make(net, outputs), data)
    return Problem(made, settings.make(num_steps), data, settings, num_steps)


def start(p: Problem, mesh: Any, replicas: int, seed: int = 0, **changed: Any) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), replicas)
    scalars = p.rule.hyperparameters() | changed
    return fit.init(p.task, p.optimizer, keys, scalars, mesh)


def batches(p: Problem, replicas: int, **options: Any) -> Stream:
    return resident(p.data, BATCH, replicas, **options)


def run(p: Problem, mesh: Any, replicas: int, **options: Any) -> Results:
    """``num_steps`` steps from the seed's state; probes may look at the data as train or test."""
    options = {"data": {"train": p.data, "test": p.data}} | options
    seed, changed = options.pop("seed", 0), options.pop("changed", {})
    state = options.pop("state", None) or start(p, mesh, replicas, seed, **changed)
    stream = options.pop("stream", None) or batches(p, replicas)
    return fit.fit(p.task, p.optimizer, state, stream, p.num_steps, mesh, **options)


def leaves(results: Results) -> list[np.ndarray]:
    """Everything that was trained, on the host."""
    assert results.state is not None
    state = results.state
    return [np.asarray(x) for x in jax.tree.leaves((state.params, state.extras, state.opt_state))]


def assert_equal(a: Results, b: Results) -> None:
    """Bit for bit: state, frames, arrays with their dims and coordinates, status."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert a.measured.keys() == b.measured.keys()
    for name in a.measured:
        assert_frame(a.measured[name], b.measured[name], name)
    assert_frame(a.rows, b.rows, "rows")
    assert_frame(a.status, b.status, "status")
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
        assert_array(a.arrays[name], b.arrays[name], str(name))


def assert_frame(a: Any, b: Any, name: str = "") -> None:
    """The same columns in the same order, of the same types, with the same bits."""
    assert a.schema == b.schema, name
    for column in a.columns:
        assert (a[column].is_null() == b[column].is_null()).all(), (name, column)
        np.testing.assert_array_equal(a[column], b[column], err_msg=f"{name}.{column}")


def assert_array(a: Array, b: Array, name: str = "") -> None:
    """The same values, dims and coordinates, of the same types."""
    assert (a.values.dtype, a.dims, [*a.coords]) == (b.values.dtype, b.dims, [*b.coords]), name
    np.testing.assert_array_equal(a.values, b.values, err_msg=name)
    for dim in a.coords:
        assert a.coords[dim].dtype == b.coords[dim].dtype, name
        np.testing.assert_array_equal(a.coords[dim], b.coords[dim], err_msg=name)


def at(results: Results, probe: str, metric: str, step: int) -> np.ndarray:
    """[K, ...]: what a probe measured at a step that is no scalar."""
    array = results.arrays[probe, metric]
    assert array.dims[:2] == ("step", "member")
    return array.at(step=step).values


def losses(results: Results, metric: str = "loss") -> np.ndarray:
    """f64[steps, K]: a column of the training rows of a run in which nothing diverged."""
    return by_member(results.rows, metric)


def by_member(frame: Any, metric: str) -> np.ndarray:
    """f64[steps, K]: a column of a frame that has a row for every step and member."""
    k = frame["member"].max() + 1
    values = frame[metric].to_numpy().reshape(-1, k)
    np.testing.assert_array_equal(frame["member"], np.tile(np.arange(k), len(values)))
    assert (np.diff(frame["step"].to_numpy()[::k]) > 0).all()
    return values
