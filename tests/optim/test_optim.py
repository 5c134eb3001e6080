"""Optimizers against the papers' loops, and hyperparameters that differ between replicas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import optim as reference

from dynamics import optim
from dynamics.optim import SGD, Adam, Cosine, Steps

RULES = {"sgd": SGD, "adam": Adam}
STEPS = 5
W = np.array([1.5, -0.5, 3.0, 0.25])
CURVATURE = np.array([1.0, 4.0, 0.5, 20.0])


def gradient(w):
    """Of 0.5 sum c w^2 + cos w: not linear, and not the same for every coordinate."""
    sin = jnp.sin(w) if isinstance(w, jax.Array) else np.sin(w)
    return CURVATURE.astype(w.dtype) * w - sin


# as users compile it: the rounding of 1e-5 of a number near 0 is that of an optimised program
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})


def run(config, scalars=None, num_steps=STEPS):
    """Every iterate [T, 4] of the optimizer of ``config``, compiled."""
    optimizer = config.make(num_steps)
    scalars = config.hyperparameters() if scalars is None else scalars

    def loop(scalars):
        params = {"a": jnp.float32(W[:3]), "b": {"c": jnp.float32(W[3:])}}

        def one(carry, _):
            params, state = carry
            flat = jnp.concatenate([params["a"], params["b"]["c"]])
            g = gradient(flat)
            g = {"a": g[:3], "b": {"c": g[3:]}}
            with jax.numpy_dtype_promotion("standard"):  # optax raises decays to an integer count
                updates, state = optimizer.update(g, state, params, hyperparameters=scalars)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.concatenate([params["a"], params["b"]["c"]])

        return jax.lax.scan(one, (params, optimizer.init(params)), None, num_steps)[1]

    scalars = {name: jnp.asarray(value, jnp.float32) for name, value in scalars.items()}
    if next(iter(scalars.values())).ndim:
        return np.asarray(jit(jax.vmap(loop))(scalars))
    return np.asarray(jit(loop)(scalars))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(nesterov, momentum):
    scalars = {"learning_rate": 0.03, "momentum": momentum, "weight_decay": 0.1}
    config = SGD(nesterov=nesterov, **scalars)
    wanted = reference.sgd(W, gradient, STEPS, nesterov=nesterov, **scalars)
    np.testing.assert_allclose(run(config), wanted, rtol=1e-5)


def test_nesterov_looks_ahead():
    """The stored point follows Nesterov's own recursion."""
    config = SGD(learning_rate=0.03, momentum=0.9, nesterov=True)
    wanted = reference.sgd_look_ahead(W, gradient, STEPS, learning_rate=0.03, momentum=0.9)
    np.testing.assert_allclose(run(config), wanted, rtol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adam(weight_decay):
    scalars = {
        "learning_rate": 0.05,
        "momentum": 0.8,
        "second_moment": 0.95,
        "epsilon": 1e-3,
        "weight_decay": weight_decay,
    }
    wanted = reference.adam(W, gradient, STEPS, **scalars)
    np.testing.assert_allclose(run(Adam(**scalars)), wanted, rtol=1e-5)


def test_defaults_are_those_of_the_papers():
    wanted = reference.sgd(
        W, gradient, 3, learning_rate=0.02, momentum=0.9, weight_decay=0.0, nesterov=True
    )
    np.testing.assert_allclose(run(SGD(), num_steps=3), wanted, rtol=1e-5)
    scalars = Adam().hyperparameters()
    assert scalars["momentum"] == 0.9 and scalars["second_moment"] == 0.999
    assert scalars["epsilon"] == 1e-8
    wanted = reference.adam(W, gradient, 3, **scalars)
    np.testing.assert_allclose(run(Adam(), num_steps=3), wanted, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_schedule_counts_from_the_first_update(rule):
    cosine = [0.5, 1, 1, (1 + np.cos(np.pi / 3)) / 2, (1 + np.cos(2 * np.pi / 3)) / 2]
    shapes = {
        Steps(milestones=(0.4,), decay=0.5): [1, 1, 0.5, 0.5, 0.5].__getitem__,
        Cosine(warmup=0.4): cosine.__getitem__,
    }
    for schedule, factor in shapes.items():
        config = RULES[rule](learning_rate=0.05, weight_decay=0.1, schedule=schedule)
        loop = functools.partial(reference.sgd, nesterov=True) if rule == "sgd" else reference.adam
        wanted = loop(W, gradient, STEPS, factor=factor, **config.hyperparameters())
        np.testing.assert_allclose(run(config), wanted, rtol=1e-5)


OTHERS = {
    "learning_rate": [0.01, 0.05],
    "momentum": [0.5, 0.9],
    "weight_decay": [0.0, 0.2],
    "second_moment": [0.9, 0.999],
    "epsilon": [1e-8, 1e-2],
}


@pytest.mark.parametrize("rule", RULES)
def test_two_replicas_are_two_runs(rule):
    """Every scalar is read from the state: those of ``config`` only shape the optimizer."""
    config = RULES[rule]()
    scalars = {name: np.array(OTHERS[name]) for name in config.hyperparameters()}
    together = run(config, scalars)
    for s in range(2):
        alone = run(RULES[rule](**{name: float(v[s]) for name, v in scalars.items()}))
        np.testing.assert_allclose(together[s], alone, rtol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_every_scalar_matters(rule):
    base = {name: values[0] for name, values in OTHERS.items()}
    names = RULES[rule]().hyperparameters()
    runs = [{n: base[n] for n in names}]
    runs += [runs[0] | {name: OTHERS[name][1]} for name in names]
    stacked = {name: np.array([r[name] for r in runs]) for name in names}
    found = run(RULES[rule](), stacked)
    for other, name in zip(found[1:], names, strict=True):
        assert np.abs(other - found[0]).max() > 1e-5, name


@pytest.mark.parametrize("rule", RULES)
def test_a_missing_scalar_is_named(rule):
    optimizer = RULES[rule]().make(3)
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="'weight_decay'.*'learning_rate', 'momentum'"):
        scalars = {
            name: value
            for name, value in RULES[rule]().hyperparameters().items()
            if name != "weight_decay"
        }
        optimizer.update(params, optimizer.init(params), params, hyperparameters=scalars)


@pytest.mark.parametrize("name", ["momentum", "second_moment"])
def test_a_decay_of_one_is_refused_where_it_divides_by_zero(name):
    """1 - beta^t is zero for ever: the first update of adam would be NaN."""
    with pytest.raises(ValueError, match=name):
        Adam(**{name: 1.0}).make(3)


def test_extra_arguments_reach_the_rule():
    seen = []

    def rule(h):
        def update(updates, state, params=None, **extra):
            seen.append((sorted(h), sorted(extra)))
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda params: (), update)

    optimizer = optim.by_hyperparameters(rule, {"a": 1.0})
    state = optimizer.init({})
    optimizer.update({}, state, {}, hyperparameters={"a": 2.0, "b": 3.0}, step=jnp.int32(0))
    assert seen == [(["a", "b"], ["hyperparameters", "step"])]


@pytest.mark.parametrize("rule", RULES)
def test_state_keeps_its_structure_and_types(rule):
    config = RULES[rule]()
    optimizer = config.make(3)
    params = {"w": jnp.ones(2)}
    before = optimizer.init(params)
    scalars = {name: jnp.float32(v) for name, v in config.hyperparameters().items()}

    def update(state):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(params, state, params, hyperparameters=scalars)[1]

    after = jax.eval_shape(update, before)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
