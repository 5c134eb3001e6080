"""VoG: gradients of inputs, their moments, and both ways to normalise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from references import vog as reference

from dynamics import models, optim, scores, step, task
from dynamics.scores.vog import welford
from dynamics.statistics import spearman
from dynamics.types import Batch

FEW = settings(derandomize=True, deadline=None, max_examples=30)
K = 4
DATA = tiny.images(n=12, size=4)
N = len(DATA)
X = (DATA.x.astype(np.float32) - DATA.mean) / DATA.std
BATCH = Batch(x=jnp.asarray(X), y=jnp.asarray(DATA.y), index=jnp.arange(N))
CONFIGS = {
    "linear": models.Linear(),
    "mlp": models.MLP(width=5, depth=1, activation="tanh"),
    "convnet": models.Convnet(channels=(3,), norm="batch"),
    "dropout": models.MLP(width=5, depth=1, dropout=0.5),
}
TARGETS = ("logit", "probability")
REDUCES = ("variance", "std")
each_target = pytest.mark.parametrize("target", TARGETS)
# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def made(name: str, seed: int = 0) -> Any:
    """A task and a state whose batch statistics are not at their start."""
    net = task.of_dataset(models.make(CONFIGS[name], K), DATA)
    optimizer = optim.SGD().make(1)
    state = jit(lambda key: step.init(net, optimizer, key, {}))(jax.random.key(seed))
    return net, state.replace(extras=jax.tree.map(lambda x: x + 0.3, state.extras))


@functools.cache
def compiled(net: Any, target: str) -> Any:
    return jit(functools.partial(scores.input_gradient, net, target=target))


def gradient(name: str, target: str, batch: Batch = BATCH, seed: int = 0) -> np.ndarray:
    net, state = made(name, seed)
    return np.asarray(compiled(net, target)(state, batch))


# ---- gradients of inputs ------------------------------------------------------------------------


@each_target
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_each_example_alone(name: str, target: Any) -> None:
    found = gradient(name, target)
    assert found.shape == BATCH.x.shape and found.dtype == np.float32
    wanted = reference.gradients(*made(name), BATCH, target)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_gradients_of_a_linear_model() -> None:
    """Of the logit: the label's column of W. Of p_y: p_y (W_y - sum_k p_k W_k)."""
    net, state = made("linear")
    w = np.asarray(state.params["head"]["kernel"], np.float64).T.reshape(K, 4, 4)
    np.testing.assert_array_equal(gradient("linear", "logit"), w.astype(np.float32)[DATA.y])
    z = np.asarray(net.evaluate(state.params, {}, BATCH, {}).logits, np.float64)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    mean = np.einsum("nk,kij->nij", p, w)
    wanted = p[np.arange(N), DATA.y][:, None, None] * (w[DATA.y] - mean)
    np.testing.assert_allclose(gradient("linear", "probability"), wanted, rtol=1e-4, atol=1e-6)


@each_target
@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_no_example_changes_anothers_gradient(name: str, target: Any) -> None:
    before = gradient(name, target)
    changed = BATCH.replace(x=BATCH.x.at[3].set(5.0), y=BATCH.y.at[3].set((DATA.y[3] + 1) % K))
    after = gradient(name, target, changed)
    others = np.arange(N) != 3
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(before[3] - after[3]).max() > 0


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    net, state = made("linear")
    head = state.params["head"]
    moved = state.replace(params={"head": head | {"bias": head["bias"] + 64}})
    for target in TARGETS:
        after = compiled(net, target)(moved, BATCH)
        np.testing.assert_allclose(gradient("linear", target), after, rtol=1e-4, atol=64 * 2**-22)


def test_over_a_dataset() -> None:
    """The order is the dataset's; batches are padded and cut."""
    net, state = made("mlp")
    whole = gradient("mlp", "logit")
    for size in (5, N):
        found = scores.over_examples(scores.input_gradient, net, state, DATA, batch_size=size)
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_what_has_no_gradient_is_refused() -> None:
    net, state = made("mlp")
    tokens = BATCH.replace(x=jnp.zeros((N, 4), jnp.int32))
    with pytest.raises(ValueError, match="needs inputs that are numbers, got int32"):
        scores.input_gradient(net, state, tokens)
    several = BATCH.replace(y=jnp.zeros((N, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"needs one label an example, got labels \(12, 3\)"):
        scores.input_gradient(net, state, several)


# ---- moments and their mean ---------------------------------------------------------------------


def moments(xs: np.ndarray) -> Any:
    mean, m2 = jnp.zeros(xs.shape[1:]), jnp.zeros(xs.shape[1:])
    for t, x in enumerate(xs):
        mean, m2 = welford(jnp.int32(t + 1), mean, m2, jnp.asarray(x))
        assert t or not np.asarray(m2).any()  # exactly 0 after the first
    return np.asarray(mean), np.asarray(m2)


@FEW
@given(
    xs=hnp.arrays(np.float32, (7, 3, 2), elements=st.floats(-4, 4, width=32)),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_welford_against_numpy(xs: np.ndarray, offset: float) -> None:
    xs = xs + np.float32(offset)  # the naive sum of squares would keep 3 digits of a variance of 1
    mean, m2 = moments(xs)
    wide = xs.astype(np.float64)
    atol = 4 * (4 + offset) * 2**-23  # of a mean, and so of a deviation
    np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=1e-5, atol=atol)
    spread = np.sqrt(7 * wide.var(axis=0) * 7)
    error = np.abs(m2 - 7 * wide.var(axis=0))
    assert (error <= 1e-5 * m2 + atol * (spread + atol)).all() and (m2 >= 0).all()


@pytest.mark.parametrize("reduce", REDUCES)
def test_vog_against_the_gradients_themselves(reduce: Any) -> None:
    xs = np.random.default_rng(0).normal(0, 2, (5, N, 4, 4)).astype(np.float32)
    _, m2 = moments(xs)
    found = scores.vog(jnp.asarray(m2), jnp.int32(5), reduce=reduce)
    assert found.shape == (N,)
    np.testing.assert_allclose(found, reference.vog(xs, reduce), rtol=1e-5)


def test_the_papers_formula_ranks_as_the_variance() -> None:
    """1 / sqrt(C) sum of squares is sqrt(C) times the variance: normalised, it is the same."""
    xs = np.random.default_rng(0).normal(0, 2, (5, N, 3)).astype(np.float32)
    xs *= np.random.default_rng(1).lognormal(0, 1, (1, N, 3)).astype(np.float32)
    _, m2 = moments(xs)
    paper = (((xs - xs.mean(axis=0)) ** 2).sum(axis=0) / np.sqrt(5)).mean(axis=1)
    v, std = (np.asarray(scores.vog(jnp.asarray(m2), jnp.int32(5), reduce=r)) for r in REDUCES)
    np.testing.assert_allclose(paper, np.sqrt(5) * v, rtol=1e-5)
    a, b = (scores.class_normalised(x, DATA.y) for x in (paper, v))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert spearman(v, std) < 1 - 1e-6  # the root ranks otherwise


# ---- normalised ---------------------------------------------------------------------------------


@FEW
@given(v=hnp.arrays(np.float32, 20, elements=st.floats(0, 8, width=16)), seed=st.integers(0, 99))
def test_normalised_against_numpy(v: np.ndarray, seed: int) -> None:
    y = np.random.default_rng(seed).integers(0, 3, 20)
    found = scores.class_normalised(v, y)
    assert found.dtype == v.dtype
    np.testing.assert_allclose(found, reference.class_normalised(v, y), rtol=1e-4, atol=1e-5)
    alike = np.zeros(20, int)
    np.testing.assert_array_equal(scores.dataset_normalised(v), scores.class_normalised(v, alike))
    order = np.random.default_rng(seed).permutation(20)
    np.testing.assert_allclose(
        scores.class_normalised(v[order], y[order]), found[order], rtol=1e-4, atol=1e-5
    )


def test_each_row_is_normalised_by_itself() -> None:
    v = np.random.default_rng(0).normal(0, 1, (2, 3, 20)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 3, (2, 3, 20))
    for labels in (y, y[0, 0]):
        found = scores.class_normalised(v, labels)
        for at in np.ndindex(2, 3):
            own = np.broadcast_to(labels, v.shape)[at]
            np.testing.assert_array_equal(found[at], scores.class_normalised(v[at], own))
    each = scores.dataset_normalised(v)
    np.testing.assert_allclose(each.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(each.std(axis=-1), 1, rtol=1e-5)


def test_values_that_are_equal_are_0_not_nan() -> None:
    y = np.array([0] * 7 + [1] * 2 + [2, 3])
    for dtype in (np.float32, np.float64):
        v = np.array([0.1] * 7 + [0, 0] + [3, 4], dtype)  # the mean of seven 0.1 is not 0.1
        v[3] = np.nextafter(v[3], dtype(1))  # nor is a value in its last digit
        np.testing.assert_array_equal(scores.class_normalised(v, y), np.zeros(11))
        np.testing.assert_array_equal(scores.dataset_normalised(v[:7]), np.zeros(7))
    apart = np.array([1, 1 + 1e-5], np.float32)  # what differs in more digits is not equal
    np.testing.assert_allclose(scores.dataset_normalised(apart), [-1, 1], rtol=1e-6)


def test_vog_of_a_linear_model_depends_on_the_class_alone() -> None:
    """E12: the gradient is the label's column of W; normalised by class it is 0 / 0, which is 0."""
    xs = np.stack([gradient("linear", "logit", seed=seed) for seed in range(3)])
    _, m2 = moments(xs)
    for reduce in REDUCES:
        v = np.asarray(scores.vog(jnp.asarray(m2), jnp.int32(3), reduce=reduce))
        for label in range(K):
            assert len(set(v[DATA.y == label])) == 1
        assert len(set(v)) == K
        np.testing.assert_array_equal(scores.class_normalised(v, DATA.y), np.zeros(N))
        assert np.abs(scores.dataset_normalised(v)).max() > 0.5


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_options_are_checked(unchecked: Any) -> None:
    net, state = made("mlp")
    with pytest.raises(ValueError, match="target must be 'logit' or 'probability', got 'odds'"):
        scores.input_gradient(net, state, BATCH, target="odds")  # pyright: ignore
    with pytest.raises(ValueError, match="reduce must be 'variance' or 'std', got 'max'"):
        scores.vog(jnp.zeros((3, 2)), jnp.int32(1), reduce="max")  # pyright: ignore
