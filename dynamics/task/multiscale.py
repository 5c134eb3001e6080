"""A segmentation task that predicts at several scales, and may be asked to agree with itself.

Works with any task whose labels and logits have the two image axes of its inputs: x f32[b, H, W] or
[b, H, W, c], y i32[b, H, W], logits f32[b, H, W, C].
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dynamics import losses
from dynamics.task.methods import of_methods
from dynamics.types import NO_SCALARS, Aux, Batch, Key, PyTree, Scalars, Task

SCALES = (0.75, 1.0, 1.5)

Per = Literal["pixel", "image"]


def consistency(
    logits: Float[Array, "s b h w c"], *, rho: float = 0.8, per: Per = "pixel"
) -> Float[Array, "b"]:
    """The mean over pixels of (1/s) sum_k KL(p_k || q) where max_j q_j > rho, and 0 elsewhere.

    p_k = softmax(logits[k]), q = mean_k p_k: where it counts, the Jensen-Shannon divergence of the
    scales, at most log s. The gradient flows into q as well. ``rho`` is compared pixel by pixel, or
    with the largest value in the whole image, which is nearly always on.

    Reference: Liu et al. 2022, arXiv 2110.03740, section 3.3, per pixel; their code takes the
    maximum per image, sums over the scales instead of averaging, and clips q to [1e-3, 1 - 1e-3],
    which log-probabilities don't need.
    """
    log_p = jax.nn.log_softmax(logits, axis=-1)
    log_q = _log_mean(log_p)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q[None]), axis=-1).mean(axis=0)
    sure = jnp.exp(log_q.max(axis=-1)) > rho
    if per == "image":
        sure = jnp.broadcast_to(sure.any(axis=(1, 2), keepdims=True), sure.shape)
    return jnp.where(sure, divergence, 0.0).mean(axis=(1, 2))


def multiscale(
    task: Task,
    *,
    scales: Sequence[float] = SCALES,
    rho: float = 0.8,
    per: Per = "pixel",
    cross_entropy: Literal["native", "scales"] = "native",
) -> Task:
    """``task``'s loss + ``hyperparameters["consistency"]`` times ``consistency`` over ``scales``.

    Each scale sees the image resized bilinearly, and its logits are resized back. ``cross_entropy``
    is the task's own at the native scale, so that weight 0 is that task (but for batch statistics,
    which see all scales, the native one last); or the mean over the scales of the cross-entropy of
    their resized logits, as the paper has it.

    Pixels without a label (``IGNORED``) are in no cross-entropy; consistency knows no labels.
    Evaluation returns log q, q the mean of the scales' probabilities, so that softmax gives q; its
    loss is the cross-entropy of q. ``aux.scalars["consistency"]`` is recorded.

    Cost: sum of scale^2 + 1 (if 1 is not among the scales) forward and backward passes, 3.8 for
    the default scales. ValueError: scales that are none or not positive, rho outside 0..1; when it
    is traced, labels that are no images, no such hyperparameter.

    Reference: Liu et al. 2022, arXiv 2110.03740, section 3.3, with scales 0.7, 1, 1.5.
    """
    if not scales or min(scales) <= 0 or len(set(scales)) < len(scales):
        raise ValueError(f"scales must be one or more different numbers > 0, got {tuple(scales)}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho must be >= 0 and <= 1, got {rho!r}")
    return of_methods(_Multiscale(task, tuple(scales), rho, per, cross_entropy))


@dataclass(frozen=True)
class _Multiscale:
    inner: Task
    scales: tuple[float, ...]
    rho: float
    per: Per
    cross_entropy: Literal["native", "scales"]

    def init(self, key: Key, hyperparameters: Scalars = NO_SCALARS) -> tuple[PyTree, PyTree]:
        return self.inner.init(key, hyperparameters)

    def loss(
        self, params: PyTree, extras: PyTree, batch: Batch, key: Key, hyperparameters: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        _check(batch)
        if "consistency" not in hyperparameters:
            raise ValueError(
                f"the task reads the hyperparameter 'consistency', the state has "
                f"{sorted(hyperparameters)}: give it to fit.init, 0 to switch it off"
            )
        found = []
        for i, scale in enumerate(sorted(set(self.scales) - {1.0})):
            other = jax.random.fold_in(key, i)
            _, (extras, aux) = self.inner.loss(
                params, extras, _resized(batch, scale), other, hyperparameters
            )
            found.append(_back(aux.logits, batch))
        loss, (extras, aux) = self.inner.loss(params, extras, batch, key, hyperparameters)
        logits = jnp.stack([*found, *([aux.logits] if 1.0 in self.scales else [])])
        if self.cross_entropy == "scales":
            aux = dataclasses.replace(aux, loss=_mean_loss(logits, batch))
            loss = aux.loss.mean() if batch.weight is None else (batch.weight * aux.loss).mean()
        extra = consistency(logits, rho=self.rho, per=self.per)
        extra = extra.mean() if batch.weight is None else (batch.weight * extra).mean()
        scalars = aux.scalars | {"consistency": extra}
        loss = loss + hyperparameters["consistency"] * extra
        return loss, (extras, dataclasses.replace(aux, scalars=scalars))

    def evaluate(
        self, params: PyTree, extras: PyTree, batch: Batch, hyperparameters: Scalars
    ) -> Aux:
        _check(batch)
        seen = [
            self.inner.evaluate(params, extras, _resized(batch, scale), hyperparameters).logits
            for scale in self.scales
        ]
        logits = jnp.stack([_back(one, batch) for one in seen])
        averaged = _log_mean(jax.nn.log_softmax(logits, axis=-1))
        return Aux(_mean_loss(averaged[None], batch), averaged, batch.y, batch.index)

    def network(self, params: PyTree, extras: PyTree) -> tuple[PyTree, PyTree]:
        return self.inner.network(params, extras)

    def layout(self, extras: PyTree) -> PyTree:
        return self.inner.layout(extras)

    @property
    def num_examples(self) -> int | None:
        return self.inner.num_examples

    @property
    def bare(self) -> Task | None:
        return self.inner.bare and of_methods(dataclasses.replace(self, inner=self.inner.bare))


def _log_mean(log_p: Float[Array, "s b h w c"]) -> Float[Array, "b h w c"]:
    """Logarithm of the mean over scales of exp(log_p)."""
    return jax.nn.logsumexp(log_p, axis=0) - math.log(log_p.shape[0])


def _mean_loss(logits: Float[Array, "s b h w c"], batch: Batch) -> Float[Array, "b"]:
    """The cross-entropy of each image: the mean over scales and pixels that have a label."""
    y = jnp.broadcast_to(batch.y[None], logits.shape[:-1])
    here = losses.counted(batch.y)
    count = jnp.maximum(here.sum(axis=(1, 2), keepdims=True), 1)
    weight = jnp.where(here, here[0].size / count.astype(logits.dtype), 0)  # 1 where all have one
    return (losses.cross_entropy(logits, y) * weight[None]).mean(axis=(0, 2, 3))


def _resized(batch: Batch, scale: float) -> Batch:
    """The images of a batch at another scale; only logits are taken from it, so labels are 0."""
    if scale == 1.0:
        return batch
    sides = tuple(max(1, round(scale * side)) for side in batch.x.shape[1:3])
    shape = (batch.x.shape[0], *sides, *batch.x.shape[3:])
    y = jnp.zeros(shape[:3], batch.y.dtype)
    return dataclasses.replace(batch, x=jax.image.resize(batch.x, shape, "bilinear"), y=y)


def _back(logits: jax.Array, batch: Batch) -> jax.Array:
    shape = (*batch.y.shape, logits.shape[-1])
    return logits if logits.shape == shape else jax.image.resize(logits, shape, "bilinear")


def _check(batch: Batch) -> None:
    if batch.y.ndim != 3 or batch.x.shape[:3] != batch.y.shape:
        raise ValueError(
            f"multiscale needs a label for every pixel, images [b, H, W] or [b, H, W, c] with "
            f"labels [b, H, W], got {list(batch.x.shape)} and {list(batch.y.shape)}"
        )
