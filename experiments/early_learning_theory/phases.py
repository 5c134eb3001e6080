"""Logistic regression on two Gaussians with wrong labels, through the one step.

Where the paper's proof and its constants differ from what is computed here: the gradient of
log(1 + exp(-eps s)) is (tanh(s / 2) - eps) / 2, with half of the paper's argument; and descent
starts orthogonal to v, because at a few hundred dimensions the component of a random start along v
is no small number, so that the time T at which <theta, v> has grown to 1 / 10 can be zero.

Reference: Liu et al. 2020, arXiv 2007.00151, theorem 1 and appendix A.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, optim, task
from dynamics import mesh as meshes
from dynamics.data import synthetic
from dynamics.data.stream import whole
from dynamics.record import Recorder, Table
from dynamics.types import Batch, Dataset, Each, Key, PyTree, Results, Stream, Task, TrainState
from experiments.early_learning_theory.config import Config, Phases

RADIUS = 2.0  # of the sphere that descent starts on
MEASURED = 80  # steps at which a run is looked at, about


class Drawn(NamedTuple):
    """The data of a population, one row a replica."""

    x: np.ndarray  # f32[K, n, dim]
    noisy: np.ndarray  # i32[K, n]: class 1 is eps = +1
    clean: np.ndarray  # i32[K, n]
    test_x: np.ndarray  # f32[K, m, dim]
    test_y: np.ndarray  # i32[K, m], clean


def separability_bound(examples: int, dim: int, flip: float) -> float:
    """``2 P[Bin(n, flip / 2) <= n - dim]``, at least the chance that no plane fits all labels.

    Small as soon as dim / n > 1 - flip / 2, the fraction of right labels; a bound above 1 says
    nothing, and Cover's theorem for random labels, which asks for dim / n > 1 / 2, more.

    Reference: Liu et al. 2020, arXiv 2007.00151, theorem 6, from its proof.
    """
    if not (examples >= 1 and dim >= 1 and 0 <= flip <= 1):
        raise ValueError(
            f"need examples and dim >= 1 and flip from 0 to 1, got {examples}, {dim}, {flip!r}"
        )
    wrong = flip / 2
    terms = (
        math.comb(examples, k) * wrong**k * (1 - wrong) ** (examples - k)
        for k in range(examples - dim + 1)
    )
    return 2 * math.fsum(terms)


def logistic(dim: int) -> Task:
    """The logits (0, <theta, x>): cross-entropy is log(1 + exp(-eps <theta, x>)), eps = +-1.

    theta starts on the sphere of radius 2, orthogonal to the first unit vector.
    """

    def init(key: Key) -> PyTree:
        theta = jax.random.normal(key, (dim,)).at[0].set(0.0)
        return RADIUS * theta / jnp.linalg.norm(theta)

    def predict(theta: PyTree, x: jax.Array) -> jax.Array:
        s = x @ theta
        return jnp.stack([jnp.zeros_like(s), s], axis=-1)

    return task.of_function(predict, init=init)


@dataclass(frozen=True, eq=False)
class Look:
    """What the theory speaks of, of every replica; the clean labels are known to it alone.

    ``cosine``: of what the step descends along and v; ``corrected`` and ``memorised``: the parts
    of the wrong-labelled examples that get their true and their noisy label; ``clean``: the part
    of the others that gets its label; ``test``: test accuracy; ``kappa_clean`` and ``kappa_wrong``:
    means of (tanh(s / 2) - eps)^2, to which gradients are proportional; ``norm``: of theta;
    ``along``: <theta, v>. Cost: one gradient of each replica's data.
    """

    net: Task
    drawn: Drawn
    every: Collection[int]
    name: str = "look"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Everything f32[K]."""
        return carry, each(self._found)((state, self.drawn))

    def _found(self, own: tuple[TrainState, Drawn]) -> dict[str, jax.Array]:
        state, (x, noisy, clean, test_x, test_y) = own
        theta, h = state.params, state.hyperparameters
        batch = Batch(x=x, y=noisy, index=jnp.arange(len(noisy), dtype=jnp.int32))
        slope = jax.grad(lambda p: self.net.loss(p, state.extras, batch, state.key, h)[0])(theta)
        s, eps = x @ theta, 2 * noisy.astype(jnp.float32) - 1
        said, wrong = (s > 0).astype(jnp.int32), noisy != clean
        kappa = (jnp.tanh(s / 2) - eps) ** 2
        return {
            "cosine": -slope[0] / jnp.linalg.norm(slope),
            "corrected": _mean(said == clean, wrong),
            "memorised": _mean(said == noisy, wrong),
            "clean": _mean(said == clean, ~wrong),
            "test": jnp.mean((test_x @ theta > 0) == (test_y == 1)),
            "kappa_clean": _mean(kappa, ~wrong),
            "kappa_wrong": _mean(kappa, wrong),
            "norm": jnp.linalg.norm(theta),
            "along": theta[0],
        }


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """NaN of nothing."""
    return jnp.mean(values.astype(jnp.float32), where=where)


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows: what ``Look`` says for each (dim, elr_lambda, step, replica), and ``diverged``, the
    step from which the replica stands still; ``wrong`` is its part of wrong labels, ``bound`` the
    ``separability_bound`` of its dimension.

    Steps are about evenly apart in their logarithm, from 0 to the last. In the dimension of the
    control there is elr_lambda 0 alone.
    """
    found = _choices(points[0])
    for lambdas in (found.lambdas, (0.0,)):
        if mesh is not None:
            meshes.check(mesh, len(points) * len(lambdas) * found.replicas, found.examples)
    parts = [
        _trained(points, found.lambdas, found.dim, mesh, recorder),
        _trained(points, (0.0,), found.control, mesh, recorder),
    ]
    return [
        Table({name: np.concatenate([part[p][name] for part in parts]) for name in parts[0][p]}, {})
        for p in range(len(points))
    ]


def _choices(point: Config) -> Phases:
    assert isinstance(point.study, Phases)
    return point.study


def _trained(
    points: Sequence[Config],
    lambdas: Sequence[float],
    dim: int,
    mesh: Mesh | None,
    recorder: Recorder | None,
) -> list[dict[str, np.ndarray]]:
    """The columns of each point: its replicas of every lambda, all in one population."""
    first = _choices(points[0])
    steps, replicas = first.steps, first.replicas
    drawn, keys, scalars = _population(points, lambdas, dim)
    mesh = mesh or meshes.for_population(len(keys))
    train = optim.Train(momentum=0.0, nesterov=False, batch_size=first.examples)
    optimizer = optim.make(train, steps)
    net = task.elr(logistic(dim), first.examples, 2)
    at = sorted({0, *np.geomspace(1, steps, MEASURED).round().astype(int).tolist()})
    probes: list[Any] = [Look(net, drawn, tuple(at))]
    results = fit.fit(
        *(net, optimizer, fit.init(net, optimizer, keys, scalars, mesh)),
        *(_stream(drawn), steps, mesh),
        probes=probes,
        store=None if recorder is None else recorder.stage(f"dim {dim}"),
        name=f"phases, dim {dim}",
        record_every=steps,
    )
    columns, each = _columns(results, drawn, len(at)), len(lambdas) * replicas
    columns |= {
        "dim": np.full_like(columns["replica"], dim),
        "elr_lambda": np.repeat(np.tile(lambdas, len(points)), replicas)[columns["replica"]],
    }
    owner = columns["replica"] // each
    columns["replica"] = columns["replica"] % replicas
    tables = [{n: v[owner == p] for n, v in columns.items()} for p in range(len(points))]
    for point, table in zip(points, tables, strict=True):
        bound = separability_bound(first.examples, dim, _choices(point).flip)
        table["bound"] = np.full(len(table["step"]), bound)
    return tables


def _population(
    points: Sequence[Config], lambdas: Sequence[float], dim: int
) -> tuple[Drawn, jax.Array, dict[str, np.ndarray]]:
    """Data, keys and scalars; the replicas of each lambda follow one another, those of each point.

    A replica's data and start depend on its point's seed and its number alone.
    """
    data, keys = [], []
    for point in points:
        choices = _choices(point)
        draws = [_draw(choices, dim, point.seed, r) for r in range(choices.replicas)]
        roots = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(point.seed), np.arange(choices.replicas)
        )
        data += draws * len(lambdas)
        keys += [roots] * len(lambdas)
    each = len(lambdas) * _choices(points[0]).replicas
    scalars = {
        "elr_beta": [_choices(point).beta for point in points],
        "learning_rate": [_choices(point).learning_rate for point in points],
    }
    repeated = {name: np.repeat(values, each) for name, values in scalars.items()}
    repeated |= {
        "momentum": np.zeros(len(points) * each),
        "weight_decay": np.zeros(len(points) * each),
    }
    repeated["elr_lambda"] = np.repeat(np.tile(lambdas, len(points)), _choices(points[0]).replicas)
    return Drawn(*map(np.stack, zip(*data, strict=True))), jnp.concatenate(keys), repeated


def _draw(choices: Phases, dim: int, seed: int, replica: int) -> Drawn:
    """Training and test examples of one replica, from one draw."""
    own = int(np.random.SeedSequence([seed, replica]).generate_state(1)[0])
    n = choices.examples
    data, noisy = synthetic.opposite_gaussians(
        own, n=n + choices.tested, dim=dim, sigma=choices.sigma, flip=choices.flip
    )
    x = np.asarray(data.x)
    return Drawn(x[:n], noisy.labels[:n], noisy.clean[:n], x[n:], noisy.clean[n:])


def _stream(drawn: Drawn) -> Stream:
    """Every replica's own examples."""
    n, zero, one = drawn.noisy.shape[1], np.zeros(1, np.float32), np.ones(1, np.float32)
    data = Dataset(drawn.x[0], drawn.noisy[0], np.arange(n, dtype=np.int32), zero, one)
    return whole(data, len(drawn.x), inputs=drawn.x, labels=drawn.noisy)


def _columns(results: Results, drawn: Drawn, measured: int) -> dict[str, np.ndarray]:
    """What was looked at, with the replica's place in the population."""
    rows = results.rows
    chosen = ~np.isnan(rows["look.norm"])
    columns = {n.removeprefix("look."): v[chosen] for n, v in rows.items() if n[:5] == "look."}
    place = rows["replica"][chosen].astype(np.int64)
    assert len(place) == measured * len(drawn.x)
    wrong = (drawn.noisy != drawn.clean).mean(axis=1)
    return {
        "stage": np.full(len(place), "phases"),
        "step": rows["step"][chosen],
        "replica": place,
        **columns,
        "wrong": wrong[place],
        "diverged": results.arrays["diverged"][place],
    }
