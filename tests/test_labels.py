"""Labels: what is ignored is nowhere, numbers stay numbers, and what does not fit is refused."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dynamics import fit, losses, mesh, models, population, scores, step, task, watch
from dynamics.data import corrupt, of_arrays, shapes
from dynamics.data.rows import take
from dynamics.data.stream import resident, sampled, streamed, whole
from dynamics.losses import IGNORED
from dynamics.probes import AreaUnderMargin, Cartography, Evaluate, Forgetting, Memorisation
from dynamics.scores import confident_joint, relabelled
from dynamics.task.multiscale import multiscale
from dynamics.types import Aux, Batch, Task

B, T, C = 5, 6, 4
DRAW = np.random.default_rng(0)
Z = jnp.asarray(DRAW.normal(0, 2, (B, T, C)), jnp.float32)
FULL = DRAW.integers(0, C, (B, T)).astype(np.int32)
HERE = DRAW.random((B, T)) < 0.6
HERE[0], HERE[1], HERE[2] = True, False, np.arange(T) == 3  # all, none and one of the labels
Y = jnp.asarray(np.where(HERE, FULL, IGNORED))
KEY = jax.random.key(0)
LOSSES = {
    loss.__name__: loss
    for loss in (
        *(losses.cross_entropy, losses.label_smoothing, losses.generalised_cross_entropy),
        *(losses.symmetric_cross_entropy, losses.squared_error),
    )
}
OWN = LOSSES | {"one's own": optax.softmax_cross_entropy_with_integer_labels}
SCORES = {
    score.__name__: score
    for score in (
        *(scores.el2n, scores.loss, scores.entropy, scores.probability, scores.l1_error),
        *(scores.logit_margin, scores.probability_margin, scores.grand),
    )
}


def of_inputs(loss: Any = losses.cross_entropy) -> Task:
    """A task whose logits are its inputs, times the only parameter: a matrix."""
    return task.of_function(lambda w, x: x @ w, loss=loss)


def batch(y: Any, x: Any = Z) -> Batch:
    return Batch(x=x, y=jnp.asarray(y), index=jnp.arange(len(x)))


def measured(probe: Any, net: Task, name: str, data: Any, params: Any, k: int = 1) -> Any:
    """What a probe measures on ``k`` members that all have these parameters."""
    states = population.broadcast(step.given(params), k)
    return probe.measure(watch.context(net, mesh.make(), {name: data}), (), states)[1]


def alone(i: int) -> Batch:
    """One example, cut to the places that have a label."""
    return Batch(x=Z[i, HERE[i]][None], y=Y[i, HERE[i]][None], index=jnp.zeros(1, jnp.int32))


# ---- what is ignored ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_no_label_is_0_and_so_is_its_gradient(name: str) -> None:
    loss = LOSSES[name]
    value, gradient = loss(Z, Y), jax.grad(lambda z: loss(z, Y).sum())(Z)
    assert not np.asarray(value)[~HERE].any() and not np.asarray(gradient)[~HERE].any()
    np.testing.assert_array_equal(np.asarray(value)[HERE], loss(Z, jnp.asarray(FULL))[HERE])
    free = jax.grad(lambda z: loss(z, jnp.asarray(FULL)).sum())(Z)
    np.testing.assert_array_equal(np.asarray(gradient)[HERE], np.asarray(free)[HERE])
    broken = jnp.where(HERE[..., None], Z, jnp.nan)  # what stands there is never looked at
    np.testing.assert_array_equal(loss(broken, Y), value)
    assert np.asarray(gradient)[HERE].any(axis=-1).all()


@pytest.mark.parametrize("z_loss", [False, True], ids=["plain", "z_loss"])
@pytest.mark.parametrize("name", OWN)
def test_an_example_is_the_mean_over_the_labels_it_has(name: str, z_loss: bool) -> None:
    """For every loss, also one that knows nothing of the convention."""
    net = of_inputs(OWN[name])
    net = task.z_loss(net) if z_loss else net
    h = {"z_loss": jnp.float32(0.3)}

    def total(x: Any, one: Batch) -> Any:
        value, (_, aux) = net.loss(jnp.eye(C), {}, dataclasses.replace(one, x=x), KEY, h)
        return value * len(one.index), aux

    gradient, aux = jax.grad(total, has_aux=True)(Z, batch(Y))
    assert not np.asarray(gradient)[~HERE].any()
    assert np.asarray(aux.loss)[1] == 0
    for i in (0, 2, 3, 4):
        one, wanted = jax.grad(total, has_aux=True)(alone(i).x, alone(i))
        np.testing.assert_allclose(aux.loss[i], wanted.loss[0], rtol=1e-6)
        np.testing.assert_allclose(gradient[i][HERE[i]], one[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", SCORES)
def test_a_score_is_that_of_the_places_with_a_label(name: str) -> None:
    state, net = step.given(jnp.eye(C)), of_inputs()
    found = np.asarray(SCORES[name](net, state, batch(Y)))
    assert found.shape == (B,) and np.isnan(found[1])
    for i in (0, 2, 3, 4):
        wanted = SCORES[name](net, state, alone(i))[0]
        np.testing.assert_allclose(found[i], wanted, rtol=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_an_example_without_its_only_label_has_no_score(name: str) -> None:
    """And those beside it keep theirs, to the last bit."""
    state, net, x = step.given(jnp.eye(C)), of_inputs(), Z[:, 0]
    full = np.asarray(SCORES[name](net, state, batch(FULL[:, 0], x)))
    found = np.asarray(SCORES[name](net, state, batch(Y[:, 0], x)))
    np.testing.assert_array_equal(found, np.where(HERE[:, 0], full, np.nan))


def test_vog_of_no_label_is_nan() -> None:
    found = scores.input_gradient(of_inputs(), step.given(jnp.eye(C)), batch(Y[:, 0], Z[:, 0]))
    np.testing.assert_array_equal(np.isnan(found).all(axis=1), ~HERE[:, 0])
    assert np.isfinite(np.asarray(found)[HERE[:, 0]]).all()


@pytest.mark.parametrize("mode", ["native", "scales"])
def test_pixels_without_a_label_are_not_trained_on(mode: Any) -> None:
    x = jnp.asarray(DRAW.normal(size=(3, 8, 8, C)), jnp.float32)
    y = DRAW.integers(0, C, (3, 8, 8)).astype(np.int32)
    y[0] = y[1, :, 4:] = IGNORED
    net = multiscale(of_inputs(), scales=(0.5, 1.0), cross_entropy=mode)
    h = {"consistency": jnp.float32(0)}
    total = lambda x: net.loss(jnp.eye(C), {}, batch(y, x), KEY, h)[0]  # noqa: E731
    aux = net.loss(jnp.eye(C), {}, batch(y, x), KEY, h)[1][1]
    gradient = np.asarray(jax.grad(total)(x))
    assert aux.loss[0] == 0 and not gradient[0].any()
    if mode == "native":
        assert not gradient[1, :, 4:].any()
        half = task.of_function(lambda w, x: x @ w).evaluate(
            jnp.eye(C), {}, batch(y[1:2, :, :4], x[1:2, :, :4]), {}
        )
        np.testing.assert_allclose(aux.loss[1], half.loss[0], rtol=1e-6)
    evaluated = net.evaluate(jnp.eye(C), {}, batch(y, x), h)
    assert evaluated.loss[0] == 0 and np.isfinite(evaluated.loss).all()


def test_accuracy_is_of_the_labels_there_are() -> None:
    right = np.asarray(Z.argmax(axis=-1)) == FULL
    data = of_arrays(np.asarray(Z), np.asarray(Y))
    found = measured(Evaluate(1, batch_size=2), of_inputs(), "test", data, jnp.eye(C), 2)
    wanted = [right[i, HERE[i]].mean() for i in (0, 2, 3, 4)]
    np.testing.assert_allclose(found["accuracy"], np.mean(wanted), rtol=1e-6)
    each_loss = np.asarray(losses.cross_entropy(Z, Y))
    wanted = [each_loss[i, HERE[i]].mean() for i in (0, 2, 3, 4)]
    np.testing.assert_allclose(found["loss"], np.mean(wanted), rtol=1e-6)


@pytest.mark.parametrize("make", [Cartography, AreaUnderMargin])
def test_streaming_scores_are_of_the_labels_there_are(make: Any) -> None:
    def folded(z: Any, y: Any, index: Any) -> dict[str, Any]:
        probe, z, y = make(B, 1), jnp.asarray(z), jnp.asarray(y)
        aux = Aux(loss=jnp.zeros(len(y)), logits=z, y=y, index=jnp.asarray(index, jnp.int32))
        return probe.fold(probe.init(step.given({})), aux)[1]

    for name, value in folded(Z, Y, np.arange(B)).items():
        for i in range(B):
            one = [np.nan] * B
            if HERE[i].any():
                one = folded(Z[i, HERE[i]][None], Y[i, HERE[i]][None], [i])[name]
            np.testing.assert_allclose(value[i], one[i], rtol=1e-5, err_msg=name)


def test_forgetting_leaves_out_what_has_no_label() -> None:
    probe = Forgetting(3, 1)
    carry = probe.init(step.given({}))
    for labels in ([1, 0, IGNORED], [1, IGNORED, IGNORED], [0, 1, IGNORED]):
        z = jnp.asarray([[0.0, 1], [1, 0], [1, 0]])
        aux = Aux(jnp.zeros(3), z, jnp.asarray(labels), jnp.arange(3))
        carry, found = probe.fold(carry, aux)
    np.testing.assert_array_equal(found["events"], [1, 1, np.nan])


def test_examples_without_a_label_are_neither_wrong_nor_right() -> None:
    n = 30
    clean = DRAW.integers(0, C, n).astype(np.int32)
    labels = np.where(np.arange(n) % 3 == 0, (clean + 1) % C, clean)
    x = DRAW.normal(size=(n, C)).astype(np.float32)
    known = DRAW.random(n) < 0.7

    def of(at: Any, given: Any) -> Any:
        data = of_arrays(x[at], np.zeros(at.sum(), np.int32))
        probe = Memorisation(1, given[None, at], clean[at])
        return measured(probe, of_inputs(), "train", data, jnp.eye(C))

    found = of(np.ones(n, bool), np.where(known, labels, IGNORED))
    for name, value in of(known, labels).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


NOISE = {
    "symmetric": lambda y: corrupt.symmetric(y, 0.4, 10, 0),
    "symmetric_including": lambda y: corrupt.symmetric_including(y, 0.4, 10, 0),
    "asymmetric_cifar10": lambda y: corrupt.asymmetric_cifar10(y, 0.4, 0),
    "circular": lambda y: corrupt.circular(y, 0.4, [range(5), range(5, 10)], 0),
    "transition": lambda y: corrupt.transition(y, np.full((10, 10), 0.1), 0),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_leaves_alone_what_has_no_label(name: str) -> None:
    y = np.arange(200) % 10
    known = DRAW.random(200) < 0.7
    found = NOISE[name](np.where(known, y, IGNORED))
    assert (found.labels[~known] == IGNORED).all() and (found.clean[~known] == IGNORED).all()
    assert not found.mask[~known].any() and (found.labels[known] >= 0).all()
    assert found.rate == (found.labels != found.clean)[known].mean()
    if name == "symmetric":
        assert found.mask.sum() == round(0.4 * known.sum())


def test_outlines_leave_alone_what_has_no_label() -> None:
    clean = shapes.shapes(0, n=3).y.copy()
    clean[:, :, :10] = IGNORED
    found = shapes.outlines(clean, 0)
    assert (found.labels[:, :, :10] == IGNORED).all()
    assert found.rate == found.mask[:, :, 10:].mean() > 0


def test_no_label_looks_wrong_that_is_none() -> None:
    p = DRAW.dirichlet(np.ones(C), 80)
    labels, known = p.argmax(axis=1), np.arange(80) % 4 > 0
    labels[::3] = (labels[::3] + 1) % C
    some = np.where(known, labels, IGNORED)
    np.testing.assert_array_equal(relabelled(p, some), relabelled(p, labels) & known)
    found, alone = confident_joint(p, some), confident_joint(p[known], labels[known])
    np.testing.assert_array_equal(found.counts, alone.counts)
    np.testing.assert_array_equal(found.flagged[known], alone.flagged)
    assert not found.flagged[~known].any() and (found.confident[~known] == -1).all()


# ---- labels that are numbers --------------------------------------------------------------------

X = DRAW.normal(size=(24, 3)).astype(np.float32)
TARGETS = DRAW.normal(size=24)
STREAMS = {
    "resident": lambda data, keys: resident(data, 6, 1),
    "streamed": lambda data, keys: streamed(data, 6, keys),
    "sampled": lambda data, keys: sampled(data, 6, 1, np.full((1, 24), 1 / 24)),
    "whole": lambda data, keys: whole(data, 1),
}


def linear(loss: Any, outputs: int = 1) -> Task:
    start = lambda key: 0.1 * jax.random.normal(key, (3, outputs))  # noqa: E731
    return task.of_function(lambda w, x: x @ w, init=start, loss=loss)


def trained(net: Task, data: Any, kind: str = "resident", probes: Any = (), steps: int = 1) -> Any:
    devices, keys = mesh.for_population(1), jax.random.split(jax.random.key(0), 1)
    state = fit.init(net, optax.sgd(0.1), keys, {}, devices)
    made = STREAMS[kind](data, keys)
    return fit.fit(
        net, optax.sgd(0.1), state, made, steps, devices, probes=list(probes), data={"test": data}
    )


@pytest.mark.parametrize("kind", STREAMS)
def test_targets_are_trained_on_as_they_are(kind: str) -> None:
    """What was fitted to (0, 1, 2) is fitted to (0.5, 1.7, 2.0): the first loss in closed form."""
    data, net = of_arrays(X, TARGETS), linear(losses.squared_error)
    keys = jax.random.split(jax.random.key(0), 1)
    made = STREAMS[kind](data, keys)
    own = jax.tree.map(lambda x: x[0], made.own)
    fed = jax.tree.map(lambda x: x[0], next(made.host(0))) if made.host else ()
    seen = jax.jit(made.batch)(made.shared, own, fed, keys[0], jnp.int32(0))
    assert seen.y.dtype == jnp.float32
    np.testing.assert_array_equal(seen.y, TARGETS[seen.index].astype(np.float32))
    w = np.asarray(net.init(jax.random.fold_in(keys[0], 0), {})[0], np.float64)
    wanted = 0.5 * (X[seen.index] @ w[:, 0] - TARGETS[seen.index]) ** 2
    np.testing.assert_allclose(trained(net, data, kind).rows["loss"][0], wanted.mean(), rtol=1e-5)


def test_a_regression_is_least_squares_and_has_no_accuracy() -> None:
    data, net = of_arrays(X, TARGETS), linear(losses.squared_error)
    found = trained(net, data, "whole", [Evaluate(400)], 400)
    best = np.linalg.lstsq(X.astype(np.float64), TARGETS, rcond=None)[0]
    assert found.state is not None
    np.testing.assert_allclose(np.asarray(found.state.params)[0, :, 0], best, atol=1e-4)
    assert "loss" in found.measured["test"] and "accuracy" not in found.measured["test"]
    one = population.take(found.state, 0)
    each = scores.over_examples(scores.loss, net, one, data, batch_size=7)
    np.testing.assert_allclose(each, 0.5 * (X @ best - TARGETS) ** 2, atol=1e-4)


def test_several_targets_have_no_accuracy_and_soft_labels_do() -> None:
    soft = DRAW.dirichlet(np.ones(3), 24)
    for y, loss, has in ((X * 2, losses.squared_error, 0), (soft, losses.soft_cross_entropy, 1)):
        net, data = linear(loss, 3), of_arrays(X, y)
        found = measured(Evaluate(1), net, "test", data, jnp.eye(3))
        assert ("accuracy" in found) == has
        assert found["loss"].shape == (1,)
    right = X.argmax(axis=1) == soft.argmax(axis=1)
    np.testing.assert_allclose(found["accuracy"], right.mean(), rtol=1e-6)
    p = np.exp(X) / np.exp(X).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found["loss"], -(soft * np.log(p)).sum(axis=1).mean(), rtol=1e-5)


def test_soft_labels_of_one_class_are_labels() -> None:
    onehot = jax.nn.one_hot(FULL, C)
    np.testing.assert_allclose(
        losses.soft_cross_entropy(Z, onehot), losses.cross_entropy(Z, jnp.asarray(FULL)), rtol=1e-5
    )
    y = FULL[:, 0]
    hard = trained(linear(losses.cross_entropy, C), of_arrays(X, np.resize(y, 24)), steps=3)
    given = of_arrays(X, np.eye(C, dtype=np.float32)[np.resize(y, 24)])
    soft = trained(linear(losses.soft_cross_entropy, C), given, steps=3)
    np.testing.assert_allclose(hard.rows["loss"], soft.rows["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (np.uint8, np.int32),
        (np.int64, np.int32),
        (bool, np.int32),
        (np.float64, np.float32),
        (np.float16, np.float32),
    ],
)
def test_the_types_of_labels(given: Any, seen: Any) -> None:
    y = np.asarray([1, 0, 1, 1], given)
    data = of_arrays(X[:4], y)
    assert take(data, slice(None)).y.dtype == seen
    assert resident(data, 2, 1, labels=y[None]).own["labels"].dtype == seen
    made = whole(data, 1, labels=y[None])
    assert made.own["y"].dtype == made.shared["y"].dtype == seen


def test_labels_keep_64_bits_where_jax_has_them() -> None:
    with jax.enable_x64(True):
        assert take(of_arrays(X, TARGETS), slice(None)).y.dtype == np.float64


# ---- labels that don't fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (lambda: of_arrays(X, np.full(24, 2**40)), "labels must fit int32, got int64 from 1099"),
        (lambda: of_arrays(X, np.array(["cat"] * 24)), "labels must be integers .* got <U3"),
        (
            lambda: resident(of_arrays(X, FULL.ravel()[:24]), 6, 1, labels=TARGETS[None]),
            "labels must be int32 like those of the data, got float64",
        ),
        (
            lambda: whole(of_arrays(X, TARGETS), 1, labels=FULL.ravel()[None, :24]),
            "labels must be float64 like those of the data, got int32",
        ),
        (lambda: losses.squared_error(Z[0], jnp.zeros(T)), r"float labels .* \(6, 4\), .* \(6,\)"),
        (lambda: losses.squared_error(Z[0], jnp.zeros((T, 1))), r"float labels .* got \(6, 1\)"),
        (lambda: losses.soft_cross_entropy(Z[0], Y[0]), "soft labels .* got int32 .*cross_entropy"),
        (lambda: losses.correct(Z[0], jnp.zeros(T)), "accuracy needs labels that are classes"),
    ],
)
def test_what_is_refused(case: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case()


@pytest.mark.parametrize("name", [*LOSSES, "correct"])
@pytest.mark.parametrize("shape", [(T, 1), (1, T), (T, C), ()])
def test_integer_labels_are_never_broadcast(name: str, shape: Any) -> None:
    use = {**LOSSES, "correct": losses.correct}[name]
    with pytest.raises(ValueError, match=re.escape("labels of classes must be integers (6,)")):
        use(Z[0], jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"squared_error"}))
def test_a_loss_of_classes_refuses_numbers_before_it_is_compiled(name: str) -> None:
    net = linear(LOSSES[name], C)
    with pytest.raises(ValueError, match="labels of classes .* got float32 .* squared_error"):
        trained(net, of_arrays(X, TARGETS))
    with pytest.raises(ValueError, match="labels of classes"):
        scores.over_examples(scores.el2n, net, step.given(jnp.ones((3, C))), of_arrays(X, TARGETS))


def test_logits_without_an_axis_of_outputs_are_refused() -> None:
    net = task.of_function(lambda w, x: (x @ w)[:, 0], loss=losses.squared_error)
    data = take(jax.tree.map(jnp.asarray, of_arrays(X, TARGETS)), slice(None))
    with pytest.raises(ValueError, match=r"a loss must give a number for each label or example"):
        net.evaluate(jnp.ones((3, 1)), {}, data, {})


def test_a_network_of_classes_learns_beside_what_it_ignores() -> None:
    """Half the labels away: trained as on the other half, whatever stands in the inputs there."""
    digits = models.make(models.MLP(width=8, depth=1), C)
    y = np.resize(FULL[:, 0], 24)
    known = np.arange(24) % 2 == 0
    some = of_arrays(X, np.where(known, y, IGNORED))
    net = task.of_dataset(digits, some)
    found = trained(net, some, "whole", steps=5)
    strange = of_arrays(np.where(known[:, None], X, 1e3).astype(np.float32), some.y)
    other = trained(net, strange, "whole", steps=5)
    for a, b in zip(*(jax.tree.leaves(r.state.params) for r in (found, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
