"""Weights in use, one way a case: checked against the gradients themselves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from references import ghost as reference

from dynamics import ghost
from dynamics.ghost import algebra

B, V = 5, 7


class Case(NamedTuple):
    """``predict(params, x)`` of one example; ``factored``: leaves whose gradients are not made."""

    predict: Any
    params: Any
    x: Any
    factored: str
    made: bool | None = None  # whether A^T D is made for the norm of the one factored leaf


class Cases:
    """A table of them, and the numbers they are of."""

    def __init__(self, seed: int):
        self.table: dict[str, Case] = {}
        self._generator = np.random.default_rng(seed)

    def normal(self, *shape: int) -> jax.Array:
        return jnp.asarray(self._generator.normal(size=shape) / 2, jnp.float32)

    def inputs(self, *shape: int) -> jax.Array:
        return 2 * self.normal(B, *shape)

    def tokens(self, *shape: int, low: int = 0, high: int = V) -> jax.Array:
        return jnp.asarray(self._generator.integers(low, high, (B, *shape)), jnp.int32)

    def case(
        self, name: str, params: Any, x: Any, factored: str = "w", made: bool | None = None
    ) -> Any:
        def add(predict: Any) -> Any:
            assert name not in self.table
            self.table[name] = Case(predict, params, x, factored, made)
            return predict

        return add


def loss(predict: Any) -> Any:
    def of_one(params: Any, shared: Any, example: Any) -> jax.Array:
        x, target = example
        y = predict(params, x).astype(jnp.float32)
        return jnp.sum(jnp.sin(y + target)) + jnp.sum(y) ** 2 / (1 + y.size)

    return of_one


def check(c: Case, monkeypatch: Any) -> None:
    """Lengths, products with the examples the other way round, what is factored and how."""
    made, real = [], algebra._made
    monkeypatch.setattr(algebra, "_made", lambda rows: made.append(rows) or real(rows))
    examples = c.x, jnp.linspace(-1.0, 1.0, B)

    @reference.jit
    def run(params: Any, examples: Any) -> Any:
        turned = jax.tree.map(lambda x: x[::-1], examples)
        one, other = (ghost.factors(loss(c.predict), params, {}, e) for e in (examples, turned))
        assert set(one.parts) == set(c.factored.split())
        norms = ghost.norms(one)
        assert c.made is None or c.made == bool(made)
        return norms, ghost.products(one, other)

    norms, products = run(c.params, examples)
    each = reference.gradients(loss(c.predict), c.params, {}, examples)
    np.testing.assert_allclose(norms, reference.norms(each), rtol=1e-5)
    largest = np.abs(each @ each.T).max()
    np.testing.assert_allclose(products, each @ each[::-1].T, rtol=1e-5, atol=1e-6 * largest)
