"""The scoring stage: every score of every example, at every epoch asked for, stored once."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dynamics import config as configs
from dynamics import optim, record, scores, statistics
from dynamics.data import corrupt
from dynamics.data.sources import Splits
from dynamics.probes import AreaUnderMargin, Cartography, Forgetting, Score, VarianceOfGradients
from dynamics.record import Recorder, Table
from dynamics.types import Batch, Task, TrainState
from experiments import training, worker
from experiments.data_diet.config import Config, Method, ScoringConfig, scoring_part

SCORING, RETRAINING, RANDOM, CHILD, OTHER = range(5)  # purposes of the seed

Arrays = dict[str, np.ndarray]
Scored = Callable[[Sequence[ScoringConfig]], list[Arrays]]


class Job(NamedTuple):
    """A study at all its points, and where it runs."""

    points: Sequence[Config]
    scored: Scored
    data: Splits
    mesh: Mesh | None
    recorder: Recorder | None

    def banks(self) -> list[Arrays]:
        """The scores of each point."""
        return self.scored([scoring_part(point) for point in self.points])

    def stage(self, name: str) -> Recorder | None:
        """Where one of several trainings is stored."""
        return self.recorder and self.recorder.stage(name)

    @property
    def settings(self) -> list[optim.Train]:
        """How each point trains."""
        return [point.train for point in self.points]

    @property
    def seeds(self) -> list[int]:
        """The seed of each point."""
        return [point.seed for point in self.points]


STREAMED = {  # what the probes of the training stream are called, and what the scores are
    "forgetting.events": "forgetting",
    "aum.margin": "aum",
    "cartography.confidence": "confidence",
    "cartography.variability": "variability",
}


def at_rest(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    """The scores of a state in evaluation mode: a gradient pass and a forward pass."""
    return {
        "el2n": scores.el2n(task, state, batch),
        "grand": scores.grand(task, state, batch),
        "loss": scores.loss(task, state, batch),
        "entropy": scores.entropy(task, state, batch),
        "logit_margin": scores.logit_margin(task, state, batch),
    }


def stored(data: Splits, mesh: Mesh | None, folder: Path | None, about: dict[str, Any]) -> Scored:
    """A function that gives the scores of each point: from the disk, or computed and stored."""

    def scored(points: Sequence[ScoringConfig]) -> list[Arrays]:
        found: dict[ScoringConfig, Arrays] = {}
        for group in configs.group(dict.fromkeys(points)):
            with nullcontext() if folder is None else worker.alone(folder, group, wait=True):
                tables = record.completed(
                    folder, group, lambda todo, recorder: compute(todo, data, mesh, recorder), about
                )
            found |= {p: t.arrays for p, t in zip(group, tables, strict=True)}
        return [found[point] for point in points]

    return scored


def compute(
    points: Sequence[ScoringConfig], data: Splits, mesh: Mesh | None, recorder: Recorder | None
) -> list[Table]:
    """Train ``score.replicas`` runs of each point and score every example on the way.

    Arrays ``<score>@<epoch>`` f32[R, N] over the training examples in dataset order: el2n, grand,
    loss, entropy and logit_margin in evaluation mode; forgetting, aum, confidence and variability
    of the training stream up to there; vog and pvi if asked for. Also ``tracin`` f32[R, N] of the
    epochs scored, ``input_norm`` f32[N], ``index`` i32[N] into the file, ``labels`` i32[N] trained
    on, ``clean`` i32[N], ``mislabelled`` bool[N], and ``diverged`` f64[R].
    """
    first, r, n = points[0], points[0].score.replicas, len(data.train)
    epochs = {training.steps(first.train, data, e): f"{e:g}" for e in first.score.epochs}
    noisy = [_labels(point, data) for point in points]
    labels = np.repeat([found.labels for found in noisy], r, axis=0)
    net = training.net_of(first.model, data)
    when, trained = tuple(epochs), tuple(step for step in epochs if step)
    probes: list[Any] = [
        Score(at_rest, net, data.train, when, "rest", labels),
        Forgetting(n, trained),
        AreaUnderMargin(n, trained),
        Cartography(n, trained),
    ]
    if "vog" in first.score.also:
        probes.append(VarianceOfGradients(net, data.train, trained, labels=labels))
    settings = [point.train for point in points]
    roots = training.keys([point.seed for point in points], r, SCORING)
    run = (settings, roots, net)
    horizon = training.steps(first.train, data, first.score.horizon) or when[-1]
    results = training.train(
        *(*run, data.train, when[-1], mesh, recorder),
        name="score",
        total=horizon,
        probes=probes,
        labels=labels,
    )
    found = _named(results.arrays, epochs)
    if "pvi" in first.score.also:
        blank = scores.blank(data.train)
        null = training.train(
            *(*run, blank, when[-1], mesh, recorder and recorder.stage("null")),
            name="score null",
            total=horizon,
            probes=[Score(_loss, net, blank, trained, "rest", labels)],
            labels=labels,
        )
        for name, value in _named(null.arrays, epochs).items():
            found[name.replace("loss@", "pvi@")] = np.asarray(scores.pvi(found[name], value))
    rates = [_rates(point.train, trained, horizon) for point in points]
    shared = {"input_norm": _input_norm(data), "index": np.asarray(data.train.index)}
    tables = []
    for p, mine in enumerate(noisy):
        here = slice(p * r, (p + 1) * r)
        arrays = {name: np.asarray(value[here]) for name, value in found.items()}
        norms = np.stack([arrays[f"grand@{epochs[step]}"] for step in trained])
        arrays["tracin"] = scores.tracin_self(norms, rates[p]).astype(np.float32)
        arrays |= {"labels": mine.labels, "clean": mine.clean, "mislabelled": mine.mask, **shared}
        arrays["diverged"] = results.arrays["diverged"][here]
        rows, where = results.rows, results.rows["replica"] // r == p
        columns = {k: v[where] - (p * r if k == "replica" else 0) for k, v in rows.items()}
        tables.append(Table(columns, arrays))
    return tables


def mean(arrays: Arrays, name: str) -> np.ndarray:
    """A score [N] averaged over the replicas that did not diverge; zeros if all did.

    An example that no replica was shown in time counts as the hardest: infinite at the hard end.
    """
    hardest = np.inf if scores.HARD[name.partition("@")[0]] == "high" else -np.inf
    if arrays[name].ndim == 1:
        return arrays[name].astype(np.float64)
    whole = arrays[name][np.isinf(arrays["diverged"])]
    if not len(whole):
        return np.zeros(arrays[name].shape[1])
    average, _ = statistics.over_replicas(whole)
    return np.where(np.isnan(average), hardest, average)


def chosen(
    method: Method | str,
    arrays: Arrays,
    count: int,
    seed: int,
    replica: int,
    *,
    at: float,
    balanced: bool = False,
    cutoff: float = 0.1,
) -> np.ndarray:
    """The rows that a method keeps; the random subset is drawn anew for each paired seed."""
    labels = arrays["labels"] if balanced else None
    if method == "random":
        draw = np.random.SeedSequence([seed, RANDOM, replica]).generate_state(1)[0]
        return scores.random(len(arrays["index"]), count, labels=labels, seed=int(draw))
    if method == "coverage":
        return scores.coverage_centric(
            mean(arrays, f"el2n@{at:g}"), count, cutoff=cutoff, seed=seed
        )
    name, _, end = method.rpartition("_")
    start = name.removesuffix("_init") if name.endswith("_init") else None
    key = name if name == "input_norm" else f"{start or name}@{0 if start else at:g}"
    high = scores.HARD[start or name] == "high"
    which = "highest" if (end == "hard") == high else "lowest"
    return scores.keep(mean(arrays, key), count, which, labels=labels, seed=seed)


def _loss(task: Task, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    return {"loss": scores.loss(task, state, batch)}


def _named(arrays: Arrays, epochs: dict[int, str]) -> Arrays:
    """``rest.el2n@210`` -> ``el2n@5``."""
    found = {}
    for name, value in arrays.items():
        metric, at, step = name.rpartition("@")
        if at:
            metric = STREAMED.get(metric, metric.removeprefix("rest.").removesuffix(".score"))
            found[f"{metric}@{epochs[int(step)]}"] = value
    return {name: value for name, value in found.items() if not name.startswith("cartography")}


def _rates(train: optim.Train, trained: Sequence[int], num_steps: int) -> list[float]:
    shape = optim.factor(train.schedule, num_steps)
    return [train.learning_rate * float(shape(jax.numpy.int32(step))) for step in trained]


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
