"""What a run's steps say of their gradients and updates: compiled into the step, if asked for."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dynamics.types import Info, PyTree, TrainState


@dataclass(frozen=True)
class Norms:
    """``<name>.gradient``, ``.gradient_l1`` and ``.update``: the l2 norm of each, the l1 norm too.

    With ``layers`` also of each layer, as ``<name>.gradient/<layer>`` and so on: a layer is the
    parameters whose paths differ in the last part alone, a kernel and its bias. Sums are float32.

    Cost: a look at each gradient and update, no gradient evaluation.
    """

    layers: bool = False
    name: str = "norms"

    def observe(self, state: TrainState, info: Info) -> dict[str, jax.Array]:
        """Of the step's mean gradient, before anything clips it, and of what is added."""
        found = {}
        for what, tree in (("gradient", info.grads), ("update", info.updates)):
            squares, sums = _by_layer(tree)
            found[what] = jnp.sqrt(_total(squares))
            if what == "gradient":
                found["gradient_l1"] = _total(sums)
            if self.layers:
                found |= {f"{what}/{layer}": jnp.sqrt(s) for layer, s in squares.items()}
            if self.layers and what == "gradient":
                found |= {f"gradient_l1/{layer}": s for layer, s in sums.items()}
        return found


@dataclass(frozen=True)
class LearningRate:
    """``<name>.length`` = |u| / |g| and ``<name>.along`` = -<u, g> / |g|^2 of update and gradient.

    The rates at which plain gradient descent would make a step as long, and at which it would come
    nearest to u. Both are the learning rate itself, schedule and all, for sgd without momentum,
    decay and clipping; with momentum, preconditioning or the like there is no such one number, and
    these are what is left of it. NaN or infinite where the gradient is 0.

    Cost: a look at each gradient and update, no gradient evaluation.
    """

    name: str = "learning_rate"

    def observe(self, state: TrainState, info: Info) -> dict[str, jax.Array]:
        """Of the step's mean gradient and of what is added."""
        g, u = map(_wide, (info.grads, info.updates))
        squared = _total(jax.tree.map(_dot, g, g))
        length = jnp.sqrt(_total(jax.tree.map(_dot, u, u)) / squared)
        return {"length": length, "along": -_total(jax.tree.map(_dot, u, g)) / squared}


@dataclass(frozen=True)
class GradientNoise:
    """``<name>.squared`` estimates |G|^2 and ``<name>.trace`` tr(Sigma), both unbiased.

    G is the mean gradient over the distribution that examples are drawn from, Sigma the covariance
    of one example's. With B examples in a batch, b in each of its microbatches, g and g_i their
    gradients and s = mean_i |g_i|^2:

        |G|^2 = (B |g|^2 - b s) / (B - b),    tr(Sigma) = (s - |g|^2) / (1 / b - 1 / B).

    The simple noise scale tr(Sigma) / |G|^2 is a ratio of their means over many steps, or moving
    averages, not a mean of ratios; either may be negative at one step. Unbiased for examples drawn
    independently, with weight 1, and a loss that couples none: an order without repetition makes
    the trace too large by n / (n - 1) for n examples, batch norm is outside of it.

    Cost: |g_i|^2 of each microbatch, no gradient evaluation. ValueError, when traced: one
    microbatch, there is nothing to compare with.

    Reference: McCandlish, Kaplan, Amodei et al. 2018, arXiv 1812.06162, appendix A.1.
    """

    name: str = "noise"

    def observe(self, state: TrainState, info: Info) -> dict[str, jax.Array]:
        """Both f32[], of this step alone."""
        if info.squares is None:
            raise ValueError(f"{self.name} compares microbatches: accumulate must be at least 2")
        big = info.aux.index.shape[0]
        small = big // info.squares.shape[0]
        g = _wide(info.grads)
        whole, parts = _total(jax.tree.map(_dot, g, g)), info.squares.mean()
        squared = (big * whole - small * parts) / (big - small)
        return {"squared": squared, "trace": (parts - whole) / (1 / small - 1 / big)}


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x if x.dtype == jnp.float64 else x.astype(jnp.float32), tree)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b)


def _total(parts: PyTree) -> jax.Array:
    leaves = jax.tree.leaves(parts)
    return jnp.sum(jnp.stack(leaves))


def _by_layer(tree: PyTree) -> tuple[Mapping[str, jax.Array], Mapping[str, jax.Array]]:
    """The sums of squares and of absolute values of each layer."""
    squares: dict[str, jax.Array] = {}
    sums: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(_wide(tree)):
        layer = jax.tree_util.keystr(path[:-1] or path, simple=True, separator="/")
        squares[layer] = squares.get(layer, 0.0) + jnp.sum(leaf * leaf)
        sums[layer] = sums.get(layer, 0.0) + jnp.sum(jnp.abs(leaf))
    return squares, sums
