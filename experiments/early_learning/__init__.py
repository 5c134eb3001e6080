"""Early learning and memorisation: what networks make of wrong labels, and what holds them back.

Networks fit the clean labels first, and call many wrong-labelled examples by their true class;
then cross-entropy memorises the wrong labels. Early-learning regularization (ELR) holds them to
what they said before. Methods are paired: the same split, noise, initialisation and order of
batches. Last epoch, clean test labels, unaugmented inputs in evaluation mode.

Reference: Liu, Niles-Weed, Razavian and Fernandez-Granda 2020, arXiv 2007.00151.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dynamics import losses, models, scores, statistics, task, training
from dynamics.data import corrupt
from dynamics.data import load as load_data
from dynamics.data.sources import Splits
from dynamics.data.stream import doubled
from dynamics.probes import Evaluate, Memorisation, Score
from dynamics.record import Array, Findings
from dynamics.training import Trained
from dynamics.types import Task
from experiments.early_learning.config import Config, Curves, Grid, Losses, Noise, Plus, Rates
from experiments.experiment import Experiment, Job, check_mesh, indices

__all__ = ["EXPERIMENT", "Config", "Curves", "Grid", "Losses", "Plus", "Rates", "load", "run",
           "sweep"]  # fmt: skip

TRAINING, NOISE = range(2)  # purposes of the seed
NAMED = ("point", "method", "rate", "strength", "beta", "replica", "epoch")


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """The data of a config; DataError says what is missing."""
    return load_data(config.data, folder)


def study(job: Job[Config, Any]) -> Findings:
    """Frames ``curves`` and ``detected``, or ``rates``, or ``grid``, named as the study.

    For each (method, rate, strength, beta, replica, epoch) measured: ``wrong``, the part of the
    labels that is; ``test_accuracy`` (0..1), what ``probes.Memorisation`` says of the training
    examples (null where a method has no targets, or there is nothing to take a part of), and
    ``diverged``, the step; rates and grid keep a row of who has. Arrays: ``index``, ``clean``
    i32[N]. Of Curves also ``labels`` i32[R, N], the weights at the end, by program, and
    ``detected``: ``precision`` and ``recall`` of calling wrong what a mixture of two Gaussians
    gives a small loss with probability < 1/2, at ``epoch``.
    """
    config, data, weights = job.config, job.data, {}
    last = training.steps(config.train, data, config.epochs)
    match job.config.study:
        case Curves(every=every, detected_at=early, replicas=r):
            every = training.steps(config.train, data, every)
            when = [training.steps(config.train, data, epoch) for epoch in (*early, config.epochs)]
            trained = _trained(job, every, tuple(dict.fromkeys(when)), weights)
            frames = {
                "curves": _described(trained.measured["test"], trained, job),
                "detected": _detected(trained, job),
            }
            noisy = [[labels(p, data, p.rate, k).labels for k in range(r)] for p in job.points]
            arrays = {"labels": Array(np.array(noisy), ("point", "replica", "example"))}
        case Rates() | Grid() as chosen:
            trained = _trained(job, (last,), (), {})
            tested = trained.at("test", last).with_columns(step=pl.lit(last, pl.Int64))
            frames = {type(chosen).__name__.lower(): _described(tested, trained, job)}
            arrays = {}
    arrays |= {"clean": Array(np.asarray(data.train.y), ("example",)), **indices(data.train)}
    return Findings(frames, arrays, weights)


def cells(point: Config, study: Curves | Rates | Grid) -> list[Mapping[str, Any]]:
    """What a study compares. Cells of one program train together: CE is ELR with lambda = 0."""
    match study:
        case Grid(strengths=strengths, betas=betas):
            places = itertools.product(strengths, betas)
            found = [("elr" if s else "ce", point.rate, s, b) for s, b in places if s or not b]
        case Curves() | Rates():
            rates = study.rates if isinstance(study, Rates) else (point.rate,)
            places = itertools.product(study.methods, rates)
            found = [(method, rate, point.strength, point.beta) for method, rate in places]
    return [
        {
            "method": method,
            "program": "elr" if method == "ce" else method,
            "rate": rate,
            "elr_lambda": strength if method.startswith("elr") else 0.0,
            "elr_beta": beta if method.startswith("elr") else 0.0,
            **point.train.optimizer.hyperparameters(),
        }
        for method, rate, strength, beta in found
    ]


def _trained(
    job: Job[Config, Any],
    every: int | tuple[int, ...],
    when: tuple[int, ...],
    weights: dict[str, Any],
) -> Trained:
    """All members, program by program; measured ``every`` so often, losses kept ``when`` told."""
    config, data = job.config, job.data
    clean, train = np.asarray(data.train.y), config.train

    def one(group: pl.DataFrame) -> Trained:
        program, given = group["program"][0], given_to(group, job)
        roots = training.keys(group, TRAINING)
        stream = training.batches(train, data.train, roots, labels=given)
        probes: list[Any] = [Evaluate(every, on="test")]
        probes += [Memorisation(every, given, clean, on="train")]
        if when:
            probes += [Score(scores.loss, when, name="loss", on="train", labels=given)]
        trained = training.train(
            group.with_columns(wrong=pl.Series((given != clean).mean(axis=1))),
            roots,
            method(program, config, data),
            train.optimizer,
            doubled(stream) if program == "elr_plus" else stream,
            training.steps(train, data, config.epochs),
            job.mesh,
            scalars={"elr_lambda": 0.0, "elr_beta": 0.0},
            store=job.stage(program),
            name=program,
            probes=probes,
            data={"train": data.train, "test": data.test},
        )
        weights[program] = (trained.members, trained.state)
        return trained

    return training.by_program(job.members(cells, job.study.replicas), "program", one)


def method(program: str, config: Config, data: Splits) -> Task:
    """The task of a method: what is minimised."""
    constants, counts = config.losses, (len(data.train), data.num_classes)
    chosen: dict[str, Callable[..., Any]] = {
        "elr": losses.cross_entropy,
        "elr_plus": losses.cross_entropy,
        "smoothing": functools.partial(losses.label_smoothing, epsilon=constants.epsilon),
        "gce": functools.partial(losses.generalised_cross_entropy, q=constants.q),
        "sce": functools.partial(
            losses.symmetric_cross_entropy, forward=constants.forward, reverse=constants.reverse
        ),
    }
    module = models.make(config.model, data.num_classes)
    net = task.of_dataset(module, data.train, loss=chosen[program])
    match program:
        case "elr":
            return task.elr(net, *counts)
        case "elr_plus":
            return task.elr_plus(net, *counts, **dataclasses.asdict(config.plus))
    return net


def given_to(group: pl.DataFrame, job: Job[Config, Any]) -> np.ndarray:
    """i32[K, N]: the labels that each member is trained on."""
    rows = group.select("point", "rate", "replica").rows()
    return np.stack([labels(job.points[p], job.data, rate, r).labels for p, rate, r in rows])


def labels(config: Config, data: Splits, rate: float, replica: int) -> corrupt.Noisy:
    """The labels that a replica is trained on; nested in the rate, the same for every method."""
    y, count = np.asarray(data.train.y), data.num_classes
    seed = int(np.random.SeedSequence([config.seed, NOISE, replica]).generate_state(1)[0])
    return noise(config.noise, y, rate, count, seed)


def noise(kind: Noise, y: np.ndarray, rate: float, num_classes: int, seed: int) -> corrupt.Noisy:
    """Labels with noise of a kind."""
    blocks = {
        "circular": [tuple(range(num_classes))],
        "cifar100_blocks": corrupt.CIFAR100_BLOCKS,
        "cifar100_superclasses": corrupt.CIFAR100_SUPERCLASSES,
    }
    if kind in blocks:
        return corrupt.circular(y, rate, blocks[kind], seed)
    if kind == "asymmetric_cifar10":
        return corrupt.asymmetric_cifar10(y, rate, seed)
    model = corrupt.symmetric if kind == "symmetric" else corrupt.symmetric_including
    return model(y, rate, num_classes, seed)


def _described(tested: pl.DataFrame, trained: Trained, job: Job[Config, Any]) -> pl.DataFrame:
    """The table of a study: rows of the test set, and those of the training set beside them."""
    on = ["member", "step"]
    memory = trained.measured.get("memory", tested.select(on).clear())  # all have diverged
    own = [name for name in memory.columns if name not in [*trained.members.columns, "step"]]
    found = tested.join(memory.select(*on, *own), on=on, how="left", maintain_order="left")
    measured = pl.DataFrame(schema={"accuracy": pl.Float64})
    found = pl.concat([found, measured], how="diagonal").rename({"accuracy": "test_accuracy"})
    return _named(found, job, "wrong", "test_accuracy", "diverged", *own)


def _detected(trained: Trained, job: Job[Config, Curves]) -> pl.DataFrame:
    """Wrong labels that a mixture finds by their loss; null of members that diverged."""
    rows, losses = [], trained.arrays["loss", "score"]
    wrong = given_to(trained.members, job) != np.asarray(job.data.train.y)
    for step in losses.coords["step"].tolist():
        for mask, member in zip(wrong, trained.members.rows(named=True), strict=True):
            if member["diverged"] is not None:
                rows.append({**member, "step": step, "precision": None, "recall": None})
                continue
            values = losses.at(step=step, member=member["member"]).values
            usable = np.isfinite(values).all() and values.min() < values.max()
            clean = scores.small_loss(values) if usable else np.ones(len(values))
            precision, recall = statistics.precision_recall(clean < 0.5, mask)
            rows.append({**member, "step": step, "precision": precision, "recall": recall})
    found = pl.DataFrame(rows, infer_schema_length=None).cast(
        {"precision": pl.Float64, "recall": pl.Float64, "diverged": pl.Int64}
    )
    return _named(found, job, "precision", "recall", "diverged")


def _named(found: pl.DataFrame, job: Job[Config, Any], *columns: str) -> pl.DataFrame:
    """The columns that name a row, and ``columns``; null where there is nothing to measure."""
    per = len(job.data.train) // job.config.train.batch_size
    names = {"elr_lambda": "strength", "elr_beta": "beta"}
    found = found.rename(names).with_columns(epoch=pl.col("step") / per)
    return found.select(*NAMED, *columns).with_columns(pl.col(pl.Float64).fill_nan(None))


def check(job: Job[Config, Any]) -> None:
    """ValueError before anything is computed."""
    config, data, points = job.config, job.data, job.points
    size, n = config.train.batch_size, len(data.train)
    for count in Counter(cell["program"] for cell in cells(config, config.study)).values():
        check_mesh(job.mesh, len(points) * count * config.study.replicas, size)
    if size > n:
        raise ValueError(f"train.batch_size must be <= the {n} training examples, got {size}")
    training.steps(config.train, data, config.epochs)
    for name in ("every", "detected_at"):
        for epochs in np.ravel(getattr(config.study, name, ())).tolist():
            training.steps(config.train, data, epochs, f"study.{name}")
    for point in points:
        for cell in cells(point, point.study):
            labels(point, data, cell["rate"], 0)


EXPERIMENT = Experiment("early_learning", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
