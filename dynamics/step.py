"""The one train step, of one replica: pure, unjitted, and ignorant of every method."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dynamics.types import (
    INIT,
    LOSS,
    NEVER,
    OPTIMIZER,
    Aux,
    Batch,
    Info,
    Key,
    Leaf,
    Observer,
    PyTree,
    Task,
    TrainState,
    Written,
)

Step = Callable[[TrainState, Batch], tuple[TrainState, Aux, dict[str, jax.Array]]]
Evaluated = tuple[tuple[jax.Array, tuple[PyTree, Aux]], PyTree]
Gradient = Callable[[Callable[..., Any]], Callable[..., Evaluated]]
"""Of ``Task.loss``, a function of the same arguments: ``((loss, (extras, aux)), gradient)``"""

BACKWARD: Gradient = functools.partial(jax.value_and_grad, has_aux=True)


def init(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: Key,
    hyperparameters: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """The state of one member before the first step, from a root key and its scalars.

    ``params``, by path, take the place of the task's own.
    """
    own, extras = task.init(jax.random.fold_in(key, INIT), hyperparameters)
    if params:
        own = jax.tree_util.tree_map_with_path(lambda at, x: params.get(_path(at), x), own)
    return TrainState(
        step=jnp.int32(0),
        params=own,
        extras=extras,
        opt_state=optimizer.init(own),
        hyperparameters=dict(hyperparameters),
        key=key,
        diverged=jnp.int32(NEVER),
    )


def named(params: PyTree) -> dict[str, Leaf]:
    """Path ("block_0/mlp/kernel") -> leaf."""
    return {_path(at): leaf for at, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _path(at: Any) -> str:
    return jax.tree_util.keystr(at, simple=True, separator="/")


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
    gradient: Gradient = BACKWARD,
    observers: Sequence[Observer] = (),
    accumulate: int = 1,
    unroll: bool = False,
) -> Step:
    """``(state, batch) -> (state, aux, metrics)``: gradient, update, and nothing else.

    ``gradient`` makes of ``Task.loss`` what returns its value and a gradient, or any direction like
    the parameters in its place: of forward derivatives, evolution strategies, moved parameters. It
    draws from the key that the loss gets.

    The batch is split into ``accumulate`` microbatches whose gradients are averaged; batch
    statistics see them one after the other. ``unroll`` writes that loop out, for convolutions on a
    CPU.

    The optimizer is any optax transformation. One that takes extra arguments is offered, by name:
    ``value`` (the loss), ``grad`` and ``value_fn`` (parameters -> loss of this batch, same key),
    which are optax's own; ``gradient(params, batch=this one)``, accumulated alike, of the same key;
    ``batch``, ``aux``, ``hyperparameters``, ``step``; and ``key``, each replica's own at each step,
    for what the rule draws. Nothing is computed for it but what it asks for.

    From the first step whose loss, gradient or new parameters are not all finite, the replica is
    frozen: its ``diverged`` is that step, its parameters, extras and optimizer state are those
    before it, and only its clock goes on. So parameters are finite, always, if they were at first.

    Metrics are the loss, the scalars of the task, and what the ``observers`` find; without any the
    step is the same program as if there were no such thing. ValueError: two of one name, and, when
    traced, a metric that is no scalar.

    Cost: one gradient evaluation of the batch, and one more look at gradient and parameters.
    """
    names = [observer.name for observer in observers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two observers are named {twice[0]!r}: names must differ")
    update = _asked(optax.with_extra_args_support(optimizer).update)
    evaluate = _over_microbatches(gradient(task.loss), accumulate, unroll, bool(observers))
    without = _over_microbatches(lambda *args: (task.loss(*args), None), accumulate, unroll)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Aux, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, LOSS), state.step)
        rest = (state.extras, batch, key, state.hyperparameters)
        ((loss, (extras, aux)), grads), squares = evaluate(state.params, *rest)

        def elsewhere(params: PyTree, batch: Batch = batch) -> PyTree:
            return evaluate(params, state.extras, batch, key, state.hyperparameters)[0][1]

        own = jax.random.fold_in(jax.random.fold_in(state.key, OPTIMIZER), state.step)
        offered = {"gradient": elsewhere, "batch": batch, "aux": aux, "key": own}
        offered |= {"hyperparameters": state.hyperparameters, "step": state.step}
        value_fn = _taking(offered, lambda params: without(params, *rest)[0][0][0])
        offered |= {"value": loss, "grad": grads, "value_fn": value_fn}
        with jax.numpy_dtype_promotion("standard"):  # optax raises decays to an integer count
            updates, opt_state = update(grads, state.opt_state, state.params, offered)
        params = optax.apply_updates(state.params, updates)
        info = Info(aux=aux, grads=grads, updates=updates, squares=squares)
        metrics = {"loss": loss, **aux.scalars, **_observed(observers, state, info)}
        state = _settled(state, _finite(loss, grads, params), (params, extras, opt_state))
        return state, aux, metrics

    return step


def _asked(update: Callable[..., Any]) -> Callable[..., Any]:
    """``update(grads, opt_state, params, offered)``: of what is offered it gets what it names."""
    named = inspect.signature(update).parameters
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in named.values())

    def asked(grads: PyTree, opt_state: PyTree, params: PyTree, offered: Mapping[str, Any]) -> Any:
        mine = {name: value for name, value in offered.items() if everything or name in named}
        return update(grads, opt_state, params, **mine)

    return asked


def _taking(names: Iterable[str], fn: Callable[[PyTree], jax.Array]) -> Callable[..., jax.Array]:
    """``fn`` with these keywords and no use for them: optax's line searches hand a ``value_fn`` all
    that they were offered themselves, and raise TypeError unless its signature has the names.
    """

    def taking(params: PyTree, **unused: Any) -> jax.Array:
        return fn(params)

    kinds = inspect.Parameter
    named = [kinds("params", kinds.POSITIONAL_OR_KEYWORD)]
    named += [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in names]
    taking.__signature__ = inspect.Signature(named)  # pyright: ignore
    return taking


def _observed(observers: Sequence[Observer], state: TrainState, info: Info) -> dict[str, Any]:
    """All that they find, by its name in the rows."""
    metrics = {}
    for observer in observers:
        for name, value in observer.observe(state, info).items():
            if jnp.shape(value):
                raise ValueError(
                    f"{observer.name}.{name} must be a scalar, an observer's metrics are columns "
                    f"of the rows; got shape {jnp.shape(value)}"
                )
            metrics[f"{observer.name}.{name}"] = value
    return metrics


def _squared(tree: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    wide = [x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in leaves]
    return functools.reduce(jnp.add, [jnp.sum(leaf * leaf) for leaf in wide])


def _over_microbatches(
    evaluate: Callable[..., Evaluated], accumulate: int, unroll: bool, measured: bool = False
) -> Callable[..., tuple[Evaluated, jax.Array | None]]:
    """``evaluate(params, extras, batch, key, hyperparameters)`` of a batch cut in equal parts.

    Extras go from one to the next, the mean is taken of losses and gradients. Beside it, if they
    are ``measured``, |gradient|^2 of each part.
    """

    def whole(params: PyTree, extras: PyTree, batch: Batch, key: Key, scalars: Any) -> Any:
        if accumulate == 1:
            return evaluate(params, extras, batch, key, scalars), None
        size = batch.index.shape[0] // accumulate
        parts = jax.tree.map(lambda x: x.reshape(accumulate, size, *x.shape[1:]), batch)

        def one(carry: tuple, part: tuple[jax.Array, Batch]) -> tuple[tuple, tuple]:
            before, total = carry
            i, micro = part
            (loss, (extras, aux)), grads = evaluate(
                params, before, micro, jax.random.fold_in(key, i), scalars
            )
            carried, written = _apart(extras, before)
            if grads is not None:
                total = jax.tree.map(jnp.add, total, grads)
            square = _squared(grads) if measured else None
            return (carried, total), (loss, aux, written, square)

        zeros = jax.tree.map(jnp.zeros_like, params)
        (extras, total), (loss, aux, written, squares) = jax.lax.scan(
            one, (extras, zeros), (jnp.arange(accumulate), parts), unroll=unroll
        )
        extras = _together(extras, written)
        means = jax.tree.map(lambda x: x.mean(axis=0), aux.scalars)
        aux = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]), dataclasses.replace(aux, scalars={})
        )
        grads = jax.tree.map(lambda g: g / accumulate, total)
        aux = dataclasses.replace(aux, scalars=means)
        return ((loss.mean(), (extras, aux)), grads), squares

    return whole


def _finite(loss: jax.Array, grads: PyTree, params: PyTree) -> jax.Array:
    """Whether loss, gradient and parameters are all finite: bool[]. Reads each number once.

    0 x is NaN where x is not finite, and a sum keeps it. A maximum does not: over a large array
    XLA's, on a CPU, leaves NaN out (jax 0.10).
    """
    zeros = jax.tree.map(lambda g, p: jnp.sum((0 * g).astype(p.dtype) + 0 * p), grads, params)
    return functools.reduce(
        jnp.logical_and, [zero == 0 for zero in jax.tree.leaves(zeros)], 0 * loss == 0
    )


def _settled(state: TrainState, finite: jax.Array, after: tuple) -> TrainState:
    """The state after the step, with params, extras and optimizer state ``after`` if it counts."""
    before = (state.params, state.extras, state.opt_state)
    diverged = jnp.minimum(state.diverged, jnp.where(finite, NEVER, state.step))
    alive = diverged == NEVER

    def settled(new: Leaf | Written, old: Leaf) -> jax.Array:
        if not isinstance(new, Written):
            return jnp.where(alive, new, old)
        return old.at[new.index].set(jnp.where(alive, new.rows, old[new.index]))

    params, extras, opt_state = jax.tree.map(settled, after, before, is_leaf=_is_written)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        extras=extras,
        opt_state=opt_state,
        diverged=diverged,
    )


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
