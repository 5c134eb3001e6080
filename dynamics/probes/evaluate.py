"""Loss and accuracy on a dataset."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics.scores.examples import over_examples
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState


def loss_and_accuracy(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Of every example, in evaluation mode; accuracy is the mean over labels if it has several."""
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    correct = (aux.logits.argmax(axis=-1) == batch.y).astype(jnp.float32)
    return {"loss": aux.loss, "accuracy": correct.reshape(len(aux.loss), -1).mean(axis=1)}


@dataclass(frozen=True)
class Evaluate:
    """``<name>.loss`` (nats) and ``<name>.accuracy`` (0..1): means over ``data``.

    Cost: one forward pass of the data for each replica.
    """

    task: Task
    data: Dataset
    every: int | Collection[int]
    name: str = "test"
    batch_size: int = 512

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Loss and accuracy f32[K]."""
        found = over_examples(
            loss_and_accuracy, self.task, state, self.data, batch_size=self.batch_size, each=each
        )
        return carry, {name: value.mean(axis=1) for name, value in found.items()}
