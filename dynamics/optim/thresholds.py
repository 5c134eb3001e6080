"""How sharp a quadratic an optimizer can descend: the eigenvalue at which its step flips sign.

Each of them is of ``1/2 s theta^2``: the update is unstable exactly if s is above the threshold, or
below zero. On a network s is the largest eigenvalue of the Hessian of the loss that is descended
(mean or sum, with 1/2 or without, with z-loss or label smoothing if it has them) on the whole
training set. The threshold certifies nothing else: not on a minibatch or a probe batch, whose
Hessian is sharper on average (``stability.sgd`` is about those), not with gradients clipped or
rescaled (multiply the learning rate by the factor first), not for steps with noise. A network whose
sharpness is at the threshold oscillates and need not diverge: gradient descent hovers 1 to 3 %
above it.
"""

from collections.abc import Mapping
from typing import Any

from dynamics.optim.schedule import Constant

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


def now(
    rule: Any, learning_rate: Scalar | None, hyperparameters: Mapping[str, Scalar] | None
) -> tuple[Scalar, dict[str, Scalar]]:
    """The learning rate of now and all scalars of a rule, a config of ``optim.Optimizer``.

    ``hyperparameters`` replace the config's. ValueError: no learning rate where a schedule moves
    it; layers that learn or decay at different rates, so that no eigenvalue decides.
    """
    h = rule.hyperparameters()
    h |= {name: value for name, value in (hyperparameters or {}).items() if name in h}
    if learning_rate is None and not isinstance(rule.schedule, Constant):
        raise ValueError(
            f"the schedule {type(rule.schedule).__name__} moves the learning rate: give the "
            "one of now, optim.rate(rule, step, num_steps)"
        )
    if rule.base_fan_in:
        raise ValueError(
            f"base_fan_in must be 0 for a threshold, got {rule.base_fan_in}: layers learn at "
            "different rates; scale the Hessian by them on both sides, by their roots"
        )
    if rule.decay != "all":
        raise ValueError(
            f"decay must be 'all' for a threshold, got {rule.decay!r}: what does not decay has "
            "another one; add the decay to the Hessian and give weight_decay 0"
        )
    return h["learning_rate"] if learning_rate is None else learning_rate, h
