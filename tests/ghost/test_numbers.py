"""Lengths and products at the edges: tiny, huge, zero, low precision, one example, no example."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ghost as reference

from dynamics import ghost

B = 3
GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


PARAMS = {"w": normal(6, 5), "v": normal(5, 4), "b": normal(4)}


def net(p: Any, scale: Any, x: jax.Array) -> jax.Array:
    """Two layers [T, 6]; ``scale`` multiplies the loss."""
    return scale * jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"] + p["b"][None])


def table(p: Any, scale: Any, x: jax.Array) -> jax.Array:
    """An embedding that is the output layer, too."""
    at = jnp.argmax(x, axis=1)
    return scale * jnp.sum(jnp.tanh(p["w"][at] @ p["v"]) @ p["v"].T @ p["w"].T)


def convolved(p: Any, scale: Any, x: jax.Array) -> jax.Array:
    """Twice with one kernel, the places being channels."""
    conv = lambda x: jax.lax.conv_general_dilated(  # noqa: E731
        *(x, p["b"][:, None, None], (1,), "SAME"), dimension_numbers=("NHC", "HIO", "NHC")
    )
    return scale * jnp.sum(jnp.sin(conv(conv(x.reshape(1, -1, 1)))))


def lengths(loss: Any, params: Any, shared: Any, x: Any, **options: Any) -> np.ndarray:
    run = lambda p, s, x: ghost.norms(ghost.factors(loss, p, s, x, **options))  # noqa: E731
    return np.asarray(reference.jit(run)(params, shared, x))


def compare(loss: Any, params: Any, shared: Any, x: Any, rtol: float = 1e-5) -> None:
    wanted = reference.norms(reference.gradients(loss, params, shared, x))
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(lengths(loss, params, shared, x), wanted, rtol=rtol)


SCALES = (1e-25, 1e-12, 1, 1e15, 1e25)


@pytest.mark.parametrize("positions", [1, 3, 40])
@pytest.mark.parametrize("loss", [net, table, convolved])
def test_lengths_of_any_size(loss: Any, positions: int) -> None:
    """1e-25 squared is no float32, nor is 1e25; and no example changes another's digits."""
    x = normal(len(SCALES), positions, 6), jnp.asarray(SCALES, jnp.float32)
    compare(lambda p, _, x: loss(p, x[1], x[0]), PARAMS, {}, x)


@pytest.mark.parametrize("positions", [1, 40])
def test_inputs_of_any_size(positions: int) -> None:
    """The derivatives are as large, or small, the other way."""

    def loss(p: Any, _: Any, x: Any) -> jax.Array:
        return jnp.sum(jnp.sin(x[0] * x[1] @ p["w"] / x[1]))

    scales = jnp.asarray([1e-30, 1e-20, 1, 1e20, 1e30], jnp.float32)
    compare(loss, {"w": PARAMS["w"]}, {}, (normal(len(scales), positions, 6), scales))


def test_uses_of_unequal_size() -> None:
    def loss(p: Any, _: Any, x: jax.Array) -> jax.Array:
        small = x * 1e-22 @ p["w"]
        return jnp.sum(jnp.sin(small * 1e22)) + 2e21 * jnp.sum(x @ p["w"] * 1e-21)

    compare(loss, {"w": PARAMS["w"]}, {}, normal(B, 3, 6))


@pytest.mark.parametrize("loss", [net, table, convolved])
def test_gradients_of_zero(loss: Any) -> None:
    for scale in (0.0, -0.0):
        found = lengths(loss, PARAMS, jnp.float32(scale), normal(B, 4, 6))
        np.testing.assert_array_equal(found, np.zeros(B))
    found = lengths(net, PARAMS, jnp.float32(1), jnp.zeros((B, 4, 6)), only="w")
    np.testing.assert_array_equal(found, np.zeros(B))


def test_one_gradient_of_zero_among_others() -> None:
    def loss(p: Any, _: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.nn.relu(x @ p["w"]))

    x = normal(B, 4, 6).at[1].set(0)
    found = lengths(loss, {"w": PARAMS["w"]}, {}, x)
    assert found[1] == 0 and (found[[0, 2]] > 0).all()


def test_what_is_not_finite_stays_so_and_for_itself() -> None:
    x = normal(B, 4, 6)
    clean = lengths(net, PARAMS, jnp.float32(1), x)
    for bad in (np.nan, np.inf):
        found = lengths(net, PARAMS, jnp.float32(1), x.at[1, 0, 0].set(bad))
        assert not np.isfinite(found[1])
        np.testing.assert_array_equal(found[[0, 2]], clean[[0, 2]])


def test_what_overflows_is_not_finite() -> None:
    def loss(p: Any, _: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(x * 1e30 @ p["w"] * 1e30) + jnp.sum(p["b"] * 1e30) * 1e30

    for only in ("w", "b"):
        assert not np.isfinite(lengths(loss, PARAMS, {}, normal(B, 4, 6), only=only)).any()


def test_bfloat16() -> None:
    """Activations and derivatives as the program rounds them, sums in float32."""

    def loss(p: Any, _: Any, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)
        return jnp.sum(jnp.tanh(y).astype(jnp.float32) ** 2)

    x, params = normal(B, 7, 6), {"w": PARAMS["w"]}
    y = x.astype(jnp.bfloat16) @ PARAMS["w"].astype(jnp.bfloat16)
    back = jax.grad(lambda y: jnp.sum(jnp.tanh(y).astype(jnp.float32) ** 2))(y)
    a, d = (np.asarray(v, np.float64) for v in (x.astype(jnp.bfloat16), back))
    wanted = np.linalg.norm(np.einsum("btm,btn->bmn", a, d), axis=(1, 2))
    np.testing.assert_allclose(lengths(loss, params, {}, x), wanted, rtol=1e-2)
    each = reference.gradients(loss, params, {}, x)
    np.testing.assert_allclose(lengths(loss, params, {}, x), reference.norms(each), rtol=1e-2)
    assert lengths(loss, params, {}, x).dtype == np.float32


def test_parameters_of_bfloat16() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    x = normal(B, 7, 6).astype(jnp.bfloat16)
    compare(lambda p, s, x: net(p, s, x).astype(jnp.float32), params, jnp.bfloat16(1), x, 2e-2)


def test_one_example() -> None:
    for loss in (net, table, convolved):
        compare(loss, PARAMS, jnp.float32(1), normal(1, 4, 6))


def test_without_jit() -> None:
    x = normal(B, 4, 6)
    found = ghost.factors(net, PARAMS, jnp.float32(1), x)
    wanted = lengths(net, PARAMS, jnp.float32(1), x)
    np.testing.assert_allclose(ghost.norms(found), wanted, rtol=1e-6)
    np.testing.assert_allclose(np.diagonal(ghost.products(found, found)), wanted**2, rtol=1e-5)


def test_numpy_arrays_and_numbers() -> None:
    params = {**jax.tree.map(np.asarray, PARAMS), "g": 2.0}
    compare(lambda p, s, x: p["g"] * net(p, s, x), params, 1.5, np.asarray(normal(B, 4, 6)))


def test_a_factor_that_is_a_hyperparameter() -> None:
    """Known when it runs only, and shared: the weight is factored all the same."""

    def loss(p: Any, shared: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(x @ (p["w"] * shared["gain"] / shared["width"])))

    params, x = {"w": PARAMS["w"]}, normal(B, 4, 6)
    shared = {"gain": jnp.float32(1.7), "width": jnp.float32(-3)}
    compare(loss, params, shared, x)
    each = jax.eval_shape(lambda s: ghost.factors(loss, params, s, x), shared)
    assert set(each.parts) == {"w"}
    several = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), shared)  # of two replicas
    run = jax.vmap(lambda s: ghost.norms(ghost.factors(loss, params, s, x)))
    alone = [lengths(loss, params, jax.tree.map(lambda v: v[i], several), x) for i in (0, 1)]  # noqa: B023
    np.testing.assert_allclose(run(several), alone, rtol=1e-6)


@pytest.mark.parametrize("only", ["", "w", "b"])
def test_a_loss_of_the_parameters_alone(only: str) -> None:
    def decay(p: Any, _: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(p["w"] ** 2) + p["b"][0]

    def first(p: Any, _: Any, x: jax.Array) -> jax.Array:
        return p["b"].sum() + p["w"][0, 0]

    for loss in (decay, first):
        each = reference.gradients(
            loss, PARAMS, {}, normal(B, 4, 6), chosen=lambda name: only in name
        )
        found = lengths(loss, PARAMS, {}, normal(B, 4, 6), only=only)
        np.testing.assert_allclose(found, reference.norms(each), rtol=1e-5)


def test_products_where_nothing_is_used() -> None:
    each = ghost.factors(net, PARAMS | {"z": normal(2)}, jnp.float32(1), normal(B, 4, 6), only="z")
    other = ghost.factors(net, PARAMS | {"z": normal(2)}, jnp.float32(1), normal(5, 4, 6), only="z")
    np.testing.assert_array_equal(ghost.norms(each), np.zeros(B))
    np.testing.assert_array_equal(ghost.products(each, other), np.zeros((B, 5)))


@pytest.mark.parametrize("sizes", [(1, 5), (4, 1)])
@pytest.mark.parametrize("positions", [(1, 1), (3, 3), (40, 3)])
@pytest.mark.parametrize("loss", [net, table])
def test_products_of_other_batches(loss: Any, sizes: Any, positions: Any) -> None:
    """Of other numbers of examples, and of positions."""
    xs = [normal(n, t, 6) for n, t in zip(sizes, positions, strict=True)]

    @reference.jit
    def run(xs: Any) -> jax.Array:
        one, other = (ghost.factors(loss, PARAMS, jnp.float32(1), x) for x in xs)
        return ghost.products(one, other)

    left, right = (reference.gradients(loss, PARAMS, jnp.float32(1), x) for x in xs)
    wanted, found = left @ right.T, run(xs)
    assert found.shape == sizes
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_complex_parameters_are_refused() -> None:
    loss = lambda p, s, x: jnp.abs(x @ p["w"]).sum()  # noqa: E731
    with pytest.raises(ValueError, match="parameters must be real, got 'w' of complex64"):
        ghost.factors(loss, {"w": jnp.ones(6, jnp.complex64)}, {}, normal(B, 6))
