"""Loss and accuracy on a dataset."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import numpy as np

from dynamics import losses
from dynamics.scores.examples import PerExample, over_examples
from dynamics.types import Batch, Context, Dataset, PyTree, Task, TrainState


def loss_and_accuracy(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Of every example, in evaluation mode; accuracy is the mean over the labels it has.

    Of soft labels, the likeliest class counts. NaN: logits that are none, or no label (loss 0).
    """
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    right = losses.correct(aux.logits, batch.y)
    accuracy = losses.over_labels(right, batch.y, none=float("nan"))
    return {"loss": aux.loss, "accuracy": accuracy}


def loss_alone(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Of every example, in evaluation mode: for labels that are numbers and no classes."""
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    return {"loss": aux.loss}


def measured(data: Dataset) -> PerExample:
    """``loss_and_accuracy`` if the labels of ``data`` are classes or their probabilities (floats
    [n, ..., C > 1] that are >= 0 and sum to 1), else ``loss_alone``.
    """
    y = np.asarray(data.y)
    if y.dtype.kind in "biu":
        return loss_and_accuracy
    soft = y.ndim > 1 and y.shape[-1] > 1 and (y >= 0).all()
    return loss_and_accuracy if soft and (abs(y.sum(axis=-1) - 1) < 1e-3).all() else loss_alone


@dataclass(frozen=True)
class Evaluate:
    """``loss`` (the task's, in nats) and ``accuracy`` (0..1) f32[K]: means over the examples of the
    data set ``on`` that have a label.

    NaN where a network's logits are: there is no accuracy without an answer. Labels that are
    numbers (``losses.squared_error``) have a loss alone; of soft labels the likeliest class counts.
    Cost: one forward pass of the data for each member.
    """

    every: int | Collection[int]
    name: str = "test"
    on: str = "test"
    batch_size: int = 512

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Loss and accuracy f32[K]."""
        data = context.examples(self.on)
        found = over_examples(
            measured(data),
            context.task,
            state,
            data,
            batch_size=self.batch_size,
            each=context.each,
        )
        known = np.asarray(losses.labelled(np.asarray(data.y)))
        if not known.all():
            found = {name: value[:, np.flatnonzero(known)] for name, value in found.items()}
        return carry, {name: value.mean(axis=1) for name, value in found.items()}
