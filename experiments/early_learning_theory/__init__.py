"""Early learning and memorisation where they can be proved: nothing here reads a file.

The study says what is computed: ``phases``, logistic regression on two Gaussians with wrong labels,
which learns the truth first and then memorises, unless early-learning regularization with lambda >
2 holds it; ``basin``, one example's logits, and the probability from which its true class is held;
``distillation``, kernel ridge regression that is fitted to a mixture of the labels and of its own
predictions, again and again.

Reference: Liu et al. 2020, arXiv 2007.00151, section 3 and appendix A; Borup and Andersen 2021,
arXiv 2102.13088.
"""

from pathlib import Path
from typing import Any

from dynamics.record import Findings
from experiments.early_learning_theory import basin, distillation, phases
from experiments.early_learning_theory.config import Basin, Config, Distillation, Phases, Study
from experiments.experiment import Experiment, Job, check_mesh

__all__ = ["EXPERIMENT", "Basin", "Config", "Distillation", "Phases", "Study", "load", "run",
           "sweep"]  # fmt: skip


def load(config: Config, folder: Path | str | None = None) -> None:
    """Nothing: the data are drawn from the seed."""


def study(job: Job[Config, Any]) -> Findings:
    """The findings of the study that the points of a job ask for."""
    match job.config.study:
        case Phases():
            return phases.measure(job.of(Phases))
        case Basin():
            return basin.measure(job.of(Basin))
        case Distillation():
            return distillation.measure(job.of(Distillation))


def check(job: Job[Config, Any]) -> None:
    """ValueError unless the mesh takes every population of the points."""
    match job.config.study:
        case Phases() as chosen:
            for group in phases.populations(job.of(Phases)):
                check_mesh(job.mesh, len(group), chosen.examples)
        case Basin():
            for group in basin.populations(job.of(Basin)):
                check_mesh(job.mesh, len(group), 1)


EXPERIMENT = Experiment("early_learning_theory", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
