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
    squares = [jnp.sum(g**2, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(jnp.stack(squares).sum(axis=0))
