"""The one train step, of one replica: pure, unjitted, and ignorant of every method."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from dynamics.types import (
    INIT,
    LOSS,
    NEVER,
    Aux,
    Batch,
    Key,
    Leaf,
    PyTree,
    Task,
    TrainState,
    Written,
)

Step = Callable[[TrainState, Batch], tuple[TrainState, Aux, dict[str, jax.Array]]]


def init(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: Key,
    hyperparameters: Mapping[str, jax.Array],
) -> TrainState:
    """The state before the first step, from a root key and the replica's scalars."""
    params, extras = task.init(jax.random.fold_in(key, INIT))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        extras=extras,
        opt_state=optimizer.init(params),
        hyperparameters=dict(hyperparameters),
        key=key,
        diverged=jnp.int32(NEVER),
    )


def given(params: PyTree, extras: PyTree | None = None, key: Key | None = None) -> TrainState:
    """The state of parameters that were trained elsewhere: enough to score, not to go on."""
    return TrainState(
        step=jnp.int32(0),
        params=params,
        extras={} if extras is None else extras,
        opt_state=(),
        hyperparameters={},
        key=jax.random.key(0) if key is None else key,
        diverged=jnp.int32(NEVER),
    )


def make(
    task: Task,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    unroll: bool = False,
) -> Step:
    """``(state, batch) -> (state, aux, metrics)``: gradient, update, and nothing else.

    The optimizer is any optax transformation; one that takes ``hyperparameters`` and ``step`` as
    extra arguments gets them. The batch is split into ``accumulate`` microbatches whose gradients
    are averaged; batch statistics see them one after the other. ``unroll`` writes that loop out,
    for convolutions on a CPU.

    From the first step whose loss is not finite, the replica is frozen: its ``diverged`` is that
    step, its parameters are those that gave the loss, and only its clock goes on.

    Cost: one gradient evaluation of the batch.
    """
    update = optax.with_extra_args_support(optimizer).update
    gradient = jax.value_and_grad(task.loss, has_aux=True)

    def accumulated(
        state: TrainState, batch: Batch, key: Key
    ) -> tuple[tuple[jax.Array, tuple[PyTree, Aux]], PyTree]:
        if accumulate == 1:
            return gradient(state.params, state.extras, batch, key, state.hyperparameters)
        size = batch.index.shape[0] // accumulate
        parts = jax.tree.map(lambda x: x.reshape(accumulate, size, *x.shape[1:]), batch)

        def one(carry: tuple, part: tuple[jax.Array, Batch]) -> tuple[tuple, tuple]:
            before, total = carry
            i, micro = part
            (loss, (extras, aux)), grads = gradient(
                state.params, before, micro, jax.random.fold_in(key, i), state.hyperparameters
            )
            carried, written = _apart(extras, before)
            return (carried, jax.tree.map(jnp.add, total, grads)), (loss, aux, written)

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (extras, total), (loss, aux, written) = jax.lax.scan(
            one, (state.extras, zeros), (jnp.arange(accumulate), parts), unroll=unroll
        )
        extras = _together(extras, written)
        scalars = jax.tree.map(lambda x: x.mean(axis=0), aux.scalars)
        aux = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), dataclasses.replace(aux, scalars={})
        )
        grads = jax.tree.map(lambda g: g / accumulate, total)
        return (loss.mean(), (extras, dataclasses.replace(aux, scalars=scalars))), grads

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Aux, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, LOSS), state.step)
        (loss, (extras, aux)), grads = accumulated(state, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax raises decays to an integer count
            updates, opt_state = update(
                grads,
                state.opt_state,
                state.params,
                hyperparameters=state.hyperparameters,
                step=state.step,
            )
        after = (optax.apply_updates(state.params, updates), extras, opt_state)
        before = (state.params, state.extras, state.opt_state)
        diverged = jnp.minimum(state.diverged, jnp.where(jnp.isfinite(loss), NEVER, state.step))
        alive = diverged == NEVER

        def settled(new: Leaf | Written, old: Leaf) -> jax.Array:
            if not isinstance(new, Written):
                return jnp.where(alive, new, old)
            return old.at[new.index].set(jnp.where(alive, new.rows, old[new.index]))

        params, extras, opt_state = jax.tree.map(settled, after, before, is_leaf=_is_written)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            extras=extras,
            opt_state=opt_state,
            diverged=diverged,
        )
        return state, aux, {"loss": loss, **aux.scalars}

    return step


def _is_written(leaf: Leaf) -> bool:
    return isinstance(leaf, Written)


def _apart(extras: PyTree, before: PyTree) -> tuple[PyTree, PyTree]:
    """What the next microbatch sees, with tables as they were, and the rows that were written."""

    def kept(new: Leaf | Written, old: Leaf) -> Leaf:
        return old if isinstance(new, Written) else new

    carried = jax.tree.map(kept, extras, before, is_leaf=_is_written)
    written = jax.tree.map(lambda x: x if _is_written(x) else None, extras, is_leaf=_is_written)
    return carried, written


def _together(extras: PyTree, written: PyTree) -> PyTree:
    """The rows [accumulate, b, ...] that microbatches wrote, as those of one batch."""

    def whole(leaf: Leaf, rows: Written | None) -> Leaf | Written:
        return leaf if rows is None else jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

    leaves, structure = jax.tree.flatten(extras)
    parts = jax.tree.leaves(written, is_leaf=lambda x: x is None or _is_written(x))
    return structure.unflatten(map(whole, leaves, parts))
