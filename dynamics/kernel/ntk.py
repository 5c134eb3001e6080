"""The empirical neural tangent kernel of a batch."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics import ghost
from dynamics.types import Batch, PyTree, Scalars, Task, TrainState


def ntk(task: Task, state: TrainState, batch: Batch) -> Float[Array, "b k b k"]:
    """``<grad_w f_k(x_i), grad_w f_l(x_j)>`` over all parameters that are trained, at [i, k, j, l].

    Of a task that trains others than the module's own it is the kernel that its training follows;
    ``ntk(*task.read(state), batch)`` is the module's. ``f`` are the logits in evaluation mode,
    [b, k]. The B K gradients stay factored: a dense layer costs the products of its inputs and of
    its derivatives, not gradients. Cost: B K forward and backward passes of one example, and the
    kernel's (B K)^2 numbers. ValueError: logits of more than one label an example.

    Reference: Jacot et al. 2018, arXiv 1806.07572, section 4, for finite width.
    """
    ghost.check_independent(
        lambda s, b: task.evaluate(s.params, s.extras, b, s.hyperparameters).loss, state, batch
    )
    outputs = jax.eval_shape(
        lambda s, b: task.evaluate(s.params, s.extras, b, s.hyperparameters).logits, state, batch
    )
    if len(outputs.shape) != 2:
        raise ValueError(f"the kernel is of logits [b, classes], got {list(outputs.shape)}")
    b, k = outputs.shape

    def logit(params: PyTree, rest: tuple[PyTree, Scalars], one: tuple) -> jax.Array:
        example, which = one
        alone = jax.tree.map(lambda x: x[None], example)
        logits = task.evaluate(params, rest[0], alone, rest[1]).logits[0]
        return jnp.sum(jnp.where(jnp.arange(k) == which, logits, 0))

    each = jax.tree.map(lambda x: jnp.repeat(x, k, axis=0), batch)
    which = jnp.tile(jnp.arange(k), b)
    rest = (state.extras, state.hyperparameters)
    found = ghost.factors(logit, state.params, rest, (each, which))
    return ghost.products(found, found).reshape(b, k, b, k)
