"""Example scores of a run at chosen steps."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from dynamics.scores.examples import PerExample, over_examples
from dynamics.types import Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True)
class Score:
    """``<name>.score@<step>`` f32[K, N] of every example of ``data``, in dataset order.

    A score that returns several by name gives ``<name>.<its name>@<step>`` for each.
    Replicas may have their own ``labels``. Cost: that of the score, for each replica.
    """

    score: PerExample
    task: Task
    data: Dataset
    every: int | Collection[int]
    name: str
    labels: Int[np.ndarray, "k n"] | None = None
    batch_size: int = 256

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The scores f32[K, N]."""
        scores = over_examples(
            *(self.score, self.task, state, self.data),
            labels=self.labels,
            batch_size=self.batch_size,
            each=each,
        )
        return carry, scores if isinstance(scores, dict) else {"score": scores}
