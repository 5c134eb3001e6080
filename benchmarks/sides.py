"""What is trained, and ``fit`` as a side of a race."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks import plain
from benchmarks.measure import WARM, LapProbe
from benchmarks.plain import CLASSES, Lap, Side
from dynamics import data as datasets
from dynamics import fit, models, optim, task
from dynamics.data import DataConfig
from dynamics.data.stream import resident
from dynamics.types import Dataset, Stream, Task

RULE = optim.SGD(
    learning_rate=plain.LEARNING_RATE, momentum=plain.MOMENTUM, nesterov=True, weight_decay=0.0
)


class Job(NamedTuple):
    """A net on data."""

    data: Dataset
    model: models.MLP | models.Convnet | models.ResNet
    batch_size: int
    about: str

    def net(self) -> str:
        """Its sizes, in words."""
        if isinstance(self.model, models.MLP):
            sizes = [self.data.x[0].size, *[self.model.width] * self.model.depth, CLASSES]
            return "-".join(map(str, sizes)) + f", batch {self.batch_size}"
        if isinstance(self.model, models.ResNet):
            return f"ResNet-{self.model.depth}, batch {self.batch_size}"
        return f"convnet {'-'.join(map(str, self.model.channels))}, batch {self.batch_size}"

    def task(self) -> Task:
        """The task as an experiment makes it."""
        return task.of_dataset(models.make(self.model, CLASSES), self.data)

    def plain(self) -> plain.Plain:
        """The same for who writes it by hand."""
        data, model = self.data, self.model
        assert not isinstance(model, models.ResNet), "not written by hand"
        sizes = (
            {"widths": (model.width,) * model.depth}
            if isinstance(model, models.MLP)
            else {"channels": model.channels}
        )
        mean, std = float(data.mean.mean()), float(data.std.mean())
        return plain.Plain(data.x, data.y, mean, std, self.batch_size, **sizes)


def digits() -> Job:
    """64-128-128-10 on scikit-learn's digits."""
    return Job(datasets.load(DataConfig()).train, models.MLP(width=128, depth=2), 64, "digits")


def mnist() -> Job:
    """784-512-512-10 on MNIST where DYNAMICS_DATA is set, else on noise of its shape."""
    if os.environ.get("DYNAMICS_DATA"):
        data, about = datasets.load(DataConfig(source="mnist")).train, "MNIST"
    else:
        data, about = noise(60_000, 28, 28), "noise in MNIST's shape"
    return Job(data, models.MLP(width=512, depth=2), 128, about)


def images() -> Job:
    """Two convolutions on noise in CIFAR's shape."""
    return Job(
        noise(10_000, 32, 32, 3), models.Convnet(channels=(32, 64)), 64, "noise in CIFAR's shape"
    )


def noise(n: int, *shape: int) -> Dataset:
    """Random bytes, random labels: how long a step takes does not depend on them."""
    draw = np.random.Generator(np.random.PCG64(0))
    mean = np.full((1,) * len(shape), 128, np.float32)
    return Dataset(
        x=draw.integers(0, 256, (n, *shape), np.uint8),
        y=draw.integers(0, CLASSES, n).astype(np.int32),
        mean=mean,
        std=np.full_like(mean, 74),
    )


def through_fit(
    job: Job,
    mesh: Mesh,
    steps: int,
    rounds: int,
    *,
    replicas: int = 1,
    net: Task | None = None,
    change: Callable[[Stream], Stream] = lambda stream: stream,
    probes: Sequence[Any] = (),
    **options: Any,
) -> Side:
    """``fit`` of a population, ``steps`` steps a lap; ``options`` are fit's own."""
    laps = 1 + WARM + rounds

    def run(lap: Lap) -> None:
        trained, total = net or job.task(), steps * laps
        optimizer = RULE.make(total)
        keys = jax.random.split(jax.random.key(0), replicas)
        state = fit.init(trained, optimizer, keys, RULE.hyperparameters(), mesh)
        stream = change(resident(job.data, job.batch_size, replicas))
        watching = [*probes, LapProbe(steps, laps, lap)]
        fit.fit(trained, optimizer, state, stream, total, mesh, probes=watching, **options)

    return run
