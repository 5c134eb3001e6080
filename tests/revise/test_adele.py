"""Labels that are corrected while a network trains on them, through the one step and one fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from references import segmentation as reference

from dynamics import fit, mesh, optim, population, task
from dynamics.data.stream import resident
from dynamics.record import Recorder
from dynamics.revise import DETECT, IGNORED, Adele, Correction, Curve, Detection
from dynamics.revise.curve import detected, value
from dynamics.revise.pixels import prediction
from dynamics.scores.examples import over_examples
from dynamics.task.multiscale import multiscale
from dynamics.types import NEVER, Dataset, Results, Revision

K, N, SIDE, C, BATCH, EPOCHS = 3, 12, 8, 3, 4, 4
STEPS = N // BATCH  # of an epoch
CORRECTION = Correction(confidence=0.4)


class Brightness(nn.Module):
    """Logits of a pixel from its own brightness: convex, and compiled at once."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        return nn.Dense(C, kernel_init=nn.initializers.normal(0.5))(jnp.stack([x, x**2], axis=-1))


def images() -> tuple[Dataset, np.ndarray]:
    """Images of three levels of brightness, which are the classes, and labels K of them wrong."""
    draw = np.random.default_rng(0)
    y = draw.integers(0, C, (N, SIDE, SIDE)).astype(np.int32)
    y[0, y[0] == 1] = 0  # an image without class 1
    x = (np.array([0.0, 1.0, -1.0])[y] + draw.normal(0, 0.2, y.shape)).astype(np.float32)
    wrong = draw.random((K, *y.shape)) < 0.2
    labels = np.where(wrong, draw.integers(0, C, wrong.shape), y).astype(np.int32)
    labels[:, 1, :2] = IGNORED
    blank, one = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    return Dataset(x=x, y=y, mean=blank, std=one), labels


class Neighbourhood(nn.Module):
    """Logits of a pixel from 3 x 3 pixels."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        return nn.Conv(C, (3, 3))(x[..., None])


DATA, LABELS = images()
NET = task.classification(Brightness(), (SIDE, SIDE))


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A probe: classes and confidences of every example after every step."""

    every: int = 1
    name: str = "seen"

    def start(self, context: Any, state: Any) -> Any:
        return ()

    def measure(self, context: Any, carry: Any, state: Any) -> Any:
        found = over_examples(predicted, NET, state, DATA, each=context.each)
        return carry, {"classes": found[0], "sure": found[1]}


def predicted(task: Any, state: Any, batch: Any) -> Any:
    return prediction(task.evaluate(state.params, state.extras, batch, {}).logits)


def adele(**options: Any) -> Adele:
    given = {"every": 1, "epochs": EPOCHS, "parts": STEPS, "correction": CORRECTION}
    return Adele(C, **given | options)


def trained(
    revision: Any, epochs: int = EPOCHS, net: Any = NET, devices: Any = None, **options: Any
) -> Results:
    rule = optim.Adam(learning_rate=0.1)
    optimizer, devices = rule.make(STEPS * EPOCHS), devices or mesh.make()
    keys = jax.random.split(jax.random.key(0), K)
    hyperparameters = rule.hyperparameters() | {"consistency": 0.5}
    state = fit.init(net, optimizer, keys, hyperparameters, devices)
    stream = resident(DATA, BATCH, K, labels=LABELS)
    return fit.fit(
        *(net, optimizer, state, stream, STEPS * epochs, devices),
        data={"train": DATA},
        revision=revision,
        **options,
    )


def column(results: Results, name: str) -> np.ndarray:
    """[epochs, K]"""
    return tiny.by_member(results.measured["adele"], name)


def by_hand(labels: Any, results: Results, epoch: int, active: Any, **rules: Any) -> np.ndarray:
    """Labels [K, ...] corrected with the predictions after an epoch, pixel by pixel."""
    at = epoch * STEPS
    classes, sure = (tiny.at(results, "seen", name, at) for name in ("classes", "sure"))
    options = {"tau": 0.4, "rule": "both", "present": True, "guard": False} | rules
    parts = zip(labels, classes, sure, active, strict=True)
    return np.stack([reference.corrected(*part, **options) for part in parts])


WHEN = np.array([[NEVER, 2, 3], [NEVER, 3, NEVER], [NEVER, NEVER, NEVER]], np.int32)


@pytest.fixture(scope="module")
def whole() -> Results:
    revision = adele(when=WHEN, clean=DATA.y)
    assert isinstance(revision, Revision)
    return trained(revision, probes=[Predictions()])


# ---- what it measures ---------------------------------------------------------------------------


def test_curves_are_of_predictions_from_all_over_the_epoch_and_the_first_labels(
    whole: Results,
) -> None:
    for epoch in range(1, EPOCHS + 1):
        counts = np.zeros((K, C, 3), int)
        for part in range(STEPS):
            seen = tiny.at(whole, "seen", "classes", (epoch - 1) * STEPS + part + 1)
            for k in range(K):
                mine = np.arange(part, N, STEPS)
                counts[k] += reference.counts(seen[k, mine], LABELS[k, mine], C)
        hit, truth, found = np.moveaxis(counts, -1, 0)
        for c in range(C):
            wanted = hit[:, c] / (truth + found - hit)[:, c]
            np.testing.assert_allclose(column(whole, f"iou.{c}")[epoch - 1], wanted, rtol=1e-6)


def test_onsets_and_active_classes_are_recorded(whole: Results) -> None:
    for c in (1, 2):
        for epoch in range(1, EPOCHS + 1):
            when = np.where(WHEN[:, c] <= epoch, WHEN[:, c], np.inf)
            np.testing.assert_array_equal(column(whole, f"onset.{c}")[epoch - 1], when)
    np.testing.assert_array_equal(
        column(whole, "active"), [[0, 0, 0], [1, 0, 0], [2, 1, 0], [2, 1, 0]]
    )
    assert "onset.0" not in whole.measured["adele"].columns


# ---- what it changes ----------------------------------------------------------------------------


def test_a_class_is_corrected_when_it_is_due_and_with_those_that_follow(whole: Results) -> None:
    first = by_hand(LABELS, whole, 2, [[False, True, False]] + [[False] * C] * 2)
    active = [[False, True, True], [False, True, False], [False] * C]
    second = by_hand(first, whole, 3, active)
    np.testing.assert_array_equal(tiny.at(whole, "adele", "labels", STEPS * EPOCHS), second)
    changed = (second != LABELS).mean(axis=(1, 2, 3))
    assert changed[0] > changed[1] > 0.02 and changed[2] == 0
    for epoch, labels in ((1, LABELS), (2, first), (3, second), (4, second)):
        right = (labels == DATA.y).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(column(whole, "label_accuracy")[epoch - 1], right, rtol=1e-6)
    assert (second == DATA.y)[0].mean() > (LABELS == DATA.y)[0].mean() + 0.05


@pytest.mark.parametrize(
    ("repeat", "interval", "among"),
    [
        ("once", 1, "due"),
        ("restart", 1, "active"),
        ("restart", 2, "due"),
        ("cumulative", 1, "due"),
        ("cumulative", 2, "active"),
    ],
)
def test_ways_to_correct(whole: Results, repeat: Any, interval: int, among: Any) -> None:
    revision = adele(when=WHEN, repeat=repeat, interval=interval, among=among)
    results = trained(revision, probes=[Predictions()])
    labels = LABELS
    for epoch in range(1, EPOCHS + 1):
        active = WHEN <= epoch
        due = active & ((epoch - WHEN) % interval == 0) if repeat != "once" else WHEN == epoch
        now = due.any(axis=1, keepdims=True)
        before = LABELS if repeat == "restart" else labels
        after = by_hand(before, results, epoch, active & now if among == "active" else due)
        labels = np.where(now[..., None, None], after, labels)
    np.testing.assert_array_equal(tiny.at(results, "adele", "labels", STEPS * EPOCHS), labels)
    assert (labels != tiny.at(whole, "adele", "labels", STEPS * EPOCHS)).any()


def test_the_network_trains_on_what_was_corrected(whole: Results) -> None:
    """Up to the correction every bit is that of a run without it; a replica that is never
    corrected stays so to the end; the others learn the labels as they are by then."""
    plain = trained(None)
    losses, without = tiny.losses(whole), tiny.losses(plain)
    np.testing.assert_array_equal(losses[: 2 * STEPS], without[: 2 * STEPS])
    np.testing.assert_array_equal(losses[:, 2], without[:, 2])
    for a, b in zip(tiny.leaves(whole), tiny.leaves(plain), strict=True):
        np.testing.assert_array_equal(a[2], b[2])
        assert a.dtype == np.int32 or (a[0] != b[0]).any()  # a step is a step
    assert (losses[2 * STEPS :, 0] < without[2 * STEPS :, 0]).all()  # the wrong ones are fewer


def test_labels_that_are_never_due_stay(whole: Results) -> None:
    """The control: the same revision, without a detection."""
    control = trained(adele(when=np.full((K, C), NEVER, np.int32)))
    np.testing.assert_array_equal(tiny.at(control, "adele", "labels", STEPS * EPOCHS), LABELS)
    for a, b in zip(tiny.leaves(control), tiny.leaves(trained(None)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_predictor_says_what_the_labels_become() -> None:
    def certain(params: Any, extras: Any, batch: Any, hyperparameters: Any) -> Any:
        aux = NET.evaluate(params, extras, batch, hyperparameters)
        zeros = jnp.zeros_like(aux.logits)
        return dataclasses.replace(aux, logits=zeros.at[..., 2].set(50.0))

    when = np.full((K, C), NEVER, np.int32)
    when[:, 2] = 1
    results = trained(adele(when=when, predictor=NET._replace(evaluate=certain)), epochs=EPOCHS)
    labels = tiny.at(results, "adele", "labels", STEPS * EPOCHS)
    np.testing.assert_array_equal(labels, np.where(LABELS == 0, 2, LABELS))


# ---- when ---------------------------------------------------------------------------------------


def test_a_class_is_corrected_in_the_epoch_of_its_detection() -> None:
    detection = Detection(drop=0.6, min_points=3, plateau=0.0)
    results = trained(adele(detection=detection))
    found = 0
    for c in (1, 2):
        curves = column(results, f"iou.{c}").astype(np.float64)
        for k in range(K):
            epochs = [e for e in range(1, EPOCHS + 1) if detected(curves[:e, k], detection)]
            onset = column(results, f"onset.{c}")[-1, k]
            assert onset == min(epochs, default=np.inf)
            found += np.isfinite(onset)
    assert 0 < found


def test_only_classes_left_to_detection_are_detected() -> None:
    """From curves that have bent; background never is."""
    curve = value(np.arange(1.0, 10.0), Curve(0.6, 0.5, 1.0))
    curves = np.broadcast_to(curve[None, :, None], (K, 9, C))
    when = np.array([[DETECT] * C, [DETECT, 9, DETECT], [DETECT, 8, NEVER]], np.int32)
    onset = np.full((K, C), NEVER, np.int32)
    adele(epochs=9, when=when)._advance(onset, curves, 9)
    np.testing.assert_array_equal(onset, [[NEVER, 9, 9], [NEVER, 9, 9], [NEVER, NEVER, NEVER]])
    onset = np.full((K, C), NEVER, np.int32)
    adele(epochs=9)._advance(onset, curves, 5)
    assert (onset == NEVER).all()  # before the bend


# ---- checkpoints, meshes, populations -----------------------------------------------------------


def test_a_run_cut_and_continued_has_the_same_bits(whole: Results, tmp_path: Any) -> None:
    """Cut within an epoch, at a correction, and between two."""
    revision = adele(when=WHEN, clean=DATA.y)
    for cut in (5, 6, 8):
        part = fit_until(cut, revision, tmp_path)
        assert part.state is not None and int(part.state.step) == cut
    tiny.assert_equal(whole, fit_until(STEPS * EPOCHS, revision, tmp_path))


def fit_until(steps: int, revision: Any, folder: Any) -> Results:
    rule = optim.Adam(learning_rate=0.1)
    optimizer, devices = rule.make(STEPS * EPOCHS), mesh.make()
    keys = jax.random.split(jax.random.key(0), K)
    state = fit.init(NET, optimizer, keys, rule.hyperparameters() | {"consistency": 0.5}, devices)
    return fit.fit(
        *(NET, optimizer, state, resident(DATA, BATCH, K, labels=LABELS), steps, devices),
        data={"train": DATA},
        revision=revision,
        store=Recorder(folder / "run", ()),
        checkpoint_every=4,
        probes=[Predictions()],
    )


def test_another_mesh_gives_the_same_labels(whole: Results) -> None:
    spread = trained(adele(when=WHEN, clean=DATA.y), devices=mesh.make(3))
    labels = [tiny.at(run, "adele", "labels", STEPS * EPOCHS) for run in (spread, whole)]
    np.testing.assert_array_equal(*labels)
    for c in range(C):
        np.testing.assert_allclose(column(spread, f"iou.{c}"), column(whole, f"iou.{c}"), rtol=1e-6)


def test_convolutions_over_scales() -> None:
    """Convolutions, replica by replica on a CPU, and the labels what the scales say together."""
    plain = task.classification(Neighbourhood(), (SIDE, SIDE))
    net = multiscale(plain, scales=(0.5, 1.0), rho=0.3)
    when = np.full((K, C), NEVER, np.int32)
    when[1:, 1] = 1
    revision = adele(
        when=when, epochs=1, parts=1, every=STEPS, correction=Correction(confidence=0.0)
    )
    results = trained(revision, epochs=1, net=net)
    labels = tiny.at(results, "adele", "labels", STEPS)
    assert np.isfinite(tiny.losses(results, "consistency")).all()
    assert (labels[0] == LABELS[0]).all()
    for k in (1, 2):
        member = population.take(results.state, k)
        classes, sure = over_examples(predicted, net, member, DATA)
        wanted = reference.corrected(
            *(LABELS[k], np.asarray(classes), np.asarray(sure), [False, True, False]),
            tau=0.0, rule="both", present=True, guard=False,
        )  # fmt: skip
        np.testing.assert_array_equal(labels[k], wanted)
        assert (wanted != LABELS[k]).any()


# ---- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every of 'adele' must be at least 1, got 0"),
        ({"epochs": 0}, "Adele.epochs must be >= 1, got 0"),
        ({"parts": 13}, "Adele.parts must be <= 12, the examples there are, got 13"),
        ({"interval": 0}, "Adele.interval must be >= 1, got 0"),
        ({"num_classes": 1}, "Adele.num_classes must be >= 2, got 1"),
        ({"when": WHEN[:, :2]}, r"Adele.when must have shape \(3, 3\), got \(3, 2\)"),
        ({"clean": DATA.y[:5]}, r"Adele.clean must have shape \(12, 8, 8\), got \(5, 8, 8\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: Any, message: str) -> None:
    revision = dataclasses.replace(adele(), **options)
    with pytest.raises(ValueError, match=message):
        trained(revision, epochs=1)


def test_a_stream_without_labels_is_refused() -> None:
    rule = optim.SGD()
    optimizer, devices = rule.make(3), mesh.make()
    keys = jax.random.split(jax.random.key(0), K)
    state = fit.init(NET, optimizer, keys, rule.hyperparameters(), devices)
    with pytest.raises(ValueError, match=r"labels of shape \(3, 12, 8, 8\).* member, got none"):
        fit.fit(
            *(NET, optimizer, state, resident(DATA, BATCH, K), 3, devices),
            data={"train": DATA},
            revision=adele(),
        )


def test_more_epochs_than_announced_are_refused() -> None:
    with pytest.raises(ValueError, match="Adele.epochs must count all epochs, got 1 in epoch 2"):
        trained(adele(epochs=1), epochs=2)
