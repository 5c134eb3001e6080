"""Deep Learning on a Data Diet: score examples early, and see what the scores are good for.

Scores are means over independent runs, in evaluation mode, in the order of the dataset. Subsets are
retrained from fresh initialisations for the same number of steps, with seeds (initialisation and
order) paired across subsets; last epoch, never the best one. The study says what is measured:
pruning against the fraction kept, the epoch of the scores (timing) or the window; transfer between
settings; the ranking of wrong labels; rescoring while training; the connectivity of children; the
velocity of the kernel.

Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075; the reproduction of GraNd at
initialisation by Kirsch 2023, arXiv 2303.14753.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from dynamics import record, scores, statistics
from dynamics.data import load as load_data
from dynamics.data import sources
from dynamics.data.sources import Splits
from dynamics.record import Recorder, Table
from experiments import training
from experiments.data_diet import landscape, rescoring, retraining, scoring
from experiments.data_diet.config import (
    Config,
    Connectivity,
    Pruning,
    Ranking,
    Rescoring,
    Scoring,
    Study,
    Timing,
    Transfer,
    Velocity,
    Window,
)
from experiments.data_diet.scoring import Job

__all__ = [
    "Config",
    "Connectivity",
    "Pruning",
    "Ranking",
    "Rescoring",
    "Scoring",
    "Study",
    "Timing",
    "Transfer",
    "Velocity",
    "Window",
    "load",
    "run",
    "sweep",
]


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

    Rows and arrays are the study's: ``retraining``, ``rescoring``, ``landscape`` and ``rank`` say
    which. Accuracies are 0..1, losses nats, nan where a run diverged; ``labels`` i32[N] are those
    trained on, ``mislabelled`` bool[N] the wrong ones, ``index`` i32[N] the places in the file.
    With a ``store`` the study and the scores it needs are each kept under the fingerprint of what
    determines them. ValueError: a subset smaller than a batch.
    """
    _check(configs, data, mesh)
    about = {"data": sources.digest(data.train) + sources.digest(data.test), "source": data.name}
    folder = None if store is None else Path(store, "data_diet")
    scored = scoring.stored(data, mesh, None if folder is None else folder / "scores", about)
    study = STUDIES[type(configs[0].study)]

    def compute(points: Sequence[Config], recorder: Recorder | None) -> list[Table]:
        return study(Job(points, scored, data, mesh, recorder))

    return record.completed(folder, configs, compute, about)


def rank(job: Job) -> list[Table]:
    """Rows for each (score, epoch, replica): how well it ranks wrong labels first.

    ``auc`` is the probability that a mislabelled example is harder by the score than another one,
    nan without wrong labels or where the score is the same for all; replica -1 is the mean over
    replicas. Arrays: all of the scoring stage (``scoring.compute``), and of image data ``shown``
    i32[2, C, S], the rows of the hardest and of the easiest examples of each class by EL2N, and
    ``shown_images`` [2, C, S, ...].
    """
    tables = []
    for arrays in job.banks():
        wrong, rows = arrays["mislabelled"], []
        for name in sorted(arrays):
            kind, _, epoch = name.partition("@")
            if kind not in scores.HARD:
                continue
            value, sign = arrays[name], 1 if scores.HARD[kind] == "high" else -1
            runs = [] if value.ndim == 1 else list(enumerate(value))
            for replica, one in [(-1, scoring.mean(arrays, name)), *runs]:
                one = np.where(np.isnan(one), sign * np.inf, one)
                known = wrong.any() and not wrong.all() and (one != one[0]).any()
                auc = statistics.auc(sign * one, wrong) if known else np.nan
                rows.append((kind, float(epoch or "nan"), replica, auc))
        names = ("score", "epoch", "replica", "auc")
        columns = {n: np.array(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)}
        shown = _shown(job.points[0], arrays, job.data)
        tables.append(Table({"stage": np.full(len(rows), "ranking")} | columns, arrays | shown))
    return tables


def _shown(point: Config, arrays: scoring.Arrays, data: Splits) -> scoring.Arrays:
    """The images at both ends of EL2N, by the class they are trained as."""
    study = point.study
    assert isinstance(study, Ranking)
    labels, x = arrays["labels"], np.asarray(data.train.x)
    fewest = np.bincount(labels, minlength=data.num_classes).min()
    if x.ndim not in (3, 4) or fewest < study.shown:
        return {}
    order = np.argsort(scoring.mean(arrays, f"el2n@{study.scored_at:g}"), kind="stable")
    classes = [order[labels[order] == c] for c in range(data.num_classes)]
    rows = np.array(
        [[c[::-1][: study.shown] for c in classes], [c[: study.shown] for c in classes]]
    )
    return {"shown": rows.astype(np.int32), "shown_images": x[rows]}


STUDIES: dict[type, Callable[[Job], list[Table]]] = {
    Pruning: retraining.prune,
    Timing: retraining.time,
    Window: retraining.slide,
    Transfer: retraining.transfer,
    Ranking: rank,
    Rescoring: rescoring.rescore,
    Connectivity: landscape.connect,
    Velocity: landscape.turn,
}


def _check(points: Sequence[Config], data: Splits, mesh: Mesh | None) -> None:
    """ValueError before anything is computed."""
    config, study, n = points[0], points[0].study, len(data.train)
    kept = min(getattr(study, "fractions", (getattr(study, "kept", 1.0),)))
    members = _members(config)
    for count in (config.score.replicas, *([members] if members else [])):
        training.check(config.train, data, mesh, len(points) * count, kept)
    steps = [training.steps(config.train, data, epoch) for epoch in config.score.epochs]
    if len(set(steps)) < len(steps) or not steps[-1]:
        raise ValueError(
            f"score.epochs must be at least a step apart, got {config.score.epochs}, which are the "
            f"steps {steps} of {n // config.train.batch_size} an epoch"
        )
    most = {Connectivity: n // 2, Velocity: n}.get(type(study), n)
    if getattr(study, "examples", 1) > most:
        raise ValueError(
            f"study.examples must be at most {most} of {n}, got {study.examples}"  # pyright: ignore
        )
    if isinstance(study, Rescoring):
        rescoring.choices(config.train, study, data)


def _members(config: Config) -> int:
    """The replicas that a point of the study trains together, beside those that score."""
    match study := config.study:
        case Pruning():
            return (1 + len(study.methods) * len(study.fractions)) * study.replicas
        case Timing():
            streamed = len({"forgetting", "aum"} & set(study.methods))  # not before training
            epochs = config.score.epochs
            pairs = len(study.methods) * len(epochs) - streamed * (0.0 in epochs)
            return (2 + pairs) * study.replicas
        case Window():
            return (3 + len(study.dropped)) * study.replicas
        case Transfer() | Rescoring():
            return 5 * study.replicas
        case Connectivity() | Velocity():
            return study.replicas
        case _:
            return 0
