"""Stability of SGD against dense operators (checks 14, 15) and exact sharpness (check 17)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from references.stability import critical, mean_square_matrix, mean_square_radius

from dynamics.data import synthetic
from dynamics.stability import exact, sgd

N, P = 24, 8
RATE, BOUND = jax.jit(sgd.critical_learning_rate), jax.jit(sgd.necessary)  # one program each
RADIUS = jax.jit(sgd.spectral_radius)


@pytest.fixture(autouse=True, scope="module")
def double():
    with jax.enable_x64(True):
        yield


def features(kind, seed=0, n=N, p=P):
    """Per-example gradients f64[n, p]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    if kind == "equal":
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    return x * rng.standard_t(3, size=(n, 1)) if kind == "heavy" else x


def rounded(pair):
    return float(pair[0]), float(pair[1])


# ---- the operator -------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_operator_is_the_mean_over_every_batch(batch, replacement):
    x, eta = features("normal", n=5, p=3), 0.1
    c = sgd.noise_factor(batch, 5, replacement=replacement)
    wanted = mean_square_matrix(x, eta, batch, replacement)
    assert abs(np.linalg.eigvals(wanted)).max() == pytest.approx(
        mean_square_radius(x, eta, c), abs=1e-12
    )
    value, error = rounded(RADIUS(jnp.array(x), eta, c))
    assert value == pytest.approx(mean_square_radius(x, eta, c), abs=1e-9) and error < 1e-9


def test_the_operator_acts_on_matrices_as_written():
    x, eta, c = jnp.array(features("heavy")), 0.05, 0.3
    found = sgd.modes(x)
    h = jnp.diag(found.curvature)
    p = jnp.array(np.random.default_rng(1).standard_normal((P, P)))
    p = p @ p.T
    keep = np.eye(P) - eta * np.asarray(h)
    rows, h, p = np.asarray(found.x), np.asarray(h), np.asarray(p)
    noise = sum((r @ p @ r) * np.outer(r, r) for r in rows) / N - h @ p @ h
    image = jax.jit(sgd.mean_square(x, eta, c))(p)
    np.testing.assert_allclose(image, keep @ p @ keep + eta**2 * c * noise, rtol=1e-10)
    np.testing.assert_allclose(found.x.T @ found.x / N, h, atol=1e-12)
    np.testing.assert_allclose(np.linalg.eigvalsh(x.T @ x / N), found.curvature, rtol=1e-10)


@pytest.mark.parametrize("kind", ["equal", "normal", "heavy"])
@pytest.mark.parametrize("c", [1.0, 0.25, 0.0])
def test_the_critical_rate_is_where_the_radius_is_one(kind, c):
    x = features(kind)
    value, error = rounded(RATE(jnp.array(x), c))
    assert value == pytest.approx(critical(x, c), rel=1e-9) and error < 1e-6 * value
    below, above = (float(RADIUS(jnp.array(x), f * value, c)[0]) for f in (0.99, 1.01))
    assert below < 1 + 1e-9 < above


def test_more_parameters_than_examples_change_nothing_but_directions_that_stand_still():
    x = features("heavy", n=6, p=4)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((13, 13)))[0]
    for c in (1.0, 0.2):
        for own in (x, np.concatenate([x, 0 * x, x])):  # fewer examples than parameters, and more
            other = np.concatenate([own, np.zeros((len(own), 9))], axis=1) @ turn
            assert float(RATE(jnp.array(other), c)[0]) == pytest.approx(critical(own, c), rel=1e-9)
            assert float(RADIUS(jnp.array(other), 0.01, c)[0]) == pytest.approx(
                mean_square_radius(own, 0.01, c), rel=1e-9
            )


def test_gradient_descent_is_the_limit_of_large_batches():
    x = jnp.array(features("heavy"))
    top = float(np.linalg.eigvalsh(x.T @ x / N)[-1])
    assert float(RATE(x, 0.0)[0]) == pytest.approx(2 / top, rel=1e-12)


def test_equal_norms_and_single_examples_reach_the_trace_law():  # check 14
    x = jnp.array(features("equal", n=60, p=12))
    eta, _ = RATE(x, sgd.noise_factor(1, 60))
    assert abs(float(eta) * float(jnp.mean(jnp.sum(x**2, axis=1))) / 2 - 1) < 1e-4
    for kind in ("normal", "heavy"):  # and unequal ones stay below it
        x = jnp.array(features(kind, n=60, p=12))
        eta, _ = RATE(x, 1.0)
        assert 0.02 < float(eta) * float(jnp.mean(jnp.sum(x**2, axis=1))) / 2 < 0.9


CASES = list(itertools.product(("equal", "normal"), (1, 2, 4, 8), (True, False)))


def test_the_bound_holds_for_every_batch_size_and_the_trace_law_for_one():  # check 15
    found, traces = {}, {}
    for kind, batch, replacement in CASES:
        x = jnp.array(features(kind, n=60, p=12))
        c = sgd.noise_factor(batch, 60, replacement=replacement)
        eta, _ = RATE(x, c)
        case = (kind, batch, replacement)
        found[case] = float(BOUND(x, eta, c))
        traces[case] = float(eta * jnp.mean(jnp.sum(x**2, axis=1)) / 2)
        assert float(sgd.by_trace(x, eta, c)) <= found[case] + 1e-12
    assert len(found) == 16 and max(found.values()) <= 1 + 1e-6
    assert max(found.values()) > 0.999  # tight, for batches of one
    assert all(traces[case] <= 1 + 1e-6 for case in CASES if case[1] == 1)
    assert traces["equal", 4, True] > 1.5 and traces["equal", 4, False] > 1.5


def test_the_bound_against_its_formula():
    x, eta, c = features("heavy"), 0.3, 0.4
    h = x.T @ x / N
    fourth = np.mean(np.sum(x**2, axis=1) ** 2)
    square = (h**2).sum()
    wanted = eta / 2 * (c * fourth + (1 - c) * square) / np.trace(h)
    assert float(BOUND(jnp.array(x), eta, c)) == pytest.approx(wanted)
    trace = np.trace(h)
    wanted = eta / 2 * (c * trace**2 + (1 - c) * square) / trace
    assert float(sgd.by_trace(jnp.array(x), eta, c)) == pytest.approx(wanted)
    assert float(sgd.by_trace(jnp.array(x), eta, 1.0)) == pytest.approx(eta * trace / 2)


def test_single_precision_finds_the_same():
    x = features("normal")
    found = float(RATE(jnp.array(x, jnp.float32), 0.25)[0])
    assert found == pytest.approx(critical(x, 0.25), rel=1e-5)


def test_noise_factors():
    assert sgd.noise_factor(4, 100) == 0.25
    assert sgd.noise_factor(500, 100) == 0.002
    assert sgd.noise_factor(100, 100, replacement=False) == 0
    assert sgd.noise_factor(1, 100, replacement=False) == 1
    assert sgd.noise_factor(1, 1, replacement=False) == 0
    for wrong in ((0, 5, True), (6, 5, False), (1, 0, True)):
        with pytest.raises(ValueError, match="batch_size must be from 1 to"):
            sgd.noise_factor(wrong[0], wrong[1], replacement=wrong[2])


# ---- one direction, and batches -----------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_break_even_is_the_mean_over_every_batch(batch):
    curvatures = np.random.default_rng(0).gamma(2.0, size=5)
    batches = list(itertools.combinations(curvatures, batch))
    wanted = np.mean([(1 - 0.7 * np.mean(b)) ** 2 for b in batches])
    found = sgd.break_even(jnp.array(curvatures), 0.7, batch)
    assert float(found) == pytest.approx(wanted, rel=1e-12)


@pytest.fixture(scope="module")
def batches():
    """A quadratic of 6 examples, its batches of two, and what they say of one point."""
    x, y = features("normal", n=6, p=4), np.arange(6.0)
    pairs = np.array(list(itertools.combinations(range(6), 2)))
    theta = {"a": jnp.array([0.3, -1.0]), "b": jnp.array([2.0, 0.1])}

    def loss(params, rows):
        flat = jnp.concatenate([params["a"], params["b"]])
        return 0.5 * jnp.mean((jnp.array(x)[rows] @ flat - jnp.array(y)[rows]) ** 2)

    flat = np.concatenate([theta["a"], theta["b"]])
    slopes = [x[p].T @ (x[p] @ flat - y[p]) / 2 for p in pairs]
    return x, y, pairs, theta, loss, np.stack(slopes)


def product_of(loss, theta):
    return lambda rows, v: jax.jvp(lambda p: jax.grad(loss)(p, rows), (theta,), (v,))[1]


def test_what_batches_say_of_sharpness(batches):
    x, y, pairs, theta, loss, slopes = batches
    everything = jnp.arange(6)
    gradient = lambda rows: jax.grad(loss)(theta, rows)  # noqa: E731
    own = sgd.along(gradient, product_of(loss, theta), jnp.array(pairs))
    full = sgd.along(
        gradient, lambda _, v: product_of(loss, theta)(everything, v), jnp.array(pairs)
    )
    h = x.T @ x / 6
    ratios = [g @ (x[p].T @ x[p] / 2) @ g / (g @ g) for g, p in zip(slopes, pairs, strict=True)]
    value, error = sgd.batch_sharpness(own)
    assert float(value) == pytest.approx(np.mean(ratios), rel=1e-10)
    assert float(error) == pytest.approx(np.std(ratios, ddof=1) / np.sqrt(15), rel=1e-10)
    noise = np.einsum("mi,mj->ij", slopes, slopes) / 15
    wanted = np.trace(h @ noise) / np.trace(noise)
    assert float(sgd.interaction(full)) == pytest.approx(wanted, rel=1e-10)
    whole = x.T @ (x @ np.concatenate([theta["a"], theta["b"]]) - y) / 6
    found = sgd.gradient_noise(full, jnp.array(whole @ whole))
    assert float(found) == pytest.approx(np.trace(h @ noise) / (whole @ whole), rel=1e-10)


def test_gradient_noise_says_whether_the_mean_loss_rises(batches):
    """E L(theta - eta g) - L = (eta^2 / 2) |grad L|^2 (GNI - 2 / eta), exactly on a quadratic."""
    x, y, pairs, theta, loss, slopes = batches
    flat, eta = np.concatenate([theta["a"], theta["b"]]), 0.37
    whole = x.T @ (x @ flat - y) / 6
    after = np.mean([np.mean((x @ (flat - eta * g) - y) ** 2) / 2 for g in slopes])
    full = sgd.along(
        lambda rows: jax.grad(loss)(theta, rows),
        lambda _, v: product_of(loss, theta)(jnp.arange(6), v),
        jnp.array(pairs),
    )
    found = float(sgd.gradient_noise(full, jnp.array(whole @ whole)))
    wanted = after - np.mean((x @ flat - y) ** 2) / 2
    assert eta**2 / 2 * (whole @ whole) * (found - 2 / eta) == pytest.approx(wanted, rel=1e-9)


# ---- exact sharpness ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whitened():
    """f64[40, 6]: exactly white and symmetric."""
    x = np.asarray(synthetic.symmetric(0, n=40, dim=6).x, np.float64)
    return x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / 40)).T


def sharpness(predict, params, x):
    """Of the Hessian of 1/2 mean (f - y)^2, by jax, at labels that the parameters fit."""
    flat, back = ravel_pytree(params)
    y = predict(params, x)
    h = jax.jit(jax.hessian(lambda p: 0.5 * jnp.mean((predict(back(p), x) - y) ** 2)))(flat)
    values = np.linalg.eigvalsh(h)
    return values.sum(), values[-1], np.sqrt((values**2).sum())


def random(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.array(rng.standard_normal(shape)) for shape in shapes)


def test_synthetic_data_are_white_and_symmetric():
    data = synthetic.symmetric(3, n=40, dim=6)
    np.testing.assert_allclose(data.x.T @ data.x / 40, np.eye(6), atol=1e-6)
    np.testing.assert_array_equal(data.x[:20], -data.x[20:])


@pytest.mark.parametrize(
    ("predict", "closed"),
    [
        (lambda p, x: x @ (p[0] ** 2 - p[1] ** 2), exact.difference),
        (lambda p, x: x @ (p[0] * p[1]), exact.product),
    ],
    ids=["difference", "product"],
)
def test_diagonal_nets(predict, closed, whitened):  # check 17
    params = random(6, 6)
    found = closed(*params)
    np.testing.assert_allclose(found, sharpness(predict, params, jnp.array(whitened)), rtol=1e-10)
    u, v = params
    assert float(exact.product(u, v).trace) >= 2 * float(jnp.abs(u * v).sum())


def test_two_layer_nets(whitened):  # check 17
    w, a = random((5, 6), 5, seed=1)
    x = jnp.array(whitened)
    predict = lambda p, x: jax.nn.relu(x @ p[0].T) @ p[1]  # noqa: E731
    trace, largest, frobenius = sharpness(predict, (w, a), x)
    gradients = exact.relu_gradients(w, a, x)
    found = exact.of_gradients(gradients)
    np.testing.assert_allclose(found, (trace, largest, frobenius), rtol=1e-10)
    np.testing.assert_allclose(exact.relu_trace(w, a), trace, rtol=1e-10)
    jacobian = jax.jit(jax.jacobian(lambda p: predict(p, x)))((w, a))
    flat = jnp.concatenate([jacobian[0].reshape(40, -1), jacobian[1]], axis=1)
    np.testing.assert_allclose(gradients, flat, atol=1e-12)


def test_a_balanced_net_has_the_least_trace_of_its_function(whitened):  # check 17
    w, a = random((5, 6), 5, seed=1)
    x = jnp.array(whitened)
    other = exact.balanced(w, a)
    path = np.sqrt(6) * float(exact.path_norm(w, a))
    assert float(exact.relu_trace(w, a)) > 1.05 * path
    np.testing.assert_allclose(exact.relu_trace(*other), path, rtol=1e-10)
    before, after = (jax.nn.relu(x @ w.T) @ a for w, a in ((w, a), other))
    np.testing.assert_allclose(before, after, atol=1e-12)


def test_data_that_are_not_white_break_the_identities(whitened):
    w, a = random((5, 6), 5, seed=1)
    x = jnp.array(whitened)[: len(whitened) // 2]  # white still, and no longer symmetric
    trace = float(exact.of_gradients(exact.relu_gradients(w, a, x)).trace)
    assert abs(trace / float(exact.relu_trace(w, a)) - 1) > 1e-3


def test_of_gradients_is_the_same_from_either_side():
    x = features("heavy", n=9, p=4)
    for one in (x, x.T):
        h = one.T @ one / len(one)
        wanted = (np.trace(h), np.linalg.eigvalsh(h)[-1], np.linalg.norm(h))
        np.testing.assert_allclose(exact.of_gradients(jnp.array(one)), wanted, rtol=1e-10)
