"""Tasks are equal where what they are made of is equal, so that programs are found again."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from dynamics import losses, models, task
from dynamics.calls import by_value
from dynamics.task.multiscale import multiscale
from dynamics.types import Batch, Task
from experiments.early_learning_theory import basin, phases
from experiments.stability_theory import diagonal, perceptron, robust, sensing

KEY = jax.random.key(0)


def plain(width: int = 8, q: float = 0.7, **options: Any) -> Task:
    loss = functools.partial(losses.generalised_cross_entropy, q=q)
    return task.classification(
        models.make(models.MLP(width=width), 4), (6, 6), loss=loss, **options
    )


def product(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def other(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["w"] + 1


@dataclass(frozen=True)
class Scaled:
    """A model of one's own, by its number."""

    by: float

    def predict(self, params: Any, x: jax.Array) -> jax.Array:
        return self.by * x @ params["w"]


def applied(width: int) -> Any:
    return nn.Dense(width).apply


# what makes a task, then what makes others
CASES: dict[str, tuple[Any, ...]] = {
    "classification": (
        plain,
        functools.partial(plain, width=9),
        functools.partial(plain, q=0.8),
        functools.partial(plain, input_dtype=jnp.int32),
        lambda: task.of_dataset(models.make(models.MLP(width=8), 4), tiny.images()),
    ),
    "of_dataset": (
        lambda: task.of_dataset(models.make(models.Convnet(norm="batch"), 4), tiny.images()),
        lambda: task.of_dataset(models.make(models.Convnet(), 4), tiny.images()),
        lambda: task.of_dataset(models.make(models.Convnet(norm="batch"), 4), tiny.images(size=5)),
    ),
    "of_function": (
        lambda: task.of_function(product),
        lambda: task.of_function(other),
        lambda: task.of_function(product, init=lambda key: key),
        lambda: task.of_function(product, loss=losses.squared_error),
    ),
    "of_function, a method": (
        lambda: task.of_function(Scaled(2.0).predict),
        lambda: task.of_function(Scaled(3.0).predict),
    ),
    "of_function, a module": (
        lambda: task.of_function(applied(3)),
        lambda: task.of_function(applied(4)),
    ),
    "elr": (
        lambda: task.elr(plain(), 40, 4),
        lambda: task.elr(plain(), 41, 4),
        lambda: task.elr(plain(), 40, 5),
        lambda: task.elr(plain(9), 40, 4),
    ),
    "elr_plus": (
        lambda: task.elr_plus(plain(), 40, 4),
        lambda: task.elr_plus(plain(), 40, 4, decay=0.5),
        lambda: task.elr_plus(plain(), 40, 4, reweight=True),
        lambda: task.elr(plain(), 40, 4),
    ),
    "z_loss": (
        lambda: task.z_loss(plain()),
        lambda: task.z_loss(plain(9)),
        lambda: task.z_loss(task.z_loss(plain())),
        plain,
    ),
    "multiscale": (
        lambda: multiscale(plain(), scales=[0.5, 1.0]),
        lambda: multiscale(plain(), scales=[0.5]),
        lambda: multiscale(plain(), scales=[0.5, 1.0], rho=0.5),
        lambda: multiscale(plain(), scales=[0.5, 1.0], per="image"),
    ),
    "basin": (lambda: basin.logits(3), lambda: basin.logits(4)),
    "phases": (lambda: phases.logistic(3), lambda: phases.logistic(4)),
    "diagonal": (lambda: diagonal.net(3), lambda: diagonal.net(4)),
    "perceptron": (lambda: perceptron.logistic(3), lambda: perceptron.logistic(4)),
    "robust": (
        lambda: robust.measured(3, 2, "square"),
        lambda: robust.measured(3, 2, "absolute"),
        lambda: robust.measured(3, 3, "square"),
    ),
    "sensing": (
        lambda: sensing.factorisation(3, 2, symmetric=True),
        lambda: sensing.factorisation(3, 2, symmetric=False),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_parts_make_equal_tasks(name: str) -> None:
    make, *others = CASES[name]
    one, again = make(), make()
    assert one == again and hash(one) == hash(again)
    for field, mine, same in zip(Task._fields, one, again, strict=True):
        assert mine == same and hash(mine) == hash(same), field
    for i, different in enumerate(others):
        assert one != different(), i
        assert one.loss != different().loss or one.init != different().init, i


def test_equal_tasks_are_traced_once() -> None:
    traces = []

    def counted(logits: Any, labels: Any, *, scale: float) -> Any:
        traces.append(scale)
        return scale * losses.cross_entropy(logits, labels)

    def made(scale: float) -> Task:
        net = models.make(models.MLP(width=3, depth=1), 4)
        return task.elr(
            task.classification(net, (5,), loss=functools.partial(counted, scale=scale)), 8, 4
        )

    first, second, third = made(1.0), made(1.0), made(2.0)
    assert first.loss is not second.loss
    params, extras = first.init(KEY, {})
    batch = Batch(x=jnp.ones((8, 5)), y=jnp.zeros(8, jnp.int32), index=jnp.arange(8))
    h = {"elr_lambda": jnp.float32(1), "elr_beta": jnp.float32(0.5)}
    run = lambda net: jax.jit(net.loss)(params, extras, batch, KEY, h)[1][1].loss  # noqa: E731
    one, again, twice = run(first), run(second), run(third)
    assert traces == [1.0, 2.0]
    np.testing.assert_array_equal(one, again)
    np.testing.assert_allclose(twice, 2 * one, rtol=1e-6)


class Fixed(nn.Module):
    """A module without a hash."""

    w: jax.Array

    def __call__(self, x: Any, *, train: bool) -> Any:
        return x @ self.w


def test_what_has_no_hash_is_equal_to_itself_alone() -> None:
    module = Fixed(jnp.ones((5, 4)))
    one, other = (task.classification(module, (5,)) for _ in range(2))
    assert one == one and one != other
    assert isinstance(hash(one), int) and isinstance(hash(task.z_loss(one)), int)
    assert task.z_loss(one) == task.z_loss(one)
    batch = Batch(x=jnp.ones((2, 5)), y=jnp.zeros(2, jnp.int32), index=jnp.arange(2))
    np.testing.assert_allclose(jax.jit(one.evaluate)({}, {}, batch, {}).logits, 5.0)
    table = functools.partial(product, {"w": jnp.ones(3)})
    assert by_value(table) is table


def test_what_python_compares_by_itself() -> None:
    """The control: bound methods and partials of equal parts are unequal, by_value's are not."""
    methods = [Scaled(2.0).predict for _ in range(2)]
    assert methods[0] != methods[1] and by_value(methods[0]) == by_value(methods[1])
    partials = [functools.partial(losses.label_smoothing, epsilon=0.1) for _ in range(2)]
    assert partials[0] != partials[1] and by_value(partials[0]) == by_value(partials[1])
    assert by_value(product) is product and by_value(None) is None
    assert by_value(methods[0]).__name__ == "predict"
    outer = functools.partial(
        Scaled(2.0).predict, {"w": jnp.ones((1, 1))}
    )  # of a method, with an argument of no hash
    assert by_value(outer) is outer and outer(jnp.ones((1, 1))) == 2.0
