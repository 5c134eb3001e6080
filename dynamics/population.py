"""One function of one replica, run for a population: which way is measured, not guessed.

Replicas are spread over the mesh's replica axis first, by ``shard_map``, so no collective can run
between them. What each device then does with its own is ``how``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from dynamics import mesh as meshes
from dynamics.types import Leaf, PyTree, TrainState

How = Literal["vmap", "map", "dispatch"]


def choose(platform: str, convolutional: bool) -> How:
    """How a device should run its replicas.

    An accelerator wants them as one batched operation: ``vmap``. On a CPU a replica at a time
    keeps its parameters in the cache: ``map`` (measured there: vmapping 784-512-512-10 costs two to
    three times more per replica). A convolution inside any XLA loop on a CPU runs 17 to 49 times
    slower (jax issue 12868), so there every step of every replica is a program call: ``dispatch``.
    """
    if platform != "cpu":
        return "vmap"
    return "dispatch" if convolutional else "map"


def has_convolution(jaxpr: Any) -> bool:
    """Whether a (closed) jaxpr contains a convolution at any depth."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(has_convolution(sub) for sub in jaxprs_in_params(eqn.params))
        for eqn in inner.eqns
    )


def spread(
    fn: Callable[..., PyTree], mesh: Mesh, how: How, *, carried: PyTree | None = None
) -> Callable[..., PyTree]:
    """``fn(own, *shared)`` of one member, as a function of stacked ``own`` [K, ...].

    Outputs are stacked likewise. A state in ``own`` or in what comes out, however deep, has one
    clock for all members: ``fn`` sees an integer that is never batched, so that a ``cond`` on it
    stays one. With ``dispatch`` each device must hold one member: ``split`` the population and call
    once for each piece. ``carried`` says that ``fn((state, *rest), *shared) -> (state, out)``, with
    outs like it: then ``map`` puts each state back in its place, where it would otherwise copy all
    (measured with 10 members and large tables: six times the memory).
    """

    def local(own: PyTree, clocks: list[jax.Array], *shared: PyTree) -> tuple[PyTree, list]:
        here = jax.tree.leaves(own)[0].shape[0]

        def one(member: PyTree) -> tuple[PyTree, list[jax.Array]]:
            return _apart(fn(_together(member, clocks), *shared))

        if here == 1:
            out, after = one(jax.tree.map(lambda x: x[0], own))
            return jax.tree.map(lambda x: jnp.asarray(x)[None], out), after
        if how == "map" and carried is not None:
            return _in_place(one, own, carried, clocks)
        if how == "map":
            out, after = jax.lax.map(one, own)
            return out, [clock[0] for clock in after]
        return jax.vmap(one, out_axes=(0, None))(own)

    def population(own: PyTree, *shared: PyTree) -> PyTree:
        spec, rest = meshes.replicas(mesh), tuple(PartitionSpec() for _ in shared)
        members, clocks = _apart(own)
        spread_over = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, PartitionSpec(), *rest),
            out_specs=(spec, PartitionSpec()),
            axis_names={meshes.AXES[0]},
            check_vma=False,
        )
        return _together(*spread_over(members, clocks, *shared))

    return population


def _in_place(
    one: Callable[[PyTree], Any], own: PyTree, out: PyTree, clocks: list[jax.Array]
) -> tuple[PyTree, list[jax.Array]]:
    """``one((state, *rest)) -> ((state, out), clocks)`` for one member after the other."""
    here = jax.tree.leaves(own)[0].shape[0]
    room = jax.tree.map(lambda x: jnp.zeros((here, *x.shape), x.dtype), out)

    def body(k: jax.Array, carry: PyTree) -> PyTree:
        states, outs, _ = carry
        mine = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, k, 0, False), (states, *own[1:])
        )
        put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, k, 0)  # noqa: E731
        (state, out), after = one(mine)
        return jax.tree.map(put, states, state), jax.tree.map(put, outs, out), after

    states, outs, after = jax.lax.fori_loop(0, here, body, (own[0], room, clocks))
    return (states, outs), after


def split(tree: PyTree, mesh: Mesh) -> list[PyTree]:
    """A population [K, ...] as K / R populations [R, ...], one member on each of R devices; no
    data crosses devices under jit with member-sharded inputs and outputs.
    """
    members, clocks = _apart(tree)
    devices = mesh.shape[meshes.AXES[0]]
    here = jax.tree.leaves(members)[0].shape[0] // devices

    def part(x: jax.Array, j: int) -> jax.Array:
        return x.reshape(devices, here, *x.shape[1:])[:, j]

    return [
        _together(jax.tree.map(lambda x, j=j: part(x, j), members), clocks) for j in range(here)
    ]


def join(parts: list[PyTree]) -> PyTree:
    """The inverse of ``split``."""

    def whole(*xs: jax.Array) -> jax.Array:
        x = jnp.stack(xs, axis=1)
        return x.reshape(-1, *x.shape[2:])

    apart = [_apart(part) for part in parts]
    return _together(jax.tree.map(whole, *(members for members, _ in apart)), apart[0][1])


# ---- populations as values ----------------------------------------------------------------------


def size(state: TrainState) -> int:
    """The number of members of a population."""
    return state.key.shape[0]


def take(tree: PyTree, members: int | Sequence[int] | np.ndarray) -> PyTree:
    """The state of one member, or of a population of some, from the state of a population.

    Of any tree with a leading member axis, states in it or not; the clock is that of all.
    """
    some, clocks = _apart(tree)
    at = members if isinstance(members, int) else np.asarray(members)
    return _together(jax.tree.map(lambda x: x[at], some), clocks)


def broadcast(state: TrainState, k: int) -> TrainState:
    """The state of a population of ``k`` members, all like the one given."""
    one, clocks = _apart(state)
    return _together(jax.tree.map(lambda x: jnp.broadcast_to(x, (k, *x.shape)), one), clocks)


def concatenate(states: Sequence[TrainState]) -> TrainState:
    """The state of one population with the members of several, in their order.

    ValueError: their clocks differ.
    """
    steps = [int(state.step) for state in states]
    if len(set(steps)) > 1:
        raise ValueError(f"states of different steps can't be one population, got {steps}")
    parts = [_apart(state)[0] for state in states]
    return _together(jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts), [states[0].step])


def _apart(tree: PyTree) -> tuple[PyTree, list[Leaf]]:
    """A tree without the clocks of the states in it, and these clocks."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_state)
    clocks = [leaf.step for leaf in leaves if _is_state(leaf)]
    rest = [dataclasses.replace(x, step=None) if _is_state(x) else x for x in leaves]
    return structure.unflatten(rest), clocks


def _together(tree: PyTree, clocks: Sequence[Leaf]) -> PyTree:
    """The inverse of ``_apart``."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=_is_state)
    ticking = iter(clocks)
    return structure.unflatten(
        [dataclasses.replace(x, step=next(ticking)) if _is_state(x) else x for x in leaves]
    )


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, TrainState)
