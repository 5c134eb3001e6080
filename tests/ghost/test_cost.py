"""What factored gradients cost, by the compiler's own counts; nothing here is timed."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from references import ghost as reference

from dynamics import ghost, models, step, task
from dynamics.scores import grand
from dynamics.scores.grand import grand_last_layer
from dynamics.types import Batch

B = 256


def spent(fn: Any, *args: Any) -> tuple[float, int]:
    """Floating-point operations, and bytes of temporary memory."""
    compiled = jax.jit(fn).lower(*args).compile()
    return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def net() -> Any:
    """784-512-512-10 and 256 examples, as shapes."""
    made = task.classification(models.make(models.MLP(width=512, depth=2), 10), (28, 28))
    params, extras = jax.eval_shape(made.init, jax.random.key(0), {})
    state = jax.eval_shape(lambda: step.given(jnp.zeros(())))
    x = jax.ShapeDtypeStruct((B, 28, 28), jnp.float32)
    y = jax.ShapeDtypeStruct((B,), jnp.int32)
    return made, state.replace(params=params, extras=extras), Batch(x=x, y=y, index=y)


@functools.cache
def forward() -> float:
    made, state, batch = net()
    return spent(lambda s, b: made.evaluate(s.params, s.extras, b, {}).loss, state, batch)[0]


def gradients(state: Any, batch: Batch) -> Any:
    """What ghost norms save: all gradients, and their lengths."""
    made = net()[0]

    def length(one: Batch) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], one)
        loss = lambda p: made.evaluate(p, state.extras, alone, {}).loss[0]  # noqa: E731
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(state.params))))

    return jax.vmap(length)(batch)


def test_grand_of_an_mlp() -> None:
    """At most 2.2 forward passes, and a twentieth of the memory of the gradients."""
    made, state, batch = net()
    flops, memory = spent(functools.partial(grand, made), state, batch)
    assert flops <= 2.2 * forward()
    assert spent(gradients, state, batch)[1] >= 20 * memory


def test_grand_of_the_last_layer() -> None:
    made, state, batch = net()
    flops, _ = spent(functools.partial(grand_last_layer, made), state, batch)
    assert flops <= 1.2 * forward()


# ---- weights whose gradients must be made ----


GENERATOR = np.random.default_rng(0)
WIDE = 512


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)


PARAMS = {"good": normal(WIDE, 128), "odd": normal(128, 64), "last": normal(64, 3)}


def loss(params: Any, shared: Any, x: jax.Array) -> jax.Array:
    w = params["odd"] - params["odd"].mean(axis=0, keepdims=True)
    h = jnp.tanh(jnp.tanh(x @ params["good"]) @ w)
    return jnp.sum(jnp.sin(h @ params["last"]))


def normed(params: Any, x: jax.Array) -> jax.Array:
    return ghost.norms(ghost.factors(loss, params, {}, x))


def test_a_fallback_is_named_and_right(caplog: Any) -> None:
    x = normal(4, WIDE)
    with caplog.at_level(logging.WARNING):
        found = reference.jit(normed)(PARAMS, x)
    (record,) = caplog.records
    assert record.getMessage() == (
        "the gradients of parameter 'odd' [128, 64] are made for each example, 0.0328 MB each: "
        "it enters dot_general through sub"
    )
    wanted = reference.norms(reference.gradients(loss, PARAMS, {}, x))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_only_its_gradients_are_made() -> None:
    x, (good, odd) = normal(64, WIDE), (64 * 4 * PARAMS[n].size for n in ("good", "odd"))

    def all_of_them(params: Any, x: jax.Array) -> Any:
        found = jax.vmap(jax.grad(loss), in_axes=(None, None, 0))(params, {}, x)
        return sum(jnp.sum(g**2) for g in jax.tree.leaves(found))

    assert spent(all_of_them, PARAMS, x)[1] >= good
    assert odd <= spent(normed, PARAMS, x)[1] <= good / 3


def test_the_memory_is_that_of_the_batch_gradient() -> None:
    """For tied embeddings of many tokens, whose own gradients would be 12.8 MB an example."""
    table = jax.ShapeDtypeStruct((50_000, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((32, 16), jnp.int32)

    def tied(params: Any, shared: Any, x: jax.Array) -> jax.Array:
        logits = params[x] @ params.T
        return jnp.sum(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])

    def batch(params: Any, x: jax.Array) -> Any:
        return jax.grad(lambda p: jax.vmap(lambda x: tied(p, {}, x))(x).sum())(params)

    def each(params: Any, x: jax.Array) -> Any:
        return ghost.norms(ghost.factors(tied, params, {}, x))

    assert spent(each, table, x)[1] <= 1.1 * spent(batch, table, x)[1]
