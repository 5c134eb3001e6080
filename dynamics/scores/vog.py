"""VoG: how much the gradient of an example's input moves while a network learns.

::

    G_c   = d z_y / d x at checkpoint c = 1..C          input_gradient
    V     = 1/C sum_c (G_c - mean G)^2, elementwise     welford, from checkpoint to checkpoint
    VoG   = mean of V over the elements of x            vog
    score = (VoG - mean) / std of the class             class_normalised

``probes.VarianceOfGradients`` does the first three during a run.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from dynamics.losses import at_label, counted
from dynamics.scores.forward import at_probability
from dynamics.types import Batch, Task, TrainState

Target = Literal["logit", "probability"]
Reduce = Literal["variance", "std"]


def input_gradient(
    task: Task, state: TrainState, batch: Batch, *, target: Target = "logit"
) -> Float[Array, "b ..."]:
    """``d z_y / d x`` of every example at its normalised input, in evaluation mode.

    z_y is the label's pre-softmax logit, or its ``probability`` (whose gradient vanishes where the
    network is sure). All examples at once, as the gradient of the sum of their z_y: in evaluation
    mode no example depends on another, so d (sum_j z_j) / d x_i = d z_i / d x_i.

    NaN for an example without a label. Cost: one forward and one backward pass. ValueError: integer
    inputs (tokens), or several labels an example. Reference: Agarwal, D'souza and Hooker 2022,
    arXiv 2008.11600; the code of their toy example takes the probability.
    """
    if not jnp.issubdtype(batch.x.dtype, jnp.floating):
        raise ValueError(
            f"input_gradient needs inputs that are numbers, got {batch.x.dtype}: tokens have no "
            "gradient"
        )
    if batch.y.ndim != 1:
        raise ValueError(f"input_gradient needs one label an example, got labels {batch.y.shape}")
    if target not in ("logit", "probability"):
        raise ValueError(f"target must be 'logit' or 'probability', got {target!r}")

    def total(x: jax.Array) -> jax.Array:
        moved = dataclasses.replace(batch, x=x)
        z = task.evaluate(state.params, state.extras, moved, state.hyperparameters).logits
        if target == "probability":
            return at_probability(z, batch.y).sum()
        return jnp.where(at_label(z, batch.y), z, 0).sum()

    found = jax.grad(total)(batch.x)
    known = counted(batch.y).reshape(-1, *[1] * (found.ndim - 1))
    return jnp.where(known, found, jnp.nan)


def welford(
    count: Int[Array, "*#s"],
    mean: Float[Array, "*s"],
    m2: Float[Array, "*s"],
    x: Float[Array, "*s"],
) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Mean and sum of squared deviations after ``x``, the ``count``-th of its kind.

    ``m2`` grows by (x - mean)^2 (count - 1) / count with the mean before ``x``: never negative,
    whatever rounds how, and exactly 0 after the first ``x``. Reference: Welford 1962, Technometrics
    4, 419.
    """
    times, step = count.astype(mean.dtype), x - mean
    return mean + step / times, m2 + step**2 * ((times - 1) / times)


def vog(
    m2: Float[Array, "n ..."], count: Int[Array, ""], *, reduce: Reduce = "variance"
) -> Float[Array, "n"]:
    """The mean over input elements of the variance (1/count) of the gradients, or of its root.

    ``m2`` is the sum over ``count`` checkpoints of squared deviations from their mean. Units:
    those of the gradient, squared for ``variance``. Not normalised by class.

    Reference: Agarwal, D'souza and Hooker 2022, arXiv 2008.11600. Their formula divides the sum by
    sqrt(count) instead of count, which multiplies every example by the same number and so ranks
    and normalises as the variance does; their code takes ``std``, which ranks otherwise.
    """
    if reduce not in ("variance", "std"):
        raise ValueError(f"reduce must be 'variance' or 'std', got {reduce!r}")
    variance = m2 / count.astype(m2.dtype)
    each = jnp.sqrt(variance) if reduce == "std" else variance
    return each.reshape(each.shape[0], -1).mean(axis=1)


def class_normalised(
    v: Float[np.ndarray, "*k n"], labels: Integer[np.ndarray, "*#k n"]
) -> Float[np.ndarray, "*k n"]:
    """``(v - mean) / std`` over the examples of the same label (population std).

    0 where the values of a class are equal up to rounding, as for a linear model, whose VoG depends
    on the class alone. Each row of v [k n] is normalised by itself.
    """
    out, rows = np.empty_like(v), np.broadcast_to(labels, v.shape)
    for at in np.ndindex(v.shape[:-1]):
        for label in np.unique(rows[at]):
            of = rows[at] == label
            out[at][of] = dataset_normalised(v[at][of])
    return out


def dataset_normalised(v: Float[np.ndarray, "*k n"]) -> Float[np.ndarray, "*k n"]:
    """``(v - mean) / std`` over the last axis (population std), 0 if that is 0 up to rounding."""
    wide = v.astype(np.float64)
    std = wide.std(axis=-1, keepdims=True)
    alike = std <= np.finfo(v.dtype).eps * np.abs(wide).max(axis=-1, keepdims=True)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    return np.where(alike, 0, centred / np.where(alike, 1, std)).astype(v.dtype)
