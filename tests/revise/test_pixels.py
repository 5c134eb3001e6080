"""Counts, and the rules of correction, against loops over pixels."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from references import segmentation as reference

from dynamics.revise import IGNORED, Correction
from dynamics.revise.pixels import corrected, counts, iou, prediction

GENERATOR = np.random.default_rng(0)
C = 4


def made(ignored: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of images that hold different classes, predictions, and their confidence."""
    labels = GENERATOR.integers(0, C, (6, 5, 5)).astype(np.int32)
    for image, missing in enumerate(range(C)):
        labels[image][labels[image] == missing] = 0
    labels[4] = 0
    labels[GENERATOR.random(labels.shape) < ignored] = IGNORED
    predicted = GENERATOR.integers(0, C, labels.shape).astype(np.int32)
    return labels, predicted, GENERATOR.random(labels.shape).astype(np.float32)


def test_counts_and_iou_against_loops() -> None:
    labels, predicted, _ = made()
    found = counts(jnp.asarray(predicted), jnp.asarray(labels), C + 1)
    wanted = reference.counts(predicted, labels, C + 1)
    np.testing.assert_array_equal(found, wanted)
    hit, truth, guess = wanted[:C].T
    np.testing.assert_allclose(iou(found)[:C], hit / (truth + guess - hit), rtol=1e-6)
    assert np.isnan(iou(found)[C])  # a class that is nowhere
    blank = np.full_like(labels, IGNORED)
    assert not np.asarray(counts(jnp.asarray(predicted), jnp.asarray(blank), C)).any()


def test_counts_of_parts_add_up() -> None:
    labels, predicted, _ = made()
    parts = [counts(jnp.asarray(predicted[i::2]), jnp.asarray(labels[i::2]), C) for i in (0, 1)]
    whole = counts(jnp.asarray(predicted), jnp.asarray(labels), C)
    np.testing.assert_array_equal(parts[0] + parts[1], whole)


def test_the_temperature_lowers_the_confidence_and_not_the_class() -> None:
    logits = jnp.asarray(GENERATOR.normal(0, 3, (2, 3, 3, C)).astype(np.float32))
    (a, sure), (b, less) = prediction(logits), prediction(logits, 3.0)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, np.asarray(logits).argmax(axis=-1))
    exps = np.exp(np.asarray(logits, np.float64))
    np.testing.assert_allclose(sure, exps.max(axis=-1) / exps.sum(axis=-1), rtol=1e-5)
    assert (less < sure).all() and (less >= 1 / C).all()


@pytest.mark.parametrize("rule", ["both", "prediction"])
@pytest.mark.parametrize(("present", "guard"), list(itertools.product((True, False), repeat=2)))
def test_the_rules_against_loops(rule: str, present: bool, guard: bool) -> None:
    correction = Correction(confidence=0.3, rule=rule, present=present, guard=guard)
    changed = 0
    for active in itertools.product((False, True), repeat=C):
        labels, predicted, confidence = made()
        if guard:  # little foreground, most of it predicted to be background
            labels[:, 1:], predicted[:, :1] = 0, 0
            labels[:, 0, 3:] = 0
        after = corrected(*map(jnp.asarray, (labels, predicted, confidence, active)), correction)
        wanted = reference.corrected(
            labels, predicted, confidence, active, tau=0.3, rule=rule, present=present, guard=guard
        )
        np.testing.assert_array_equal(after, wanted, err_msg=str(active))
        changed += (wanted != labels).sum()
    assert changed > 50


def test_what_each_option_decides() -> None:
    """One image of a row of pixels; class 1 is active, class 3 is nowhere in the labels."""
    labels = jnp.asarray([[[0, 1, 1, 2, 0, IGNORED]]])
    predicted = jnp.asarray([[[1, 0, 2, 1, 3, 1]]])
    sure, active = jnp.full((1, 1, 6), 0.9), jnp.asarray([False, True, False, False])
    after = lambda a=active, c=sure, **o: corrected(labels, predicted, c, a, Correction(**o))  # noqa: E731
    np.testing.assert_array_equal(after()[0, 0], [1, 0, 1, 2, 0, IGNORED])
    np.testing.assert_array_equal(after(rule="prediction")[0, 0], [1, 0, 1, 1, 0, IGNORED])
    np.testing.assert_array_equal(after(confidence=0.9), labels)  # not above it
    everything = jnp.asarray([False, True, False, True])
    np.testing.assert_array_equal(after(everything)[0, 0], [1, 0, 1, 2, 0, IGNORED])
    free = after(everything, present=False)
    np.testing.assert_array_equal(free[0, 0], [1, 0, 1, 2, 3, IGNORED])
    nobody = jnp.asarray([True, False, False, True])  # background and a class that is not here
    np.testing.assert_array_equal(after(nobody, rule="prediction", present=False), labels)


def test_the_guard_keeps_an_image_that_would_be_emptied() -> None:
    labels = np.zeros((2, 10, 10), np.int32)
    labels[0, :2, :2], labels[1, :6, :6] = 1, 1
    predicted = np.zeros_like(labels)
    predicted[1, :6, :5] = 1  # loses a sixth
    active = jnp.asarray([False, True])
    args = (jnp.asarray(labels), jnp.asarray(predicted), jnp.ones(labels.shape), active)
    np.testing.assert_array_equal(corrected(*args, Correction()), predicted)
    after = corrected(*args, Correction(guard=True))
    np.testing.assert_array_equal(after[0], labels[0])
    np.testing.assert_array_equal(after[1], predicted[1])
