"""A network picks its own hardest examples while it trains, once or again and again.

Departs from scores averaged over independent runs on purpose: each replica scores with itself
alone, which costs one forward pass of the data for each choice. Reference: Attendu and Corbeil
2023, arXiv 2306.03208, who re-score by EL2N in this way when fine-tuning language models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import mesh as meshes
from dynamics import scores, training
from dynamics.data.sources import Splits
from dynamics.probes import Evaluate
from dynamics.record import Findings
from dynamics.scores.examples import over_examples
from dynamics.training import Train
from dynamics.types import Context, PyTree, TrainState
from experiments.data_diet import scoring
from experiments.data_diet.config import Config, Rescoring
from experiments.data_diet.retraining import scored, shared
from experiments.experiment import Job

METHODS = ("full", "random", "random_again", "once", "again")  # what is chosen at each choice


def rescore(job: Job[Config, Rescoring]) -> Findings:
    """Frame ``rescoring``, a row for each (method, epoch, replica): accuracy at every choice and at
    the end.

    ``once`` keeps the hardest at the end of the warm-up, ``again`` anew at every choice; ``random``
    and ``random_again`` draw instead. ``kept`` is the number of examples trained on up to there,
    ``overlap`` the part of the new choice that was in the one before (null where there was none
    before or after).
    """
    study, data, banks, n = job.study, job.data, scoring.banks(job), len(job.data.train)
    drawn = scoring.drawn(banks, study.replicas)
    bounds, count = choices(job.config.train, study, data), round(study.kept * n)
    members = training.table(
        [{"seed": point.seed, **point.train.optimizer.hyperparameters()} for point in job.points],
        lambda _: [{"method": method} for method in METHODS],
        study.replicas,
    )
    own = members.select("point", "replica").rows()
    trained = scoring.fitted(
        job,
        job.config,
        members,
        scoring.RETRAINING,
        bounds[-1],
        name="rescore",
        store=job.recorder,
        probes=[Evaluate(tuple(bounds), on="test")],
        revision=Choice(tuple(bounds[:-1]), members, count),
        labels=np.stack([drawn[p][r]["labels"] for p, r in own]),
        rows=np.broadcast_to(np.arange(n, dtype=np.int32), (len(members), n)),
        sizes=np.full(len(members), n, np.int32),
    )
    per = n // job.config.train.batch_size
    chosen = trained.measured["choice"].select("member", "step", "common")
    tested = [
        trained.at("test", step).with_columns(step=pl.lit(step, pl.Int64), epoch=step / per)
        for step in bounds
    ]
    frame = pl.concat(tested).join(chosen, on=["member", "step"], how="left", maintain_order="left")
    whole = (pl.col("method") == "full") | (pl.col("step") == bounds[0])
    frame = frame.with_columns(kept=pl.when(whole).then(n).otherwise(count))
    # polars divides by a number by multiplying with its inverse, by a column exactly
    frame = frame.with_columns(overlap=pl.when(~whole).then(pl.col("common") / pl.col("kept")))
    frame = frame.rename({"accuracy": "test_accuracy", "loss": "test_loss"})
    columns = ("point", "method", "replica", "epoch", "kept", "overlap", "test_accuracy",
               "test_loss", "diverged")  # fmt: skip
    frames = {"rescoring": frame.select(columns), "scored": scored(banks)}
    return Findings(frames, shared(banks))


def choices(train: Train, study: Rescoring, data: Splits) -> list[int]:
    """The steps after which subsets are chosen, and the last step.

    ValueError: choices that are no step apart.
    """
    spans = (study.epochs, study.warmup, study.every)
    names = ("study.epochs", "study.warmup", "study.every")
    total, warm, every = (
        training.steps(train, data, epochs, name) for epochs, name in zip(spans, names, strict=True)
    )
    if warm >= total:
        raise ValueError(
            f"study.warmup must be a step shorter than study.epochs {study.epochs:g}, got "
            f"{study.warmup:g}, with {len(data.train) // train.batch_size} steps an epoch"
        )
    return [*range(warm, total, every), total]


@dataclass(frozen=True, eq=False)
class Choice:
    """A revision of the rows that members train on, by their ``method``.

    Metric ``common`` f32[K]: how many of the examples that a member was trained on before it is
    trained on after. Cost: a forward pass of the data for each member and choice.
    """

    every: Sequence[int]
    members: pl.DataFrame
    count: int
    name: str = "choice"

    def start(self, context: Context, own: PyTree, state: TrainState) -> PyTree:
        """Nothing is remembered but the rows themselves."""
        return ()

    def revise(
        self, context: Context, carry: PyTree, own: PyTree, state: TrainState
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        """The rows and sizes of every member after the choice."""
        step = int(state.step)
        data, labels = context.data["train"], meshes.fetch(own["labels"])
        el2n = meshes.fetch(
            over_examples(scores.el2n, context.task, state, data, labels=labels, each=context.each)
        )
        before, sizes = (np.array(meshes.fetch(own[name])) for name in ("rows", "size"))
        rows, after = before.copy(), sizes.copy()
        common = np.zeros(len(rows), np.float32)
        for k, member in enumerate(self.members.rows(named=True)):
            chosen = self._chosen(member, self.every.index(step), el2n[k])
            if chosen is not None:
                rows[k, : self.count], after[k] = chosen, self.count
            common[k] = len(np.intersect1d(before[k, : sizes[k]], rows[k, : after[k]]))
        return carry, {**own, "rows": rows, "size": after}, {"common": jnp.asarray(common)}

    def _chosen(self, member: dict[str, Any], i: int, el2n: np.ndarray) -> np.ndarray | None:
        """What a member is trained on after choice ``i``; None: what it was before."""
        method, seed = member["method"], member["seed"]
        if method == "full" or (i > 0 and method in ("random", "once")):
            return None
        if method in ("random", "random_again"):
            entropy = [seed, scoring.RANDOM, member["replica"], i]
            draw = np.random.SeedSequence(entropy).generate_state(1)[0]
            return scores.random(len(el2n), self.count, seed=int(draw))
        known = el2n if np.isfinite(el2n).all() else np.zeros(len(el2n))
        ties = scoring.seed_of(seed, member["replica"])
        return scores.keep(known, self.count, "highest", seed=ties)
