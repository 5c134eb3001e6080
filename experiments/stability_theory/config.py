"""What a run of the theory of stability is determined by."""

from typing import Annotated

from dynamics.config import Count, Fraction, Positive, Range, Replica, Seed, frozen

Dim = Annotated[int, Range(low=2.0)]
Decay = Annotated[float, Range(above=0.0, high=1.0)]
Class = Annotated[int, Range(low=0.0, high=9.0)]


def _rising(name: str, values: tuple[float, ...]) -> None:
    if not values or sorted(set(values)) != list(values) or values[0] <= 0:
        raise ValueError(f"{name} must be one or more rising positive values, got {values}")


@frozen
class Diagonal:
    """Minibatches on the diagonal net <u*u - v*v, x>: how sharp are the minima they stay at?"""

    learning_rates: tuple[float, ...] = (0.004, 0.008, 0.012, 0.016, 0.024)
    """Learning rates of SGD and of gradient descent"""
    large_rates: tuple[float, ...] = (0.05, 0.1, 0.14)
    """Larger ones, of gradient descent alone: SGD with one example a batch diverges at them"""
    batches: tuple[Count, ...] = (1, 4)
    """Batch sizes of SGD, drawn with replacement; 1 must be among them, others are its control"""
    examples: Count = 20
    """Training examples, all of one norm"""
    dim: Dim = 50
    """Dimension; above the number of examples every one is fitted"""
    nonzero: Count = 5
    """Coordinates that the targets depend on"""
    start: Annotated[Positive, Replica] = 0.6
    """Value of every u and v at the start"""
    steps: Count = 40_000
    """Steps, after which the loss is at the rounding of float32"""
    features: Annotated[int, Range(low=17.0)] = 60
    """Gradients at each of the minima whose critical learning rates are computed exactly"""
    directions: Dim = 12
    """Dimension of these gradients"""
    replicas: Count = 4
    """Seeds; with each the data are the same for every batch size and learning rate"""

    def __post_init__(self) -> None:
        _rising("Diagonal.learning_rates", self.learning_rates)
        _rising("Diagonal.large_rates", self.large_rates)
        _rising("Diagonal.batches", self.batches)
        if self.batches[0] != 1 or self.batches[-1] >= self.examples or len(self.batches) < 2:
            raise ValueError(
                f"Diagonal.batches must be 1 and more below examples = {self.examples}, got "
                f"{self.batches}"
            )
        if self.nonzero > self.dim:
            raise ValueError(f"Diagonal.nonzero must be at most dim, got {self.nonzero}")


@frozen
class Perceptron:
    """Logistic regression at large steps, which becomes the perceptron."""

    gammas: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
    """Step sizes"""
    examples: Annotated[int, Range(low=3.0)] = 1000
    """Examples of the worst case: all alike but one"""
    classes: tuple[Class, ...] = (3, 8)
    """The two digits that are told apart"""
    noise: Annotated[Positive, Replica] = 1e-3
    """Standard deviation of noise on pixels from 0 to 1, so that no margin is exactly 0"""
    steps: Count = 320
    """Steps on the worst case"""
    digits_steps: Count = 100
    """Steps on the digits"""
    replicas: Count = 3
    """Seeds of the noise, the same for every step size"""

    def __post_init__(self) -> None:
        _rising("Perceptron.gammas", self.gammas)
        if len(set(self.classes)) != 2 or len(self.classes) != 2:
            raise ValueError(f"Perceptron.classes must be two digits, got {self.classes}")


@frozen
class Sensing:
    """A positive matrix of low rank, recovered from a factor with more columns than needed."""

    dim: Dim = 20
    """Rows of the matrix"""
    rank: Count = 2
    """Rank of the matrix"""
    smallest: Decay = 0.5
    """Smallest of its eigenvalues above 0; the largest is 1"""
    columns: tuple[Count, ...] = (2, 3, 4, 6)
    """Columns of the factor X of X X^T: the rank first, then more"""
    learning_rate: Annotated[Positive, Replica] = 0.1
    """Learning rate of gradient descent"""
    start: Annotated[Positive, Replica] = 0.1
    """Standard deviation of X at the start"""
    steps: Count = 20_000
    """Steps of the symmetric factor"""
    scales: tuple[float, ...] = (0.05, 0.1)
    """Standard deviations of F at the start, in the product F G^T"""
    imbalance: Annotated[float, Range(above=0.0, below=1.0), Replica] = 1 / 3
    """Factor on the standard deviation of F that gives G's at the start, between 0 and 1"""
    width: Count = 4
    """Columns of F and of G"""
    before: Count = 1500
    """Steps of F G^T before the one step that is modified"""
    after: Count = 400
    """Steps after the modified one"""
    raised: Annotated[Positive, Replica] = 0.6
    """What the modification raises the small singular values of F to"""
    replicas: Count = 3
    """Seeds of the matrix and the start"""

    def __post_init__(self) -> None:
        _rising("Sensing.columns", self.columns)
        _rising("Sensing.scales", self.scales)
        if self.columns[0] != self.rank or len(self.columns) < 2:
            raise ValueError(
                f"Sensing.columns must begin with the rank {self.rank} and go on, got "
                f"{self.columns}"
            )
        if self.width <= self.rank or max(*self.columns, self.width) > self.dim:
            raise ValueError(
                f"Sensing.width and columns must be above rank = {self.rank} and at most dim = "
                f"{self.dim}, got {self.width} and {self.columns}"
            )
        if len(self.scales) < 2:
            raise ValueError(f"Sensing.scales must be two or more, got {self.scales}")


@frozen
class Robust:
    """A positive matrix of low rank from measurements of which many are wrong: sub-gradients."""

    dim: Dim = 20
    """Rows of the matrix"""
    rank: Count = 2
    """Rank of the matrix"""
    smallest: Decay = 0.5
    """Smallest of its eigenvalues above 0; the largest is 1"""
    measurements: Count = 1200
    """Measurements of the matrix, inner products with Gaussian matrices"""
    outliers: Annotated[Fraction, Replica] = 0.3
    """Part of the measurements that are wrong"""
    columns: tuple[Count, ...] = (2, 20)
    """Columns of the factor U of U U^T: the rank first, then more"""
    scales: tuple[float, ...] = (1e-6, 1e-3, 0.1)
    """Scales of U at the start"""
    learning_rate: Annotated[Positive, Replica] = 0.3
    """Learning rate of the first step of the sub-gradient method"""
    decay: Annotated[Decay, Replica] = 0.995
    """Factor on that learning rate in every step"""
    square_rate: Annotated[Positive, Replica] = 0.1
    """The constant learning rate of gradient descent on squares"""
    steps: Count = 2500
    """Steps of either method"""
    replicas: Count = 3
    """Seeds of the matrix and its measurements"""

    def __post_init__(self) -> None:
        _rising("Robust.scales", self.scales)
        _rising("Robust.columns", self.columns)
        if self.columns[0] != self.rank or self.columns[-1] > self.dim:
            raise ValueError(
                f"Robust.columns must begin with the rank {self.rank} and end at most at dim = "
                f"{self.dim}, got {self.columns}"
            )


Study = Diagonal | Perceptron | Sensing | Robust


@frozen
class Config:
    """One study of the theory."""

    study: Study = Diagonal()
    seed: Annotated[Seed, Replica] = 0
    """Seed of everything random"""
