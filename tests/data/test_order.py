"""The order of examples: a bijection whatever n is, and as good as random."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from dynamics.data.order import batch_rows, permutation

SMALLEST = 1e-4  # p-value of a statistical test, one draw of fixed seeds
MANY = 10_000  # keys of such a draw
# small programs spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def compiled(positions):
    """``(keys, epochs, ns) -> [K, positions]``: all dynamic but the number of positions."""

    def one(key, epoch, n):
        return permutation(key, epoch, jnp.minimum(jnp.arange(positions), n - 1), n)

    return jax.jit(jax.vmap(one))


@functools.cache
def shuffled(kind, n):
    """[MANY, n] permutations: ours, or those of jax.random as the reference."""
    keys = jax.random.split(jax.random.key(n), MANY)
    if kind == "reference":
        return np.asarray(jit(jax.vmap(lambda k: jax.random.permutation(k, n)))(keys))
    positions = next(p for p in (8, 33, 100) if n <= p)  # few programs
    epochs, sizes = np.zeros(MANY, np.int32), np.full(MANY, n, np.int32)
    return np.asarray(compiled(positions)(keys, epochs, sizes))[:, :n]


def p_value(counts, expected, freedom, factor=1.0):
    return chi2.sf(factor * ((counts - expected) ** 2 / expected).sum(), freedom)


def cases(*ns, also):
    """Ours for every n, and the reference for one: the test passes what is random."""
    return pytest.mark.parametrize(("kind", "n"), [*(("ours", n) for n in ns), ("reference", also)])


# ---- a bijection --------------------------------------------------------------------------------


def test_bijection_for_every_small_n():
    top, keys = 70, jax.random.split(jax.random.key(3), 6)
    run = compiled(top)
    for key, epoch in zip(keys, (0, 1, 2, 1000, 2**20, 2**31 - 1), strict=True):
        ns = jnp.arange(1, top + 1)
        found = run(jnp.repeat(key, top), jnp.full(top, epoch), ns)
        for n, order in zip(range(1, top + 1), np.asarray(found), strict=True):
            assert sorted(order[:n]) == list(range(n)), (n, epoch)


def test_bijection_for_large_n():
    top = 2**20 + 1
    run = compiled(top)
    for seed, n in enumerate((10**6, 2**20 - 1, 2**20, 2**20 + 1)):
        key = jax.random.key(seed)
        order = np.asarray(run(key[None], jnp.full(1, seed), jnp.full(1, n)))[0, :n]
        np.testing.assert_array_equal(np.bincount(order, minlength=n), 1, err_msg=str(n))


@pytest.mark.parametrize("n", [2**16 - 1, 2**16 + 1, 10**9, 2**30 - 1])
def test_a_slice_of_a_large_order_is_distinct_and_inside(n):
    spread = np.unique(np.linspace(0, n - 1, 4001).astype(np.int32))
    found = jit(permutation)(jax.random.key(1), jnp.int32(2), jnp.asarray(spread), jnp.int32(n))
    found = np.asarray(found)
    assert found.min() >= 0 and found.max() < n and len(np.unique(found)) == len(spread)
    assert abs(np.corrcoef(found, spread)[0, 1]) < 4 / math.sqrt(len(spread))
    # what 4001 uniform draws leave below every quantile
    distance = np.abs(np.sort(found) / n - np.linspace(0, 1, len(found))).max()
    assert distance * math.sqrt(len(found)) < 2.2  # Kolmogorov: P < 1e-4


def test_an_example_does_not_depend_on_what_else_is_asked():
    key, epoch, n = jax.random.key(5), jnp.int32(7), jnp.int32(57)
    run, some = jit(permutation), np.array([56, 3, 3, 0] * 15, np.int32)[:57]
    whole = np.asarray(run(key, epoch, jnp.arange(57), n))
    np.testing.assert_array_equal(run(key, epoch, jnp.asarray(some), n), whole[some])


def test_sizes_may_differ_between_replicas():
    keys = jax.random.split(jax.random.key(1), 2)
    sizes = (7, 32)
    together = compiled(33)(keys, jnp.arange(2), jnp.array(sizes))
    for key, epoch, n, found in zip(keys, range(2), sizes, np.asarray(together), strict=True):
        alone = jit(
            lambda k, e=epoch, n=n: permutation(k, jnp.int32(e), jnp.arange(n), jnp.int32(n))
        )
        np.testing.assert_array_equal(found[:n], alone(key))


# ---- as good as random --------------------------------------------------------------------------


@cases(3, 5, 6, also=5)
def test_every_permutation_is_equally_likely(kind, n):
    orders, count = shuffled(kind, n), math.factorial(n)
    codes = (orders * n ** np.arange(n)).sum(axis=1)
    seen, counts = np.unique(codes, return_counts=True)
    assert len(seen) == count
    assert p_value(counts, len(orders) / count, count - 1) > SMALLEST


@cases(7, 10, 100, also=10)
def test_every_example_is_equally_likely_at_every_position(kind, n):
    orders = shuffled(kind, n)
    table = np.stack([np.bincount(column, minlength=n) for column in orders.T])
    assert p_value(table, len(orders) / n, (n - 1) ** 2, factor=(n - 1) / n) > SMALLEST
    fixed = (orders == np.arange(n)).sum(axis=1)  # mean 1, variance 1
    assert abs(fixed.mean() - 1) < 4 / math.sqrt(len(orders))
    assert abs(fixed.var() - 1) < 4 * math.sqrt(3 / len(orders))  # fourth moment of Poisson(1): 4


@cases(8, 10, 20, 33, also=10)
def test_neighbours_are_equally_likely_pairs(kind, n):
    orders = shuffled(kind, n)
    off = ~np.eye(n, dtype=bool)
    for i, j in ((0, 1), (1, 2), (0, n // 2), (0, n - 1)):
        counts = np.bincount(orders[:, i] * n + orders[:, j], minlength=n * n).reshape(n, n)[off]
        expected = len(orders) / len(counts)
        assert p_value(counts, expected, len(counts) - 1) > SMALLEST, (i, j)


@pytest.mark.parametrize("kind", ["epochs", "keys", "derived keys"])
def test_orders_of_other_epochs_and_keys_are_unrelated(kind):
    n, pairs = 500, 200
    numbers = jnp.arange(pairs + 1)
    keys, epochs = jnp.repeat(jax.random.key(0), pairs + 1), jnp.zeros_like(numbers)
    if kind == "epochs":
        epochs = numbers
    elif kind == "keys":
        keys = jax.vmap(jax.random.key)(numbers)
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
    orders = np.asarray(compiled(n)(keys, epochs, jnp.full(pairs + 1, n)))
    a, b = orders[:-1], orders[1:]
    same = (a == b).sum()  # about Poisson(pairs)
    assert abs(same - pairs) < 4 * math.sqrt(pairs)
    rho = np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])
    squares = (rho**2).sum() * (n - 1)
    assert SMALLEST < chi2.sf(squares, pairs) < 1 - SMALLEST
    assert abs(rho.mean()) < 4 / math.sqrt(pairs * (n - 1))
    shifts = np.bincount(((b - a) % n).ravel(), minlength=n)
    assert p_value(shifts, pairs, n - 1) > SMALLEST
    lag = np.array([np.corrcoef(x[:-1], x[1:])[0, 1] for x in orders])
    assert abs(lag.mean()) < 4 / math.sqrt(len(lag) * n)


# ---- batches ------------------------------------------------------------------------------------

SIZE, TIMES = 5, 24


@functools.cache
def batches(n, seed=0):
    """[TIMES, SIZE] rows of one replica."""
    return np.asarray(every_batch()(jax.random.key(seed), jnp.int32(n)))


@functools.cache
def every_batch():
    return jit(lambda key, n: jax.vmap(lambda t: batch_rows(key, t, n, SIZE))(jnp.arange(TIMES)))


@pytest.mark.parametrize("n", [5, 9, 10, 23, 30])
def test_an_epoch_shows_an_example_once(n):
    per_epoch = n // SIZE
    epochs = batches(n)[: TIMES // per_epoch * per_epoch].reshape(-1, per_epoch * SIZE)
    for epoch in epochs:
        assert len(np.unique(epoch)) == per_epoch * SIZE and set(epoch) <= set(range(n))
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs) or n < 9
    if n % SIZE:
        left = {tuple(sorted(set(range(n)) - set(epoch))) for epoch in epochs}
        assert len(left) > 1, "the same remainder is dropped every epoch"


def test_a_batch_of_everything_is_an_order():
    found = batches(SIZE)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(SIZE), (TIMES, 1)))
    assert len({tuple(rows) for rows in found}) > TIMES / 2  # of 120


def test_batches_are_slices_of_the_epochs_order():
    n, per_epoch = 23, 4
    epochs = np.arange(TIMES // per_epoch, dtype=np.int32)
    keys, sizes = jnp.repeat(jax.random.key(0), len(epochs)), np.full(len(epochs), n, np.int32)
    orders = np.asarray(compiled(33)(keys, epochs, sizes))[:, : per_epoch * SIZE]
    np.testing.assert_array_equal(batches(n), orders.reshape(TIMES, SIZE))


def test_the_last_steps_that_an_integer_can_count():
    run = jit(batch_rows, static_argnums=3)
    for step in (2**31 - 1, 2**31 - 2, 2**24 + 1):
        rows = np.asarray(run(jax.random.key(0), jnp.int32(step), jnp.int32(1000), 64))
        assert len(np.unique(rows)) == 64 and rows.min() >= 0 and rows.max() < 1000


@functools.cache
def first_batches(n, size):
    return jax.jit(jax.vmap(lambda k, t: batch_rows(k, t, jnp.int32(n), size), (0, None)))


@pytest.mark.parametrize("step", [0, 5, 9])
def test_every_example_is_equally_likely_in_a_batch(step):
    n, size, num_keys = 50, 8, MANY
    keys = jax.random.split(jax.random.key(step), num_keys)
    rows = np.asarray(first_batches(n, size)(keys, jnp.int32(step)))
    counts = np.bincount(rows.ravel(), minlength=n)
    share = size / n  # a count is binomial; the counts of a batch sum to its size
    factor = (n - 1) / n / (1 - share)
    assert p_value(counts, num_keys * share, n - 1, factor) > SMALLEST


def test_replicas_of_other_sizes_in_one_program():
    keys, sizes = jax.random.split(jax.random.key(2), 3), (8, 20, 33)
    run = jit(jax.vmap(lambda k, n, t: batch_rows(k, t, n, 8), (0, 0, None)))
    one = jit(batch_rows, static_argnums=3)
    for t in (0, 1, 7):
        together = np.asarray(run(keys, jnp.array(sizes), jnp.int32(t)))
        for key, n, rows in zip(keys, sizes, together, strict=True):
            np.testing.assert_array_equal(rows, one(key, jnp.int32(t), jnp.int32(n), 8))
