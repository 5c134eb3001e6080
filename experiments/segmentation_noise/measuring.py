"""What becomes of the pixels whose label is wrong, and how good the segmentation is."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dynamics import mesh as meshes
from dynamics.revise.pixels import IGNORED
from dynamics.scores.examples import over_examples
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState

FATES = ("correct", "memorised", "other")


def classes(task: Task, state: TrainState, batch: Batch) -> jax.Array:
    """The class of every pixel in evaluation mode, i32[b, h, w]."""
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    return aux.logits.argmax(axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Fates:
    """``train`` and ``test``: IoU with the clean labels, the mean over foreground classes. Of the
    pixels of class c whose label is wrong, those with c as their label or as what they are, the
    parts predicted as they are (``correct.c``), as their label says (``memorised.c``), or neither.

    After step ``last`` also ``predicted`` i32[K, n, h, w]. ``labels`` [K, n, h, w] are those of the
    start. NaN where there are none. Cost: a forward pass of both data sets for each replica.

    Reference: Liu et al. 2022, arXiv 2110.03740, figure 2.
    """

    task: Task
    data: Dataset
    tested: Dataset
    labels: np.ndarray
    every: int
    last: int
    name: str = "fates"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The parts and means f32[K]."""
        found = {}
        for part, data in (("train", self.data), ("test", self.tested)):
            own = over_examples(classes, self.task, state, data, batch_size=64, each=each)
            found[part] = meshes.fetch(own)
        metrics = {
            "train": mean_iou(found["train"], np.asarray(self.data.y)),
            "test": mean_iou(found["test"], np.asarray(self.tested.y)),
        } | fates(found["train"], self.labels, np.asarray(self.data.y))
        made = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return carry, made | (
            {"predicted": found["train"]} if int(state.step[0]) == self.last else {}
        )


def mean_iou(predicted: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """f64[K]: the mean over the foreground classes of ``clean`` [n, h, w] of the IoU over all
    pixels of ``predicted`` [K, n, h, w].
    """
    valid = clean != IGNORED
    scores = []
    for c in _foreground(clean):
        mine, truth = (predicted == c) & valid, (clean == c)[None]
        scores.append((mine & truth).sum(axis=(1, 2, 3)) / (mine | truth).sum(axis=(1, 2, 3)))
    return np.mean(scores, axis=0)


def fates(predicted: np.ndarray, labels: np.ndarray, clean: np.ndarray) -> dict[str, np.ndarray]:
    """f64[K] each: the parts of the wrong pixels of every foreground class."""
    out = {}
    for c in _foreground(clean):
        wrong = (labels != clean) & ((labels == c) | (clean[None] == c)) & (labels != IGNORED)
        correct, memorised = predicted == clean, predicted == labels
        count = wrong.sum(axis=(1, 2, 3))
        for name, kept in zip(FATES, (correct, memorised, ~(correct | memorised)), strict=True):
            part = (kept & wrong).sum(axis=(1, 2, 3)) / np.maximum(count, 1)
            out[f"{name}.{c}"] = np.where(count > 0, part, np.nan)
    return out


def _foreground(clean: np.ndarray) -> list[int]:
    return [int(c) for c in np.unique(clean) if c not in (0, IGNORED)]
