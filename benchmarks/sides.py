"""What is raced: ``fit``, and plain loops of the same net written by hand in jax and in PyTorch."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from benchmarks.measure import Lap, LapProbe, Side
from dynamics import fit, models, optim, population, task
from dynamics import mesh as meshes
from dynamics.data.stream import resident
from dynamics.record import Recorder
from dynamics.types import Dataset, PyTree

LEARNING_RATE, MOMENTUM = 0.02, 0.9
CLASSES = 10


class Job(NamedTuple):
    """A net on data: what every side of a race trains."""

    data: Dataset
    model: models.MLP | models.Convnet
    batch_size: int


def noise(n: int, *shape: int, seed: int = 0) -> Dataset:
    """Random bytes with random labels: how long a step takes does not depend on the values."""
    draw = np.random.Generator(np.random.PCG64(seed))
    mean = np.full((1,) * len(shape), 128, np.float32)
    return Dataset(
        x=draw.integers(0, 256, (n, *shape), np.uint8),
        y=draw.integers(0, CLASSES, n).astype(np.int32),
        index=np.arange(n, dtype=np.int32),
        mean=mean,
        std=np.full_like(mean, 74),
    )


def through_fit(
    job: Job, replicas: int, mesh: Mesh, steps: int, laps: int, **options: Any
) -> Side:
    """``fit`` of so many replicas, ``steps`` steps a lap."""

    def run(lap: Lap) -> None:
        train = optim.Train(learning_rate=LEARNING_RATE, momentum=MOMENTUM)
        optimizer = optim.make(train, steps * laps)
        net = task.of_dataset(models.make(job.model, CLASSES), job.data)
        keys = jax.random.split(jax.random.key(0), replicas)
        state = fit.init(net, optimizer, keys, optim.hyperparameters(train), mesh)
        stream = resident(job.data, job.batch_size, replicas)
        fit.fit(
            *(net, optimizer, state, stream, steps * laps, mesh),
            probes=[LapProbe(steps, laps, lap)],
            **options,
        )
        raise RuntimeError("laps too few")

    return run
