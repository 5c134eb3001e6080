"""Optimizers from configs, whose scalars may differ between the replicas of one program."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from dynamics.config import Count, Fraction, NonNegative, Positive, Range, Replica, frozen
from dynamics.optim.schedule import Constant, Cosine, Linear, Schedule, Steps, factor

__all__ = [
    "Constant",
    "Cosine",
    "Linear",
    "Schedule",
    "Steps",
    "Train",
    "by_fan_in",
    "by_hyperparameters",
    "factor",
    "hyperparameters",
    "independent_decay",
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
    independent_decay: bool = False
    """Whether the decay is w -= weight_decay * schedule * w instead, whatever the learning rate"""
    clip_norm: NonNegative = 0.0
    """The largest norm of all parameters' gradient together, longer ones are cut to it; 0: any"""
    base_fan_in: Annotated[int, Range(low=0.0)] = 0
    """Linear layers learn at rate * this / fan_in (muParam, simple: 256); 0: all at the rate"""
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

    ``clip_norm`` cuts the gradient before anything else sees it: Pascanu et al. 2013, arXiv
    1211.5063, algorithm 1. With ``independent_decay`` the rule above runs without decay.
    """
    shape = factor(train.schedule, num_steps)

    def rule(h: Mapping[str, Any]) -> optax.GradientTransformation:
        def learning_rate(count: Any) -> jax.Array:
            return h["learning_rate"] * shape(count)

        decay = [] if train.independent_decay else [optax.add_decayed_weights(h["weight_decay"])]
        if train.rule == "sgd":
            steps = [*decay, optax.trace(h["momentum"], nesterov=train.nesterov)]
        else:
            adam = optax.scale_by_adam(h["momentum"], h["second_moment"], h["epsilon"])
            steps = [adam, *decay]
        if train.clip_norm:
            steps.insert(0, optax.clip_by_global_norm(train.clip_norm))
        if train.base_fan_in:
            steps.append(by_fan_in(train.base_fan_in))
        steps.append(optax.scale_by_learning_rate(learning_rate))
        if train.independent_decay:
            steps.append(independent_decay(h["weight_decay"], shape))
        return optax.chain(*steps)

    return by_hyperparameters(rule, hyperparameters(train))


def independent_decay(
    weight_decay: Any, shape: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
    """To updates is added -shape(t) weight_decay w: the last in a chain, after the learning rate.

    So that w <- w - shape(t) (rate Delta + weight_decay w), and runs of different peak rates decay
    alike. Reference: Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, where eta_t is the
    shape; Wortsman et al. 2023, arXiv 2309.14322, section 3.2.2, who print the decay with a sign
    that would make weights grow.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        now = shape(state.count) * weight_decay
        updates = jax.tree.map(lambda u, w: u - (now * w).astype(u.dtype), updates, params)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def by_fan_in(base: int) -> optax.GradientTransformation:
    """Updates of linear layers times base / fan_in: muParam, the simple form.

    A linear layer is a parameter named ``kernel`` [..., inputs, outputs], the output layer among
    them; its fan_in is the product of all sizes but the last. Embeddings, norms and biases are left
    alone. ValueError, when traced: there is no such parameter.

    Reference: Wortsman et al. 2023, arXiv 2309.14322, section 3.2.4, after Yang et al. 2022, arXiv
    2203.03466, whose other changes (of the head's initialisation, of 1 / sqrt(d) in attention) it
    leaves out.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        linear = [getattr(path[-1], "key", None) == "kernel" for path, _ in leaves if path]
        if not any(linear):
            names = [jax.tree_util.keystr(path) for path, _ in leaves]
            raise ValueError(
                f"base_fan_in {base} scales the rate of parameters named 'kernel', there is none "
                f"among {names}: give 0"
            )
        scaled = [
            leaf * (base / math.prod(leaf.shape[:-1])) if is_linear else leaf
            for is_linear, (_, leaf) in zip(linear, leaves, strict=True)
        ]
        return structure.unflatten(scaled), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


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
