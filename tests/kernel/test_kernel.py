"""The tangent kernel: closed forms, explicit Jacobians; and how fast it turns."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import ghost as reference

from dynamics import models, step, task
from dynamics.kernel import ntk, velocity
from dynamics.types import Batch

B, K = 5, 3
GENERATOR = np.random.default_rng(0)
CONFIGS: dict[str, Any] = {
    "linear": models.Linear(),
    "linear, no bias": models.Linear(bias=False),
    "mlp": models.MLP(width=6, depth=2),
    "convnet": models.Convnet(channels=(3, 4), norm="batch"),
    "convnet, few channels": models.Convnet(channels=(2,), bias=False),
    "gru": models.RNN(width=4, cell="gru"),
}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


BATCH = Batch(x=normal(B, 4, 4), y=jnp.zeros(B, jnp.int32), index=jnp.arange(B))


@functools.cache
def made(name: str) -> Any:
    net = task.classification(models.make(CONFIGS[name], K), (4, 4))
    moved = lambda x: 1 + 0.3 * normal(*x.shape) if x.ndim < 2 else normal(*x.shape) / 2  # noqa: E731
    params, extras = jax.tree.map(moved, jax.eval_shape(net.init, jax.random.key(0), {}))
    return net, step.given(params, jax.tree.map(jnp.abs, extras))


@functools.cache
def kernel(name: str) -> np.ndarray:
    net, state = made(name)
    return np.asarray(reference.jit(functools.partial(ntk, net))(state, BATCH))


@functools.cache
def jacobian(name: str) -> np.ndarray:
    """[b k, P] in float64 of float32 derivatives."""
    net, state = made(name)

    def logits(params: Any) -> jax.Array:
        return net.evaluate(params, state.extras, BATCH, {}).logits.reshape(-1)

    found = jax.tree.leaves(reference.jit(jax.jacrev(logits))(state.params))
    return np.concatenate([np.asarray(j, np.float64).reshape(B * K, -1) for j in found], axis=1)


@pytest.mark.parametrize(("name", "one"), [("linear", 1), ("linear, no bias", 0)])
def test_of_a_linear_model(name: str, one: int) -> None:
    """E10: (<x, x'> + 1) kron I, whatever the weights."""
    x = np.asarray(BATCH.x, np.float64).reshape(B, -1)
    wanted = np.einsum("ij,kl->ikjl", x @ x.T + one, np.eye(K))
    np.testing.assert_allclose(kernel(name), wanted, rtol=1e-6, atol=1e-6)
    apart = ~np.eye(K, dtype=bool)
    np.testing.assert_array_equal(kernel(name).transpose(0, 2, 1, 3)[:, :, apart], 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_jacobian(name: str) -> None:
    wanted = jacobian(name) @ jacobian(name).T
    found = kernel(name)
    assert found.shape == (B, K, B, K) and found.dtype == np.float32
    flat = found.reshape(B * K, B * K)
    np.testing.assert_allclose(flat, wanted, rtol=1e-5, atol=1e-6 * wanted.max())
    np.testing.assert_allclose(flat, flat.T, rtol=1e-6, atol=1e-7 * wanted.max())
    assert np.linalg.eigvalsh(flat.astype(np.float64)).min() >= -1e-6 * wanted.max()


def test_examples_in_another_order() -> None:
    net, state = made("mlp")
    order = np.array([3, 0, 4])
    some = jax.tree.map(lambda x: x[order], BATCH)
    found = reference.jit(functools.partial(ntk, net))(state, some)
    np.testing.assert_allclose(found, kernel("mlp")[order][:, :, order], rtol=1e-5, atol=1e-5)


def test_it_does_not_read_labels() -> None:
    net, state = made("mlp")
    other = BATCH.replace(y=BATCH.y + 1)
    found = reference.jit(functools.partial(ntk, net))(state, other)
    np.testing.assert_array_equal(found, kernel("mlp"))


def test_refusals() -> None:
    config = models.Transformer(width=4, depth=1, num_heads=2, max_length=4)
    net = task.classification(models.make(config, K), (4,), input_dtype=jnp.int32)
    state = step.given(*net.init(jax.random.key(0), {}))
    tokens = BATCH.replace(x=jnp.zeros((B, 4), jnp.int32), y=jnp.zeros((B, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"logits \[b, classes\], got \[5, 4, 3\]"):
        ntk(net, state, tokens)

    coupled = task.of_function(lambda p, x: x.reshape(len(x), -1) @ p - x.mean())
    with pytest.raises(ValueError, match="must not depend on each other"):
        ntk(coupled, step.given(jnp.ones((16, K))), BATCH)


# ---- velocity ----


def random(*shape: int) -> np.ndarray:
    j = GENERATOR.normal(size=(*shape[:1], 40)).astype(np.float32)
    return j @ j.T


def test_velocity_is_one_minus_the_cosine() -> None:
    a, b = random(12), random(12)
    wanted = 1 - (a * b).sum(dtype=float) / (
        np.linalg.norm(a.astype(float)) * np.linalg.norm(b.astype(float))
    )
    np.testing.assert_allclose(velocity(jnp.asarray(a), jnp.asarray(b)), wanted, rtol=1e-5)
    np.testing.assert_allclose(velocity(jnp.asarray(b), jnp.asarray(a)), wanted, rtol=1e-5)


@pytest.mark.parametrize("factor", [7, 1e-30, 1e30, 1 / 3])
def test_velocity_does_not_see_scale(factor: float) -> None:
    """E10: and never is negative."""
    for size in (1, 3, 50):
        k = jnp.asarray(random(size))
        found = float(velocity(k, k * np.float32(factor)))
        assert 0 <= found <= 1e-6
    assert float(velocity(k, k)) == 0


def test_small_velocities_keep_their_digits() -> None:
    """1 - cos of 1e-8 would be 0 in float32."""
    k = np.zeros((2, 2), np.float32)
    k[0, 0] = 1
    turned = k.copy()
    turned[1, 1] = 1e-4
    found = velocity(jnp.asarray(k), jnp.asarray(turned))
    np.testing.assert_allclose(found, 1 - 1 / np.sqrt(1 + 1e-8), rtol=1e-5)


def test_velocity_of_kernels_that_share_nothing() -> None:
    a, b = jnp.diag(jnp.array([1.0, 0, 2])), jnp.diag(jnp.array([0.0, 3, 0]))
    np.testing.assert_allclose(velocity(a, b), 1, rtol=1e-6)
    assert np.isnan(velocity(a, 0 * a)) and np.isnan(velocity(0 * a, a))


def test_the_kernel_of_a_linear_model_does_not_turn() -> None:
    """E10: between any two weights."""
    net, state = made("linear")
    other = state.replace(params=jax.tree.map(lambda x: 5 * normal(*x.shape), state.params))
    run = reference.jit(functools.partial(ntk, net))
    assert float(velocity(jnp.asarray(kernel("linear")), run(other, BATCH))) == 0
    net, state = made("mlp")
    other = state.replace(params=jax.tree.map(lambda x: 5 * normal(*x.shape), state.params))
    found = reference.jit(functools.partial(ntk, net))(other, BATCH)
    assert 1e-3 < float(velocity(jnp.asarray(kernel("mlp")), found)) < 1
