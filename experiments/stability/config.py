"""What a run of the edge of stability is determined by."""

from typing import Annotated, Literal

from dynamics import models
from dynamics.config import Count, NonNegative, Positive, Replica, Seed, frozen
from dynamics.data import DataConfig

Rule = Literal["gd", "heavy_ball", "nesterov", "adam", "rmsprop"]


def _different(name: str, values: tuple) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different values, got {values}")


@frozen
class Edge:
    """Full-batch training: sharpness against each optimizer's own threshold."""

    rules: tuple[Rule, ...] = ("gd", "heavy_ball", "nesterov", "adam", "rmsprop")
    """Optimizers, each at its own learning rate times study.scale"""
    scale: Annotated[Positive, Replica] = 1.0
    """Factor on every learning rate"""
    control: Positive = 0.33
    """Factor on the learning rate of gradient descent in a run that should stay below its edge"""
    steps: Count = 2500
    """Full-batch steps"""
    every: Count = 20
    """Steps between measurements of the sharpness"""
    replicas: Count = 3
    """Networks trained by each optimizer"""

    def __post_init__(self) -> None:
        _different("Edge.rules", self.rules)


@frozen
class Batches:
    """SGD: the sharpness that minibatches leave, against their size."""

    sizes: tuple[Count, ...] = (8, 32, 128, 500)
    """Batch sizes; the last should be all examples"""
    learning_rate: Annotated[Positive, Replica] = 0.2
    """Learning rate of plain SGD"""
    steps: Count = 10_000
    """Steps, the same for every size"""
    every: Count = 500
    """Steps between measurements"""
    averaged: Count = 6
    """How many of the last measurements are averaged"""
    replicas: Count = 3
    """Networks trained with each size"""

    def __post_init__(self) -> None:
        _different("Batches.sizes", self.sizes)


@frozen
class Spectra:
    """Full-batch gradient descent: the density of the eigenvalues of the Hessian over training."""

    learning_rate: Annotated[Positive, Replica] = 0.3
    """Learning rate of plain gradient descent"""
    steps: Count = 2500
    """Full-batch steps"""
    measured: tuple[int, ...] = (0, 30, 100, 200, 400, 800, 1500)
    """Steps after which the spectrum is measured, as it is after the last one"""
    k: Count = 80
    """Lanczos steps from each random vector; more of them resolve the density finer"""
    num: Count = 10
    """Random vectors, at least 2; errors fall with the square root of their number"""
    replicas: Count = 3
    """Networks trained"""

    def __post_init__(self) -> None:
        if any(step < 0 for step in self.measured):
            raise ValueError(f"Spectra.measured must be steps >= 0, got {self.measured}")
        if self.num < 2:
            raise ValueError(f"Spectra.num must be at least 2, one has no error, got {self.num}")


@frozen
class Config:
    """One study of the sharpness of a network while it trains."""

    data: DataConfig = DataConfig(num_train=500)
    """The examples; pixels are centred one by one and divided by the largest"""
    model: models.Model = models.MLP(width=32, depth=2, activation="tanh")
    loss: Literal["squared_error", "cross_entropy"] = "squared_error"
    """squared_error: 1/2 the squared distance to the one-hot label"""
    study: Edge | Batches | Spectra = Edge()
    cold: Count = 20
    """Lanczos steps of the first measurement of a run"""
    warm: Count = 8
    """Lanczos steps of the others, which begin with the vector that the one before found"""
    weight_decay: Annotated[NonNegative, Replica] = 0.0
    """Weight decay of every optimizer"""
    seed: Annotated[Seed, Replica] = 0
    """Seed of initialisations and of the order of batches"""
