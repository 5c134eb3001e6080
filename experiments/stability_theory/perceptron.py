"""Logistic regression at large steps, which becomes the batch perceptron.

With f(theta) = (1/n) sum log(1 + exp(-<a_i, theta>)), a_i the example times its sign, and theta = 0
at the start, theta / gamma goes to the batch perceptron's as the step size gamma grows: 1/2 of the
mean of all a_i first, then 1/n of the sum of those with <a_i, theta> <= 0. The loss must be a mean:
a sum is another gamma. In float64, because the margins of real data come close to 0.

Reference: Tyurin 2024, arXiv 2412.08424, theorem 3.2 and algorithms there.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, optim
from dynamics import mesh as meshes
from dynamics.data import DataConfig, load, synthetic
from dynamics.record import Recorder, Table
from dynamics.types import Aux, Batch, Each, Key, PyTree, Scalars, Task, TrainState
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Perceptron

METHODS = ("descent", "normalised")


class Problem(NamedTuple):
    """Separable examples of every replica."""

    name: str
    signed: np.ndarray  # f32[R, n, d]: inputs times their sign
    steps: int


def batch_perceptron(signed: np.ndarray, steps: int, *, normalised: bool = False) -> np.ndarray:
    """f64[steps + 1, d]: from 0, each step adds the examples that are not right, over all n.

    ``normalised``: over their number, which needs at most (R / margin)^2 steps to separate, as the
    perceptron does, where a batch over n needs up to n times as many. The first step has every
    example, and 1/2 of them where it is not normalised: that is the logistic slope at 0.
    """
    signed = signed.astype(np.float64)
    theta = signed.mean(axis=0) / (1 if normalised else 2)
    path = [np.zeros_like(theta), theta]
    for _ in range(steps - 1):
        wrong = signed @ theta <= 0
        count = max(int(wrong.sum()), 1) if normalised else len(signed)
        theta = theta + signed[wrong].sum(axis=0) / count
        path.append(theta)
    return np.stack(path[: steps + 1])


def logistic(dim: int) -> Task:
    """Mean log(1 + exp(-<a, theta>)), from theta = 0; or its normalised descent.

    A replica whose hyperparameter ``normalised`` is 1 descends along sum_i w_i a_i, w =
    softmax(log sigmoid(-<a_i, theta>)): the gradient over the mean of its own weights. It is the
    gradient of no function, so the value is the loss and the gradient that of a linear one.
    Dividing by the mean as written overflows once every example is right.
    """

    def init(key: Key) -> tuple[PyTree, PyTree]:
        return jnp.zeros(dim), {}

    def evaluate(theta: PyTree, extras: PyTree, batch: Batch, h: Scalars) -> Aux:
        margins = batch.x.astype(theta.dtype) @ theta
        return Aux(loss=jax.nn.softplus(-margins), logits=margins, y=batch.y, index=batch.index)

    def train(
        theta: PyTree, extras: PyTree, batch: Batch, key: Key, h: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        found = evaluate(theta, extras, batch, h)
        loss = found.loss.mean()
        weights = jax.lax.stop_gradient(jax.nn.softmax(jax.nn.log_sigmoid(-found.logits)))
        linear = -jnp.sum(weights * found.logits)
        along = jax.lax.stop_gradient(loss - linear) + linear
        return jnp.where(h["normalised"] > 0, along, loss), (extras, found)

    return Task(init, train, evaluate)


@dataclass(frozen=True, eq=False)
class Look:
    """``wrong``: the examples with <a, theta> <= 0; ``loss`` and ``slope``: f and |grad f|;
    ``distance``: the largest |theta / gamma - perceptron| of a coordinate at the same step.
    """

    signed: np.ndarray  # f32[K, n, d]
    paths: np.ndarray  # f64[K, T + 1, d]
    every: Collection[int]
    name: str = "look"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Everything f64[K]."""
        return carry, each(self._found)((state, self.signed, self.paths))

    def _found(self, own: tuple[TrainState, jax.Array, jax.Array]) -> dict[str, jax.Array]:
        state, signed, path = own
        theta, gamma = state.params, state.hyperparameters["learning_rate"]
        signed = signed.astype(theta.dtype)
        margins = signed @ theta
        slope = signed.T @ jax.nn.sigmoid(-margins) / len(signed)
        distance = jnp.abs(theta / gamma.astype(theta.dtype) - path[state.step])
        return {
            "wrong": jnp.sum(margins <= 0),
            "mistake": jax.nn.softplus(-margins).mean(),
            "slope": jnp.linalg.norm(slope),
            "distance": distance.max(),
        }


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows for each (problem, method, gamma, replica): ``iterations`` until every example is right
    (infinity if never) and those of the ``perceptron``; ``distance``, the largest of theta / gamma
    and the perceptron up to then; ``mistake``, the largest loss after step 0.

    ``problem`` is "worst" (the batch perceptron's worst case), "pair" (two examples) or "digits",
    ``method`` "descent" or "normalised". Arrays, of replica 0: ``mistake_<problem>_<method>``,
    ``wrong_...``, ``slope_...`` and ``distance_...`` f64[gammas, steps + 1].
    """
    problems = _problems(points)
    if mesh is not None:
        for k in {len(METHODS) * len(_choices(points[0]).gammas) * len(q.signed) for q in problems}:
            meshes.check(mesh, k)
    found = [(problem, _trained(points, problem, mesh, recorder)) for problem in problems]
    return [_table(point, p, found) for p, point in enumerate(points)]


def _choices(point: Config) -> Perceptron:
    assert isinstance(point.study, Perceptron)
    return point.study


def _problems(points: Sequence[Config]) -> list[Problem]:
    """The replicas of each point follow one another; nothing is random but the digits' noise."""
    first = _choices(points[0])
    worst = synthetic.one_against_many(first.examples).x
    pair = np.array([[1.0, -1.0], [1.0, 4.0]], np.float32)
    digits = np.stack(
        [_digits(_choices(p), p.seed, r) for p in points for r in range(first.replicas)]
    )
    alone = lambda x: np.broadcast_to(x, (len(points), *x.shape))  # noqa: E731
    return [
        Problem("worst", alone(worst), first.steps),
        Problem("pair", alone(pair), 3),
        Problem("digits", digits, first.digits_steps),
    ]


def _digits(choices: Perceptron, seed: int, replica: int) -> np.ndarray:
    """f32[n, 65]: pixels from 0 to 1 with noise, a constant, and all of it times the sign."""
    data = load(DataConfig(source="digits")).train
    chosen = np.flatnonzero(np.isin(data.y, choices.classes))
    x = np.asarray(data.x, np.float64)[chosen].reshape(len(chosen), -1) / np.max(data.x)
    rng = np.random.default_rng(population.own_seed(seed, replica))
    x = np.concatenate(
        [x + choices.noise * rng.standard_normal(x.shape), np.ones((len(x), 1))], axis=1
    )
    sign = np.where(np.asarray(data.y)[chosen] == choices.classes[1], 1.0, -1.0)
    return (x * sign[:, None]).astype(np.float32)


def _trained(
    points: Sequence[Config], problem: Problem, mesh: Mesh | None, recorder: Recorder | None
) -> dict[str, np.ndarray]:
    """Metrics f64[M, P, G, R, T + 1] of both methods, and how many steps the perceptrons need."""
    gammas, steps = _choices(points[0]).gammas, problem.steps
    paths = [
        [batch_perceptron(s, steps, normalised=m == "normalised") for s in problem.signed]
        for m in METHODS
    ]
    paths, r = np.stack(paths), len(problem.signed) // len(points)
    shape = (len(METHODS), len(points), len(gammas), r)
    method, point, gamma, replica = (i.ravel() for i in np.indices(shape))
    signed, path = problem.signed[point * r + replica], paths[method, point * r + replica]
    scalars: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "normalised": method}
    scalars["learning_rate"] = np.array(gammas)[gamma]
    mesh = mesh or meshes.for_population(len(signed))
    train = optim.Train(momentum=0.0, nesterov=False, batch_size=signed.shape[1])
    optimizer, net = optim.make(train, steps), logistic(signed.shape[2])
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), len(signed))
        state = fit.init(net, optimizer, keys, scalars, mesh)
        probes: list[Any] = [Look(signed, path, range(steps + 1))]
        results = fit.fit(
            *(net, optimizer, state, population.stream(signed), steps, mesh),
            probes=probes,
            store=None if recorder is None else recorder.stage(problem.name),
            how="vmap",  # a few numbers each
            name=f"perceptron, {problem.name}",
            record_every=steps,
        )
    found = population.looks(results, "look")
    metrics = ("wrong", "mistake", "slope", "distance")
    margins = np.einsum("mktd,knd->mktn", paths, problem.signed.astype(np.float64))
    own = np.array([[_first((k > 0).all(axis=-1)) for k in each] for each in margins])
    return {n: np.moveaxis(found[n].reshape(steps + 1, *shape), 0, -1) for n in metrics} | {
        "perceptron": own.reshape(len(METHODS), len(points), r)
    }


def _first(right: np.ndarray) -> float:
    """The first step at which everything is."""
    return float(np.argmax(right)) if right.any() else float("inf")


def _table(point: Config, p: int, found: Sequence[tuple[Problem, dict[str, np.ndarray]]]) -> Table:
    gammas = _choices(point).gammas
    rows, arrays = [], {"gammas": np.array(gammas)}
    for problem, metrics in found:
        for m, method in enumerate(METHODS):
            own = {n: metrics[n][m, p] for n in ("wrong", "mistake", "slope", "distance")}
            for g, r in np.ndindex(own["wrong"].shape[:2]):
                right = _first(own["wrong"][g, r] == 0)
                reference = float(metrics["perceptron"][m, p, r])
                until = int(min(max(right, reference), problem.steps)) + 1
                row = (problem.name, method, gammas[g], r, right, reference)
                rows.append(
                    (*row, own["distance"][g, r, :until].max(), own["mistake"][g, r, 1:].max())
                )
            arrays |= {f"{n}_{problem.name}_{method}": v[:, 0] for n, v in own.items()}
    names = ("problem", "method", "gamma", "replica", "iterations", "perceptron", "distance")
    columns = population.columns((*names, "mistake"), rows)
    return Table({"stage": np.full(len(rows), "perceptron")} | columns, arrays)
