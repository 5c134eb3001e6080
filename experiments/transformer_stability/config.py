"""What a study of small transformers at large learning rates is determined by."""

from typing import Annotated, Literal

from dynamics import optim
from dynamics.config import Count, Fraction, NonNegative, Positive, Replica, Seed, frozen

Intervention = Literal[
    "none", "qk_norm", "z_loss", "no_decay", "scaled_decay", "mu_param", "long_warmup"
]


def _different(name: str, values: tuple) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name} must be one or more different values, got {values}")


def _rising(name: str, values: tuple) -> None:
    if not values or list(values) != sorted(set(values)):
        raise ValueError(f"{name} must be one or more values that rise, got {values}")


@frozen
class Text:
    """Which bytes are predicted, each from those before it in its window."""

    source: Literal["docstrings", "file"] = "docstrings"
    """docstrings: Python's own documentation, which needs no files; file: a text file"""
    file: str = ""
    """For file: relative to the data folder or absolute"""
    context: Count = 32
    """Bytes of a window"""
    test_fraction: Fraction = 0.1
    """Part of the windows, the last ones, that is not trained on"""

    def __post_init__(self) -> None:
        if (self.source == "file") != bool(self.file):
            raise ValueError(
                "Text.file must name a file for source 'file' and be empty for 'docstrings', got "
                f"{self.file!r} with source {self.source!r}"
            )


@frozen
class Rates:
    """The loss at the end and the attention logits, learning rate by learning rate."""

    interventions: tuple[Intervention, ...] = (
        "none",
        "qk_norm",
        "z_loss",
        "no_decay",
        "scaled_decay",
        "mu_param",
        "long_warmup",
    )
    """What is changed of the recipe, one thing at a time, with the same seeds for all"""
    widths: tuple[Count, ...] = (32,)
    """Sizes of the residual stream"""
    rates: tuple[Positive, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """Peak learning rates"""
    every: Count = 50
    """Steps between measurements"""
    replicas: Count = 4
    """Networks trained for each of these, with the same seeds for all"""

    def __post_init__(self) -> None:
        _different("Rates.interventions", self.interventions)
        _rising("Rates.widths", self.widths)
        _rising("Rates.rates", self.rates)


@frozen
class Widths:
    """The largest attention logit early in training, width by width."""

    interventions: tuple[Intervention, ...] = ("none", "qk_norm")
    """What is changed of the recipe"""
    widths: tuple[Count, ...] = (16, 32, 48, 64, 80, 96)
    """Sizes of the residual stream"""
    rates: tuple[Positive, ...] = (1e-2, 3e-2, 1e-1)
    """Peak learning rates"""
    first: Count = 70
    """The first step after which attention is measured; the figure shows the mean up to last"""
    last: Count = 80
    """The last one, where training stops; the schedule is that of all steps"""
    replicas: Count = 4
    """Networks trained for each of these"""

    def __post_init__(self) -> None:
        _different("Widths.interventions", self.interventions)
        _rising("Widths.widths", self.widths)
        _rising("Widths.rates", self.rates)
        if self.first > self.last:
            raise ValueError(f"Widths.first must be <= last {self.last}, got {self.first}")


@frozen
class Changes:
    """How far an intervention goes."""

    z_loss: Annotated[NonNegative, Replica] = 1e-4
    """For z_loss: its coefficient, which is 0 without the intervention"""
    scaled_decay: Annotated[NonNegative, Replica] = 0.1
    """For scaled_decay: the weight decay, times the learning rate, in place of the recipe's"""
    base_fan_in: Count = 32
    """For mu_param: linear layers learn at the rate * this / fan_in; 256 in the paper"""
    warmup: Fraction = 0.25
    """For long_warmup: the part of the steps that it takes, in place of the schedule's"""


@frozen
class Config:
    """One study of small transformers."""

    data: Text = Text()
    depth: Count = 2
    """Blocks"""
    head_width: Count = 16
    """Width of an attention head, which must divide study.widths"""
    optimizer: optim.Adam = optim.Adam(
        momentum=0.9,
        second_moment=0.95,
        weight_decay=1e-4,
        independent_decay=True,
        clip_norm=1.0,
        schedule=optim.Cosine(warmup=0.05),
    )
    """The recipe without its learning rate, for which the study has its own"""
    batch_size: Count = 16
    """Windows a step"""
    steps: Count = 300
    """Training steps that the schedule spans"""
    validation: Count = 256
    """Test windows that the loss is measured on, spread evenly"""
    probed: Count = 16
    """How many of these windows attention and sizes are measured on"""
    changes: Changes = Changes()
    study: Rates | Widths = Rates()
    seed: Annotated[Seed, Replica] = 0
    """Seed of initialisations and of the order of batches"""

    def __post_init__(self) -> None:
        kept = self.optimizer
        if not kept.independent_decay or kept.base_fan_in:
            raise ValueError(
                "optimizer must have independent_decay and no base_fan_in, which is the "
                f"intervention mu_param, got {kept.independent_decay} and {kept.base_fan_in}"
            )
        if kept.learning_rate != optim.Adam().learning_rate:
            raise ValueError(
                "optimizer.learning_rate is the study's: change study.rates instead, got "
                f"{kept.learning_rate:g}"
            )
        if not isinstance(kept.schedule, optim.Cosine | optim.Linear):
            raise ValueError(
                "optimizer.schedule must be Cosine or Linear, which have a warm-up, got "
                f"{type(kept.schedule).__name__}"
            )
        if self.probed > self.validation:
            raise ValueError(
                f"probed must be <= validation {self.validation}, of which it is a part, got "
                f"{self.probed}"
            )
        if wrong := [width for width in self.study.widths if width % self.head_width]:
            raise ValueError(f"head_width {self.head_width} must divide the widths, got {wrong[0]}")
        if isinstance(self.study, Widths) and self.study.last > self.steps:
            raise ValueError(f"study.last must be <= steps {self.steps}, got {self.study.last}")
