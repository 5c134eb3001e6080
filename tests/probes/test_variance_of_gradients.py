"""VoG during a run: against gradients of the states it saw, and that it survives being killed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from references import kept
from references import vog as reference

from dynamics import mesh, models, scores, task
from dynamics.data.rows import take
from dynamics.probes import VarianceOfGradients
from dynamics.record import Recorder
from dynamics.types import Batch, Results

N, STEPS = 40, (0, 3, 11, 20)


def probe(every: Any = STEPS, **options: Any) -> VarianceOfGradients:
    return VarianceOfGradients(every, batch_size=16, **options)


@functools.cache
def watched() -> tuple[Any, Results]:
    """Three probes: the default, the probability's, and replicas with labels of their own."""
    p = tiny.problem("mlp")
    probes = [
        kept.Kept(STEPS),
        probe(),
        probe(name="p", target="probability"),
        probe(name="own", labels=own_labels(p)),
    ]
    return p, tiny.run(p, mesh.make(), 2, probes=probes)


def own_labels(p: Any) -> np.ndarray:
    return np.stack([p.data.y, (p.data.y + 1) % 4])


def found(results: Results, name: str = "vog") -> dict[int, np.ndarray]:
    """Step -> f32[K, N]."""
    array = results.arrays[name, "score"]
    assert array.dims == ("step", "member", "example")
    return dict(zip(array.coords["step"].tolist(), array.values, strict=True))


def batch(p: Any, labels: np.ndarray) -> Batch:
    data = p.data.replace(y=labels)
    return take(jax.tree.map(jnp.asarray, data), jnp.arange(N, dtype=jnp.int32))


@pytest.mark.parametrize(
    ("name", "target"), [("vog", "logit"), ("p", "probability"), ("own", "logit")]
)
def test_against_the_gradients_of_the_states_it_saw(name: str, target: str) -> None:
    p, results = watched()
    assert [*found(results, name)] == [*STEPS]
    np.testing.assert_array_equal(found(results, name)[0], np.zeros((2, N)))
    for replica in range(2):
        labels = own_labels(p)[replica] if name == "own" else p.data.y
        gradients = [
            reference.gradients(
                p.task, kept.state(results, at, replica), batch(p, labels), target=target
            )
            for at in STEPS
        ]
        for i, at in enumerate(STEPS[1:], start=2):
            values = found(results, name)[at][replica]
            wanted = reference.vog(gradients[:i])
            np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5 * wanted.max())


def test_watching_changes_no_bit_and_the_order_is_that_of_the_dataset() -> None:
    p, results = watched()
    unwatched = tiny.run(p, mesh.make(), 2)
    for x, y in zip(tiny.leaves(unwatched), tiny.leaves(results), strict=True):
        np.testing.assert_array_equal(x, y)
    rows = np.random.default_rng(0).permutation(N)
    turned = p.data.replace(x=p.data.x[rows], y=p.data.y[rows])
    probes = [VarianceOfGradients(STEPS, on="turned", batch_size=7)]
    again = found(tiny.run(p, mesh.make(), 2, probes=probes, data={"turned": turned}))
    for at, values in found(results).items():
        largest = values.max()
        np.testing.assert_allclose(again[at], values[:, rows], rtol=1e-4, atol=1e-5 * largest)


def test_a_run_cut_and_continued_has_the_same_bits(tmp_path: Any) -> None:
    p, whole = watched()
    for cut in (5, 13, 20):
        part, store = p._replace(num_steps=cut), Recorder(tmp_path, ())
        results = tiny.run(part, mesh.make(), 2, checkpoint_every=2, store=store, probes=[probe()])
    assert found(results).keys() == found(whole).keys()
    for at, value in found(whole).items():
        np.testing.assert_array_equal(found(results)[at], value)


@pytest.mark.parametrize(("shape", "how"), [((2, 1, 1), "dispatch"), ((2, 2, 2), "vmap")])
def test_meshes_and_ways_agree(shape: Any, how: Any) -> None:
    p, expected = watched()
    results = tiny.run(p, mesh.make(*shape), 2, how=how, probes=[probe()])
    for at, value in found(expected).items():
        np.testing.assert_allclose(found(results)[at], value, rtol=1e-4, atol=1e-5 * value.max())


def test_an_interval_counts_the_first_and_the_last_step() -> None:
    p, _ = watched()
    results = tiny.run(p, mesh.make(), 2, probes=[probe(8), probe((8, 16), name="two")])
    one, two = found(results), found(results, "two")
    assert [*one] == [0, 8, 16, 20] and [*two] == [8, 16]
    np.testing.assert_array_equal(two[8], np.zeros((2, N)))
    assert (two[16] > 0).all()
    assert np.abs(two[16] - one[16]).max() > 0


def test_vog_of_a_linear_model_depends_on_the_class_alone() -> None:
    """E12, through a run: 0 / 0 is 0."""
    p, _ = watched()
    p = p._replace(task=task.of_dataset(models.make(models.Linear(), 4), p.data))
    results = tiny.run(p, mesh.make(), 2, probes=[probe()])
    values = found(results)[20]
    assert (values > 0).all() and all(len(set(row)) == 4 for row in values)
    np.testing.assert_array_equal(scores.class_normalised(values, p.data.y), np.zeros((2, N)))


def test_tokens_are_refused() -> None:
    p = tiny.problem("transformer")
    with pytest.raises(ValueError, match="needs inputs that are numbers, got int32"):
        tiny.run(p, mesh.make(), 2, probes=[probe((0,))])
