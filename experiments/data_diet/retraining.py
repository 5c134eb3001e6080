"""Studies that retrain on subsets: against the fraction, the epoch, the window; transfer."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import scores
from dynamics.data.sources import Splits
from dynamics.optim import Train
from dynamics.probes import Evaluate
from dynamics.record import Recorder, Table
from dynamics.types import Task
from experiments import training
from experiments.data_diet import scoring
from experiments.data_diet.config import Config, Pruning, Timing, Transfer, Window
from experiments.data_diet.scoring import Arrays, Job

SHARED = ("input_norm", "index", "labels", "mislabelled", "diverged")


class Subset(NamedTuple):
    """What is trained on: the columns that name it, and its rows for each paired seed."""

    columns: dict[str, Any]
    rows: list[np.ndarray]


Choose = Callable[[Config, Arrays], list[Subset]]


def prune(job: Job) -> list[Table]:
    """Rows for each (method, fraction, replica); ``full`` is all data.

    Arrays: ``el2n``, ``grand`` f32[R, N] at ``scored_at``, ``el2n_init``, ``grand_init`` f32[R, N]
    if epoch 0 was scored, and what the scoring stage says of the examples.
    """

    def choose(point: Config, arrays: Arrays) -> list[Subset]:
        study = point.study
        assert isinstance(study, Pruning)
        options = {"at": study.scored_at, "balanced": study.balanced, "cutoff": study.cutoff}
        return [_all(arrays, study.replicas, fraction=1.0)] + [
            _subset(point, arrays, m, f, study.replicas, {"fraction": f}, **options)
            for f in study.fractions
            for m in study.methods
        ]

    def kept(point: Config, arrays: Arrays) -> Arrays:
        assert isinstance(point.study, Pruning)
        names = {f"{s}@{point.study.scored_at:g}": s for s in ("el2n", "grand")}
        names |= {f"{s}@0": f"{s}_init" for s in ("el2n", "grand") if f"{s}@0" in arrays}
        return {short: arrays[name] for name, short in names.items()}

    return _retrained(job, choose, kept)


def time(job: Job) -> list[Table]:
    """Rows for each (method, scored_at, replica); ``scored_at`` is nan for ``random`` and ``full``.

    Scores of the training stream (forgetting, aum) begin at the first epoch above 0.
    """

    def choose(point: Config, arrays: Arrays) -> list[Subset]:
        study = point.study
        assert isinstance(study, Timing)
        rest = {"fraction": study.kept, "scored_at": np.nan}
        out = [_all(arrays, study.replicas, **rest | {"fraction": 1.0})]
        share = {"balanced": study.balanced}
        kept = (study.kept, study.replicas)
        out.append(_subset(point, arrays, "random", *kept, rest, at=0.0, **share))
        for method, epoch in itertools.product(study.methods, point.score.epochs):
            if f"{method}@{epoch:g}" in arrays:
                columns = {"fraction": study.kept, "scored_at": epoch}
                hard = f"{method}_hard"
                out.append(_subset(point, arrays, hard, *kept, columns, at=epoch, **share))
        return out

    return _retrained(job, choose, lambda *_: {})


def slide(job: Job) -> list[Table]:
    """Rows for each (dropped, replica) of method ``window``, and of ``random``, ``easy``, ``full``.

    ``dropped`` is the fraction of hardest examples left out, ``offset`` the number of easiest.
    """

    def choose(point: Config, arrays: Arrays) -> list[Subset]:
        study, n = point.study, len(arrays["index"])
        assert isinstance(study, Window)
        mean = scoring.mean(arrays, f"el2n@{study.scored_at:g}")
        count, r = round(study.kept * n), study.replicas
        labels = arrays["labels"] if study.balanced else None
        rest = {"fraction": study.kept, "dropped": np.nan, "offset": np.nan}
        out = [_all(arrays, r, **rest | {"fraction": 1.0})]
        for method, name in (("random", "random"), ("el2n_easy", "easy")):
            options = {"at": study.scored_at, "balanced": study.balanced}
            found = _subset(point, arrays, method, study.kept, r, rest, **options)
            out.append(found._replace(columns=found.columns | {"method": name}))
        for part in study.dropped:
            drop = min(round(part * n), n - count)
            rows = scores.window(mean, count, drop=drop, labels=labels, seed=point.seed)
            columns = {"method": "window", "dropped": part, "offset": n - count - drop}
            out.append(Subset(rest | columns, [rows] * r))
        return out

    def kept(point: Config, arrays: Arrays) -> Arrays:
        assert isinstance(point.study, Window)
        return {"el2n": arrays[f"el2n@{point.study.scored_at:g}"]}

    return _retrained(job, choose, kept)


def transfer(job: Job) -> list[Table]:
    """Rows for each (target, source, replica): ``target`` is trained on the hardest of ``source``.

    Settings: ``own``, ``model`` (the other architecture) and ``rate`` (the other learning rate);
    source ``random`` is a random subset, ``full`` all data. Arrays: ``el2n_<setting>`` f32[R, N],
    and ``diverged_<setting>`` f64[R] of the runs that scored.
    """
    study, data = job.points[0].study, job.data
    assert isinstance(study, Transfer)
    settings = {
        name: [_changed(point, name) for point in job.points] for name in ("own", "model", "rate")
    }
    banks = {name: job._replace(points=changed).banks() for name, changed in settings.items()}
    tables: list[list[dict]] = [[] for _ in job.points]
    for target, changed in settings.items():
        rows = retrained(
            *([point.train for point in changed], job.seeds),
            training.net_of(changed[0].model, data),
            [_sources(point, target, banks, p) for p, point in enumerate(job.points)],
            *(banks["own"], data, study.epochs, job.mesh, job.stage(target)),
            f"retrain {target}",
        )
        for p, found in enumerate(rows):
            tables[p].append(found)
    out = []
    for p, parts in enumerate(tables):
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        at = f"el2n@{study.scored_at:g}"
        arrays = {f"el2n_{name}": bank[p][at] for name, bank in banks.items()}
        arrays |= {f"diverged_{name}": bank[p]["diverged"] for name, bank in banks.items()}
        arrays |= {name: banks["own"][p][name] for name in SHARED}
        out.append(Table({"stage": np.full(len(columns["kept"]), "transfer")} | columns, arrays))
    return out


def _sources(point: Config, target: str, banks: dict[str, list[Arrays]], p: int) -> list[Subset]:
    """What a target is trained on: all data, a random subset, the hardest by each setting."""
    study, own = point.study, banks["own"][p]
    assert isinstance(study, Transfer)
    subsets = [_all(own, study.replicas, target=target, source="full", fraction=1.0)]
    for source in ("random", *banks):
        arrays = own if source == "random" else banks[source][p]
        method = "random" if source == "random" else "el2n_hard"
        columns = {"target": target, "source": source, "fraction": study.kept}
        kept = (study.kept, study.replicas)
        subsets.append(_subset(point, arrays, method, *kept, columns, at=study.scored_at))
    return subsets


def _changed(point: Config, name: str) -> Config:
    """The point with the model or the learning rate of its study."""
    study = point.study
    assert isinstance(study, Transfer)
    if name == "model":
        return dataclasses.replace(point, model=study.model)
    if name == "rate":
        train = dataclasses.replace(point.train, learning_rate=study.learning_rate)
        return dataclasses.replace(point, train=train)
    return point


def _retrained(job: Job, choose: Choose, keep: Callable[[Config, Arrays], Arrays]) -> list[Table]:
    """The table of each point, from the subsets that it chooses by its scores."""
    banks, study = job.banks(), job.points[0].study
    assert isinstance(study, Pruning | Timing | Window)
    subsets = [choose(point, bank) for point, bank in zip(job.points, banks, strict=True)]
    net = training.net_of(job.points[0].model, job.data)
    rows = retrained(
        *(job.settings, job.seeds, net, subsets, banks, job.data),
        *(study.epochs, job.mesh, job.recorder),
    )
    stage = type(study).__name__.lower()
    tables = []
    for point, bank, columns in zip(job.points, banks, rows, strict=True):
        mine = {name: bank[name] for name in SHARED} | keep(point, bank)
        tables.append(Table({"stage": np.full(len(columns["kept"]), stage)} | columns, mine))
    return tables


def _all(arrays: Arrays, replicas: int, **columns: object) -> Subset:
    named = {"method": "full"} | columns if "source" not in columns else columns
    return Subset(named, [np.arange(len(arrays["index"]))] * replicas)


def _subset(
    point: Config,
    arrays: Arrays,
    method: str,
    fraction: float,
    replicas: int,
    columns: dict,
    **options: object,
) -> Subset:
    """What a method keeps, for each paired seed."""
    count = round(fraction * len(arrays["index"]))
    rows = [
        scoring.chosen(method, arrays, count, point.seed, replica, **options)  # pyright: ignore
        for replica in range(replicas)
    ]
    named = columns if "source" in columns else {"method": method} | columns
    return Subset(named, rows)


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
    num_steps = max(1, training.steps(settings[0], data, epochs))
    rows = np.zeros((len(settings), s, r, n), np.int32)
    sizes = np.zeros((len(settings), s, r), np.int32)
    for p, mine in enumerate(subsets):
        for i, subset in enumerate(mine):
            for seed, kept in enumerate(subset.rows):
                rows[p, i, seed, : len(kept)], sizes[p, i, seed] = kept, len(kept)
    roots = training.keys(seeds, r, scoring.RETRAINING).reshape(len(settings), 1, r)
    results = training.train(
        *(settings, jax.numpy.repeat(roots, s, axis=1).reshape(-1), net, data.train),
        *(num_steps, mesh, recorder),
        name=name,
        probes=[Evaluate(net, data.test, (num_steps,))],
        labels=np.repeat(labels, s * r, axis=0),
        rows=rows.reshape(-1, n),
        sizes=sizes.reshape(-1),
    )
    tested = training.tested_at(results, num_steps)
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
