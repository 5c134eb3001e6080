"""Adam with decoupled weight decay."""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from dynamics.config import NonNegative, Positive, Range, Replica, frozen
from dynamics.optim import thresholds, transforms
from dynamics.optim.schedule import Constant, Schedule

Beta = Annotated[float, Range(low=0.0, below=1.0)]  # the rule divides by 1 - it^t


@frozen
class Adam:
    """Adam, with weight decay decoupled from the gradient (AdamW).

    ``m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr(t) (m / (1 - b1^t) / (sqrt(v /
    (1 - b2^t)) + epsilon) + weight_decay w)``, b1 the momentum, b2 the second moment, lr(t) the
    rate times the schedule, t from 1. Reference: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1,
    with the decay of Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """

    learning_rate: Annotated[Positive, Replica] = 1e-3
    """Peak learning rate; the schedule multiplies it"""
    momentum: Annotated[Beta, Replica] = 0.9
    """First-moment decay, beta 1"""
    second_moment: Annotated[Beta, Replica] = 0.999
    """Second-moment decay, beta 2"""
    epsilon: Annotated[Positive, Replica] = 1e-8
    """Added to the root of the second moment"""
    weight_decay: Annotated[NonNegative, Replica] = 0.0
    """Decay of the weights beside the gradient: w -= learning rate * this * w"""
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
        names = ("learning_rate", "momentum", "weight_decay", "second_moment", "epsilon")
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
        """``(2 - d)(1 + b1) / ((1 - b1) eta)``: the update flips sign where an eigenvalue of
        P^(-1/2) H P^(-1/2) is above it, H the Hessian of the loss, P the ``preconditioner``.

        d is what a step takes away of the parameters: eta times the weight decay, or that times the
        schedule with ``independent_decay``. Epsilon and the corrections for the first steps are
        within P. ``hyperparameters`` (a state's, say) replace the config's. See
        ``optim.thresholds`` for what it does not certify.

        ValueError: no learning rate where a schedule moves it (``optim.rate`` has it);
        ``base_fan_in``, or a ``decay`` of matrices only, with which no eigenvalue decides.

        Reference: Cohen et al. 2022, arXiv 2207.14484; with weight decay it is ours.
        """
        eta, h = thresholds.now(self, learning_rate, hyperparameters)
        decay = h["weight_decay"]
        # of an independent decay only the schedule moves it
        taken = decay * eta / h["learning_rate"] if self.independent_decay else decay * eta
        return thresholds.threshold(eta, h["momentum"], average=True, shrinkage=taken)

    def preconditioner(self, opt_state: Any, hyperparameters: Mapping[str, Any]) -> Any:
        """``(1 - b1^t) (sqrt(v / (1 - b2^t)) + epsilon)`` after t steps, a tree like the
        parameters': what the average of gradients, of weight 1 - b1, is divided by. NaN for t = 0.

        ValueError: an ``opt_state`` without Adam's moments.

        Reference: Cohen et al. 2022, arXiv 2207.14484, section 3, with the corrections for the
        first steps in it.
        """
        found, h = moments(opt_state), hyperparameters
        t = jnp.asarray(found.count, jnp.float32)
        first, second = (1 - h[name] ** t for name in ("momentum", "second_moment"))
        return jax.tree.map(lambda v: first * (jnp.sqrt(v / second) + h["epsilon"]), found.nu)


@functools.cache
def _made(rule: Adam, num_steps: int) -> optax.GradientTransformationExtraArgs:
    def direction(h: Mapping[str, Any], decay: list[optax.GradientTransformation]) -> list:
        return [optax.scale_by_adam(h["momentum"], h["second_moment"], h["epsilon"]), *decay]

    return transforms.chained(rule, direction, num_steps)


def moments(opt_state: Any) -> optax.ScaleByAdamState:
    """The count and the moments of Adam within an optimizer's state; ValueError if it has none."""
    inside = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=inside) if inside(x)]
    if len(found) != 1:
        raise ValueError(f"the optimizer must have one Adam, got {len(found)}: train with Adam")
    return found[0]


def last_update(opt_state: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """Delta = m / (sqrt(v) + epsilon) of the last step, m and v corrected for their start at 0: a
    tree like the parameters', before learning rate and decay. NaN before the first step.

    ValueError: an ``opt_state`` without Adam's moments.

    Reference: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """
    adam, h = moments(opt_state), hyperparameters
    count = jnp.asarray(adam.count, jnp.float32)
    first, second = 1 - h["momentum"] ** count, 1 - h["second_moment"] ** count
    return jax.tree.map(
        lambda v, u: v / first / (jnp.sqrt(u / second) + h["epsilon"]), adam.mu, adam.nu
    )
