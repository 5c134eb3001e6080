"""Losses: their values and gradients, to the last digits that float32 has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import elr as reference_elr
from references import losses as reference

from dynamics.losses import (
    at_label,
    cross_entropy,
    elr,
    elr_targets,
    generalised_cross_entropy,
    label_smoothing,
    squared_error,
    symmetric_cross_entropy,
)

FEW = settings(derandomize=True, deadline=None, max_examples=25)
LOSSES = {
    loss.__name__: jax.jit(loss)
    for loss in (
        *(cross_entropy, squared_error, label_smoothing),
        *(generalised_cross_entropy, symmetric_cross_entropy),
    )
}
each_loss = pytest.mark.parametrize("name", LOSSES)
B, K = 6, 5
logits = hnp.arrays(np.float32, (B, K), elements=st.floats(-30, 30, width=32))
labels = hnp.arrays(np.int32, B, elements=st.integers(0, K - 1))


def expected(name, z, y):
    return np.array([getattr(reference, name)(row, k) for row, k in zip(z, y, strict=True)])


@functools.cache
def gradients(name):
    return jax.jit(jax.grad(lambda z, y: LOSSES[name](z, y).sum()))


def gradient(name, z, y):
    return np.asarray(gradients(name)(jnp.asarray(z), jnp.asarray(y)))


@each_loss
@FEW
@given(z=logits, y=labels)
def test_against_float64(name, z, y):
    found = LOSSES[name](jnp.asarray(z), jnp.asarray(y))
    assert found.dtype == jnp.float32
    atol = 1e-6 if name == "squared_error" else 30 * 2**-23  # of logits up to 30
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


def test_a_constant_added_to_all_logits_changes_nothing():
    """The sums are exact here, so no digit need be lost."""
    rows = np.array([[0, 1, -2], [3, 3, 3], [-1, 2, 0.5]], np.float32)
    shifts = np.float32([0, 1024, -4096, 2**20])
    z = (rows + shifts[:, None, None]).reshape(-1, 3)
    y = np.tile(np.arange(3, dtype=np.int32), len(shifts))
    rows = np.tile(rows, (len(shifts), 1))
    np.testing.assert_array_equal(z - np.repeat(shifts, 3)[:, None], rows)
    wanted = expected("cross_entropy", rows, y)
    np.testing.assert_allclose(LOSSES["cross_entropy"](z, y), wanted, rtol=1e-5)
    wanted = np.stack([reference.error(row, k) for row, k in zip(rows, y, strict=True)])
    np.testing.assert_allclose(gradient("cross_entropy", z, y), wanted, rtol=1e-5)


def test_easy_examples_keep_their_digits():
    """p_y = 1 - 9e-3 ... 1 - 1e-26: the loss, and the gradient also at the label."""
    z = np.array([[gap, 0, -1] for gap in (5, 8, 12, 15, 17, 21, 60)], np.float32)
    y = np.zeros(len(z), np.int32)
    wanted = np.stack([reference.error(row, 0) for row in z])
    np.testing.assert_allclose(gradient("cross_entropy", z, y), wanted, rtol=1e-5)
    wanted = expected("cross_entropy", z, y)
    np.testing.assert_allclose(LOSSES["cross_entropy"](z, y), wanted, rtol=1e-5)


def test_hard_examples_are_finite():
    z, y = jnp.array([[0.0, 1e4], [-1e30, 1e30], [0.0, 3e38]]), jnp.zeros(3, jnp.int32)
    np.testing.assert_allclose(LOSSES["cross_entropy"](z, y), [1e4, 2e30, 3e38], rtol=1e-6)
    np.testing.assert_array_equal(gradient("cross_entropy", z, y), [[-1, 1]] * 3)


def test_excluded_classes():
    """-inf at other classes excludes them; at the label the loss is infinite, which is seen."""
    inf = np.inf
    z = np.array([[1, -inf, 0], [1, -inf, -inf], [-inf, -inf, 2]], np.float32)
    y = np.array([0, 0, 2], np.int32)
    found = LOSSES["cross_entropy"](z, y)
    np.testing.assert_allclose(found, [np.log1p(np.exp(-1.0)), 0, 0], rtol=1e-5)
    p = 1 / (1 + np.exp(1.0))
    np.testing.assert_allclose(
        gradient("cross_entropy", z, y), [[-p, 0, p], [0, 0, 0], [0, 0, 0]], rtol=1e-5
    )
    lost = np.array([[-inf, 0, 0], [-inf, -inf, 0], [-inf, 5, -inf]], np.float32)
    np.testing.assert_array_equal(LOSSES["cross_entropy"](lost, np.zeros(3, np.int32)), inf)


def test_the_gradient_of_an_infinite_loss_is_still_the_error():
    """The label is excluded, or further away than float32 can say."""
    inf = np.inf
    z = np.array([[-inf, 0, 0], [-inf, 3, -inf], [-3e38, 3e38, 0]], np.float32)
    found = gradient("cross_entropy", z, np.zeros(3, np.int32))
    np.testing.assert_allclose(found, [[-1, 0.5, 0.5], [-1, 1, 0], [-1, 1, 0]], rtol=1e-6)


@each_loss
def test_a_broken_logit_is_not_hidden(name):
    """The step freezes a replica by its loss: it must not be finite."""
    nan, inf = np.nan, np.inf
    z = np.array([[nan, 0], [0, nan], [inf, 0], [0, inf]], np.float32)
    assert not np.isfinite(LOSSES[name](z, np.zeros(4, np.int32))).any()


def test_closed_forms():
    y = jnp.array([0, 3])
    np.testing.assert_allclose(
        LOSSES["cross_entropy"](jnp.zeros((2, 10)), y), np.log(10), rtol=1e-6
    )
    np.testing.assert_allclose(LOSSES["squared_error"](jnp.zeros((2, 10)), y), 0.5, rtol=1e-6)
    onehot = jax.nn.one_hot(y, 10)
    np.testing.assert_array_equal(LOSSES["squared_error"](onehot, y), 0)


@each_loss
def test_one_output_is_no_classifier(name):
    with pytest.raises(ValueError, match="an output for each class"):
        LOSSES[name](np.zeros((2, 1), np.float32), np.zeros(2, np.int32))


@each_loss
def test_axes_before_the_classes_are_free(name):
    z = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 4, (2, 3)).astype(np.int32)
    found = LOSSES[name](jnp.asarray(z), jnp.asarray(y))
    assert found.shape == (2, 3)
    np.testing.assert_allclose(found.ravel(), expected(name, z.reshape(6, 4), y.ravel()), rtol=1e-5)


def test_at_label_is_a_onehot():
    y = jnp.array([[2, 0], [1, 1]])
    mine = at_label(jnp.zeros((2, 2, 3)), y)
    np.testing.assert_array_equal(mine, np.eye(3, dtype=bool)[np.asarray(y)])
    assert mine.dtype == bool


# ---- losses for wrong labels --------------------------------------------------------------------


@FEW
@given(z=logits, y=labels)
def test_generalised_cross_entropy_lies_between_its_ends(z, y):
    """q -> 0 is the cross-entropy, q = 1 the probability of another class."""
    z, y = jnp.asarray(z), jnp.asarray(y)
    near = generalised_cross_entropy(z, y, q=1e-3)
    full = cross_entropy(z, y)
    np.testing.assert_allclose(near, full * (1 - 0.5e-3 * full), rtol=1e-3, atol=1e-5)
    wrong = 1 - jax.nn.softmax(z)[jnp.arange(B), y]
    np.testing.assert_allclose(generalised_cross_entropy(z, y, q=1.0), wrong, atol=1e-6)


@FEW
@given(z=logits, y=labels)
def test_losses_for_wrong_labels_are_bounded_where_cross_entropy_is_not(z, y):
    z, y = jnp.asarray(z), jnp.asarray(y)
    assert (generalised_cross_entropy(z, y) <= 1 / 0.7 + 1e-6).all()
    reverse = symmetric_cross_entropy(z, y, forward=0.0)
    assert ((reverse >= 0) & (reverse <= 4 + 1e-5)).all()


def test_label_smoothing_is_least_at_the_smoothed_target():
    target = jnp.log(jnp.array([[0.9 + 0.02, 0.02, 0.02, 0.02, 0.02]]))
    y = jnp.array([0])
    slope = jax.grad(lambda z: label_smoothing(z, y).sum())(target)
    np.testing.assert_allclose(slope, 0, atol=1e-7)


# ---- early-learning regularization -------------------------------------------------------------


def drawn(classes, n=7, dtype=np.float32):
    """Logits, and targets of examples visited some times."""
    generator = np.random.default_rng(classes)
    z = generator.normal(0, 1, (n, classes)).astype(dtype)
    t = generator.dirichlet(np.ones(classes), n) * generator.uniform(0.2, 1, (n, 1))
    return jnp.asarray(z), jnp.asarray(t.astype(dtype))


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
@pytest.mark.parametrize(("wide", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_elr_has_the_gradient_of_lemma_2(classes, wide, tolerance):
    with jax.enable_x64(wide):
        z, t = drawn(classes, dtype=np.float64 if wide else np.float32)
        found = np.asarray(jax.grad(lambda z: elr(z, t).sum())(z))
    z, t = np.asarray(z), np.asarray(t)
    expected = [reference_elr.gradient(row, target) for row, target in zip(z, t, strict=True)]
    if classes == 100:  # some probabilities are below the clip, where the term is constant
        inside = np.array([reference_elr.softmax(row) > 1e-4 for row in z])
        assert inside.all()
    np.testing.assert_allclose(found, expected, atol=tolerance)
    np.testing.assert_allclose(found.sum(axis=1), 0, atol=tolerance)


@pytest.mark.parametrize("beta", [0.0, 0.7, 0.99])
def test_elr_targets_move_as_the_algorithm_says(beta):
    z, _ = drawn(10)
    memory, t = {}, jnp.zeros_like(z)
    for k in range(4):
        t = elr_targets(z * (k + 1), t, beta)
        expected = [reference_elr.visit(memory, i, row * (k + 1), beta) for i, row in enumerate(z)]
        np.testing.assert_allclose(t, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(t.sum(axis=1), 1 - beta ** (k + 1), rtol=1e-5, atol=1e-7)
        terms = [reference_elr.term(row, memory[i]) for i, row in enumerate(z)]
        np.testing.assert_allclose(elr(z, t), terms, rtol=1e-4)


def test_elr_targets_are_held_constant():
    """The stop-gradient of lemma 2: accuracy does not show it, only the gradient does."""
    z, before = drawn(10)
    p = lambda z: jax.nn.softmax(z, axis=-1)  # noqa: E731
    held = jax.grad(lambda z: elr(z, elr_targets(z, before, 0.7)).sum())(z)
    free = jax.grad(lambda z: elr(z, 0.7 * before + 0.3 * p(z)).sum())(z)
    t = np.asarray(elr_targets(z, before, 0.7))
    expected = [reference_elr.gradient(row, target) for row, target in zip(z, t, strict=True)]
    np.testing.assert_allclose(held, expected, atol=1e-5)
    assert np.linalg.norm(held - free) > 0.1 * np.linalg.norm(held)


@pytest.mark.parametrize(
    ("classes", "floor"), [(2, -8.5173), (10, -6.9087), (100, -4.6150), (1000, -2.3978)]
)
def test_elr_ends_at_its_floor(classes, floor):
    z = jnp.zeros((1, classes)).at[0, 1].set(200.0)
    t = elr_targets(z, jnp.zeros_like(z), 0.0)
    assert abs(float(elr(z, t)[0]) - floor) < 1e-3
    assert not np.asarray(jax.grad(lambda z: elr(z, t).sum())(z)).any()  # all are clipped
    assert elr(z.astype(jnp.bfloat16), t).dtype == jnp.float32  # where 1 - 1e-4 is not 1
    assert np.isfinite(elr(z.astype(jnp.bfloat16), t)).all()


def test_elr_does_not_vanish_where_the_network_is_sure():
    """-> -1/2 at the class it is sure of, while the gradient of the cross-entropy vanishes."""
    with jax.enable_x64(True):
        p = jnp.array([[1 - 9 * 1.2e-4] + [1.2e-4] * 9])
        gradient = jax.grad(lambda z: elr(z, p).sum())(jnp.log(p))
    assert abs(float(gradient[0, 0]) + 0.5) < 2e-3
