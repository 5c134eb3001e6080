"""Singular values of features: closed forms, invariances, exact gradients, and label noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import spectrum as reference

from dynamics import fit, mesh, models, optim, task
from dynamics import representation as rep
from dynamics.data import DataConfig, corrupt, load
from dynamics.data.stream import resident
from dynamics.probes import Evaluate, Score

SPECTRAL = {
    "sve": (rep.singular_value_entropy, reference.entropy, reference.entropy_gradient),
    "lsvr": (rep.largest_singular_value_ratio, reference.ratio, reference.ratio_gradient),
    "dominance": (
        rep.dominance,
        lambda f: reference.dominance(f, 1),
        reference.dominance_gradient,
    ),
    "dominance of 3": (
        lambda f: rep.dominance(f, top=3),
        lambda f: reference.dominance(f, 3),
        lambda f: reference.dominance_of_top_gradient(f, 3),
    ),
}
SHAPES = [(12, 5), (5, 12), (7, 7)]


def made_up(n, d, seed=0):
    """Features whose singular values are far apart."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.linspace(0.5, 2, d)


def evaluated(fn, *arrays):
    """A function of arrays in float64, on the host."""
    with jax.enable_x64(True):
        out = fn(*(jnp.asarray(a, jnp.float64) for a in arrays))
        assert out.dtype == jnp.float64
        return np.asarray(out)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_values(name, shape):
    fn, slow, _ = SPECTRAL[name]
    f = made_up(*shape)
    assert evaluated(fn, f) == pytest.approx(slow(f), rel=1e-12)
    single = fn(jnp.asarray(f, jnp.float32))
    assert single.dtype == jnp.float32
    assert float(single) == pytest.approx(slow(f), rel=1e-5)


def test_values_of_the_other_two():
    z, f = made_up(9, 6), made_up(9, 6, seed=1)
    wanted = reference.consistency(z, f)
    assert evaluated(rep.consistency, z, f) == pytest.approx(wanted, rel=1e-12)
    assert evaluated(rep.covariance, z) == pytest.approx(reference.covariance(z), rel=1e-12)
    assert evaluated(rep.consistency, z, 3 * z) == pytest.approx(0, abs=1e-15)
    assert evaluated(rep.consistency, z, -z) == pytest.approx(4 / 6, rel=1e-12)
    assert evaluated(rep.covariance, 2 * z) == pytest.approx(16 * evaluated(rep.covariance, z))


@pytest.mark.parametrize("rows", [16, 40])
def test_isotropic_features_fill_all_dimensions(rows):
    f = np.concatenate([np.eye(16), np.zeros((rows - 16, 16))])
    for fn in (rep.singular_value_entropy, rep.largest_singular_value_ratio):
        assert evaluated(fn, f) == pytest.approx(math.log(16), abs=1e-14)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(rows, 16)))
    for fn in (rep.singular_value_entropy, rep.largest_singular_value_ratio):
        assert evaluated(fn, 3 * q) == pytest.approx(math.log(16), abs=1e-12)


def test_features_of_rank_one_fill_none():
    f = np.outer([1.0, -2.0, 3.0, 0.5], [0.3, 1.0, -1.0])
    for fn in (rep.singular_value_entropy, rep.largest_singular_value_ratio):
        assert evaluated(fn, f) == pytest.approx(0, abs=1e-13)
        assert evaluated(fn, np.ones((6, 1))) == 0
    assert evaluated(rep.dominance, f) == pytest.approx(1, abs=1e-13)


def test_dominance_is_the_ratio_without_the_logarithm():
    f = made_up(10, 4)
    ratio = evaluated(rep.largest_singular_value_ratio, f)
    assert evaluated(rep.dominance, f) == pytest.approx(math.exp(-ratio), rel=1e-12)


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_invariances(name):
    fn, rng, f = SPECTRAL[name][0], np.random.default_rng(3), made_up(11, 6)
    value = evaluated(fn, f)
    left, _ = np.linalg.qr(rng.normal(size=(11, 11)))
    right, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    same = [left @ f, f @ right, -7.5 * f, f[rng.permutation(11)], f[:, rng.permutation(6)], f.T]
    for other in same:
        assert evaluated(fn, other) == pytest.approx(value, rel=1e-12)
    assert evaluated(fn, f * [1, 1, 1, 1, 1, 5]) != pytest.approx(value, rel=1e-2)


def test_covariance_knows_no_mean_and_no_order():
    rng, z = np.random.default_rng(4), made_up(9, 5)
    value = evaluated(rep.covariance, z)
    for other in (z + rng.normal(size=5), z[rng.permutation(9)], z[:, rng.permutation(5)], -z):
        assert evaluated(rep.covariance, other) == pytest.approx(value, rel=1e-12)
    spread = np.concatenate([np.eye(4), -np.eye(4)])  # directions apart: nothing to penalise
    assert evaluated(rep.covariance, spread) == 0


def test_the_forms_of_an_example():
    f = made_up(6, 4)
    np.testing.assert_allclose(evaluated(rep.unit, f), reference.unit(f), rtol=1e-14)
    np.testing.assert_allclose(evaluated(rep.unit, 5 * f), reference.unit(f), rtol=1e-14)
    centred = evaluated(rep.centred, f)
    for row, out in zip(f, centred, strict=True):
        np.testing.assert_allclose(out, row - sum(row) / 4, rtol=1e-14, atol=1e-14)
    for form in (rep.unit, rep.centred):  # an example's form depends on no other example
        np.testing.assert_array_equal(evaluated(form, f[2:3]), evaluated(form, f)[2:3])


def test_half_precision_is_widened():
    f = jnp.asarray(made_up(8, 4), jnp.bfloat16)
    for fn in (rep.singular_value_entropy, rep.dominance, rep.covariance, rep.unit, rep.centred):
        assert fn(f).dtype == jnp.float32
        np.testing.assert_array_equal(fn(f), fn(f.astype(jnp.float32)))


# ---- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_gradients(name, shape):
    fn, _, gradient = SPECTRAL[name]
    f = made_up(*shape)
    np.testing.assert_allclose(evaluated(jax.grad(fn), f), gradient(f), rtol=1e-10, atol=1e-13)


def test_gradients_of_the_other_two():
    z, f = made_up(9, 6), made_up(9, 6, seed=1)
    found = evaluated(jax.grad(rep.covariance), z)
    np.testing.assert_allclose(found, reference.covariance_gradient(z), rtol=1e-10, atol=1e-13)
    found = evaluated(jax.grad(rep.consistency), z, f)
    np.testing.assert_allclose(found, reference.consistency_gradient(z, f), rtol=1e-10, atol=1e-13)
    assert not evaluated(jax.grad(rep.consistency, argnums=1), z, f).any()  # f is held


@pytest.mark.parametrize("name", SPECTRAL)
def test_gradients_are_finite_where_singular_values_coincide_or_vanish(name):
    fn = jax.grad(SPECTRAL[name][0])
    zero_row = made_up(6, 4)
    zero_row[2] = 0
    for f in (np.eye(5), np.ones((5, 3)), np.diag([1.0, 1.0, 0.0]), zero_row):
        assert np.isfinite(evaluated(fn, f)).all()
    zeros = evaluated(jax.grad(lambda f: rep.consistency(f, jnp.ones_like(f))), zero_row)
    assert np.isfinite(zeros).all() and not zeros[2].any()


# ---- the sum ------------------------------------------------------------------------------------


def test_nmtune_adds_the_three_with_one_sign_turned():
    z, f = made_up(9, 6), made_up(9, 6, seed=1)
    parts = (reference.consistency(z, f), reference.covariance(z), reference.dominance(z, 5))
    code = parts[0] + 0.04 * parts[1] - 0.001 * parts[2]
    assert evaluated(rep.nmtune, z, f) == pytest.approx(code, rel=1e-12)
    paper = 0.01 * (parts[0] + parts[1] - reference.dominance(z, 1))
    form = lambda z, f: 0.01 * rep.nmtune(z, f, (1.0, 1.0, 1.0), top=1)  # noqa: E731
    assert evaluated(form, z, f) == pytest.approx(paper, rel=1e-12)
    by_z, by_f = evaluated(lambda z, f: jnp.stack(jax.grad(rep.nmtune, (0, 1))(z, f)), z, f)
    assert by_z.any() and not by_f.any()


def test_what_does_not_fit_is_refused():
    f = jnp.ones((4, 3))
    with pytest.raises(ValueError, match=r"top must be in 1\.\.3 .* got 5"):
        rep.nmtune(f, f)
    with pytest.raises(ValueError, match=r"top must be in 1\.\.3 .* got 0"):
        rep.dominance(f, top=0)
    with pytest.raises(ValueError, match="weights must be three"):
        rep.nmtune(f, f, (1.0, 0.04))
    with pytest.raises(ValueError, match=r"needs b >= 2 examples, got shape \(1, 3\)"):
        rep.covariance(f[:1])
    with pytest.raises(ValueError, match=r"n, d >= 1, got shape \(0, 3\)"):
        rep.singular_value_entropy(f[:0])
    assert math.isnan(rep.singular_value_entropy(jnp.zeros((4, 3))))


# ---- label noise --------------------------------------------------------------------------------


def test_noisy_labels_spread_the_features():
    """Digits, 40 % of the labels wrong against none, three paired seeds, 60 epochs."""
    data, seeds, batch = load(DataConfig(source="digits")), 3, 64
    module = models.make(models.MLP(width=256, depth=2), data.num_classes)
    net = task.of_dataset(module, data.train)
    rule = optim.SGD(learning_rate=0.02, nesterov=False, weight_decay=1e-3)
    y = np.asarray(data.train.y)
    labels = np.stack(
        [
            corrupt.symmetric(y, rate, 10, seed).labels
            for rate in (0.0, 0.4)
            for seed in range(seeds)
        ]
    )
    steps, devices = 60 * (len(y) // batch), mesh.for_population(2 * seeds)
    optimizer = rule.make(steps)
    keys = jnp.tile(jax.random.split(jax.random.key(0), seeds), 2)
    state = fit.init(net, optimizer, keys, rule.hyperparameters(), devices)
    hidden = Score(rep.of_layer(module, "head"), [steps], "hidden", on="test")
    results = fit.fit(
        *(net, optimizer, state, resident(data.train, batch, 2 * seeds, labels=labels)),
        *(steps, devices),
        probes=[hidden, Evaluate([steps])],
        data={"test": data.test},
    )
    features = results.arrays["hidden", "score"].at(step=steps).values
    assert features.shape == (2 * seeds, len(data.test), 256)
    accuracy = results.measured["test"]["accuracy"].to_numpy()
    assert accuracy[:seeds].min() > 0.95 and accuracy[seeds:].max() < 0.85
    for fn, least in ((rep.singular_value_entropy, 0.20), (rep.largest_singular_value_ratio, 0.25)):
        clean, noisy = np.split(np.asarray(jax.vmap(lambda f: fn(rep.unit(f)))(features)), 2)  # noqa: B023
        assert (noisy - clean).min() >= least
