"""Studies that retrain on subsets: against the fraction, the epoch, the window; transfer."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from dynamics import scores, training
from dynamics.probes import Evaluate
from dynamics.record import Array, Findings
from experiments.data_diet import scoring
from experiments.data_diet.bank import Bank
from experiments.data_diet.config import Config, Pruning, Timing, Transfer, Window
from experiments.experiment import Job

SHARED = ("input_norm", "index", "labels", "mislabelled")
RETRAINED = ("fraction", "kept", "rarest", "wrong", "replica", "test_accuracy", "test_loss",
             "diverged")  # fmt: skip


class Subset(NamedTuple):
    """What is trained on: the columns that name it, and its rows for each paired seed, which
    chose them by the scores of its own draw.
    """

    columns: dict[str, Any]
    rows: list[np.ndarray]


def prune(job: Job[Config, Pruning]) -> Findings:
    """Frame ``pruning``, a row for each (method, fraction, replica); ``full`` is all data.

    Arrays: ``el2n``, ``grand`` f32[R, N] at ``scored_at``, ``el2n_init``, ``grand_init`` f32[R, N]
    if epoch 0 was scored, of all runs that scored, and what the scoring stage says of the examples.
    """
    banks = scoring.banks(job)
    drawn = scoring.drawn(banks, job.study.replicas)

    def subsets(point: Config, own: list[Bank]) -> list[Subset]:
        study = job.study
        options = {"at": study.scored_at, "balanced": study.balanced, "cutoff": study.cutoff}
        return [everything(own, method="full", fraction=1.0)] + [
            subset(point, own, m, f, {"method": m, "fraction": f}, **options)
            for f in study.fractions
            for m in study.methods
        ]

    def kept(bank: Bank) -> dict[str, np.ndarray]:
        init = {f"{s}_init": bank.at(s, 0.0) for s in ("el2n", "grand") if bank.has(s, 0.0)}
        return {s: bank.at(s, job.study.scored_at) for s in ("el2n", "grand")} | init

    frame = retrained(job, drawn, [subsets(p, b) for p, b in zip(job.points, drawn, strict=True)])
    arrays = shared(banks) | over_points([kept(bank) for bank in banks])
    return Findings({"pruning": frame.select("point", "method", *RETRAINED),
                     "scored": scored(banks)}, arrays)  # fmt: skip


def time(job: Job[Config, Timing]) -> Findings:
    """Frame ``timing``, a row for each (method, scored_at, replica); null for random and full.

    Scores of the training stream (forgetting, aum) begin at the first epoch above 0.
    """
    study, banks = job.study, scoring.banks(job)
    drawn = scoring.drawn(banks, study.replicas)

    def subsets(point: Config, own: list[Bank]) -> list[Subset]:
        out = [everything(own, method="full", fraction=1.0)]
        cells: list[tuple[str, float | None]] = [("random", None)]
        for score, epoch in itertools.product(study.methods, point.score.epochs):
            cells += [(f"{score}_hard", epoch)] if own[0].has(score, epoch) else []
        for method, epoch in cells:
            columns = {"method": method, "fraction": study.kept, "scored_at": epoch}
            options = {"at": epoch or 0.0, "balanced": study.balanced}
            out.append(subset(point, own, method, study.kept, columns, **options))
        return out

    frame = retrained(job, drawn, [subsets(p, b) for p, b in zip(job.points, drawn, strict=True)])
    frame = frame.select("point", "method", "scored_at", *RETRAINED)
    return Findings({"timing": frame, "scored": scored(banks)}, shared(banks))


def slide(job: Job[Config, Window]) -> Findings:
    """Frame ``window``, a row for each (dropped, replica) of method ``window``, and of ``random``,
    ``easy`` and ``full``, which have no ``dropped``.

    ``dropped`` is the fraction of hardest examples left out, ``offset`` the number of easiest.
    """
    study, banks = job.study, scoring.banks(job)
    drawn = scoring.drawn(banks, study.replicas)

    def within(point: Config, bank: Bank, replica: int, drop: int) -> np.ndarray:
        labels = bank["labels"] if study.balanced else None
        options = {"drop": drop, "labels": labels, "seed": scoring.seed_of(point.seed, replica)}
        return scores.window(bank.mean("el2n", study.scored_at), count, **options)

    n = len(job.data.train)
    count = round(study.kept * n)

    def subsets(point: Config, own: list[Bank]) -> list[Subset]:
        out = [everything(own, method="full", fraction=1.0)]
        for method, name in (("random", "random"), ("el2n_easy", "easy")):
            columns = {"method": name, "fraction": study.kept}
            options = {"at": study.scored_at, "balanced": study.balanced}
            out.append(subset(point, own, method, study.kept, columns, **options))
        for part in study.dropped:
            drop = min(round(part * n), n - count)
            rows = [within(point, bank, r, drop) for r, bank in enumerate(own)]
            columns = {"method": "window", "fraction": study.kept, "dropped": part}
            out.append(Subset(columns | {"offset": n - count - drop}, rows))
        return out

    frame = retrained(job, drawn, [subsets(p, b) for p, b in zip(job.points, drawn, strict=True)])
    frame = frame.select("point", "method", "dropped", "offset", *RETRAINED)
    el2n = over_points([{"el2n": bank.at("el2n", study.scored_at)} for bank in banks])
    return Findings({"window": frame, "scored": scored(banks)}, shared(banks) | el2n)


def transfer(job: Job[Config, Transfer]) -> Findings:
    """Frame ``transfer``, a row for each (target, source, replica): ``target`` is trained on the
    hardest of ``source``.

    Settings: ``own``, ``model`` (the other architecture) and ``rate`` (the other learning rate);
    source ``random`` is a random subset, ``full`` all data. Arrays: ``el2n_<setting>`` f32[R, N];
    frame ``scored`` has a column ``setting``.
    """
    study, settings = job.study, ("own", "model", "rate")
    changed = {name: [changed_to(point, study, name) for point in job.points] for name in settings}
    banks = {name: scoring.banks_of(job, points) for name, points in changed.items()}
    drawn = {name: scoring.drawn(found, study.replicas) for name, found in banks.items()}
    frames = [
        retrained(
            dataclasses.replace(job, points=changed[target]),
            drawn["own"],
            [_sources(job, target, drawn, p) for p in range(len(job.points))],
            target,
        )
        for target in settings
    ]
    frame = pl.concat(frames).select("point", "target", "source", *RETRAINED)
    el2n = {name: [bank.at("el2n", study.scored_at) for bank in banks[name]] for name in settings}
    parts = [{f"el2n_{name}": el2n[name][p] for name in settings} for p in range(len(job.points))]
    runs = pl.concat([scored(banks[name]).with_columns(setting=pl.lit(name)) for name in settings])
    arrays = shared(banks["own"]) | over_points(parts)
    return Findings({"transfer": frame, "scored": runs}, arrays)


def _sources(
    job: Job[Config, Transfer], target: str, drawn: dict[str, list[list[Bank]]], p: int
) -> list[Subset]:
    """What a target is trained on: all data, a random subset, the hardest by each setting."""
    study, own, point = job.study, drawn["own"][p], job.points[p]
    subsets = [everything(own, target=target, source="full", fraction=1.0)]
    for source in ("random", *drawn):
        by = own if source == "random" else drawn[source][p]
        method = "random" if source == "random" else "el2n_hard"
        columns = {"target": target, "source": source, "fraction": study.kept}
        subsets.append(subset(point, by, method, study.kept, columns, at=study.scored_at))
    return subsets


def changed_to(point: Config, study: Transfer, name: str) -> Config:
    """The point with the model or the learning rate of its study."""
    if name == "model":
        return dataclasses.replace(point, model=study.model)
    if name == "rate":
        rule = dataclasses.replace(point.train.optimizer, learning_rate=study.learning_rate)
        return dataclasses.replace(point, train=dataclasses.replace(point.train, optimizer=rule))
    return point


def everything(own: Sequence[Bank], **columns: Any) -> Subset:
    """All examples, for each paired seed."""
    return Subset(columns, [np.arange(len(bank)) for bank in own])


def subset(
    point: Config,
    own: Sequence[Bank],
    method: str,
    fraction: float,
    columns: dict[str, Any],
    **options: Any,
) -> Subset:
    """What a method keeps, for each paired seed by the scores of its own draw."""
    rows = [
        scoring.chosen(method, bank, round(fraction * len(bank)), point.seed, replica, **options)
        for replica, bank in enumerate(own)
    ]
    return Subset(columns, rows)


def retrained(
    job: Job[Config, Any],
    drawn: Sequence[Sequence[Bank]],
    subsets: Sequence[Sequence[Subset]],
    name: str | None = None,
) -> pl.DataFrame:
    """Train every subset of every point from scratch, with seeds paired across subsets, each on
    the labels of its own draw: ``drawn[p][replica]``.

    The members' table with, for each, ``kept``, ``rarest`` (examples of the class that has fewest
    left), ``wrong`` (the part whose labels are wrong), and of the last epoch ``test_accuracy``
    (0..1) and ``test_loss`` (nats), null where the run ``diverged``.
    """
    config, n = job.config, len(job.data.train)
    num_steps = training.steps(config.train, job.data, job.study.epochs)
    members = training.table(
        [{"seed": point.seed, **point.train.optimizer.hyperparameters()} for point in job.points],
        lambda p: [subset.columns for subset in subsets[p]],
        job.study.replicas,
    )
    chosen = [kept for mine in subsets for subset in mine for kept in subset.rows]
    rows = np.zeros((len(chosen), n), np.int32)
    for k, kept in enumerate(chosen):
        rows[k, : len(kept)] = kept
    own = [drawn[p][replica] for p, replica in members.select("point", "replica").rows()]
    trained = scoring.fitted(
        job,
        config,
        members,
        scoring.RETRAINING,
        num_steps,
        name="retrain" if name is None else f"retrain {name}",
        store=job.recorder if name is None else job.stage(name),
        probes=[Evaluate((num_steps,), on="test")],
        labels=np.stack([bank["labels"] for bank in own]),
        rows=rows,
        sizes=np.array([len(kept) for kept in chosen], np.int32),
    )
    classes = [
        np.bincount(bank["labels"][kept], minlength=job.data.num_classes).min()
        for bank, kept in zip(own, chosen, strict=True)
    ]
    wrong = [bank["mislabelled"][kept].mean() for bank, kept in zip(own, chosen, strict=True)]
    tested = trained.at("test", num_steps).with_columns(
        kept=pl.Series([len(kept) for kept in chosen]),
        rarest=pl.Series(classes),
        wrong=pl.Series(wrong),
    )
    return tested.rename({"accuracy": "test_accuracy", "loss": "test_loss"})


def scored(banks: Sequence[Bank]) -> pl.DataFrame:
    """A row for each (point, replica) of the scoring runs: its draw, and where it ``diverged``."""
    return pl.concat([bank.runs.with_columns(point=pl.lit(p)) for p, bank in enumerate(banks)])


def shared(banks: Sequence[Bank]) -> dict[str, Array]:
    """What the scoring stage says of the examples."""
    stored = {name: banks[0].arrays[name] for name in SHARED}
    return {
        name: Array(np.stack([bank[name] for bank in banks]), ("point", *array.dims))
        for name, array in stored.items()
    }


def over_points(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, Array]:
    """Arrays [N] or [R, N] of each point as ones with a dim ``point``."""
    dims = {1: ("point", "example"), 2: ("point", "replica", "example")}
    return {
        name: Array(np.stack([part[name] for part in parts]), dims[parts[0][name].ndim])
        for name in parts[0]
    }
