"""VoG over the checkpoints of a run, without storing them."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics.scores.examples import over_examples
from dynamics.scores.vog import Target, input_gradient, vog, welford
from dynamics.types import Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True)
class VarianceOfGradients:
    """``<name>.score@<step>`` f32[K, N]: the VoG of each example over the checkpoints so far.

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

    task: Task
    data: Dataset
    every: int | Collection[int]
    name: str = "vog"
    target: Target = "logit"
    labels: Int[np.ndarray, "k n"] | None = None
    batch_size: int = 256

    def start(self, state: TrainState, each: Each) -> PyTree:
        """No checkpoint yet: count i32[K], mean and m2 f32[K, N, ...]."""
        return each(functools.partial(_nothing, tuple(self.data.x.shape)))(state.step)

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """One checkpoint taken in; the scores f32[K, N]."""
        gradients = over_examples(
            *(_gradient(self.target), self.task, state, self.data),
            labels=self.labels,
            batch_size=self.batch_size,
            each=each,
        )
        carry, scores = each(_fold)((carry, gradients))
        return carry, {"score": scores}


@functools.cache
def _gradient(target: Target) -> Callable[..., jax.Array]:
    """The same function object for the same target, so that it is compiled once."""
    return functools.partial(input_gradient, target=target)


def _nothing(shape: tuple[int, ...], step: jax.Array) -> PyTree:
    zeros = jnp.zeros(shape, jnp.float32)
    return {"count": jnp.zeros_like(step), "mean": zeros, "m2": zeros}


def _fold(own: PyTree) -> tuple[PyTree, jax.Array]:
    carry, gradients = own
    count = carry["count"] + 1
    mean, m2 = welford(count, carry["mean"], carry["m2"], gradients)
    return {"count": count, "mean": mean, "m2": m2}, vog(m2, count)
