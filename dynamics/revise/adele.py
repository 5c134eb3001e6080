"""Adaptive early-learning correction: labels are corrected class by class, each when it is due."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics import mesh as meshes
from dynamics import population
from dynamics.data.rows import subset
from dynamics.revise import pixels
from dynamics.revise.curve import Detection, detected
from dynamics.revise.pixels import Correction
from dynamics.scores.examples import over_examples
from dynamics.types import IGNORED, NEVER, Batch, Context, Dataset, PyTree, Task, TrainState

DETECT = 0  # in ``when``: the epoch is that of the detection


@dataclass(frozen=True, eq=False)
class Adele:
    """A Revision that corrects the labels of a segmentation while a network is trained on them.

    They are those of the examples of the data set ``on``. An epoch is ``parts`` times ``every``
    steps, the run ``epochs`` of them. After each part of an epoch it predicts that part of the
    examples; at the end, each replica's IoU of each class with the labels as they were at the start
    is a point of its curve. Parts are what the paper's curve is made of, predictions from all over
    the epoch: a class that is learned within one leaps from 0 to its plateau otherwise, and there
    is no bend to find.

    A class whose curve has bent by ``detection`` is active from then on, and its labels are due for
    ``correction``: ``once``; or every ``interval`` epochs, ``restart``ing from the labels of the
    start, or ``cumulative``ly, which lets errors build on errors. What a correction may change is
    all that is ``active`` by then, so that a class is corrected again with those that follow it, or
    just what is ``due``. Background is never waited for. Curves are of what ``watched`` predicts,
    ``predictor`` says what the labels become (a ``task.multiscale`` that averages over scales,
    say): both by default the task that is trained.

    ``when`` [K, C] gives an epoch instead of the detection: DETECT, or the epoch, or NEVER. With
    it, runs without correction and controls are replicas of the same program.

    Metrics: ``iou.<c>`` of each class; ``active``, the number of classes due so far; ``onset.<c>``,
    the epoch at which a foreground class was first due (infinite until then); with the ``clean``
    labels also ``label_accuracy``, the part of the pixels whose label is right now. After the last
    epoch, ``labels`` i32[K, n, h, w].

    Cost: a forward pass of the data an epoch for each replica, one more by the predictor when a
    class is corrected; on the host some ms for each curve that is waited for. ValueError: a stream
    without labels of its own, shapes that don't fit, more epochs than announced.

    Reference: Liu et al. 2022, arXiv 2110.03740. Departs from it: predictions are in evaluation
    mode, where theirs are those of the training passes; theirs corrects cumulatively, a class at
    most every 10 epochs, or restarts every epoch.
    """

    num_classes: int
    every: int
    epochs: int
    parts: int = 1
    detection: Detection = Detection()
    correction: Correction = Correction()
    repeat: Literal["once", "restart", "cumulative"] = "once"
    interval: int = 1
    among: Literal["active", "due"] = "active"
    when: Int[np.ndarray, "k c"] | None = None
    watched: Task | None = None
    predictor: Task | None = None
    clean: Int[np.ndarray, "n h w"] | None = None
    name: str = "adele"
    on: str = "train"
    batch_size: int = 64
    dims: tuple[str, ...] = ("example", "y", "x")

    def start(self, context: Context, own: PyTree, state: TrainState) -> PyTree:
        """The labels of the start, curves without a point, no class due."""
        k, c = population.size(state), self.num_classes
        self._check(context.examples(self.on), own, k)
        return {
            "labels": own["labels"],
            "counts": np.zeros((k, c, 3), np.int32),
            "iou": np.full((k, self.epochs, c), np.nan, np.float32),
            "onset": np.full((k, c), NEVER, np.int32),
        }

    def revise(
        self, context: Context, carry: PyTree, own: PyTree, state: TrainState
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        """A part of the examples predicted; at the end of an epoch, a point more of each curve, and
        labels corrected of the classes that are due.
        """
        part = int(state.step) // self.every
        epoch = (part - 1) // self.parts + 1
        if epoch > self.epochs:
            raise ValueError(
                f"Adele.epochs must count all epochs, got {self.epochs} in epoch {epoch}"
            )
        counts = self._count(context, carry, state, (part - 1) % self.parts)
        if part % self.parts:
            return {**carry, "counts": counts}, own, {}
        curves, onset = (np.array(meshes.fetch(carry[name])) for name in ("iou", "onset"))
        curves[:, epoch - 1] = np.asarray(pixels.iou(jnp.asarray(counts)))
        self._advance(onset, curves, epoch)
        if (due := self._due(onset, epoch)).any():
            labels = self._correct(context, carry, own, state, onset <= epoch, due)
            own = {**own, "labels": labels}
        carry = {**carry, "counts": np.zeros_like(counts), "iou": curves, "onset": onset}
        return carry, own, self._metrics(context, carry, own["labels"], epoch)

    def _count(self, context: Context, carry: PyTree, state: TrainState, part: int) -> np.ndarray:
        """The counts of the epoch so far, with those of one part of the examples."""
        data = context.examples(self.on)
        rows = np.arange(part, len(data), self.parts)
        task = self.watched or context.task
        found, _ = self._predict(context, task, state, subset(data, rows))
        counts = context.each(_Counts(self.num_classes))((found, carry["labels"][:, rows]))
        return meshes.fetch(carry["counts"]) + meshes.fetch(counts)

    def _correct(
        self,
        context: Context,
        carry: PyTree,
        own: PyTree,
        state: TrainState,
        active: np.ndarray,
        due: np.ndarray,
    ) -> jax.Array:
        """The labels with those of the classes that are ``due`` corrected."""
        data = context.examples(self.on)
        found = self._predict(context, self.predictor or context.task, state, data)
        classes = active & due.any(axis=1, keepdims=True) if self.among == "active" else due
        before = carry["labels"] if self.repeat == "restart" else own["labels"]
        labels = (before, own["labels"])
        return context.each(_Corrected(self.correction))((*labels, *found, classes))

    def _advance(self, onset: np.ndarray, curves: np.ndarray, epoch: int) -> None:
        """Note in ``onset`` which foreground classes are due for the first time."""
        when = np.full(onset.shape, DETECT) if self.when is None else self.when
        for k, c in np.argwhere(onset == NEVER):
            if c == 0:
                continue
            if when[k, c] == DETECT:
                now = detected(curves[k, :epoch, c].astype(np.float64), self.detection)
            else:
                now = when[k, c] == epoch
            onset[k, c] = epoch if now else NEVER

    def _due(self, onset: np.ndarray, epoch: int) -> np.ndarray:
        """bool[K, C]: the classes to correct now."""
        if self.repeat == "once":
            return onset == epoch
        return (onset <= epoch) & ((epoch - onset) % self.interval == 0)

    def _predict(
        self, context: Context, task: Task, state: TrainState, data: Dataset
    ) -> tuple[jax.Array, jax.Array]:
        """i32[K, n, h, w] and f32[K, n, h, w]: the most likely classes, and how likely."""
        score, each = _Prediction(self.correction.temperature), context.each
        return over_examples(score, task, state, data, batch_size=self.batch_size, each=each)

    def _metrics(
        self, context: Context, carry: PyTree, labels: jax.Array, epoch: int
    ) -> dict[str, jax.Array]:
        onset = np.where(carry["onset"] == NEVER, np.inf, carry["onset"]).astype(np.float32)
        now = {f"iou.{c}": carry["iou"][:, epoch - 1, c] for c in range(self.num_classes)}
        now |= {f"onset.{c}": onset[:, c] for c in range(1, self.num_classes)}
        now["active"] = np.isfinite(onset).sum(axis=1).astype(np.float32)
        metrics = {name: jnp.asarray(values) for name, values in now.items()}
        if self.clean is not None:
            agreement = context.each(_agreement)((labels,), jnp.asarray(self.clean))
            metrics["label_accuracy"] = agreement
        return metrics | ({"labels": labels} if epoch == self.epochs else {})

    def _check(self, data: Dataset, own: PyTree, k: int) -> None:
        least = {"num_classes": 2, "epochs": 1, "parts": 1, "interval": 1}
        for name, low in least.items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"Adele.{name} must be >= {low}, got {value}")
        if self.parts > (n := len(data)):
            raise ValueError(
                f"Adele.parts must be <= {n}, the examples there are, got {self.parts}"
            )
        shape = (k, *data.y.shape)
        labels = own.get("labels") if isinstance(own, dict) else None
        if labels is None or labels.shape != shape or len(shape) != 4:
            found = "none" if labels is None else labels.shape
            raise ValueError(
                f"Adele changes the labels of a stream: give it labels of shape {shape}, an image "
                f"[h, w] for each example of each member, got {found}"
            )
        wanted = {"when": (k, self.num_classes), "clean": shape[1:]}
        for name, its in wanted.items():
            given = getattr(self, name)
            if given is not None and given.shape != its:
                raise ValueError(f"Adele.{name} must have shape {its}, got {given.shape}")


# ---- functions of one replica: equal ones are compiled once --------------------------------------


@dataclass(frozen=True)
class _Prediction:
    temperature: float

    def __call__(self, task: Task, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
        return pixels.prediction(aux.logits, self.temperature)


@dataclass(frozen=True)
class _Counts:
    num_classes: int

    def __call__(self, members: tuple[jax.Array, jax.Array]) -> jax.Array:
        return pixels.counts(*members, self.num_classes)


@dataclass(frozen=True)
class _Corrected:
    correction: Correction

    def __call__(self, members: tuple[jax.Array, ...]) -> jax.Array:
        before, now, classes, confidence, active = members
        after = pixels.corrected(before, classes, confidence, active, self.correction)
        return jnp.where(active.any(), after, now)


def _agreement(members: tuple[jax.Array], clean: jax.Array) -> jax.Array:
    """The part of the pixels, the ignored left out, whose label is the clean one."""
    (labels,) = members
    valid = clean != IGNORED
    return ((labels == clean) & valid).sum() / jnp.maximum(valid.sum(), 1)
