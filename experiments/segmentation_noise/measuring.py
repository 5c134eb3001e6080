"""What becomes of the pixels whose label is wrong, and how good the segmentation is."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dynamics import mesh as meshes
from dynamics.losses import predictions
from dynamics.scores.examples import over_examples
from dynamics.types import IGNORED, Batch, Context, PyTree, Task, TrainState

FATES = ("correct", "memorised", "other")


def classes(task: Task, state: TrainState, batch: Batch) -> jax.Array:
    """The class of every pixel in evaluation mode, i32[b, h, w]; -1: no answer."""
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    return predictions(aux.logits)


@dataclass(frozen=True, eq=False)
class Fates:
    """``train`` and ``test``: IoU with the clean labels, the mean over foreground classes. Of the
    pixels of class c whose label is wrong, those with c as their label or as what they are, the
    parts predicted as they are (``correct.c``), as their label says (``memorised.c``), or neither.

    After step ``last`` also ``predicted`` i32[K, n, h, w]. ``labels`` [K, n, h, w] are those of the
    start, ``task`` predicts at the images' own scale. NaN where there are none. Cost: a forward
    pass of both data sets for each replica.

    Reference: Liu et al. 2022, arXiv 2110.03740, figure 2.
    """

    task: Task
    every: int
    labels: np.ndarray
    last: int
    name: str = "fates"
    dims: tuple[str, ...] = ("example", "y", "x")

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The parts and means f32[K]."""
        found, metrics = {}, {}
        for part in ("train", "test"):
            data, each = context.examples(part), context.each
            own = over_examples(classes, self.task, state, data, batch_size=64, each=each)
            found[part] = meshes.fetch(own)
            metrics[part] = mean_iou(found[part], np.asarray(data.y))
        metrics |= fates(found["train"], self.labels, np.asarray(context.examples("train").y))
        made = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return carry, made | ({"predicted": found["train"]} if int(state.step) == self.last else {})


def mean_iou(predicted: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """f64[K]: the mean over the foreground classes of ``clean`` [n, h, w] of the IoU over all
    pixels of ``predicted`` [K, n, h, w]. NaN for a network that has no answer somewhere.
    """
    valid = clean != IGNORED
    scores = []
    for c in _foreground(clean):
        mine, truth = (predicted == c) & valid, (clean == c)[None]
        scores.append((mine & truth).sum(axis=(1, 2, 3)) / (mine | truth).sum(axis=(1, 2, 3)))
    return _answered(np.mean(scores, axis=0), predicted, valid)


def fates(predicted: np.ndarray, labels: np.ndarray, clean: np.ndarray) -> dict[str, np.ndarray]:
    """f64[K] each: the parts of the wrong pixels of every foreground class."""
    out = {}
    for c in _foreground(clean):
        wrong = (labels != clean) & ((labels == c) | (clean[None] == c)) & (labels != IGNORED)
        correct, memorised = predicted == clean, predicted == labels
        count = wrong.sum(axis=(1, 2, 3))
        for name, kept in zip(FATES, (correct, memorised, ~(correct | memorised)), strict=True):
            part = (kept & wrong).sum(axis=(1, 2, 3)) / np.maximum(count, 1)
            out[f"{name}.{c}"] = _answered(np.where(count > 0, part, np.nan), predicted, wrong)
    return out


def _answered(values: np.ndarray, predicted: np.ndarray, where: np.ndarray) -> np.ndarray:
    """NaN for the networks that have no answer at one of these pixels."""
    return np.where(((predicted < 0) & where).any(axis=(1, 2, 3)), np.nan, values)


def _foreground(clean: np.ndarray) -> list[int]:
    return [int(c) for c in np.unique(clean) if c not in (0, IGNORED)]
