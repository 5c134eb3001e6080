"""Studies of where training leads and how its kernel turns, on examples of high and low score."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import mesh as meshes
from dynamics import population, training
from dynamics.data.rows import subset
from dynamics.landscape import barrier
from dynamics.probes import KernelVelocity, Path
from dynamics.probes.path import alphas, whole
from dynamics.record import Findings
from dynamics.training import Trained
from dynamics.types import TrainState
from experiments.data_diet import scoring
from experiments.data_diet.bank import Bank
from experiments.data_diet.config import Config, Connectivity, Velocity
from experiments.data_diet.retraining import scored, shared
from experiments.experiment import Job


def connect(job: Job[Config, Connectivity]) -> Findings:
    """Frame ``connectivity``, a row for each (spawn, subset, replica): the barriers between two
    children at the end.

    ``error_barrier`` is of the training error (0..1), ``loss_barrier`` of the loss (nats), on the
    labels trained on, noise included. ``spawn`` is the epoch of the parent that both children
    begin with, null where they share nothing. Batch statistics are re-estimated on the path.
    Weights: ``children-<step>``, those of both children of each parent.
    """
    study, data, banks = job.study, job.data, scoring.banks(job)
    drawn = scoring.drawn(banks, study.replicas)
    parents = _members(job)
    children = pl.concat([parents.with_columns(child=pl.lit(c)) for c in range(2)])
    children = children.drop("member").with_row_index("member")
    both = [training.keys(parents, purpose) for purpose in (scoring.CHILD, scoring.OTHER)]
    pairs = parents.select("point", "replica").rows()
    chosen = {(p, r): _extremes(job, p, r, drawn[p][r]) for p, r in pairs}
    every = np.unique(np.concatenate([rows for mine in chosen.values() for rows in mine.values()]))
    labels = np.stack([drawn[p][r]["labels"] for p, r in pairs])
    own = np.concatenate([labels, labels])
    total = training.steps(job.config.train, data, study.epochs)
    path = Path((total,), on="chosen", points=study.points, labels=own[:, every], train="train")
    sets = {"chosen": subset(data.train, every), "train": data.train}
    frames, weights = [], {}

    def grown(start: TrainState | None, name: str, spawn: float | None) -> None:
        trained = scoring.fitted(
            job,
            job.config,
            children,
            jnp.concatenate(both),
            total,
            name="children",
            store=job.stage(name),
            start=start,
            probes=[path],
            labels=own,
            sets=sets,
        )
        weights[name] = (trained.members, trained.state)
        frames.append(_barriers(trained, study, chosen, every, spawn))

    if study.independent:
        grown(None, "independent", None)
    parent = None
    for epoch in sorted(study.spawn):
        step = training.steps(job.config.train, data, epoch)
        parent = scoring.fitted(
            job,
            job.config,
            parents,
            scoring.RETRAINING,
            step,
            name="parent",
            store=job.stage(f"parent-{step}"),
            total=total,
            start=parent,
            labels=labels,
        ).state
        assert parent is not None
        here = meshes.fetch(parent)
        grown(population.concatenate([here, here]), f"children-{step}", epoch)
    found = {"connectivity": pl.concat(frames), "scored": scored(banks)}
    return Findings(found, shared(banks), weights)


def _members(job: Job[Config, Any]) -> pl.DataFrame:
    return job.members(
        lambda point, _: [point.train.optimizer.hyperparameters()], job.study.replicas
    )


def _extremes(
    job: Job[Config, Connectivity], p: int, replica: int, bank: Bank
) -> dict[str, np.ndarray]:
    """The hardest and the easiest examples by the scores of a pair's own draw, and random ones."""
    options = (bank, job.study.examples, job.points[p].seed, replica)
    methods = {"high": "el2n_hard", "low": "el2n_easy", "random": "random"}
    at = job.study.scored_at
    return {name: scoring.chosen(method, *options, at=at) for name, method in methods.items()}


def _barriers(
    trained: Trained,
    study: Connectivity,
    chosen: dict[tuple[int, int], dict[str, np.ndarray]],
    every: np.ndarray,
    spawn: float | None,
) -> pl.DataFrame:
    """The barriers between the two children of every parent; null where one diverged."""
    paths = {
        metric: whole(trained.arrays["path", metric].values[-1]) for metric in ("accuracy", "loss")
    }
    places, rows = alphas(study.points), []
    first, second = (trained.members.filter(pl.col("child") == c) for c in range(2))
    lost = pl.min_horizontal(first["diverged"], second["diverged"])
    pairs = first.with_columns(diverged=lost).rows(named=True)
    for pair, member in enumerate(pairs):
        for name, examples in chosen[member["point"], member["replica"]].items():
            at = np.searchsorted(every, examples)
            accuracy = paths["accuracy"][:, pair][:, at].mean(axis=-1)
            loss = paths["loss"][:, pair][:, at].mean(axis=-1)
            measured = {
                "error_barrier": float(barrier(1 - accuracy, places)),
                "loss_barrier": float(barrier(loss, places)),
                "end_error": float(1 - accuracy[[0, -1]].mean()),
            }
            if member["diverged"] is not None:
                measured = dict.fromkeys(measured)
            about = {n: member[n] for n in ("point", "replica", "diverged")}
            rows.append({"spawn": spawn, "subset": name, **about, **measured})
    columns = ("spawn", "error_barrier", "loss_barrier", "end_error")
    types = dict.fromkeys(columns, pl.Float64) | {"diverged": pl.Int64}
    return pl.DataFrame(rows, infer_schema_length=None, schema_overrides=types)


def turn(job: Job[Config, Velocity]) -> Findings:
    """Frame ``velocity``, a row for each (order, group, epoch, replica): how its kernel turned over
    the epoch before.

    Groups of order ``el2n`` are examples of neighbouring mean EL2N of the replica's own draw,
    ``rank`` the middle of a group in 0 (easiest) .. 1; those of order ``random`` are neighbours in
    a random order. ``el2n`` is the group's mean score, ``mislabelled`` the part of it whose labels
    are wrong.
    """
    study, data, banks = job.study, job.data, scoring.banks(job)
    drawn, members = scoring.drawn(banks, study.replicas), _members(job)
    about, groups = _groups(job, drawn, members)
    epochs = {training.steps(job.config.train, data, float(e)): e for e in range(study.epochs + 1)}
    own = members.select("point", "replica").rows()
    trained = scoring.fitted(
        job,
        job.config,
        members,
        scoring.RETRAINING,
        max(epochs),
        name="velocity",
        store=job.recorder,
        probes=[KernelVelocity(tuple(epochs), groups, on="train")],
        labels=np.stack([drawn[p][r]["labels"] for p, r in own]),
    )
    when = pl.DataFrame({"step": list(epochs), "epoch": list(epochs.values())})
    frame = (
        trained.arrays["kernel", "velocity"]
        .frame("velocity")
        .join(when, on="step", maintain_order="left")
        .join(trained.members, on="member", maintain_order="left")
        .join(about, on=["member", "group"], maintain_order="left")
        .filter(pl.col("diverged").is_null() | (pl.col("step") <= pl.col("diverged")))
        .select("point", "order", "rank", "el2n", "mislabelled", "epoch", "replica", "velocity",
                "diverged")
    )  # fmt: skip
    return Findings({"velocity": frame, "scored": scored(banks)}, shared(banks))


def _groups(
    job: Job[Config, Velocity], drawn: list[list[Bank]], members: pl.DataFrame
) -> tuple[pl.DataFrame, np.ndarray]:
    """What each (member, group) is, and its rows i32[member, group, example].

    Groups in the order of the score come first, then those in a random order.
    """
    study, n = job.study, len(job.data.train)
    starts = np.round(np.linspace(0, n - study.examples, study.groups)).astype(int)
    about, groups = [], []
    for member, p, replica in members.select("member", "point", "replica").rows():
        point, bank = job.points[p], drawn[p][replica]
        mean = bank.mean("el2n", study.scored_at)
        draw = np.random.Generator(np.random.PCG64([point.seed, scoring.RANDOM, replica]))
        orders = {"el2n": np.argsort(mean, kind="stable"), "random": draw.permutation(n)}
        mine = []
        for order, examples in orders.items():
            for start in starts:
                rows = examples[start : start + study.examples]
                about.append(
                    {
                        "member": member,
                        "group": len(mine),
                        "order": order,
                        "rank": (start + study.examples / 2) / n,
                        "el2n": mean[rows].mean(),
                        "mislabelled": bank["mislabelled"][rows].mean(),
                    }
                )
                mine.append(rows)
        groups.append(mine)
    return pl.DataFrame(about), np.array(groups)
