"""The edge of stability: sharpness rises to what the optimizer can bear, and stays there.

``Edge``: full-batch gradient descent, heavy ball, Nesterov, Adam and RMSProp, each with its own
threshold (of the preconditioned Hessian for the last two). ``Batches``: SGD of several batch sizes,
whose noise keeps the sharpness lower. ``Spectra``: the density of all eigenvalues over training.
Square loss and tanh by default, because cross-entropy leaves the edge late in training and ReLU
networks may never reach it.

Reference: Cohen et al. 2021, arXiv 2103.00065, and 2022, arXiv 2207.14484.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dynamics import losses, models, task
from dynamics.data import load as load_data
from dynamics.data.sources import Splits
from dynamics.record import Findings
from dynamics.types import Task
from experiments.experiment import Experiment, Job, check_mesh
from experiments.stability import batches, edge, spectra
from experiments.stability.config import Batches, Config, Edge, Spectra

__all__ = ["EXPERIMENT", "Batches", "Config", "Edge", "Spectra", "load", "run", "sweep"]


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


def study(job: Job[Config, Any]) -> Findings:
    """The findings of the study that the points of a job ask for."""
    net = net_of(job.config, job.data)
    match job.config.study:
        case Edge():
            return edge.measure(net, job.of(Edge))
        case Batches():
            return batches.measure(net, job.of(Batches))
        case Spectra():
            return spectra.measure(net, job.of(Spectra))


def net_of(config: Config, data: Splits) -> Task:
    """The task of a config."""
    chosen = {"squared_error": losses.squared_error, "cross_entropy": losses.cross_entropy}
    module = models.make(config.model, data.num_classes)
    return task.of_dataset(module, data.train, loss=chosen[config.loss])


def check(job: Job[Config, Any]) -> None:
    """ValueError unless the points of a job suit their data and mesh."""
    chosen, n = job.config.study, len(job.data.train)
    if isinstance(chosen, Batches) and max(chosen.sizes) > n:
        raise ValueError(f"study.sizes must be at most the {n} examples, got {max(chosen.sizes)}")
    check_mesh(job.mesh, len(job.points) * chosen.replicas)


EXPERIMENT = Experiment("stability", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
