"""VoG as its definition reads: gradients kept, one example and one checkpoint at a time."""

import jax
import jax.numpy as jnp
import numpy as np


def gradients(task, state, batch, target="logit"):
    """d z_y / d x, or d p_y / d x, of each example alone, in float64."""

    def number(x, alone):
        alone = alone.replace(x=x)
        z = task.evaluate(state.params, state.extras, alone, state.hyperparameters).logits[0]
        return (jax.nn.softmax(z) if target == "probability" else z)[alone.y[0]]

    gradient, out = jax.jit(jax.grad(number)), []
    for i in range(len(batch.index)):
        alone = jax.tree.map(lambda x, i=i: jnp.asarray(x[i : i + 1]), batch)
        out.append(np.asarray(gradient(alone.x, alone), np.float64)[0])
    return np.stack(out)


def vog(checkpoints, reduce="variance"):
    """From the gradients [n, ...] of every checkpoint."""
    stacked = np.stack(checkpoints).astype(np.float64)
    spread = np.var(stacked, axis=0) if reduce == "variance" else np.std(stacked, axis=0)
    return np.array([each.mean() for each in spread])


def class_normalised(v, labels):
    out = []
    for i in range(len(v)):
        mates = np.array([v[j] for j in range(len(v)) if labels[j] == labels[i]], np.float64)
        out.append(0.0 if mates.std() == 0 else (v[i] - mates.mean()) / mates.std())
    return np.array(out)
