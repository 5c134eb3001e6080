"""The spectrum of the Hessian while a network trains: its density, trace and norm."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dynamics import curvature
from dynamics.probes.sharpness import convolves
from dynamics.types import PROBE, Batch, Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True)
class Spectrum:
    """Of the Hessian of the mean loss of ``data`` in evaluation mode, each f32[K]: ``trace`` and
    ``frobenius`` (squared: tr H^2) with their standard errors ``trace_error`` and
    ``frobenius_error``, and the arrays ``nodes`` and ``weights`` f32[K, num, k], the density of its
    eigenvalues by stochastic Lanczos quadrature (``curvature.Density``).

    k = 1 is Hutchinson's estimate of the trace alone, ``num`` products (``frobenius`` is NaN then);
    k = 80 and num = 10 show the shape. Random vectors are drawn anew at each measurement. Without
    ``reorthogonalise`` an eigenvalue that stands out may appear more than once, its weight shared.

    Cost: num k Hessian products of the data, 2 to 3 gradients each, a replica. Convolutions on a
    CPU are kept out of compiled loops. ValueError: num < 2, which has no error; k < 1.

    Reference: Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; Hutchinson 1990.
    """

    task: Task
    data: Dataset
    every: int | Collection[int]
    k: int = 80
    num: int = 10
    name: str = "spectrum"
    batch_size: int | None = None  # examples of a product at a time; None: all
    reorthogonalise: bool = False

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        if self.num < 2:
            raise ValueError(
                f"{self.name}.num must be at least 2, one has no error, got {self.num}"
            )
        if self.k < 1:
            raise ValueError(f"{self.name}.k must be at least 1, got {self.k}")
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Moments f32[K], nodes and weights f32[K, num, k]."""
        batches = self._batches
        driven = convolves(self.task, state, batches)
        begin, extend, density = _program(self.task, self.num, self.k, self.reorthogonalise, driven)
        if driven:
            points = []
            for i in range(self.num):
                krylov = each(begin)((state, jnp.full_like(state.step, i)), batches)
                for _ in range(self.k):
                    krylov = each(extend)((state, krylov), batches)
                points.append(each(curvature.quadrature)(krylov))
            nodes, weights = (jnp.stack(x, axis=1) for x in zip(*points, strict=True))
        else:
            nodes, weights = each(density)(state, batches)
        moments = each(_moments)((state.params, nodes, weights))
        return carry, moments | {"nodes": nodes, "weights": weights}

    @functools.cached_property
    def _batches(self) -> Batch:
        return curvature.cut_dataset(self.data, self.batch_size)


def _moments(own: PyTree) -> dict[str, jax.Array]:
    """Of one replica's parameters, nodes, weights; a rule of k nodes is exact to degree 2 k - 1."""
    params, nodes, weights = own
    size = sum(x.size for x in jax.tree.leaves(params))
    density = curvature.Density(nodes, weights, jnp.asarray(size, nodes.dtype))
    trace = curvature.functional(density, lambda t: t)
    square = curvature.functional(density, jnp.square)
    known = nodes.shape[-1] > 1
    return {
        "trace": trace.value,
        "trace_error": trace.error,
        "frobenius": jnp.where(known, square.value, jnp.nan),
        "frobenius_error": jnp.where(known, square.error, jnp.nan),
    }


@functools.lru_cache(maxsize=64)
def _program(
    task: Task, num: int, k: int, reorthogonalise: bool, driven: bool
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The same function objects for the same probe, so that each is compiled once."""

    def operator_of(state: TrainState, batches: Batch) -> curvature.Operator:
        return curvature.of_task(task, state, batches, unroll=driven)

    def key_of(state: TrainState) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(state.key, PROBE), state.step)

    def begin(own: PyTree, batches: Batch) -> curvature.Krylov:
        state, i = own
        operator, key = operator_of(state, batches), jax.random.split(key_of(state), num)[i]
        v = curvature.random(operator, jax.random.fold_in(key, 0), "signs")
        return curvature.begin(
            operator, v, k, key=jax.random.fold_in(key, 1), reorthogonalise=reorthogonalise
        )

    def extend(own: PyTree, batches: Batch) -> curvature.Krylov:
        state, krylov = own
        return curvature.extend(operator_of(state, batches), krylov)

    def density(state: TrainState, batches: Batch) -> tuple[jax.Array, jax.Array]:
        found = curvature.density(
            operator_of(state, batches),
            key_of(state),
            num=num,
            k=k,
            reorthogonalise=reorthogonalise,
        )
        return found.nodes, found.weights

    return begin, extend, density
