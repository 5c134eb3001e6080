"""What becomes of wrong labels: learned as they should be, memorised as they are, or neither."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dynamics import losses, population, statistics
from dynamics import mesh as meshes
from dynamics.scores.examples import over_examples
from dynamics.types import Batch, Context, PyTree, Task, TrainState


def answers(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """Of every example f32[b], in evaluation mode: the class ``predicted``, the ``loss``, the norm
    ``fit`` of p - y, the coefficient of its cross-entropy's gradient in the logits, and where the
    state has running targets (``task.elr``) the class they hold it to, ``target`` (-1: none, the
    example was never visited), and the norm ``held`` of lambda g, g = p (<p, t> - t) / (1 - <p,
    t>).

    g is lemma 2's, without the clip, beyond which (p > 1 - 1e-4) the task's own gradient is zero.
    ``predicted`` is -1 where the logits are not finite.

    Reference: Liu et al. 2020, arXiv 2007.00151, lemmas 1 and 2.
    """
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    p = jax.nn.softmax(aux.logits.astype(jnp.float32), axis=-1)
    classes = jnp.arange(p.shape[-1])[None]
    found = {
        "predicted": losses.predictions(p).astype(jnp.float32),
        "loss": aux.loss,
        "fit": jnp.linalg.norm(p - (classes == batch.y[:, None]).astype(jnp.float32), axis=-1),
    }
    tables = jax.tree.leaves(state.extras.get("targets", ()))  # ELR+ has two
    if tables:
        rows = [table[batch.index] for table in tables]
        held = jnp.stack(rows).sum(axis=0)
        target = jnp.where(held.any(axis=-1), held.argmax(axis=-1), -1)
        found["target"] = target.astype(jnp.float32)
    if len(tables) == 1 and "elr_lambda" in state.hyperparameters:
        both = jnp.sum(p * rows[0], axis=-1, keepdims=True)
        g = p * (both - rows[0]) / jnp.maximum(1 - both, jnp.finfo(jnp.float32).tiny)
        found["held"] = state.hyperparameters["elr_lambda"] * jnp.linalg.norm(g, axis=-1)
    return found


@dataclass(frozen=True, eq=False)
class Memorisation:
    """Fractions of the wrong-labelled examples W = {i: label != clean} of the data ``on``, f32[K]:

    ``wrong_correct`` (predicted as they truly are), ``wrong_memorised`` (as their label says),
    ``wrong_other`` (neither; the three add to 1), and of the others ``clean_correct``. From the
    same forward pass: ``loss_auc``, how well the loss ranks W first; ``fit_clean``, ``fit_wrong``
    and, with ELR, ``held_clean``, ``held_wrong``: means of the coefficients of ``answers``;
    ``target_correct``, the part of W whose target is the true class, and ``precision`` and
    ``recall`` of calling wrong what the targets hold to another class than the label.

    ``labels`` [k, n] are each replica's, ``clean`` [n] the true ones, the data unaugmented;
    examples that lack one (``IGNORED``) are left out. NaN where a fraction is of nothing, or of
    answers that are none. Cost: one forward pass of the data for each replica.

    Reference: Liu et al. 2020, arXiv 2007.00151, figures 1 and B.1.
    """

    every: int | Collection[int]
    labels: Int[np.ndarray, "k n"]
    clean: Int[np.ndarray, "n"]
    name: str = "memory"
    on: str = "train"
    batch_size: int = 512

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered. ValueError: labels that are not those of the data."""
        k, n = population.size(state), len(context.examples(self.on))
        if self.labels.shape != (k, n) or self.clean.shape != (n,):
            raise ValueError(
                f"{self.name} needs labels {(k, n)}, a row for each member, and clean {(n,)}, got "
                f"{self.labels.shape} and {self.clean.shape}"
            )
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The fractions and means f32[K]."""
        found = over_examples(
            answers,
            context.task,
            state,
            context.examples(self.on),
            labels=self.labels,
            batch_size=self.batch_size,
            each=context.each,
        )
        values = meshes.fetch(found)
        replicas = [
            _summary({name: value[k] for name, value in values.items()}, labels, self.clean)
            for k, labels in enumerate(self.labels)
        ]
        return carry, {
            name: jnp.asarray([one[name] for one in replicas], jnp.float32) for name in replicas[0]
        }


def _summary(
    found: dict[str, np.ndarray], labels: np.ndarray, clean: np.ndarray
) -> dict[str, float]:
    """Of one replica."""
    known = (labels != losses.IGNORED) & (clean != losses.IGNORED)
    if not known.all():
        found = {name: value[known] for name, value in found.items()}
        labels, clean = labels[known], clean[known]
    wrong = labels != clean
    predicted = np.where(found["predicted"] < 0, np.nan, found["predicted"])
    out = {
        "wrong_correct": _part(predicted, predicted == clean, wrong),
        "wrong_memorised": _part(predicted, predicted == labels, wrong),
        "wrong_other": _part(predicted, (predicted != clean) & (predicted != labels), wrong),
        "clean_correct": _part(predicted, predicted == clean, ~wrong),
        "loss_auc": _auc(found["loss"], wrong),
    }
    for name in ("fit", "held"):
        if name in found:
            out |= {f"{name}_clean": _mean(found[name], ~wrong)}
            out |= {f"{name}_wrong": _mean(found[name], wrong)}
    if "target" in found:
        out["target_correct"] = _mean(found["target"] == clean, wrong)
        flagged = (found["target"] != labels) & (found["target"] >= 0)
        out["precision"], out["recall"] = statistics.precision_recall(flagged, wrong)
    return out


def _part(predicted: np.ndarray, hit: np.ndarray, where: np.ndarray) -> float:
    """The part of the answers that are hits; NaN if one of them is none."""
    return np.nan if np.isnan(predicted[where]).any() else _mean(hit, where)


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else np.nan


def _auc(loss: np.ndarray, wrong: np.ndarray) -> float:
    known = wrong.any() and not wrong.all() and not np.isnan(loss).any()
    return statistics.auc(loss, wrong) if known else np.nan
