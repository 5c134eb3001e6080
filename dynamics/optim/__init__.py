"""Optimizers from configs, whose scalars may differ between the replicas of one program."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import optax

from dynamics.config import Count, Fraction, NonNegative, Positive, Replica, frozen
from dynamics.optim.schedule import Constant, Cosine, Linear, Schedule, Steps, factor

__all__ = [
    "Constant",
    "Cosine",
    "Linear",
    "Schedule",
    "Steps",
    "Train",
    "by_hyperparameters",
    "factor",
    "hyperparameters",
    "make",
]


@frozen
class Train:
    """How a network is trained."""

    rule: Literal["sgd", "adam"] = "sgd"
    """sgd: momentum, with weight decay added to the gradient; adam: AdamW, decay decoupled"""
    learning_rate: Annotated[Positive, Replica] = 0.02
    """Peak learning rate; the schedule multiplies it"""
    momentum: Annotated[Fraction, Replica] = 0.9
    """Heavy-ball coefficient of sgd; the first-moment decay (beta 1) of adam"""
    nesterov: bool = True
    """Nesterov's form of the momentum (sgd only)"""
    second_moment: Annotated[Fraction, Replica] = 0.999
    """Second-moment decay, beta 2 (adam only)"""
    epsilon: Annotated[Positive, Replica] = 1e-8
    """Added to the root of the second moment (adam only)"""
    weight_decay: Annotated[NonNegative, Replica] = 0.0
    """On all parameters: coupled L2 for sgd, decoupled for adam"""
    batch_size: Count = 64
    """Examples a step"""
    schedule: Schedule = Constant()
    """Shape of the learning rate over the steps of the run"""
    augment: Literal["none", "crop_flip"] = "none"
    """crop_flip: reflect-pad 4 pixels, random crop, horizontal flip, per image"""

    def __post_init__(self) -> None:
        for name in ("momentum", "second_moment"):
            if self.rule == "adam" and getattr(self, name) == 1:
                raise ValueError(f"Train.{name} must be < 1 for adam, which divides by 1 - it^t")


def hyperparameters(train: Train) -> dict[str, float]:
    """The scalars that the optimizer of ``make`` reads from the state."""
    names = ["learning_rate", "momentum", "weight_decay"]
    names += ["second_moment", "epsilon"] if train.rule == "adam" else []
    return {name: getattr(train, name) for name in names}


def make(train: Train, num_steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run of ``num_steps`` steps; its scalars are read from the state.

    sgd: g += weight_decay * w; m = momentum * m + g; w -= lr(t) * (g + momentum * m if nesterov
    else m). Reference: Sutskever et al. 2013. adam: Kingma and Ba 2015, arXiv 1412.6980, algorithm
    1, with the decoupled decay of Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """
    shape = factor(train.schedule, num_steps)

    def rule(h: Mapping[str, Any]) -> optax.GradientTransformation:
        def learning_rate(count: Any) -> jax.Array:
            return h["learning_rate"] * shape(count)

        if train.rule == "sgd":
            return optax.chain(
                optax.add_decayed_weights(h["weight_decay"]),
                optax.trace(h["momentum"], nesterov=train.nesterov),
                optax.scale_by_learning_rate(learning_rate),
            )
        return optax.adamw(
            learning_rate,
            b1=h["momentum"],
            b2=h["second_moment"],
            eps=h["epsilon"],
            weight_decay=h["weight_decay"],
        )

    return by_hyperparameters(rule, hyperparameters(train))


def by_hyperparameters(
    rule: Callable[[Mapping[str, Any]], optax.GradientTransformation],
    defaults: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
    """An optax rule made anew inside the step from the replica's own scalars.

    ``defaults`` only shape the optimizer's state. ValueError when a scalar is missing from the
    state's hyperparameters.
    """

    def update(updates, state, params=None, *, hyperparameters, **extra):
        if missing := sorted(defaults.keys() - hyperparameters.keys()):
            raise ValueError(
                f"the optimizer reads the hyperparameter {missing[0]!r}, the state has "
                f"{sorted(hyperparameters)}: pass hyperparameters=optim.hyperparameters(train)"
            )
        made = optax.with_extra_args_support(rule(hyperparameters))
        return made.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(rule(defaults).init, update)  # pyright: ignore
