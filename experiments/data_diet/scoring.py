"""The scoring stage: every score of every example, at every epoch asked for, stored once."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import config as configs
from dynamics import optim, record, scores, training
from dynamics.data import corrupt
from dynamics.data.sources import Splits
from dynamics.probes import AreaUnderMargin, Cartography, Forgetting, Score, VarianceOfGradients
from dynamics.record import Array, Findings
from dynamics.training import Trained
from dynamics.types import Batch, Dataset, Task, TrainState
from experiments.data_diet.bank import Bank
from experiments.data_diet.config import Config, Method, ScoringConfig, scoring_part
from experiments.experiment import Experiment, Job, indices

SCORING, RETRAINING, RANDOM, CHILD, OTHER, DRAW = range(6)  # purposes of the seed
STREAMED = {  # (probe, metric) of the training stream -> the score
    ("forgetting", "events"): "forgetting",
    ("aum", "margin"): "aum",
    ("cartography", "confidence"): "confidence",
    ("cartography", "variability"): "variability",
    ("vog", "score"): "vog",
}


def banks(job: Job[Config, Any]) -> list[Bank]:
    """The scores of each point of a job: from the disk, or computed and stored."""
    return banks_of(job, job.points)


def drawn(banks: Sequence[Bank], replicas: int) -> list[list[Bank]]:
    """The scores of each (point, replica) of a study: replica r takes those of draw r.

    So no two replicas share a run that scored or a label that was drawn, and their spread is that
    of the whole method.
    """
    return [[bank.draw(r) for r in range(replicas)] for bank in banks]


def seed_of(seed: int, draw: int) -> int:
    """The seed of what is drawn anew in each draw: wrong labels, and the order of ties."""
    entropy = np.random.SeedSequence([seed, DRAW, draw])
    return int(entropy.generate_state(1)[0]) if draw else seed


def banks_of(job: Job[Any, Any], points: Sequence[Config]) -> list[Bank]:
    """The scores of points, which may differ in shapes."""
    parts = [scoring_part(point) for point in points]
    folder = None if job.store is None else job.store / SCORES.name
    found: dict[ScoringConfig, Bank] = {}
    for group in configs.group(dict.fromkeys(parts)):
        with nullcontext() if folder is None else record.alone(folder, group, wait=True):
            several = SCORES.sweep(group, job.data, job.mesh, store=job.store)
        for part, findings in zip(group, several, strict=True):
            found[part] = Bank(findings.arrays, findings.frames["scored"])
    return [found[part] for part in parts]


def score(job: Job[ScoringConfig, Any]) -> Findings:
    """Train ``score.replicas`` runs for each draw of each point, score every example on the way.

    Arrays f32[epoch, replica, example] in dataset order: el2n, grand, loss, entropy and
    logit_margin in evaluation mode; forgetting, aum, confidence and variability of the training
    stream up to there; vog and pvi if asked for. Also ``tracin`` f32[replica, example] of the
    epochs scored, ``input_norm`` f32[example], ``index`` i32 into the file, ``clean`` i32 labels,
    ``labels`` i32[draw, example] trained on, and ``mislabelled`` bool[draw, example]. Frames:
    ``scored``, for each replica its draw, and the step at which it ``diverged``, if it did;
    ``loss``, for each (replica, step).
    """
    config, data, draws = job.config, job.data, job.config.score.draws
    members = job.members(lambda point, _: [point.train.optimizer.hyperparameters()],
                          draws * config.score.replicas)  # fmt: skip
    members = members.with_columns(draw=pl.col("replica") // config.score.replicas)
    noisy = [[_noisy(point, data, d) for d in range(draws)] for point in job.points]
    labels = np.stack([noisy[p][d].labels for p, d in members.select("point", "draw").rows()])
    epochs = {training.steps(config.train, data, e): e for e in config.score.epochs}
    trained = _scored(job, members, labels, epochs)
    found = {name: _unstacked(array, trained, epochs) for name, array in _named(trained).items()}
    if "pvi" in config.score.also:
        null = _null(job, members, labels, epochs)
        losses = _unstacked(null.arrays["rest", "loss"], null, epochs)
        both = found["loss"].among("epoch", losses.coords["epoch"].tolist())
        found["pvi"] = losses._replace(values=np.asarray(scores.pvi(both.values, losses.values)))
    found["tracin"] = _tracin(job, found["grand"], epochs)
    for name, stored in (("labels", "labels"), ("mask", "mislabelled")):
        values = np.stack([[getattr(one, name) for one in mine] for mine in noisy])
        found[stored] = Array(values, ("point", "draw", "example"))
    found["clean"] = Array(noisy[0][0].clean, ("example",))
    frames = {
        "scored": trained.members.select("point", "draw", "replica", "diverged"),
        "loss": trained.rows.select("point", "replica", "step", "loss"),
    }
    norms = {"input_norm": Array(_input_norm(data), ("example",))}
    return Findings(frames, found | norms | indices(data.train))


SCORES: Experiment[ScoringConfig] = Experiment("data_diet/scores", lambda *_: None, score)


def at_rest(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """The scores f32[b] of a state in evaluation mode: a gradient pass and a forward pass."""
    return {
        "el2n": scores.el2n(task, state, batch),
        "grand": scores.grand(task, state, batch),
        "loss": scores.loss(task, state, batch),
        "entropy": scores.entropy(task, state, batch),
        "logit_margin": scores.logit_margin(task, state, batch),
    }


def _scored(
    job: Job[ScoringConfig, Any],
    members: pl.DataFrame,
    labels: np.ndarray,
    epochs: dict[int, float],
) -> Trained:
    """The runs that score, each scored at rest and along its training."""
    n, when, trained = len(job.data.train), tuple(epochs), tuple(step for step in epochs if step)
    probes: list[Any] = [
        Score(at_rest, when, name="rest", on="train", labels=labels),
        Forgetting(n, trained),
        AreaUnderMargin(n, trained),
        Cartography(n, trained),
    ]
    if "vog" in job.config.score.also:
        probes.append(VarianceOfGradients(trained, on="train", labels=labels))
    return fitted(
        job,
        job.config,
        members,
        SCORING,
        when[-1],
        name="score",
        total=_horizon(job.config, job.data, when),
        store=job.recorder,
        probes=probes,
        labels=labels,
    )


def _null(
    job: Job[ScoringConfig, Any],
    members: pl.DataFrame,
    labels: np.ndarray,
    epochs: dict[int, float],
) -> Trained:
    """The same runs on blank inputs, for pvi."""
    trained = tuple(step for step in epochs if step)
    blank = scores.blank(job.data.train)
    return fitted(
        job,
        job.config,
        members,
        SCORING,
        max(epochs),
        name="score null",
        total=_horizon(job.config, job.data, tuple(epochs)),
        store=job.stage("null"),
        data=job.data._replace(train=blank),
        probes=[Score(_loss, trained, name="rest", on="train", labels=labels)],
        labels=labels,
    )


def fitted(
    job: Job[Any, Any],
    config: Config | ScoringConfig,
    members: pl.DataFrame,
    purposes: int | jax.Array,
    num_steps: int,
    *,
    data: Splits | None = None,
    sets: Mapping[str, Dataset] | None = None,
    labels: np.ndarray,
    rows: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
    **options: Any,
) -> Trained:
    """Members trained as a config says on labels [K, N] of their own, or on subsets of them.

    Keys are made for a purpose, or given. Probes see the training and the test set, or ``sets``.
    """
    splits: Splits = job.data if data is None else data
    roots = training.keys(members, purposes) if isinstance(purposes, int) else purposes
    subset = {"labels": labels, "rows": rows, "sizes": sizes}
    return training.train(
        members,
        roots,
        training.net_of(config.model, splits),
        config.train.optimizer,
        training.batches(config.train, splits.train, roots, **subset),
        num_steps,
        job.mesh,
        data=sets or {"train": splits.train, "test": splits.test},
        **options,
    )


def chosen(
    method: Method | str,
    bank: Bank,
    count: int,
    seed: int,
    replica: int,
    *,
    at: float = 0.0,
    balanced: bool = False,
    cutoff: float = 0.1,
) -> np.ndarray:
    """i32[count]: the rows that a method keeps by the scores of one draw, ``replica``.

    Random subsets and the order of ties are drawn for each.
    """
    labels, ties = bank["labels"] if balanced else None, seed_of(seed, replica)
    if method == "random":
        draw = np.random.SeedSequence([seed, RANDOM, replica]).generate_state(1)[0]
        return scores.random(len(bank), count, labels=labels, seed=int(draw))
    if method == "coverage":
        return scores.coverage_centric(bank.mean("el2n", at), count, cutoff=cutoff, seed=ties)
    name, _, end = method.rpartition("_")
    kind, at = (name[: -len("_init")], 0.0) if name.endswith("_init") else (name, at)
    high = scores.HARD[kind] == "high"
    which = "highest" if (end == "hard") == high else "lowest"
    mean = bank.mean(kind) if kind == "input_norm" else bank.mean(kind, at)
    return scores.keep(mean, count, which, labels=labels, seed=ties)


def _loss(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    return {"loss": scores.loss(task, state, batch)}


def _named(trained: Trained) -> dict[str, Array]:
    """Score -> what was measured of it, dims step, member, example."""
    kept = {key: STREAMED.get(key, key[1]) for key in trained.arrays}
    skipped = ("cartography", "correctness")
    return {name: trained.arrays[key] for key, name in kept.items() if key != skipped}


def _unstacked(array: Array, trained: Trained, epochs: dict[int, float]) -> Array:
    """Dims epoch, point, replica, example in place of step, member, example."""
    found = training.unstack(array, trained.members, "point", "replica").renamed(step="epoch")
    places = np.array([epochs[int(step)] for step in found.coords["epoch"]])
    return found._replace(coords={**found.coords, "epoch": places})


def _tracin(job: Job[ScoringConfig, Any], grand: Array, epochs: dict[int, float]) -> Array:
    """TracIn-self of the epochs above 0, dims point, replica, example."""
    trained = {step: epoch for step, epoch in epochs.items() if step}
    horizon, parts = _horizon(job.config, job.data, tuple(epochs)), []
    for p, point in enumerate(job.points):
        norms = grand.at(point=p).among("epoch", list(trained.values())).values
        rates = _rates(point.train.optimizer, tuple(trained), horizon)
        parts.append(scores.tracin_self(norms, rates).astype(np.float32))
    return Array(np.stack(parts), ("point", "replica", "example"))


def _horizon(config: ScoringConfig, data: Splits, when: Sequence[int]) -> int:
    return training.steps(config.train, data, config.score.horizon) or when[-1]


def _rates(rule: optim.Optimizer, trained: Sequence[int], num_steps: int) -> list[float]:
    shape = optim.factor(rule.schedule, num_steps)
    return [rule.learning_rate * float(shape(jnp.int32(step))) for step in trained]


def _noisy(point: ScoringConfig, data: Splits, draw: int) -> corrupt.Noisy:
    y = np.asarray(data.train.y)
    return corrupt.symmetric(y, point.noise, data.num_classes, seed_of(point.seed, draw))


def _input_norm(data: Splits) -> np.ndarray:
    """f32[N]: the norm of each normalised input, a block of examples at a time."""
    train, norms = data.train, []
    for first in range(0, len(train), 1024):
        x = (train.x[first : first + 1024].astype(np.float32) - train.mean[None]) / train.std[None]
        norms.append(np.linalg.norm(x.reshape(len(x), -1), axis=1))
    return np.concatenate(norms).astype(np.float32)
