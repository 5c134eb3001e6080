"""A model and a per-example loss become a Task; modes and batch statistics end here."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from dynamics import losses
from dynamics.task.elr import elr
from dynamics.task.elr_plus import elr_plus
from dynamics.task.z_loss import z_loss
from dynamics.types import Aux, Batch, Dataset, Key, PyTree, Scalars, Task

__all__ = ["classification", "elr", "elr_plus", "of_dataset", "of_function", "z_loss"]

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def classification(
    module: nn.Module,
    input_shape: Sequence[int],
    *,
    loss: Loss = losses.cross_entropy,
    input_dtype: Any = jnp.float32,
) -> Task:
    """The mean over a batch of ``loss(module(x), y)``.

    The module is called ``module.apply(variables, x, train=...)``; collections other than params
    (batch statistics) become ``extras``. Labels may have more axes than the batch (a token each):
    an example's loss is the mean over them.
    """

    def init(key: Key) -> tuple[PyTree, PyTree]:
        x = jnp.zeros((1, *input_shape), input_dtype)
        variables = dict(module.init({"params": key, "dropout": key}, x, train=False))
        return variables.pop("params"), variables

    def train(
        params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        variables = {"params": params, **extras}
        logits, extras = cast(
            tuple[jax.Array, PyTree],
            module.apply(
                variables, batch.x, train=True, mutable=list(extras), rngs={"dropout": key}
            ),
        )
        found = _aux(loss, logits, batch)
        return _mean(found.loss, batch), (dict(extras), found)

    def evaluate(params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars) -> Aux:
        logits = module.apply({"params": params, **extras}, batch.x, train=False)
        return _aux(loss, cast(jax.Array, logits), batch)

    return Task(init, train, evaluate)


def of_function(
    predict: Callable[[PyTree, jax.Array], jax.Array],
    *,
    init: Callable[[Key], PyTree] | None = None,
    loss: Loss = losses.cross_entropy,
) -> Task:
    """The task of any ``predict(params, x) -> logits``, the same in training and evaluation.

    ``x`` is a batch [b, ...] and so are the logits. ``init(key) -> params`` is needed to train;
    to score parameters trained elsewhere, ``step.given(params)`` is their state.
    """

    def start(key: Key) -> tuple[PyTree, PyTree]:
        if init is None:
            raise ValueError("task.of_function needs init=(key -> params) to make parameters")
        return init(key), {}

    def evaluate(params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars) -> Aux:
        return _aux(loss, predict(params, batch.x), batch)

    def train(
        params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        found = evaluate(params, extras, batch, hyperparameters)
        return _mean(found.loss, batch), (extras, found)

    return Task(start, train, evaluate)


def _aux(loss: Loss, logits: jax.Array, batch: Batch) -> Aux:
    each = loss(logits, batch.y)
    each = each.reshape(each.shape[0], -1).mean(axis=1)
    return Aux(loss=each, logits=logits, y=batch.y, index=batch.index)


def _mean(each: jax.Array, batch: Batch) -> jax.Array:
    return each.mean() if batch.weight is None else (batch.weight * each).mean()


def of_dataset(module: nn.Module, data: Dataset, *, loss: Loss = losses.cross_entropy) -> Task:
    """The classification task whose inputs have the shape and kind of a dataset's."""
    tokens = data.std.size == 0
    dtype = jnp.int32 if tokens else jnp.float32
    return classification(module, data.x.shape[1:], loss=loss, input_dtype=dtype)
