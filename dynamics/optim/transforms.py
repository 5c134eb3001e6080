"""What rules are made of: scalars read from the state, decay, rates by layer."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from dynamics.config import replica_fields
from dynamics.optim.schedule import factor

T = TypeVar("T")
Rule = Any  # a config of ``optim.Optimizer``, which is made of the files that use this one
Direction = Callable[
    [Mapping[str, Any], list[optax.GradientTransformation]], list[optax.GradientTransformation]
]


def without_numbers(rule: T) -> T:
    """The config with its ``Replica`` numbers at their defaults: all that a program is made of."""
    numbers = replica_fields(rule)
    defaults = {f.name: f.default for f in dataclasses.fields(rule) if f.name in numbers}  # pyright: ignore
    return dataclasses.replace(rule, **defaults)  # pyright: ignore


def chained(
    rule: Rule, direction: Direction, num_steps: int
) -> optax.GradientTransformationExtraArgs:
    """Clip, ``direction(scalars, decay)``, the rates of layers, the learning rate of the schedule.

    ``decay`` is the transformation of the rule's weight decay, to be put before or after the rule
    itself; it is none with ``independent_decay``, which comes last.

    ``clip_norm`` cuts the gradient before anything else sees it: Pascanu et al. 2013, arXiv
    1211.5063, algorithm 1.
    """
    shape = factor(rule.schedule, num_steps)
    where = (lambda t: t) if rule.decay == "all" else (lambda t: optax.masked(t, are_matrices))

    def made(h: Mapping[str, Any]) -> optax.GradientTransformation:
        def learning_rate(count: Any) -> jax.Array:
            return h["learning_rate"] * shape(count)

        decay = where(optax.add_decayed_weights(h["weight_decay"]))
        steps = direction(h, [] if rule.independent_decay else [decay])
        if rule.clip_norm:
            steps.insert(0, optax.clip_by_global_norm(rule.clip_norm))
        if rule.base_fan_in:
            steps.append(by_fan_in(rule.base_fan_in))
        steps.append(optax.scale_by_learning_rate(learning_rate))
        if rule.independent_decay:
            steps.append(where(independent_decay(h["weight_decay"], shape)))
        return optax.chain(*steps)

    return by_hyperparameters(made, rule.hyperparameters())


def are_matrices(params: Any) -> Any:
    """Which parameters have two or more axes: kernels and embeddings, but no biases, no norms."""
    return jax.tree.map(lambda w: w.ndim > 1, params)


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

    It is offered all that ``step.make`` offers. ``defaults`` only shape the optimizer's state.
    ValueError when a scalar is missing from the state's hyperparameters.
    """

    def update(updates, state, params=None, *, hyperparameters, **extra):
        if missing := sorted(defaults.keys() - hyperparameters.keys()):
            raise ValueError(
                f"the optimizer reads the hyperparameter {missing[0]!r}, the state has "
                f"{sorted(hyperparameters)}: pass hyperparameters=rule.hyperparameters()"
            )
        made = optax.with_extra_args_support(rule(hyperparameters))
        return made.update(updates, state, params, hyperparameters=hyperparameters, **extra)

    return optax.GradientTransformationExtraArgs(rule(defaults).init, update)  # pyright: ignore
