"""EL2N: the length of the error vector."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.losses import at_label
from dynamics.types import Batch, Task, TrainState


def el2n(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``||softmax(f(x)) - onehot(y)||_2``, in [0, sqrt 2]; high is hard.

    The true class's part, 1 - p_y, is summed from the other classes' probabilities, which keeps
    its digits for easy examples. Cost: one forward pass.

    Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, definition 2.
    """
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    wrong = jnp.where(at_label(aux.logits, batch.y), 0, jax.nn.softmax(aux.logits))
    return jnp.sqrt(wrong.sum(axis=-1) ** 2 + (wrong**2).sum(axis=-1))
