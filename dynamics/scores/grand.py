"""GraNd: the length of an example's own gradient, over all parameters or the output layer's."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics import ghost
from dynamics.losses import labelled
from dynamics.scores.examples import losses
from dynamics.types import Batch, PyTree, Scalars, Task, TrainState


def grand(task: Task, state: TrainState, batch: Batch, *, only: str = "") -> Float[Array, "b"]:
    """``||grad_w loss(x_i, y_i)||_2`` in evaluation mode; high is hard.

    Over all parameters that the task trains, or those in whose path ("block_0/conv_1/kernel") the
    regular expression ``only`` is found. Neither weight decay nor the mean over a batch is in it:
    an example's score depends on no other example. Computed from factored gradients
    (``dynamics.ghost``): about two forward passes and the memory of the activations, where
    gradients would take three and B times the parameters. NaN: no label. ValueError: examples of a
    batch depend on each other, or nothing is called ``only``.

    Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, definition 1.
    """
    norms = ghost.norms(gradients(task, state, batch, only=only))
    return jnp.where(labelled(batch.y), norms, jnp.nan)


def grand_last_layer(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b"]:
    """GraNd of the output layer alone, whose parameters are called ``head`` in our models.

    For cross-entropy and one label it is EL2N sqrt(||h||^2 + 1), h the layer's input. Of the
    module's own weights, whatever the task trains (``Task.read``; of two networks, the first).
    Cost: one forward pass. For a net with other names: ``functools.partial(grand, only="path")``.
    """
    return grand(*task.read(state), batch, only=r"(^|/)head(/|$)")


def gradients(task: Task, state: TrainState, batch: Batch, *, only: str = "") -> ghost.Factors:
    """The gradients of the examples' own losses in factored form, for norms and inner products.

    By the parameters that the task trains; ``gradients(*task.read(state), batch)`` is by the
    module's own, where these are others.
    """
    ghost.check_independent(functools.partial(losses, task), state, batch)

    def loss(params: PyTree, rest: tuple[PyTree, Scalars], example: Batch) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], example)
        return task.evaluate(params, rest[0], alone, rest[1]).loss[0]

    rest = (state.extras, state.hyperparameters)
    return ghost.factors(loss, state.params, rest, batch, only=only)
