"""Minibatches on a diagonal linear net: the trace law of SGD, and where it ends.

f(x) = <u*u - v*v, x>, the loss 1/2 mean (f(x_i) - y_i)^2, more weights than examples, so every
minimum that a run ends at fits all of them and ``dynamics.stability.sgd`` is exact there. With one
example a batch the trace of the Hessian ends at 2 / eta at most; with more it does not, and
gradient descent keeps to the largest eigenvalue only. ``necessary`` holds for all.

Reference: Wu and Su 2023, arXiv 2305.17490.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dynamics import fit, optim, task
from dynamics import mesh as meshes
from dynamics.data import synthetic
from dynamics.record import Recorder, Table
from dynamics.stability import sgd
from dynamics.types import ORDER, Batch, Each, Key, PyTree, Stream, Task, TrainState
from experiments.stability_theory import population
from experiments.stability_theory.config import Config, Diagonal

MEASURED = 60  # steps at which a run is looked at, about
KINDS = ("equal", "normal", "heavy")  # gradients of the minima whose critical rates are computed


def net(dim: int, start: Any) -> Task:
    """Of x with the target in its last column, because labels are integers."""

    def init(key: Key) -> PyTree:
        return {"u": jnp.full(dim, start), "v": jnp.full(dim, start)}

    def predict(params: PyTree, x: jax.Array) -> jax.Array:
        return x[:, :-1] @ (params["u"] ** 2 - params["v"] ** 2) - x[:, -1]

    return task.of_function(predict, init=init, loss=lambda error, _: error**2 / 2)


def minibatches(stream: Stream, batch_size: int) -> Stream:
    """Independent draws from the batch of another stream: ``noise_factor`` 1 / batch_size.

    Not the epochs of ``resident``, in which batches depend on one another: the operator of the
    theory is of independent ones.
    """

    def batch(shared: PyTree, own: PyTree, fed: PyTree, key: Key, step: jax.Array) -> Batch:
        drawn = jax.random.fold_in(jax.random.fold_in(key, ORDER), step)
        rows = jax.random.randint(drawn, (batch_size,), 0, stream.batch_size, jnp.int32)
        return jax.tree.map(lambda a: a[rows], stream.batch(shared, own, fed, key, step))

    return stream._replace(batch=batch, batch_size=batch_size)


def gradients(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """Of the outputs, [n, 2 dim]."""
    return jnp.concatenate([2 * x * u[None], -2 * x * v[None]], axis=1)


@dataclass(frozen=True, eq=False)
class Look:
    """``trace``: eta tr H / 2 of (1/n) sum of squared gradients; ``top``: eta lambda_max / 2;
    ``necessary``: the bound of ``sgd``; ``mistake``: the mean loss of all examples.

    Cost: of the Gram matrix of the examples' gradients.
    """

    data: np.ndarray  # f32[K, n, dim + 1]
    c: float
    every: Collection[int]
    name: str = "look"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Everything f32[K]."""
        return carry, each(self._found)((state, self.data))

    def _found(self, own: tuple[TrainState, jax.Array]) -> dict[str, jax.Array]:
        state, data = own
        u, v, x = state.params["u"], state.params["v"], data[:, :-1]
        eta, slopes = state.hyperparameters["learning_rate"], gradients(u, v, x)
        return {
            "trace": eta / 2 * jnp.sum(slopes**2) / len(x),
            "top": eta / 2 * sgd.modes(slopes).curvature[-1],
            "necessary": sgd.necessary(slopes, eta, self.c),
            "mistake": jnp.mean((x @ (u**2 - v**2) - data[:, -1]) ** 2) / 2,
        }


def study(points: Sequence[Config], mesh: Mesh | None, recorder: Recorder | None) -> list[Table]:
    """Rows: what ``Look`` says for each (batch, learning_rate, step, replica), and ``diverged``,
    the step from which it stands still; batch = examples is gradient descent.

    Arrays, of made-up minima at their critical learning rates: ``critical_trace_<kind>`` (eta tr H
    / 2), ``critical_necessary_<kind>`` (at most 1) and ``critical_error_<kind>`` (the relative
    error of the rate), f64[B, 2, R] for ``critical_batches`` i64[B], drawn with replacement and
    without. Those in float64, on one device, whatever the mesh.
    """
    first = _choices(points[0])
    for batch in (*first.batches, first.examples):
        if mesh is not None:
            meshes.check(mesh, len(points) * len(_rates(first, batch)) * first.replicas, batch)
    parts = [_trained(points, b, mesh, recorder) for b in (*first.batches, first.examples)]
    return [
        Table({n: np.concatenate([part[p][n] for part in parts]) for n in parts[0][p]}, made)
        for p, made in enumerate(map(_critical, points))
    ]


def _choices(point: Config) -> Diagonal:
    assert isinstance(point.study, Diagonal)
    return point.study


def _rates(choices: Diagonal, batch: int) -> tuple[float, ...]:
    large = choices.large_rates if batch == choices.examples else ()
    return tuple(sorted({*choices.learning_rates, *large}))


def _trained(
    points: Sequence[Config], batch: int, mesh: Mesh | None, recorder: Recorder | None
) -> list[dict[str, np.ndarray]]:
    """The columns of each point; the replicas of each rate follow one another."""
    first, full = _choices(points[0]), batch == _choices(points[0]).examples
    rates, replicas = _rates(first, batch), first.replicas
    each = len(rates) * replicas
    data, keys = _population(points, len(rates))
    mesh = mesh or meshes.for_population(len(data))
    etas = np.tile(np.repeat(rates, replicas), len(points))
    scalars = {"learning_rate": etas, "momentum": 0.0, "weight_decay": 0.0}
    train = optim.Train(momentum=0.0, nesterov=False, batch_size=batch)
    optimizer, model = optim.make(train, first.steps), net(first.dim, first.start)
    state = fit.init(model, optimizer, keys, scalars, mesh)
    starts = np.repeat([_choices(point).start for point in points], each)[:, None]
    starts = np.broadcast_to(starts, (len(data), first.dim))
    stream = population.stream(data)
    c = 0.0 if full else sgd.noise_factor(batch, first.examples)
    probes: list[Any] = [Look(data, c, population.logarithmic(first.steps, MEASURED))]
    results = fit.fit(
        *(model, optimizer, population.started(state, {"u": starts, "v": starts})),
        *(stream if full else minibatches(stream, batch), first.steps, mesh),
        probes=probes,
        store=None if recorder is None else recorder.stage(f"batch {batch}"),
        how="vmap",  # a few numbers each
        name=f"diagonal, batch {batch}",
        record_every=first.steps,
    )
    found = population.looks(results, "look")
    place = found.pop("place")
    found |= {
        "replica": place % replicas,
        "learning_rate": etas[place],
        "diverged": results.arrays["diverged"][place],
        "batch": np.full(len(place), batch),
        "stage": np.full(len(place), "diagonal"),
    }
    owner = place // each
    return [{n: v[owner == p] for n, v in found.items()} for p in range(len(points))]


def _population(points: Sequence[Config], rates: int) -> tuple[np.ndarray, jax.Array]:
    """f32[K, n, dim + 1] and keys [K]: a replica's depend on its point's seed and its number."""
    data, keys = [], []
    for point in points:
        choices = _choices(point)
        drawn = [_draw(choices, point.seed, r) for r in range(choices.replicas)]
        roots = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(point.seed), np.arange(choices.replicas)
        )
        data += drawn * rates
        keys += [roots] * rates
    return np.stack(data), jnp.concatenate(keys)


def _draw(choices: Diagonal, seed: int, replica: int) -> np.ndarray:
    own, n = population.own_seed(seed, replica), choices.examples
    found = synthetic.sparse_regression(own, n=n, dim=choices.dim, nonzero=choices.nonzero)
    return np.concatenate([found.x, found.targets[:, None]], axis=1)


def _critical(point: Config) -> dict[str, np.ndarray]:
    """Critical learning rates of made-up minima, exactly."""
    choices = _choices(point)
    n, p = choices.features, choices.directions
    batches = [1, 2, 4, 8, 16, n]
    arrays = {"critical_batches": np.array(batches)}
    with jax.enable_x64(True):
        rate, bound = jax.jit(sgd.critical_learning_rate), jax.jit(sgd.necessary)
        for kind in KINDS:
            found = np.empty((3, len(batches), 2, choices.replicas))
            for replica in range(choices.replicas):
                x = jnp.asarray(_features(kind, n, p, [point.seed, replica]))
                trace = float(jnp.mean(jnp.sum(x**2, axis=1)))
                for b, batch in enumerate(batches):
                    for i, replacement in enumerate((True, False)):
                        c = sgd.noise_factor(batch, n, replacement=replacement)
                        eta, error = map(float, rate(x, c))
                        row = (eta * trace / 2, float(bound(x, eta, c)), error / eta)
                        found[:, b, i, replica] = row
            names = ("trace", "necessary", "error")
            arrays |= {f"critical_{n}_{kind}": v for n, v in zip(names, found, strict=True)}
    return arrays


def _features(kind: str, n: int, p: int, seed: list[int]) -> np.ndarray:
    """f64[n, p]: gradients of equal norms, normal ones, or ones of heavy-tailed norms."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    scales = {
        "equal": 1 / np.linalg.norm(x, axis=1),
        "normal": np.ones(n),
        "heavy": np.abs(rng.standard_t(3, size=n)),
    }
    return x * scales[kind][:, None]
