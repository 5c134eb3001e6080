"""The z-loss: its gradient, where it is nothing, what it leaves alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from references import transformer as reference

from dynamics import fit, mesh, task
from dynamics.types import Batch, Task

KEY = jax.random.key(0)


def of_logits() -> Task:
    """A task whose parameters are the logits of its batch."""
    return task.z_loss(task.of_function(lambda params, x: params))


def batch(logits: Any, weight: Any = None) -> Batch:
    n = len(logits)
    y = jnp.zeros(logits.shape[:-1], jnp.int32)
    return Batch(x=y, y=y, index=jnp.arange(n, dtype=jnp.int32), weight=weight)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5)])
def test_the_gradient_is_2_c_log_z_p(shape: Any) -> None:
    """In float64, beside the gradient of the cross-entropy, which is p - y."""
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(1, 3, shape))
        coefficient = 0.3
        net, places = of_logits(), np.prod(shape[:-1])

        def loss(logits: Any, c: Any) -> Any:
            return net.loss(logits, {}, batch(logits), KEY, {"z_loss": c})[0]

        gradient = jax.jit(jax.grad(loss))
        found, plain = (np.asarray(gradient(logits, c)) for c in (coefficient, 0.0))
        log_z = reference.log_z(np.asarray(logits))
        p = np.exp(np.asarray(logits) - log_z[..., None])
        wanted = 2 * coefficient * log_z[..., None] * p / places
        np.testing.assert_allclose(found - plain, wanted, rtol=1e-10, atol=1e-14)
        onehot = np.arange(5) == 0
        np.testing.assert_allclose(plain, (p - onehot) / places, rtol=1e-10, atol=1e-14)
        along = (found - plain).sum(axis=-1)  # a shift of all logits
        np.testing.assert_allclose(along, 2 * coefficient * log_z / places, rtol=1e-10)


def test_its_value_is_the_weighted_mean_of_squares() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 2, (4, 3, 5)), jnp.float32)
    weight = jnp.float32([0.0, 2.0, 1.0, 1.0])
    inner = task.of_function(lambda params, x: params)
    given = ({}, batch(logits, weight), KEY, {"z_loss": jnp.float32(0.25)})
    total, (_, aux) = of_logits().loss(logits, *given)
    plain, (_, before) = inner.loss(logits, *given)
    each = (reference.log_z(np.asarray(logits, np.float64)) ** 2).mean(axis=1)
    mean = (np.asarray(weight) * each).mean()
    np.testing.assert_allclose(aux.scalars["log_z_squared"], mean, rtol=1e-5)
    np.testing.assert_allclose(total, plain + 0.25 * mean, rtol=1e-5)
    np.testing.assert_array_equal(aux.loss, before.loss)
    other = task.z_loss(inner).evaluate(logits, {}, batch(logits), {})
    np.testing.assert_array_equal(other.loss, aux.loss)


def trained(net: Task, p: tiny.Problem, replicas: int, **scalars: Any) -> Any:
    keys = jnp.repeat(jax.random.split(jax.random.key(0), 1), replicas)
    state = fit.init(net, p.optimizer, keys, p.rule.hyperparameters() | scalars, mesh.make())
    stream = tiny.batches(p, replicas)
    return fit.fit(net, p.optimizer, state, stream, p.num_steps, mesh.make())


def test_0_is_the_inner_task_and_every_replica_has_its_own() -> None:
    p = tiny.problem("mlp", num_steps=10)
    plain = trained(p.task, p, 1)
    found = trained(task.z_loss(p.task), p, 2, z_loss=np.array([0.0, 0.3], np.float32))
    for x, y in zip(tiny.leaves(plain), tiny.leaves(found), strict=True):
        np.testing.assert_allclose(x[0], y[0], rtol=1e-5, atol=2e-6)
    squares = found.rows["log_z_squared"].to_numpy().reshape(-1, 2)
    assert squares[0, 0] == squares[0, 1] and squares[-1, 1] < 0.5 * squares[-1, 0]


def test_a_state_without_the_coefficient_is_refused() -> None:
    logits = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="'z_loss'"):
        of_logits().loss(logits, {}, batch(logits), KEY, {"learning_rate": 0.1})
