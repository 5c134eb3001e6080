"""Early-learning regularization: the network is held to what it said of an example before."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dynamics import losses
from dynamics.task.methods import of_methods
from dynamics.types import NO_SCALARS, Aux, Batch, Key, Leaf, PyTree, Scalars, Task, Written

BLOCK = 256  # the number of rows is a multiple of it, so that a table divides over devices


def elr(inner: Task, num_examples: int, num_classes: int) -> Task:
    """``inner``'s loss + elr_lambda mean_i log(1 - <p_i, t_i>), with a running target t_i for
    each example: t_i = elr_beta t_i + (1 - elr_beta) p_i at every visit, before it is used.

    The targets are ``extras["targets"]`` f32[rows, C], zero at first, in the order of the dataset
    (``num_examples`` rounded up to a multiple of 256; the rest stay zero); a step touches the rows
    of its batch alone. lambda and beta are the state's hyperparameters ``elr_lambda`` and
    ``elr_beta``; lambda = 0 is ``inner``. ``aux.loss`` is inner's, without the regulariser, whose
    mean is recorded as ``elr``. An example that is twice in a batch is held to one of its two
    targets. Cost: no forward pass; 4 rows C bytes a replica. ValueError, when traced: logits of
    another shape, or a state without the hyperparameters; by ``fit``, before: another number of
    examples than the stream's dataset has.

    lambda <= 2 only delays memorising; above it an example stays with the class that it has a
    probability > lambda / (2 (lambda - 1)) of. The total loss is negative.

    Reference: Liu et al. 2020, arXiv 2007.00151, eq. 6 and algorithm 1.
    """
    check(inner, num_examples, num_classes)
    return of_methods(_Elr(inner, num_examples, num_classes))


@dataclass(frozen=True)
class _Elr:
    inner: Task
    num_examples: int
    num_classes: int

    def init(self, key: Key, hyperparameters: Scalars = NO_SCALARS) -> tuple[PyTree, PyTree]:
        params, extras = self.inner.init(key, hyperparameters)
        shape = table_shape(self.num_examples, self.num_classes)
        return params, {**extras, "targets": jnp.zeros(shape, jnp.float32)}

    def loss(
        self, params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        held, beta = scalars(hyperparameters, "elr_lambda", "elr_beta")
        rest, table = _without(extras)
        total, (rest, aux) = self.inner.loss(params, rest, batch, key, hyperparameters)
        if aux.logits.shape != (wanted := (len(batch.index), self.num_classes)):
            raise ValueError(
                f"elr needs logits of shape {wanted}, one row an example, got {aux.logits.shape}"
            )
        targets = losses.elr_targets(aux.logits, table[batch.index], beta)
        each = losses.elr(aux.logits, targets)
        mean = each.mean() if batch.weight is None else (batch.weight * each).mean()
        aux = dataclasses.replace(aux, scalars={**aux.scalars, "elr": mean})
        return total + held * mean, ({**rest, "targets": Written(batch.index, targets)}, aux)

    def evaluate(
        self, params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars
    ) -> Aux:
        return self.inner.evaluate(params, _without(extras)[0], batch, hyperparameters)

    def network(self, params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
        return self.inner.network(params, _without(extras)[0])

    def layout(self, extras: PyTree) -> PyTree:
        rest = _without(extras)[0]
        within = self.inner.layout(rest)
        within = dict.fromkeys(rest, within) if isinstance(within, str) else within
        return {**within, "targets": "examples"}

    @property
    def bare(self) -> Task:
        return self.inner.bare or self.inner


def check(inner: Task, num_examples: int, num_classes: int) -> None:
    """ValueError: sizes that no targets have, or other examples than ``inner`` is for."""
    if num_examples < 1 or num_classes < 2:
        raise ValueError(
            "running targets need num_examples >= 1 and num_classes >= 2, got "
            f"{num_examples} and {num_classes}"
        )
    if inner.num_examples not in (None, num_examples):
        raise ValueError(
            f"the task inside has tables for {inner.num_examples} examples, got {num_examples}"
        )


def table_shape(num_examples: int, num_classes: int) -> tuple[int, int]:
    """Of the targets of so many examples."""
    return -(-num_examples // BLOCK) * BLOCK, num_classes


def scalars(hyperparameters: Scalars, *names: str) -> tuple[Any, ...]:
    """The named hyperparameters; ValueError names one that the state lacks."""
    for name in names:
        if name not in hyperparameters:
            raise ValueError(
                f"the task reads the hyperparameter {name!r}, the state has "
                f"{sorted(hyperparameters)}: give it to fit.init"
            )
    return tuple(hyperparameters[name] for name in names)


def _without(extras: PyTree) -> tuple[PyTree, Leaf]:
    """Inner's extras, and the targets."""
    return {name: tree for name, tree in extras.items() if name != "targets"}, extras["targets"]
