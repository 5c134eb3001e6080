"""What a run of the theory of early learning is determined by."""

from typing import Annotated

from dynamics.config import Count, Fraction, NonNegative, Positive, Range, Replica, Seed, frozen

Probability = Annotated[float, Range(above=0.0, below=1.0)]
Dim = Annotated[int, Range(low=2.0)]
Decay = Annotated[float, Range(low=0.0, below=1.0)]


def _rising(name: str, values: tuple[float, ...]) -> None:
    if not values or sorted(set(values)) != list(values):
        raise ValueError(f"{name} must be one or more rising values, got {values}")


@frozen
class Phases:
    """Logistic regression on two Gaussians with wrong labels: early learning, then memorising."""

    lambdas: tuple[NonNegative, ...] = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0)
    """Strengths of early-learning regularization; 0 is cross-entropy, and must be among them"""
    beta: Annotated[Decay, Replica] = 0.7
    """How much of its target an example keeps at a step"""
    examples: Count = 400
    """Training examples"""
    dim: Dim = 380
    """Dimension; above examples * (1 - flip / 2) all labels can be fitted, wrong ones included"""
    control: Dim = 100
    """A smaller dimension, in which they can't be: only cross-entropy is trained in it"""
    sigma: Annotated[Positive, Replica] = 0.2
    """Standard deviation of a Gaussian in each direction; the centres are 2 apart"""
    flip: Annotated[Fraction, Replica] = 0.4
    """Fraction of labels that are drawn anew; half of them end up wrong"""
    learning_rate: Annotated[Positive, Replica] = 0.5
    """Learning rate of gradient descent; below 1 in the theory"""
    steps: Count = 40_000
    """Full-batch steps"""
    tested: Count = 1000
    """Test examples, all with clean labels"""
    replicas: Count = 6
    """Paired seeds: data, noise and start are the same for every lambda"""

    def __post_init__(self) -> None:
        _rising("Phases.lambdas", self.lambdas)
        if self.lambdas[0]:
            raise ValueError(f"Phases.lambdas must begin with 0, got {self.lambdas}")


@frozen
class Basin:
    """The logits of one example with a wrong label: from where is it held at its true class?"""

    lambdas: tuple[NonNegative, ...] = (1.0, 1.9, 2.1, 2.2, 2.5, 3.0, 4.0, 5.0, 7.0, 10.0)
    """Strengths of early-learning regularization"""
    starts: Annotated[int, Range(low=2.0)] = 200
    """Starts: so many probabilities of the true class, evenly between 0 and 1"""
    classes: Annotated[int, Range(low=3.0)] = 10
    """Classes of one example; another one has two"""
    beta: Annotated[Decay, Replica] = 0.7
    """How much of its target the example keeps at a step"""
    learning_rate: Annotated[Positive, Replica] = 0.02
    """Learning rate of gradient descent on the logits"""
    steps: Count = 4000
    """Steps, after which the example is at one class or the other"""

    def __post_init__(self) -> None:
        _rising("Basin.lambdas", self.lambdas)


@frozen
class Distillation:
    """Self-distillation in kernel ridge regression with a part of the ground truth."""

    alphas: tuple[Fraction, ...] = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    """Weights of the ground truth at every step; 0 and 1 must be among them"""
    examples: Annotated[int, Range(low=2.0)] = 11
    """Training examples, evenly on [0, 1]"""
    validated: Count = 100
    """Held-out examples, uniform on [0, 1] with the same noise, that the best weight comes from"""
    noise: Annotated[Positive, Replica] = 0.5
    """Standard deviation of the noise on sin(2 pi x)"""
    gamma: Annotated[Positive, Replica] = 80.0
    """Sharpness of the kernel exp(-gamma (x - z)^2)"""
    ridge: Annotated[Positive, Replica] = 0.2
    """Ridge penalty of every student"""
    steps: Annotated[int, Range(low=2.0)] = 10
    """Students, the first of which is plain kernel ridge regression"""
    replicas: Count = 100
    """Paired seeds: the noise of the training and held-out examples"""

    def __post_init__(self) -> None:
        _rising("Distillation.alphas", self.alphas)
        if {0.0, 1.0} - set(self.alphas):
            raise ValueError(f"Distillation.alphas must hold 0 and 1, got {self.alphas}")


Study = Phases | Basin | Distillation


@frozen
class Config:
    """One study of the theory."""

    study: Study = Phases()
    seed: Annotated[Seed, Replica] = 0
    """Seed of everything random"""
