"""Deep Learning on a Data Diet: score examples early, keep a part, retrain, compare.

Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075, figure 1; the reproduction of GraNd
at initialisation by Kirsch 2023, arXiv 2303.14753. Protocol: scores are means over independent
runs in evaluation mode; subsets are retrained from fresh initialisations for the same number of
steps, with seeds (initialisation and order) paired across subsets; last epoch, never the best one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, models, optim, record, scores, task
from dynamics import mesh as meshes
from dynamics.config import Count, Fraction, NonNegative, Positive, Range, Replica, Seed, frozen
from dynamics.data import DataConfig, augment, corrupt, sources
from dynamics.data import load as load_data
from dynamics.data.sources import Splits
from dynamics.data.stream import stream
from dynamics.probes import Evaluate, Score
from dynamics.record import Recorder, Table

SCORING, RETRAINING, RANDOM = range(3)  # purposes of the seed
METHODS = ("random", "el2n_hard", "el2n_easy", "grand_hard", "grand_init_hard")


@frozen
class Scoring:
    """The runs that examples are scored with."""

    epochs: Positive = 5.0
    """Training before the scores, in epochs of the full data"""
    replicas: Count = 10
    """Independent runs (initialisation and order) that scores are averaged over"""


@frozen
class Pruning:
    """The retraining on subsets."""

    fractions: tuple[Annotated[float, Range(above=0.0, below=1.0)], ...] = (0.1, 0.2, 0.3, 0.5, 0.7)
    """Fractions of the examples that are kept"""
    replicas: Count = 10
    """Paired seeds of each subset"""
    epochs: Positive = 20.0
    """Training, in epochs of the full data; the same number of steps for every subset"""


@frozen
class Config:
    """The Data Diet study of pruning."""

    data: DataConfig = DataConfig()
    model: models.Model = models.MLP()
    train: optim.Train = optim.Train(weight_decay=5e-4)
    score: Scoring = Scoring()
    prune: Pruning = Pruning()
    noise: Annotated[Fraction, Replica] = 0.0
    """Fraction of training labels flipped to a different class"""
    seed: Annotated[Seed, Replica] = 0
    """Of everything random but the split of the data"""

    def __post_init__(self) -> None:
        if len(set(self.prune.fractions)) < len(self.prune.fractions) or not self.prune.fractions:
            raise ValueError(
                f"prune.fractions must be different fractions, got {self.prune.fractions}"
            )


def load(config: Config, folder: Path | str | None = None) -> Splits:
    """The data of a config; DataError says what is missing."""
    return load_data(config.data, folder)


def run(
    config: Config, data: Splits, mesh: Mesh | None = None, *, store: Path | str | None = None
) -> Table:
    """One point of ``sweep``."""
    return sweep((config,), data, mesh, store=store)[0]


def sweep(
    configs: Sequence[Config],
    data: Splits,
    mesh: Mesh | None = None,
    *,
    store: Path | str | None = None,
) -> list[Table]:
    """The study at every point, all in one population; points differ in Replica fields only.

    Rows: one for each (fraction, method, replica), with the last epoch's ``test_accuracy`` (0..1)
    and ``test_loss`` (nats); method ``full`` is all data; both are NaN where the run diverged.
    Arrays over the training examples in
    dataset order: ``el2n``, ``grand`` f32[R, N] at the scoring epoch, ``el2n_init``,
    ``grand_init`` f32[R, N] before training, ``input_norm`` f32[N] of normalised inputs,
    ``index`` i32[N] into the file, ``labels`` i32[N] and ``mislabelled`` bool[N]; ``diverged`` [R]
    of the scoring runs, whose scores are left out of the mean (if all did, subsets are random).
    With a ``store`` both stages are kept under the fingerprint of what determines them.
    ValueError: a subset smaller than a batch.
    """
    _check(configs, data, mesh)
    about = {"data": sources.digest(data.train) + sources.digest(data.test)}
    folder = None if store is None else Path(store, "data_diet")

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        scoring = None if folder is None else folder / "scores"
        keys = tuple(_scoring_config(point) for point in points)
        tables = record.completed(
            scoring, keys, lambda todo, recorder: score(todo, data, mesh, recorder), about
        )
        return prune(points, [table.arrays for table in tables], data, mesh, recorder)

    return record.completed(folder, configs, compute, about)


@frozen
class ScoringConfig:
    """What determines the scores."""

    data: DataConfig
    model: models.Model
    train: optim.Train
    score: Scoring
    noise: float
    seed: int


def _scoring_config(config: Config) -> ScoringConfig:
    names = ("data", "model", "train", "score", "noise", "seed")
    return ScoringConfig(**{name: getattr(config, name) for name in names})


def _check(points: Sequence[Config], data: Splits, mesh: Mesh | None) -> None:
    config = points[0]
    subsets = 1 + len(METHODS) * len(config.prune.fractions)
    for members in (config.score.replicas, subsets * config.prune.replicas):
        if mesh is not None:
            meshes.check(mesh, len(points) * members, config.train.batch_size)
    n, smallest = len(data.train), min(config.prune.fractions)
    if config.train.batch_size > round(smallest * n):
        raise ValueError(
            f"train.batch_size {config.train.batch_size} is more than the {round(smallest * n)} "
            f"examples that prune.fractions {smallest:g} keeps of {n}: "
            "take a smaller batch or keep more"
        )


def score(
    points: Sequence[ScoringConfig], data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    """Train ``score.replicas`` runs of each point; EL2N and GraNd at initialisation and after."""
    first, r = points[0], points[0].score.replicas
    steps = _steps(first.train, data, first.score.epochs)
    noisy = [_labels(point, data) for point in points]
    labels = np.repeat([n.labels for n in noisy], r, axis=0)
    net = task.of_dataset(models.make(first.model, data.num_classes), data.train)
    when = (0, steps)
    probes = [
        Score(scores.el2n, net, data.train, when, "el2n", labels),
        Score(scores.grand, net, data.train, when, "grand", labels),
    ]
    keys = _keys(points, r, SCORING)
    results = _train(points, r, keys, net, data, steps, mesh, recorder, probes, labels=labels)
    rows = results.rows
    tables = []
    for p, found in enumerate(noisy):
        mine = slice(p * r, (p + 1) * r)
        here = rows["replica"] // r == p
        tables.append(
            Table(
                rows={k: v[here] - (p * r if k == "replica" else 0) for k, v in rows.items()},
                arrays={
                    "el2n": results.arrays[f"el2n.score@{steps}"][mine],
                    "grand": results.arrays[f"grand.score@{steps}"][mine],
                    "el2n_init": results.arrays["el2n.score@0"][mine],
                    "grand_init": results.arrays["grand.score@0"][mine],
                    "input_norm": _input_norm(data),
                    "index": np.asarray(data.train.index),
                    "labels": found.labels,
                    "mislabelled": found.mask,
                    "diverged": results.arrays["diverged"][mine],
                },
            )
        )
    return tables


def prune(
    points: Sequence[Config],
    scored: Sequence[dict[str, np.ndarray]],
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[Table]:
    """Retrain every subset of every point with ``prune.replicas`` paired seeds each."""
    first, r, n = points[0], points[0].prune.replicas, len(data.train)
    steps = _steps(first.train, data, first.prune.epochs)
    subsets = [("full", 1.0)] + [(m, f) for f in first.prune.fractions for m in METHODS]
    rows = np.zeros((len(points), len(subsets), r, n), np.int32)
    sizes = np.zeros((len(points), len(subsets), r), np.int32)
    for p, (point, arrays) in enumerate(zip(points, scored, strict=True)):
        for s, (method, fraction) in enumerate(subsets):
            for seed in range(r):
                kept = _subset(method, fraction, arrays, point.seed, seed)
                rows[p, s, seed, : len(kept)], sizes[p, s, seed] = kept, len(kept)
    members = len(subsets) * r
    labels = np.repeat([arrays["labels"] for arrays in scored], members, axis=0)
    keys = _keys(points, r, RETRAINING).reshape(len(points), 1, r)
    keys = jax.numpy.repeat(keys, len(subsets), axis=1)
    net = task.of_dataset(models.make(first.model, data.num_classes), data.train)
    probes = [Evaluate(net, data.test, (steps,))]
    results = _train(
        *(points, members, keys.reshape(-1), net, data, steps, mesh, recorder, probes),
        labels=labels,
        rows=rows.reshape(-1, n),
        sizes=sizes.reshape(-1),
    )
    last = results.rows["step"] == steps
    accuracy, loss = (
        np.where(np.isinf(results.arrays["diverged"]), results.rows[f"test.{m}"][last], np.nan)
        for m in ("accuracy", "loss")
    )
    tables = []
    for p, arrays in enumerate(scored):
        mine = slice(p * members, (p + 1) * members)
        tables.append(
            Table(
                rows={
                    "stage": np.full(members, "prune"),
                    "method": np.repeat([method for method, _ in subsets], r),
                    "fraction": np.repeat([fraction for _, fraction in subsets], r),
                    "kept": sizes[p].reshape(-1),
                    "replica": np.tile(np.arange(r), len(subsets)),
                    "test_accuracy": accuracy[mine],
                    "test_loss": loss[mine],
                    "diverged": results.arrays["diverged"][mine],
                },
                arrays=dict(arrays),
            )
        )
    return tables


def _train(points, members, keys, net, data, steps, mesh, recorder, probes, **subset):
    """Train ``members`` replicas of each point through the one step."""
    train = points[0].train
    optimizer = optim.make(train, steps)
    scalars = [optim.hyperparameters(point.train) for point in points]
    hyperparameters = {k: np.repeat([s[k] for s in scalars], members) for k in scalars[0]}
    mesh = mesh or meshes.for_population(len(keys))
    state = fit.init(net, optimizer, keys, hyperparameters, mesh)
    change = augment.crop_and_flip() if train.augment == "crop_flip" else None
    batches = stream(data.train, train.batch_size, keys, augment=change, **subset)
    name = "retrain" if "rows" in subset else "score"
    return fit.fit(
        *(net, optimizer, state, batches, steps, mesh), probes=probes, store=recorder, name=name
    )


def _steps(train: optim.Train, data: Splits, epochs: NonNegative) -> int:
    return max(1, round(epochs * (len(data.train) // train.batch_size)))


def _keys(points: Sequence[Config | ScoringConfig], count: int, purpose: int) -> jax.Array:
    """Root keys [P * count]: replica r of a point depends on its seed and r alone."""
    roots = [jax.random.fold_in(jax.random.key(point.seed), purpose) for point in points]
    return jax.numpy.concatenate(
        [jax.vmap(jax.random.fold_in, (None, 0))(root, np.arange(count)) for root in roots]
    )


def _labels(point: ScoringConfig, data: Splits) -> corrupt.Noisy:
    y = np.asarray(data.train.y)
    return corrupt.symmetric(y, point.noise, data.num_classes, point.seed)


def _input_norm(data: Splits) -> np.ndarray:
    """The norm of each normalised input, a block of examples at a time."""
    train, norms = data.train, []
    for first in range(0, len(train), 1024):
        x = (train.x[first : first + 1024].astype(np.float32) - train.mean[None]) / train.std[None]
        norms.append(np.linalg.norm(x.reshape(len(x), -1), axis=1))
    return np.concatenate(norms).astype(np.float32)


def _subset(
    method: str, fraction: float, arrays: dict[str, np.ndarray], seed: int, replica: int
) -> np.ndarray:
    """The rows that are kept; the random subset is drawn anew for each paired seed."""
    n = len(arrays["index"])
    count = round(fraction * n)
    if method == "full":
        return np.arange(n)
    if method == "random":
        generator = np.random.Generator(np.random.PCG64([seed, RANDOM, replica]))
        return np.sort(generator.permutation(n)[:count])
    name, _, end = method.rpartition("_")
    whole = np.isinf(arrays["diverged"])  # a run that diverged has no scores
    mean = arrays[name][whole].mean(axis=0) if whole.any() else np.zeros(n)
    return scores.keep(mean, count, "highest" if end == "hard" else "lowest", seed=seed)
