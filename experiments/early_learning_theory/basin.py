"""One example's logits under early-learning regularization: a basin around its true class.

With targets that agree with the prediction (t = p) and what is not at the true class at the noisy
label, the force on the true logit is proportional to q (1 - lambda (2 q - 1) / (2 q)), q being the
true class's probability. It changes sign at ``threshold(lambda)``; the derivation is ours, from the
gradient of Liu et al. 2020, arXiv 2007.00151, lemma 2.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import fit, task, training
from dynamics import mesh as meshes
from dynamics.data.stream import whole
from dynamics.record import Array, Findings
from dynamics.types import Dataset, PyTree, Task, TrainState
from experiments.early_learning_theory.config import Basin, Config
from experiments.experiment import Job
from experiments.stability_theory import population
from experiments.stability_theory.population import PLAIN, Look

MEASURED = 60  # steps at which the probability is kept, about
TRUE, LABEL = 0, 1  # classes
ELSEWHERE = 1e-9  # probability of each class that is neither, where all the rest is at the label


class Case(NamedTuple):
    """Where the example's probability is that is not at its true class."""

    name: str
    classes: int
    spread: bool  # over all other classes alike, instead of at the noisy label


def threshold(elr_lambda: float) -> float:
    """``lambda / (2 (lambda - 1))``: from which probability of its true class an example is held.

    1 for lambda <= 2, where none is: regularization only delays. ValueError: lambda < 0.
    """
    if not elr_lambda >= 0:
        raise ValueError(f"elr_lambda must be >= 0, got {elr_lambda!r}")
    return elr_lambda / (2 * (elr_lambda - 1)) if elr_lambda > 2 else 1.0


def logits(classes: int) -> Task:
    """A task whose parameters are the logits of every example."""
    return task.of_function(_repeated, init=population.zeros(logits=(classes,)))


def _repeated(params: PyTree, x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(params["logits"], (len(x), *params["logits"].shape))


def look(member: tuple[TrainState, PyTree]) -> dict[str, jax.Array]:
    """``believed`` f32[C]: the probability of every class."""
    return {"believed": jax.nn.softmax(member[0].params["logits"])}


def measure(job: Job[Config, Basin]) -> Findings:
    """Frame ``basin``: for each (case, elr_lambda) the probability of the true class from which it
    wins, ``measured`` between two starts, 1 if none is held, and the formula's ``predicted``.

    Array: ``true``, the probability of the true class, f32[case, step, elr_lambda, start]. Nothing
    is random; the seed changes nothing.
    """
    study = job.study
    cases = (
        Case("two classes", 2, False),
        Case("many classes", study.classes, False),
        Case("spread", study.classes, True),
    )
    found = [_followed(job, case) for case in cases]
    coords = {"case": np.array([case.name for case in cases]), **found[0].coords}
    true = Array(np.stack([one.values for one in found]), ("case", *found[0].dims), coords)
    rows, ends = [], true.at(step=study.steps)
    for p, case, held in itertools.product(range(len(job.points)), cases, study.lambdas):
        end = ends.at(point=p, case=case.name, elr_lambda=held).values
        row = {"point": p, "case": case.name, "classes": case.classes, "spread": case.spread}
        row |= {"elr_lambda": held, "measured": _between(_starts(study), end)}
        rows.append({**row, "predicted": threshold(held)})
    return Findings({"basin": pl.DataFrame(rows)}, {"true": true})


def populations(job: Job[Config, Basin]) -> list[pl.DataFrame]:
    """Every start of every lambda."""
    return [job.members(_cells, 1)]


def _cells(point: Config, study: Basin) -> list[Mapping[str, Any]]:
    numbers = {"elr_beta": study.beta, "learning_rate": study.learning_rate}
    pairs = itertools.product(study.lambdas, _starts(study).tolist())
    return [{"elr_lambda": held, "start": start, **numbers} for held, start in pairs]


def _starts(study: Basin) -> np.ndarray:
    return (np.arange(study.starts) + 0.5) / study.starts


def _followed(job: Job[Config, Basin], case: Case) -> Array:
    """f32[step, point, elr_lambda, start]: the probability of the true class."""
    (members,), last = populations(job), job.study.steps
    net, stream = task.elr(logits(case.classes), 1, case.classes), whole(_example(), len(members))
    start = _begun(job, members, net, _probabilities(case, members["start"].to_numpy()))
    probes = [Look(look, (), population.logarithmic(last, MEASURED), dims=("class",))]
    options: dict[str, Any] = {"name": case.name, "start": start, "probes": probes}
    trained = population.descend(job, members, net, stream, last, **options)
    found = trained.arrays["look", "believed"].at(**{"class": TRUE})
    return training.unstack(found, members, "point", "elr_lambda", "start")


def _begun(job: Job[Config, Basin], members: pl.DataFrame, net: Task, p: np.ndarray) -> TrainState:
    """At these probabilities, with targets that agree with them."""
    numbers = {**PLAIN.hyperparameters(), "elr_lambda": 0.0, "elr_beta": 0.0}
    own = {name: training.column(members, name, value) for name, value in numbers.items()}
    mesh = job.mesh or meshes.for_population(len(members))
    state = fit.init(net, PLAIN.make(job.study.steps), training.keys(members), own, mesh)
    targets = np.zeros(state.extras["targets"].shape, np.float32)
    targets[:, 0] = p
    params, extras = {"logits": jnp.float32(np.log(p))}, {"targets": jnp.asarray(targets)}
    return dataclasses.replace(state, params=params, extras=extras)


def _probabilities(case: Case, true: np.ndarray) -> np.ndarray:
    """f32[K, C] at the start."""
    p = np.full((len(true), case.classes), ELSEWHERE)
    p[:, LABEL] = 1 - true
    if case.spread:
        p[:] = (1 - true[:, None]) / (case.classes - 1)
    p[:, TRUE] = true
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def _example() -> Dataset:
    """One example that says nothing, with the noisy label."""
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    return Dataset(np.zeros((1, 1), np.float32), np.array([LABEL], np.int32), zero, one)


def _between(starts: np.ndarray, end: np.ndarray) -> float | None:
    """Half-way between the last start that is not held and the next; 1 if the last one is not.

    None where one diverged.
    """
    if np.isnan(end).any():
        return None
    held = end > 0.5
    if not held[-1]:
        return 1.0
    first = len(held) - int(np.argmin(held[::-1])) if not held.all() else 0
    return float(starts[first] + starts[first - 1]) / 2 if first else 0.0
