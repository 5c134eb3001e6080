"""Gradient descent with momentum."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import optax

from dynamics.config import Fraction, NonNegative, Positive, Range, Replica, frozen
from dynamics.optim import thresholds, transforms
from dynamics.optim.schedule import Constant, Schedule


@frozen
class SGD:
    """Gradient descent with momentum; weight decay is added to the gradient.

    ``g += weight_decay w; m = momentum m + g; w -= lr(t) (g + momentum m if nesterov else m)``,
    lr(t) the rate times the schedule. Reference: Sutskever et al. 2013.
    """

    learning_rate: Annotated[Positive, Replica] = 0.02
    """Peak learning rate; the schedule multiplies it"""
    momentum: Annotated[Fraction, Replica] = 0.9
    """Heavy-ball coefficient"""
    nesterov: bool = True
    """Whether the momentum is Nesterov's"""
    weight_decay: Annotated[NonNegative, Replica] = 0.0
    """L2: this times the parameters is added to the gradient"""
    decay: Literal["all", "matrices"] = "all"
    """What decays: all parameters, or only those of two or more axes (no biases, no norms)"""
    independent_decay: bool = False
    """Whether the decay is w -= weight_decay * schedule * w instead, whatever the learning rate"""
    clip_norm: NonNegative = 0.0
    """The largest norm of all parameters' gradient together, longer ones are cut to it; 0: any"""
    base_fan_in: Annotated[int, Range(low=0.0)] = 0
    """Linear layers learn at the rate * this / fan_in (muParam, where it is 256); 0: at the rate"""
    schedule: Schedule = Constant()
    """Shape of the learning rate over the steps of the run"""

    def hyperparameters(self) -> dict[str, float]:
        """The scalars that the optimizer of ``make`` reads from the state."""
        names = ("learning_rate", "momentum", "weight_decay")
        return {name: getattr(self, name) for name in names}

    def make(self, num_steps: int) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a run of ``num_steps`` steps; its scalars are read from the state.

        The same object for the same ``num_steps`` and fields, those marked ``Replica`` apart.
        """
        return _made(transforms.without_numbers(self), num_steps)

    def threshold(
        self,
        learning_rate: thresholds.Scalar | None = None,
        *,
        hyperparameters: Mapping[str, thresholds.Scalar] | None = None,
    ) -> thresholds.Scalar:
        """``(2 - d)(1 + momentum) / (k eta) - lambda``, k = 1 + 2 momentum with nesterov, else 1:
        the update flips sign where an eigenvalue of the Hessian of the loss is above it.

        lambda is the weight decay and d = 0; with ``independent_decay`` d is what a step takes away
        and lambda = 0. ``hyperparameters`` (a state's, say) replace the config's. See
        ``optim.thresholds`` for what it does not certify.

        ValueError: no learning rate where a schedule moves it (``optim.rate`` has it);
        ``base_fan_in``, or a ``decay`` of matrices only, with which no eigenvalue decides.

        Reference: Cohen et al. 2021, arXiv 2103.00065; with weight decay it is ours.
        """
        eta, h = thresholds.now(self, learning_rate, hyperparameters)
        decay = h["weight_decay"]
        if self.independent_decay:
            taken = {"shrinkage": decay * eta / h["learning_rate"]}  # only the schedule moves it
        else:
            taken = {"l2": decay}
        return thresholds.threshold(eta, h["momentum"], nesterov=self.nesterov, **taken)

    def preconditioner(self, opt_state: Any, hyperparameters: Mapping[str, Any]) -> None:
        """None: gradients are divided by nothing."""
        return None


@functools.cache
def _made(rule: SGD, num_steps: int) -> optax.GradientTransformationExtraArgs:
    def direction(h: Mapping[str, Any], decay: list[optax.GradientTransformation]) -> list:
        return [*decay, optax.trace(h["momentum"], nesterov=rule.nesterov)]

    return transforms.chained(rule, direction, num_steps)
