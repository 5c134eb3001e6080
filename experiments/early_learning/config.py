"""What a run on wrong labels is determined by."""

from typing import Annotated, Literal

from dynamics import models, optim
from dynamics.config import Count, Fraction, NonNegative, Positive, Range, Replica, Seed, frozen
from dynamics.data import DataConfig
from dynamics.training import Train

Method = Literal["ce", "smoothing", "gce", "sce", "elr", "elr_plus"]
Noise = Literal[
    "symmetric",
    "symmetric_including",
    "asymmetric_cifar10",
    "circular",
    "cifar100_blocks",
    "cifar100_superclasses",
]


def _different(name: str, values: tuple) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different values, got {values}")


@frozen
class Curves:
    """What becomes of wrong labels, epoch by epoch."""

    methods: tuple[Method, ...] = ("ce", "elr")
    """How networks are trained, with the same seeds, noise and order of batches"""
    every: Positive = 1.0
    """Epochs between measurements"""
    detected_at: tuple[Positive, ...] = (3.0,)
    """Epochs at which, as at the end, wrong labels are looked for by their loss"""
    replicas: Count = 5
    """Paired seeds of each method; each has its own noise"""

    def __post_init__(self) -> None:
        _different("Curves.methods", self.methods)


@frozen
class Rates:
    """Test accuracy of several methods against the rate of the noise."""

    methods: tuple[Method, ...] = ("ce", "gce", "sce", "elr", "elr_plus")
    """How networks are trained, with the same seeds, noise and order of batches"""
    rates: tuple[Fraction, ...] = (0.0, 0.2, 0.4, 0.6)
    """Rates of the noise"""
    replicas: Count = 3
    """Paired seeds of each method and rate"""

    def __post_init__(self) -> None:
        _different("Rates.methods", self.methods)
        _different("Rates.rates", self.rates)


@frozen
class Grid:
    """Test accuracy and memorisation of ELR against lambda and beta."""

    strengths: tuple[NonNegative, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)
    """lambda; 0 is cross-entropy"""
    betas: tuple[Fraction, ...] = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99)
    """Memory of the running targets"""
    replicas: Count = 3
    """Paired seeds of each place"""

    def __post_init__(self) -> None:
        _different("Grid.strengths", self.strengths)
        _different("Grid.betas", self.betas)


@frozen
class Losses:
    """Constants of the losses that the other methods are named after."""

    epsilon: Fraction = 0.1
    """smoothing: weight of the uniform target"""
    q: Annotated[float, Range(above=0.0, high=1.0)] = 0.7
    """gce: exponent; towards 0 it is cross-entropy"""
    forward: NonNegative = 0.1
    """sce: weight of cross-entropy"""
    reverse: NonNegative = 1.0
    """sce: weight of reverse cross-entropy"""


@frozen
class Plus:
    """Of ELR+ alone."""

    mixup: Positive = 1.0
    """Both parameters of the Beta distribution that inputs are mixed by"""
    decay: Fraction = 0.997
    """Of the weight averages, at the end of the ramp"""
    ramp: Annotated[int, Range(low=0.0)] = 40_000
    """Steps over which it rises; 0: it rises as an average of all weights so far does"""
    ramp_lambda: bool = False
    """Whether lambda rises by the same ramp (their CIFAR-100)"""
    reweight: bool = False
    """Whether labels are multiplied by targets (their CIFAR-100)"""


@frozen
class Config:
    """One study of training on wrong labels."""

    data: DataConfig = DataConfig(test_fraction=1 / 3)
    model: models.Model = models.MLP(width=256, depth=2)
    train: Train = Train(optimizer=optim.SGD(nesterov=False, weight_decay=1e-3))
    epochs: Positive = 40.0
    """Training, in epochs; what is reported is the last one, never the best"""
    noise: Noise = "symmetric"
    """symmetric: always another class, symmetric_including: any class, the true one among them;
    circular: the next class"""
    rate: Annotated[Fraction, Replica] = 0.4
    """Of the noise as its kind defines it; the rows have the part that is wrong"""
    strength: Annotated[NonNegative, Replica] = 7.0
    """lambda of ELR and ELR+; <= 2 only delays memorising"""
    beta: Annotated[Fraction, Replica] = 0.7
    """Memory of the running targets of ELR and ELR+"""
    losses: Losses = Losses()
    plus: Plus = Plus()
    study: Curves | Rates | Grid = Curves()
    seed: Annotated[Seed, Replica] = 0
    """Of everything random but the split of the data"""

    def __post_init__(self) -> None:
        at = getattr(self.study, "detected_at", ())
        if at and max(at) > self.epochs:
            raise ValueError(
                f"study.detected_at must be <= epochs {self.epochs:g}, got {max(at):g}"
            )
