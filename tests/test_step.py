"""The one train step: what it computes, what it never touches, and when it stops."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamics import models, optim, step, task
from dynamics.types import INIT, LOSS, NEVER, Aux, Batch, Task

GENERATOR = np.random.default_rng(0)
T, B = 6, 8
X = GENERATOR.normal(size=(T, B, 4, 4, 1)).astype(np.float32)
Y = GENERATOR.integers(0, 3, (T, B)).astype(np.int32)
INDEX = np.stack([GENERATOR.permutation(100)[:B] for _ in range(T)]).astype(np.int32)
BATCHES = Batch(x=jnp.asarray(X), y=jnp.asarray(Y), index=jnp.asarray(INDEX))
KEY = jax.random.key(3)
H = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01}
SCALARS = {name: jnp.float32(value) for name, value in H.items()}
# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Run(NamedTuple):
    state: Any  # at the end
    states: Any  # after every step, leaves [T, ...]
    aux: Any
    metrics: Any


def net(config: Any) -> Task:
    return task.classification(models.make(config, 3), X.shape[2:])


def run(
    made: Task, optimizer: Any, batches: Any = BATCHES, *, key: Any = KEY, **options: Any
) -> Run:
    scalars = options.pop("scalars", H)
    many = any(np.ndim(v) for v in scalars.values())
    update = step.make(made, optimizer, **options)

    def replica(key: Any, scalars: Any) -> Any:
        def one(state: Any, batch: Any) -> Any:
            state, aux, metrics = update(state, batch)
            return state, (state, aux, metrics)

        state = step.init(made, optimizer, key, scalars)
        return jax.lax.scan(one, state, batches)

    scalars = {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()}
    fn = jax.vmap(replica) if many else replica
    state, (states, aux, metrics) = jit(fn)(key, scalars)
    return Run(state, states, aux, metrics)


def leaves(tree: Any) -> list[np.ndarray]:
    """On the host, keys as the integers they are."""
    found = jax.tree.leaves(tree)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in found]
    return [
        np.asarray(jax.random.key_data(x) if key else x) for x, key in zip(found, keys, strict=True)
    ]


def close(a: Any, b: Any, **tolerance: float) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def same(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


MLP = net(models.MLP(width=4, depth=1))
NORMED = net(models.Convnet(channels=(2,), norm="batch"))
DROPOUT = net(models.MLP(width=8, depth=1, dropout=0.5))
SGD = optim.make(optim.Train(), T)


@pytest.fixture(scope="module")
def plain() -> Run:
    return run(MLP, SGD)


@functools.cache
def normed(accumulate: int) -> Run:
    return run(NORMED, SGD, accumulate=accumulate)


# ---- what it computes ---------------------------------------------------------------------------


def test_the_state_before_the_first_step() -> None:
    state = step.init(MLP, SGD, KEY, SCALARS)
    params, extras = MLP.init(jax.random.fold_in(KEY, INIT))
    same(state.params, params)
    assert state.extras == extras == {} and state.hyperparameters == SCALARS
    assert state.hyperparameters is not SCALARS
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert state.diverged == NEVER and state.diverged.dtype == jnp.int32
    same(jax.random.key_data(state.key), jax.random.key_data(KEY))


def test_gradient_and_update_and_nothing_else(plain: Run) -> None:
    """The same run by hand, from the task and the optimizer alone."""

    @jax.jit
    def by_hand(params: Any, opt_state: Any, batch: Any) -> Any:
        (loss, (_, aux)), g = jax.value_and_grad(MLP.loss, has_aux=True)(params, {}, batch, KEY, H)
        updates, opt_state = SGD.update(g, opt_state, params, hyperparameters=H)
        return optax.apply_updates(params, updates), opt_state, loss, aux

    params = MLP.init(jax.random.fold_in(KEY, INIT))[0]
    opt_state = SGD.init(params)
    for t in range(T):
        batch = jax.tree.map(lambda x, t=t: x[t], BATCHES)
        params, opt_state, loss, aux = by_hand(params, opt_state, batch)
        close(jax.tree.map(lambda x, t=t: x[t], plain.states.params), params)
        close(jax.tree.map(lambda x, t=t: x[t], plain.aux), aux)
        np.testing.assert_allclose(plain.metrics["loss"][t], loss, rtol=1e-5)
    assert plain.metrics.keys() == {"loss"}
    np.testing.assert_array_equal(plain.aux.index, INDEX)
    np.testing.assert_array_equal(plain.states.step, np.arange(1, T + 1))


def test_what_no_step_changes(plain: Run) -> None:
    data = np.asarray(jax.random.key_data(plain.states.key))
    np.testing.assert_array_equal(data, np.tile(jax.random.key_data(KEY), (T, 1)))
    for name, value in H.items():
        np.testing.assert_array_equal(plain.states.hyperparameters[name], np.float32(value))
    np.testing.assert_array_equal(plain.states.diverged, NEVER)
    state = step.init(MLP, SGD, KEY, SCALARS)
    after = jax.eval_shape(step.make(MLP, SGD), state, jax.tree.map(lambda x: x[0], BATCHES))[0]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_any_optax_optimizer_works(optimizer: Any) -> None:
    found = run(MLP, optimizer, scalars={"unused": 1.0})
    assert np.isfinite(found.metrics["loss"]).all() and found.state.step == T


def test_extra_arguments_are_offered() -> None:
    def update(
        updates: Any, state: Any, params: Any = None, *, hyperparameters: Any, step: Any
    ) -> Any:
        scale = -hyperparameters["rate"] * (step == 1).astype(jnp.float32)
        return jax.tree.map(lambda g: scale * g, updates), state

    once = optax.GradientTransformationExtraArgs(lambda params: (), update)
    found = run(MLP, once, scalars={"rate": 0.5})
    kernel = np.asarray(found.states.params["head"]["kernel"])
    start = step.init(MLP, once, KEY, {}).params["head"]["kernel"]
    np.testing.assert_array_equal(kernel[0], start)
    assert (kernel[1] != kernel[0]).any()
    np.testing.assert_array_equal(kernel[2:], np.tile(kernel[1], (T - 2, 1, 1)))


def test_noise_is_folded_from_the_root_key_and_the_step() -> None:
    update = jit(step.make(DROPOUT, SGD))
    state = step.init(DROPOUT, SGD, KEY, SCALARS)
    batch = jax.tree.map(lambda x: x[0], BATCHES)
    for t in (0, 5):
        _, aux, _ = update(state.replace(step=jnp.int32(t)), batch)
        key = jax.random.fold_in(jax.random.fold_in(KEY, LOSS), t)
        _, (_, wanted) = jit(DROPOUT.loss)(state.params, {}, batch, key, H)
        close(aux.logits, wanted.logits)


# ---- microbatches -------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [4])
def test_microbatches_average_to_the_batch(plain: Run, accumulate: int) -> None:
    found = run(MLP, SGD, accumulate=accumulate)
    close(found.state, plain.state)
    close(found.metrics, plain.metrics)
    close(found.aux, plain.aux)
    np.testing.assert_array_equal(found.aux.index, INDEX)


def test_microbatches_unrolled_are_the_same() -> None:
    close(run(NORMED, SGD, accumulate=4, unroll=True), normed(4))


def test_batch_statistics_see_one_microbatch_after_the_other() -> None:
    found = jax.tree.map(lambda x: x[0], (normed(4).states.extras, normed(4).aux.logits))
    params, extras = NORMED.init(jax.random.fold_in(KEY, INIT))
    loss, seen = jit(NORMED.loss), []
    for i in range(4):
        micro = jax.tree.map(lambda x, i=i: x[0, 2 * i : 2 * i + 2], BATCHES)
        _, (extras, aux) = loss(params, extras, micro, KEY, H)
        seen.append(aux)
    close(found, (extras, np.concatenate([aux.logits for aux in seen])))


def test_microbatches_have_their_own_noise() -> None:
    twins = BATCHES.replace(x=jnp.broadcast_to(BATCHES.x[:, :1], X.shape))
    logits = np.asarray(run(DROPOUT, SGD, twins, accumulate=8).aux.logits[0])
    assert len(np.unique(logits, axis=0)) > 1


class Scalar(NamedTuple):
    """A task of one number, with a scalar of its own in the rows."""

    @staticmethod
    def task() -> Task:
        def init(key: Any) -> Any:
            return {"w": jnp.float32(2.0)}, {"seen": jnp.int32(0)}

        def aux(w: Any, batch: Batch) -> Aux:
            z = w * batch.x
            scalars = {"mean_x": batch.x.mean(), "w": w}
            return Aux(loss=z**2, logits=z[:, None], y=batch.y, index=batch.index, scalars=scalars)

        def loss(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
            found = aux(params["w"], batch)
            return found.loss.mean(), ({"seen": extras["seen"] + len(batch.x)}, found)

        return Task(init, loss, lambda p, e, b, h: aux(p["w"], b))


def numbers(x: Any) -> Batch:
    """A batch of four numbers for every step."""
    x = jnp.asarray(x, jnp.float32)
    return Batch(x=x, y=jnp.zeros(x.shape, jnp.int32), index=jnp.zeros(x.shape, jnp.int32))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scalars_of_a_task_become_metrics(accumulate: int) -> None:
    batch = numbers([[1, 2, 3, 4], [0, 0, 1, 1]])
    found = run(Scalar.task(), optax.sgd(0.1), batch, scalars={}, accumulate=accumulate)
    w = 2 * (1 - 0.2 * 7.5)
    np.testing.assert_allclose(found.metrics["mean_x"], [2.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.metrics["w"], [2, w], rtol=1e-6)
    np.testing.assert_allclose(found.metrics["loss"], [4 * 7.5, w**2 * 0.5], rtol=1e-6)
    np.testing.assert_array_equal(found.states.extras["seen"], [4, 8])


# ---- divergence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "accumulate"), [(np.nan, 1), (np.inf, 4)])
def test_frozen_from_the_first_loss_that_is_not_finite(bad: float, accumulate: int) -> None:
    """One bad example at step 2; the batches after it are good again."""
    broken = BATCHES.replace(x=BATCHES.x.at[2, 5, 0, 0, 0].set(bad))
    found = run(NORMED, SGD, broken, accumulate=accumulate)
    good = normed(accumulate)
    assert [bool(b) for b in np.isfinite(found.metrics["loss"])][:3] == [True, True, False]
    np.testing.assert_array_equal(found.states.diverged, [NEVER, NEVER, 2, 2, 2, 2])
    np.testing.assert_array_equal(found.states.step, np.arange(1, T + 1))
    for tree, other in (
        (found.states.params, good.states.params),
        (found.states.extras, good.states.extras),
        (found.states.opt_state, good.states.opt_state),
    ):
        for x, y in zip(leaves(tree), leaves(other), strict=True):
            assert np.isfinite(x).all()
            np.testing.assert_array_equal(x[:2], y[:2])
            np.testing.assert_array_equal(x[2:], np.stack([x[1]] * (T - 2)))


def test_a_diverging_replica_touches_no_other() -> None:
    """Bit for bit: the same program, with and without a learning rate that explodes."""
    keys = jax.random.split(KEY, 3)
    scalars = {name: np.full(3, value) for name, value in H.items()}
    wild = scalars | {"learning_rate": np.array([0.1, 1e25, 0.1])}
    calm, found = (run(MLP, SGD, key=keys, scalars=s) for s in (scalars, wild))
    diverged = np.asarray(found.state.diverged)
    assert diverged[1] < T and (diverged[[0, 2]] == NEVER).all()
    for a, b in ((calm.states.params, found.states.params), (calm.metrics, found.metrics)):
        for x, y in zip(leaves(a), leaves(b), strict=True):
            np.testing.assert_array_equal(x[[0, 2]], y[[0, 2]])
    first = diverged[1]
    assert not np.isfinite(found.metrics["loss"][1, first])
    assert np.isfinite(found.metrics["loss"][1, :first]).all()
    for x in leaves(found.states.params):  # those that gave the loss, kept
        for t in range(first, T):
            np.testing.assert_array_equal(x[1, t], x[1, max(first - 1, 0)])


def test_an_infinite_gradient_is_seen_at_the_next_loss() -> None:
    """loss = sqrt(w) at 0: finite, its slope is not."""

    def init(key: Any) -> Any:
        return {"w": jnp.float32(0.0)}, {}

    def loss(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
        value = jnp.sqrt(params["w"]) + 0 * batch.x
        aux = Aux(loss=value, logits=value[:, None], y=batch.y, index=batch.index)
        return value.mean(), (extras, aux)

    root = Task(init, loss, lambda p, e, b, h: loss(p, e, b, KEY, h)[1][1])
    found = run(root, optax.sgd(0.1), numbers(np.ones((3, 4))), scalars={})
    np.testing.assert_array_equal(found.states.diverged, [NEVER, 1, 1])


def test_a_frozen_replica_resumes_nothing() -> None:
    """A state that diverged stays as it is, whatever it is shown."""
    state = step.init(MLP, SGD, KEY, SCALARS)
    state = state.replace(diverged=jnp.int32(0), step=jnp.int32(4))
    after, aux, metrics = jit(step.make(MLP, SGD))(state, jax.tree.map(lambda x: x[0], BATCHES))
    same((after.params, after.opt_state), (state.params, state.opt_state))
    assert after.step == 5 and after.diverged == 0 and np.isfinite(metrics["loss"])
