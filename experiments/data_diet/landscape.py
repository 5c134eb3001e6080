"""Studies of where training leads and how its kernel turns, on examples of high and low score."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dynamics import mesh as meshes
from dynamics import scores
from dynamics.landscape import barrier
from dynamics.probes import KernelVelocity, Path
from dynamics.probes.path import alphas, whole
from dynamics.record import Table
from dynamics.types import TrainState
from experiments import training
from experiments.data_diet import scoring
from experiments.data_diet.config import Config, Connectivity, Velocity
from experiments.data_diet.retraining import SHARED
from experiments.data_diet.scoring import Job

SUBSETS = ("high", "low", "random")


def connect(job: Job) -> list[Table]:
    """Rows for each (spawn, subset, replica): the barriers between two children at the end.

    ``error_barrier`` is of the training error (0..1), ``loss_barrier`` of the loss (nats), on the
    labels trained on, noise included. ``spawn`` is the epoch of the parent that both children
    begin with, nan where they share nothing. Batch statistics are re-estimated on the path.
    """
    points, data, banks, study = job.points, job.data, job.banks(), job.points[0].study
    assert isinstance(study, Connectivity)
    r, net = study.replicas, training.net_of(points[0].model, data)
    settings, seeds = job.settings, job.seeds
    total = training.steps(settings[0], data, study.epochs)
    chosen = [_extremes(point, bank, study) for point, bank in zip(points, banks, strict=True)]
    every = np.unique(np.concatenate([rows for mine in chosen for rows in mine.values()]))
    labels = np.repeat([bank["labels"] for bank in banks], r, axis=0)
    train, both_labels = data.train, np.tile(labels, (2, 1))
    options = {"net": net, "data": train, "mesh": job.mesh, "total": total}
    subset = dataclasses.replace(
        train, x=train.x[every], y=train.y[every], index=train.index[every]
    )
    own = both_labels[:, every]
    path = Path(net, subset, (total,), points=study.points, labels=own, train=train)

    def children(start: TrainState | None, roots: jax.Array, name: str) -> dict[str, np.ndarray]:
        results = training.train(
            settings * 2,
            roots,
            num_steps=total,
            recorder=job.stage(name),
            name="children",
            start=start,
            probes=[path],
            labels=both_labels,
            **options,
        )
        found = {m: whole(results.arrays[f"path.{m}@{total}"]) for m in ("accuracy", "loss")}
        return found | {"diverged": results.arrays["diverged"].reshape(2, -1).min(axis=0)}

    other = [training.keys(seeds, r, purpose) for purpose in (scoring.CHILD, scoring.OTHER)]
    found: list[tuple[float, dict[str, np.ndarray]]] = []
    if study.independent:
        found.append((np.nan, children(None, jnp.concatenate(other), "independent")))
    parent, roots = None, training.keys(seeds, r, scoring.RETRAINING)
    for epoch in sorted(study.spawn):
        step = training.steps(settings[0], data, epoch)
        parent = training.train(
            *(settings, roots),
            num_steps=step,
            recorder=job.stage(f"parent {step}"),
            name="parent",
            start=parent,
            labels=labels,
            **options,
        ).state
        here = meshes.fetch(parent)
        both = jax.tree.map(lambda x: jnp.concatenate([x, x]), here)
        found.append((epoch, children(both, jnp.concatenate(other), f"children {step}")))
    return [
        Table(_barriers(found, mine, every, p, r, study), {name: bank[name] for name in SHARED})
        for p, (mine, bank) in enumerate(zip(chosen, banks, strict=True))
    ]


def _extremes(point: Config, bank: scoring.Arrays, study: Connectivity) -> dict[str, np.ndarray]:
    """The hardest, the easiest, and random examples."""
    mean, m = scoring.mean(bank, f"el2n@{study.scored_at:g}"), study.examples
    return {
        "high": scores.keep(mean, m, "highest", seed=point.seed),
        "low": scores.keep(mean, m, "lowest", seed=point.seed),
        "random": scoring.chosen("random", bank, m, point.seed, 0, at=0.0),
    }


def _barriers(found, chosen, every, p: int, r: int, study: Connectivity) -> dict[str, np.ndarray]:
    columns: dict[str, list] = {}
    places, here = alphas(study.points), slice(p * r, (p + 1) * r)
    for epoch, paths in found:
        for subset, rows in chosen.items():
            at = np.searchsorted(every, rows)
            error, loss = (paths[m][:, here][..., at].mean(axis=-1) for m in ("accuracy", "loss"))
            for replica in range(r):
                row = {
                    "stage": "connectivity",
                    "spawn": epoch,
                    "subset": subset,
                    "replica": replica,
                    "error_barrier": barrier(1 - error[:, replica], places),
                    "loss_barrier": barrier(loss[:, replica], places),
                    "end_error": 1 - error[[0, -1], replica].mean(),
                    "diverged": paths["diverged"][p * r + replica],
                }
                for name, value in row.items():
                    columns.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def turn(job: Job) -> list[Table]:
    """Rows for each (order, group, epoch, replica): how its kernel turned over the epoch before.

    Groups of order ``el2n`` are examples of neighbouring mean EL2N, ``rank`` the middle of a group
    in 0 (easiest) .. 1; those of order ``random`` are neighbours in a random order. ``el2n`` is the
    group's mean score, ``mislabelled`` the part of it whose labels are wrong.
    """
    points, data, banks, study = job.points, job.data, job.banks(), job.points[0].study
    assert isinstance(study, Velocity)
    r, m, n = study.replicas, study.examples, len(data.train)
    starts = np.round(np.linspace(0, n - m, study.groups)).astype(int)
    means = [scoring.mean(bank, f"el2n@{study.scored_at:g}") for bank in banks]
    groups = np.array(
        [_groups(mean, starts, m, p.seed) for mean, p in zip(means, points, strict=True)]
    )
    net = training.net_of(points[0].model, data)
    epochs = {training.steps(job.settings[0], data, e): e for e in range(study.epochs + 1)}
    results = training.train(
        *(job.settings, training.keys(job.seeds, r, scoring.RETRAINING), net, data.train),
        *(max(epochs), job.mesh, job.recorder),
        name="velocity",
        probes=[KernelVelocity(net, data.train, np.repeat(groups, r, axis=0), tuple(epochs))],
        labels=np.repeat([bank["labels"] for bank in banks], r, axis=0),
    )
    velocities = {
        epoch: results.arrays[f"kernel.velocity@{step}"] for step, epoch in epochs.items() if epoch
    }
    tables = []
    for p, bank in enumerate(banks):
        here = slice(p * r, (p + 1) * r)
        each = np.stack([found[here] for found in velocities.values()])  # [epoch, replica, group]
        place = {
            "order": np.repeat(["el2n", "random"], study.groups),
            "rank": np.tile((starts + m / 2) / n, 2),
            "el2n": means[p][groups[p]].mean(axis=1),
            "mislabelled": bank["mislabelled"][groups[p]].mean(axis=1),
        }
        columns = {
            "stage": np.full(each.size, "velocity"),
            "epoch": np.repeat(list(velocities), each[0].size),
            "replica": np.tile(np.repeat(np.arange(r), each.shape[2]), len(each)),
            "diverged": np.tile(
                np.repeat(results.arrays["diverged"][here], each.shape[2]), len(each)
            ),
            **{name: np.tile(values, each[:, :, 0].size) for name, values in place.items()},
            "velocity": each.reshape(-1),
        }
        tables.append(Table(columns, {name: bank[name] for name in SHARED}))
    return tables


def _groups(mean: np.ndarray, starts: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Rows of the groups in the order of the score, then of those in a random order."""
    draw = np.random.Generator(np.random.PCG64([seed, scoring.RANDOM]))
    orders = (np.argsort(mean, kind="stable"), draw.permutation(len(mean)))
    return np.array([order[s : s + size] for order in orders for s in starts])
