"""Populations of runs of a study's points, through the one step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, models, optim, task
from dynamics import mesh as meshes
from dynamics.data import augment
from dynamics.data.sources import Splits
from dynamics.data.stream import stream
from dynamics.optim import Train
from dynamics.probes import Evaluate
from dynamics.record import Recorder
from dynamics.types import Dataset, Results, Task, TrainState

SCORING, RETRAINING, RANDOM, CHILD, OTHER = range(5)  # purposes of the seed
ROWS = 500  # of the training loss that are kept of a long run, about


class Subset(NamedTuple):
    """What is trained on: the columns that name it, and its rows for each paired seed."""

    columns: dict[str, Any]
    rows: list[np.ndarray]


def net_of(model: models.Model, data: Splits) -> Task:
    """The classification task of a model config."""
    return task.of_dataset(models.make(model, data.num_classes), data.train)


def steps(train: Train, data: Splits, epochs: float) -> int:
    """The steps of so many epochs of the full data, whatever is trained on."""
    return round(epochs * (len(data.train) // train.batch_size))


def keys(seeds: Sequence[int], count: int, purpose: int) -> jax.Array:
    """Root keys [P * count]: replica r of a point depends on its seed and r alone."""
    roots = [jax.random.fold_in(jax.random.key(seed), purpose) for seed in seeds]
    return jax.numpy.concatenate(
        [jax.vmap(jax.random.fold_in, (None, 0))(root, np.arange(count)) for root in roots]
    )


def train(
    settings: Sequence[Train],
    roots: jax.Array,
    net: Task,
    data: Dataset,
    num_steps: int,
    mesh: Mesh | None,
    recorder: Recorder | None,
    *,
    name: str,
    total: int | None = None,
    start: TrainState | None = None,
    probes: Sequence[Any] = (),
    **subset: Any,
) -> Results:
    """Train a replica for each of ``roots`` [P * members], ``members`` for each of ``settings``.

    From ``start`` if given, with schedules over ``total`` steps. ``subset`` are a stream's rows,
    sizes and labels.
    """
    first, members = settings[0], len(roots) // len(settings)
    optimizer = optim.make(first, total or num_steps)
    scalars = [optim.hyperparameters(setting) for setting in settings]
    mesh = mesh or meshes.for_population(len(roots))
    if start is None:
        hyperparameters = {k: np.repeat([s[k] for s in scalars], members) for k in scalars[0]}
        state = fit.init(net, optimizer, roots, hyperparameters, mesh)
    else:
        again = dataclasses.replace(start, key=roots)
        state = jax.device_put(again, meshes.over_replicas(mesh))
    change = augment.crop_and_flip() if first.augment == "crop_flip" else None
    batches = stream(data, first.batch_size, roots, augment=change, **subset)
    return fit.fit(
        *(net, optimizer, state, batches, num_steps, mesh),
        probes=probes,
        store=recorder,
        name=name,
        record_every=max(1, num_steps // ROWS),
    )


def retrained(
    settings: Sequence[Train],
    seeds: Sequence[int],
    net: Task,
    subsets: Sequence[Sequence[Subset]],
    banks: Sequence[dict[str, np.ndarray]],
    data: Splits,
    epochs: float,
    mesh: Mesh | None,
    recorder: Recorder | None,
    name: str = "retrain",
) -> list[dict[str, np.ndarray]]:
    """Train every subset of every point from scratch, with seeds paired across subsets.

    ``banks`` are the points' scores. Rows of each point: the subsets' columns, ``kept``, ``rarest``
    (examples of the class that has fewest left), ``wrong`` (the part whose labels are wrong),
    ``replica``, and of the last epoch ``test_accuracy`` (0..1) and ``test_loss`` (nats), NaN where
    the run ``diverged``.
    """
    labels = [bank["labels"] for bank in banks]
    r, s, n = len(subsets[0][0].rows), len(subsets[0]), len(data.train)
    num_steps = max(1, steps(settings[0], data, epochs))
    rows = np.zeros((len(settings), s, r, n), np.int32)
    sizes = np.zeros((len(settings), s, r), np.int32)
    for p, mine in enumerate(subsets):
        for i, subset in enumerate(mine):
            for seed, kept in enumerate(subset.rows):
                rows[p, i, seed, : len(kept)], sizes[p, i, seed] = kept, len(kept)
    roots = keys(seeds, r, RETRAINING).reshape(len(settings), 1, r)
    results = train(
        *(settings, jax.numpy.repeat(roots, s, axis=1).reshape(-1), net, data.train),
        *(num_steps, mesh, recorder),
        name=name,
        probes=[Evaluate(net, data.test, (num_steps,))],
        labels=np.repeat(labels, s * r, axis=0),
        rows=rows.reshape(-1, n),
        sizes=sizes.reshape(-1),
    )
    tested = tested_at(results, num_steps)
    tables = []
    for p, mine in enumerate(subsets):
        here = slice(p * s * r, (p + 1) * s * r)
        classes = [
            np.bincount(labels[p][k], minlength=data.num_classes) for m in mine for k in m.rows
        ]
        columns = {name: np.repeat([m.columns[name] for m in mine], r) for name in mine[0].columns}
        columns |= {
            "kept": sizes[p].reshape(-1),
            "rarest": np.array([counts.min() for counts in classes]),
            "wrong": np.array([banks[p]["mislabelled"][k].mean() for m in mine for k in m.rows]),
            "replica": np.tile(np.arange(r), s),
        }
        tables.append(columns | {name: values[here] for name, values in tested.items()})
    return tables


def tested_at(results: Results, step: int) -> dict[str, np.ndarray]:
    """Test accuracy and loss of each replica after ``step`` steps, and when it diverged."""
    last = (results.rows["step"] == step) & ~np.isnan(results.rows["test.accuracy"])
    whole = np.isinf(results.arrays["diverged"])
    found = {f"test_{m}": results.rows[f"test.{m}"][last] for m in ("accuracy", "loss")}
    found = {name: np.where(whole, values, np.nan) for name, values in found.items()}
    return found | {"diverged": results.arrays["diverged"]}


def check(settings: Train, data: Splits, mesh: Mesh | None, members: int, kept: float) -> None:
    """ValueError unless the smallest subset fills a batch and the mesh takes the population."""
    if mesh is not None:
        meshes.check(mesh, members, settings.batch_size)
    n = len(data.train)
    if settings.batch_size > round(kept * n):
        raise ValueError(
            f"train.batch_size {settings.batch_size} is more than the {round(kept * n)} examples "
            f"that keeping {kept:g} leaves of {n}: take a smaller batch or keep more"
        )
