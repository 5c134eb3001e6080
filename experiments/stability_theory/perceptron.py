"""Logistic regression at large steps, which becomes the batch perceptron.

With f(theta) = (1/n) sum log(1 + exp(-<a_i, theta>)), a_i the example times its sign, and theta = 0
at the start, theta / gamma goes to the batch perceptron's as the step size gamma grows: 1/2 of the
mean of all a_i first, then 1/n of the sum of those with <a_i, theta> <= 0. The loss must be a mean:
a sum is another gamma. In float64, because the margins of real data come close to 0.

Reference: Tyurin 2024, arXiv 2412.08424, theorem 3.2 and algorithms there.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from dynamics import task
from dynamics.data import DataConfig, load, synthetic
from dynamics.record import Findings
from dynamics.training import Trained
from dynamics.types import Aux, Batch, Key, PyTree, Scalars, Task, TrainState
from experiments.experiment import Job
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Perceptron
from experiments.stability_theory.population import Look

METHODS = ("descent", "normalised")
PROBLEMS = ("worst", "pair", "digits")
METRICS = ("wrong", "mistake", "slope", "distance")


class Drawn(NamedTuple):
    """Separable examples, and what the perceptrons do with them."""

    signed: np.ndarray  # f32[n, d]: inputs times their sign
    paths: dict[str, np.ndarray]  # method -> f64[steps + 1, d]
    needed: dict[str, float]  # method -> steps until every example is right


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
    return task.of_methods(_Logistic(dim))


@dataclass(frozen=True)
class _Logistic:
    dim: int

    def init(self, key: Key, h: Scalars) -> tuple[PyTree, PyTree]:
        return jnp.zeros(self.dim), {}

    def evaluate(self, theta: PyTree, extras: PyTree, batch: Batch, h: Scalars) -> Aux:
        margins = batch.x.astype(theta.dtype) @ theta
        return Aux(loss=jax.nn.softplus(-margins), logits=margins, y=batch.y, index=batch.index)

    def loss(
        self, theta: PyTree, extras: PyTree, batch: Batch, key: Key, h: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        found = self.evaluate(theta, extras, batch, h)
        loss = found.loss.mean()
        weights = jax.lax.stop_gradient(jax.nn.softmax(jax.nn.log_sigmoid(-found.logits)))
        linear = -jnp.sum(weights * found.logits)
        along = jax.lax.stop_gradient(loss - linear) + linear
        return jnp.where(h["normalised"] > 0, along, loss), (extras, found)


def look(member: tuple[TrainState, PyTree]) -> dict[str, jax.Array]:
    """``wrong``: the examples with <a, theta> <= 0; ``mistake`` and ``slope``: f and |grad f|;
    ``distance``: the largest |theta / gamma - perceptron| of a coordinate at the same step.
    """
    state, (signed, path) = member
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


def measure(job: Job[Config, Perceptron]) -> Findings:
    """Frames ``perceptron``, for each (problem, method, gamma, replica), and ``path``, of each step
    what ``look`` says.

    ``iterations`` until every example is right (infinity if never) and those of the ``perceptron``;
    ``distance``, the largest of theta / gamma and the perceptron up to then; ``mistake``, the
    largest loss after step 0; ``diverged``, the step (null: never). ``problem`` is "worst" (the
    batch perceptron's worst case), "pair" (two examples) or "digits", ``method`` "descent" or
    "normalised". Nothing is random but the noise of the digits: of the others there is one replica.
    """
    with jax.enable_x64(True):
        path = pl.concat([_trained(job, group).measured["look"] for group in populations(job)])
    by = ("point", "problem", "method", "gamma", "replica")
    right = path.filter(pl.col("wrong") == 0).group_by("member").agg(iterations=pl.min("step"))
    path = path.join(right, on="member", how="left", maintain_order="left").with_columns(
        pl.col("iterations").cast(pl.Float64).fill_null(math.inf)
    )
    until = pl.max_horizontal("iterations", "perceptron")
    frame = path.group_by(*by, "iterations", "perceptron", maintain_order=True).agg(
        distance=pl.col("distance").filter(pl.col("step") <= until).max(),
        mistake=pl.col("mistake").filter(pl.col("step") > 0).max(),
        diverged=pl.col("diverged").first(),
    )
    return Findings({"perceptron": frame, "path": path.select(*by, "step", *METRICS, "diverged")})


def populations(job: Job[Config, Perceptron]) -> list[pl.DataFrame]:
    """The members of every problem: both methods at every step size."""
    members = job.members(_cells, job.study.replicas)
    members = members.filter((pl.col("problem") == "digits") | (pl.col("replica") == 0))
    return members.partition_by("problem", maintain_order=True)


def _cells(point: Config, study: Perceptron) -> list[Mapping[str, Any]]:
    return [
        {"problem": problem, "method": method, "gamma": gamma, "learning_rate": gamma}
        | {"normalised": float(method == "normalised")}
        for problem, method, gamma in itertools.product(PROBLEMS, METHODS, study.gammas)
    ]


def _trained(job: Job[Config, Perceptron], group: pl.DataFrame) -> Trained:
    """The members of a problem, beside what the perceptrons of its methods need."""
    problem, study = group["problem"][0], job.study
    steps = {"worst": study.steps, "pair": 3, "digits": study.digits_steps}[problem]
    drawn = population.drawn(job, group, functools.partial(_draw, problem, steps))
    own = list(zip(drawn, group["method"], strict=True))
    signed = np.stack([one.signed for one in drawn])
    paths = np.stack([one.paths[method] for one, method in own])
    group = group.with_columns(perceptron=pl.Series([one.needed[method] for one, method in own]))
    net, stream = logistic(signed.shape[2]), population.own_examples(signed)
    options: dict[str, Any] = {"name": problem, "scalars": {"normalised": 0.0}}
    options["probes"] = [Look(look, (signed, paths), range(steps + 1))]
    return population.descend(job, group, net, stream, steps, **options)


def _draw(problem: str, steps: int, study: Perceptron, seed: int) -> Drawn:
    if problem == "digits":
        signed = digits(study, seed)
    elif problem == "worst":
        signed = synthetic.one_against_many(study.examples).x
    else:
        signed = np.array([[1.0, -1.0], [1.0, 4.0]], np.float32)
    paths, needed = {}, {}
    for method in METHODS:
        path = batch_perceptron(signed, steps, normalised=method == "normalised")
        right = (path @ signed.T.astype(np.float64) > 0).all(axis=1)
        paths[method] = path
        needed[method] = float(np.argmax(right)) if right.any() else math.inf
    return Drawn(signed, paths, needed)


def digits(study: Perceptron, seed: int) -> np.ndarray:
    """f32[n, 65]: pixels from 0 to 1 with noise, a constant, and all of it times the sign."""
    data = load(DataConfig(source="digits")).train
    chosen = np.flatnonzero(np.isin(data.y, study.classes))
    x = np.asarray(data.x, np.float64)[chosen].reshape(len(chosen), -1) / np.max(data.x)
    rng = np.random.default_rng(seed)
    x = np.concatenate(
        [x + study.noise * rng.standard_normal(x.shape), np.ones((len(x), 1))], axis=1
    )
    sign = np.where(np.asarray(data.y)[chosen] == study.classes[1], 1.0, -1.0)
    return (x * sign[:, None]).astype(np.float32)
