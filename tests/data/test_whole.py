"""Full-batch descent: every step all examples, each replica its own where it has some."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dynamics import fit, mesh
from dynamics.data.stream import resident, whole
from dynamics.types import Dataset

K = 2
DATA = tiny.images()
N = len(DATA)
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.integers(0, 256, (K, *DATA.x.shape)).astype(np.uint8)
LABELS = GENERATOR.integers(0, 4, (K, N)).astype(np.int32)


def batches(made: Any, step: int = 0) -> Any:
    keys = jax.random.split(jax.random.key(0), K)
    return [
        made.batch(
            made.shared, jax.tree.map(lambda x, s=s: x[s], made.own), (), keys[s], jnp.int32(step)
        )
        for s in range(K)
    ]


def normalised(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.float64) - DATA.mean) / DATA.std


def test_every_step_has_all_examples_in_their_order() -> None:
    made = whole(DATA, K)
    assert made.batch_size == N and made.own == {} and made.host is None
    for step in (0, 5):
        for batch in batches(made, step):
            np.testing.assert_array_equal(batch.index, np.arange(N))
            np.testing.assert_array_equal(batch.y, DATA.y)
            np.testing.assert_allclose(batch.x, normalised(DATA.x), rtol=1e-5, atol=1e-6)
            assert batch.x.dtype == jnp.float32 and batch.y.dtype == batch.index.dtype == jnp.int32
            assert batch.weight is None


def test_inputs_of_its_own_take_the_place_of_those_shared() -> None:
    made = whole(DATA, K, inputs=INPUTS, labels=LABELS)
    assert "x" not in made.shared  # they lie nowhere twice
    for s, batch in enumerate(batches(made)):
        np.testing.assert_allclose(batch.x, normalised(INPUTS[s]), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.y, LABELS[s])
    for s, batch in enumerate(batches(whole(DATA, K, labels=LABELS))):
        np.testing.assert_allclose(batch.x, normalised(DATA.x), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(batch.y, LABELS[s])


def test_tokens_pass_as_integers() -> None:
    tokens = tiny.tokens()
    own = np.stack([tokens.x, 7 - tokens.x])
    for s, batch in enumerate(batches(whole(tokens, K, inputs=own))):
        assert batch.x.dtype == batch.y.dtype == jnp.int32
        np.testing.assert_array_equal(batch.x, own[s])
        np.testing.assert_array_equal(batch.y, tokens.y)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["shared labels", "own labels"])
def test_it_trains_as_a_batch_of_all_examples_does(labels: Any) -> None:
    """Up to the order of the sum; two permutations of ``resident`` differ as much."""
    p = tiny.problem("mlp", num_steps=5)
    one = mesh.make(1)
    found = [
        tiny.run(p, one, K, stream=made)
        for made in (whole(DATA, K, labels=labels), resident(DATA, N, K, labels=labels))
    ]
    for a, b in zip(*map(tiny.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    first = [run.rows.filter(run.rows["step"] == 0)["loss"] for run in found]
    np.testing.assert_allclose(*first, rtol=1e-6)


def test_a_replica_trains_as_if_it_were_alone() -> None:
    p = tiny.problem("mlp", num_steps=5)
    one, keys = mesh.make(1), jax.random.split(jax.random.key(0), K)

    def trained(keys: Any, made: Any) -> Any:
        scalars = {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.0}
        state = fit.init(p.task, p.optimizer, keys, scalars, one)
        return tiny.leaves(fit.fit(p.task, p.optimizer, state, made, 5, one))

    together = trained(keys, whole(DATA, K, inputs=INPUTS, labels=LABELS))
    own = Dataset(INPUTS[1], LABELS[1], DATA.mean, DATA.std)
    for a, b in zip(together, trained(keys[1:], whole(own, 1)), strict=True):
        np.testing.assert_allclose(a[1:], b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": INPUTS[:1]}, r"inputs must have shape \(2, 40, 6, 6\), got \(1, 40, 6, 6\)"),
        ({"inputs": INPUTS[:, :9]}, r"inputs must have shape \(2, 40, 6, 6\), got \(2, 9, 6, 6\)"),
        ({"labels": LABELS[:, 1:]}, r"labels must have shape \(2, 40\), got \(2, 39\)"),
    ],
)
def test_shapes_that_do_not_fit(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole(DATA, K, **options)
