"""A probe from one function: against the function itself."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dynamics import mesh, population
from dynamics.data import subset
from dynamics.data.rows import take
from dynamics.probes import Measure
from dynamics.record import Recorder
from dynamics.types import Batch, Task, TrainState

DATA = subset(tiny.images(), slice(16))


def summary(
    task: Task, state: TrainState, batch: Batch, *, power: float = 1.0
) -> dict[str, jax.Array]:
    """A number, a vector and a matrix."""
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    probabilities = jax.nn.softmax(aux.logits) ** power
    return {
        "loss": aux.loss.mean(),
        "share": probabilities.mean(axis=0),
        "together": probabilities.T @ probabilities / len(batch.index),
    }


def run(p: tiny.Problem, here: mesh.Mesh, **options: Any) -> Any:
    every = [
        Measure(summary, 3, "plain", on="some", dims=("class", "other")),
        Measure(functools.partial(summary, power=2.0), (6,), "squared", on="some"),
    ]
    return tiny.run(p, here, 2, probes=every, data={"some": DATA}, **options)


@functools.cache
def watched() -> tuple[tiny.Problem, Any]:
    p = tiny.problem("mlp", num_steps=6)
    return p, run(p, mesh.make())


def test_it_is_the_function_of_each_member_and_all_of_the_data() -> None:
    p, results = watched()
    batch = take(jax.tree.map(jnp.asarray, DATA), slice(None))
    assert results.measured["plain"].columns == ["step", "member", "loss"]
    assert results.measured["plain"]["step"].to_list() == [0, 0, 3, 3, 6, 6]
    assert results.arrays["plain", "together"].dims == ("step", "member", "class", "other")
    assert results.arrays["squared", "share"].dims == ("step", "member", "axis_0")
    for k in range(2):
        one = population.take(results.state, k)
        for name, power in (("plain", 1.0), ("squared", 2.0)):
            wanted = summary(p.task, one, batch, power=power)
            loss = results.measured[name]["loss"][-2 + k]
            np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
            for metric in ("share", "together"):
                found = results.arrays[name, metric].at(step=6, member=k).values
                np.testing.assert_allclose(found, wanted[metric], rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "how"), [((2, 1, 1), "dispatch"), ((1, 4, 1), "map"), ((2, 2, 2), "vmap")]
)
def test_meshes_and_ways_agree(shape: Any, how: Any) -> None:
    """Also where the examples are split over devices."""
    p, expected = watched()
    found = run(p, mesh.make(*shape), how=how)
    for name, frame in expected.measured.items():
        assert found.measured[name].select("step", "member").equals(frame.select("step", "member"))
        np.testing.assert_allclose(found.measured[name]["loss"], frame["loss"], rtol=1e-5)
    assert found.arrays.keys() == expected.arrays.keys()
    for key, array in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[key].values, array.values, rtol=1e-5, atol=1e-6)


def test_watching_changes_no_bit_and_a_run_can_be_continued(tmp_path: Any) -> None:
    p, expected = watched()
    unwatched = tiny.run(p, mesh.make(), 2)
    for x, y in zip(tiny.leaves(unwatched), tiny.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    assert unwatched.rows.equals(expected.rows)
    for cut in (3, 6):
        results = run(p._replace(num_steps=cut), mesh.make(), store=Recorder(tmp_path, ()))
    tiny.assert_equal(results, expected)
