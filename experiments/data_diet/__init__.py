"""Deep Learning on a Data Diet: score examples early, and see what the scores are good for.

Scores are means over independent runs, in evaluation mode, in the order of the dataset. Subsets are
retrained from fresh initialisations for the same number of steps, with seeds (initialisation and
order) paired across subsets; last epoch, never the best one. Each retraining takes the scores of
runs of its own and wrong labels of its own (a draw), so that the spread of retrainings is that of
the method; the split into training and test set is one for all. The study says what is measured:
pruning against the fraction kept, the epoch of the scores (timing) or the window; transfer between
settings; the ranking of wrong labels; rescoring while training; the connectivity of children; the
velocity of the kernel.

Reference: Paul, Ganguli and Dziugaite 2021, arXiv 2107.07075; the reproduction of GraNd at
initialisation by Kirsch 2023, arXiv 2303.14753.
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dynamics import scores, statistics, training
from dynamics.data import load as load_data
from dynamics.data.sources import Splits
from dynamics.record import Array, Findings
from experiments.data_diet import landscape, rescoring, retraining, scoring
from experiments.data_diet.bank import Bank
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
from experiments.experiment import Experiment, Job, check_mesh

__all__ = [
    "EXPERIMENT",
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


def study(job: Job[Config, Any]) -> Findings:
    """The findings of the study that the points of a job ask for.

    Accuracies are 0..1, losses nats, null where a run diverged; frame ``scored`` says which of the
    scoring runs did. Arrays of all studies: ``labels`` i32[N], those trained on, ``mislabelled``
    bool[N] the wrong ones, ``index`` i32[N] the places in the file, ``input_norm`` f32[N].
    """
    match job.config.study:
        case Pruning():
            return retraining.prune(job.of(Pruning))
        case Timing():
            return retraining.time(job.of(Timing))
        case Window():
            return retraining.slide(job.of(Window))
        case Transfer():
            return retraining.transfer(job.of(Transfer))
        case Ranking():
            return rank(job.of(Ranking))
        case Rescoring():
            return rescoring.rescore(job.of(Rescoring))
        case Connectivity():
            return landscape.connect(job.of(Connectivity))
        case Velocity():
            return landscape.turn(job.of(Velocity))


def rank(job: Job[Config, Ranking]) -> Findings:
    """Frame ``ranking``, a row for each (score, epoch, draw, replica): how well it ranks the wrong
    labels of its draw first.

    ``auc`` is the probability that a mislabelled example is harder by the score than another one,
    null without wrong labels or where the score is the same for all; ``epoch`` is null for a score
    that has none, ``replica`` for the mean over the draw's. Arrays: all of the scoring stage
    (``scoring.score``), and of image data ``shown`` i32[2, C, S], the rows of the hardest and of
    the easiest examples of each class by EL2N, of all runs on the first draw's labels, and
    ``shown_images`` [2, C, S, ...].
    """
    banks, rows = scoring.banks(job), []
    for p, bank in enumerate(banks):
        for name in sorted(set(bank.arrays) & set(scores.HARD)):
            for epoch in bank.arrays[name].coords.get("epoch", [None]):
                for d in range(job.config.score.draws):
                    found = _ranked(bank.draw(d), name, epoch)
                    rows += [{"point": p, "draw": d, **row} for row in found]
    arrays = {
        name: Array(
            np.stack([bank.arrays[name].values for bank in banks]),
            ("point", *array.dims),
            array.coords,
        )
        for name, array in banks[0].arrays.items()
    }
    types = {"epoch": pl.Float64, "replica": pl.Int64, "auc": pl.Float64}
    frames = {
        "ranking": pl.DataFrame(rows, infer_schema_length=None, schema_overrides=types),
        "scored": retraining.scored(banks),
    }
    return Findings(frames, arrays | _shown(job, banks))


def _ranked(bank: Bank, name: str, epoch: float | None) -> list[dict[str, Any]]:
    """Rows of one score of one draw at one epoch: of the mean over replicas, then of each."""
    wrong, sign = bank["mislabelled"], 1 if scores.HARD[name] == "high" else -1
    value = bank[name] if epoch is None else bank.at(name, epoch)
    runs = [] if value.ndim == 1 else list(zip(bank.runs["replica"], value, strict=True))
    rows = []
    for replica, one in [(None, bank.mean(name, epoch)), *runs]:
        one = np.where(np.isnan(one), sign * np.inf, one)
        known = wrong.any() and not wrong.all() and (one != one[0]).any()
        auc = statistics.auc(sign * one, wrong) if known else None
        at = None if epoch is None else float(epoch)
        rows.append({"score": name, "epoch": at, "replica": replica, "auc": auc})
    return rows


def _shown(job: Job[Config, Ranking], banks: list[Bank]) -> dict[str, Array]:
    """The images at both ends of EL2N, by the class they are trained as, of points that have enough
    of each class.
    """
    data, count = job.data, job.study.shown
    x, found, points = np.asarray(data.train.x), [], []
    for p, bank in enumerate(whole.alike()[0] for whole in banks):
        labels = bank["labels"]
        fewest = np.bincount(labels, minlength=data.num_classes).min()
        if x.ndim not in (3, 4) or fewest < count:
            continue
        points.append(p)
        order = np.argsort(bank.mean("el2n", job.study.scored_at), kind="stable")
        classes = [order[labels[order] == c] for c in range(data.num_classes)]
        found.append([[c[::-1][:count] for c in classes], [c[:count] for c in classes]])
    if not points:
        return {}
    rows, dims = np.array(found, np.int32), ("point", "end", "class", "place")
    images, at = ("y", "x", "channel")[: x.ndim - 1], {"point": np.array(points)}
    return {"shown": Array(rows, dims, at), "shown_images": Array(x[rows], (*dims, *images), at)}


def check(job: Job[Config, Any]) -> None:
    """ValueError before anything is computed."""
    config, study, data, n = job.config, job.study, job.data, len(job.data.train)
    kept = min(getattr(study, "fractions", (getattr(study, "kept", 1.0),)))
    members = members_of(config)
    scorings = config.score.draws * config.score.replicas
    for count in (scorings, *([members] if members else [])):
        check_mesh(job.mesh, len(job.points) * count, config.train.batch_size)
    training.check_batch(config.train, data, kept)
    for name in ("epochs", "spawn"):
        for epochs in np.ravel(getattr(study, name, ())).astype(float).tolist():
            training.steps(config.train, data, epochs, f"study.{name}")
    steps = [training.steps(config.train, data, e, "score.epochs") for e in config.score.epochs]
    if len(set(steps)) < len(steps):
        raise ValueError(
            f"score.epochs must be at least a step apart, got {config.score.epochs}, which are the "
            f"steps {steps} of {n // config.train.batch_size} an epoch"
        )
    most = {Connectivity: n // 2, Velocity: n}.get(type(study), n)
    if getattr(study, "examples", 1) > most:
        raise ValueError(f"study.examples must be at most {most} of {n}, got {study.examples}")
    if isinstance(study, Rescoring):
        rescoring.choices(config.train, study, data)


def members_of(config: Config) -> int:
    """The members that a point of the study trains together, beside those that score."""
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


EXPERIMENT = Experiment("data_diet", load, study, check)
run, sweep = EXPERIMENT.run, EXPERIMENT.sweep
