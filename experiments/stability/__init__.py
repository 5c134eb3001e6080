"""The edge of stability: sharpness rises to what the optimizer can bear, and stays there.

``Edge``: full-batch gradient descent, heavy ball, Nesterov, Adam and RMSProp, each with its own
threshold (of the preconditioned Hessian for the last two). ``Batches``: SGD of several batch sizes,
whose noise keeps the sharpness lower. ``Spectra``: the density of all eigenvalues over training.
Square loss and tanh by default, because cross-entropy leaves the edge late in training and ReLU
networks may never reach it.

Reference: Cohen et al. 2021, arXiv 2103.00065, and 2022, arXiv 2207.14484.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dynamics import losses, models, record, task
from dynamics import mesh as meshes
from dynamics.data import load as load_data
from dynamics.data import sources
from dynamics.data.sources import Splits
from dynamics.record import Recorder, Table
from dynamics.types import Task
from experiments.stability import batches, edge, spectra
from experiments.stability.config import Batches, Config, Edge, Spectra

__all__ = ["Batches", "Config", "Edge", "Spectra", "load", "run", "sweep"]


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """The data of a config, each pixel centred; DataError says what is missing."""
    data = load_data(config.data, folder)
    x = np.asarray(data.train.x)
    mean = x.astype(np.float64).mean(axis=0).astype(np.float32)
    largest = np.full((1,) * mean.ndim, max(float(x.max()), 1.0), np.float32)
    train, test = (
        dataclasses.replace(part, mean=mean, std=largest) for part in (data.train, data.test)
    )
    return data._replace(train=train, test=test)


def run(
    config: Config, data: Splits, mesh: Mesh | None = None, *, store: Path | str | None = None
) -> Table:
    """One point of ``sweep``."""
    return sweep((config,), data, mesh, store=store)[0]


def sweep(
    configs: Sequence[Config],
    data: Splits,
    mesh: Mesh | None = None,
    *,
    store: Path | str | None = None,
) -> list[Table]:
    """The study at every point, all in one population; points differ in Replica fields only.

    Rows and arrays are the study's: ``study`` of ``edge``, ``batches`` and ``spectra`` says which.
    With a ``store`` each is kept under the fingerprint of its config. ValueError: a batch of more
    than the data, a mesh that the population does not divide over.
    """
    first = configs[0]
    if mesh is not None:
        meshes.check(mesh, len(configs) * first.study.replicas)
    net = _net(first, data)
    about = {"data": sources.digest(data.train), "source": data.name}

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return STUDIES[type(first.study)](points, net, data, mesh, recorder)

    folder = None if store is None else Path(store, "stability")
    return record.completed(folder, configs, compute, about)


def _net(config: Config, data: Splits) -> Task:
    chosen = {"squared_error": losses.squared_error, "cross_entropy": losses.cross_entropy}
    module = models.make(config.model, data.num_classes)
    return task.of_dataset(module, data.train, loss=chosen[config.loss])


STUDIES: dict[type, Callable[..., list[Table]]] = {
    Edge: edge.study,
    Batches: batches.study,
    Spectra: spectra.study,
}
