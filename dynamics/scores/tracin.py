"""TracIn: what a step on one example does to the loss of another, summed over checkpoints."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dynamics import ghost
from dynamics.scores.examples import over_examples
from dynamics.scores.grand import gradients
from dynamics.types import Batch, Dataset, Task, TrainState


def tracin_self(
    grand: Float[np.ndarray, "c *n"], learning_rates: Sequence[float]
) -> Float[np.ndarray, "*n"]:
    """``sum_i eta_i ||g_i||^2``: an example's influence on itself, from its GraNd at c checkpoints.

    ``learning_rates`` are those at the checkpoints. Cost: none beyond GraNd. ValueError: as many
    of one as of the other are needed.

    Reference: Pruthi et al. 2020, arXiv 2002.08484, section 3 (TracInCP).
    """
    if len(grand) != len(learning_rates):
        raise ValueError(
            f"give a learning rate for each checkpoint: {len(learning_rates)} for {len(grand)}"
        )
    return np.tensordot(
        np.asarray(learning_rates, np.float64), np.square(grand, dtype=np.float64), 1
    )


def tracin(
    task: Task,
    states: Sequence[TrainState],
    learning_rates: Sequence[float],
    data: Dataset,
    others: Batch,
    *,
    only: str = "",
    batch_size: int = 256,
) -> Float[Array, "n m"]:
    """``sum_i eta_i <grad loss(z), grad loss(z')>`` of every example z with every z' of ``others``.

    Positive: a step on z lowered the loss of z'. ``only`` restricts the parameters by their path;
    the gradients stay factored. ``others`` are normalised inputs (``data.stream.take``), and few:
    they are differentiated again for each batch of ``data``. Cost: (N + M N / batch_size) gradient
    evaluations a checkpoint. ValueError: not one learning rate a state.

    Reference: Pruthi et al. 2020, arXiv 2002.08484, section 3 (TracInCP).
    """
    if len(states) != len(learning_rates) or not len(states):
        raise ValueError(
            f"give a learning rate for each state: {len(learning_rates)} for {len(states)}"
        )

    def with_others(task: Task, state: TrainState, batch: Batch) -> jax.Array:
        mine, theirs = (gradients(task, state, b, only=only) for b in (batch, others))
        return ghost.products(mine, theirs)

    total = jnp.float32(0)
    for state, rate in zip(states, learning_rates, strict=True):
        found = over_examples(with_others, task, state, data, batch_size=batch_size)
        total = total + jnp.float32(rate) * found
    return total
