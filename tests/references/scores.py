"""Scores as their definitions read: one example at a time, summed in float64."""

import jax
import numpy as np


def gradients(task, state, batch):
    """The gradient of every example's own loss, each a flat float64 vector."""

    def loss(params, alone):
        return task.evaluate(params, state.extras, alone, state.hyperparameters).loss[0]

    gradient, out = jax.jit(jax.grad(loss)), []
    for i in range(len(batch.index)):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], batch)
        leaves = jax.tree.leaves(gradient(state.params, alone))
        out.append(np.concatenate([np.asarray(g, np.float64).ravel() for g in leaves]))
    return np.stack(out)


def grand(task, state, batch):
    """The length of each of them."""
    return np.sqrt((gradients(task, state, batch) ** 2).sum(axis=1))
