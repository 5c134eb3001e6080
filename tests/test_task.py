"""Tasks: what training and evaluation mode may and may not do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from references import losses as reference

from dynamics import fit, losses, mesh, models, task
from dynamics.types import Batch, Dataset

GENERATOR = np.random.default_rng(0)
X = GENERATOR.normal(2, 3, (6, 4, 4, 1)).astype(np.float32)
Y = np.array([0, 1, 2, 0, 1, 2], np.int32)
BATCH = Batch(x=jnp.asarray(X), y=jnp.asarray(Y), index=jnp.array([9, 3, 5, 0, 1, 2]))
KEY = jax.random.key(7)
# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Tokens(nn.Module):
    """Logits [B, T, 5] of tokens, by a table."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        return nn.Embed(5, 5)(x)


def made(net: Any, **options: Any) -> Any:
    found = task.classification(models.make(net, 3), X.shape[1:], **options)
    return found, *jit(found.init)(KEY, {})


@pytest.fixture(scope="module")
def normed() -> Any:
    """A convnet with batch norm."""
    return made(models.Convnet(channels=(3,), norm="batch"))


# ---- without extras -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "squared_error"])
def test_the_loss_is_the_mean_of_the_examples(name: str) -> None:
    net, params, extras = made(models.MLP(width=3, depth=1), loss=getattr(losses, name))
    assert extras == {}
    loss, (after, aux) = jit(net.loss)(params, extras, BATCH, KEY, {})
    assert after == {} and aux.loss.shape == (6,) and aux.logits.shape == (6, 3)
    wanted = [
        getattr(reference, name)(z, y) for z, y in zip(np.asarray(aux.logits), Y, strict=True)
    ]
    np.testing.assert_allclose(aux.loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)
    np.testing.assert_array_equal(aux.y, Y)
    np.testing.assert_array_equal(aux.index, BATCH.index)
    assert aux.scalars == {}
    seen = jit(net.evaluate)(params, extras, BATCH, {})
    np.testing.assert_allclose(seen.loss, aux.loss, rtol=1e-6)


def test_the_key_alone_determines_the_start() -> None:
    a, b, c = (
        jax.tree.leaves(jit(made(models.MLP(width=3))[0].init)(jax.random.key(s), {})[0])
        for s in (1, 1, 2)
    )
    for x, y, z in zip(a, b, c, strict=True):
        np.testing.assert_array_equal(x, y)
        assert not x.any() or (x != z).any()


def test_a_start_may_read_the_hyperparameters_of_its_replica() -> None:
    plain = task.of_function(lambda params, x: x.reshape(len(x), -1) @ params["w"])

    def init(key: Any, hyperparameters: Any) -> Any:
        return {"w": hyperparameters["scale"] * jax.random.normal(key, (16, 3))}, {}

    where, scales = mesh.make(), np.array([0.0, 1.0, 3.0])
    keys = jnp.repeat(KEY[None], 3)
    state = fit.init(plain._replace(init=init), optax.sgd(0.1), keys, {"scale": scales}, where)
    w = np.asarray(state.params["w"])
    assert w[1].any() and not w[0].any()
    np.testing.assert_allclose(w[2], 3 * w[1], rtol=1e-6)
    with pytest.raises(ValueError, match="needs init="):
        plain.init(KEY, {})


def test_dropout_is_random_in_training_only() -> None:
    net, params, extras = made(models.MLP(width=16, dropout=0.5))
    loss, evaluate = jit(net.loss), jit(net.evaluate)
    a, b, c = (loss(params, extras, BATCH, jax.random.key(s), {})[1][1].logits for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    np.testing.assert_array_equal(
        evaluate(params, extras, BATCH, {}).logits, evaluate(params, extras, BATCH, {}).logits
    )
    # the same example twice in a batch is dropped differently
    twin = BATCH.replace(x=jnp.broadcast_to(BATCH.x[:1], X.shape))
    logits = loss(params, extras, twin, KEY, {})[1][1].logits
    assert len(np.unique(np.asarray(logits), axis=0)) > 1


# ---- batch statistics ---------------------------------------------------------------------------


def test_training_normalises_by_the_batch_and_remembers(normed: Any) -> None:
    net, params, extras = normed
    loss, evaluate = jit(net.loss), jit(net.evaluate)
    (stats,) = extras["batch_stats"].values()
    np.testing.assert_array_equal(stats["mean"], 0)
    np.testing.assert_array_equal(stats["var"], 1)
    _, (after, aux) = loss(params, extras, BATCH, KEY, {})
    assert jax.tree.structure(after) == jax.tree.structure(extras)
    conv = jax.lax.conv_general_dilated(
        *(BATCH.x, params["conv_0"]["kernel"], (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    conv = np.asarray(conv, np.float64)
    (now,) = after["batch_stats"].values()
    np.testing.assert_allclose(now["mean"], 0.1 * conv.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(now["var"], 0.9 + 0.1 * conv.var((0, 1, 2)), rtol=1e-5)
    # training reads only the batch, evaluation only what is remembered
    moved = jax.tree.map(lambda v: v + 1, extras)
    np.testing.assert_array_equal(loss(params, moved, BATCH, KEY, {})[1][1].logits, aux.logits)
    before = evaluate(params, extras, BATCH, {}).logits
    assert np.abs(evaluate(params, moved, BATCH, {}).logits - before).max() > 1e-3
    assert np.abs(aux.logits - before).max() > 1e-3


@pytest.mark.parametrize("mode", ["evaluate", "train"])
def test_in_evaluation_no_example_depends_on_another(normed: Any, mode: str) -> None:
    net, params, extras = normed

    def losses_of(x: Any) -> Any:
        batch = BATCH.replace(x=x)
        if mode == "train":
            return net.loss(params, extras, batch, KEY, {})[1][1].loss
        return net.evaluate(params, extras, batch, {}).loss

    found = np.abs(np.asarray(jit(jax.jacrev(losses_of))(BATCH.x))).max(axis=(2, 3, 4))
    off = found[~np.eye(6, dtype=bool)]
    assert (np.diag(found) > 0).all()
    assert (off == 0).all() if mode == "evaluate" else (off > 0).any()  # the control


# ---- tokens -------------------------------------------------------------------------------------


def test_the_loss_of_a_sequence_is_the_mean_over_its_labels() -> None:
    x = GENERATOR.integers(0, 5, (4, 7)).astype(np.int32)
    y = GENERATOR.integers(0, 5, (4, 7)).astype(np.int32)
    net = task.classification(Tokens(), (7,), input_dtype=jnp.int32)
    params, extras = jit(net.init)(KEY, {})
    batch = Batch(x=jnp.asarray(x), y=jnp.asarray(y), index=jnp.arange(4))
    loss, (_, aux) = jit(net.loss)(params, extras, batch, KEY, {})
    table = np.asarray(params["Embed_0"]["embedding"])
    wanted = [
        np.mean([reference.cross_entropy(table[a], b) for a, b in zip(*row, strict=True)])
        for row in zip(x, y, strict=True)
    ]
    assert aux.loss.shape == (4,) and aux.logits.shape == (4, 7, 5)
    np.testing.assert_allclose(aux.loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-5)
    np.testing.assert_allclose(jit(net.evaluate)(params, extras, batch, {}).loss, wanted, rtol=1e-5)


def test_of_dataset_reads_the_shape_and_kind_of_the_inputs() -> None:
    nothing, one = np.zeros(0, np.float32), np.ones((1, 1, 1), np.float32)
    pictures = Dataset(x=X.astype(np.uint8), y=Y, mean=one, std=one)
    text = Dataset(x=np.zeros((6, 7), np.uint8), y=Y, mean=nothing, std=nothing)
    shapes = jax.eval_shape(
        task.of_dataset(models.make(models.MLP(width=3), 3), pictures).init, KEY, {}
    )
    assert shapes[0]["dense_0"]["kernel"].shape == (16, 3)
    jax.eval_shape(task.of_dataset(Tokens(), text).init, KEY, {})  # an Embed refuses floats


# ---- modules of other signatures ----------------------------------------------------------------


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x: Any, deterministic: bool = True) -> Any:
        return nn.Dropout(0.5)(nn.Dense(3)(x.reshape(len(x), -1)), deterministic=deterministic)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x: Any, *, use_running_average: bool) -> Any:
        h = nn.BatchNorm(use_running_average=use_running_average)(x.reshape(len(x), -1))
        return nn.Dense(3)(h)


class Both(nn.Module):
    @nn.compact
    def __call__(self, x: Any, training: bool, deterministic: bool) -> Any:
        assert training != deterministic
        return Deterministic()(x, deterministic)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x: Any, width: int = 3) -> Any:
        return nn.Dense(width)(x.reshape(len(x), -1))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x: Any, mask: Any, train: bool) -> Any:
        return nn.Dense(3)(x * mask)


@pytest.mark.parametrize(
    ("module", "noisy"),
    [
        (Deterministic(), True),
        (Both(), True),
        (Plain(), False),
        (nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(3)]), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_module_is_told_the_mode_by_the_name_it_has_for_it(module: Any, noisy: bool) -> None:
    net = task.classification(module, X.shape[1:])
    params, extras = net.init(KEY, {})
    calm = net.evaluate(params, extras, BATCH, {}).logits
    trained = net.loss(params, extras, BATCH, KEY, {})[1][1].logits
    (kernel, bias) = (
        np.asarray(next(x for x in jax.tree.leaves(params) if x.ndim == n)) for n in (2, 1)
    )
    np.testing.assert_allclose(calm, X.reshape(6, -1) @ kernel + bias, rtol=1e-4, atol=1e-5)
    assert np.array_equal(trained, calm) != noisy


def test_batch_norm_that_is_told_to_use_its_averages() -> None:
    net = task.classification(Normed(), X.shape[1:])
    params, extras = net.init(KEY, {})
    _, (after, aux) = net.loss(params, extras, BATCH, KEY, {})
    flat = X.reshape(6, -1)
    wanted = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    kernel = params["Dense_0"]["kernel"]
    np.testing.assert_allclose(aux.logits, wanted @ kernel, rtol=1e-3, atol=1e-3)
    still = net.evaluate(params, extras, BATCH, {}).logits  # averages of 0 and 1 at first
    np.testing.assert_allclose(still, flat / np.sqrt(1 + 1e-5) @ kernel, rtol=1e-4, atol=1e-4)
    mean = after["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.01 * flat.mean(0), rtol=1e-4)


def test_a_module_that_needs_more_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="Masked is called with 'mask', which a task has not"):
        task.classification(Masked(), X.shape[1:])


def test_a_module_of_equinox() -> None:
    """The block of docs/extending.md."""
    eqx = pytest.importorskip("equinox")
    made = eqx.nn.MLP(16, 3, 4, 1, key=KEY)
    params, rest = eqx.partition(made, eqx.is_inexact_array)
    net = task.of_function(lambda params, x: jax.vmap(eqx.combine(params, rest))(x.reshape(6, -1)))
    logits = net.evaluate(params, {}, BATCH, {}).logits
    np.testing.assert_allclose(logits, jax.vmap(made)(X.reshape(6, -1)), rtol=1e-5)
