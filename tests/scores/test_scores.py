"""EL2N and GraNd: identities, slow references, and that an example's score is its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from references import losses as by_hand
from references import scores as reference

from dynamics import models, optim, step, task
from dynamics.data import subset
from dynamics.scores import el2n, grand, over_examples
from dynamics.types import Aux, Batch, Dataset

K, N = 4, 21
# tiny nets spend their time in the compiler
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SCORES = {"el2n": el2n, "grand": grand}
each_score = pytest.mark.parametrize("name", SCORES)
GENERATOR = np.random.default_rng(0)
X = GENERATOR.integers(0, 256, (N, 4, 4)).astype(np.uint8)
Y = GENERATOR.integers(0, K, N).astype(np.int32)
MEAN, STD = np.full((1, 1), 128, np.float32), np.full((1, 1), 70, np.float32)
DATA = Dataset(x=X, y=Y, mean=MEAN, std=STD)
XF = (X.astype(np.float64) - 128) / 70
BATCH = Batch(x=jnp.asarray(XF, jnp.float32), y=jnp.asarray(Y), index=jnp.arange(N))
CONFIGS = {
    "linear": models.Linear(init_scale=0.5),
    "linear without bias": models.Linear(bias=False),
    "mlp": models.MLP(width=5, depth=1),
    "zero head": models.MLP(width=5, depth=1, zero_head=True),
    "convnet": models.Convnet(channels=(3,), norm="batch"),
    "dropout": models.MLP(width=5, depth=1, dropout=0.5),
}


def start(net: Any, key: Any) -> Any:
    return jit(lambda key: step.init(net, optim.SGD().make(1), key, {}))(key)


@functools.cache
def made(name: str) -> Any:
    """A task and a state whose biases and batch statistics are not at their start."""
    net = task.of_dataset(models.make(CONFIGS[name], K), DATA)
    state = start(net, jax.random.key(4))
    if name != "zero head":
        moved = lambda p: p + 0.3 if p.ndim == 1 else p  # noqa: E731
        state = state.replace(
            params=jax.tree.map(moved, state.params), extras=jax.tree.map(moved, state.extras)
        )
    return net, state


@functools.cache
def compiled(name: str, net: Any) -> Any:
    return jit(functools.partial(SCORES[name], net))


def score(name: str, net: str, batch: Batch = BATCH) -> np.ndarray:
    made_task, state = made(net)
    return np.asarray(compiled(name, made_task)(state, batch))


def logits(net: str) -> np.ndarray:
    found, state = made(net)
    return np.asarray(jit(found.evaluate)(state.params, state.extras, BATCH, {}).logits)


# ---- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["linear", "mlp", "convnet"])
def test_el2n_is_the_length_of_the_error(net: str) -> None:
    wanted = [by_hand.el2n(z, y) for z, y in zip(logits(net), Y, strict=True)]
    np.testing.assert_allclose(score("el2n", net), wanted, rtol=1e-5)


@pytest.mark.parametrize(("net", "one"), [("linear", 1), ("linear without bias", 0)])
def test_grand_of_a_linear_model(net: str, one: int) -> None:
    """||p - y|| sqrt(||x||^2 + 1); the 1 is the bias."""
    length = np.sqrt((XF**2).sum(axis=(1, 2)) + one)
    wanted = [by_hand.el2n(z, y) for z, y in zip(logits(net), Y, strict=True)] * length
    np.testing.assert_allclose(score("grand", net), wanted, rtol=1e-5)


def test_a_head_of_zeros_is_equally_wrong_everywhere() -> None:
    """EL2N = sqrt(1 - 1/K); GraNd = EL2N sqrt(||h||^2 + 1): nothing flows below the head."""
    _, state = made("zero head")
    flat = XF.reshape(N, -1)
    dense = {k: np.asarray(v, np.float64) for k, v in state.params["dense_0"].items()}
    h = np.maximum(flat @ dense["kernel"] + dense["bias"], 0)
    wrong = np.sqrt(1 - 1 / K)
    np.testing.assert_allclose(score("el2n", "zero head"), wrong, rtol=1e-5)
    wanted = wrong * np.sqrt((h**2).sum(axis=1) + 1)
    np.testing.assert_allclose(score("grand", "zero head"), wanted, rtol=1e-5)


@pytest.mark.parametrize("net", ["linear", "mlp", "convnet"])
def test_el2n_lies_between_its_bounds(net: str) -> None:
    """(1 - p_y) sqrt(K / (K - 1)) <= EL2N <= sqrt 2 (1 - p_y) <= sqrt 2."""
    p = [by_hand.softmax([float(v) for v in z])[y] for z, y in zip(logits(net), Y, strict=True)]
    wrong, found = 1 - np.array(p), score("el2n", net)
    assert (wrong * np.sqrt(K / (K - 1)) <= found + 1e-6).all()
    assert (found <= np.sqrt(2) * wrong + 1e-6).all() and (found <= np.sqrt(2)).all()


def test_el2n_of_two_classes() -> None:
    """EL2N = sqrt 2 (1 - p_y)."""
    two = Batch(x=BATCH.x, y=BATCH.y % 2, index=BATCH.index)
    net = task.of_dataset(models.make(models.Linear(), 2), DATA)
    state = start(net, jax.random.key(0))
    z = np.asarray(jit(net.evaluate)(state.params, {}, two, {}).logits, np.float64)
    y = np.asarray(two.y)
    gap = z[np.arange(N), y] - z[np.arange(N), 1 - y]
    found = compiled("el2n", net)(state, two)
    np.testing.assert_allclose(found, np.sqrt(2) / (1 + np.exp(gap)), rtol=1e-5)


# ---- slow references ----------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_grand_is_the_length_of_each_examples_gradient(net: str) -> None:
    wanted = reference.grand(*made(net), BATCH)
    np.testing.assert_allclose(score("grand", net), wanted, rtol=1e-5)


@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_gradients_average_to_that_of_the_batch(net: str) -> None:
    """No 1/B, no weight decay, nothing but the examples; and Jensen's inequality."""
    found, state = made(net)
    each = reference.gradients(found, state, BATCH)

    def loss(params: Any) -> Any:
        return found.evaluate(params, state.extras, BATCH, {}).loss.mean()

    whole = np.concatenate(
        [np.ravel(g) for g in jax.tree.leaves(jit(jax.grad(loss))(state.params))]
    )
    np.testing.assert_allclose(each.mean(axis=0), whole, rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(whole) <= score("grand", net).mean()


# ---- an example's score is its own --------------------------------------------------------------


@each_score
@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_no_example_changes_anothers_score(name: str, net: str) -> None:
    before = score(name, net)
    changed = BATCH.replace(x=BATCH.x.at[3].set(50.0), y=BATCH.y.at[3].set((Y[3] + 1) % K))
    after = score(name, net, changed)
    others = np.arange(N) != 3
    np.testing.assert_array_equal(before[others], after[others])
    assert before[3] != after[3]


@each_score
def test_nothing_is_random(name: str) -> None:
    _, state = made("dropout")
    a = score(name, "dropout")
    net = made("dropout")[0]
    b = compiled(name, net)(state.replace(key=jax.random.key(99), step=jnp.int32(7)), BATCH)
    np.testing.assert_array_equal(a, b)


@each_score
@pytest.mark.parametrize("net", ["mlp", "convnet"])
def test_batches_order_and_padding_do_not_matter(name: str, net: str) -> None:
    """Batches of 21, 1, 4 (the last is padded by three) and more than there are."""
    found, state = made(net)
    run = functools.partial(over_examples, SCORES[name], found, state)
    whole = np.asarray(run(DATA))
    assert whole.shape == (N,) and whole.dtype == np.float32
    np.testing.assert_allclose(whole, score(name, net), rtol=1e-5)
    sizes = (1, 4, N) if net == "mlp" else (4,)
    for size in sizes:
        np.testing.assert_allclose(run(DATA, batch_size=size), whole, rtol=1e-5)
    order = GENERATOR.permutation(N)
    turned = subset(DATA, order)
    np.testing.assert_allclose(run(turned, batch_size=4), whole[order], rtol=1e-5)


@each_score
def test_a_constant_added_to_all_logits_changes_nothing(name: str) -> None:
    net, state = made("linear")
    before = score(name, "linear")
    for shift, rtol in ((64.0, 1e-5), (1024.0, 1e-4)):  # what float32 logits keep: shift 2^-24
        head = state.params["head"]
        moved = state.replace(params={"head": head | {"bias": head["bias"] + shift}})
        after = compiled(name, net)(moved, BATCH)
        np.testing.assert_allclose(after, before, rtol=rtol, atol=shift * 2**-22)


# ---- easy examples ------------------------------------------------------------------------------


@each_score
@pytest.mark.parametrize("gap", [12.0, 16.5, 21.0, 30.0, 60.0])
def test_easy_examples_keep_their_digits(name: str, gap: float) -> None:
    """p_y = 1 - 1e-5 ... 1 - 1e-26: the order of the easiest examples is not lost."""
    net, state = made("linear")
    params = {"kernel": jnp.zeros((16, K)), "bias": jnp.array([gap, 0.0, -1.0, -2.5])}
    easy = state.replace(params={"head": params})
    z = np.asarray(params["bias"], np.float64)
    wanted = by_hand.el2n(z, 0) * np.ones(N)
    if name == "grand":
        wanted = wanted * np.sqrt((XF**2).sum(axis=(1, 2)) + 1)
    found = compiled(name, net)(easy, BATCH.replace(y=jnp.zeros(N, jnp.int32)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_hopeless_examples_have_a_score() -> None:
    """p_y = 0 in float32, or exactly: EL2N = sqrt(1 + sum q_k^2) of the others' shares."""
    inf = np.inf
    z = [[-inf, 0, 0], [-inf, 3, -inf], [-3e38, 3e38, 0], [-200, 0, 0], [5, -inf, -inf]]
    x = jnp.array(z, jnp.float32)
    batch = Batch(x=x, y=jnp.zeros(len(z), jnp.int32), index=jnp.arange(len(z)))

    def evaluate(params: Any, extras: Any, batch: Batch, hyperparameters: Any) -> Any:
        return Aux(loss=batch.x[:, 0], logits=batch.x, y=batch.y, index=batch.index)

    net = made("linear")[0]._replace(evaluate=evaluate)
    found = compiled("el2n", net)(made("linear")[1], batch)
    np.testing.assert_allclose(found, np.sqrt([1.5, 2, 2, 1.5, 0]), rtol=1e-6)


# ---- over a dataset -----------------------------------------------------------------------------


def each(fn: Any) -> Any:
    """Of ``fit``, in miniature."""
    return jit(lambda own, *shared: jax.vmap(lambda one: fn(one, *shared))(own))


@each_score
def test_a_population_is_each_of_its_replicas(name: str) -> None:
    net = made("mlp")[0]
    replicas = [start(net, jax.random.key(s)) for s in range(3)]
    states = jax.tree.map(lambda *xs: jnp.stack(xs), *replicas)
    labels = GENERATOR.integers(0, K, (3, N)).astype(np.int32)
    run = functools.partial(over_examples, SCORES[name], net)
    shared = np.asarray(run(states, DATA, each=each, batch_size=8))
    own = np.asarray(run(states, DATA, labels=labels, each=each, batch_size=8))
    assert shared.shape == own.shape == (3, N)
    for s in range(3):
        np.testing.assert_allclose(shared[s], run(replicas[s], DATA), rtol=1e-5)
        np.testing.assert_allclose(own[s], run(replicas[s], DATA.replace(y=labels[s])), rtol=1e-5)


def test_a_score_is_traced_once_for_all_states_and_batches() -> None:
    net, state = made("mlp")
    traced = []

    def counted(task: Any, state: Any, batch: Batch) -> Any:
        traced.append(batch.index.shape)
        return batch.index.astype(jnp.float32)

    for s in (state, jax.tree.map(lambda x: x, state)):
        found = over_examples(counted, net, s, DATA, batch_size=5)
        np.testing.assert_array_equal(found, np.arange(N))  # rows of the dataset, in order
    assert traced == [(5,)]


def test_a_score_may_be_a_tree_of_arrays() -> None:
    net, state = made("mlp")

    def several(task: Any, state: Any, batch: Batch) -> Any:
        return {"x": batch.x, "y": batch.y}

    found = over_examples(several, net, state, DATA, batch_size=8)
    np.testing.assert_allclose(found["x"], XF, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found["y"], Y)


@pytest.fixture
def unchecked() -> Any:
    """Without the type checks of the tests, as a user of the library meets it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.mark.parametrize("shape", [(1, N), (N, N), (1, N - 1)])
def test_labels_of_replicas_without_replicas_are_refused(unchecked: Any, shape: Any) -> None:
    net, state = made("mlp")
    with pytest.raises(ValueError, match="labels"):
        over_examples(el2n, net, state, DATA, labels=np.zeros(shape, np.int32))


def test_data_on_the_device_and_on_the_host_score_alike() -> None:
    net, state = made("mlp")
    there = jax.tree.map(jnp.asarray, DATA)
    a, b = (over_examples(el2n, net, state, data, batch_size=8) for data in (DATA, there))
    np.testing.assert_array_equal(a, b)
