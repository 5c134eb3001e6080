"""The sharpness of the loss while a network trains, beside what its optimizer can bear."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from dynamics import curvature, population
from dynamics.optim import Train
from dynamics.stability import thresholds
from dynamics.types import PROBE, Batch, Dataset, Each, PyTree, Task, TrainState


@dataclass(frozen=True)
class Sharpness:
    """``<name>.value`` f32[K], the largest algebraic eigenvalue of the Hessian of the mean loss of
    ``data`` in evaluation mode, its ``residual`` (an eigenvalue is so near), and the ``smallest``.

    With ``train`` also ``ratio``, to the optimizer's ``stability_threshold`` at the learning rate
    of the step that comes (``num_steps`` is the length of the run, for schedules). With
    ``preconditioned`` all of this is of P^-1/2 H P^-1/2, P what Adam divides by after the last
    step; NaN before the first.

    The first measurement is by ``cold`` Lanczos steps from a random vector; later ones by ``warm``
    from the vector before. It is of ``data``, not of the batches that are trained on, whose own
    Hessians are sharper in the mean, and of the loss alone, without weight decay. A ratio above 1
    says that the quadratic at hand would diverge; networks hover a few percent above 1.

    Cost: ``cold`` or ``warm`` Hessian products of the data, 2 to 3 gradients each, a replica; a
    vector of the parameters is remembered. Convolutions on a CPU are kept out of compiled loops.
    ValueError: ``preconditioned`` of a state without Adam's moments.

    Reference: Cohen et al. 2021, arXiv 2103.00065; for Adam 2022, arXiv 2207.14484.
    """

    task: Task
    data: Dataset
    every: int | Collection[int]
    train: Train | None = None
    num_steps: int = 0
    preconditioned: bool = False
    name: str = "sharpness"
    cold: int = 20
    warm: int = 8
    batch_size: int | None = None  # examples of a product at a time; None: all

    def start(self, state: TrainState, each: Each) -> PyTree:
        """No vector yet."""
        if self.preconditioned and adam(state.opt_state) is None:
            raise ValueError(
                f"{self.name} is of a preconditioned Hessian, but the optimizer has no moments of "
                "Adam: give preconditioned=False"
            )
        begun = jnp.zeros(len(state.step), bool)
        return {"vector": jax.tree.map(jnp.zeros_like, state.params), "begun": begun}

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Both ends of the spectrum, f32[K]."""
        begun = carry["begun"]
        warm = not isinstance(begun, Tracer) and bool(begun.all())  # planned: as at first
        own, batches = (state, carry["vector"]), self._batches
        driven = convolves(self.task, state, batches)
        about = (self.task, self.train, self.num_steps, self.preconditioned)
        begin, extend, finish = _program(*about, warm, driven)
        k = self.warm if warm else self.cold
        if driven:
            krylov = each(begin(k))(own, batches)
            for _ in range(k):
                krylov = each(extend)((own, krylov), batches)
            vector, found = each(finish)((own, krylov), batches)
        else:
            vector, found = each(_looped(begin, extend, finish, k))(own, batches)
        known = jnp.isfinite(found["value"])
        return {"vector": vector, "begun": carry["begun"] | known}, found

    @functools.cached_property
    def _batches(self) -> Batch:
        return curvature.cut_dataset(self.data, self.batch_size)


def adam(opt_state: PyTree) -> optax.ScaleByAdamState | None:
    """The moments of Adam within an optimizer's state."""
    inside = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=inside) if inside(x)]
    return found[0] if found else None


def preconditioner(state: TrainState) -> PyTree:
    """``(1 - beta1^t) (sqrt(v / (1 - beta2^t)) + epsilon)`` after t steps of Adam: what its average
    of gradients, of weight 1 - beta1, is divided by. NaN for t = 0.

    Reference: Cohen et al. 2022, arXiv 2207.14484, section 3, with the corrections for the first
    steps in it.
    """
    moments, h = adam(state.opt_state), state.hyperparameters
    assert moments is not None
    t = jnp.asarray(moments.count, jnp.float32)
    first, second = (1 - h[name] ** t for name in ("momentum", "second_moment"))
    return jax.tree.map(lambda v: first * (jnp.sqrt(v / second) + h["epsilon"]), moments.nu)


@functools.lru_cache(maxsize=64)
def _program(
    task: Task,
    train: Train | None,
    num_steps: int,
    preconditioned: bool,
    warm: bool,
    driven: bool,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The same function objects for the same probe, so that each is compiled once."""

    def operator_of(state: TrainState, batches: Batch) -> curvature.Operator:
        found = curvature.of_task(task, state, batches, unroll=driven)
        return curvature.preconditioned(found, preconditioner(state)) if preconditioned else found

    @functools.cache
    def begin(k: int) -> Callable[..., Any]:
        def begun(own: PyTree, batches: Batch) -> curvature.Krylov:
            state, vector = own
            operator = operator_of(state, batches)
            key = jax.random.fold_in(jax.random.fold_in(state.key, PROBE), state.step)
            start = jax.random.fold_in(key, 0)
            v = curvature.random(operator, start)
            if warm:
                v = curvature.perturbed(operator, start, vector)
            return curvature.begin(operator, v, k, key=jax.random.fold_in(key, 1))

        return begun

    def extend(own: PyTree, batches: Batch) -> curvature.Krylov:
        (state, _), krylov = own
        return curvature.extend(operator_of(state, batches), krylov)

    def finish(own: PyTree, batches: Batch) -> Any:
        (state, _), krylov = own
        operator = operator_of(state, batches)
        top = curvature.eigenpairs(operator, krylov, 1)
        bottom = curvature.eigenpairs(operator, krylov, 1, smallest=True)
        vector = jax.tree.map(lambda x: x[0], top.vectors)
        found = {"value": top.values[0], "residual": top.residuals[0]}
        found["smallest"] = bottom.values[0]
        if train is not None:
            scalars = state.hyperparameters
            now = thresholds.rate(train, state.step, num_steps, hyperparameters=scalars)
            bound = thresholds.stability_threshold(train, now, hyperparameters=scalars)
            found["ratio"] = found["value"] / bound
        return vector, found

    return begin, extend, finish


@functools.lru_cache(maxsize=64)
def _looped(
    begin: Callable[..., Any], extend: Callable[..., Any], finish: Callable[..., Any], k: int
) -> Callable[..., Any]:
    def found(own: PyTree, batches: Batch) -> Any:
        def one(_: jax.Array, krylov: curvature.Krylov) -> curvature.Krylov:
            return extend((own, krylov), batches)

        return finish((own, jax.lax.fori_loop(0, k, one, begin(k)(own, batches))), batches)

    return found


def convolves(task: Task, state: TrainState, batches: Batch) -> bool:
    """Whether a product would convolve, on a CPU."""
    planned = isinstance(state.step, Tracer)
    if planned or next(iter(state.step.devices())).platform != "cpu":
        return False
    leaves, tree = jax.tree.flatten((state, batches))
    one = tuple(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in leaves)
    return _convolves(task, tree, one)


@functools.lru_cache(maxsize=64)
def _convolves(task: Task, tree: Any, one: tuple[jax.ShapeDtypeStruct, ...]) -> bool:
    """The same of the shapes of one replica and microbatch: to trace takes longer than to run."""

    def forward(state: TrainState, batch: Batch) -> Any:
        return task.evaluate(state.params, state.extras, batch, state.hyperparameters).loss

    return population.has_convolution(jax.make_jaxpr(forward)(*jax.tree.unflatten(tree, one)))
