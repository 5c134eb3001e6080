"""How sharp a quadratic an optimizer can descend: the eigenvalue at which its step flips sign.

Each of them is of ``1/2 s theta^2``: the update is unstable exactly if s is above the threshold, or
below zero. On a network s is the largest eigenvalue of the Hessian of the loss that is descended
(mean or sum, with 1/2 or without, with z-loss or label smoothing if it has them) on the whole
training set. The threshold certifies nothing else: not on a minibatch or a probe batch, whose
Hessian is sharper on average (``sgd`` is about those), not with gradients clipped or rescaled
(multiply the learning rate by the factor first), not for steps with noise. A network whose
sharpness is at the threshold oscillates and need not diverge: gradient descent hovers 1 to 3 %
above it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dynamics.optim import Constant, Train, factor

Scalar = Any  # a number or an array of numbers, traced or not


def threshold(
    learning_rate: Scalar,
    momentum: Scalar = 0.0,
    *,
    nesterov: bool = False,
    average: bool = False,
    l2: Scalar = 0.0,
    shrinkage: Scalar = 0.0,
) -> Scalar:
    """``(2 - d)(1 + beta) / (k c eta) - lambda``: the update flips sign if s is above this.

    The update: ``g = (s + lambda) theta; m = beta m + c g; theta = (1 - d) theta - eta u``, u = m,
    or c g + beta m with ``nesterov``. c is 1, or 1 - beta if the momentum is an ``average`` of
    gradients (Adam's) instead of their sum (heavy ball; torch's and optax's sgd), which makes the
    threshold 1 / (1 - beta) times higher. k is 1, or 1 + 2 beta with ``nesterov``. ``l2`` is
    lambda, so the threshold is one of the Hessian of the loss without it. ``shrinkage`` is d, the
    part of the parameters that a step takes away: eta lambda for weight decay decoupled from the
    gradient (AdamW), lambda for decay independent of the learning rate too.

    2 / eta for gradient descent, (2 + 2 beta) / eta for heavy ball, (2 + 2 beta) /
    ((1 + 2 beta) eta) for Nesterov, 38 / eta for Adam with beta 0.9: there s is an eigenvalue of
    P^(-1/2) H P^(-1/2), P = (1 - beta1^t)(sqrt(v / (1 - beta2^t)) + epsilon) of the same step.

    Each is the condition for an eigenvalue -1 of the linear map of (theta, m): Cohen et al. 2021,
    arXiv 2103.00065, for gradient descent, Polyak's and Nesterov's momentum, and 2022, arXiv
    2207.14484, for Adam; with weight decay and for NAdam it is ours. ValueError: a plain number
    out of its range.
    """
    ranges = {
        "learning_rate": (learning_rate, 0.0, float("inf")),
        "momentum": (momentum, 0.0, 1.0),
        "l2": (l2, 0.0, float("inf")),
        "shrinkage": (shrinkage, 0.0, 2.0),
    }
    for name, (value, low, high) in ranges.items():
        if isinstance(value, int | float) and not low <= value <= high:
            raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value!r}")
    if isinstance(learning_rate, int | float) and learning_rate == 0:
        raise ValueError("learning_rate must be > 0: nothing is unstable at 0")
    if average and isinstance(momentum, int | float) and momentum == 1:
        raise ValueError("momentum must be < 1 for an average of gradients, got 1")
    scale = (1 - momentum) if average else 1.0
    lookahead = (1 + 2 * momentum) if nesterov else 1.0
    return (2 - shrinkage) * (1 + momentum) / (lookahead * scale * learning_rate) - l2


def stability_threshold(
    optimizer: Train,
    learning_rate: Scalar | None = None,
    *,
    hyperparameters: Mapping[str, Scalar] | None = None,
) -> Scalar:
    """The ``threshold`` of ``optim.make(optimizer, ...)`` at the learning rate of now.

    sgd: of the largest eigenvalue of the Hessian of the loss, weight decay left out of it. adam: of
    the preconditioned Hessian, epsilon and the corrections for the first steps within the
    preconditioner. ``hyperparameters`` (a state's, say) replace the config's momentum, weight decay
    and peak rate. It is for steps that ``clip_norm`` leaves alone: where gradients are cut, give
    the learning rate times the factor. See the module for what else this does not certify.

    ValueError: no learning rate where a schedule moves it (``rate`` has it); ``base_fan_in``, with
    which layers learn at different rates, so that no eigenvalue of the Hessian decides.
    """
    h = {name: getattr(optimizer, name) for name in ("learning_rate", "momentum", "weight_decay")}
    h |= {name: value for name, value in (hyperparameters or {}).items() if name in h}
    if learning_rate is None and not isinstance(optimizer.schedule, Constant):
        raise ValueError(
            f"the schedule {type(optimizer.schedule).__name__} moves the learning rate: give the "
            "one of now, thresholds.rate(optimizer, step, num_steps)"
        )
    if optimizer.base_fan_in:
        raise ValueError(
            f"base_fan_in must be 0 for a threshold, got {optimizer.base_fan_in}: layers learn at "
            "different rates; scale the Hessian by them on both sides, by their roots"
        )
    eta = h["learning_rate"] if learning_rate is None else learning_rate
    decay, l2, shrinkage = h["weight_decay"], 0.0, 0.0
    if optimizer.independent_decay:
        shrinkage = decay * eta / h["learning_rate"]  # only the schedule moves it
    elif optimizer.rule == "adam":
        shrinkage = decay * eta
    else:
        l2 = decay
    if optimizer.rule == "sgd":
        kind = {"nesterov": optimizer.nesterov}
    elif optimizer.rule == "adam":
        kind = {"average": True}
    else:
        raise ValueError(f"no threshold is known for the rule {optimizer.rule!r}")
    return threshold(eta, h["momentum"], l2=l2, shrinkage=shrinkage, **kind)


def rate(
    optimizer: Train,
    step: Scalar,
    num_steps: int,
    *,
    hyperparameters: Mapping[str, Scalar] | None = None,
) -> jax.Array:
    """The learning rate of the update after ``step`` of ``num_steps`` steps."""
    peak = (hyperparameters or {}).get("learning_rate", optimizer.learning_rate)
    return factor(optimizer.schedule, num_steps)(jnp.asarray(step, jnp.int32)) * peak
