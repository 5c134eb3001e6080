"""What every rule of the union must do, and its first steps bit for bit as optax called by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamics import config as configs
from dynamics import optim
from dynamics.optim import SGD, Adam, Constant, Cosine, Linear
from dynamics.optim.transforms import are_matrices
from dynamics.training import Train

RULES = [SGD, Adam]
STEPS = 4
PARAMS = {"kernel": jnp.float32([[1.5, -0.5], [3.0, 0.25], [-1.0, 2.0]]), "bias": jnp.ones(2)}
FAN_IN = 3
FIELDS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "independent": {"weight_decay": 0.1, "independent_decay": True},
    "clip": {"clip_norm": 0.5},
    "fan_in": {"base_fan_in": 12},
    "all": {
        "weight_decay": 0.1,
        "independent_decay": True,
        "clip_norm": 0.5,
        "base_fan_in": 12,
        "schedule": Cosine(warmup=0.5),
    },
}


def gradient(params, t):
    """Not linear in the parameters, and another one at every step."""
    return jax.tree.map(lambda w: jnp.sin(3.0 * w) + w * (1 + t), params)


def trained(rule):
    """Parameters after every step of the rule's own optimizer."""
    optimizer, params, out = rule.make(STEPS), PARAMS, []
    state, h = optimizer.init(params), scalars_of(rule)
    for t in range(STEPS):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient(params, t), state, params, hyperparameters=h)
        params = optax.apply_updates(params, updates)
        out.append(params)
    return out


def scalars_of(rule):
    return {name: jnp.float32(value) for name, value in rule.hyperparameters().items()}


def by_hand(rule):
    """The same by calls of optax and a line of arithmetic for what it lacks."""
    h, shape, params, out = scalars_of(rule), optim.factor(rule.schedule, STEPS), PARAMS, []
    if isinstance(rule, SGD):
        core = optax.trace(h["momentum"], nesterov=rule.nesterov)
    else:
        core = optax.scale_by_adam(h["momentum"], h["second_moment"], h["epsilon"])
    state = core.init(params)

    def decayed(u):
        if rule.independent_decay:
            return u
        return jax.tree.map(lambda u, w: u + h["weight_decay"] * w, u, params)

    for t in range(STEPS):
        u = gradient(params, t)
        if rule.clip_norm:
            u, _ = optax.clip_by_global_norm(rule.clip_norm).update(u, optax.EmptyState())
        u = decayed(u) if isinstance(rule, SGD) else u
        with jax.numpy_dtype_promotion("standard"):
            u, state = core.update(u, state, params)
        u = u if isinstance(rule, SGD) else decayed(u)
        if rule.base_fan_in:
            u = u | {"kernel": u["kernel"] * (rule.base_fan_in / FAN_IN)}
        rate = h["learning_rate"] * shape(jnp.int32(t))
        u = jax.tree.map(lambda u, rate=rate: -rate * u, u)
        if rule.independent_decay:
            taken = shape(jnp.int32(t)) * h["weight_decay"]
            u = jax.tree.map(lambda u, w, taken=taken: u - taken * w, u, params)
        params = optax.apply_updates(params, u)
        out.append(params)
    return out


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize(
    "rule", [SGD(nesterov=False, momentum=0.0), SGD(nesterov=False), SGD(), Adam()],
    ids=["gd", "heavy_ball", "nesterov", "adam"],
)  # fmt: skip
def test_the_first_steps_are_those_of_optax_bit_for_bit(rule, fields):
    rule = dataclasses.replace(rule, learning_rate=0.05, **fields)
    for mine, theirs in zip(trained(rule), by_hand(rule), strict=True):
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_equal_configs_make_one_object(rule):
    """So that programs compiled with it are found again, at another learning rate, too."""
    made = rule(schedule=Linear()).make(10)
    assert rule(schedule=Linear()).make(10) is made
    numbers = {name: 0.25 for name in configs.replica_fields(rule())}
    assert rule(schedule=Linear(), **numbers).make(10) is made
    different = [
        rule(schedule=Linear()).make(11),
        rule(schedule=Constant()).make(10),
        rule(schedule=Linear(), clip_norm=1.0).make(10),
        rule(schedule=Linear(), independent_decay=True).make(10),
        rule(schedule=Linear(), base_fan_in=8).make(10),
        rule(schedule=Linear(), decay="matrices").make(10),
    ]
    assert len({id(one) for one in [made, *different]}) == 7


def test_no_two_rules_share_one():
    assert SGD().make(3) is not Adam().make(3)
    assert SGD().make(3) is not SGD(nesterov=False).make(3)


@pytest.mark.parametrize("rule", RULES)
def test_scalars_are_the_replica_fields(rule):
    """What may differ between replicas is what the optimizer reads from the state."""
    assert set(rule().hyperparameters()) == set(configs.replica_fields(rule()))
    assert rule().hyperparameters() == {n: getattr(rule(), n) for n in rule().hyperparameters()}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("independent", [False, True])
def test_only_matrices_decay(rule, independent):
    """Biases and norms move as without decay, kernels as with it."""
    fields = {"learning_rate": 0.05, "independent_decay": independent}
    of = {
        decay: trained(rule(weight_decay=0.1, decay=decay, **fields))[0]
        for decay in ("all", "matrices")
    }
    free = trained(rule(**fields))[0]
    np.testing.assert_array_equal(of["matrices"]["kernel"], of["all"]["kernel"])
    np.testing.assert_array_equal(of["matrices"]["bias"], free["bias"])
    assert (np.asarray(of["all"]["bias"]) != free["bias"]).all()
    assert (np.asarray(of["all"]["kernel"]) != free["kernel"]).all()


def test_which_are_matrices():
    shapes = {"scale": 8, "bias": 8, "kernel": (8, 2), "embedding": (5, 8)}
    found = are_matrices({name: np.ones(shape) for name, shape in shapes.items()})
    assert found == {"scale": False, "bias": False, "kernel": True, "embedding": True}


def test_sgd_divides_by_nothing():
    assert SGD().preconditioner(SGD().make(3).init(PARAMS), {}) is None


def test_the_preconditioner_of_adam_is_what_it_divides_by():
    """Without momentum the step is rate * g / P, from the first on."""
    rule = Adam(learning_rate=0.05, momentum=0.0, second_moment=0.9, epsilon=1e-3)
    optimizer, h = rule.make(STEPS), scalars_of(rule)
    state = optimizer.init(PARAMS)
    assert np.isnan(rule.preconditioner(state, h)["bias"]).all()  # no step was done
    for t in range(STEPS):
        g = gradient(PARAMS, t)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(g, state, PARAMS, hyperparameters=h)
        divided = jax.tree.map(lambda g, p: -0.05 * g / p, g, rule.preconditioner(state, h))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, divided)
    with pytest.raises(ValueError, match="must have one Adam, got 0: train with Adam"):
        rule.preconditioner(SGD().make(3).init(PARAMS), h)


# ---- sweeps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_sweep_over_a_rule_s_numbers_is_one_program(rule):
    start = configs.override(Train(), {"optimizer": rule})
    for name in configs.replica_fields(start):
        points = configs.grid(start, {name: [0.1, 0.2]})
        assert len(configs.group(points)) == 1, name


def test_a_sweep_over_two_rules_is_two():
    """Also at rates of its own each, and with what both have."""
    axes = {"optimizer": ["sgd", "adam"], "optimizer.learning_rate": [0.01, 0.1]}
    groups = configs.group(configs.grid(Train(), axes))
    assert [len(group) for group in groups] == [2, 2]
    assert [{type(p.optimizer) for p in group} for group in groups] == [{SGD}, {Adam}]
    assert len(configs.group(configs.grid(Train(), {"optimizer.decay": ["all", "matrices"]}))) == 2
    assert len(configs.group(configs.grid(Train(), {"batch_size": [8, 16]}))) == 2


@pytest.mark.parametrize("rule", RULES)
def test_a_config_reads_back(rule):
    point = Train(optimizer=rule(schedule=Cosine(), weight_decay=0.1), batch_size=16)
    assert configs.from_json(Train, configs.to_json(point)) == point


def test_a_rule_takes_no_field_of_another():
    with pytest.raises(ValueError, match="Adam has no field 'nesterov'"):
        configs.override(Train(), {"optimizer": "adam", "optimizer.nesterov": False})
    with pytest.raises(ValueError, match="SGD has no field 'second_moment'"):
        configs.override(Train(), {"optimizer.second_moment": 0.9})
