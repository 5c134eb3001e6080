"""Studies of where training leads and how its kernel turns, on examples of high and low score."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import scores
from dynamics.data.sources import Splits
from dynamics.landscape import barrier
from dynamics.probes import KernelVelocity, Path
from dynamics.probes.path import alphas, whole
from dynamics.record import Recorder, Table
from dynamics.types import TrainState
from experiments.data_diet import scoring, training
from experiments.data_diet.config import Config, Connectivity, Velocity
from experiments.data_diet.config import scoring as scoring_config
from experiments.data_diet.retraining import SHARED
from experiments.data_diet.scoring import Scored

SUBSETS = ("high", "low", "random")


def connect(
    points: Sequence[Config],
    scored: Scored,
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[Table]:
    """Rows for each (spawn, subset, replica): the barriers between two children at the end.

    ``error_barrier`` is of the training error (0..1), ``loss_barrier`` of the loss (nats), on the
    labels trained on, noise included. ``spawn`` is the epoch of the parent that both children
    begin with, nan where they share nothing. Batch statistics are re-estimated on the path.
    """
    study, r = points[0].study, points[0].study.replicas  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(study, Connectivity)
    banks = scored([scoring_config(point) for point in points])
    settings, seeds = [p.train for p in points], [p.seed for p in points]
    net, total = (
        training.net_of(points[0].model, data),
        training.steps(settings[0], data, study.epochs),
    )
    chosen = [_extremes(point, bank, study) for point, bank in zip(points, banks, strict=True)]
    every = np.unique(np.concatenate([rows for mine in chosen for rows in mine.values()]))
    labels = np.repeat([bank["labels"] for bank in banks], r, axis=0)
    options = {"net": net, "data": data.train, "mesh": mesh, "total": total}
    subset = dataclasses.replace(
        data.train, **{k: getattr(data.train, k)[every] for k in ("x", "y", "index")}
    )
    path = Path(
        *(net, subset, (total,)),
        points=study.points,
        labels=np.tile(labels, (2, 1))[:, every],
        train=data.train,
    )

    def children(start: TrainState | None, roots: jax.Array, name: str) -> dict[str, np.ndarray]:
        results = training.train(
            settings * 2,
            roots,
            num_steps=total,
            recorder=recorder and recorder.stage(name),
            name="children",
            start=start,
            probes=[path],
            labels=np.tile(labels, (2, 1)),
            **options,
        )
        return {m: whole(results.arrays[f"path.{m}@{total}"]) for m in ("accuracy", "loss")}

    other = [training.keys(seeds, r, purpose) for purpose in (training.CHILD, training.OTHER)]
    found: list[tuple[float, dict[str, np.ndarray]]] = []
    if study.independent:
        found.append((np.nan, children(None, jnp.concatenate(other), "independent")))
    parent, roots = None, training.keys(seeds, r, training.RETRAINING)
    for epoch in sorted(study.spawn):
        step = training.steps(settings[0], data, epoch)
        parent = training.train(
            *(settings, roots),
            num_steps=step,
            recorder=recorder and recorder.stage(f"parent {step}"),
            name="parent",
            start=parent,
            labels=labels,
            **options,
        ).state
        both = jax.tree.map(lambda x: jnp.concatenate([x, x]), parent)
        found.append((epoch, children(both, jnp.concatenate(other), f"children {step}")))
    return [
        Table(_barriers(found, mine, every, p, r, study), {name: bank[name] for name in SHARED})
        for p, (mine, bank) in enumerate(zip(chosen, banks, strict=True))
    ]


def _extremes(point: Config, bank: scoring.Arrays, study: Connectivity) -> dict[str, np.ndarray]:
    """The hardest, the easiest, and random examples."""
    mean, m = scoring.mean(bank, f"el2n@{study.scored_at:g}"), study.examples
    if 2 * m > len(mean):
        raise ValueError(f"study.examples must be at most half of {len(mean)}, got {m}")
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
                }
                for name, value in row.items():
                    columns.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}


def turn(
    points: Sequence[Config],
    scored: Scored,
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[Table]:
    """Rows for each (group, epoch, replica): the velocity of its kernel over the epoch before.

    Groups are examples of neighbouring mean EL2N: ``rank`` is the middle of a group in 0 (easiest)
    .. 1, ``el2n`` its mean score, ``mislabelled`` the part of it whose labels are wrong.
    """
    study = points[0].study
    assert isinstance(study, Velocity)
    r, m, n = study.replicas, study.examples, len(data.train)
    if m > n:
        raise ValueError(f"study.examples must be at most {n}, got {m}")
    banks = scored([scoring_config(point) for point in points])
    starts = np.round(np.linspace(0, n - m, study.groups)).astype(int)
    means = [scoring.mean(bank, f"el2n@{study.scored_at:g}") for bank in banks]
    orders = [np.argsort(mean, kind="stable") for mean in means]
    groups = np.array([[order[s : s + m] for s in starts] for order in orders])
    settings, seeds = [p.train for p in points], [p.seed for p in points]
    net = training.net_of(points[0].model, data)
    epochs = {training.steps(settings[0], data, e): e for e in range(study.epochs + 1)}
    probe = KernelVelocity(net, data.train, np.repeat(groups, r, axis=0), tuple(epochs))
    results = training.train(
        *(settings, training.keys(seeds, r, training.RETRAINING), net, data.train),
        *(max(epochs), mesh, recorder),
        name="velocity",
        probes=[probe],
        labels=np.repeat([bank["labels"] for bank in banks], r, axis=0),
    )
    tables = []
    for p, bank in enumerate(banks):
        rows = []
        for step, epoch in epochs.items():
            if epoch:
                found = results.arrays[f"kernel.velocity@{step}"][p * r : (p + 1) * r]
                rows += [
                    (
                        epoch,
                        (start + m / 2) / n,
                        means[p][g].mean(),
                        bank["mislabelled"][g].mean(),
                        k,
                        found[k, i],
                    )
                    for i, (start, g) in enumerate(zip(starts, groups[p], strict=True))
                    for k in range(r)
                ]
        names = ("epoch", "rank", "el2n", "mislabelled", "replica", "velocity")
        columns = {
            name: np.array(values)
            for name, values in zip(names, zip(*rows, strict=True), strict=True)
        }
        stage = {"stage": np.full(len(rows), "velocity")}
        tables.append(Table(stage | columns, {name: bank[name] for name in SHARED}))
    return tables
