"""Losses: their values and gradients, to the last digits that float32 has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import losses as reference

from dynamics.losses import at_label, cross_entropy, squared_error

FEW = settings(derandomize=True, deadline=None, max_examples=25)
LOSSES = {"cross_entropy": cross_entropy, "squared_error": squared_error}
each_loss = pytest.mark.parametrize("name", LOSSES)
B, K = 6, 5
logits = hnp.arrays(np.float32, (B, K), elements=st.floats(-30, 30, width=32))
labels = hnp.arrays(np.int32, B, elements=st.integers(0, K - 1))


def expected(name, z, y):
    return np.array([getattr(reference, name)(row, k) for row, k in zip(z, y, strict=True)])


def gradient(name, z, y):
    return jax.grad(lambda z: LOSSES[name](z, jnp.asarray(y)).sum())(jnp.asarray(z))


@each_loss
@FEW
@given(z=logits, y=labels)
def test_against_float64(name, z, y):
    found = LOSSES[name](jnp.asarray(z), jnp.asarray(y))
    assert found.dtype == jnp.float32
    atol = 30 * 2**-23 if name == "cross_entropy" else 1e-6  # of logits up to 30
    np.testing.assert_allclose(found, expected(name, z, y), rtol=1e-5, atol=atol)


@FEW
@given(z=logits, y=labels)
def test_gradient_of_cross_entropy_is_the_error(z, y):
    wanted = np.stack([reference.error(row, k) for row, k in zip(z, y, strict=True)])
    np.testing.assert_allclose(gradient("cross_entropy", z, y), wanted, rtol=1e-5, atol=1e-6)


@FEW
@given(z=logits, y=labels)
def test_gradient_of_squared_error_is_the_error(z, y):
    wanted = z - np.eye(K, dtype=np.float32)[y]
    np.testing.assert_allclose(gradient("squared_error", z, y), wanted, rtol=1e-5, atol=1e-6)


@each_loss
@FEW
@given(z=logits, y=labels, order=st.permutations(range(K)))
def test_classes_have_no_order(name, z, y, order):
    renamed = np.argsort(order)[y].astype(np.int32)
    before, after = (
        LOSSES[name](jnp.asarray(a), jnp.asarray(b)) for a, b in ((z, y), (z[:, order], renamed))
    )
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=4e-6)


SHIFTED = np.array([[0, 1, -2], [3, 3, 3], [-1, 2, 0.5]], np.float32)
Y = np.array([0, 1, 2], np.int32)


@pytest.mark.parametrize("shift", [0.0, 1024.0, -4096.0, 2.0**20])
def test_a_constant_added_to_all_logits_changes_nothing(shift):
    """The sums are exact here, so no digit need be lost."""
    z = SHIFTED + np.float32(shift)
    assert ((z - np.float32(shift)) == SHIFTED).all()
    wanted = expected("cross_entropy", SHIFTED, Y)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(z), jnp.asarray(Y)), wanted, rtol=1e-5)
    np.testing.assert_allclose(
        gradient("cross_entropy", z, Y), gradient("cross_entropy", SHIFTED, Y), rtol=1e-5
    )


@pytest.mark.parametrize("gap", [5.0, 12.0, 17.0, 21.0, 60.0])
def test_easy_examples_keep_their_digits(gap):
    """p_y = 1 - 7e-3 ... 1 - 1e-26: the loss, and the gradient also at the label."""
    z = np.array([[gap, 0.0, -1.0]], np.float32)
    y = np.zeros(1, np.int32)
    wanted, error = expected("cross_entropy", z, y), reference.error(z[0], 0)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(z), jnp.asarray(y)), wanted, rtol=1e-5)
    np.testing.assert_allclose(gradient("cross_entropy", z, y)[0], error, rtol=1e-5)


def test_hard_examples_are_finite():
    z, y = jnp.array([[0.0, 1e4], [-1e30, 1e30], [0.0, 3e38]]), jnp.zeros(3, jnp.int32)
    np.testing.assert_allclose(cross_entropy(z, y), [1e4, 2e30, 3e38], rtol=1e-6)
    np.testing.assert_array_equal(gradient("cross_entropy", z, y), [[-1, 1]] * 3)


def test_excluded_classes():
    """-inf at other classes excludes them; at the label the loss is infinite, which is seen."""
    inf = np.inf
    z = np.array([[1, -inf, 0], [1, -inf, -inf], [-inf, -inf, 2]], np.float32)
    y = np.array([0, 0, 2], np.int32)
    found = cross_entropy(jnp.asarray(z), jnp.asarray(y))
    np.testing.assert_allclose(found, [np.log1p(np.exp(-1.0)), 0, 0], rtol=1e-5)
    p = 1 / (1 + np.exp(1.0))
    np.testing.assert_allclose(
        gradient("cross_entropy", z, y), [[-p, 0, p], [0, 0, 0], [0, 0, 0]], rtol=1e-5
    )
    assert cross_entropy(jnp.array([[-inf, 0.0]]), jnp.zeros(1, jnp.int32))[0] == inf


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 1])
def test_a_broken_logit_is_not_hidden(bad, at):
    """The step freezes a replica by its loss: it must not be finite."""
    z = jnp.zeros((1, 3)).at[0, at].set(bad)
    for loss in LOSSES.values():
        assert not np.isfinite(loss(z, jnp.zeros(1, jnp.int32))[0])


def test_closed_forms():
    y = jnp.array([0, 3])
    np.testing.assert_allclose(cross_entropy(jnp.zeros((2, 10)), y), np.log(10), rtol=1e-6)
    np.testing.assert_allclose(squared_error(jnp.zeros((2, 10)), y), 0.5, rtol=1e-6)
    onehot = jax.nn.one_hot(y, 10)
    np.testing.assert_array_equal(squared_error(onehot, y), 0)
    np.testing.assert_array_equal(cross_entropy(jnp.zeros((2, 1)), jnp.zeros(2, jnp.int32)), 0)


@each_loss
def test_axes_before_the_classes_are_free(name):
    z = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 4, (2, 3)).astype(np.int32)
    found = LOSSES[name](jnp.asarray(z), jnp.asarray(y))
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found.ravel(), expected(name, z.reshape(6, 4), y.ravel()), rtol=1e-5)
    alone = LOSSES[name](jnp.asarray(z[1, 2]), jnp.asarray(y[1, 2]))
    np.testing.assert_allclose(alone, found[1, 2], rtol=1e-6)


def test_at_label_is_a_onehot():
    y = jnp.array([[2, 0], [1, 1]])
    mine = at_label(jnp.zeros((2, 2, 3)), y)
    np.testing.assert_array_equal(mine, np.eye(3, dtype=bool)[np.asarray(y)])
    assert mine.dtype == bool
