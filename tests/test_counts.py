"""Numbers of the wrong kind are refused by the name of the argument, before anything is sliced."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from tiny import batches, problem

from dynamics import counts, curvature, fit, mesh, scores, step
from dynamics.data.stream import resident
from dynamics.probes import Evaluate

FEW = settings(derandomize=True, deadline=None, max_examples=100)
WHOLE = [int, np.int32, np.int64, np.uint8, np.array]


@FEW
@given(st.integers(0, 100), st.sampled_from(WHOLE), st.integers(0, 3))
def test_whole_numbers_of_any_kind_are_taken_from_the_least_on(number, kind, least):
    if number >= least:
        counts.check(least, count=kind(number))
    else:
        with pytest.raises(ValueError, match=f"count must be at least {least}, got {number}"):
            counts.check(least, count=kind(number))


@FEW
@given(
    st.floats()
    | st.text()
    | st.booleans()
    | st.complex_numbers()
    | st.just(Fraction(3))
    | st.lists(st.integers())
    | st.floats(0, 9).map(np.float32)
)
def test_what_is_no_whole_number_is_refused_by_name(value):
    with pytest.raises(ValueError, match="batch_size must be a whole number, got") as error:
        counts.check(count=3, batch_size=value)
    assert type(value).__name__ in str(error.value)


def test_none_is_no_count():
    counts.check(every=None, count=1)


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """As users call it: without the type checker of the tests."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


S = np.linspace(0.0, 1.0, 20)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("count", lambda: scores.keep(S, 0.3 * 20, "highest")),  # pyright: ignore
        ("count", lambda: scores.random(20, 10.0)),  # pyright: ignore
        ("n", lambda: scores.random(20.0, 10)),  # pyright: ignore
        ("count", lambda: scores.quotas(np.arange(20) % 2, 9.0)),  # pyright: ignore
        ("offset", lambda: scores.window(S, 5, offset=2.0)),  # pyright: ignore
        ("drop", lambda: scores.window(S, 5, drop=1.5)),  # pyright: ignore
        ("seed", lambda: scores.window(S, 5, drop=1, seed=-1)),
        ("strata", lambda: scores.coverage_centric(S, 5, cutoff=0.1, strata=4.0)),  # pyright: ignore
        ("mesh axis data", lambda: mesh.make(1, 2.0)),  # pyright: ignore
    ],
)
def test_functions_on_the_host_name_the_argument(name: str, call: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be (a whole number|at least 0), got"):
        call()


P = problem("mlp")
DEVICES = mesh.make()
KEYS = jax.random.split(jax.random.key(0), 1)


def trained(num_steps: Any = 1, **options: Any) -> None:
    state = fit.init(P.task, P.optimizer, KEYS, P.rule.hyperparameters(), DEVICES)
    fit.fit(P.task, P.optimizer, state, batches(P, 1), num_steps, DEVICES, **options)


def scored(state: Any, **options: Any) -> None:
    scores.over_examples(scores.el2n, P.task, state, P.data, **options)


def member() -> Any:
    return step.init(P.task, P.optimizer, KEYS[0], P.rule.hyperparameters())


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("num_steps must be a whole number, got 2.0", lambda: trained(2.0)),
        ("num_steps must be at least 0, got -1", lambda: trained(-1)),
        ("record_every must be a whole number", lambda: trained(record_every=0.5)),
        ("checkpoint_every must be a whole number", lambda: trained(checkpoint_every="1")),
        ("accumulate must be a whole number", lambda: trained(accumulate=2.0)),
        ("every of 'test' must be a whole number", lambda: trained(probes=[Evaluate(2.0)])),
        ("every of 'test' must be a whole", lambda: trained(probes=[Evaluate((0, 1.5))])),
        ("batch_size must be a whole number, got 64.0", lambda: scored(member(), batch_size=64.0)),
        ("batch_size must be at least 1, got 0", lambda: scored(member(), batch_size=0)),
        ("state must be a TrainState, got dict", lambda: scored(member().params)),
        (r"keys must be one for each member, \[K\], got shape \(\)",
         lambda: fit.init(P.task, P.optimizer, KEYS[0], P.rule.hyperparameters(), DEVICES)),
        (r"rows must be \[1, m\], one row for each member, got \(5,\)",
         lambda: resident(P.data, 4, 1, rows=np.arange(5))),
        ("batch_size must be a whole number", lambda: resident(P.data, 4.0, 1)),
        ("num_replicas must be a whole number", lambda: resident(P.data, 4, 1.0)),
    ],
)  # fmt: skip
def test_training_and_scoring_name_the_argument_before_anything_is_compiled(
    words: str, call: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fit, "Chunk", None)
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("num must be a whole number", lambda a, k: curvature.density(a, k, num=2.0)),
        ("k must be a whole number", lambda a, k: curvature.density(a, k, num=2, k=3.5)),
        ("num must be a whole number", lambda a, k: curvature.trace(a, k, num=4.0)),
        ("probe_batch must be a whole number", lambda a, k: curvature.trace(a, k, probe_batch=2.0)),
        ("most must be a whole number", lambda a, k: curvature.converge(a, k, most=9.0)),
    ],
)
def test_curvature_names_the_argument(words: str, call: Any) -> None:
    identity = curvature.Operator(lambda batch, v: v, None, jnp.zeros(3))
    with pytest.raises(ValueError, match=words):
        call(identity, jax.random.key(0))
