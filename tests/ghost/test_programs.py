"""Weights moved, scaled or made, and what programs are made of: against the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import uses

cases = uses.Cases(2)
case, normal, inputs = cases.case, cases.normal, cases.inputs

# ---- weights that are moved, scaled or made ----


@case("scaled", {"w": normal(4, 3), "v": normal(3, 3)}, inputs(2, 4), "w v")
def scaled(p: Any, x: Any) -> Any:
    return x @ (0.3 * p["w"] / 2) @ -(p["v"] * np.float32(1.5))


@case("reshaped", {"w": normal(4, 6)}, inputs(2, 8))
def reshaped(p: Any, x: Any) -> Any:
    return x @ p["w"].reshape(8, 3)


@case("flat", {"w": normal(24)}, inputs(2, 8))
def flat(p: Any, x: Any) -> Any:
    return x @ p["w"].reshape(3, 8).T


@case("standardised", {"w": normal(4, 6)}, inputs(2, 4), "")
def standardised(p: Any, x: Any) -> Any:
    w = p["w"]
    return x @ ((w - w.mean(axis=0, keepdims=True)) / (w.std(axis=0, keepdims=True) + 1e-3))


@case("scaled by its spectral norm", {"w": normal(4, 6)}, inputs(2, 4), "")
def spectral(p: Any, x: Any) -> Any:
    return x @ (p["w"] / jnp.linalg.norm(p["w"]))


@case("scaled by a parameter", {"w": normal(4, 6), "g": normal()}, inputs(2, 4), "")
def scaled_by_parameter(p: Any, x: Any) -> Any:
    return x @ (p["w"] * p["g"])


@case("result scaled by a parameter", {"w": normal(4, 6), "g": normal()}, inputs(2, 4))
def result_scaled(p: Any, x: Any) -> Any:
    return x @ p["w"] * p["g"]


@case("scaled by the example", {"w": normal(4, 6)}, inputs(2, 4), "")
def scaled_by_example(p: Any, x: Any) -> Any:
    return x @ (p["w"] * x[0, 0])


@case("low rank", {"u": normal(4, 2), "v": normal(2, 3), "w": normal(4, 3)}, inputs(2, 4), "u v w")
def low_rank(p: Any, x: Any) -> Any:
    return x @ p["w"] + x @ p["u"] @ p["v"]


@case("low rank, merged", {"u": normal(4, 2), "v": normal(2, 3), "w": normal(4, 3)}, inputs(4), "")
def low_rank_merged(p: Any, x: Any) -> Any:
    return x @ (p["w"] + p["u"] @ p["v"])


@case("part of a weight", {"w": normal(4, 6)}, inputs(2, 4), "")
def part(p: Any, x: Any) -> Any:
    return x @ p["w"][:, :3]


@case("rounded down to integers", {"w": 4 * normal(4, 6), "v": normal(4, 6)}, inputs(4), "v")
def quantised(p: Any, x: Any) -> Any:
    return x @ p["w"].astype(jnp.int32).astype(jnp.float32) + x @ p["v"]


@case("gradient stopped at a weight", {"w": normal(4, 6), "v": normal(4, 6)}, inputs(4), "v")
def stopped_weight(p: Any, x: Any) -> Any:
    return x @ jax.lax.stop_gradient(p["w"]) + x @ p["v"]


@case("gradient stopped at one use", {"w": normal(4, 4)}, inputs(4))
def stopped_use(p: Any, x: Any) -> Any:
    return jax.lax.stop_gradient(x @ p["w"]) @ p["w"]


@case("unused", {"w": normal(4, 6), "z": normal(3, 3), "b": normal(3)}, inputs(4))
def unused(p: Any, x: Any) -> Any:
    return x @ p["w"]


@case("not floating", {"w": normal(4, 6), "n": jnp.arange(4), "none": None}, inputs(4))
def not_floating(p: Any, x: Any) -> Any:
    return (x + p["n"].astype(jnp.float32)) @ p["w"]


@case("numbers of Python", {"w": normal(4, 6), "scale": 2.0}, inputs(4))
def python_numbers(p: Any, x: Any) -> Any:
    return x @ p["w"] * p["scale"]


@case("no positions", {"w": normal(4, 6), "v": normal(4, 6)}, (inputs(0, 4), inputs(2, 4)), "v")
def no_positions(p: Any, x: Any) -> Any:
    return (x[0] @ p["w"]).sum() + x[1] @ p["v"]


# ---- what programs are made of ----


@case("checkpoint", {"v": normal(5, 6), "w": normal(6, 3)}, inputs(5), "v w")
def checkpointed(p: Any, x: Any) -> Any:
    return jax.checkpoint(lambda p, x: jnp.tanh(x @ p["v"]) @ p["w"])(p, x)


@case("jit in jit", {"v": normal(5, 6), "w": normal(6, 3)}, inputs(5), "v w")
def jitted(p: Any, x: Any) -> Any:
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return jax.jit(lambda p, x: inner(p["w"], inner(p["v"], x)))(p, x)


@case("custom_jvp on the way", {"v": normal(5, 6), "w": normal(6, 3)}, inputs(5), "v w")
def custom_jvp(p: Any, x: Any) -> Any:
    @jax.custom_jvp
    def double(x: Any) -> Any:
        return 2 * x

    double.defjvp(lambda x, t: (2 * x[0], 5 * t[0]))
    return double(x @ p["v"]) @ p["w"]


@case("custom_vjp on the way", {"v": normal(5, 6), "w": normal(6, 3)}, inputs(5), "v w")
def custom_vjp(p: Any, x: Any) -> Any:
    @jax.custom_vjp
    def double(x: Any) -> Any:
        return 2 * x

    double.defvjp(lambda x: (2 * x, ()), lambda _, g: (5 * g,))
    return double(x @ p["v"]) @ p["w"]


@case("custom_jvp around a weight", {"v": normal(5, 6), "w": normal(6, 3)}, inputs(5), "w")
def custom_jvp_around(p: Any, x: Any) -> Any:
    @jax.custom_jvp
    def dense(x: Any, w: Any) -> Any:
        return x @ w

    dense.defjvp(lambda x, t: (x[0] @ x[1], 3 * (t[0] @ x[1]) + 7 * (x[0] @ t[1])))
    return dense(x, p["v"]) @ p["w"]


@case("custom_vjp around a weight", {"v": normal(5, 6), "w": normal(6, 3)}, inputs(5), "w")
def custom_vjp_around(p: Any, x: Any) -> Any:
    @jax.custom_vjp
    def dense(x: Any, w: Any) -> Any:
        return x @ w

    dense.defvjp(
        lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, 7 * r[0][:, None] * g[None])
    )
    return dense(x, p["v"]) @ p["w"]


@case("straight-through of a weight", {"w": normal(5, 6)}, inputs(5), "")
def straight_through(p: Any, x: Any) -> Any:
    @jax.custom_vjp
    def sign(w: Any) -> Any:
        return jnp.sign(w)

    sign.defvjp(lambda w: (jnp.sign(w), ()), lambda _, g: (3 * g,))
    return x @ sign(p["w"])


LOOPED = {"w": normal(4, 4), "u": normal(4, 4), "b": normal(4)}


@case("cond", LOOPED, inputs(4), "u")
def cond(p: Any, x: Any) -> Any:
    return jax.lax.cond(x[0] > 0, lambda x: x @ p["w"], lambda x: x * p["b"], x @ p["u"])


@case("map", LOOPED, inputs(3, 4), "w u")
def mapped(p: Any, x: Any) -> Any:
    return jax.lax.map(lambda x: jnp.tanh(x @ p["w"]) + p["b"], x @ p["u"])


@case("vmap", LOOPED, inputs(3, 4), "w u")
def vmapped(p: Any, x: Any) -> Any:
    return jax.vmap(lambda x: jnp.tanh(p["w"] @ x + p["b"]) @ p["u"])(x)


@case("vmap over heads", {"w": normal(3, 4, 2)}, inputs(5, 4))
def vmapped_heads(p: Any, x: Any) -> Any:
    return jax.vmap(lambda w: jnp.tanh(x @ w))(p["w"])


@case("gradients in the loss", {"v": normal(4, 5), "w": normal(5, 3)}, inputs(4), "v w")
def gradient_in_loss(p: Any, x: Any) -> Any:
    return jax.grad(lambda x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["v"]) @ p["w"])))(x)


@case("convolutions side by side", {"w": normal(3, 2, 2, 3, 2)}, inputs(1, 4, 4, 3))
def vmapped_convolutions(p: Any, x: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated
    return jax.vmap(lambda w: conv(x, w, (1, 1), "SAME", dimension_numbers=numbers))(p["w"])


@case("convolutions of their own inputs", {"w": normal(3, 2, 2, 3, 2)}, inputs(3, 1, 4, 4, 3))
def vmapped_convolutions_and_inputs(p: Any, x: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = jax.lax.conv_general_dilated
    return jax.vmap(lambda x, w: conv(x, w, (1, 1), "SAME", dimension_numbers=numbers))(x, p["w"])


@case("projections side by side", {"q": normal(4, 3), "k": normal(4, 3)}, inputs(5, 4), "")
def fused(p: Any, x: Any) -> Any:
    q, k = jnp.split(x @ jnp.concatenate([p["q"], p["k"]], axis=1), 2, axis=1)
    return jnp.tanh(q @ k.T)


@case("masked", {"w": normal(4, 3)}, inputs(5, 4), "")
def masked(p: Any, x: Any) -> Any:
    return x @ (p["w"] * (jnp.arange(12.0).reshape(4, 3) % 2))


@case("nobody reads it", {"w": normal(4, 3), "v": normal(4, 4)}, inputs(5, 4))
def dead(p: Any, x: Any) -> Any:
    _ = jnp.sum(x * p["w"].sum())
    return jax.jit(lambda x: (x @ p["w"], x * p["v"].sum()))(x)[0]


@case("no weight in the loss", {"w": normal(4, 6)}, inputs(4), "")
def constant(p: Any, x: Any) -> Any:
    return x


@case("no example in the loss", {"w": normal(4, 6), "b": normal(3)}, inputs(4), "")
def no_example(p: Any, x: Any) -> Any:
    return jnp.sum(p["w"] ** 2) + p["b"]


@case("weight decay in the loss", {"w": normal(4, 6)}, inputs(4), "")
def decayed(p: Any, x: Any) -> Any:
    return x @ p["w"] + jnp.sum(p["w"] ** 2)


@pytest.mark.parametrize("name", cases.table)
def test_against_gradients(name: str, monkeypatch: Any) -> None:
    uses.check(cases.table[name], monkeypatch)
