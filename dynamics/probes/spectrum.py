"""The spectrum of the Hessian while a network trains: its density, trace and norm."""

from collections.abc import Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics import curvature, population
from dynamics.probes.sharpness import whole
from dynamics.types import PROBE, Batch, Context, PyTree, Task, TrainState


@dataclass(frozen=True)
class Spectrum:
    """Of the Hessian of the mean loss of the data ``on`` in evaluation mode, f32[K]: ``trace`` and
    ``frobenius`` (squared: tr H^2) with their standard errors ``trace_error`` and
    ``frobenius_error``, and the arrays ``nodes`` and ``weights`` f32[K, num, k], the density of its
    eigenvalues by stochastic Lanczos quadrature (``curvature.Density``).

    k = 1 is Hutchinson's estimate of the trace alone, ``num`` products, and there is no
    ``frobenius``; k = 80 and num = 10 show the shape. Random vectors are drawn anew at each
    measurement. Without ``reorthogonalise`` an eigenvalue that stands out may appear more than
    once, its weight shared.

    Cost: num k Hessian products of the data, 2 to 3 gradients each, a replica. Convolutions on a
    CPU are kept out of compiled loops. ValueError: num < 2, which has no error; k < 1.

    Reference: Ghorbani, Krishnan and Xiao 2019, arXiv 1901.10159; Hutchinson 1990.
    """

    every: int | Collection[int]
    on: str = "train"
    k: int = 80
    num: int = 10
    name: str = "spectrum"
    batch_size: int | None = None  # examples of a product at a time; None: all
    reorthogonalise: bool = False
    dims: tuple[str, ...] = ("vector", "node")

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        if self.num < 2:
            raise ValueError(
                f"{self.name}.num must be at least 2, one has no error, got {self.num}"
            )
        if self.k < 1:
            raise ValueError(f"{self.name}.k must be at least 1, got {self.k}")
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Moments f32[K], nodes and weights f32[K, num, k]."""
        batches = whole(context, self.on, self.batch_size)
        density = _Density(context.task, self.num, self.k, self.reorthogonalise, context.convolves)
        each = context.each
        if context.convolves:
            points = []
            for i in range(self.num):
                place = jnp.full(population.size(state), i, jnp.int32)
                krylov = each(density.begun)((state, place), batches)
                for _ in range(self.k):
                    krylov = each(density.extended)((state, krylov), batches)
                points.append(each(curvature.quadrature)(krylov))
            nodes, weights = (jnp.stack(x, axis=1) for x in zip(*points, strict=True))
        else:
            nodes, weights = each(density.whole)(state, batches)
        moments = each(_moments)((state.params, nodes, weights))
        return carry, moments | {"nodes": nodes, "weights": weights}


def _moments(own: PyTree) -> dict[str, jax.Array]:
    """Of one replica's parameters, nodes, weights; a rule of k nodes is exact to degree 2 k - 1."""
    params, nodes, weights = own
    size = sum(x.size for x in jax.tree.leaves(params))
    density = curvature.Density(nodes, weights, jnp.asarray(size, nodes.dtype))
    trace = curvature.functional(density, lambda t: t)
    found = {"trace": trace.value, "trace_error": trace.error}
    if nodes.shape[-1] > 1:
        square = curvature.functional(density, jnp.square)
        found |= {"frobenius": square.value, "frobenius_error": square.error}
    return found


@dataclass(frozen=True)
class _Density:
    """What is compiled of the probe, for one member: equal ones once."""

    task: Task
    num: int
    k: int
    reorthogonalise: bool
    unroll: bool

    def begun(self, own: PyTree, batches: Batch) -> curvature.Krylov:
        """Lanczos from one of the random vectors, before its first step."""
        state, i = own
        operator = self._operator(state, batches)
        key = jax.random.split(_key(state), self.num)[i]
        v = curvature.random(operator, jax.random.fold_in(key, 0), "signs")
        return curvature.begin(
            operator,
            v,
            self.k,
            key=jax.random.fold_in(key, 1),
            reorthogonalise=self.reorthogonalise,
        )

    def extended(self, own: PyTree, batches: Batch) -> curvature.Krylov:
        """Lanczos after a step more."""
        state, krylov = own
        return curvature.extend(self._operator(state, batches), krylov)

    def whole(self, state: TrainState, batches: Batch) -> tuple[jax.Array, jax.Array]:
        """Nodes and weights f32[num, k], all in one program."""
        found = curvature.density(
            self._operator(state, batches),
            _key(state),
            num=self.num,
            k=self.k,
            reorthogonalise=self.reorthogonalise,
        )
        return found.nodes, found.weights

    def _operator(self, state: TrainState, batches: Batch) -> curvature.Operator:
        return curvature.of_task(self.task, state, batches, unroll=self.unroll)


def _key(state: TrainState) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(state.key, PROBE), state.step)
