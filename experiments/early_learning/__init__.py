"""Early learning and memorisation: what networks make of wrong labels, and what holds them back.

Networks fit the clean labels first, and call many wrong-labelled examples by their true class;
then cross-entropy memorises the wrong labels. Early-learning regularization (ELR) holds them to
what they said before. Methods are paired: the same split, noise, initialisation and order of
batches. Last epoch, clean test labels, unaugmented inputs in evaluation mode.

Reference: Liu, Niles-Weed, Razavian and Fernandez-Granda 2020, arXiv 2007.00151.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import losses, models, record, scores, statistics, task
from dynamics import mesh as meshes
from dynamics.data import corrupt, sources
from dynamics.data import load as load_data
from dynamics.data.sources import Splits
from dynamics.data.stream import doubled
from dynamics.probes import Evaluate, Memorisation, Score
from dynamics.record import Recorder, Table
from dynamics.types import Results, Task
from experiments import training
from experiments.early_learning.config import Config, Curves, Grid, Losses, Noise, Plus, Rates

__all__ = ["Config", "Curves", "Grid", "Losses", "Plus", "Rates", "load", "run", "sweep"]

TRAINING, NOISE = range(2)  # purposes of the seed


class Cell(NamedTuple):
    """What differs within a study, beside the seed."""

    method: str
    rate: float
    strength: float
    beta: float

    @property
    def program(self) -> str:
        """Cells of one program train together; cross-entropy is ELR with lambda = 0."""
        return "elr" if self.method == "ce" else self.method


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
    """The study at every point; points differ in Replica fields only.

    Rows of stage ``curves``, ``rates`` or ``grid``, for each (method, rate, strength, beta,
    replica, epoch) measured: ``wrong``, the part of the labels that is; ``test_accuracy`` (0..1),
    what ``probes.Memorisation`` says of the training examples (nan where a method has no targets),
    and ``diverged``, the step. Of ``Curves`` also stage ``detected``: ``precision`` and ``recall``
    of calling wrong what a mixture of two Gaussians gives a small loss with probability < 1/2, at
    ``epoch``. Arrays: ``index`` and ``clean`` i32[N]; ``labels`` i32[R, N] of Curves.
    ValueError: noise or a batch that does not suit the data.
    """
    _check(configs, data, mesh)
    about = {"data": sources.digest(data.train) + sources.digest(data.test), "source": data.name}
    folder = None if store is None else Path(store, "early_learning")

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return _tables(points, data, mesh, recorder)

    return record.completed(folder, configs, compute, about)


def cells(point: Config) -> list[Cell]:
    """What the study of a point compares."""
    study, own = point.study, (point.strength, point.beta)
    if isinstance(study, Grid):
        places = itertools.product(study.strengths, study.betas)
        return [Cell("elr" if s else "ce", point.rate, s, b) for s, b in places if s or not b]
    rates = study.rates if isinstance(study, Rates) else (point.rate,)
    return [Cell(m, r, *_held(m, *own)) for m in study.methods for r in rates]


def _held(method: str, strength: float, beta: float) -> tuple[float, float]:
    return (strength, beta) if method in ("elr", "elr_plus") else (0.0, 0.0)


def _tables(
    points: Sequence[Config], data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    rows: list[list[dict[str, np.ndarray]]] = [[] for _ in points]
    mine = [cells(point) for point in points]
    for program in dict.fromkeys(cell.program for cell in mine[0]):
        groups = [[cell for cell in some if cell.program == program] for some in mine]
        found = _trained(program, points, groups, data, mesh, recorder)
        for p, columns in enumerate(found):
            rows[p] += columns
    return [
        Table(training.stacked(parts), _arrays(point, data))
        for point, parts in zip(points, rows, strict=True)
    ]


def _trained(
    program: str,
    points: Sequence[Config],
    groups: Sequence[Sequence[Cell]],
    data: Splits,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[list[dict[str, np.ndarray]]]:
    """Every replica of every cell of one program, as one population; the rows of each point."""
    first, r, c = points[0], points[0].study.replicas, len(groups[0])
    num_steps = training.steps(first.train, data, first.epochs)
    noisy = [[[labels(p, data, cell.rate, k) for k in range(r)] for cell in g]
             for p, g in zip(points, groups, strict=True)]  # fmt: skip
    given = np.stack([one.labels for a in noisy for b in a for one in b])
    net = method(program, first, data)
    clean = np.asarray(data.train.y)
    when = _when(first, data, num_steps)
    probes: list[Any] = [
        Evaluate(net, data.test, when),
        Memorisation(net, data.train, given, clean, when),
    ]
    if isinstance(first.study, Curves):
        probes.append(Score(scores.loss, net, data.train, _detected(first, data), "loss", given))
    roots = training.keys([p.seed for p in points], r, TRAINING).reshape(len(points), 1, r)
    flat = [cell for g in groups for cell in g]
    results = training.train(
        *([p.train for p in points], jax.numpy.repeat(roots, c, axis=1).reshape(-1)),
        *(net, data.train, num_steps, mesh, recorder and recorder.stage(program)),
        name=program,
        scalars={
            "elr_lambda": np.repeat([cell.strength for cell in flat], r),
            "elr_beta": np.repeat([cell.beta for cell in flat], r),
        },
        probes=probes,
        labels=given,
        feed=doubled if program == "elr_plus" else lambda stream: stream,
    )
    wrong = given != clean
    per = len(data.train) // first.train.batch_size
    out = []
    for p, group in enumerate(groups):
        here = np.arange(p * c * r, (p + 1) * c * r)
        columns = _columns(results, here, group, r, wrong.mean(axis=1), per)
        found = [
            columns | {"stage": np.full(len(columns["epoch"]), type(first.study).__name__.lower())}
        ]
        if isinstance(first.study, Curves):
            found.append(_small_loss(results, here, group, r, wrong, per))
        out.append(found)
    return out


def method(program: str, config: Config, data: Splits) -> Task:
    """The task of a method: what is minimised."""
    constants, n, plus = config.losses, len(data.train), config.plus
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
    if program == "elr":
        return task.elr(net, n, data.num_classes)
    if program == "elr_plus":
        return task.elr_plus(
            *(net, n, data.num_classes),
            mixup=plus.mixup,
            decay=plus.decay,
            ramp=plus.ramp,
            ramp_lambda=plus.ramp_lambda,
            reweight=plus.reweight,
        )
    return net


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


def _columns(
    results: Results, here: np.ndarray, group: Sequence[Cell], r: int, wrong: np.ndarray, per: int
) -> dict[str, np.ndarray]:
    """What was measured of one point's replicas."""
    rows = results.rows
    chosen = np.isin(rows["replica"], here) & ~np.isnan(rows["test.accuracy"])
    member = rows["replica"][chosen].astype(int)
    columns = _named(group, (member - here[0]) // r, member % r)
    columns |= {
        "epoch": rows["step"][chosen] / per,
        "wrong": wrong[member],
        "test_accuracy": rows["test.accuracy"][chosen],
        "diverged": results.arrays["diverged"][member],
    }
    memory = [name for name in rows if name.startswith("memory.")]
    return columns | {name.removeprefix("memory."): rows[name][chosen] for name in memory}


def _small_loss(
    results: Results, here: np.ndarray, group: Sequence[Cell], r: int, wrong: np.ndarray, per: int
) -> dict[str, np.ndarray]:
    """Wrong labels that a mixture finds by their loss, at the epochs asked for."""
    found = []
    for name, values in results.arrays.items():
        metric, _, step = name.partition("@")
        if metric != "loss.score":
            continue
        for member in here:
            clean = _clean_probability(values[member])
            precision, recall = statistics.precision_recall(clean < 0.5, wrong[member])
            found.append((member - here[0], int(step) / per, precision, recall))
    place, epoch, precision, recall = (np.array(v) for v in zip(*found, strict=True))
    columns = _named(group, place // r, place % r)
    columns |= {"epoch": epoch, "precision": precision, "recall": recall}
    return columns | {"stage": np.full(len(epoch), "detected")}


def _clean_probability(values: np.ndarray) -> np.ndarray:
    """Certain of everything where the losses say nothing."""
    usable = np.isfinite(values).all() and values.min() < values.max()
    return scores.small_loss(values) if usable else np.ones(len(values))


def _named(group: Sequence[Cell], cell: np.ndarray, replica: np.ndarray) -> dict[str, np.ndarray]:
    columns = {name: np.array([getattr(c, name) for c in group])[cell] for name in Cell._fields}
    return columns | {"replica": replica}


def _arrays(point: Config, data: Splits) -> dict[str, np.ndarray]:
    arrays = {"index": np.asarray(data.train.index), "clean": np.asarray(data.train.y)}
    if isinstance(point.study, Curves):
        noisy = [labels(point, data, point.rate, k).labels for k in range(point.study.replicas)]
        arrays["labels"] = np.stack(noisy)
    return arrays


def _when(config: Config, data: Splits, num_steps: int) -> int | tuple[int, ...]:
    """The steps at which is measured: all along of Curves, else the last."""
    if not isinstance(config.study, Curves):
        return (num_steps,)
    return max(1, training.steps(config.train, data, config.study.every))


def _detected(config: Config, data: Splits) -> tuple[int, ...]:
    assert isinstance(config.study, Curves)
    epochs = (*config.study.detected_at, config.epochs)
    return tuple(dict.fromkeys(training.steps(config.train, data, epoch) for epoch in epochs))


def _check(points: Sequence[Config], data: Splits, mesh: Mesh | None) -> None:
    """ValueError before anything is computed."""
    first = points[0]
    size, n = first.train.batch_size, len(data.train)
    programs = [cell.program for cell in cells(first)]
    if mesh is not None:
        for program in set(programs):
            members = len(points) * programs.count(program) * first.study.replicas
            meshes.check(mesh, members, size)
    if size > n:
        raise ValueError(f"train.batch_size must be <= the {n} training examples, got {size}")
    if not training.steps(first.train, data, first.epochs):
        raise ValueError(f"epochs must be at least a step of {n // size} an epoch: {first.epochs}")
    for point in points:
        for cell in cells(point):
            labels(point, data, cell.rate, 0)
