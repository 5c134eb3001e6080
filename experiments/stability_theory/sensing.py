"""A positive matrix M of rank r from a factor with k > r columns: what the extra ones cost.

All of M is measured (the measurements are an isometry). ``symmetric``: descent on 1/4
|X X^T - M|^2. Redundant singular values obey s <- s - eta s^3, so that |X X^T - M|^2 ends as
(k - r) / (4 eta^2 t^2), whatever the start: the constant is ours. ``asymmetric``: descent on 1/2
|F G^T - M|^2 with G smaller at the start, which converges at the rate 2 eta s^2 a step, s the
smallest singular value of F, proportional to its start; a balanced start does not. ``modified``:
after some steps the small singular values of F are raised to one value and those of G lowered,
the product unchanged, which frees the rate of the start. In float64: errors end below 1e-16.

Reference: Xiong, Ding and Du 2023, arXiv 2310.01769, theorems on both factors and section on the
modified step, whose details are our reading.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, optim
from dynamics import mesh as meshes
from dynamics.data import synthetic
from dynamics.record import Recorder, Table
from dynamics.types import Aux, Batch, Each, Key, PyTree, Scalars, Task, TrainState
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Sensing

MEASURED = 60  # steps at which a run is looked at, about
Columns = dict[str, np.ndarray]


def factorisation(dim: int, columns: int, *, symmetric: bool) -> Task:
    """The loss of X X^T or F G^T; the one example of a batch is u [dim, rank], M = u u^T.

    ``symmetric``: 1/4 |X X^T - M|^2, else 1/2 |F G^T - M|^2. Columns that are zero stay zero.
    """

    def init(key: Key) -> tuple[PyTree, PyTree]:
        names = ("x",) if symmetric else ("f", "g")
        return {name: jnp.zeros((dim, columns)) for name in names}, {}

    def evaluate(params: PyTree, extras: PyTree, batch: Batch, h: Scalars) -> Aux:
        square = jnp.sum(error(params, batch.x[0]) ** 2)
        each = jnp.full(1, square * (0.25 if symmetric else 0.5))
        return Aux(loss=each, logits=each, y=batch.y, index=batch.index)

    def train(
        params: PyTree, extras: PyTree, batch: Batch, key: Key, h: Scalars
    ) -> tuple[jax.Array, tuple[PyTree, Aux]]:
        found = evaluate(params, extras, batch, h)
        return found.loss.mean(), (extras, found)

    return Task(init, train, evaluate)


def error(params: PyTree, factor: jax.Array) -> jax.Array:
    """X X^T - u u^T, or F G^T - u u^T."""
    left = params["x"] if "x" in params else params["f"]
    right = params["x"] if "x" in params else params["g"]
    factor = factor.astype(left.dtype)
    return left @ right.T - factor @ factor.T


def raised(f: np.ndarray, g: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """(F B S, G B S^-1) with F = A diag(s) B^T and S = max(least / s, 1): the product is F G^T.

    Every singular value of the new F is at least ``least``. Ours, after Xiong, Ding and Du 2023.
    """
    _, s, turned = np.linalg.svd(f, full_matrices=False)
    scale = np.maximum(least / s, 1)
    return f @ turned.T * scale, g @ turned.T / scale


@dataclass(frozen=True, eq=False)
class Look:
    """``error``: |X X^T - M|^2 or |F G^T - M|^2; ``least``: the smallest singular value of F or X.

    Of X the smallest of all columns, zeros among them.
    """

    factors: np.ndarray  # f32[K, dim, rank]
    every: Collection[int]
    name: str = "look"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Both f64[K]."""
        return carry, each(self._found)((state, self.factors))

    def _found(self, own: tuple[TrainState, jax.Array]) -> dict[str, jax.Array]:
        state, factor = own
        left = state.params["x"] if "x" in state.params else state.params["f"]
        gram = jnp.linalg.eigvalsh(left.T @ left)
        least = jnp.sqrt(jnp.maximum(gram[0], 0))
        return {"error": jnp.sum(error(state.params, factor) ** 2), "least": least}


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows: ``error`` and ``least``, as ``Look`` says, by method, columns, scale, step and replica.

    ``method`` is "symmetric", for every number of columns; or, with F of standard deviation
    ``scale`` at the start, "asymmetric", "balanced" (G as F) or "modified", which is asymmetric
    until step ``before``. Where methods share a seed they share M and F.
    """
    for count in (len(_choices(points[0]).columns), 3 * len(_choices(points[0]).scales)):
        if mesh is not None:
            meshes.check(mesh, len(points) * count * _choices(points[0]).replicas, 1)
    with jax.enable_x64(True):
        parts = [_symmetric(points, mesh, recorder), _asymmetric(points, mesh, recorder)]
    names = ("method", "columns", "scale", "step", "replica", "error", "least")
    tables = []
    for p in range(len(points)):
        rows = {n: np.concatenate([c[n][c["point"] == p] for c in parts]) for n in names}
        tables.append(Table({"stage": np.full(len(rows["step"]), "sensing")} | rows, {}))
    return tables


def _choices(point: Config) -> Sensing:
    assert isinstance(point.study, Sensing)
    return point.study


def _factor(choices: Sensing, seed: int, replica: int) -> np.ndarray:
    own, rank = population.own_seed(seed, replica), choices.rank
    return synthetic.low_rank(own, dim=choices.dim, rank=rank, smallest=choices.smallest)


def _start(choices: Sensing, seed: int, replica: int, columns: int) -> tuple[np.ndarray, ...]:
    """Two matrices f64[dim, columns] of N(0, 1)."""
    rng = np.random.default_rng([population.own_seed(seed, replica), columns])
    return tuple(rng.standard_normal((2, choices.dim, columns)))


def _symmetric(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> Columns:
    first = _choices(points[0])
    widest, cells, starts, factors = max(first.columns), [], [], []
    for p, point in enumerate(points):
        for columns in first.columns:
            for r in range(first.replicas):
                x = _choices(point).start * _start(first, point.seed, r, columns)[0]
                starts.append(np.pad(x, ((0, 0), (0, widest - columns))))
                factors.append(_factor(first, point.seed, r))
                cells.append((p, "symmetric", columns, _choices(point).start, r))
    net = factorisation(first.dim, widest, symmetric=True)
    rates = np.array([_choices(points[p]).learning_rate for p, *_ in cells])
    descent = _Descent(net, np.stack(factors), rates, mesh, recorder)
    state = descent.state({"x": np.stack(starts)})
    at = population.logarithmic(first.steps, MEASURED)
    return _columns(cells, descent.trained(state, first.steps, at, "symmetric")[1])


def _asymmetric(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> Columns:
    first = _choices(points[0])
    cells, starts, factors = [], [], []
    for p, point in enumerate(points):
        choices = _choices(point)
        for method in ("asymmetric", "balanced", "modified"):
            for scale in first.scales:
                for r in range(first.replicas):
                    f, g = _start(first, point.seed, r, first.width)
                    g = f if method == "balanced" else choices.imbalance * g
                    starts.append((scale * f, scale * g))
                    factors.append(_factor(first, point.seed, r))
                    cells.append((p, method, first.width, scale, r))
    net = factorisation(first.dim, first.width, symmetric=False)
    rates = np.array([_choices(points[p]).learning_rate for p, *_ in cells])
    descent = _Descent(net, np.stack(factors), rates, mesh, recorder)
    f, g = (np.stack(each) for each in zip(*starts, strict=True))
    state, until = descent.state({"f": f, "g": g}), first.before
    at = population.logarithmic(until, MEASURED // 2)
    state, early = descent.trained(state, until, at, "asymmetric")
    f, g = (np.array(meshes.fetch(state.params[name])) for name in ("f", "g"))
    for k, (p, method, *_) in enumerate(cells):
        if method == "modified":
            f[k], g[k] = raised(f[k], g[k], _choices(points[p]).raised)
    state, last = population.started(state, {"f": f, "g": g}), until + first.after
    at = tuple(np.unique(np.linspace(until, last, MEASURED // 2).round().astype(int)).tolist())
    _, late = descent.trained(state, last, at, "modified")
    late = {n: v[late["step"] > until] for n, v in late.items()}
    return _columns(cells, {n: np.concatenate([early[n], late[n]]) for n in early})


@dataclass(frozen=True, eq=False)
class _Descent:
    """Gradient descent on every replica's own matrix."""

    net: Task
    factors: np.ndarray  # f32[K, dim, rank]
    rates: np.ndarray  # f64[K]
    mesh: Mesh | None
    recorder: Recorder | None

    def state(self, params: PyTree) -> TrainState:
        """Before the first step, at these parameters [K, ...]."""
        keys = jax.random.split(jax.random.key(0), len(self.factors))
        scalars = {"learning_rate": self.rates, "momentum": 0.0, "weight_decay": 0.0}
        state = fit.init(self.net, self._optimizer(1), keys, scalars, self._mesh())
        return population.started(state, params)

    def trained(
        self, state: TrainState, until: int, at: tuple[int, ...], stage: str
    ) -> tuple[TrainState, Columns]:
        """Until step ``until``: the state, and what is seen at the steps ``at``."""
        probes: list[Any] = [Look(self.factors, at)]
        stream = population.stream(self.factors[:, None])
        results = fit.fit(
            *(self.net, self._optimizer(until), state, stream, until, self._mesh()),
            probes=probes,
            store=None if self.recorder is None else self.recorder.stage(stage),
            how="vmap",  # a few hundred numbers each
            name=f"sensing, {stage}",
            record_every=until,
        )
        assert results.state is not None
        return results.state, population.looks(results, "look")

    def _mesh(self) -> Mesh:
        return self.mesh or meshes.for_population(len(self.factors))

    def _optimizer(self, steps: int) -> Any:
        return optim.make(optim.Train(momentum=0.0, nesterov=False, batch_size=1), steps)


def _columns(cells: Sequence[tuple], found: Columns) -> Columns:
    """What was seen, with the words for the replica that it was seen of."""
    words = population.columns(("point", "method", "columns", "scale", "replica"), cells)
    return found | {name: values[found["place"]] for name, values in words.items()}
