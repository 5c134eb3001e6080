"""Lookups and weights used more than once: lengths and products are those of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from references import uses

cases = uses.Cases(1)
case, normal, inputs, tokens, V = cases.case, cases.normal, cases.inputs, cases.tokens, uses.V

# ---- lookups ----


TABLE = {"w": normal(V, 3), "u": normal(3, 4)}
OUTSIDE = tokens(6, low=-V - 3, high=V + 3)


@case("lookup", TABLE, tokens(6), "w u")
def lookup(p: Any, x: Any) -> Any:
    return jnp.tanh(p["w"][x]) @ p["u"]


@case("lookup, the same token everywhere", TABLE, tokens(6, low=2, high=3), "w u")
def lookup_repeated(p: Any, x: Any) -> Any:
    return jnp.take(p["w"], x, axis=0) @ p["u"]


@case("lookup, two axes of tokens", TABLE, tokens(2, 3), "w u")
def lookup_two_axes(p: Any, x: Any) -> Any:
    return p["w"][x] @ p["u"]


@case("lookup, rows that are matrices", {"w": normal(V, 3, 2)}, tokens(4))
def lookup_matrices(p: Any, x: Any) -> Any:
    return p["w"][x]


@case("lookup in a vector", {"w": normal(V)}, tokens(4))
def lookup_vector(p: Any, x: Any) -> Any:
    return p["w"][x] * jnp.arange(4.0)


@case("lookup, clipped", TABLE, OUTSIDE, "w u")
def lookup_clipped(p: Any, x: Any) -> Any:
    return jnp.take(p["w"], x, axis=0, mode="clip") @ p["u"]


@case("lookup, clipped by indexing", TABLE, OUTSIDE, "w u")
def lookup_clipped_at(p: Any, x: Any) -> Any:
    return p["w"].at[x].get(mode="clip", wrap_negative_indices=False) @ p["u"]


@case("lookup, filled", TABLE, OUTSIDE, "w u")
def lookup_filled(p: Any, x: Any) -> Any:
    return jnp.take(p["w"], x, axis=0, mode="fill", fill_value=0.5) @ p["u"]


@case("lookup, filled, negatives too", TABLE, OUTSIDE, "w u")
def lookup_filled_negative(p: Any, x: Any) -> Any:
    rows = p["w"].at[x].get(mode="fill", fill_value=0.5, wrap_negative_indices=False)
    return rows @ p["u"]


@case("lookup, wrapped", TABLE, OUTSIDE, "w u")
def lookup_wrapped(p: Any, x: Any) -> Any:
    return jnp.take(p["w"], x, axis=0, mode="wrap") @ p["u"]


@case("lookup of columns", {"w": normal(3, V)}, tokens(4), "")
def lookup_columns(p: Any, x: Any) -> Any:
    return p["w"][:, x]


@case("lookup, one token", TABLE, tokens(), "u")
def lookup_one(p: Any, x: Any) -> Any:
    return p["w"][x] @ p["u"]


@case("lookup, one token by vmap", TABLE, tokens(4), "w u")
def lookup_one_vmapped(p: Any, x: Any) -> Any:
    return jax.vmap(lambda t: p["w"][t] @ p["u"])(x)


@case("lookup with bytes", TABLE, tokens(4).astype(jnp.uint8), "w u")
def lookup_bytes(p: Any, x: Any) -> Any:
    return p["w"][x] @ p["u"]


@case("lookup by one-hot product", TABLE, tokens(6), "w u")
def lookup_one_hot(p: Any, x: Any) -> Any:
    return jax.nn.one_hot(x, V) @ p["w"] @ p["u"]


@case("lookup, tokens of two kinds", TABLE, (tokens(3), tokens(4).astype(jnp.uint8)), "w u")
def lookup_two_kinds(p: Any, x: Any) -> Any:
    return jnp.concatenate([p["w"][x[0]], p["w"][x[1]]]) @ p["u"]


case("lookup, few rows and many places", TABLE, tokens(30), "w u")(lookup)
case("lookup, few rows", {"w": normal(V, 3)}, tokens(30), "w", True)(lookup_matrices)
case("lookup, many rows", {"w": normal(50, 3)}, tokens(4, high=50), "w", False)(lookup_matrices)


# ---- weights used more than once ----


@case("shared, same width", {"w": normal(4, 4)}, inputs(3, 4))
def shared_twice(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["w"]


@case("shared, many positions", {"w": normal(4, 4)}, inputs(30, 4), "w", True)
def shared_many(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["w"]


@case("shared, other numbers of positions", {"w": normal(4, 4)}, (inputs(3, 4), inputs(2, 4)))
def shared_positions(p: Any, x: Any) -> Any:
    return jnp.concatenate([x[0] @ p["w"], jnp.tanh(x[1] @ p["w"]) @ p["w"]])


@case("shared, transposed", {"w": normal(5, 3)}, inputs(4, 5))
def shared_transposed(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["w"]) @ p["w"].T


@case("shared, transposed, square", {"w": normal(4, 4)}, inputs(3, 4))
def shared_transposed_square(p: Any, x: Any) -> Any:
    return jnp.tanh(p["w"] @ jnp.tanh(x @ p["w"]).T) + (x @ p["w"].T).T


@case("shared, an embedding and the output", TABLE | {"u": normal(3, 3)}, tokens(6), "w u")
def tied(p: Any, x: Any) -> Any:
    return jnp.tanh(p["w"][x] @ p["u"]) @ p["w"].T


@case("shared, the output and an embedding", TABLE, (inputs(4, 3), tokens(6)), "w")
def tied_reversed(p: Any, x: Any) -> Any:
    y = jnp.tanh(x[0] @ p["w"].T)
    return y.sum() + jnp.einsum("td,vd->tv", p["w"][x[1]], p["w"])


@case("shared, an embedding by lookup and product", TABLE, tokens(6), "w")
def tied_one_hot(p: Any, x: Any) -> Any:
    return jnp.tanh(jax.nn.one_hot(x, V) @ p["w"]) + p["w"][x[::-1]]


@case("shared, lookups outside", TABLE, OUTSIDE, "w")
def tied_outside(p: Any, x: Any) -> Any:
    a = jnp.take(p["w"], x, axis=0, mode="clip")
    b = p["w"].at[x].get(mode="fill", fill_value=0.5, wrap_negative_indices=False)
    return jnp.tanh(a + b) @ p["w"].T


@case("shared, convolutions", {"w": normal(3, 3, 2, 2)}, inputs(1, 4, 4, 2))
def shared_convolution(p: Any, x: Any) -> Any:
    def conv(x: Any, **options: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, p["w"], dimension_numbers=numbers, **options)

    y = jnp.tanh(conv(x, window_strides=(1, 1), padding="SAME"))
    return conv(y, window_strides=(2, 2), padding="VALID", rhs_dilation=(1, 1))


@case("shared, as a convolution and a product", {"w": normal(1, 1, 3, 3)}, inputs(1, 4, 4, 3), "")
def shared_conv_dense(p: Any, x: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)
    return jnp.tanh(y) @ p["w"].reshape(3, 3)


@case("shared, the same entries in other places", {"w": normal(4, 4)}, inputs(3, 4), "")
def shared_reshaped(p: Any, x: Any) -> Any:
    return x @ p["w"] + jnp.tanh(x @ p["w"].T.reshape(2, 8).reshape(4, 4))


@case("shared, heads", {"w": normal(3, 4, 4)}, inputs(5, 3, 4))
def shared_heads(p: Any, x: Any) -> Any:
    y = jnp.tanh(jnp.einsum("thd,hdk->thk", x, p["w"]))
    return jnp.einsum("thk,hdk->thd", y, p["w"])


@case("shared, groups of other axes", {"w": normal(4, 4, 4)}, inputs(5, 4, 4), "")
def shared_other_groups(p: Any, x: Any) -> Any:
    y = jnp.tanh(jnp.einsum("thd,hdk->thk", x, p["w"]))
    return jnp.einsum("thk,khd->thd", y, p["w"])


@case("shared, product and elementwise", {"w": normal(4, 4)}, inputs(4, 4), "")
def shared_elementwise(p: Any, x: Any) -> Any:
    return x @ p["w"] + x * p["w"]


@case("shared, both operands", {"w": normal(4, 4)}, inputs(4, 4), "")
def shared_both(p: Any, x: Any) -> Any:
    return x @ p["w"] @ (p["w"] @ p["w"])


@case("shared, factors differ", {"w": normal(4, 4)}, inputs(3, 4))
def shared_factors(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ (2 * p["w"])) @ (-p["w"] / 3).T


case("shared, few rows and many places", TABLE, tokens(30), "w", True)(tied_one_hot)


@case("shared, many rows", {"w": normal(60, 12)}, tokens(2, high=60), "w", False)
def tied_many_rows(p: Any, x: Any) -> Any:
    return jnp.tanh(p["w"][x]) @ p["w"].T


@case("shared, the output first, few rows", TABLE, (inputs(30, 3), tokens(20)), "w", True)
def tied_few_rows(p: Any, x: Any) -> Any:
    return (jnp.tanh(x[0] @ p["w"].T).sum(axis=0) @ p["w"])[None] * p["w"][x[1]]


@case("shared, a net unrolled in time", {"w": normal(4, 4), "u": normal(3, 4)}, inputs(9, 3), "w u")
def unrolled(p: Any, x: Any) -> Any:
    h = jnp.zeros(4)
    for step in x:
        h = jnp.tanh(step @ p["u"] + h @ p["w"])
    return h


@pytest.mark.parametrize("name", cases.table)
def test_against_gradients(name: str, monkeypatch: Any) -> None:
    uses.check(cases.table[name], monkeypatch)
