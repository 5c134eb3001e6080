"""The one train step: what it computes, what it never touches, and when it stops."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamics import models, optim, step, task
from dynamics.types import INIT, LOSS, NEVER, OPTIMIZER, Aux, Batch, Task

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
SGD = optim.SGD().make(T)


@pytest.fixture(scope="module")
def plain() -> Run:
    return run(MLP, SGD)


@functools.cache
def normed(accumulate: int) -> Run:
    return run(NORMED, SGD, accumulate=accumulate)


# ---- what it computes ---------------------------------------------------------------------------


def test_the_state_before_the_first_step() -> None:
    state = step.init(MLP, SGD, KEY, SCALARS)
    params, extras = MLP.init(jax.random.fold_in(KEY, INIT), {})
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

    params = MLP.init(jax.random.fold_in(KEY, INIT), {})[0]
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


ADAM = optim.Adam(learning_rate=0.02)
PLAIN = {
    "sgd": (SGD, SCALARS),
    "adam": (ADAM.make(T), jax.tree.map(jnp.float32, ADAM.hyperparameters())),
    "optax sgd": (optax.sgd(0.1), {}),
    "optax adam": (optax.adam(0.1), {}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_nobody_asks_for_costs_nothing(name: str, monkeypatch: Any) -> None:
    """The same bits and operations as where nothing is offered but what was before."""
    optimizer, scalars = PLAIN[name]
    update = optax.with_extra_args_support(optimizer).update

    def bare(grads: Any, opt_state: Any, params: Any, offered: Any) -> Any:
        few = {name: offered[name] for name in ("hyperparameters", "step")}
        return update(grads, opt_state, params, **few)

    steps = [step.make(NORMED, optimizer)]
    monkeypatch.setattr(step, "_asked", lambda update: bare)
    steps.append(step.make(NORMED, optimizer))
    state = step.init(NORMED, optimizer, KEY, scalars)
    batch = jax.tree.map(lambda x: x[0], BATCHES)
    both = [jax.jit(fn).lower(state, batch).compile() for fn in steps]
    assert both[0].cost_analysis()["flops"] == both[1].cost_analysis()["flops"]
    for _ in range(3):
        found, wanted = (fn(state, batch) for fn in both)
        same(found, wanted)
        state = found[0]


RULES = {
    "plateau": optax.chain(optax.sgd(0.05), optax.contrib.reduce_on_plateau(patience=1)),
    "polyak": optax.polyak_sgd(0.5),
    "backtracking": optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(6, store_grad=True)
    ),
    "zoom": optax.lbfgs(
        memory_size=3, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=5)
    ),
    "momo": optax.contrib.momo(0.5),
}


@pytest.mark.parametrize("name", RULES)
def test_optax_rules_that_ask_train_a_population(name: str) -> None:
    """Each member as alone, and the loss of a batch that comes again falls."""
    keys = jax.random.split(KEY, 2)
    again = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), BATCHES)
    found = run(MLP, RULES[name], again, key=keys, scalars={"unused": np.ones(2)})
    loss = np.asarray(found.metrics["loss"])
    assert (loss[:, -1] < loss[:, 0]).all()
    np.testing.assert_array_equal(found.state.diverged, NEVER)
    alone = run(MLP, RULES[name], again, key=keys[1], scalars={"unused": 1.0})
    np.testing.assert_allclose(loss[1], alone.metrics["loss"], rtol=1e-4)


def test_the_value_function_is_the_loss_of_the_step() -> None:
    """Of the same batch, microbatches, noise and batch statistics."""
    seen = {}

    def update(updates: Any, state: Any, params: Any, *, value, grad, value_fn, aux, **rest: Any):
        seen["apart"] = value_fn(params) - value
        slope = jax.grad(value_fn)(params)
        seen["slope"] = optax.tree.norm(optax.tree.sub(slope, grad)) / optax.tree.norm(grad)
        seen["aux"] = aux.loss.mean() - value
        return updates, {name: seen[name] for name in seen}

    nothing = {"apart": jnp.float32(0), "slope": jnp.float32(0), "aux": jnp.float32(0)}
    rule = optax.GradientTransformationExtraArgs(lambda params: nothing, update)
    for made, accumulate in ((DROPOUT, 1), (DROPOUT, 4), (NORMED, 2)):
        found = run(made, rule, scalars={}, accumulate=accumulate).states.opt_state
        for name, value in found.items():
            np.testing.assert_allclose(value, 0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rule_asks_for_the_gradient_elsewhere_and_of_other_batches(accumulate: int) -> None:
    """Sharpness-aware: for losses (w x)^2 the gradient at w + r sign(w) is 2 (w + r) E x^2."""

    def update(updates: Any, state: Any, params: Any, *, gradient, batch, **rest: Any) -> Any:
        ascended = jax.tree.map(lambda w, g: w + 0.5 * jnp.sign(g), params, updates)
        other = batch.replace(x=2 * batch.x)
        here, there = gradient(ascended), gradient(params, other)
        curvature = jax.jvp(gradient, (params,), (optax.tree.ones_like(params),))[1]
        return jax.tree.map(lambda g: -0.01 * g, here), {"there": there, "product": curvature}

    def init(params: Any) -> Any:
        return {"there": params, "product": params}

    rule = optax.GradientTransformationExtraArgs(init, update)
    batch = numbers([[1, 2, 3, 4], [0, 0, 1, 1]])
    found = run(Scalar.task(), rule, batch, scalars={}, accumulate=accumulate)
    first = 2 - 0.01 * 2 * 2.5 * 7.5
    second = first - 0.01 * 2 * (first + 0.5) * 0.5
    np.testing.assert_allclose(found.states.params["w"], [first, second], rtol=1e-5)
    asked = found.states.opt_state
    np.testing.assert_allclose(asked["there"]["w"], [8 * 2 * 7.5, 8 * first * 0.5], rtol=1e-5)
    np.testing.assert_allclose(asked["product"]["w"], [2 * 7.5, 2 * 0.5], rtol=1e-5)


def test_every_member_and_step_has_noise_of_its_own() -> None:
    def update(updates: Any, state: Any, params: Any = None, *, key: Any) -> Any:
        return jax.tree.map(lambda w: jax.random.normal(key, w.shape), params), ()

    rule = optax.GradientTransformationExtraArgs(lambda params: (), update)
    made = optim.by_hyperparameters(lambda h: wide(rule), {"rate": 1.0})
    for optimizer in (rule, made):
        batch, keys = numbers([[1.0, 2.0]] * T), jax.random.split(KEY, 3)
        found = run(Scalar.task(), optimizer, batch, key=keys, scalars={"rate": np.ones(3)})
        moved = np.diff(np.asarray(found.states.params["w"]), prepend=2.0, axis=1)
        assert len(np.unique(moved.round(5))) == 3 * T
        for k, t in ((0, 0), (2, T - 1)):
            key = jax.random.fold_in(jax.random.fold_in(keys[k], OPTIMIZER), t)
            np.testing.assert_allclose(moved[k, t], jax.random.normal(key), atol=1e-5)


def wide(rule: Any) -> Any:
    """The same rule, that takes whatever else it is given."""
    return optax.GradientTransformationExtraArgs(
        rule.init, lambda u, s, p=None, *, key, **rest: rule.update(u, s, p, key=key)
    )


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
    params, extras = NORMED.init(jax.random.fold_in(KEY, INIT), {})
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
        def init(key: Any, hyperparameters: Any) -> Any:
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


# ---- the gradient is an argument ----------------------------------------------------------------

CURVATURE = np.array([1.0, 3.0, 0.5], np.float32)


def quadratic() -> Task:
    """0.5 sum_i c_i w_i^2 E x^2, whose gradient at w is c w E x^2; two leaves."""

    def init(key: Any, hyperparameters: Any) -> Any:
        return {"a": jnp.array([1.0, -2.0]), "b": jnp.float32(0.5)}, {}

    def loss(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
        w = jnp.append(params["a"], params["b"])
        value = 0.5 * jnp.sum(CURVATURE * w**2) * batch.x**2
        aux = Aux(loss=value, logits=value[:, None], y=batch.y, index=batch.index)
        return value.mean(), (extras, aux)

    return Task(init, loss, lambda p, e, b, h: loss(p, e, b, KEY, h)[1][1])


def draws(params: Any, key: Any, count: int) -> Any:
    """Directions [count, ...] of independent normal numbers."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    return structure.unflatten([jax.random.normal(k, (count, *x.shape)) for k, x in pairs])


def scaled(weights: Any, directions: Any) -> Any:
    """The mean of directions, weighted."""
    return jax.tree.map(lambda v: jnp.tensordot(weights, v, 1) / len(weights), directions)


def forward(count: int) -> Any:
    """Forward gradients: the mean of <g, v> v over normal v, without a backward pass."""

    def transformed(loss: Any) -> Any:
        def gradient(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
            directions = draws(params, key, count)

            def slope(v: Any) -> Any:
                of_params = lambda p: loss(p, extras, batch, key, h)  # noqa: E731
                return jax.jvp(of_params, (params,), (v,), has_aux=True)[1]

            found = loss(params, extras, batch, key, h)
            return found, scaled(jax.lax.map(slope, directions), directions)

        return gradient

    return transformed


def evolution(count: int, sigma: float) -> Any:
    """Antithetic evolution strategies: the mean of (L(w + s v) - L(w - s v)) / 2 s v."""

    def transformed(loss: Any) -> Any:
        def gradient(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
            directions = draws(params, key, count)

            def slope(v: Any) -> Any:
                at = lambda s: jax.tree.map(lambda p, d: p + s * d, params, v)  # noqa: E731
                ends = [loss(at(s), extras, batch, key, h)[0] for s in (sigma, -sigma)]
                return (ends[0] - ends[1]) / (2 * sigma)

            found = loss(params, extras, batch, key, h)
            return found, scaled(jax.lax.map(slope, directions), directions)

        return gradient

    return transformed


@pytest.mark.parametrize("gradient", [forward(4), evolution(4, 0.5)], ids=["forward", "evolution"])
def test_the_gradient_may_be_estimated_along_directions(gradient: Any) -> None:
    """On a quadratic both are mean_i <c w, v_i> v_i E x^2, whatever the size of the step."""
    batch = numbers([[1, 2, 3, 4], [0, 0, 1, 1]])
    rule = optax.sgd(0.01)
    found = run(quadratic(), rule, batch, scalars={}, gradient=gradient)
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.float32(0.5)}
    for t, square in enumerate((7.5, 0.5)):
        key = jax.random.fold_in(jax.random.fold_in(KEY, LOSS), t)
        v = draws(params, key, 4)
        v = np.concatenate([v["a"], v["b"][:, None]], axis=1)
        w = np.append(params["a"], params["b"])
        loss = 0.5 * np.sum(CURVATURE * w**2) * square
        np.testing.assert_allclose(found.metrics["loss"][t], loss, rtol=1e-5)
        w = w - 0.01 * np.mean((v @ (CURVATURE * w))[:, None] * v, axis=0) * square
        params = jax.tree.map(lambda x, t=t: x[t], found.states.params)
        np.testing.assert_allclose(np.append(params["a"], params["b"]), w, rtol=1e-4)


def test_estimated_gradients_are_unbiased() -> None:
    """Within four standard errors of c w E x^2; variances of <g, v> v_i are |g|^2 + g_i^2."""
    batch = jax.tree.map(lambda x: x[0], numbers([[1, 2, 3, 4]]))
    params, count = quadratic().init(KEY, {})[0], 20_000
    g = CURVATURE * np.array([1.0, -2.0, 0.5]) * 7.5
    for gradient in (forward(count), evolution(count, 0.1)):
        found = jax.jit(gradient(quadratic().loss))(params, {}, batch, KEY, {})[1]
        apart = np.abs(np.append(found["a"], found["b"]) - g)
        assert (apart <= 4 * np.sqrt((g @ g + g**2) / count)).all()


def test_a_gradient_of_moved_parameters_works_with_microbatches() -> None:
    """Sharpness-aware: of losses (w x)^2 at w + 1 it is 2 (w + 1) E x^2."""

    def ascended(loss: Any) -> Any:
        plain = step.BACKWARD(loss)

        def gradient(params: Any, *rest: Any) -> Any:
            found, _ = plain(params, *rest)
            return found, plain(jax.tree.map(lambda w: w + 1, params), *rest)[1]

        return gradient

    batch = numbers([[1, 2, 3, 4], [0, 0, 1, 1]])
    for accumulate in (1, 2):
        options: dict[str, Any] = {"gradient": ascended, "accumulate": accumulate}
        found = run(Scalar.task(), optax.sgd(0.01), batch, scalars={}, **options)
        w = 2 - 0.01 * 2 * 3 * 7.5
        np.testing.assert_allclose(found.states.params["w"][0], w, rtol=1e-6)
        np.testing.assert_allclose(found.metrics["loss"], [4 * 7.5, w**2 * 0.5], rtol=1e-6)


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


def of_number(loss: Any, start: float) -> Task:
    """A task of one number whose loss is ``loss(w, x)`` of each x of the batch."""

    def init(key: Any, hyperparameters: Any) -> Any:
        return {"w": jnp.float32(start)}, {"seen": jnp.int32(0)}

    def whole(params: Any, extras: Any, batch: Batch, key: Any, h: Any) -> Any:
        value = loss(params["w"], batch.x)
        aux = Aux(loss=value, logits=value[:, None], y=batch.y, index=batch.index)
        return value.mean(), ({"seen": extras["seen"] + 1}, aux)

    return Task(init, whole, lambda p, e, b, h: whole(p, e, b, KEY, h)[1][1])


ROOT = of_number(lambda w, x: jnp.sqrt(w) + 0 * x, 0.0)  # finite at 0, its slope is not
NAN_SLOPE = of_number(lambda w, x: jnp.sqrt(w * w) * x, 0.0)
LINE = of_number(lambda w, x: w * x, 1.0)
SIGNS = optax.chain(optax.scale_by_sign(), optax.scale(-0.1))  # makes 1 of infinity


@pytest.mark.parametrize(
    ("made", "optimizer"),
    [
        (ROOT, optax.sgd(0.1)),
        (ROOT, optax.adam(0.1)),
        (ROOT, SIGNS),
        (NAN_SLOPE, optax.sgd(0.1)),
        (LINE, optax.scale(float("nan"))),
        (LINE, optax.chain(optax.clip_by_global_norm(1e-9), optax.scale(-1e38), optax.scale(1e38))),
    ],
    ids=["sgd", "adam", "signs", "nan", "nan update", "update"],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_divergence_is_decided_on_loss_gradient_and_update(
    made: Task, optimizer: Any, accumulate: int
) -> None:
    """Frozen and finite from the first bad step on, also when that is the last."""
    batches = numbers(np.ones((2, 4)))
    state = step.init(made, optimizer, KEY, {})
    found = run(made, optimizer, batches, scalars={}, accumulate=accumulate)
    assert np.isfinite(found.metrics["loss"]).all()
    assert (found.states.diverged == 0).all()
    for name in ("params", "extras", "opt_state"):
        same(getattr(found.state, name), getattr(state, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(), (7,), (4096,), (64, 128), (256, 512), (3, 3, 32, 64)])
@pytest.mark.parametrize("place", ["loss", "gradient", "params"])
def test_one_number_that_is_not_finite_is_found_anywhere(
    shape: tuple[int, ...], bad: float, place: str
) -> None:
    """In leaves of any size: of a large one XLA's maximum on a CPU leaves NaN out."""
    rng = np.random.default_rng(0)
    loss = np.ones(8, np.float32)
    grads, params = (
        {
            name: rng.normal(size=(8, *of)).astype(np.float32)
            for name, of in {"b": (5,), "w": shape}.items()
        }
        for _ in range(2)
    )
    finite = jit(jax.vmap(step._finite))
    assert finite(loss, grads, params).all()
    poisoned = {"loss": loss, "gradient": grads["w"], "params": params["w"]}[place]
    for member, row in enumerate(poisoned.reshape(8, -1)[:-1]):
        poisoned.reshape(8, -1)[member, rng.integers(row.size)] = bad
    np.testing.assert_array_equal(finite(loss, grads, params), [False] * 7 + [True])


def test_weights_that_overflow_at_the_last_step_are_not_kept() -> None:
    found = run(LINE, optax.sgd(3e38), numbers(np.ones((2, 4))), scalars={})
    np.testing.assert_array_equal(found.states.diverged, [NEVER, 1])
    np.testing.assert_allclose(found.states.params["w"], -3e38)
    np.testing.assert_array_equal(found.states.extras["seen"], [1, 1])
    np.testing.assert_array_equal(found.states.step, [1, 2])


def test_a_frozen_replica_resumes_nothing() -> None:
    """A state that diverged stays as it is, whatever it is shown."""
    state = step.init(MLP, SGD, KEY, SCALARS)
    state = state.replace(diverged=jnp.int32(0), step=jnp.int32(4))
    after, aux, metrics = jit(step.make(MLP, SGD))(state, jax.tree.map(lambda x: x[0], BATCHES))
    same((after.params, after.opt_state), (state.params, state.opt_state))
    assert after.step == 5 and after.diverged == 0 and np.isfinite(metrics["loss"])
