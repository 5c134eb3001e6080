"""GraNd: the length of an example's own gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics.types import Batch, PyTree, Task, TrainState


def grand(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """``||grad_w loss(x_i, y_i)||_2`` over all parameters, in evaluation mode; high is hard.

    Neither weight decay nor the mean over a batch is in it: an example's score depends on no other
    example. Cost: one gradient evaluation an example, and the memory of B gradients.

    Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, definition 1.
    """

    def loss(params: PyTree, example: Batch) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], example)
        return task.evaluate(params, state.extras, alone, state.hyperparameters).loss[0]

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0))(state.params, batch)
    rows = [g.reshape(g.shape[0], -1) for g in jax.tree.leaves(gradients)]
    largest = jnp.stack([jnp.abs(row).max(axis=1) for row in rows]).max(axis=0)
    unit = jnp.where(largest > 0, largest, 1)  # squares of small gradients would underflow
    squares = [jnp.sum((row / unit[:, None]) ** 2, axis=1) for row in rows]
    return unit * jnp.sqrt(jnp.stack(squares).sum(axis=0))
