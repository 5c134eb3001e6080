"""The path between pairs of replicas, measured in a run: against the same path walked by hand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from references import ghost as reference
from references import kept

from dynamics import landscape, mesh, population
from dynamics.data.rows import take
from dynamics.probes.path import Path, alphas, whole
from dynamics.record import Recorder
from dynamics.types import Results

AT, POINTS, REPLICAS = (0, 12), 5, 4


def probes(p: Any, **options: Any) -> list[Any]:
    options = {"points": POINTS, "batch_size": 16, "batches": 3} | options
    return [Path(AT, **options), kept.Kept(AT)]


def problem(kind: str) -> Any:
    return tiny.problem(kind, num_steps=12)


@functools.cache
def watched(kind: str) -> tuple[Any, Results]:
    p = problem(kind)
    train = "train" if kind == "convnet" else None
    return p, tiny.run(p, mesh.make(), REPLICAS, probes=probes(p, train=train))


def losses(results: Results, at: int) -> np.ndarray:
    """f32[K, A, N] after ``at`` steps."""
    return results.arrays["path", "loss"].at(step=at).values


def walked(p: Any, results: Results, at: int, pair: int, labels: Any = None) -> dict[str, Any]:
    """The whole path of a pair, [points, N], one place and one batch at a time."""
    ends = [kept.state(results, at, k) for k in (pair, pair + REPLICAS // 2)]
    data = jax.tree.map(jnp.asarray, p.data)
    everything = take(data, jnp.arange(len(p.data)))
    if labels is not None:
        everything = everything.replace(y=jnp.asarray(labels))
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(p.data))
    train, evaluate = reference.jit(p.task.loss), reference.jit(p.task.evaluate)
    found: dict[str, list[Any]] = {"loss": [], "accuracy": []}
    for alpha in np.linspace(0, 1, POINTS):
        here = landscape.between(*ends, alpha)
        extras = here.extras
        for start in (0, 16, 32 % (len(order) - 16 + 1)) if jax.tree.leaves(extras) else ():
            rows = jnp.asarray(order[start : start + 16])
            key = jax.random.key(0)
            _, (extras, _) = train(here.params, extras, take(data, rows), key, {})
        aux = evaluate(here.params, extras, everything, {})
        found["loss"].append(aux.loss)
        correct = (aux.logits.argmax(axis=-1) == everything.y).astype(np.float32)
        found["accuracy"].append(correct.reshape(len(p.data), -1).mean(axis=1))
    return {name: np.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("kind", ["mlp", "convnet", "transformer"])
def test_against_a_walk_by_hand(kind: str) -> None:
    p, results = watched(kind)
    for at in AT:
        paths = {}
        for name in ("loss", "accuracy"):
            halves = results.arrays["path", name].at(step=at)
            assert halves.dims == ("member", "place", "example")
            assert halves.values.shape == (REPLICAS, POINTS // 2 + 1, len(p.data))
            paths[name] = whole(halves.values)
            assert paths[name].shape == (POINTS, REPLICAS // 2, len(p.data))
        for pair in range(REPLICAS // 2):
            wanted = walked(p, results, at, pair)
            np.testing.assert_allclose(paths["loss"][:, pair], wanted["loss"], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(paths["accuracy"][:, pair], wanted["accuracy"])


def test_the_two_computations_of_the_middle_agree() -> None:
    _, results = watched("mlp")
    for at in AT:
        middle = losses(results, at)[:, -1]
        np.testing.assert_allclose(middle[:2], middle[2:], rtol=1e-5, atol=1e-6)


def test_barriers_of_pairs() -> None:
    """Of means over any examples; none between a state and itself."""
    p, results = watched("mlp")
    values = whole(losses(results, 12))
    hard = [0, 5, 7]
    found = landscape.barrier(values[:, :, hard].mean(axis=2), alphas(POINTS))
    assert found.shape == (2,) and (found >= 0).all()
    state = tiny.start(p, mesh.make(), 4)
    twice = population.take(state, [0, 1, 0, 1])
    same = tiny.run(p, mesh.make(), 4, state=twice, probes=probes(p)[:1])
    for at in AT:
        values = whole(losses(same, at)).mean(axis=2)
        np.testing.assert_array_equal(landscape.barrier(values, alphas(POINTS)), np.zeros(2))


def test_replicas_with_labels_of_their_own() -> None:
    """Along the half that a replica computes, its own count."""
    p = problem("mlp")
    labels = np.stack([(p.data.y + k % 2) % 4 for k in range(REPLICAS)])
    results = tiny.run(p, mesh.make(), REPLICAS, probes=probes(p, labels=labels))
    for pair in range(2):
        wanted = walked(p, results, 12, pair, labels[pair])
        found = whole(losses(results, 12))[:, pair]
        np.testing.assert_allclose(found, wanted["loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
@pytest.mark.parametrize(("shape", "how"), [((2, 1, 1), "dispatch"), ((4, 1, 1), "vmap")])
def test_meshes_and_ways_agree(kind: str, shape: Any, how: Any) -> None:
    p, expected = watched(kind)
    train = "train" if kind == "convnet" else None
    results = tiny.run(p, mesh.make(*shape), REPLICAS, how=how, probes=probes(p, train=train)[:1])
    for at in AT:
        np.testing.assert_allclose(losses(results, at), losses(expected, at), rtol=1e-4, atol=1e-5)


def test_watching_changes_no_bit_and_a_run_can_be_continued(tmp_path: Any) -> None:
    p, expected = watched("mlp")
    unwatched = tiny.run(p, mesh.make(), REPLICAS)
    for x, y in zip(tiny.leaves(unwatched), tiny.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)
    for cut in (5, 12):
        store, part = Recorder(tmp_path, ()), p._replace(num_steps=cut)
        results = tiny.run(
            part, mesh.make(), REPLICAS, checkpoint_every=5, store=store, probes=probes(p)
        )
    assert results.arrays.keys() == expected.arrays.keys()
    for name, value in expected.arrays.items():
        tiny.assert_array(results.arrays[name], value, str(name))


def test_whole() -> None:
    """Places of pair k: those of k, the middle of both, those of k + K/2 backwards."""
    halves = np.array([[[0], [1], [2]], [[9], [8], [4]]])  # [K = 2, A = 3, N = 1]
    np.testing.assert_array_equal(whole(halves)[:, 0, 0], [0, 1, 3, 8, 9])
    several = np.arange(4 * 3 * 2).reshape(4, 3, 2)
    found = whole(several)
    assert found.shape == (5, 2, 2) and found.dtype == np.float64
    for pair in range(2):
        for example in range(2):
            one = several[[pair, pair + 2]][:, :, [example]]
            np.testing.assert_array_equal(found[:, pair, example], whole(one)[:, 0, 0])


@pytest.mark.parametrize(
    ("replicas", "options", "message"),
    [
        (3, {}, "pairs of members and an odd number of points, got 3 members and 5 points"),
        (2, {"points": 4}, "got 2 members and 4 points"),
        (2, {"points": 1}, "got 2 members and 1 points"),
    ],
)
def test_refusals(replicas: int, options: Any, message: str) -> None:
    p = problem("mlp")
    with pytest.raises(ValueError, match=message):
        tiny.run(p, mesh.make(), replicas, probes=probes(p, **options))


def test_batch_statistics_need_the_training_data() -> None:
    p = problem("convnet")
    with pytest.raises(ValueError, match="give the training data: batch statistics"):
        tiny.run(p, mesh.make(), 2, probes=probes(p))
