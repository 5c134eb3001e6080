"""Products and convolutions: lengths and inner products are those of the gradients themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from references import uses

cases = uses.Cases(0)
case, normal, inputs = cases.case, cases.normal, cases.inputs

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


@pytest.mark.parametrize("name", cases.table)
def test_against_gradients(name: str, monkeypatch: Any) -> None:
    uses.check(cases.table[name], monkeypatch)
