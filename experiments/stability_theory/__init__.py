"""Stability where it can be computed: nothing here reads a file.

The study says what is computed: ``diagonal``, which minima of a diagonal linear net minibatches
stay at, and the exact critical learning rates of minima; ``perceptron``, logistic regression at
large steps, which becomes the batch perceptron; ``sensing``, matrix sensing with a factor that has
too many columns, which slows it down unless it is asymmetric; ``robust``, recovery from wrong
measurements by sub-gradients.

Reference: Wu and Su 2023, arXiv 2305.17490; Tyurin 2024, arXiv 2412.08424; Xiong, Ding and Du
2023, arXiv 2310.01769; Ma and Fattahi 2022, arXiv 2202.08788.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jax.sharding import Mesh

from dynamics import record
from dynamics.record import Recorder, Table
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

    Rows and arrays are the study's: the ``study`` of its module says which. With a ``store`` each
    is kept under the fingerprint of its config. ValueError: a mesh that the population does not
    divide over.
    """
    study = STUDIES[type(configs[0].study)]

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return study(points, mesh, recorder)

    folder = None if store is None else Path(store, "stability_theory")
    return record.completed(folder, configs, compute, {"source": "synthetic"})


STUDIES: dict[type, Callable[[Sequence[Config], Mesh | None, Recorder | None], list[Table]]] = {
    Diagonal: diagonal.study,
    Perceptron: perceptron.study,
    Sensing: sensing.study,
    Robust: robust.study,
}
