"""What foretells that a transformer's training will become unstable: logits, entropies, sizes.

All are of a small fixed slice of data, one batch, in evaluation mode, and cost a few passes of it
for each member; ``on`` names it among the data of the run, as for ``Evaluate``.

Reference: Wortsman et al. 2023, arXiv 2309.14322, sections 3.1, 3.3 and 3.4.
"""

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from dynamics import step
from dynamics.models.transformer import TransformerModule
from dynamics.optim import adam
from dynamics.probes.measure import Measure
from dynamics.representation import features
from dynamics.types import Batch, Context, PyTree, Task, TrainState


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


def attention(
    task: Task, state: TrainState, batch: Batch, *, module: TransformerModule
) -> dict[str, Float[Array, ""]]:
    """``max_logit_<i>`` and ``entropy_<i>`` of each block i, and the ``max_logit`` of all.

    See ``Attention``, which measures them while a population trains.
    """
    found, config = {}, module.config
    sides = ("query_norm", "key_norm") if config.qk_norm else ("query", "key")
    weights = task.network(state.params, state.extras)

    def heads(layer: str) -> jax.Array:
        """What a layer makes of each head's [B, T, H, K]."""
        out = features(module, *weights, batch.x, layer, side="output")
        return out.reshape(*batch.x.shape, config.num_heads, config.width // config.num_heads)

    for i in range(config.depth):
        query, key = (heads(f"block_{i}/attention/{side}") for side in sides)
        logits = attention_logits(query, key)
        found[f"max_logit_{i}"] = logits.max()
        found[f"entropy_{i}"] = entropy(logits).mean()
    largest = jnp.stack([found[f"max_logit_{i}"] for i in range(config.depth)]).max()
    return found | {"max_logit": largest}


def outputs(
    task: Task, state: TrainState, batch: Batch, *, module: TransformerModule
) -> dict[str, Float[Array, ""]]:
    """``log_z`` and ``rms``: see ``Outputs``, which measures them while a population trains."""
    given = (module, *task.network(state.params, state.extras), batch.x)
    logits = features(*given, "", side="output").astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1).mean()
    return {"log_z": log_z, "rms": rms(features(*given, "final_norm"))}


def sizes(
    task: Task, state: TrainState, batch: Batch, *, chosen: tuple[str, ...]
) -> dict[str, Float[Array, ""]]:
    """``grad_<parameter>`` and ``update_<parameter>`` of those chosen: see ``Updates``."""

    def loss(params: PyTree) -> jax.Array:
        return task.evaluate(params, state.extras, batch, state.hyperparameters).loss.mean()

    gradient = jax.grad(loss)(state.params)
    delta = adam.last_update(state.opt_state, state.hyperparameters)
    found = {f"grad_{name}": rms(_at(gradient, name)) for name in chosen}
    return found | {f"update_{name}": rms(_at(delta, name)) for name in chosen}


@dataclass(frozen=True)
class Attention:
    """``max_logit_<i>`` and ``entropy_<i>`` f32[K] of each block i: the largest attention logit
    under the causal mask, before the softmax, over examples, heads and places; and the mean over
    them of the attention's entropy in nats (0 at the first place, which sees itself alone).
    ``max_logit`` is the largest of all blocks.

    Recomputed in float32 from the block's queries and keys, after their norms if it has any,
    whatever the attention itself is computed by. ``module`` is the one the task was made of, whose
    weights the task's ``network`` gives.
    """

    module: TransformerModule
    every: int | Collection[int]
    on: str = "test"
    name: str = "attention"

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The numbers f32[K]."""
        function = functools.partial(attention, module=self.module)
        return Measure(function, self.every, self.name, self.on).measure(context, carry, state)


@dataclass(frozen=True)
class Outputs:
    """``log_z`` f32[K], the mean of log sum_c exp(logit_c), of which probabilities say nothing; and
    ``rms``, the root mean square of what enters the final norm.

    Reference: sections 3.1.2 and 3.4.
    """

    module: TransformerModule
    every: int | Collection[int]
    on: str = "test"
    name: str = "outputs"

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The numbers f32[K]."""
        function = functools.partial(outputs, module=self.module)
        return Measure(function, self.every, self.name, self.on).measure(context, carry, state)


@dataclass(frozen=True)
class Updates:
    """``grad_<parameter>`` f32[K] for each in ``chosen`` ("block_0/mlp/up/kernel") of the
    parameters that the task trains: the root mean square of the gradient of the mean loss of the
    slice, not clipped. And ``update_<parameter>``, that of Adam's last update before the learning
    rate, Delta = v / (sqrt(u) + epsilon), v and u the averages of the gradient and its square,
    corrected for their start at 0; before the first step there is none. Where gradients fall to
    epsilon, Delta goes to 0 and nothing is learned.

    ValueError: an optimizer without Adam's averages, a parameter that is not there.

    Reference: section 3.4; Delta: Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.
    """

    chosen: Sequence[str]
    every: int | Collection[int]
    on: str = "test"
    name: str = "sizes"

    def start(self, context: Context, state: TrainState) -> PyTree:
        """Nothing is remembered."""
        context.examples(self.on)
        adam.moments(state.opt_state)
        for name in self.chosen:
            _at(state.params, name)
        return ()

    def measure(
        self, context: Context, carry: PyTree, state: TrainState
    ) -> tuple[PyTree, dict[str, jax.Array]]:
        """The numbers f32[K]."""
        function = functools.partial(sizes, chosen=tuple(self.chosen))
        probe = Measure(function, self.every, self.name, self.on)
        carry, found = probe.measure(context, carry, state)
        if not isinstance(state.step, Tracer) and not int(state.step):
            found = {name: value for name, value in found.items() if name.startswith("grad_")}
        return carry, found


def _at(tree: PyTree, name: str) -> jax.Array:
    """The leaf at a path whose parts are joined by "/"."""
    names = step.named(tree)
    if name not in names:
        raise ValueError(f"there is no parameter {name!r}; there are {sorted(names)}")
    return names[name]
