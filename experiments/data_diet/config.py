"""What a Data Diet run is determined by: the scores, and one study of them."""

from typing import Annotated, Literal

from dynamics import models, optim
from dynamics.config import Count, Fraction, NonNegative, Positive, Range, Replica, Seed, frozen
from dynamics.data import DataConfig
from dynamics.training import Train

Part = Annotated[float, Range(above=0.0, below=1.0)]
Method = Literal[
    "random",
    "el2n_hard",
    "el2n_easy",
    "grand_hard",
    "grand_init_hard",
    "input_norm_hard",
    "forgetting_hard",
    "aum_hard",
    "coverage",
]


def _different(name: str, values: tuple) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different values, got {values}")


@frozen
class Scoring:
    """The runs that examples are scored with."""

    epochs: tuple[NonNegative, ...] = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
    """Epochs of the full data after which every example is scored; the last ends the training"""
    draws: Count = 10
    """Independent draws of scoring runs and wrong labels; retraining r takes those of draw r"""
    replicas: Count = 4
    """Runs (initialisation and order) of each draw, which its scores are averaged over"""
    horizon: NonNegative = 0.0
    """Epochs the learning-rate schedule spans, at least the last of score.epochs; 0: just these"""
    also: tuple[Literal["vog", "pvi"], ...] = ()
    """More scores. vog: holds 8 bytes for each number of an input and run; pvi: trains as many
    networks again, on blank inputs"""

    def __post_init__(self) -> None:
        if not self.epochs or sorted(set(self.epochs)) != list(self.epochs) or not self.epochs[-1]:
            raise ValueError(
                f"Scoring.epochs must rise and end above 0, got {self.epochs}: the last of them "
                "ends the training"
            )
        if self.horizon and self.horizon < self.epochs[-1]:
            raise ValueError(
                f"Scoring.horizon must be 0 or >= the last epoch {self.epochs[-1]:g}, got "
                f"{self.horizon:g}"
            )


@frozen
class Pruning:
    """Accuracy against the fraction kept, for several scores and a random choice."""

    fractions: tuple[Part, ...] = (0.1, 0.2, 0.3, 0.5, 0.7)
    """Fractions of the examples that are kept"""
    methods: tuple[Method, ...] = (
        *("random", "el2n_hard", "el2n_easy", "grand_hard", "grand_init_hard", "input_norm_hard"),
    )
    """What is kept: the hard or the easy end of a score, or coverage-centric selection by EL2N"""
    scored_at: NonNegative = 5.0
    """Epoch after which scores are taken, one of score.epochs; init in a method's name: epoch 0"""
    balanced: bool = False
    """Whether every class keeps the same fraction"""
    cutoff: Fraction = 0.1
    """For coverage: the fraction of hardest examples that is left out"""
    replicas: Count = 10
    """Paired seeds of each subset, each by a draw of the scores"""
    epochs: Positive = 20.0
    """Length of a training in epochs of the full data: the same steps, however small the subset"""

    def __post_init__(self) -> None:
        _different("fractions", self.fractions)
        _different("methods", self.methods)
        if "random" not in self.methods:
            raise ValueError(f"methods must have 'random' to compare with, got {self.methods}")


@frozen
class Timing:
    """Accuracy at one fraction kept, against the epoch that scores are taken at."""

    kept: Part = 0.3
    """Fraction of the examples that is kept"""
    methods: tuple[Literal["el2n", "grand", "forgetting", "aum"], ...] = ("el2n", "grand")
    """Scores whose hardest examples are kept, at each of score.epochs"""
    balanced: bool = False
    """Whether every class keeps the same fraction"""
    replicas: Count = 10
    """Paired seeds of each subset, each by a draw of the scores"""
    epochs: Positive = 20.0
    """Length of a training in epochs of the full data: the same steps, however small the subset"""


@frozen
class Window:
    """Accuracy at one fraction kept, when the very hardest are left out."""

    kept: Part = 0.3
    """Fraction of the examples that is kept"""
    dropped: tuple[Fraction, ...] = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.55, 0.7)
    """Fractions of the examples, the very hardest, that are left out before the next are kept"""
    scored_at: NonNegative = 5.0
    """Epoch after which EL2N is taken, one of score.epochs"""
    balanced: bool = False
    """Whether every class keeps the same fraction"""
    replicas: Count = 10
    """Paired seeds of each subset, each by a draw of the scores"""
    epochs: Positive = 20.0
    """Length of a training in epochs of the full data: the same steps, however small the subset"""

    def __post_init__(self) -> None:
        _different("dropped", self.dropped)
        if self.kept + max(self.dropped) > 1 + 1e-9:
            raise ValueError(
                f"Window.dropped must leave the {self.kept:g} kept, got {max(self.dropped):g}"
            )


@frozen
class Transfer:
    """Accuracy of three settings on subsets that each of the three scored."""

    model: models.Model = models.MLP(width=32, depth=1)
    """The second architecture"""
    learning_rate: Positive = 0.1
    """The second learning rate"""
    kept: Part = 0.3
    """Fraction of the examples that is kept"""
    scored_at: NonNegative = 5.0
    """Epoch after which EL2N is taken, one of score.epochs"""
    replicas: Count = 10
    """Paired seeds of each subset, each by a draw of the scores"""
    epochs: Positive = 20.0
    """Length of a training in epochs of the full data: the same steps, however small the subset"""


@frozen
class Ranking:
    """No retraining: every score of every example, beside one another and the wrong labels."""

    scored_at: NonNegative = 5.0
    """Epoch after which the EL2N is taken whose extremes are shown, one of score.epochs"""
    shown: Count = 4
    """Images of each class at either end of the score"""


@frozen
class Rescoring:
    """Accuracy when a network picks its own hardest examples anew while it trains."""

    kept: Part = 0.3
    """Fraction of the examples that is trained on after the warm-up"""
    warmup: Positive = 2.0
    """Epochs on all data before the first choice"""
    every: Positive = 3.0
    """Epochs between choices"""
    replicas: Count = 10
    """Networks trained with each way to choose, with the same seeds for all ways"""
    epochs: Positive = 20.0
    """Length of the whole training, in epochs of the full data; the same for every way"""

    def __post_init__(self) -> None:
        if self.warmup >= self.epochs:
            raise ValueError(f"Rescoring.warmup must be < epochs {self.epochs}, got {self.warmup}")


@frozen
class Connectivity:
    """The error barrier between two children of one network, on examples of high and low score."""

    spawn: tuple[NonNegative, ...] = (0.0, 0.5, 1.0, 2.0, 5.0)
    """Epochs at which two children leave their parent, each in its own order of batches"""
    independent: bool = True
    """Whether children that share nothing, not even their initialisation, are measured too"""
    examples: Count = 200
    """Hardest, easiest and random examples that the barrier is measured on"""
    points: Count = 11
    """Points on the line between two children, its ends among them: an odd number"""
    scored_at: NonNegative = 5.0
    """Epoch after which EL2N is taken, one of score.epochs"""
    replicas: Count = 8
    """Pairs of children"""
    epochs: Positive = 20.0
    """Length of the training of a parent and then its child together, in epochs"""

    def __post_init__(self) -> None:
        _different("spawn", self.spawn)
        if max(self.spawn) >= self.epochs or self.points % 2 == 0 or self.points < 3:
            raise ValueError(
                f"Connectivity needs spawn < epochs {self.epochs} and odd points >= 3, got "
                f"spawn {self.spawn} and {self.points} points"
            )


@frozen
class Velocity:
    """How fast the tangent kernel of examples in the order of their score turns."""

    groups: Count = 9
    """Groups of examples of neighbouring EL2N, equally spaced in rank"""
    examples: Count = 100
    """Examples of a group"""
    scored_at: NonNegative = 5.0
    """Epoch after which the EL2N is taken that orders the examples, one of score.epochs"""
    replicas: Count = 5
    """Runs whose kernels are followed"""
    epochs: Count = 6
    """Length of the training in epochs; the kernel is compared from one epoch to the next"""


Study = Pruning | Timing | Window | Transfer | Ranking | Rescoring | Connectivity | Velocity


@frozen
class Config:
    """One study of example scores."""

    data: DataConfig = DataConfig()
    model: models.Model = models.MLP()
    train: Train = Train(optimizer=optim.SGD(weight_decay=5e-4))
    score: Scoring = Scoring()
    study: Study = Pruning()
    noise: Annotated[Fraction, Replica] = 0.0
    """Fraction of training labels flipped to a different class"""
    seed: Annotated[Seed, Replica] = 0
    """Seed of everything random except the split of the data"""

    def __post_init__(self) -> None:
        at = getattr(self.study, "scored_at", self.score.epochs[0])
        if at not in self.score.epochs:
            raise ValueError(
                f"study.scored_at must be one of score.epochs {self.score.epochs}, got {at:g}"
            )
        init = [m for m in getattr(self.study, "methods", ()) if m == "grand_init_hard"]
        replicas, draws = getattr(self.study, "replicas", 1), self.score.draws
        if replicas > draws:
            raise ValueError(
                f"study.replicas must be at most score.draws {draws}, for each takes the scores "
                f"and the wrong labels of a draw of its own, got {replicas}"
            )
        if init and 0.0 not in self.score.epochs:
            raise ValueError(f"method {init[0]!r} needs 0 among score.epochs {self.score.epochs}")


@frozen
class ScoringConfig:
    """What determines the scores."""

    data: DataConfig
    model: models.Model
    train: Train
    score: Scoring
    noise: Annotated[Fraction, Replica]
    seed: Annotated[Seed, Replica]


def scoring_part(config: Config) -> ScoringConfig:
    """The part of a config that the scores are stored under, shared by all studies of them."""
    names = ("data", "model", "train", "score", "noise", "seed")
    return ScoringConfig(**{name: getattr(config, name) for name in names})
