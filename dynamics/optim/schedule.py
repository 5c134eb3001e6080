"""Learning-rate schedules as data: a shape between 0 and 1 over the steps of a run."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from dynamics.config import Fraction, Range, frozen


@frozen
class Constant:
    """The peak learning rate throughout."""


@frozen
class Steps:
    """Multiplied by ``decay`` at each milestone."""

    milestones: tuple[Fraction, ...] = (0.3, 0.6, 0.8)
    """Fractions of the run's steps at which the rate drops"""
    decay: Annotated[float, Range(above=0.0, high=1.0)] = 0.2
    """The factor of each drop"""


@frozen
class Cosine:
    """Linear warm-up, then half a cosine down to ``final``."""

    warmup: Fraction = 0.0
    """Fraction of the run's steps over which the rate rises from 0"""
    final: Fraction = 0.0
    """Fraction of the peak that is left at the end"""


@frozen
class Linear:
    """Linear warm-up, then a straight line down to ``final``."""

    warmup: Fraction = 0.0
    """Fraction of the run's steps over which the rate rises from 0"""
    final: Fraction = 0.0
    """Fraction of the peak that is left at the end"""


Schedule = Constant | Steps | Cosine | Linear


def factor(schedule: Schedule, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """``step -> f32``: what multiplies the peak learning rate at the update after ``step`` steps.

    Warm-up over W steps gives (step + 1) / W, so the first update is not lost. With
    u = (step - W) / (num_steps - W): cosine final + (1 - final) (1 + cos(pi u)) / 2
    (Loshchilov and Hutter 2017, arXiv 1608.03983, eq. 5), linear 1 - (1 - final) u.
    """
    if isinstance(schedule, Constant):
        return lambda step: jnp.float32(1.0)
    if isinstance(schedule, Steps):
        edges = np.array([round(m * num_steps) for m in schedule.milestones], np.int32)
        drops = schedule.decay
        return lambda step: jnp.float32(drops) ** jnp.sum(step >= edges).astype(jnp.float32)
    warmup = round(schedule.warmup * num_steps)
    rest = max(num_steps - warmup, 1)

    def shape(step: jax.Array) -> jax.Array:
        t = step.astype(jnp.float32)
        u = jnp.clip((t - warmup) / rest, 0.0, 1.0)
        fall = (1 + jnp.cos(jnp.pi * u)) / 2 if isinstance(schedule, Cosine) else 1 - u
        down = schedule.final + (1 - schedule.final) * fall
        return jnp.where(t < warmup, (t + 1) / max(warmup, 1), down)

    return shape


def rate(
    rule: Any, step: Any, num_steps: int, *, hyperparameters: Mapping[str, Any] | None = None
) -> jax.Array:
    """The learning rate of the update after ``step`` of ``num_steps`` steps, f32.

    ``rule`` is a config of ``optim.Optimizer``; ``hyperparameters`` (a state's) have another peak.
    """
    peak = (hyperparameters or {}).get("learning_rate", rule.learning_rate)
    return factor(rule.schedule, num_steps)(jnp.asarray(step, jnp.int32)) * peak
