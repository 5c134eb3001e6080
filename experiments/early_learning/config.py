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
    """Epochs after which wrong labels are looked for by their loss, as they are at the end"""
    replicas: Count = 5
    """Networks trained by each method, with the same seeds for all; each seed has its noise"""

    def __post_init__(self) -> None:
        _different("Curves.methods", self.methods)


@frozen
class Rates:
    """Test accuracy of several methods against the rate of the noise."""

    methods: tuple[Method, ...] = ("ce", "gce", "sce", "elr", "elr_plus")
    """How networks are trained, with the same seeds, noise and order of batches"""
    rates: tuple[Fraction, ...] = (0.0, 0.2, 0.4, 0.6)
    """Rates of the label noise, 0 to 1"""
    replicas: Count = 3
    """Networks trained for each method and rate, with the same seeds for all"""

    def __post_init__(self) -> None:
        _different("Rates.methods", self.methods)
        _different("Rates.rates", self.rates)


@frozen
class Grid:
    """Test accuracy and memorisation of ELR against lambda and beta."""

    strengths: tuple[NonNegative, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0)
    """Strengths of the regularization (lambda); 0 is cross-entropy"""
    betas: tuple[Fraction, ...] = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99)
    """Part of its running target that an example keeps at each update (beta)"""
    replicas: Count = 3
    """Networks trained at each place of the grid, with the same seeds everywhere"""

    def __post_init__(self) -> None:
        _different("Grid.strengths", self.strengths)
        _different("Grid.betas", self.betas)


@frozen
class Losses:
    """Constants of the losses that the other methods are named after."""

    epsilon: Fraction = 0.1
    """For smoothing: weight of the uniform target, 0 to 1"""
    q: Annotated[float, Range(above=0.0, high=1.0)] = 0.7
    """For gce: its exponent q; towards 0 the loss becomes cross-entropy"""
    forward: NonNegative = 0.1
    """For sce: weight of cross-entropy"""
    reverse: NonNegative = 1.0
    """For sce: weight of reverse cross-entropy"""


@frozen
class Plus:
    """Constants of ELR+ alone."""

    mixup: Positive = 1.0
    """Both parameters of the Beta distribution that weights of mixed inputs are drawn from"""
    decay: Fraction = 0.997
    """Decay of the averages of the weights, from the end of the ramp on"""
    ramp: Annotated[int, Range(low=0.0)] = 40_000
    """Steps over which that decay rises; 0: it rises as for the mean of all weights so far"""
    ramp_lambda: bool = False
    """Whether lambda rises over the same steps, as in the paper on CIFAR-100"""
    reweight: bool = False
    """Whether labels are multiplied by targets, as in the paper on CIFAR-100"""


@frozen
class Config:
    """One study of training on wrong labels."""

    data: DataConfig = DataConfig(test_fraction=1 / 3)
    model: models.Model = models.MLP(width=256, depth=2)
    train: Train = Train(optimizer=optim.SGD(nesterov=False, weight_decay=1e-3))
    epochs: Positive = 40.0
    """Length of the training in epochs; what is reported is the last one, never the best"""
    noise: Noise = "symmetric"
    """What a wrong label becomes. symmetric: any other class; symmetric_including: any class, the
    true one among them; circular: the next class; the others: a similar class of CIFAR"""
    rate: Annotated[Fraction, Replica] = 0.4
    """Rate of the noise, 0 to 1, as its kind defines it; the results say which part is wrong"""
    strength: Annotated[NonNegative, Replica] = 7.0
    """Strength of ELR and ELR+ (lambda); up to 2 it only delays memorising"""
    beta: Annotated[Fraction, Replica] = 0.7
    """Part of its running target that an example keeps at each update of ELR and ELR+ (beta)"""
    losses: Losses = Losses()
    plus: Plus = Plus()
    study: Curves | Rates | Grid = Curves()
    seed: Annotated[Seed, Replica] = 0
    """Seed of everything random except the split of the data"""

    def __post_init__(self) -> None:
        at = getattr(self.study, "detected_at", ())
        if at and max(at) > self.epochs:
            raise ValueError(
                f"study.detected_at must be <= epochs {self.epochs:g}, got {max(at):g}"
            )
