"""Weights in loops: lengths and inner products are those of the gradients themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from references import uses

cases = uses.Cases(3)
case, normal, inputs, tokens, V = cases.case, cases.normal, cases.inputs, cases.tokens, uses.V

TABLE = {"w": normal(V, 3), "u": normal(3, 4)}
LOOPED = {"w": normal(4, 4), "u": normal(4, 4), "b": normal(4)}
STACKED = {"w": normal(3, 4, 4), "u": normal(4, 4), "b": normal(3, 4)}


def recurrent(p: Any, xs: Any, **options: Any) -> Any:
    def step(h: Any, x: Any) -> Any:
        h = jnp.tanh(h @ p["w"] + x + p["b"])
        return h, 2 * h

    return jax.lax.scan(step, jnp.zeros(4), xs, **options)[1]


@case("scan", LOOPED, inputs(6, 4), "w u")
def scanned(p: Any, x: Any) -> Any:
    return recurrent(p, x @ p["u"])


@case("scan, backwards, some rounds written out", LOOPED, inputs(7, 4), "w u")
def scanned_backwards(p: Any, x: Any) -> Any:
    return recurrent(p, x @ p["u"], reverse=True, unroll=3)


@case("scan, many rounds", {"w": normal(4, 4), "b": normal(4)}, inputs(40, 4), "w", True)
def scanned_long(p: Any, x: Any) -> Any:
    return recurrent(p, x)


@case("scan, twice, and outside", LOOPED, inputs(6, 4), "w u")
def scanned_twice(p: Any, x: Any) -> Any:
    return recurrent(p, recurrent(p, x @ p["u"]) @ p["w"].T, reverse=True) @ p["u"]


@case("scan, input and state projected in it", LOOPED, inputs(6, 2, 4), "w u")
def scanned_both(p: Any, x: Any) -> Any:
    step = lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]), None)  # noqa: E731
    return jax.lax.scan(step, x[0], x)[0]


@case("scan, scaled there", LOOPED, inputs(6, 4), "w u")
def scanned_scaled(p: Any, x: Any) -> Any:
    step = lambda h, x: (jnp.tanh(h @ (p["w"] / 3) - x @ (2 * p["u"]).T), None)  # noqa: E731
    return jax.lax.scan(step, x[0], x)[0]


@case("scan, lookups and their table", TABLE | {"u": normal(3, 3)}, tokens(6), "w u")
def scanned_lookups(p: Any, x: Any) -> Any:
    def step(h: Any, t: Any) -> Any:
        h = jnp.tanh(h @ p["u"] + p["w"][t[None]][0])
        return h, h @ p["w"].T

    return jax.lax.scan(step, jnp.zeros(3), x)[1]


@case("scan, convolutions", {"w": normal(3, 3, 2, 2)}, inputs(3, 1, 4, 4, 2))
def scanned_convolutions(p: Any, x: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")

    def step(h: Any, x: Any) -> Any:
        conv = jax.lax.conv_general_dilated
        return jnp.tanh(conv(h, p["w"], (1, 1), "SAME", dimension_numbers=numbers) + x), None

    return jax.lax.scan(step, x[0], x)[0]


@case("scan, checkpointed rounds", LOOPED, inputs(6, 4), "w u")
def scanned_checkpoint(p: Any, x: Any) -> Any:
    step = jax.checkpoint(lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]), h))
    return jax.lax.scan(step, x[0], x)[1]


@case("scan in scan", LOOPED, inputs(3, 2, 4), "w u")
def scan_in_scan(p: Any, x: Any) -> Any:
    step = lambda h, x: (recurrent(p, x + h[None])[-1] @ p["u"], None)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros(4), x)[0]


@case("scan, the weight in the state", LOOPED, inputs(6, 4), "u")
def scanned_state(p: Any, x: Any) -> Any:
    step = lambda c, x: ((jnp.tanh(c[0] @ c[1] + x @ p["u"]), c[1] / 2), None)  # noqa: E731
    return jax.lax.scan(step, (x[0], p["w"]), x)[0][0]


@case("scan, the weight also an output", LOOPED, inputs(3, 4), "u")
def scanned_output(p: Any, x: Any) -> Any:
    step = lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"]), p["w"])  # noqa: E731
    h, out = jax.lax.scan(step, x[0], x)
    return h + out.sum(axis=(0, 1))


@case("scan, also elementwise there", LOOPED, inputs(3, 4), "u")
def scanned_elementwise(p: Any, x: Any) -> Any:
    step = lambda h, x: (jnp.tanh(h @ p["w"] + x @ p["u"] * p["w"][0, 0]), None)  # noqa: E731
    return jax.lax.scan(step, x[0], x)[0]


@case("scan, elementwise outside", LOOPED, inputs(3, 4), "u")
def scanned_elementwise_outside(p: Any, x: Any) -> Any:
    return recurrent(p, x @ p["u"]) * p["w"][:3] + x * p["b"][None]


@case("layers", STACKED, inputs(4), "w u")
def layers(p: Any, x: Any) -> Any:
    step = lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1]), None)  # noqa: E731
    return jax.lax.scan(step, x @ p["u"], (p["w"], p["b"]))[0]


@case("layers, many positions", {"w": normal(3, 4, 4)}, inputs(30, 4), "w", True)
def layers_positions(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"], reverse=True)[0]


@case("layers, twice, and by heads", STACKED, inputs(3, 4), "w")
def layers_twice(p: Any, x: Any) -> Any:
    for order in (False, True):
        step = lambda h, w: (jnp.tanh(h @ (w if order else w.T)), None)  # noqa: B023, E731
        x = jax.lax.scan(step, x, p["w"], reverse=order)[0]
    return jnp.einsum("hd,hdk->hk", x, p["w"])


@case("layers, transposed first", {"w": normal(4, 3, 4)}, inputs(4))
def layers_transposed(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"].transpose(1, 0, 2))[0]


@case("layers of heads", {"w": normal(3, 2, 4, 4)}, inputs(5, 2, 4))
def layers_heads(p: Any, x: Any) -> Any:
    step = lambda h, w: (jnp.tanh(jnp.einsum("thd,hdk->thk", h, w)), None)  # noqa: E731
    return jax.lax.scan(step, x, p["w"])[0]


@case("layers of layers", {"w": normal(2, 3, 4, 4)}, inputs(4))
def layers_nested(p: Any, x: Any) -> Any:
    inner = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(lambda h, w: jax.lax.scan(inner, h, w), x, p["w"])[0]


@case("layers used in every round", {"w": normal(3, 4, 4)}, inputs(2, 4))
def layers_in_rounds(p: Any, x: Any) -> Any:
    inner = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
    return jax.lax.scan(lambda h, x: jax.lax.scan(inner, h + x, p["w"]), x[0], x)[0]


@case("layers that are convolutions", {"w": normal(2, 3, 3, 2, 2)}, inputs(1, 4, 4, 2))
def layers_convolutions(p: Any, x: Any) -> Any:
    numbers, conv = ("NHWC", "HWIO", "NHWC"), jax.lax.conv_general_dilated
    step = lambda h, w: (conv(h, w, (1, 1), "SAME", dimension_numbers=numbers), None)  # noqa: E731
    return jax.lax.scan(step, x, p["w"])[0]


@case("layers that are tables", {"w": normal(2, V, 3)}, tokens(4), "")
def layers_lookups(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (h + jnp.sin(w[x]), None), jnp.zeros((4, 3)), p["w"])[0]


@case("layers, reshaped first", {"w": normal(12, 4)}, inputs(4), "")
def layers_reshaped(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"].reshape(3, 4, 4))[0]


@case("while", LOOPED, inputs(4), "w u")
def while_loop(p: Any, x: Any) -> Any:
    h = jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"]), x @ p["u"])
    return h + p["b"]


@pytest.mark.parametrize("name", cases.table)
def test_against_gradients(name: str, monkeypatch: Any) -> None:
    uses.check(cases.table[name], monkeypatch)
