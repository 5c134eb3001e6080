"""The sharpness of the loss while a network trains, beside what its optimizer can bear."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dynamics import curvature, optim, population
from dynamics.types import PROBE, Batch, Context, PyTree, Task, TrainState


@dataclass(frozen=True)
class Sharpness:
    """``value`` f32[K], the largest algebraic eigenvalue of the Hessian of the mean loss of the
    data set ``on`` in evaluation mode, its ``residual`` (an eigenvalue is so near), and the
    ``smallest``.

    With ``rule``, the config of the optimizer that trains, also ``ratio``, to the rule's
    ``threshold`` at the learning rate of the step that comes (``num_steps`` is the length of the
    run, for schedules); and all of this is of P^-1/2 H P^-1/2, P what a rule like Adam divides by
    after the last step; before the first nothing is measured. Without ``rule`` it is of H, whatever
    trains.

    The first measurement is by ``cold`` Lanczos steps from a random vector; later ones by ``warm``
    from the vector before. It is of all the data, not of the batches that are trained on, whose own
    Hessians are sharper in the mean, and of the loss alone, without weight decay. A ratio above 1
    says that the quadratic at hand would diverge; networks hover a few percent above 1.

    Cost: ``cold`` or ``warm`` Hessian products of the data, 2 to 3 gradients each, a replica; a
    vector of the parameters is remembered. Convolutions on a CPU are kept out of compiled loops.
    ValueError: a ``rule`` without a threshold, or whose preconditioner is not in the state.

    Reference: Cohen et al. 2021, arXiv 2103.00065; for Adam 2022, arXiv 2207.14484.
    """

    every: int | Collection[int]
    on: str = "train"
    rule: optim.Optimizer | None = None
    num_steps: int = 0
    name: str = "sharpness"
    cold: int = 20
    warm: int = 8
    batch_size: int | None = None  # examples of a product at a time; None: all

    def start(self, context: Context, state: TrainState) -> PyTree:
        """No vector yet."""
        context.examples(self.on)
        if self.rule is not None:
            self.rule.threshold(1.0)
            divided = jax.vmap(self.rule.preconditioner)
            jax.eval_shape(divided, state.opt_state, state.hyperparameters)
        begun = jnp.zeros(population.size(state), bool)
        return {"vector": jax.tree.map(jnp.zeros_like, state.params), "begun": begun}

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """Both ends of the spectrum, f32[K]."""
        begun = carry["begun"]
        planned = isinstance(begun, Tracer)
        if self._divides(state) and not planned and not int(state.step):
            return carry, {}
        warm = not planned and bool(begun.all())  # planned: as at first
        k = self.warm if warm else self.cold
        batches = whole(context, self.on, self.batch_size)
        lanczos = _Lanczos(context.task, self.rule, self.num_steps, warm, context.convolves, k)
        own, each = (state, carry["vector"]), context.each
        if context.convolves:
            krylov = each(lanczos.begun)(own, batches)
            for _ in range(k):
                krylov = each(lanczos.extended)((own, krylov), batches)
            vector, found = each(lanczos.finished)((own, krylov), batches)
        else:
            vector, found = each(lanczos.looped)(own, batches)
        known = jnp.isfinite(found["value"])
        return {"vector": vector, "begun": carry["begun"] | known}, found

    def _divides(self, state: TrainState) -> bool:
        """Whether the rule preconditions."""
        if self.rule is None:
            return False
        divided = jax.vmap(self.rule.preconditioner)
        return jax.eval_shape(divided, state.opt_state, state.hyperparameters) is not None


def whole(context: Context, on: str, size: int | None = None) -> Batch:
    """A data set as microbatches [n / size, size, ...], made once for a run."""
    key = ("batches", on, size)
    if key not in context.kept:
        context.kept[key] = curvature.cut_dataset(context.examples(on), size)
    return context.kept[key]


@dataclass(frozen=True)
class _Lanczos:
    """What is compiled of the probe, for one member: equal ones once."""

    task: Task
    rule: optim.Optimizer | None
    num_steps: int
    warm: bool
    unroll: bool
    k: int

    def begun(self, own: PyTree, batches: Batch) -> curvature.Krylov:
        """Lanczos before its first step."""
        state, vector = own
        operator = self._operator(state, batches)
        key = jax.random.fold_in(jax.random.fold_in(state.key, PROBE), state.step)
        start = jax.random.fold_in(key, 0)
        v = curvature.random(operator, start)
        if self.warm:
            v = curvature.perturbed(operator, start, vector)
        return curvature.begin(operator, v, self.k, key=jax.random.fold_in(key, 1))

    def extended(self, own: PyTree, batches: Batch) -> curvature.Krylov:
        """Lanczos after a step more."""
        (state, _), krylov = own
        return curvature.extend(self._operator(state, batches), krylov)

    def finished(self, own: PyTree, batches: Batch) -> Any:
        """The first vector, and the metrics."""
        (state, _), krylov = own
        operator = self._operator(state, batches)
        top = curvature.eigenpairs(operator, krylov, 1)
        bottom = curvature.eigenpairs(operator, krylov, 1, smallest=True)
        vector = jax.tree.map(lambda x: x[0], top.vectors)
        found = {"value": top.values[0], "residual": top.residuals[0]}
        found["smallest"] = bottom.values[0]
        if self.rule is not None:
            scalars = state.hyperparameters
            now = optim.rate(self.rule, state.step, self.num_steps, hyperparameters=scalars)
            found["ratio"] = found["value"] / self.rule.threshold(now, hyperparameters=scalars)
        return vector, found

    def looped(self, own: PyTree, batches: Batch) -> Any:
        """All steps in one program."""

        def one(_: jax.Array, krylov: curvature.Krylov) -> curvature.Krylov:
            return self.extended((own, krylov), batches)

        krylov = jax.lax.fori_loop(0, self.k, one, self.begun(own, batches))
        return self.finished((own, krylov), batches)

    def _operator(self, state: TrainState, batches: Batch) -> curvature.Operator:
        found = curvature.of_task(self.task, state, batches, unroll=self.unroll)
        divided = None
        if self.rule is not None:
            divided = self.rule.preconditioner(state.opt_state, state.hyperparameters)
        return found if divided is None else curvature.preconditioned(found, divided)
