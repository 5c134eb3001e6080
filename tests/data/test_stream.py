"""Batches: the right rows with the right labels, the same from the device and from the host."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from dynamics.data import stream as streams
from dynamics.data.augment import crop_and_flip
from dynamics.data.order import batch_rows
from dynamics.data.rows import normalise, take
from dynamics.data.stream import resident, sampled, stream, streamed
from dynamics.types import AUGMENT, Dataset

N, B = 23, 4
KEYS = jax.random.split(jax.random.key(1), 3)
GENERATOR = np.random.default_rng(0)


def images() -> Dataset:
    x = GENERATOR.integers(0, 256, (N, 5, 5, 1)).astype(np.uint8)
    y = GENERATOR.integers(0, 10, N).astype(np.int64)
    mean, std = np.float32([[[100.0]]]), np.float32([[[37.0]]])
    place = np.arange(N, dtype=np.int32) * 2
    return Dataset(x=x, y=y, mean=mean, std=std, file_row=place)


def tokens() -> Dataset:
    x = GENERATOR.integers(0, 200, (N, 7)).astype(np.uint8)
    nothing = np.zeros(0, np.float32)
    return Dataset(x=x, y=x[:, ::-1].copy(), mean=nothing, std=nothing)


IMAGES, TOKENS = images(), tokens()
SUBSETS = np.stack([GENERATOR.permutation(N)[:12] for _ in range(3)])
SIZES = np.array([12, 4, 7])
LABELS = GENERATOR.integers(0, 10, (3, N))


# small programs spend their time in the compiler
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(batch: Any, jit: Any) -> Any:
    return jit(jax.vmap(batch, (None, 0, 0, 0, None)))


def batches(made: Any, first: int, count: int, keys: Any = KEYS, jit: Any = quick) -> Any:
    """The batches of the steps first, first + 1, ..., leaves [count, K, b, ...]."""
    run = compiled(made.batch, jit)
    fed = made.host(first) if made.host is not None else itertools.repeat(())
    steps = range(first, first + count)
    # the host gives leaves [K, ...]
    found = [
        run(made.shared, made.own, f, keys, jnp.int32(t)) for t, f in zip(steps, fed, strict=False)
    ]
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *found)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def plain() -> Any:
    return batches(resident(IMAGES, B, 3), 0, 12)


# ---- from the device ----------------------------------------------------------------------------


def test_batches_are_rows_of_the_file(plain: Any) -> None:
    assert plain.x.shape == (12, 3, B, 5, 5, 1) and plain.x.dtype == np.float32
    assert plain.y.dtype == plain.index.dtype == np.int32
    wanted = (IMAGES.x[plain.index].astype(np.float64) - 100) / 37
    np.testing.assert_allclose(plain.x, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(plain.y, IMAGES.y[plain.index])


def test_batches_follow_the_order_of_each_replicas_key(plain: Any) -> None:
    run = quick(jax.vmap(lambda k, t: batch_rows(k, t, jnp.int32(N), B), (0, None)))
    for t in range(12):
        np.testing.assert_array_equal(plain.index[t], run(KEYS, jnp.int32(t)))
    assert len({tuple(plain.index[:5, s].ravel()) for s in range(3)}) == 3


def test_a_replica_sees_only_its_rows_each_once_an_epoch() -> None:
    found = batches(resident(IMAGES, B, 3, rows=SUBSETS, sizes=SIZES, labels=LABELS), 0, 9)
    for s, size in enumerate(SIZES):
        per_epoch = size // B
        epochs = found.index[: 9 // per_epoch * per_epoch, s].reshape(-1, per_epoch * B)
        for epoch in epochs:
            assert len(set(epoch)) == per_epoch * B
            assert set(epoch) <= set(SUBSETS[s][:size])
        assert set(found.index[:, s].ravel()) == set(SUBSETS[s][:size])
        np.testing.assert_array_equal(found.y[:, s], LABELS[s][found.index[:, s]])
    wanted = (IMAGES.x[found.index].astype(np.float64) - 100) / 37
    np.testing.assert_allclose(found.x, wanted, rtol=1e-5, atol=1e-6)


def test_what_a_replica_gets_does_not_depend_on_the_others() -> None:
    options = {"rows": SUBSETS, "sizes": SIZES, "labels": LABELS}
    together = batches(resident(IMAGES, B, 3, **options), 3, 4)
    made = resident(IMAGES, B, 1, **{name: value[1:2] for name, value in options.items()})
    alone = batches(made, 3, 4, KEYS[1:2])
    assert_same(jax.tree.map(lambda x: x[:, 1:2], together), alone)


def test_what_lies_behind_a_subset_is_never_read() -> None:
    padded = SUBSETS.copy()
    for s, size in enumerate(SIZES):
        padded[s, size:] = 0
    made = resident(IMAGES, B, 3, rows=SUBSETS, sizes=SIZES)
    other = resident(IMAGES, B, 3, rows=padded, sizes=SIZES)
    assert_same(batches(made, 0, 6), batches(made._replace(own=other.own), 0, 6))


def test_sizes_alone_keep_the_first_examples() -> None:
    found = batches(resident(IMAGES, B, 3, sizes=np.array([4, 9, N])), 0, 6)
    assert [found.index[:, s].max() for s in range(2)] == [3, 8]


def test_tokens_pass_as_integers() -> None:
    found = batches(resident(TOKENS, B, 3), 0, 3)
    assert found.x.dtype == found.y.dtype == np.int32
    np.testing.assert_array_equal(found.x, TOKENS.x[found.index])
    np.testing.assert_array_equal(found.y, TOKENS.y[found.index])


def test_take_and_normalise() -> None:
    data = jax.tree.map(jnp.asarray, IMAGES.replace(y=IMAGES.y.astype(np.int32)))
    rows = jnp.array([22, 0, 0, 5])
    found = take(data, rows)
    np.testing.assert_array_equal(found.index, rows)
    np.testing.assert_array_equal(found.y, IMAGES.y[np.asarray(rows)])
    np.testing.assert_allclose(found.x[1], (IMAGES.x[0].astype(np.float64) - 100) / 37, rtol=1e-5)
    ones, mean, std = jnp.ones((2, 3, 3, 2), jnp.uint8), [[[0.0, 1.0]]], [[[2.0, 2.0]]]
    colour = normalise(ones, jnp.array(mean), jnp.array(std))
    np.testing.assert_array_equal(np.unique(np.asarray(colour)[..., 0]), [0.5])
    np.testing.assert_array_equal(np.unique(np.asarray(colour)[..., 1]), [0.0])


# ---- from the host ------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "all": {"rows": SUBSETS, "sizes": SIZES, "labels": LABELS, "augment": crop_and_flip(2)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_host_and_device_give_the_same_bits(options: Any) -> None:
    device, host = resident(IMAGES, B, 3, **options), streamed(IMAGES, B, KEYS, **options)
    for first in (0, 7):
        a, b = (batches(made, first, 4, jit=jax.jit) for made in (device, host))
        assert_same(a, b)


def test_host_and_device_give_the_same_tokens() -> None:
    a = batches(resident(TOKENS, B, 3), 5, 3)
    assert_same(a, batches(streamed(TOKENS, B, KEYS), 5, 3))


def test_the_host_may_start_at_any_step_and_again(plain: Any) -> None:
    made = streamed(IMAGES, B, KEYS, num_threads=2)
    for first in (4, 0, 4):
        found = batches(made, first, 2)
        assert_same(found, jax.tree.map(lambda x, f=first: x[f : f + 2], plain))


def test_the_host_reads_only_what_a_batch_needs(tmp_path: Any) -> None:
    """From a memory map, as stored: nothing is read ahead of its step, nothing is converted."""
    np.save(tmp_path / "x.npy", IMAGES.x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    fed = next(streamed(IMAGES.replace(x=mapped), B, KEYS).host(2))
    assert fed["x"].shape == (3, B, 5, 5, 1) and fed["x"].dtype == np.uint8
    np.testing.assert_array_equal(fed["x"], IMAGES.x[fed["row"]])
    np.testing.assert_array_equal(fed["y"], IMAGES.y[fed["row"]])


@pytest.mark.parametrize("impl", ["rbg"])
def test_the_host_follows_keys_of_another_kind(impl: str) -> None:
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    a = batches(resident(IMAGES, B, 3), 0, 2, keys)
    assert_same(a, batches(streamed(IMAGES, B, keys), 0, 2, keys))


def test_where_the_data_go_is_a_matter_of_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream(IMAGES, B, KEYS, labels=LABELS).host is None
    copies = len(jax.local_devices()) * IMAGES.x.nbytes  # CPU devices share one memory
    monkeypatch.setattr(streams, "RESIDENT_BYTES", copies - 1)
    made = stream(IMAGES, B, KEYS, labels=LABELS)
    assert made.host is not None and made.batch_size == B
    monkeypatch.setattr(streams, "RESIDENT_BYTES", copies)
    assert stream(IMAGES, B, KEYS).host is None


# ---- augmentation -------------------------------------------------------------------------------


def test_augmentation_has_its_own_key_for_every_step(plain: Any) -> None:
    def noise(key: Any, x: Any) -> Any:
        return x + jax.random.uniform(key)

    found = batches(resident(IMAGES, B, 3, augment=noise), 0, 3)
    np.testing.assert_array_equal(found.index, plain.index[:3])
    np.testing.assert_array_equal(found.y, plain.y[:3])
    for t, s in itertools.product(range(3), range(3)):
        key = jax.random.fold_in(jax.random.fold_in(KEYS[s], AUGMENT), t)
        wanted = plain.x[t, s] + np.asarray(jax.random.uniform(key))
        np.testing.assert_allclose(found.x[t, s], wanted, rtol=1e-5, atol=1e-6)


# ---- drawn with replacement ---------------------------------------------------------------------

CHANCES = GENERATOR.dirichlet(np.full(N, 0.5), 3)
CHANCES[1] = 1 / N
CHANCES[2, ::2] = 0  # the first and the last, too
CHANCES[2] /= CHANCES[2].sum()


def test_drawn_batches_are_rows_with_weights() -> None:
    found = batches(sampled(IMAGES, B, 3, CHANCES, labels=LABELS), 0, 40)
    assert found.x.shape == (40, 3, B, 5, 5, 1) and found.index.dtype == np.int32
    wanted = (IMAGES.x[found.index].astype(np.float64) - 100) / 37
    np.testing.assert_allclose(found.x, wanted, rtol=1e-5, atol=1e-6)
    for s in range(3):
        np.testing.assert_array_equal(found.y[:, s], LABELS[s][found.index[:, s]])
        weight = 1 / (N * CHANCES[s][found.index[:, s]])
        np.testing.assert_allclose(found.weight[:, s], weight, rtol=1e-5)
    assert found.weight.dtype == np.float32 and (found.weight[:, 1] == 1).all()
    assert (found.index[:, 2] % 2 == 1).all()


def test_draws_are_a_function_of_key_and_step() -> None:
    made = sampled(IMAGES, B, 3, CHANCES)
    whole = batches(made, 0, 12)
    assert_same(batches(made, 5, 3), jax.tree.map(lambda x: x[5:8], whole))
    alone = batches(sampled(IMAGES, B, 1, CHANCES[1:2]), 0, 12, KEYS[1:2])
    assert_same(jax.tree.map(lambda x: x[:, 1:2], whole), alone)
    same = batches(sampled(IMAGES, B, 3, CHANCES[[1, 1, 1]]), 0, 12)
    assert len({tuple(same.index[:, s].ravel()) for s in range(3)}) == 3
    assert len({tuple(row) for row in same.index.reshape(-1, B)}) > 30


def test_drawn_tokens_and_augmentation() -> None:
    found = batches(sampled(TOKENS, B, 3, CHANCES), 0, 3)
    np.testing.assert_array_equal(found.x, TOKENS.x[found.index])
    np.testing.assert_array_equal(found.y, TOKENS.y[found.index])
    plain = batches(sampled(IMAGES, B, 3, CHANCES), 0, 3)
    moved = batches(sampled(IMAGES, B, 3, CHANCES, augment=lambda key, x: x + 1), 0, 3)
    assert_same(moved.replace(x=plain.x), plain)
    np.testing.assert_allclose(moved.x, plain.x + 1, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_the_table_holds_each_examples_part(n: int) -> None:
    """In integers, exactly; whatever is positive is drawn, whatever is 0 is not."""
    generator = np.random.default_rng(n)
    for power in (0, 1, 8, 60):
        p = generator.random(n) ** power
        p[generator.random(n) < 0.3] = 0
        p[0] += 1e-300 if n > 1 and p[1:].any() else 1
        p /= p.sum()
        units = streams._units(p)
        assert units.sum() == n * streams.CELL and ((units > 0) == (p > 0)).all()
        exact = p * n * streams.CELL
        others = units != units.max()
        assert (np.abs(units - exact)[others] <= 1).all() and (abs(units - exact) <= n).all()
        keep, other = streams._alias(units)
        parts = np.where(np.arange(n) == other, streams.CELL, keep).astype(np.int64)
        drawn = np.zeros(n, np.int64)
        np.add.at(drawn, np.arange(n), parts)
        np.add.at(drawn, other, streams.CELL - parts)
        np.testing.assert_array_equal(drawn, units)


# ---- what is refused ----------------------------------------------------------------------------

OUT = SUBSETS.copy()
OUT[1, 0] = N
TWICE = SUBSETS.copy()
TWICE[2, 1] = TWICE[2, 0]
REFUSED = {
    "batch": (dict(batch_size=N + 1), ["batch_size", str(N), str(N + 1)]),
    "no batch": (dict(batch_size=0), ["batch_size", "0"]),
    "batch of a subset": (dict(batch_size=5, rows=SUBSETS, sizes=SIZES), ["batch_size", "4", "5"]),
    "out of range": (dict(rows=OUT), ["rows", "member 1", "12", "22", "23"]),
    "negative": (dict(rows=SUBSETS - N), ["rows", "member 0"]),
    "twice": (dict(rows=TWICE), ["rows", "member 2", "12", "11"]),
    "fewer rows": (dict(rows=SUBSETS[:2]), ["rows", "3 members", "(2, 12)"]),
    "larger than rows": (dict(rows=SUBSETS, sizes=np.array([13, 4, 4])), ["member 0", "13"]),
    "larger than data": (dict(sizes=np.array([4, N + 1, 4])), ["sizes", str(N), str(N + 1)]),
    "empty": (dict(rows=SUBSETS, sizes=np.array([4, 0, 4])), ["0"]),
    "fewer sizes": (dict(sizes=np.array([4, 4])), ["sizes", "3"]),
    "fewer sizes of rows": (dict(rows=SUBSETS, sizes=np.array([4, 4])), ["sizes", "3"]),
    "labels": (dict(labels=LABELS[:, 1:]), ["labels", f"(3, {N})", f"(3, {N - 1})"]),
    "labels of tokens": (dict(data=TOKENS, labels=LABELS), ["labels"]),
}


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("where", ["device", "host"])
def test_refused_with_a_message(unchecked: Any, where: str, options: Any, words: Any) -> None:
    options = {"data": IMAGES, "batch_size": B} | options
    data, size = options.pop("data"), options.pop("batch_size")
    with pytest.raises(ValueError) as error:
        if where == "device":
            resident(data, size, 3, **options)
        else:
            streamed(data, size, KEYS, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert "zip()" not in str(error.value) and "zero-size" not in str(error.value)


def chances(at: int, value: float) -> Any:
    found = CHANCES.copy()
    found[1, at] = value
    return found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(probabilities=CHANCES[:2]), [f"(3, {N})", f"(2, {N})"]),
        (dict(probabilities=CHANCES[0]), [f"(3, {N})", f"({N},)"]),
        (dict(probabilities=chances(3, -0.01)), ["member 1", ">= 0", "-0.01"]),
        (dict(probabilities=chances(3, np.nan)), ["member 1", "nan"]),
        (dict(probabilities=chances(3, np.inf)), ["member 1", "inf"]),
        (dict(probabilities=chances(3, 0.5)), ["member 1", "sum to 1", "1.45652"]),
        (dict(probabilities=0 * CHANCES), ["member 0", "sum 0"]),
        (dict(batch_size=N + 1), ["batch_size", str(N + 1)]),
        (dict(labels=LABELS[:, 1:]), ["labels", f"(3, {N})"]),
    ],
)
def test_what_is_no_probability_is_refused(unchecked: Any, options: Any, words: Any) -> None:
    options = {"batch_size": B, "num_replicas": 3, "probabilities": CHANCES} | options
    with pytest.raises(ValueError) as error:
        sampled(IMAGES, **options)
    assert all(word in str(error.value) for word in words), error.value
