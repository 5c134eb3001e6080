"""VoG over the checkpoints of a run, without storing them."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics.scores.examples import over_examples
from dynamics.scores.vog import Target, input_gradient, vog, welford
from dynamics.types import Batch, Context, PyTree, Task, TrainState


@dataclass(frozen=True, eq=False)
class VarianceOfGradients:
    """The array ``score`` f32[K, N]: the VoG of each example over the checkpoints so far.

    A checkpoint is a step of ``every``; an interval has one at step 0, the untrained network, and
    one at the last step: list the steps to leave them out. The score is the mean over input
    elements of the variance (1/count) of d z_y / d x, 0 at the first checkpoint; it is not
    normalised: ``scores.class_normalised(score, labels)``. Replicas may have their own ``labels``.

    Cost: one forward and one backward pass of the data for each replica and checkpoint. Memory: the
    mean and the squared deviations of the gradients of all inputs, 2 x 4 bytes x elements of x x
    replicas, which checkpoints hold, too; three more such arrays while it measures.

    ValueError, when measured: tokens, or several labels an example. Reference: Agarwal, D'souza and
    Hooker 2022, arXiv 2008.11600; see ``scores.vog``.
    """

    every: int | Collection[int]
    name: str = "vog"
    on: str = "train"
    target: Target = "logit"
    labels: Int[np.ndarray, "k n"] | None = None
    batch_size: int = 256
    dims: tuple[str, ...] = ("example",)

    def start(self, context: Context, state: TrainState) -> PyTree:
        """No checkpoint yet: count i32[K], mean and m2 f32[K, N, ...]."""
        nothing = _Nothing(tuple(context.examples(self.on).x.shape))
        return context.each(nothing.made)(state.key)

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """One checkpoint taken in; the scores f32[K, N]."""
        gradients = over_examples(
            InputGradient(self.target),
            context.task,
            state,
            context.examples(self.on),
            labels=self.labels,
            batch_size=self.batch_size,
            each=context.each,
        )
        carry, scores = context.each(_fold)((carry, gradients))
        return carry, {"score": scores}


@dataclass(frozen=True)
class InputGradient:
    """``scores.vog.input_gradient`` with its target: equal ones are compiled once."""

    target: Target

    def __call__(self, task: Task, state: TrainState, batch: Batch) -> jax.Array:
        """The gradient f32[b, ...] of the target with respect to each input."""
        return input_gradient(task, state, batch, target=self.target)


@dataclass(frozen=True)
class _Nothing:
    shape: tuple[int, ...]

    def made(self, key: jax.Array) -> PyTree:
        """The carry of one member before the first checkpoint."""
        zeros = jnp.zeros(self.shape, jnp.float32)
        return {"count": jnp.int32(0), "mean": zeros, "m2": zeros}


def _fold(own: PyTree) -> tuple[PyTree, jax.Array]:
    carry, gradients = own
    count = carry["count"] + 1
    mean, m2 = welford(count, carry["mean"], carry["m2"], gradients)
    return {"count": count, "mean": mean, "m2": m2}, vog(m2, count)
