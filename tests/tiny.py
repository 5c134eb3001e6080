"""The smallest problems that still have every part: shared by the tests of the loop."""

from typing import Any, NamedTuple

import jax
import numpy as np

from dynamics import fit, models, optim, task
from dynamics.data.stream import resident
from dynamics.types import Dataset, Results, Stream, Task, TrainState

BATCH = 8


class Problem(NamedTuple):
    task: Task
    optimizer: Any
    data: Dataset
    train: optim.Train
    num_steps: int


def images(n: int = 40, size: int = 6, seed: int = 0) -> Dataset:
    """Made-up uint8 images whose label shifts their brightness."""
    generator = np.random.default_rng(seed)
    y = (np.arange(n) % 4).astype(np.int32)
    x = np.clip(generator.normal(100, 20, (n, size, size)) + 30 * y[:, None, None], 0, 255)
    x = x.astype(np.uint8)
    mean, std = np.full((1, 1), x.mean(), np.float32), np.full((1, 1), x.std(), np.float32)
    return Dataset(x=x, y=y, index=np.arange(n, dtype=np.int32), mean=mean, std=std)


def tokens(n: int = 40, length: int = 6, seed: int = 0) -> Dataset:
    """Made-up token sequences; the label of a place is the next token."""
    text = np.random.default_rng(seed).integers(0, 8, (n, length + 1)).astype(np.uint8)
    nothing = np.zeros(0, np.float32)
    index = np.arange(n, dtype=np.int32)
    return Dataset(x=text[:, :-1], y=text[:, 1:], index=index, mean=nothing, std=nothing)


def problem(kind: str, num_steps: int = 20, **train: Any) -> Problem:
    data, outputs = (tokens(), 8) if kind == "transformer" else (images(), 4)
    net = {
        "mlp": models.MLP(width=8, depth=2),
        "convnet": models.Convnet(channels=(4, 8), norm="batch"),
        "transformer": models.Transformer(width=8, depth=1, num_heads=2, max_length=8),
    }[kind]
    settings = optim.Train(**{"learning_rate": 0.02, "weight_decay": 1e-3} | train)
    made = task.of_dataset(models.make(net, outputs), data)
    return Problem(made, optim.make(settings, num_steps), data, settings, num_steps)


def start(p: Problem, mesh: Any, replicas: int, seed: int = 0, **changed: Any) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), replicas)
    scalars = optim.hyperparameters(p.train) | changed
    return fit.init(p.task, p.optimizer, keys, scalars, mesh)


def batches(p: Problem, replicas: int, **options: Any) -> Stream:
    return resident(p.data, BATCH, replicas, **options)


def run(p: Problem, mesh: Any, replicas: int, **options: Any) -> Results:
    """``num_steps`` steps from the seed's state."""
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
    """Bit for bit: state, rows, arrays."""
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert a.rows.keys() == b.rows.keys()
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.rows:
        np.testing.assert_array_equal(a.rows[name], b.rows[name], err_msg=name)
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)
