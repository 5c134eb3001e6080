"""A model and a per-example loss become a Task; modes and batch statistics end here."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynamics import losses
from dynamics.calls import by_value
from dynamics.task.elr import elr
from dynamics.task.elr_plus import elr_plus
from dynamics.task.methods import of_methods
from dynamics.task.z_loss import z_loss
from dynamics.types import NO_SCALARS, Aux, Batch, Dataset, Key, PyTree, Scalars, Task

__all__ = ["classification", "elr", "elr_plus", "of_dataset", "of_function", "of_methods", "z_loss"]

Loss = Callable[[jax.Array, jax.Array], jax.Array]
MODES = {"train": True, "training": True, "deterministic": False, "use_running_average": False}
"""Arguments by which flax modules are told the mode, and their values in training."""


def classification(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    loss: Loss = losses.cross_entropy,
    input_dtype: Any = jnp.float32,
) -> Task:
    """The mean over a batch of ``loss(module(x), y)``.

    The module is called with a batch ``x`` and those of ``train``, ``training``, ``deterministic``
    and ``use_running_average`` that its ``__call__`` names; with ``x`` alone if it names none, and
    is then the same in training and evaluation. Collections other than params (batch statistics)
    become ``extras``. Labels may have more axes than the batch (a token each): an example's loss is
    the mean over them. Where a label is ``IGNORED`` any ``loss`` is left out.

    ValueError: the module's ``__call__`` needs another argument.

    Tasks of equal modules, shapes and losses are equal; ``functools.partial(losses.label_smoothing,
    epsilon=0.1)`` is a loss by its values, a lambda is equal to itself alone.
    """
    shape = tuple(int(side) for side in input_shape)
    modes = _modes(module)
    return of_methods(_Classification(module, modes, shape, by_value(loss), jnp.dtype(input_dtype)))


def _modes(module: nn.Module) -> tuple[str, ...]:
    """The arguments of a module's ``__call__`` that say whether it is in training."""
    named = list(inspect.signature(type(module).__call__).parameters.values())[2:]  # self, x
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for argument in named:
        needed = argument.default is inspect.Parameter.empty and argument.kind not in several
        if needed and argument.name not in MODES:
            raise ValueError(
                f"{type(module).__name__} is called with {argument.name!r}, which a task has not: "
                f"it gives x, and of {', '.join(MODES)} what the module names. Give "
                f"{argument.name!r} a default, or write the task's functions (docs/extending.md)"
            )
    return tuple(argument.name for argument in named if argument.name in MODES)


@dataclass(frozen=True)
class _Classification:
    module: nn.Module
    modes: tuple[str, ...]
    input_shape: tuple[int, ...]
    each: Loss
    input_dtype: Any

    def init(self, key: Key, hyperparameters: Scalars = NO_SCALARS) -> tuple[PyTree, PyTree]:
        x = jnp.zeros((1, *self.input_shape), self.input_dtype)
        variables = dict(self.module.init({"params": key, "dropout": key}, x, **self._mode(False)))
        return variables.pop("params"), variables

    def loss(
        self, params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        variables = {"params": params, **extras}
        logits, extras = cast(
            tuple[jax.Array, PyTree],
            self.module.apply(
                variables,
                batch.x,
                mutable=list(extras),
                rngs={"dropout": key},
                **self._mode(True),
            ),
        )
        found = _aux(self.each, logits, batch)
        return _mean(found.loss, batch), (dict(extras), found)

    def evaluate(
        self, params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars
    ) -> Aux:
        logits = self.module.apply({"params": params, **extras}, batch.x, **self._mode(False))
        return _aux(self.each, cast(jax.Array, logits), batch)

    def _mode(self, train: bool) -> dict[str, Any]:
        return {name: MODES[name] == train for name in self.modes}


def of_function(
    predict: Callable[[PyTree, jax.Array], jax.Array],
    *,
    init: Callable[[Key], PyTree] | None = None,
    loss: Loss = losses.cross_entropy,
) -> Task:
    """The task of any ``predict(params, x) -> logits``, the same in training and evaluation.

    ``x`` is a batch [b, ...] and so are the logits. ``init(key) -> params`` is needed to train;
    to score parameters trained elsewhere, ``step.given(params)`` is their state. A start that
    depends on the replica's hyperparameters, or that has extras, is the Task's own ``init``:
    ``of_function(predict)._replace(init=(key, hyperparameters) -> (params, extras))``. Tasks of the
    same functions are equal; of two lambdas with the same text they are not.
    """
    return of_methods(_Function(by_value(predict), by_value(init), by_value(loss)))


@dataclass(frozen=True)
class _Function:
    predict: Callable[[PyTree, jax.Array], jax.Array]
    start: Callable[[Key], PyTree] | None
    each: Loss

    def init(self, key: Key, hyperparameters: Scalars = NO_SCALARS) -> tuple[PyTree, PyTree]:
        if self.start is None:
            raise ValueError("task.of_function needs init=(key -> params) to make parameters")
        return self.start(key), {}

    def loss(
        self, params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        found = self.evaluate(params, extras, batch, hyperparameters)
        return _mean(found.loss, batch), (extras, found)

    def evaluate(
        self, params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars
    ) -> Aux:
        return _aux(self.each, self.predict(params, batch.x), batch)


def _aux(loss: Loss, logits: jax.Array, batch: Batch) -> Aux:
    each = loss(logits, batch.y)
    if each.shape[:1] != batch.y.shape[:1]:
        raise ValueError(
            f"a loss must give a number for each label or example, got {each.shape} for logits "
            f"{logits.shape} and labels {batch.y.shape}: logits are [examples, ..., outputs]"
        )
    return Aux(losses.over_labels(each, batch.y), logits=logits, y=batch.y, index=batch.index)


def _mean(each: jax.Array, batch: Batch) -> jax.Array:
    return each.mean() if batch.weight is None else (batch.weight * each).mean()


def of_dataset(module: nn.Module, data: Dataset, *, loss: Loss = losses.cross_entropy) -> Task:
    """The classification task whose inputs have the shape and kind of a dataset's."""
    tokens = data.std.size == 0
    dtype = jnp.int32 if tokens else jnp.float32
    return classification(module, data.x.shape[1:], loss=loss, input_dtype=dtype)
