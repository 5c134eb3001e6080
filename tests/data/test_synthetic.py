"""Each problem's known answer, measured."""

import math

import numpy as np
import pytest

from dynamics.data.synthetic import bayes_accuracy, gaussian_mixture, random_labels, teacher

PROBLEMS = {
    "gaussian_mixture": lambda seed, n: gaussian_mixture(
        seed, n=n, dim=5, num_classes=3, separation=2.0
    ),
    "teacher": lambda seed, n: teacher(seed, n=n, dim=5, num_classes=3)[0],
    "random_labels": lambda seed, n: random_labels(seed, n=n, dim=5, num_classes=3),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem(name):
    make = PROBLEMS[name]
    data, longer, other = make(0, 50), make(0, 80), make(1, 50)
    assert data.x.shape == (50, 5) and data.x.dtype == np.float32 and len(data) == 50
    assert data.y.dtype == data.row.dtype == np.int32
    assert set(longer.y) == {0, 1, 2}
    np.testing.assert_array_equal(data.row, np.arange(50))
    np.testing.assert_array_equal((data.x - data.mean) / data.std, data.x)
    np.testing.assert_array_equal(longer.x[:50], data.x)  # a prefix
    np.testing.assert_array_equal(longer.y[:50], data.y)
    assert (other.x != data.x).all()


def test_two_classes_have_bayes_accuracy_phi_of_half_the_separation():
    for separation in (0.0, 1.0, 2.5, 6.0):
        phi = 0.5 * math.erfc(-separation / 2 / math.sqrt(2))
        np.testing.assert_allclose(bayes_accuracy(2, separation), phi, rtol=1e-12)


@pytest.mark.parametrize("num_classes, separation", [(2, 1.0), (2, 3.0), (3, 2.0), (10, 3.0)])
def test_the_best_classifier_reaches_the_bayes_accuracy(num_classes, separation):
    n = 40_000
    data = gaussian_mixture(0, n=n, dim=12, num_classes=num_classes, separation=separation)
    right = (data.x[:, :num_classes].argmax(1) == data.y).mean()
    p = bayes_accuracy(num_classes, separation)
    assert abs(right - p) < 4 * math.sqrt(p * (1 - p) / n)


def test_no_separation_is_chance_and_a_large_one_is_certain():
    np.testing.assert_allclose(bayes_accuracy(5, 0.0), 0.2, rtol=1e-12)
    np.testing.assert_allclose(bayes_accuracy(5, 12.0), 1.0, rtol=1e-8)


def test_centres_are_as_far_apart_as_said():
    data = gaussian_mixture(0, n=60_000, dim=4, num_classes=3, separation=5.0)
    centres = np.stack([data.x[data.y == c].mean(0) for c in range(3)])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.linalg.norm(centres[a] - centres[b]) - 5.0) < 4 * math.sqrt(2 / 20_000)
    noise = data.x - centres[data.y]
    np.testing.assert_allclose(np.cov(noise.T), np.eye(4), atol=0.03)


@pytest.mark.parametrize("num_classes", [2, 7])
def test_the_teacher_is_right_about_every_example(num_classes):
    data, weights = teacher(3, n=5000, dim=9, num_classes=num_classes)
    np.testing.assert_array_equal(np.argmax(data.x.astype(float) @ weights, axis=1), data.y)
    assert weights.shape == (9, num_classes) and weights.dtype == np.float32


def test_random_labels_are_memorised_but_not_learned():
    data = random_labels(0, n=4040, dim=40, num_classes=4)
    targets = np.eye(4)[data.y]
    train, fresh = slice(0, 40), slice(40, None)
    weights = np.linalg.solve(data.x[train].astype(float), targets[train])
    answers = (data.x @ weights).argmax(1)
    np.testing.assert_array_equal(answers[train], data.y[train])
    assert abs((answers == data.y)[fresh].mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_half_of_the_problems_with_two_examples_per_dimension_are_separable():
    """Cover's theorem, in two dimensions where separability is a gap in the angles."""
    trials, separable = 400, 0
    for seed in range(trials):
        data = random_labels(seed, n=4, dim=2, num_classes=2)
        sign = 2.0 * data.y - 1
        angles = np.sort(np.arctan2(data.x[:, 1] * sign, data.x[:, 0] * sign))
        gaps = np.diff(angles, append=angles[0] + 2 * np.pi)
        separable += gaps.max() > np.pi  # all signed examples within a half-plane
    assert abs(separable / trials - 0.5) < 4 * math.sqrt(0.25 / trials)


def test_bad_arguments():
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        random_labels(0, n=0, dim=2, num_classes=2)
    with pytest.raises(ValueError, match="num_classes must be >= 2, got 1"):
        teacher(0, n=1, dim=2, num_classes=1)
    with pytest.raises(ValueError, match="dim must be >= num_classes = 3, got 2"):
        gaussian_mixture(0, n=1, dim=2, num_classes=3, separation=1.0)
