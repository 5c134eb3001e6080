"""What foretells that a transformer's training will become unstable: logits, entropies, sizes.

All are of a small fixed slice of data, one batch, in evaluation mode, and cost a few passes of it
for each replica; the slice is a Dataset, as for ``Evaluate``.

Reference: Wortsman et al. 2023, arXiv 2309.14322, sections 3.1, 3.3 and 3.4.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dynamics.data.stream import normalise
from dynamics.models.transformer import TransformerModule
from dynamics.representation import features
from dynamics.types import Batch, Dataset, Each, PyTree, Task, TrainState


def attention_logits(
    query: Float[Array, "B T H K"], key: Float[Array, "B T H K"]
) -> Float[Array, "B H T T"]:
    """<query_t, key_s> / sqrt(K) in float32 where s <= t, -inf where s comes after t."""
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    logits = jnp.einsum("bthk,bshk->bhts", query, key, precision="highest")
    past = jnp.tril(jnp.ones((1, 1, *logits.shape[2:]), bool))
    return jnp.where(past, logits / math.sqrt(query.shape[-1]), -jnp.inf)


def entropy(logits: Float[Array, "*b n"]) -> Float[Array, "*b"]:
    """-sum_i p_i log p_i in nats, p = softmax(logits); a logit of -inf adds nothing."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def rms(values: Float[Array, "..."]) -> Float[Array, ""]:
    """sqrt(mean(x^2)) in float32."""
    return jnp.sqrt(jnp.mean(values.astype(jnp.float32) ** 2))


@dataclass(frozen=True, eq=False)
class Attention:
    """``<name>.max_logit_<i>`` and ``<name>.entropy_<i>`` f32[K] of each block i: the largest
    attention logit under the causal mask, before the softmax, over examples, heads and places; and
    the mean over them of the attention's entropy in nats (0 at the first place, which sees itself
    alone). ``<name>.max_logit`` is the largest of all blocks.

    Recomputed in float32 from the block's queries and keys, after their norms if it has any,
    whatever the attention itself is computed by. ``module`` is the one the task was made of.
    """

    module: TransformerModule
    data: Dataset
    every: int | Collection[int]
    name: str = "attention"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The numbers f32[K]."""
        return carry, each(self._of_one)(state, self.data)

    def _of_one(self, state: TrainState, data: Dataset) -> dict[str, jax.Array]:
        found, config = {}, self.module.config
        for i in range(config.depth):
            query, key = (
                self._heads(state, data, f"block_{i}/attention/{n}") for n in _sides(self)
            )
            logits = attention_logits(query, key)
            found[f"max_logit_{i}"] = logits.max()
            found[f"entropy_{i}"] = entropy(logits).mean()
        largest = jnp.stack([found[f"max_logit_{i}"] for i in range(config.depth)]).max()
        return found | {"max_logit": largest}

    def _heads(self, state: TrainState, data: Dataset, layer: str) -> jax.Array:
        """What a layer makes of each head's [B, T, H, K]."""
        x = _batch(data).x
        out = features(self.module, state.params, state.extras, x, layer, side="output")
        heads = self.module.config.num_heads
        return out.reshape(*x.shape, heads, self.module.config.width // heads)


def _sides(probe: Attention) -> tuple[str, str]:
    """The layers that make what attention compares."""
    normed = probe.module.config.qk_norm
    return ("query_norm", "key_norm") if normed else ("query", "key")


@dataclass(frozen=True, eq=False)
class Outputs:
    """``<name>.log_z`` f32[K], the mean of log sum_c exp(logit_c), of which probabilities say
    nothing; and ``<name>.rms``, the root mean square of what enters the final norm.

    Reference: sections 3.1.2 and 3.4.
    """

    module: TransformerModule
    data: Dataset
    every: int | Collection[int]
    name: str = "outputs"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The numbers f32[K]."""
        return carry, each(self._of_one)(state, self.data)

    def _of_one(self, state: TrainState, data: Dataset) -> dict[str, jax.Array]:
        given = (self.module, state.params, state.extras, _batch(data).x)
        logits = features(*given, "", side="output").astype(jnp.float32)
        log_z = jax.nn.logsumexp(logits, axis=-1).mean()
        return {"log_z": log_z, "rms": rms(features(*given, "final_norm"))}


@dataclass(frozen=True, eq=False)
class Updates:
    """``<name>.grad_<parameter>`` f32[K] for each in ``chosen`` ("block_0/mlp/up/kernel"): the root
    mean square of the gradient of the mean loss of the slice, not clipped. And
    ``<name>.update_<parameter>``, that of Adam's last update before the learning rate, Delta = v /
    (sqrt(u) + epsilon), v and u the averages of the gradient and its square, corrected for their
    start at 0 (nan before the first step). Where gradients fall to epsilon, Delta goes to 0 and
    nothing is learned.

    ValueError: an optimizer without Adam's averages, a parameter that is not there.

    Reference: section 3.4; Delta: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """

    task: Task
    data: Dataset
    chosen: Sequence[str]
    every: int | Collection[int]
    name: str = "sizes"

    def start(self, state: TrainState, each: Each) -> PyTree:
        """Nothing is remembered."""
        _adam(state)
        for name in self.chosen:
            _at(state.params, name)
        return ()

    def measure(
        self, carry: PyTree, state: TrainState, each: Each
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The numbers f32[K]."""
        return carry, each(self._of_one)(state, self.data)

    def _of_one(self, state: TrainState, data: Dataset) -> dict[str, jax.Array]:
        batch = _batch(data)

        def loss(params: PyTree) -> jax.Array:
            return self.task.evaluate(
                params, state.extras, batch, state.hyperparameters
            ).loss.mean()

        gradient, delta = jax.grad(loss)(state.params), last_update(state)
        found = {f"grad_{name}": rms(_at(gradient, name)) for name in self.chosen}
        return found | {f"update_{name}": rms(_at(delta, name)) for name in self.chosen}


def last_update(state: TrainState) -> PyTree:
    """Adam's Delta of the last step, a tree like the parameters'; nan before the first step."""
    adam, h = _adam(state), state.hyperparameters
    count = adam.count.astype(jnp.float32)
    first, second = 1 - h["momentum"] ** count, 1 - h["second_moment"] ** count
    return jax.tree.map(
        lambda v, u: v / first / (jnp.sqrt(u / second) + h["epsilon"]), adam.mu, adam.nu
    )


def _adam(state: TrainState) -> Any:
    kinds = jax.tree.leaves(state.opt_state, is_leaf=_is_adam)
    found = [kind for kind in kinds if _is_adam(kind)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer must have one Adam, got {len(found)}: train with rule adam"
        )
    return found[0]


def _is_adam(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def _at(tree: PyTree, name: str) -> jax.Array:
    """The leaf at a path whose parts are joined by "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = {
        "/".join(str(getattr(part, "key", part)) for part in path): leaf for path, leaf in leaves
    }
    if name not in names:
        raise ValueError(f"there is no parameter {name!r}; there are {sorted(names)}")
    return names[name]


def _batch(data: Dataset) -> Batch:
    """A whole dataset, as a step sees it."""
    x = normalise(data.x, data.mean, data.std)
    return Batch(x=x, y=data.y.astype(jnp.int32), index=data.index)
