"""The curvature of a loss as symmetric maps v -> A v, over a fixed list of batches.

A loss is ``loss(params, batch, *rest) -> f[]``, the mean over the batch; ``batches`` has leaves
[m, b, ...] (``cut``): m microbatches of equal size, whose products are averaged. Batch norm in
training mode makes another loss of every way to cut, so ``of_task`` is of evaluation mode.

All is computed in float32, in float64 if the parameters are: half-precision parameters and inputs
are widened first, and a loss that narrows them again is refused. Matrix products are at the highest
precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dynamics.curvature.batches import Join, over_batches
from dynamics.curvature.operator import Operator
from dynamics.types import Batch, PyTree, Scalars, Task, TrainState

Loss = Callable[..., jax.Array]
Likelihood = Literal["categorical", "gaussian"]


def hessian(
    loss: Loss,
    params: PyTree,
    batches: PyTree,
    *rest: PyTree,
    mask: PyTree | None = None,
    unroll: bool = False,
    mesh: Mesh | None = None,
    sharded: bool = False,
) -> Operator:
    """``v -> grad^2 L v``, L the mean of ``loss(params, batch, *rest)`` over the batches.

    ``mask`` restricts it to a block: a prefix of the parameters' tree with a bool for each leaf
    (``select``), or an array of bools like a leaf. A leaf left out is no part of the vectors, which
    have None there. ``unroll`` writes the microbatches out: on a CPU, convolutions inside a
    compiled loop are some 40 times slower. With ``mesh`` the examples of each microbatch are split
    over its data axis and every device adds up its own, so that a product is one reduction,
    whatever m; without, what is sharded stays as it is, at a reduction for each microbatch.
    ``sharded`` is for parameters that are: see ``Operator``.

    Forward over reverse mode. Cost of a product: 2 to 3 gradients of L (measured 1.4 to 3.2), with
    one microbatch in flight. ValueError: no scalar, unequal batches, parameters that are not
    floats, a loss that computes in half precision, or is no mean over the examples of a batch.
    """
    term, more = _Hessian(loss), (mask, unroll, mesh, sharded)
    return _over(term, loss, params, batches, rest, *more)


def gauss_newton(
    predict: Callable[..., PyTree],
    loss_of_outputs: Callable[..., jax.Array],
    params: PyTree,
    batches: PyTree,
    *rest: PyTree,
    mask: PyTree | None = None,
    unroll: bool = False,
    mesh: Mesh | None = None,
    sharded: bool = False,
) -> Operator:
    """``v -> J' H_L J v``: J of ``predict(params, batch, *rest)``, H_L of the loss in its outputs.

    ``loss_of_outputs(outputs, batch)`` is the mean over the batch; options as for ``hessian``. It
    is the Hessian less the sum of dL/dz times the curvature of the outputs z: equal to it where the
    model is linear in its parameters or fits exactly, and positive semi-definite where the loss is
    convex in the outputs. Cost: 1.2 to 1.7 gradients.

    Reference: Schraudolph 2002, Fast curvature matrix-vector products, section 3.
    """
    whole = _Composed(predict, loss_of_outputs)
    term = _GaussNewton(predict, loss_of_outputs)
    return _over(term, whole, params, batches, rest, mask, unroll, mesh, sharded)


def fisher(
    predict: Callable[..., jax.Array],
    params: PyTree,
    batches: PyTree,
    *rest: PyTree,
    likelihood: Likelihood = "categorical",
    mask: PyTree | None = None,
    unroll: bool = False,
    mesh: Mesh | None = None,
    sharded: bool = False,
) -> Operator:
    """``v -> E_x E_{y ~ p(y|x)} [grad log p grad log p'] v``, the Fisher of the model's own p.

    p is the softmax of the outputs f[b, ..., classes] (``categorical``), or a Gaussian of variance
    1 around f[b, ..., d] (``gaussian``); of several labels of an example, the mean is taken. The
    expectation over y is exact and no label is read: with sampled or true ones it would be another
    matrix, the empirical Fisher. It is the Gauss-Newton matrix of the mean cross-entropy, or of the
    mean of ``1/2 ||f - y||^2``. Options, cost: ``gauss_newton``.

    Reference: Martens 2014, arXiv 1412.1193, section 9.2.
    """
    if likelihood not in ("categorical", "gaussian"):
        raise ValueError(f"likelihood must be 'categorical' or 'gaussian', got {likelihood!r}")
    partition = _Partition(likelihood)
    whole = _Composed(predict, partition)
    term = _GaussNewton(predict, partition)
    return _over(term, whole, params, batches, rest, mask, unroll, mesh, sharded)


def of_task(
    task: Task,
    state: TrainState,
    batches: Batch,
    *,
    mask: PyTree | None = None,
    unroll: bool = False,
    mesh: Mesh | None = None,
    sharded: bool = False,
) -> Operator:
    """The Hessian of a task's mean loss in evaluation mode at the state of one replica.

    By the parameters that the task trains. By the module's own, where these are others (coordinates
    in a subspace, two networks), and for a ``mask`` by their names: ``of_task(*task.read(state),
    batches)``. Batches: ``cut_dataset``. Options, cost: ``hessian``.
    """
    rest, more = (state.extras, state.hyperparameters), (mask, unroll, mesh, sharded)
    loss = mean_loss(task)
    return _over(_Hessian(loss), loss, state.params, batches, rest, *more)


def mean_loss(task: Task) -> Loss:
    """The mean loss of a task in evaluation mode: ``loss(params, batch, extras, hyperparameters)``.

    ``batch.weight`` counts; what a task adds to its loss while it trains (decay, regularisers) does
    not. The same task gives equal losses.
    """
    return _TaskLoss(task)


def _over(
    term: Callable[..., PyTree],
    whole: Loss,
    params: PyTree,
    batches: PyTree,
    rest: tuple,
    mask: PyTree | None,
    unroll: bool,
    mesh: Mesh | None,
    sharded: bool,
) -> Operator:
    options = {
        "mask": mask,
        "unroll": unroll,
        "mesh": mesh,
        "is_mean": isinstance(whole, _TaskLoss),
    }
    found = over_batches(term, whole, params, batches, rest, **options)
    return found.replace(sharded=sharded)  # pyright: ignore[reportAttributeAccessIssue]


# ---- of one microbatch; equal where what they are made of is equal ------------------------------


@dataclass(frozen=True)
class _Hessian:
    loss: Loss

    def __call__(self, join: Join, free: PyTree, v: PyTree, batch: PyTree, rest: tuple) -> PyTree:
        gradient = jax.grad(lambda free: self.loss(join(free), batch, *rest))
        return jax.jvp(gradient, (free,), (v,))[1]


@dataclass(frozen=True)
class _GaussNewton:
    predict: Callable[..., PyTree]
    loss_of_outputs: Callable[..., jax.Array]

    def __call__(self, join: Join, free: PyTree, v: PyTree, batch: PyTree, rest: tuple) -> PyTree:
        def outputs_at(free: PyTree) -> PyTree:
            return self.predict(join(free), batch, *rest)

        outputs, change = jax.jvp(outputs_at, (free,), (v,))
        gradient = jax.grad(lambda outputs: self.loss_of_outputs(outputs, batch))
        pulled = jax.jvp(gradient, (outputs,), (change,))[1]
        return jax.vjp(outputs_at, free)[1](pulled)[0]


@dataclass(frozen=True)
class _Composed:
    """The loss of the parameters."""

    predict: Callable[..., PyTree]
    loss_of_outputs: Callable[..., jax.Array]

    def __call__(self, params: PyTree, batch: PyTree, *rest: PyTree) -> jax.Array:
        return self.loss_of_outputs(self.predict(params, batch, *rest), batch)


@dataclass(frozen=True)
class _Partition:
    """The mean of log sum exp z, or ||z||^2 / 2: their Hessians are the covariances of y."""

    likelihood: Likelihood

    def __call__(self, outputs: jax.Array, batch: PyTree) -> jax.Array:
        if outputs.ndim < 2:
            raise ValueError(f"outputs must be [b, ..., classes], got shape {outputs.shape}")
        if self.likelihood == "categorical":
            each = jax.nn.logsumexp(outputs, axis=-1)
        else:
            each = jnp.sum(outputs**2, axis=-1) / 2
        weight = getattr(batch, "weight", None)
        if weight is None:
            return each.mean()
        return (weight * each.mean(axis=tuple(range(1, each.ndim)))).mean()


@dataclass(frozen=True)
class _TaskLoss:
    task: Task

    def __call__(
        self, params: PyTree, batch: Batch, extras: PyTree, hyperparameters: Scalars
    ) -> jax.Array:
        each = self.task.evaluate(params, extras, batch, hyperparameters).loss
        return each.mean() if batch.weight is None else (batch.weight * each).mean()
