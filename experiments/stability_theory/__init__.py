"""Stability where it can be computed: nothing here reads a file.

The study says what is computed: ``diagonal``, which minima of a diagonal linear net minibatches
stay at, and the exact critical learning rates of minima; ``perceptron``, logistic regression at
large steps, which becomes the batch perceptron; ``sensing``, matrix sensing with a factor that has
too many columns, which slows it down unless it is asymmetric; ``robust``, recovery from wrong
measurements by sub-gradients.

Reference: Wu and Su 2023, arXiv 2305.17490; Tyurin 2024, arXiv 2412.08424; Xiong, Ding and Du
2023, arXiv 2310.01769; Ma and Fattahi 2022, arXiv 2202.08788.
"""

from pathlib import Path
from typing import Any

from dynamics.record import Findings
from experiments.experiment import Experiment, Job, check_mesh
from experiments.stability_theory import diagonal, perceptron, robust, sensing
from experiments.stability_theory.config import (
    Config,
    Diagonal,
    Perceptron,
    Robust,
    Sensing,
    Study,
)

__all__ = [
    "EXPERIMENT",
    "Config",
    "Diagonal",
    "Perceptron",
    "Robust",
    "Sensing",
    "Study",
    "load",
    "run",
    "sweep",
]


def load(config: Config, folder: Path | str | None = None) -> None:
    """Nothing: the data are drawn from the seed, and digits are read where they are needed."""


def study(job: Job[Config, Any]) -> Findings:
    """The findings of the study that the points of a job ask for."""
    match job.config.study:
        case Diagonal():
            return diagonal.measure(job.of(Diagonal))
        case Perceptron():
            return perceptron.measure(job.of(Perceptron))
        case Sensing():
            return sensing.measure(job.of(Sensing))
        case Robust():
            return robust.measure(job.of(Robust))


def check(job: Job[Config, Any]) -> None:
    """ValueError unless the mesh takes every population of the points."""
    match job.config.study:
        case Diagonal():
            for group in diagonal.populations(job.of(Diagonal)):
                check_mesh(job.mesh, len(group), group["batch"][0])
        case Perceptron():
            for group in perceptron.populations(job.of(Perceptron)):
                check_mesh(job.mesh, len(group))
        case Sensing():
            for group in sensing.populations(job.of(Sensing)):
                check_mesh(job.mesh, len(group), 1)
        case Robust() as chosen:
            for group in robust.populations(job.of(Robust)):
                check_mesh(job.mesh, len(group), chosen.measurements)


EXPERIMENT = Experiment("stability_theory", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
