"""Wrong labels from losses, targets and probabilities: against slow ways, and on digits."""

import math

import jax
import jaxtyping
import numpy as np
import pytest
from scipy.stats import norm

from dynamics import fit, mesh, models, optim, scores, statistics, task
from dynamics.data import DataConfig, corrupt, load
from dynamics.data.stream import resident
from dynamics.probes import Score

CLASSES = 4


# ---- small losses -------------------------------------------------------------------------------


def two_means(values):
    """The sorted values cut in two where the squares within are least."""
    cuts = range(1, len(values))
    return min(cuts, key=lambda k: k * values[:k].var() + (len(values) - k) * values[k:].var())


def normalised(losses):
    low, high = min(losses), max(losses)
    return np.array([(v - low) / (high - low) for v in losses])


def gaussians(x, share):
    """The density of each component times its weight, from each value's share in it."""
    weight, mean = share.sum(axis=1) / len(x), (share @ x) / share.sum(axis=1)
    spread = [s @ (x - m) ** 2 / s.sum() + 5e-4 for s, m in zip(share, mean, strict=True)]
    parts = zip(weight, mean, spread, strict=True)
    return mean, np.stack([w * norm(m, v**0.5).pdf(x) for w, m, v in parts])


def mixture(values):
    """Expectation and maximisation as on paper, from the two means."""
    order = np.argsort(values)
    x, bound = values[order], -math.inf
    first = np.arange(len(x)) < two_means(x)
    mean, density = gaussians(x, np.stack([first, ~first]).astype(float))
    for _ in range(10):
        before, bound = bound, np.log(density.sum(axis=0)).mean()
        mean, density = gaussians(x, density / density.sum(axis=0))
        if bound - before < 1e-2:
            break
    out = np.empty(len(x))
    out[order] = (density / density.sum(axis=0))[int(np.argmin(mean))]
    return out


def losses_of(n=300, part=0.3, seed=0):
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < part
    return np.where(wrong, rng.normal(4, 1, n), rng.gamma(2, 0.4, n)), wrong


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("part", [0.1, 0.4, 0.8])
def test_the_mixture_the_slow_way(part, seed):
    losses, wrong = losses_of(part=part, seed=seed)
    clean = scores.small_loss(losses)
    np.testing.assert_allclose(clean, mixture(normalised(losses)), rtol=1e-8, atol=1e-12)
    far = scores.small_loss(losses + 9 * wrong)
    np.testing.assert_array_equal(far < 0.5, wrong)


def test_the_mixture_knows_no_order_scale_or_offset():
    losses, _ = losses_of()
    clean = scores.small_loss(losses)
    order = np.random.default_rng(1).permutation(len(losses))
    np.testing.assert_array_equal(scores.small_loss(losses[order]), clean[order])
    np.testing.assert_array_equal(scores.small_loss(losses), clean)
    np.testing.assert_allclose(scores.small_loss(7 * losses - 3), clean, rtol=1e-9, atol=1e-12)
    single = scores.small_loss(losses.astype(np.float32))
    np.testing.assert_allclose(single, clean, rtol=1e-3, atol=1e-6)
    assert clean.dtype == single.dtype == np.float64


def test_losses_of_the_last_epochs_are_averaged():
    """Each from 0 to 1 first, so that no epoch outweighs the others."""
    history = np.stack([losses_of(seed=0)[0] * scale for scale in (1.0, 3.0)])
    history[1] += np.random.default_rng(5).normal(0, 0.5, 300)
    ends = [history[0].argmin(), history[0].argmax()]
    history[1, ends] = history[1].mean()
    found = scores.small_loss(history, last=2)
    mean = (normalised(history[0]) + normalised(history[1])) / 2
    assert mean.min() > 0 and mean.max() < 1  # what is averaged isn't mapped again
    np.testing.assert_allclose(found, mixture(mean), rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(scores.small_loss(history), scores.small_loss(history[1]))
    three = np.stack([losses_of(seed=7)[0], *history])
    np.testing.assert_array_equal(scores.small_loss(three, last=2), found)


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        ([1.0, math.nan, math.inf], {}, "losses must be finite, got 2 of 3"),
        ([2.0, 2.0, 2.0], {}, "losses must differ .* got 3 that are all 2"),
        ([], {}, "losses must differ .* got 0"),
        ([1.0, 2.0], {"last": 2}, r"at least last = 2 >= 1 epochs, got shape \(2,\)"),
        ([1.0, 2.0], {"last": 0}, "at least last = 0 >= 1 epochs"),
    ],
)
def test_losses_that_say_nothing_are_refused(losses, options, message):
    with pytest.raises(ValueError, match=message):
        scores.small_loss(np.array(losses), **options)


# ---- targets ------------------------------------------------------------------------------------


def test_targets_that_prefer_another_class():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 50)
    targets = rng.dirichlet(np.ones(CLASSES), 64)  # 14 rows of padding
    targets[50:] = math.pi
    found = scores.relabelled(targets, labels)
    np.testing.assert_array_equal(found, targets[:50].argmax(axis=1) != labels)
    np.testing.assert_array_equal(scores.relabelled(targets * 1e-3, labels), found)
    names = rng.permutation(CLASSES)  # classes under other names
    renamed = targets[:, np.argsort(names)]
    np.testing.assert_array_equal(scores.relabelled(renamed, names[labels]), found)
    stacked = scores.relabelled(np.stack([targets, targets[::-1]]), np.stack([labels, labels]))
    np.testing.assert_array_equal(stacked[0], found)
    np.testing.assert_array_equal(stacked[1], scores.relabelled(targets[::-1], labels))


def test_never_visited_is_not_relabelled():
    targets = np.zeros((3, 2))
    targets[2] = [0.3, 0.0]
    np.testing.assert_array_equal(
        scores.relabelled(targets, np.array([0, 1, 1])), [False, False, True]
    )
    assert not scores.relabelled(np.full((1, 2), 0.5), np.array([1])).any()  # a tie


def test_targets_that_do_not_fit_are_refused():
    labels = np.array([0, 1, 1])
    with pytest.raises(ValueError, match=r"rows >= 3, classes\] for labels \(3,\), got \(2, 2\)"):
        scores.relabelled(np.zeros((2, 2)), labels)
    with pytest.raises(ValueError, match="labels must be from 0 to 0, got 0 to 1"):
        scores.relabelled(np.zeros((3, 1)), labels)
    with pytest.raises(ValueError, match="targets must be finite, got 1 others"):
        scores.relabelled(np.array([[0.1, math.nan], [0, 0], [0, 0]]), labels)


# ---- confident joint ----------------------------------------------------------------------------


def joint_of(p, labels):
    """Class by class, example by example."""
    n, c = p.shape
    thresholds = []
    for j in range(c):
        mine = [p[i, j] for i in range(n) if labels[i] == j]
        thresholds.append(math.fsum(mine) / len(mine) if mine else math.inf)
    counts, flagged = np.zeros((c, c), int), np.zeros(n, bool)
    for i in range(n):
        reached = [j for j in range(c) if p[i, j] >= thresholds[j]]
        if reached:
            j = max(reached, key=lambda k: p[i, k])
            counts[labels[i], j] += 1
            flagged[i] = j != labels[i] and p[i].argmax() != labels[i]
    return counts, thresholds, flagged


def predictions(n=200, seed=0, sharp=1.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, CLASSES)) * sharp
    truth = rng.integers(0, CLASSES, n)
    logits[np.arange(n), truth] += 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p, corrupt.symmetric(truth, 0.25, CLASSES, seed)


@pytest.mark.parametrize("sharp", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_joint_the_slow_way(seed, sharp):
    p, noise = predictions(seed=seed, sharp=sharp)
    found = scores.confident_joint(p, noise.labels)
    counts, thresholds, flagged = joint_of(p, noise.labels)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.thresholds, thresholds, rtol=1e-14)
    np.testing.assert_array_equal(found.flagged, flagged)
    assert found.counts.sum() == (found.confident >= 0).sum() <= len(p)
    single = scores.confident_joint(p.astype(np.float32), noise.labels)
    np.testing.assert_array_equal(single.flagged, flagged)


def test_the_joint_finds_what_was_flipped():
    p, noise = predictions(n=1000, sharp=0.5)
    found = scores.confident_joint(p, noise.labels)
    precision, recall = statistics.precision_recall(found.flagged, noise.mask)
    assert precision > 0.95 and recall > 0.95


def test_the_joint_knows_no_order_and_no_names():
    p, noise = predictions(sharp=2.0)
    found, rng = scores.confident_joint(p, noise.labels), np.random.default_rng(9)
    order = rng.permutation(len(p))
    shuffled = scores.confident_joint(p[order], noise.labels[order])
    np.testing.assert_array_equal(shuffled.counts, found.counts)
    np.testing.assert_array_equal(shuffled.flagged, found.flagged[order])
    names = rng.permutation(CLASSES)
    old = np.argsort(names)
    renamed = scores.confident_joint(p[:, old], names[noise.labels])
    np.testing.assert_array_equal(renamed.counts, found.counts[np.ix_(old, old)])
    np.testing.assert_array_equal(renamed.flagged, found.flagged)


def test_one_of_several_thresholds_and_of_a_rare_class():
    """Worked by hand: class 2 has a threshold of 0.2, which unsure examples reach."""
    p = np.array(
        [
            [0.80, 0.10, 0.10],
            [0.60, 0.15, 0.25],  # below t_0 = 0.70: confidently 2, yet likeliest 0
            [0.20, 0.60, 0.20],  # reaches t_1 = 0.60 and t_2: the likelier
            [0.40, 0.35, 0.25],  # labelled 1? t_1 is the mean of its two: 0.475
            [0.45, 0.35, 0.20],
        ]
    )
    found = scores.confident_joint(p, np.array([0, 0, 1, 1, 2]))
    np.testing.assert_allclose(found.thresholds, [0.7, 0.475, 0.2])
    np.testing.assert_array_equal(found.confident, [0, 2, 1, 2, 2])
    np.testing.assert_array_equal(found.counts, [[1, 0, 1], [0, 1, 1], [0, 0, 1]])
    np.testing.assert_array_equal(found.flagged, [False, False, False, True, False])


def test_rounding_does_not_lift_a_threshold():
    """Equal probabilities reach their own mean."""
    for p in np.random.default_rng(0).uniform(0.5, 1, 50):
        rows = np.tile([p, 1 - p], (7, 1))
        found = scores.confident_joint(rows, np.zeros(7, int))
        np.testing.assert_array_equal(found.counts, [[7, 0], [0, 0]])
        assert found.thresholds[1] == math.inf  # no label names it


@pytest.mark.parametrize(
    ("p", "labels", "message"),
    [
        (np.full((3, 2), 0.5), [0, 1], r"one row of probabilities .* \(3, 2\), \(2,\)"),
        (np.full((2, 2), 0.6), [0, 1], "sum to 1, got 2 of 2 that don't, the first at 0"),
        (np.array([[0.5, 0.5], [1.5, -0.5]]), [0, 1], "got 1 of 2 that don't, the first at 1"),
        (np.array([[0.5, 0.5], [math.nan, 0.5]]), [0, 1], "got 1 of 2 that don't"),
        (np.full((2, 2), 0.5), [0, 2], "labels must be from 0 to 1, got 0 to 2"),
        (np.full((2, 2), 0.5), [-1, 0], "labels must be from 0 to 1, got -1 to 0"),
        (np.zeros((0, 2)), [], "labels must be integers"),
    ],
)
def test_probabilities_that_do_not_fit_are_refused(p, labels, message, unchecked):
    with pytest.raises(ValueError, match=message):
        scores.confident_joint(p, np.array(labels, int))


@pytest.fixture
def unchecked():
    """Without the type checks of the tests, which would speak first."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


# ---- digits -------------------------------------------------------------------------------------

SEEDS = 3


def probabilities(task, state, batch):
    aux = task.evaluate(state.params, state.extras, batch, state.hyperparameters)
    return jax.nn.softmax(aux.logits)


@pytest.fixture(scope="module")
def trained():
    """Digits, 40 % of the labels wrong, 40 epochs: three seeds under ELR, the same under CE."""
    data, batch = load(DataConfig(source="digits")), 64
    net = task.of_dataset(models.make(models.MLP(width=256, depth=2), 10), data.train)
    net = task.elr(net, len(data.train), 10)
    rule = optim.SGD(learning_rate=0.02, nesterov=False, weight_decay=1e-3)
    y = np.asarray(data.train.y)
    noise = [corrupt.symmetric(y, 0.4, 10, seed) for seed in range(SEEDS)]
    labels = np.stack([one.labels for one in noise] * 2)
    epoch, devices = len(y) // batch, mesh.for_population(2 * SEEDS)
    optimizer = rule.make(40 * epoch)
    keys = jax.numpy.tile(jax.random.split(jax.random.key(0), SEEDS), 2)
    scalars = rule.hyperparameters() | {
        "elr_lambda": np.repeat([7.0, 0.0], SEEDS),
        "elr_beta": 0.7,
    }
    state = fit.init(net, optimizer, keys, scalars, devices)
    at = [3 * epoch, 40 * epoch]
    results = fit.fit(
        *(net, optimizer, state, resident(data.train, batch, 2 * SEEDS, labels=labels)),
        *(40 * epoch, devices),
        probes=[
            Score(scores.loss, at, "loss", labels=labels),
            Score(probabilities, at, "p"),
        ],
        data={"train": data.train},
    )
    early, late = (
        {k: results.arrays[k, "score"].at(step=t).values for k in ("loss", "p")} for t in at
    )
    return noise, early, late, np.asarray(results.state.extras["targets"])


def of_seeds(fn):
    return np.array([fn(seed) for seed in range(SEEDS)])


def test_targets_find_wrong_labels_where_nothing_is_memorised(trained):
    noise, _, _, targets = trained

    def found(replica):
        one = noise[replica % SEEDS]
        flagged = scores.relabelled(targets[replica], one.labels)
        return statistics.precision_recall(flagged, one.mask)

    assert of_seeds(found).min() >= 0.93  # precision and recall
    assert of_seeds(lambda seed: found(SEEDS + seed)[1]).max() <= 0.1


def test_losses_find_wrong_labels_early(trained):
    noise, early, late, _ = trained
    auc = lambda at: of_seeds(  # noqa: E731
        lambda seed: statistics.auc(at["loss"][SEEDS + seed], noise[seed].mask)
    )
    assert auc(early).min() >= 0.95
    assert (auc(early) - auc(late)).min() >= 0.08

    def found(seed):
        clean = scores.small_loss(early["loss"][SEEDS + seed])
        return statistics.precision_recall(clean < 0.5, noise[seed].mask)

    assert of_seeds(found).mean(axis=0).min() >= 0.9


def test_the_confident_joint_needs_a_network_that_has_not_memorised(trained):
    noise, early, late, _ = trained

    def found(at, replica):
        one = noise[replica % SEEDS]
        flagged = scores.confident_joint(at["p"][replica], one.labels).flagged
        return statistics.precision_recall(flagged, one.mask)

    held = of_seeds(lambda seed: found(late, seed))  # by ELR
    assert held.min() >= 0.93
    after_three = of_seeds(lambda seed: found(early, SEEDS + seed))
    assert after_three[:, 0].min() >= 0.95 and after_three[:, 1].min() >= 0.6
    assert of_seeds(lambda seed: found(late, SEEDS + seed)[1]).max() <= 0.1
