"""Probes folded over every step: scripted sequences, a slow reference, and that nothing changes."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from references import presentations as reference

from dynamics import mesh, step
from dynamics.data.rows import take
from dynamics.data.stream import resident
from dynamics.probes import AreaUnderMargin, Cartography, Forgetting
from dynamics.record import Recorder
from dynamics.types import Aux, Results, TrainState

PROBES = (Forgetting, AreaUnderMargin, Cartography)
N = 40  # examples of the tiny problems
INF, NAN = math.inf, math.nan


def probes(every: Any = 7, n: int = N) -> list[Any]:
    return [make(n, every) for make in PROBES]


# ---- scripted sequences -------------------------------------------------------------------------


@functools.cache
def compiled(probe: Any) -> Any:
    return jax.jit(probe.fold, compiler_options={"xla_backend_optimization_level": 0})


def folded(probe: Any, steps: Any) -> dict[str, np.ndarray]:
    """The metrics after the (index, logits, labels) of each step."""
    carry, metrics = probe.init(step.given({})), {}
    for index, z, y in steps:
        z, y = jnp.asarray(z, jnp.float32), jnp.asarray(y, jnp.int32)
        aux = Aux(loss=jnp.zeros(len(y)), logits=z, y=y, index=jnp.asarray(index, jnp.int32))
        carry, metrics = compiled(probe)(carry, aux)
    return {f"{probe.name}.{name}": np.asarray(value) for name, value in metrics.items()}


def script(**answers: str) -> Any:
    """Steps at which example i is right where its word has a 1, and absent where it has a dot."""
    words = list(answers.values())
    for letters in zip(*words, strict=True):
        index = [i for i, letter in enumerate(letters) if letter != "."]
        yield index, [[0, 1] if letters[i] == "1" else [1, 0] for i in index], [1] * len(index)


def test_forgetting_of_scripted_sequences() -> None:
    words = {
        "forgotten twice": "010110",
        "never correct": "000000",
        "always correct": "111111",
        "learned, kept": "011111",
        "correct first, then not": "100000",
        "not in every batch": "1.0.1.",  # consecutive presentations, not steps
        "seen once, right": ".1....",
        "seen once, wrong": "...0..",
        "never presented": "......",
        "back and forth": "101010",
    }
    found = folded(Forgetting(len(words), 1), script(**words))["forgetting.events"]
    np.testing.assert_array_equal(found, [2, INF, 0, 0, 1, 1, 0, INF, NAN, 3])
    assert found.dtype == np.float32


def test_forgetting_so_far() -> None:
    probe = Forgetting(1, 1)
    found = [
        folded(probe, list(script(word="0010110"))[:t])["forgetting.events"] for t in range(1, 8)
    ]
    np.testing.assert_array_equal(np.ravel(found), [INF, INF, 0, 1, 1, 1, 2])


def test_forgetting_of_several_labels_is_refused() -> None:
    p = tiny.problem("transformer")
    with pytest.raises(ValueError, match=r"forgetting needs one label an example, got .*\(8, 6\)"):
        tiny.run(p, mesh.make(), 2, probes=[Forgetting(N, 1)])


def test_margins_and_confidence_of_scripted_sequences() -> None:
    """One example, three presentations: logits (0, m) and label 1."""
    margins = np.array([2.0, -1.0, 5.0])
    steps = [([1], [[0, m]], [1]) for m in margins]
    found = folded(AreaUnderMargin(3, 1), steps) | folded(Cartography(3, 1), steps)
    p = 1 / (1 + np.exp(-margins))
    wanted = {
        "aum.margin": margins.mean(),
        "cartography.confidence": p.mean(),
        "cartography.variability": p.std(),
        "cartography.correctness": 2 / 3,
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], [NAN, value, NAN], rtol=1e-6, err_msg=name)


def test_the_spread_of_what_hardly_changes_keeps_its_digits() -> None:
    """sqrt(E p^2 - (E p)^2) would be noise here: p is 0.9 with steps of 1e-4 and 2e-4."""
    p = 0.9 + np.array([0, 1e-4, -2e-4, 1e-4] * 50)
    steps = [([0], [[0, z]], [1]) for z in np.log(p / (1 - p))]
    found = folded(Cartography(1, 1), steps)
    np.testing.assert_allclose(found["cartography.variability"], p.std(), rtol=1e-3)
    np.testing.assert_allclose(found["cartography.confidence"], p.mean(), rtol=1e-6)


def random_steps(seed: int = 0, n: int = 9, k: int = 4, repeat: bool = False) -> list[Any]:
    generator = np.random.default_rng(seed)
    y = generator.integers(0, k, n)
    steps = []
    for _ in range(12):
        index = generator.integers(0, n, 6) if repeat else generator.permutation(n)[: n // 2]
        steps.append((index, generator.normal(0, 3, (len(index), k)).astype(np.float32), y[index]))
    return steps


def assert_same(a: dict[Any, np.ndarray], b: dict[Any, np.ndarray], rtol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=1e-6, err_msg=str(name))


@pytest.mark.parametrize("repeat", [False, True], ids=["different", "with repeats"])
@pytest.mark.parametrize("make", PROBES)
def test_random_sequences_against_the_list_of_presentations(make: Any, repeat: bool) -> None:
    """An example that is several times in a batch is presented several times, in its order."""
    steps = random_steps(repeat=repeat)
    assert repeat == any(len(set(index)) < len(index) for index, _, _ in steps)
    found = folded(make(9, 1), steps)
    for name, values in found.items():
        seen = [reference.history(steps, i) for i in range(9)]
        wanted = [reference.METRICS[name](list(h)) for h in seen]
        np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("make", PROBES)
def test_invariances(make: Any) -> None:
    """Order inside a batch, a constant added to an example's logits, names of the classes."""
    steps, probe = random_steps(1), make(9, 1)
    before = folded(probe, steps)
    turned = [(index[::-1], z[::-1], y[::-1]) for index, z, y in steps]
    assert_same(folded(probe, turned), before)
    shifted = [(i, np.round(z * 64) / 64 + 100 * (1 + i[:, None]), y) for i, z, y in steps]
    rounded = [(i, np.round(z * 64) / 64, y) for i, z, y in steps]
    assert_same(folded(probe, shifted), folded(probe, rounded))
    order = np.array([2, 0, 3, 1])
    renamed = [(i, z[:, order], np.argsort(order)[y]) for i, z, y in steps]
    assert_same(folded(probe, renamed), before)


@pytest.mark.parametrize("make", PROBES)
def test_examples_have_their_row(make: Any) -> None:
    """Renumbered examples take their metrics along; a larger dataset only adds NaN."""
    steps, order = random_steps(2), np.random.default_rng(3).permutation(9)
    before = folded(make(9, 1), steps)
    moved = folded(make(9, 1), [(order[i], z, y) for i, z, y in steps])
    larger = folded(make(12, 1), steps)
    for name, value in before.items():
        np.testing.assert_array_equal(moved[name][order], value)
        np.testing.assert_array_equal(larger[name][:9], value)
        assert np.isnan(larger[name][9:]).all()


@pytest.mark.parametrize("make", [AreaUnderMargin, Cartography])
def test_several_labels_an_example_are_averaged(make: Any) -> None:
    generator = np.random.default_rng(0)
    z, y = generator.normal(0, 2, (2, 3, 4)).astype(np.float32), generator.integers(0, 4, (2, 3))
    found = folded(make(2, 1), [([0, 1], z, y)])
    alone = folded(make(6, 1), [(range(6), z.reshape(6, 4), y.reshape(6))])
    for name, value in alone.items():
        np.testing.assert_allclose(found[name], value.reshape(2, 3).mean(axis=1), rtol=1e-6)


# ---- through fit --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tape:
    """A StepProbe that keeps everything: the Aux of each step."""

    num_steps: int
    every: Any = 10**6
    name: str = "tape"

    def init(self, state: TrainState) -> Any:
        t, b = self.num_steps, tiny.BATCH
        int_ = jnp.zeros((t, b), jnp.int32)
        return jnp.int32(0), {"logits": jnp.zeros((t, b, 4)), "y": int_, "index": int_}

    def fold(self, carry: Any, aux: Aux) -> Any:
        at, kept = carry
        kept = {name: room.at[at].set(getattr(aux, name)) for name, room in kept.items()}
        return (at + 1, kept), kept

    @staticmethod
    def steps(results: Results, replica: int, count: int) -> list[Any]:
        names = ("index", "logits", "y")
        kept = [results.arrays["tape", name].values[-1, replica, :count] for name in names]
        return list(zip(*kept, strict=True))


@functools.cache
def watched() -> tuple[Any, Results]:
    p = tiny.problem("mlp")
    return p, tiny.run(p, mesh.make(), 2, probes=[*probes(), Tape(p.num_steps)])


def metrics(results: Results) -> dict[tuple[str, int], np.ndarray]:
    """(metric, step) -> what the probes measured, f32[K, N]."""
    names, found = [probe.name for probe in probes()], {}
    for (name, metric), array in results.arrays.items():
        if name in names:
            assert array.dims == ("step", "member", "example")
            for step, values in zip(array.coords["step"], array.values, strict=True):
                found[f"{name}.{metric}", int(step)] = values
    return found


def assert_follows_the_tape(results: Results) -> None:
    """Every array of every probe equals that of the list of presentations so far."""
    found = metrics(results)
    assert {metric for metric, _ in found} == reference.METRICS.keys()
    for (metric, count), values in found.items():
        assert values.shape == (2, N) and values.dtype == np.float32
        for replica in range(2):
            steps = Tape.steps(results, replica, count)
            seen = [reference.history(steps, i) for i in range(N)]
            wanted = [reference.METRICS[metric](h) for h in seen]
            np.testing.assert_allclose(
                values[replica], wanted, rtol=1e-5, atol=2e-6, err_msg=f"{metric} of {replica}"
            )


def test_a_population_against_a_loop_over_what_it_saw() -> None:
    _, results = watched()
    found = metrics(results)
    assert {step for _, step in found} == {7, 14, 20}
    assert_follows_the_tape(results)
    events = found["forgetting.events", 20]
    assert np.isfinite(events).any() and (events > 0).any() and np.isinf(events).any()
    one, other = found["aum.margin", 20]
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize("make", PROBES)
def test_watching_changes_no_bit(make: Any) -> None:
    p = tiny.problem("mlp")
    unwatched = tiny.run(p, mesh.make(), 2)
    alone = tiny.run(p, mesh.make(), 2, probes=[make(N, 3)])
    for x, y, z in zip(*map(tiny.leaves, (unwatched, alone, watched()[1])), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    assert unwatched.rows.equals(alone.rows)


def test_replicas_on_subsets_keep_the_order_of_the_dataset() -> None:
    """NaN for what was never presented; a subset's sizes may differ."""
    p = tiny.problem("mlp")
    rows = np.stack([np.arange(0, 40, 2), np.arange(39, -1, -2)])
    sizes = np.array([20, 9])
    stream = resident(p.data, tiny.BATCH, 2, rows=rows, sizes=sizes)
    results = tiny.run(p, mesh.make(), 2, stream=stream, probes=[*probes(), Tape(20)])
    assert_follows_the_tape(results)
    for (metric, step_), values in metrics(results).items():
        for replica in range(2):
            outside = np.setdiff1d(np.arange(N), rows[replica, : sizes[replica]])
            assert np.isnan(values[replica, outside]).all(), metric
            if step_ == 20:  # of 9 examples each epoch drops one
                assert (
                    np.isfinite(values[replica]).sum() + np.isinf(values[replica]).sum()
                    == (sizes[replica])
                )


@pytest.mark.parametrize(("shape", "how"), [((2, 1, 1), "dispatch"), ((1, 2, 2), "vmap")])
def test_meshes_and_ways_agree(shape: Any, how: Any) -> None:
    p, expected = watched()
    found = tiny.run(p, mesh.make(*shape), 2, how=how, probes=[*probes(), Tape(20)])
    assert_follows_the_tape(found)
    assert_same(metrics(found), metrics(expected), rtol=2e-5)


def test_tokens_on_a_mesh() -> None:
    """Logits [b, T, K] split over data and model."""
    p = tiny.problem("transformer")
    watch = [AreaUnderMargin(N, 6), Cartography(N, 6)]
    one = tiny.run(p, mesh.make(), 2, probes=watch)
    many = tiny.run(p, mesh.make(2, 2, 2), 2, probes=watch)
    assert_same(metrics(many), metrics(one), rtol=2e-5)
    assert metrics(one)["aum.margin", 6].shape == (2, N)


def test_a_run_cut_and_continued_has_the_same_bits(tmp_path: Any) -> None:
    p, whole = watched()
    for cut in (5, 11, 20):
        part, store = p._replace(num_steps=cut), Recorder(tmp_path, ())
        results = tiny.run(
            part, mesh.make(), 2, checkpoint_every=4, store=store, probes=[*probes(), Tape(20)]
        )
    found = metrics(results)
    assert {5, 7, 11, 14, 20} == {step for _, step in found}
    for name, value in metrics(whole).items():
        np.testing.assert_array_equal(found[name], value, err_msg=str(name))
    for x, y in zip(tiny.leaves(whole), tiny.leaves(results), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("shape", "how"), [((1, 1, 1), "vmap"), ((2, 2, 2), "map")])
def test_batches_drawn_with_replacement(shape: Any, how: Any) -> None:
    """As importance sampling makes them; replicas have their repeats in different batches."""
    p = tiny.problem("mlp")
    plain = tiny.batches(p, 2)

    def batch(shared: Any, own: Any, fed: Any, key: Any, at: Any) -> Any:
        key = jax.random.fold_in(key, at)
        return take(shared, jax.random.randint(key, (tiny.BATCH,), 0, 12))

    stream = plain._replace(batch=batch)
    watch = [*probes(), Tape(20)]
    results = tiny.run(p, mesh.make(*shape), 2, how=how, stream=stream, probes=watch)
    most = [
        [np.bincount(index).max() for index, _, _ in Tape.steps(results, replica, 20)]
        for replica in range(2)
    ]
    assert max(most[0]) > 2 and most[0] != most[1]
    assert_follows_the_tape(results)


def test_accumulated_batches_are_presented_once() -> None:
    p = tiny.problem("mlp")
    results = tiny.run(p, mesh.make(), 2, accumulate=4, probes=[*probes(), Tape(20)])
    assert_follows_the_tape(results)
