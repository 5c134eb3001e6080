"""Example scores of a run at chosen steps."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Shaped

from dynamics.scores.examples import PerExample, over_examples
from dynamics.types import Context, PyTree, TrainState


@dataclass(frozen=True, eq=False)
class Score:
    """The array ``score`` f32[K, N] of every example of the data set ``on``, in dataset order.

    A score that returns several by name gives an array for each. Members may have their own
    ``labels`` [K, N]. Cost: that of the score, for each member.
    """

    score: PerExample
    every: int | Collection[int]
    name: str
    on: str = "train"
    labels: Shaped[np.ndarray, "k n ..."] | None = None
    batch_size: int = 256
    dims: tuple[str, ...] = ("example",)

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The scores f32[K, N]."""
        scores = over_examples(
            self.score,
            context.task,
            state,
            context.examples(self.on),
            labels=self.labels,
            batch_size=self.batch_size,
            each=context.each,
        )
        return carry, scores if isinstance(scores, dict) else {"score": scores}
