"""Populations of runs of an experiment's points, through the one step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, models, optim, task
from dynamics import mesh as meshes
from dynamics.data import augment
from dynamics.data.sources import Splits
from dynamics.data.stream import stream
from dynamics.optim import Train
from dynamics.record import Recorder
from dynamics.types import Dataset, Results, Revision, Stream, Task, TrainState

ROWS = 500  # of the training loss that are kept of a long run, about


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
    scalars: Mapping[str, Any] | None = None,
    probes: Sequence[Any] = (),
    revision: Revision | None = None,
    feed: Callable[[Stream], Stream] = lambda stream: stream,
    record_every: int | None = None,
    **subset: Any,
) -> Results:
    """Train a replica for each of ``roots`` [P * members], ``members`` for each of ``settings``.

    From ``start`` if given, with schedules over ``total`` steps. ``scalars`` are hyperparameters of
    the task, one number or one for each replica. ``subset`` are a stream's rows, sizes and labels;
    ``feed`` makes another stream of it.
    """
    first, members = settings[0], len(roots) // len(settings)
    optimizer = optim.make(first, total or num_steps)
    own = [optim.hyperparameters(setting) for setting in settings]
    mesh = mesh or meshes.for_population(len(roots), first.batch_size)
    if start is None:
        hyperparameters = {k: np.repeat([one[k] for one in own], members) for k in own[0]}
        state = fit.init(net, optimizer, roots, hyperparameters | dict(scalars or {}), mesh)
    else:
        again = dataclasses.replace(start, key=roots)
        state = meshes.put(again, meshes.over_replicas(mesh), mesh)
    change = augment.crop_and_flip() if first.augment == "crop_flip" else None
    batches = stream(data, first.batch_size, roots, augment=change, **subset)
    return fit.fit(
        *(net, optimizer, state, feed(batches), num_steps, mesh),
        probes=probes,
        revision=revision,
        store=recorder,
        name=name,
        record_every=record_every or max(1, num_steps // ROWS),
    )


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


def stacked(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Tables one after the other; nan where a part has no such column."""
    names = dict.fromkeys(name for part in parts for name in part)
    lengths = [len(next(iter(part.values()))) for part in parts]
    return {
        name: np.concatenate(
            [part.get(name, np.full(n, np.nan)) for part, n in zip(parts, lengths, strict=True)]
        )
        for name in names
    }
