"""One example's logits under early-learning regularization: a basin around its true class.

With targets that agree with the prediction (t = p) and what is not at the true class at the noisy
label, the force on the true logit is proportional to q (1 - lambda (2 q - 1) / (2 q)), q being the
true class's probability. It changes sign at ``threshold(lambda)``; the derivation is ours, from the
gradient of Liu et al. 2020, arXiv 2007.00151, lemma 2.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, optim, task
from dynamics import mesh as meshes
from dynamics.data.stream import whole
from dynamics.record import Recorder, Table
from dynamics.types import Dataset, Each, Key, PyTree, Task, TrainState
from experiments.early_learning_theory.config import Basin, Config

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

    def init(key: Key) -> PyTree:
        return jnp.zeros(classes)

    def predict(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(params, (len(x), classes))

    return task.of_function(predict, init=init)


@dataclass(frozen=True, eq=False)
class Believed:
    """``<name>.true``: the probability of the true class."""

    every: Collection[int]
    name: str = "believed"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Of every replica, f32[K]."""
        return carry, {"true": each(_true)(state)}


def _true(state: TrainState) -> jax.Array:
    return jax.nn.softmax(state.params)[TRUE]


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows: for each (case, elr_lambda) the probability of the true class from which it wins,
    ``measured`` between two starts, 1 if none is held, and the formula's ``predicted``.

    Arrays: ``lambdas`` f64[L], ``starts`` f64[Q], ``steps`` i64[T], and by case
    ``true_<case>`` f32[L, Q, T], the probability of the true class. Nothing is random; the seed
    changes nothing.
    """
    found = [_choices(point) for point in points]
    cases = (
        Case("two classes", 2, False),
        Case("many classes", found[0].classes, False),
        Case("spread", found[0].classes, True),
    )
    if mesh is not None:
        meshes.check(mesh, len(points) * len(found[0].lambdas) * found[0].starts, 1)
    steps = _steps(found[0].steps)
    true = {case: _followed(found, case, steps, mesh, recorder) for case in cases}
    return [_table(one, {c: t[p] for c, t in true.items()}, steps) for p, one in enumerate(found)]


def _choices(point: Config) -> Basin:
    assert isinstance(point.study, Basin)
    return point.study


def _steps(last: int) -> np.ndarray:
    return np.unique([0, *np.geomspace(1, last, MEASURED).round().astype(int).tolist()])


def _starts(choices: Basin) -> np.ndarray:
    return (np.arange(choices.starts) + 0.5) / choices.starts


def _followed(
    found: Sequence[Basin],
    case: Case,
    steps: np.ndarray,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> np.ndarray:
    """f32[P, L, Q, T]: the probability of the true class of every start of every lambda."""
    first, last = found[0], int(steps[-1])
    lambdas, starts = np.array(first.lambdas), _starts(first)
    k = len(found) * len(lambdas) * len(starts)
    each = len(lambdas) * len(starts)
    mesh = mesh or meshes.for_population(k)
    optimizer = optim.make(optim.Train(momentum=0.0, nesterov=False, batch_size=1), last)
    net = task.elr(logits(case.classes), 1, case.classes)
    scalars = {
        "elr_lambda": np.tile(np.repeat(lambdas, len(starts)), len(found)),
        "elr_beta": np.repeat([one.beta for one in found], each),
        "learning_rate": np.repeat([one.learning_rate for one in found], each),
        "momentum": 0.0,
        "weight_decay": 0.0,
    }
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(k))
    state = fit.init(net, optimizer, keys, scalars, mesh)
    p = _probabilities(case, np.tile(starts, len(found) * len(lambdas)))
    targets = np.zeros(state.extras["targets"].shape, np.float32)
    targets[:, 0] = p
    state = dataclasses.replace(
        state, params=jnp.float32(np.log(p)), extras={"targets": jnp.asarray(targets)}
    )
    probes: list[Any] = [Believed(tuple(steps.tolist()))]
    results = fit.fit(
        *(net, optimizer, state, whole(_example(), k), last, mesh),
        probes=probes,
        store=None if recorder is None else recorder.stage(case.name),
        how="vmap",  # thousands of replicas of a few numbers each
        name=f"basin, {case.name}",
        record_every=last,
    )
    true = results.rows["believed.true"]
    true = true[~np.isnan(true)].reshape(len(steps), len(found), len(lambdas), len(starts))
    return np.moveaxis(true, 0, -1).astype(np.float32)


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
    y, index = np.array([LABEL], np.int32), np.array([0], np.int32)
    return Dataset(x=np.zeros((1, 1), np.float32), y=y, index=index, mean=zero, std=one)


def _table(choices: Basin, true: dict[Case, np.ndarray], steps: np.ndarray) -> Table:
    starts, rows = _starts(choices), []
    for case, found in true.items():
        for elr_lambda, ends in zip(choices.lambdas, found[..., -1], strict=True):
            row = (case.name, case.classes, case.spread, elr_lambda)
            rows.append((*row, _between(starts, ends > 0.5), threshold(elr_lambda)))
    names = ("case", "classes", "spread", "elr_lambda", "measured", "predicted")
    columns = {n: np.array(v) for n, v in zip(names, zip(*rows, strict=True), strict=True)}
    arrays = {
        "lambdas": np.array(choices.lambdas),
        "starts": starts,
        "steps": steps,
        **{f"true_{case.name.replace(' ', '_')}": found for case, found in true.items()},
    }
    return Table({"stage": np.full(len(rows), "basin")} | columns, arrays)


def _between(starts: np.ndarray, held: np.ndarray) -> float:
    """Half-way between the last start that is not held and the next; 1 if the last one is not."""
    if not held[-1]:
        return 1.0
    first = len(held) - int(np.argmin(held[::-1])) if not held.all() else 0
    return float(starts[first] + starts[first - 1]) / 2 if first else 0.0
