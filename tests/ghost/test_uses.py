"""Every way to use a weight: norms and inner products equal those of the gradients themselves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ghost as reference

from dynamics import ghost
from dynamics.ghost import algebra

B, V = 5, 7
GENERATOR = np.random.default_rng(0)


class Case(NamedTuple):
    """``predict(params, x)`` of one example; ``factored``: leaves whose gradients are not made."""

    predict: Callable[[Any, Any], jax.Array]
    params: Any
    x: Any
    factored: str
    made: bool | None = None  # whether A^T D is made for the norm of the one factored leaf


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape) / 2, jnp.float32)


def inputs(*shape: int) -> jax.Array:
    return 2 * normal(B, *shape)


def tokens(*shape: int, low: int = 0, high: int = V) -> jax.Array:
    return jnp.asarray(GENERATOR.integers(low, high, (B, *shape)), jnp.int32)


CASES: dict[str, Case] = {}


def case(name: str, params: Any, x: Any, factored: str = "w", made: bool | None = None) -> Any:
    def add(predict: Any) -> Any:
        assert name not in CASES
        CASES[name] = Case(predict, params, x, factored, made)
        return predict

    return add


def loss(predict: Callable[[Any, Any], jax.Array]) -> Any:
    def of_one(params: Any, shared: Any, example: Any) -> jax.Array:
        x, target = example
        y = predict(params, x).astype(jnp.float32)
        return jnp.sum(jnp.sin(y + target)) + jnp.sum(y) ** 2 / (1 + y.size)

    return of_one


def examples(c: Case) -> Any:
    return c.x, jnp.linspace(-1.0, 1.0, len(jax.tree.leaves(c.x)[0]))


# ---- dense ----


for t, m, n, made in ((1, 5, 3, False), (4, 30, 20, False), (40, 5, 3, True)):
    params = {"w": normal(m, n), "b": normal(n)}
    case(f"dense, {t} positions", params, inputs(t, m), "w", made)(
        lambda p, x: x @ p["w"] + p["b"][None]
    )
    case(f"weight first, {t} positions", {"w": normal(n, m)}, inputs(m, t), "w", made)(
        lambda p, x: p["w"] @ x
    )

EINSUMS = {
    "td,hdk->thk": ((6, 4), (3, 4, 5)),
    "thd,hdk->thk": ((6, 3, 4), (3, 4, 5)),
    "thk,hkd->td": ((6, 3, 4), (3, 4, 5)),
    "hdk,thd->htk": ((6, 3, 4), (3, 4, 5)),
    "thk,khd->td": ((6, 3, 4), (4, 3, 5)),
    "ts,ij->tsij": ((2, 3), (2, 4)),
    "td,d->t": ((6, 4), (4,)),
    "tabc,cad->bdt": ((3, 2, 3, 4), (4, 2, 3)),
    "abt,bac->tabc": ((2, 3, 4), (3, 2, 2)),
}
for equation, (x, w) in EINSUMS.items():
    left, right = equation.split("->")[0].split(",")
    swap = equation.startswith("hdk,")

    def einsum(p: Any, x: Any, equation: str = equation, swap: bool = swap) -> Any:
        operands = (p["w"], x) if swap else (x, p["w"])
        return jnp.einsum(equation, *operands)

    case(f"einsum {equation}", {"w": normal(*w)}, inputs(*x))(einsum)


@case("bilinear", {"w": normal(5, 5)}, inputs(4, 5))
def bilinear(p: Any, x: Any) -> Any:
    return x @ p["w"] @ x.T


@case("two layers", {"v": normal(5, 6), "w": normal(6, 3), "b": normal(6)}, inputs(5), "v w")
def two_layers(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["v"] + p["b"]) @ p["w"]


# ---- convolutions ----


def convolution(name: str, x: Any, w: Any, made: bool | None = None, **options: Any) -> None:
    spatial = len(x) - 2
    options.setdefault("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    if spatial == 1:
        options["dimension_numbers"] = ("NHC", "HIO", "NHC")
    if spatial == 3:
        options["dimension_numbers"] = ("NHWDC", "HWDIO", "NHWDC")
    options = {"window_strides": (1,) * spatial, "padding": "SAME"} | options
    case(f"convolution, {name}", {"w": normal(*w)}, inputs(*x), "w", made)(
        lambda p, x: jax.lax.conv_general_dilated(x, p["w"], **options)
    )


convolution("few places", (1, 2, 2, 9), (3, 3, 9, 8), False)
convolution("many places", (1, 8, 8, 3), (3, 3, 3, 2), True)
convolution("several images", (3, 4, 4, 3), (2, 2, 3, 2))
convolution("1 x 1", (1, 4, 4, 3), (1, 1, 3, 2))
convolution("strides", (1, 7, 6, 3), (3, 2, 3, 4), window_strides=(2, 3))
convolution("valid", (1, 7, 6, 3), (3, 2, 3, 4), padding="VALID", window_strides=(3, 1))
convolution("uneven padding", (1, 5, 6, 3), (3, 2, 3, 4), padding=[(2, 0), (0, 3)])
convolution("negative padding", (1, 6, 7, 3), (3, 2, 3, 4), padding=[(-1, 1), (2, -2)])
convolution("kernel dilation", (1, 7, 7, 3), (3, 2, 3, 4), rhs_dilation=(2, 3))
convolution("transposed", (1, 3, 4, 3), (3, 2, 3, 4), lhs_dilation=(2, 3), padding=[(2, 1), (1, 1)])
convolution(
    *("everything", (2, 7, 6, 4), (3, 2, 2, 6)),
    **{"window_strides": (2, 1), "lhs_dilation": (1, 2), "rhs_dilation": (2, 1)},
    **{"padding": [(3, -1), (0, 2)], "feature_group_count": 2},
)
convolution("groups, many places", (1, 6, 6, 6), (3, 3, 2, 9), True, feature_group_count=3)
convolution("groups, few places", (1, 2, 2, 12), (2, 2, 4, 24), False, feature_group_count=3)
convolution("depthwise", (1, 5, 5, 4), (3, 3, 1, 4), feature_group_count=4)
convolution("depthwise, multiplied", (1, 5, 5, 4), (3, 3, 1, 8), feature_group_count=4)
convolution("1-D", (1, 9, 3), (4, 3, 2), window_strides=(2,))
convolution("3-D", (1, 3, 4, 3, 2), (2, 2, 3, 2, 3), window_strides=(1, 2, 1))
convolution("NCHW", (1, 3, 5, 6), (4, 3, 3, 2), dimension_numbers=("NCHW", "OIHW", "NCHW"))
convolution("CNWH", (3, 2, 5, 6), (3, 4, 3, 2), dimension_numbers=("CNWH", "IOHW", "HNWC"))


@case("convolution, lax.conv_transpose", {"w": normal(3, 3, 3, 2)}, inputs(1, 4, 4, 3))
def conv_transpose(p: Any, x: Any) -> Any:
    return jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME")


@case("convolution, weight turned round", {"w": normal(3, 3, 3, 2)}, inputs(1, 4, 4, 2), "")
def conv_turned(p: Any, x: Any) -> Any:
    return jax.lax.conv_transpose(x, p["w"], (2, 2), "SAME", transpose_kernel=True)


@case("convolution, weight transposed", {"w": normal(3, 2, 3, 4)}, inputs(1, 5, 5, 3))
def conv_weight_transposed(p: Any, x: Any) -> Any:
    w = p["w"].transpose(0, 2, 1, 3).reshape(3, 3, 8)[..., None, :]
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HIWO", "NHWC")
    )


@case("convolution, batch groups", {"w": normal(2, 2, 3, 4)}, inputs(2, 4, 4, 3), "")
def conv_batch_groups(p: Any, x: Any) -> Any:
    return jax.lax.conv_general_dilated(
        *(x, p["w"], (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        batch_group_count=2,
    )


@case("convolution of the weight", {"w": normal(1, 5, 5, 2)}, inputs(2, 2, 2, 3), "")
def conv_of_weight(p: Any, x: Any) -> Any:
    return jax.lax.conv_general_dilated(
        p["w"], x, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


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
    return jax.nn.softmax(q @ k.T)


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


@pytest.mark.parametrize("name", CASES)
def test_against_gradients(name: str, monkeypatch: Any) -> None:
    """Lengths, products with the examples the other way round, what is factored and how."""
    c, made, real = CASES[name], [], algebra._made
    monkeypatch.setattr(algebra, "_made", lambda rows: made.append(rows) or real(rows))

    @reference.jit
    def run(params: Any, examples: Any) -> Any:
        turned = jax.tree.map(lambda x: x[::-1], examples)
        one, other = (ghost.factors(loss(c.predict), params, {}, e) for e in (examples, turned))
        assert set(one.parts) == set(c.factored.split())
        norms = ghost.norms(one)
        assert c.made is None or c.made == bool(made)
        return norms, ghost.products(one, other)

    norms, products = run(c.params, examples(c))
    each = reference.gradients(loss(c.predict), c.params, {}, examples(c))
    np.testing.assert_allclose(norms, reference.norms(each), rtol=1e-5)
    largest = np.abs(each @ each.T).max()
    np.testing.assert_allclose(products, each @ each[::-1].T, rtol=1e-5, atol=1e-6 * largest)
