"""Early learning and memorisation where they can be proved: nothing here reads a file.

The study says what is computed: ``phases``, logistic regression on two Gaussians with wrong labels,
which learns the truth first and then memorises, unless early-learning regularization with lambda >
2 holds it; ``basin``, one example's logits, and the probability from which its true class is held;
``distillation``, kernel ridge regression that is fitted to a mixture of the labels and of its own
predictions, again and again.

Reference: Liu et al. 2020, arXiv 2007.00151, section 3 and appendix A; Borup and Andersen 2021,
arXiv 2102.13088.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from dynamics import record
from dynamics.record import Recorder, Table
from experiments.early_learning_theory import basin, distillation, phases
from experiments.early_learning_theory.config import Basin, Config, Distillation, Phases, Study

__all__ = ["Basin", "Config", "Distillation", "Phases", "Study", "load", "run", "sweep"]


def load(config: Config, folder: Path | str | None = None) -> None:
    """Nothing: the data are drawn from the seed."""


def run(
    config: Config, data: None = None, mesh: Mesh | None = None, *, store: Path | str | None = None
) -> Table:
    """One point of ``sweep``."""
    return sweep((config,), data, mesh, store=store)[0]


def sweep(
    configs: Sequence[Config],
    data: None = None,
    mesh: Mesh | None = None,
    *,
    store: Path | str | None = None,
) -> list[Table]:
    """The study at every point, all in one population; points differ in Replica fields only.

    Rows and arrays are the study's: ``phases.study``, ``basin.study`` and ``distillation.study``
    say which. With a ``store`` each is kept under the fingerprint of its config. ValueError: a mesh
    that the population does not divide over.
    """
    study = STUDIES[type(configs[0].study)]

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return study(points, mesh, recorder)

    folder = None if store is None else Path(store, "early_learning_theory")
    return record.completed(folder, configs, compute, {"source": "synthetic"})


STUDIES: dict[type, Callable[[Sequence[Config], Mesh | None, Recorder | None], list[Table]]] = {
    Phases: phases.study,
    Basin: basin.study,
    Distillation: distillation.study,
}
