"""Thresholds against the companion matrix of every update (check 8), and of real optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from references.stability import bisected

from dynamics.optim import SGD, Adam, Cosine, Linear, rate
from dynamics.optim.thresholds import threshold

ETAS, BETAS = (0.01, 0.3, 1.7), (0.0, 0.5, 0.9, 0.99)


def of_rule(rule, eta, beta, decay):
    """Every row of the table in the words of ``threshold``."""
    return {
        "gd": lambda: threshold(eta, l2=decay),
        "heavy ball": lambda: threshold(eta, beta, l2=decay),
        "nesterov": lambda: threshold(eta, beta, nesterov=True, l2=decay),
        "ema": lambda: threshold(eta, beta, average=True),
        "nadam": lambda: threshold(eta, beta, average=True, nesterov=True),
        "decoupled": lambda: threshold(eta, beta, average=True, shrinkage=eta * decay),
        "independent": lambda: threshold(eta, beta, average=True, shrinkage=decay),
    }[rule]()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "rule", ["gd", "heavy ball", "nesterov", "ema", "nadam", "decoupled", "independent"]
)
def test_the_threshold_is_where_an_eigenvalue_leaves_the_circle(rule, beta):  # check 8
    for eta in ETAS:
        for decay in (0.0, 0.1):
            found, wanted = of_rule(rule, eta, beta, decay), bisected(rule, eta, beta, decay)
            assert abs(found - wanted) <= 1e-9 * wanted, (rule, eta, beta, decay)


def test_the_numbers_of_the_table():
    assert threshold(0.5) == 4
    assert threshold(0.5, 0.9) == pytest.approx(7.6)
    assert threshold(0.5, 0.9, nesterov=True) == pytest.approx(3.8 / 2.8 / 0.5)
    assert threshold(1.0, 0.9, average=True) == pytest.approx(38)
    assert threshold(1.0, 0.9, average=True, nesterov=True) == pytest.approx(13.571428)
    assert threshold(0.5, l2=1.0) == 3
    assert threshold(1.0, 0.9, average=True, shrinkage=0.1) == pytest.approx(36.1)


def grows(rule, s, steps=80):
    """Whether the optimizer's own updates of a small theta on 1/2 s theta^2 grow."""
    optimizer = rule.make(steps)
    h = {name: jnp.float32(value) for name, value in rule.hyperparameters().items()}

    @jax.jit
    def run(theta):
        def one(carry, _):
            theta, state = carry
            with jax.numpy_dtype_promotion("standard"):
                update, state = optimizer.update(
                    s * theta, state, theta, hyperparameters=h, step=jnp.int32(0)
                )
            return (optax.apply_updates(theta, update), state), theta

        return jax.lax.scan(one, (theta, optimizer.init(theta)), None, length=steps)[1]

    path = np.abs(np.asarray(run(jnp.float32(1e-12))))
    assert np.isfinite(path).all()
    return path[-20:].max() > path[steps // 2 : steps // 2 + 20].max()


@pytest.mark.parametrize(
    "rule",
    [
        SGD(learning_rate=0.2, momentum=0.0, nesterov=False),
        SGD(learning_rate=0.2, momentum=0.8, nesterov=False),
        SGD(learning_rate=0.2, momentum=0.8),
        SGD(learning_rate=0.2, momentum=0.8, nesterov=False, weight_decay=1.5),
        SGD(learning_rate=0.2, momentum=0.8, weight_decay=0.3, independent_decay=True),
    ],
    ids=lambda t: f"{t.momentum}-{t.nesterov}-{t.weight_decay}-{t.independent_decay}",
)
def test_the_threshold_is_of_the_optimizer_that_trains(rule):
    s = rule.threshold()
    assert grows(rule, 1.03 * s) and not grows(rule, 0.97 * s)


def test_adam_is_stable_up_to_its_preconditioned_threshold():
    """epsilon so large that the preconditioner is epsilon: a linear update."""
    rule = Adam(learning_rate=0.3, momentum=0.6, epsilon=1e4, weight_decay=0.2)
    s = rule.threshold() * 1e4
    assert s == pytest.approx((2 - 0.3 * 0.2) * 1.6 / (0.4 * 0.3) * 1e4)
    assert grows(rule, 1.03 * s) and not grows(rule, 0.97 * s)


def test_the_rate_of_now_counts():
    rule = SGD(learning_rate=0.4, momentum=0.0, nesterov=False, schedule=Cosine(final=0.5))
    now = rate(rule, 100, 100)
    assert float(now) == pytest.approx(0.2)
    assert float(rule.threshold(now)) == pytest.approx(10)
    assert float(rate(rule, jnp.int32(0), 100, hyperparameters={"learning_rate": 1.0})) == 1.0
    with pytest.raises(ValueError, match="the schedule Cosine moves the learning rate: give the"):
        rule.threshold()


def test_independent_decay_follows_the_schedule_alone():
    rule = Adam(
        learning_rate=0.5, weight_decay=0.1, independent_decay=True, schedule=Linear(final=0.0)
    )
    halfway = rate(rule, 50, 100)
    wanted = (2 - 0.05) * 1.9 / (0.1 * 0.25)
    assert float(rule.threshold(halfway)) == pytest.approx(wanted)
    other = {"learning_rate": 1.0, "weight_decay": 0.1, "momentum": 0.9, "epsilon": 1.0}
    now = rate(rule, 50, 100, hyperparameters=other)
    found = rule.threshold(now, hyperparameters=other)
    assert float(found) == pytest.approx((2 - 0.05) * 1.9 / (0.1 * 0.5))


def test_replicas_have_their_own():
    rule = SGD(momentum=0.5, nesterov=False)
    h = {name: jnp.array([0.1, 0.2]) for name in ("learning_rate", "momentum", "weight_decay")}
    found = jax.vmap(lambda h: rule.threshold(hyperparameters=h))(h)
    wanted = [threshold(v, v, l2=v) for v in (0.1, 0.2)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"learning_rate": -1.0}, "learning_rate must be from 0 to inf, got -1.0"),
        ({"momentum": 1.5}, "momentum must be from 0 to 1, got 1.5"),
        ({"momentum": 1.0, "average": True}, "momentum must be < 1 for an average"),
        ({"l2": -0.1}, "l2 must be from 0 to inf, got -0.1"),
        ({"shrinkage": 2.5}, "shrinkage must be from 0 to 2, got 2.5"),
    ],
)
def test_bad_numbers(values, message):
    with pytest.raises(ValueError, match=message):
        threshold(**{"learning_rate": 0.1} | values)


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_layers_at_different_rates_have_no_one_threshold(kind):
    with pytest.raises(ValueError, match="base_fan_in must be 0 for a threshold, got 256"):
        kind(base_fan_in=256).threshold()
    with pytest.raises(ValueError, match="decay must be 'all' for a threshold, got 'matrices'"):
        kind(decay="matrices", weight_decay=0.1).threshold()
