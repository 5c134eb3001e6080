"""Independent decay, clipping and rates by fan-in: against loops in float64, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references import optim as usual
from references import transformer as reference
from test_optim import RULES, W, gradient, run

from dynamics import models, optim, task
from dynamics.optim import SGD, Adam, Constant, Cosine, Linear

STEPS = 5
SCALARS = {
    "sgd": {"learning_rate": 0.03, "momentum": 0.9, "weight_decay": 0.1},
    "adam": {
        "learning_rate": 0.05,
        "momentum": 0.8,
        "weight_decay": 0.1,
        "second_moment": 0.95,
        "epsilon": 1e-3,
    },
}
FALLING = [1, 0.8, 0.6, 0.4, 0.2]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", [Constant(), Linear()])
def test_independent_decay(rule, schedule):
    factor = FALLING.__getitem__ if schedule == Linear() else lambda t: 1.0
    config = RULES[rule](independent_decay=True, schedule=schedule, **SCALARS[rule])
    wanted = reference.trained(
        W, gradient, STEPS, rule=rule, nesterov=True, factor=factor, **SCALARS[rule]
    )
    np.testing.assert_allclose(run(config), wanted, rtol=1e-5)
    other = reference.trained(
        W, gradient, STEPS, rule=rule, nesterov=True, factor=factor,
        **SCALARS[rule] | {"weight_decay": -0.1},
    )  # fmt: skip
    assert np.abs(other - wanted).max() > 0.1  # the misprinted sign is another rule


def shrunk(config, num_steps=STEPS, **scalars):
    """What is left of a parameter of 1 whose gradient is always 0."""
    optimizer = config.make(num_steps)
    h = {n: jnp.float32(v) for n, v in (config.hyperparameters() | scalars).items()}
    params = {"w": jnp.ones(1)}
    state = optimizer.init(params)
    for _ in range(num_steps):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update({"w": jnp.zeros(1)}, state, params, hyperparameters=h)
        params = optax.apply_updates(params, updates)
    return float(params["w"][0])


@pytest.mark.parametrize("rule", RULES)
def test_what_decays_depends_on_the_schedule_and_not_on_the_rate(rule):
    config = RULES[rule](independent_decay=True, weight_decay=0.1, schedule=Linear())
    wanted = np.prod([1 - s * 0.1 for s in FALLING])
    for rate in (1e-3, 1.0):
        assert shrunk(config, learning_rate=rate) == pytest.approx(wanted, rel=1e-6)
    assert shrunk(config, weight_decay=0.2) < wanted < 1  # towards 0, and read from the state
    coupled = Adam(weight_decay=0.1, schedule=Linear())
    assert shrunk(coupled, learning_rate=1e-3) > 0.999


def test_the_usual_decay_is_the_independent_one_times_the_rate():
    scalars = SCALARS["adam"] | {"weight_decay": 0.3}
    scaled = run(Adam(schedule=Linear(), **scalars))
    scalars["weight_decay"] *= scalars["learning_rate"]
    independent = Adam(schedule=Linear(), independent_decay=True, **scalars)
    np.testing.assert_allclose(run(independent), scaled, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", [0.5, 20.0])
def test_the_gradient_is_cut_to_a_norm_of_all_parameters(rule, clip):
    """Those of this problem begin at 10; the decay of sgd is added after."""
    config = RULES[rule](clip_norm=clip, independent_decay=True, **SCALARS[rule])
    wanted = reference.trained(
        W, gradient, STEPS, rule=rule, nesterov=True, clip_norm=clip, **SCALARS[rule]
    )
    np.testing.assert_allclose(run(config), wanted, rtol=1e-5)
    free = reference.trained(W, gradient, STEPS, rule=rule, nesterov=True, **SCALARS[rule])
    assert (np.abs(wanted - free).max() > 1e-3) == (clip == 0.5)


def test_a_clipped_gradient_is_clipped_before_l2_is_added():
    def clipped(w):
        g = gradient(w)
        return g * min(1.0, 0.5 / np.linalg.norm(g))

    wanted = usual.sgd(W, clipped, STEPS, nesterov=True, **SCALARS["sgd"])
    np.testing.assert_allclose(run(SGD(clip_norm=0.5, **SCALARS["sgd"])), wanted, rtol=1e-5)


def test_only_linear_layers_learn_by_their_fan_in():
    net = models.make(models.Transformer(width=8, depth=1, num_heads=2, max_length=4), 5)
    made = task.classification(net, (4,), input_dtype=jnp.int32)
    shapes, _ = jax.eval_shape(made.init, jax.random.key(0), {})
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    leaves, _ = jax.tree_util.tree_flatten_with_path(optim.by_fan_in(16).update(ones, ())[0])
    found = {"/".join(part.key for part in path): leaf for path, leaf in leaves}
    wanted = dict.fromkeys(found, 1.0)
    for name in ("query", "key", "value", "out"):
        wanted[f"block_0/attention/{name}/kernel"] = 16 / 8
    wanted |= {"block_0/mlp/up/kernel": 16 / 8, "block_0/mlp/down/kernel": 16 / 32}
    wanted["head/kernel"] = 16 / 8
    assert sum(factor != 1 for factor in wanted.values()) == 7
    for name, factor in wanted.items():
        np.testing.assert_allclose(found[name], factor, rtol=1e-6, err_msg=name)


def test_the_rate_of_a_linear_layer_and_not_its_independent_decay():
    params = {"kernel": jnp.ones((8, 2)), "bias": jnp.ones(2)}
    config = SGD(base_fan_in=16, momentum=0.0, learning_rate=0.1, independent_decay=True)
    h = config.hyperparameters() | {"weight_decay": 0.5}
    optimizer = config.make(3)
    updates, _ = optimizer.update(params, optimizer.init(params), params, hyperparameters=h)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 2 - 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], -0.1 - 0.5, rtol=1e-6)


def test_a_kernel_of_a_convolution_has_all_its_inputs():
    rule = optim.by_fan_in(18)
    kernels = {"kernel": jnp.ones((3, 3, 4, 2)), "bias": jnp.ones(2)}
    updates, _ = rule.update(kernels, rule.init(kernels))
    np.testing.assert_allclose(updates["kernel"], 18 / 36, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 1.0)


def test_no_linear_layer_is_an_error():
    optimizer = SGD(base_fan_in=16).make(3)
    params, h = {"w": jnp.ones(2)}, SGD().hyperparameters()
    with pytest.raises(ValueError, match=r"'kernel', there is none among \[\"\['w'\]\"\]"):
        optimizer.update(params, optimizer.init(params), params, hyperparameters=h)


@pytest.mark.parametrize("rule", RULES)
def test_by_default_it_is_the_plain_rule_bit_for_bit(rule):
    """State and updates of the optax chain that was there before."""
    config = RULES[rule](schedule=Cosine(warmup=0.4), **SCALARS[rule])
    shape, h = optim.factor(config.schedule, STEPS), SCALARS[rule]
    rate = lambda t: jnp.float32(h["learning_rate"]) * shape(t)  # noqa: E731
    if rule == "sgd":
        plain = optax.chain(
            optax.add_decayed_weights(jnp.float32(h["weight_decay"])),
            optax.trace(jnp.float32(h["momentum"]), nesterov=True),
            optax.scale_by_learning_rate(rate),
        )
    else:
        b1, b2, eps, decay = (
            jnp.float32(h[n]) for n in ("momentum", "second_moment", "epsilon", "weight_decay")
        )
        plain = optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    scalars = {n: jnp.float32(v) for n, v in h.items()}
    mine = config.make(STEPS)
    params = {"w": jnp.float32(W)}
    states, extra = [mine.init(params), plain.init(params)], [{"hyperparameters": scalars}, {}]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    moved = []
    for optimizer, state, more in zip((mine, plain), states, extra, strict=True):
        w = params
        for _ in range(STEPS):
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update({"w": gradient(w["w"])}, state, w, **more)
            w = optax.apply_updates(w, updates)
        moved.append(w["w"])
    np.testing.assert_array_equal(*moved)


def test_the_scalars_of_a_run_are_what_they_were():
    config = Adam(independent_decay=True, clip_norm=1.0, base_fan_in=256)
    assert config.hyperparameters().keys() == Adam().hyperparameters().keys()


@pytest.mark.parametrize("bad", [{"clip_norm": -1.0}, {"base_fan_in": -1}])
def test_bad_values_are_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"SGD.{name} must be >= 0"):
        SGD(**bad)
