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
    """Optimizers, at the rates of ``edge.RULES`` times ``scale``"""
    scale: Annotated[Positive, Replica] = 1.0
    """Factor on every learning rate"""
    control: Positive = 0.33
    """Factor on the learning rate of gradient descent in a run that should stay below its edge"""
    steps: Count = 2500
    """Full-batch steps"""
    every: Count = 20
    """Steps between measurements of the sharpness"""
    replicas: Count = 3
    """Initialisations of each optimizer"""

    def __post_init__(self) -> None:
        _different("Edge.rules", self.rules)


@frozen
class Batches:
    """SGD: the sharpness that minibatches leave, against their size."""

    sizes: tuple[Count, ...] = (8, 32, 128, 500)
    """Batch sizes; the last should be all examples"""
    learning_rate: Annotated[Positive, Replica] = 0.2
    """Of plain SGD"""
    steps: Count = 10_000
    """Steps, the same for every size"""
    every: Count = 500
    """Steps between measurements"""
    averaged: Count = 6
    """Last measurements that are averaged"""
    replicas: Count = 3
    """Initialisations and orders of each size"""

    def __post_init__(self) -> None:
        _different("Batches.sizes", self.sizes)


@frozen
class Spectra:
    """Full-batch gradient descent: the density of the eigenvalues of the Hessian over training."""

    learning_rate: Annotated[Positive, Replica] = 0.3
    """Of plain gradient descent"""
    steps: Count = 2500
    """Full-batch steps"""
    measured: tuple[int, ...] = (0, 30, 100, 200, 400, 800, 1500)
    """Steps after which the spectrum is measured, besides the last"""
    k: Count = 80
    """Lanczos steps from each random vector: the resolution"""
    num: Count = 10
    """Random vectors: what the errors of traces fall with"""
    replicas: Count = 3
    """Initialisations"""

    def __post_init__(self) -> None:
        if any(step < 0 for step in self.measured):
            raise ValueError(f"Spectra.measured must be steps >= 0, got {self.measured}")
        if self.num < 2:
            raise ValueError(f"Spectra.num must be at least 2, one has no error, got {self.num}")


@frozen
class Config:
    """One study of the sharpness of a network while it trains."""

    data: DataConfig = DataConfig(num_train=500)
    """Pixels are centred one by one and divided by the largest"""
    model: models.Model = models.MLP(width=32, depth=2, activation="tanh")
    loss: Literal["squared_error", "cross_entropy"] = "squared_error"
    """squared_error: 1/2 the squared distance to the one-hot label"""
    study: Edge | Batches | Spectra = Edge()
    cold: Count = 20
    """Lanczos steps of the first measurement of a run"""
    warm: Count = 8
    """Lanczos steps of the others, from the vector before"""
    weight_decay: Annotated[NonNegative, Replica] = 0.0
    """Of every optimizer"""
    seed: Annotated[Seed, Replica] = 0
    """Of initialisations and orders"""
