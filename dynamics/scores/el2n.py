"""EL2N: the length of the error vector."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.losses import log_odds_against, without_label
from dynamics.types import Batch, Task, TrainState


def el2n(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``||softmax(f(x)) - onehot(y)||_2``, in [0, sqrt 2]; high is hard.

    Computed as (1 - p_y) sqrt(1 + sum_{k != y} q_k^2), q the other classes' probabilities given
    that the label is wrong: easy examples keep their digits. Cost: one forward pass.

    Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, definition 2.
    """
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    wrong = jax.nn.sigmoid(log_odds_against(aux.logits, batch.y))
    others = jax.nn.softmax(without_label(aux.logits, batch.y))
    return wrong * jnp.sqrt(1 + jnp.sum(others**2, axis=-1))
