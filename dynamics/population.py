"""One function of one replica, run for a population: which way is measured, not guessed.

Replicas are spread over the mesh's replica axis first, by ``shard_map``, so no collective can run
between them. What each device then does with its own is ``how``.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from dynamics import mesh as meshes
from dynamics.types import PyTree

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
    """``fn(own, *shared)`` of one replica, as a function of stacked ``own`` [K, ...].

    Outputs are stacked likewise. With ``dispatch`` each device must hold one replica: ``split``
    the population and call once for each piece. ``carried`` says that ``fn((state, *rest), *shared)
    -> (state, out)``, with outs like it: then ``map`` puts each state back in its place, where it
    would otherwise copy all (measured with 10 replicas and large tables: six times the memory).
    """

    def local(own: PyTree, *shared: PyTree) -> PyTree:
        here = jax.tree.leaves(own)[0].shape[0]
        if here == 1:
            out = fn(jax.tree.map(lambda x: x[0], own), *shared)
            return jax.tree.map(lambda x: jnp.asarray(x)[None], out)
        if how == "map" and carried is not None:
            return _in_place(lambda one: fn(one, *shared), own, carried)
        if how == "map":
            return jax.lax.map(lambda one: fn(one, *shared), own)
        return jax.vmap(lambda one: fn(one, *shared))(own)

    def population(own: PyTree, *shared: PyTree) -> PyTree:
        spec, rest = meshes.replicas(mesh), tuple(PartitionSpec() for _ in shared)
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, *rest),
            out_specs=spec,
            axis_names={meshes.AXES[0]},
            check_vma=False,
        )(own, *shared)

    return population


def _in_place(fn: Callable[[PyTree], PyTree], own: PyTree, out: PyTree) -> PyTree:
    """``fn((state, *rest)) -> (state, out)`` for one replica after the other."""
    here = jax.tree.leaves(own)[0].shape[0]
    room = jax.tree.map(lambda x: jnp.zeros((here, *x.shape), x.dtype), out)

    def one(k: jax.Array, carry: PyTree) -> PyTree:
        states, outs = carry
        mine = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, k, 0, False), (states, *own[1:])
        )
        put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, k, 0)  # noqa: E731
        state, out = fn(mine)
        return jax.tree.map(put, states, state), jax.tree.map(put, outs, out)

    return jax.lax.fori_loop(0, here, one, (own[0], room))


def split(tree: PyTree, mesh: Mesh) -> list[PyTree]:
    """A population [K, ...] as K / R populations [R, ...], one replica on each of R devices; no
    data crosses devices under jit with replica-sharded inputs and outputs.
    """
    devices = mesh.shape[meshes.AXES[0]]
    here = jax.tree.leaves(tree)[0].shape[0] // devices

    def part(x: jax.Array, j: int) -> jax.Array:
        return x.reshape(devices, here, *x.shape[1:])[:, j]

    return [jax.tree.map(lambda x, j=j: part(x, j), tree) for j in range(here)]


def join(parts: list[PyTree]) -> PyTree:
    """The inverse of ``split``."""

    def whole(*xs: jax.Array) -> jax.Array:
        x = jnp.stack(xs, axis=1)
        return x.reshape(-1, *x.shape[2:])

    return jax.tree.map(whole, *parts)
