"""What networks make of wrong labels: checks A6-A9 of the specification, paired, as populations."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from references import elr as reference

from dynamics import config as configs
from dynamics import losses, optim, record, task
from dynamics.data import DataConfig, corrupt
from dynamics.models import MLP, Convnet
from dynamics.optim import Train
from dynamics.probes import Evaluate, Memorisation
from dynamics.types import Task, Written
from experiments import early_learning, training
from experiments.early_learning import Config, Curves, Grid, Plus, Rates

TINY = Config(
    data=DataConfig(num_train=120, num_test=60),
    model=MLP(width=8, depth=1),
    train=Train(batch_size=20),
    epochs=3.0,
    plus=Plus(ramp=0),
    study=Curves(replicas=2, detected_at=(1.0,)),
)
DIGITS = Config(study=Curves(replicas=10))


def cells(table: record.Table, **equal: Any) -> dict[str, np.ndarray]:
    """The rows where columns have these values."""
    here = np.all([table.rows[name] == value for name, value in equal.items()], axis=0)
    assert here.any(), equal
    return {name: values[here] for name, values in table.rows.items()}


def last(table: record.Table, name: str, **equal: Any) -> np.ndarray:
    """A column at the last epoch, by replica."""
    found = cells(table, stage="curves", epoch=table.rows["epoch"].max(), **equal)
    return found[name][np.argsort(found["replica"])]


def curve(table: record.Table, name: str, **equal: Any) -> np.ndarray:
    """A column [replica, epoch]."""
    found = cells(table, stage="curves", **equal)
    order = np.lexsort((found["epoch"], found["replica"]))
    return found[name][order].reshape(len(set(found["replica"])), -1)


# ---- the study ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Any:
    return early_learning.load(TINY)


@pytest.fixture(scope="module")
def table(data: Any) -> record.Table:
    return early_learning.run(TINY, data)


def test_the_table(table: record.Table) -> None:
    rows = table.rows
    curves = cells(table, stage="curves")
    assert set(curves["method"]) == {"ce", "elr"} and set(curves["epoch"]) == {0, 1, 2, 3}
    parts = sum(curves[f"wrong_{name}"] for name in ("correct", "memorised", "other"))
    np.testing.assert_allclose(parts, 1, atol=1e-6)
    np.testing.assert_allclose(curves["wrong"], 0.4)
    assert np.isinf(curves["diverged"]).all()
    found = cells(table, stage="detected")
    assert len(found["epoch"]) == 2 * 2 * 2 and set(found["epoch"]) == {1, 3}
    assert np.isnan(found["test_accuracy"]).all() and not np.isnan(curves["test_accuracy"]).any()
    assert all(len(column) == len(rows["epoch"]) for column in rows.values())
    wrong = table.arrays["labels"] != table.arrays["clean"]
    assert wrong.sum(axis=1).tolist() == [48, 48] and (wrong[0] != wrong[1]).any()


def test_methods_are_paired(table: record.Table) -> None:
    """Before the first step there is one network for each replica, whatever will train it."""
    for name in ("test_accuracy", "clean_correct", "wrong_memorised"):
        ce, elr = (cells(table, stage="curves", epoch=0, method=m)[name] for m in ("ce", "elr"))
        np.testing.assert_array_equal(ce, elr)
    ce, elr = (last(table, "test_accuracy", method=m) for m in ("ce", "elr"))
    assert (ce != elr).any()


@pytest.mark.slow
def test_every_method_at_every_rate(data: Any) -> None:
    methods = ("smoothing", "gce", "sce", "elr_plus")
    point = dataclasses.replace(TINY, study=Rates(methods=methods, rates=(0.0, 0.5), replicas=1))
    table = early_learning.run(point, data)
    assert len(table.rows["epoch"]) == 4 * 2 and set(table.rows["epoch"]) == {3}
    assert np.isnan(cells(table, rate=0.0)["wrong_correct"]).all()
    assert not np.isnan(cells(table, rate=0.5)["wrong_correct"]).any()
    np.testing.assert_allclose(cells(table, rate=0.5)["wrong"], 0.5)
    assert np.isnan(cells(table, method="gce")["target_correct"]).all()
    assert not np.isnan(cells(table, method="elr_plus", rate=0.5)["target_correct"]).any()
    measured = [tuple(cells(table, method=m, rate=0.5)["fit_wrong"]) for m in methods]
    assert len(set(measured)) == len(methods)


def test_the_grid_is_one_population_with_one_row_for_cross_entropy(data: Any) -> None:
    study = Grid(strengths=(0.0, 2.0), betas=(0.0, 0.9), replicas=2)
    table = early_learning.run(dataclasses.replace(TINY, study=study), data)
    places = set(
        zip(*(table.rows[n].tolist() for n in ("method", "strength", "beta")), strict=True)
    )
    assert places == {("ce", 0, 0), ("elr", 2, 0), ("elr", 2, 0.9)}


@pytest.mark.slow
def test_points_of_a_sweep_are_those_alone(data: Any) -> None:
    points = configs.grid(TINY, {"rate": (0.2, 0.4), "strength": (3.0,), "seed": (0, 1)})
    together = early_learning.sweep(points, data)
    alone = early_learning.run(points[3], data)
    for name, values in alone.rows.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(together[3].rows[name], values, atol=0.03, err_msg=name)
    np.testing.assert_array_equal(together[3].arrays["labels"], alone.arrays["labels"])
    assert (together[0].arrays["labels"] != together[1].arrays["labels"]).any()


def test_stored_is_not_computed_again(data: Any, tmp_path: Path, monkeypatch: Any) -> None:
    first = early_learning.run(TINY, data, store=tmp_path)
    monkeypatch.setattr(training, "train", None)
    again = early_learning.run(TINY, data, store=tmp_path)
    for name in first.rows:
        np.testing.assert_array_equal(first.rows[name], again.rows[name])
    assert not list(tmp_path.glob("**/stages"))


@pytest.mark.parametrize("kind", ["symmetric", "symmetric_including", "circular"])
def test_noise_of_a_kind(data: Any, kind: Any) -> None:
    point = dataclasses.replace(TINY, noise=kind)
    found = early_learning.labels(point, data, 0.4, 0)
    expected = {"symmetric": 0.4, "symmetric_including": 0.36, "circular": 0.4}[kind]
    assert abs(found.rate - expected) < 0.05
    shift = set(((found.labels - found.clean) % 10)[found.mask].tolist())
    assert shift == {1} if kind == "circular" else len(shift) > 5
    lower = early_learning.labels(point, data, 0.2, 0)
    assert not (lower.mask & ~found.mask).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": "asymmetric_cifar10", "rate": 0.5}, "rate must be < 0.5"),
        ({"train": Train(batch_size=200)}, "batch_size must be <= the 120"),
        ({"epochs": 0.01, "study": Rates()}, "epochs must be at least a step"),
        ({"noise": "cifar100_blocks", "rate": 1.5}, "Config.rate must be >= 0 and <= 1"),
    ],
)
def test_what_does_not_suit_the_data_is_refused(data: Any, change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        early_learning.run(dataclasses.replace(TINY, **change), data)


def test_a_model_and_an_optimizer_are_values(data: Any) -> None:
    """ELR with a convnet, batch norm and Adam, from the config alone."""
    point = dataclasses.replace(
        TINY,
        model=Convnet(channels=(4,), norm="batch"),
        train=Train(rule="adam", learning_rate=1e-3, batch_size=20),
        study=Curves(replicas=1, methods=("elr",), detected_at=()),
        epochs=2.0,
    )
    table = early_learning.run(point, data)
    assert not np.isnan(last(table, "target_correct", method="elr")).any()


# ---- digits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> record.Table:
    """CE and ELR with lambda = 7, beta = 0.7: 10 seeds, 40 epochs, 40 % wrong labels."""
    return early_learning.run(DIGITS, early_learning.load(DIGITS))


def test_early_learning_and_memorisation(digits: record.Table) -> None:  # A6
    correct = curve(digits, "wrong_correct", method="ce")
    assert correct.max(axis=1).min() >= 0.75
    assert correct[:, -1].max() <= 0.05
    assert last(digits, "wrong_memorised", method="ce").min() >= 0.95
    accuracy = curve(digits, "test_accuracy", method="ce")
    assert (accuracy.max(axis=1) - accuracy[:, -1]).min() >= 0.10


def test_elr_does_not_memorise(digits: record.Table) -> None:  # A7
    elr, ce = (last(digits, "test_accuracy", method=m) for m in ("elr", "ce"))
    assert (elr - ce).min() >= 0.15 and (elr - ce).mean() >= 0.20
    assert last(digits, "wrong_memorised", method="elr").max() <= 0.10
    oracle = curve(digits, "test_accuracy", method="ce").max(axis=1)
    assert (elr - oracle).min() >= 0  # over cross-entropy's best epoch, which nobody would know


def test_wrong_labels_are_found(digits: record.Table) -> None:  # A9
    for name in ("precision", "recall"):
        assert last(digits, name, method="elr").min() >= 0.93
    assert last(digits, "recall", method="ce").max() <= 0.1  # the targets alone do not help


def test_the_loss_finds_wrong_labels_early(digits: record.Table) -> None:  # A9b
    early = cells(digits, stage="curves", method="ce", epoch=3)["loss_auc"]
    late = last(digits, "loss_auc", method="ce")
    assert early.min() >= 0.95 and (early - late).min() >= 0.08
    found = cells(digits, stage="detected", method="ce", epoch=3)
    assert found["precision"].mean() >= 0.85 and found["recall"].mean() >= 0.9
    late = cells(digits, stage="detected", method="ce", epoch=40)
    assert late["recall"].mean() < 0.5


def test_the_gradient_of_wrong_labels_fades_and_theirs_is_held(digits: record.Table) -> None:
    """Under CE the coefficient of wrong labels falls as they are memorised; under ELR it stays."""
    ce, elr = (curve(digits, "fit_wrong", method=m) for m in ("ce", "elr"))
    assert (ce[:, -1] < 0.5 * ce[:, 1]).all() and (elr[:, -1] > elr[:, 1]).all()
    assert (
        last(digits, "held_wrong", method="elr") > last(digits, "held_clean", method="elr")
    ).all()


def test_elr_with_noise_that_includes_the_true_class() -> None:  # A7b
    point = dataclasses.replace(
        DIGITS, noise="symmetric_including", study=Curves(replicas=3, every=40.0, detected_at=())
    )
    table = early_learning.run(point, early_learning.load(point))
    elr, ce = (last(table, "test_accuracy", method=m) for m in ("elr", "ce"))
    assert (elr - ce).min() >= 0.13
    wrong = cells(table, stage="curves")["wrong"]
    assert (abs(wrong - 0.36) < 0.03).all()


# ---- negative controls (A8): what looks like ELR and memorises, 60 epochs, 5 seeds --------------


def kl(inner: Task, num_examples: int, num_classes: int) -> Task:
    """Held by the divergence instead of log(1 - <p, t>)."""

    def loss(params: Any, extras: Any, batch: Any, key: Any, hyperparameters: Any) -> Any:
        total, (_, aux) = inner.loss(params, {}, batch, key, hyperparameters)
        rows = losses.elr_targets(aux.logits, extras["targets"][batch.index], 0.7)
        total += hyperparameters["elr_lambda"] * reference.kl(aux.logits, rows).mean()
        return total, ({"targets": Written(batch.index, rows)}, aux)

    held = task.elr(inner, num_examples, num_classes)
    return Task(held.init, loss, held.evaluate)


def by_place(inner: Task, num_examples: int, num_classes: int) -> Task:
    """Targets looked up by the place in the batch."""
    held = task.elr(inner, num_examples, num_classes)

    def loss(params: Any, extras: Any, batch: Any, key: Any, hyperparameters: Any) -> Any:
        place = jnp.arange(len(batch.index), dtype=jnp.int32)
        moved = dataclasses.replace(batch, index=place)
        return held.loss(params, extras, moved, key, hyperparameters)

    return Task(held.init, loss, held.evaluate)


def trained(make: Any, strength: Any, beta: Any) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracy and memorised fraction of 5 seeds after 60 epochs, [places, 5]."""
    splits = early_learning.load(DIGITS)
    n, places = len(splits.train), len(strength)
    y = np.asarray(splits.train.y)
    given = np.stack([corrupt.symmetric(y, 0.4, 10, seed).labels for seed in range(5)])
    given = np.tile(given, (places, 1))
    net = make(training.net_of(DIGITS.model, splits), n, 10)
    steps = 60 * (n // 64)
    roots = jnp.tile(training.keys([0], 5, 0), places)
    results = training.train(
        *([DIGITS.train], roots, net, splits.train, steps, None, None),
        name="control",
        scalars={"elr_lambda": np.repeat(strength, 5), "elr_beta": np.repeat(beta, 5)},
        probes=[
            Memorisation(net, splits.train, given, y, (steps,)),
            Evaluate(net, splits.test, (steps,)),
        ],
        labels=given,
    )
    rows = {name: values[results.rows["step"] == steps] for name, values in results.rows.items()}
    order = np.argsort(rows["replica"])
    found = (rows["test.accuracy"], rows["memory.wrong_memorised"])
    accuracy, memorised = (values[order].reshape(places, 5) for values in found)
    return accuracy, memorised


def test_controls_memorise() -> None:
    _, memorised = trained(kl, [3.0], [0.7])
    assert memorised.min() >= 0.9  # appendix C of the paper
    accuracy, memorised = trained(by_place, [7.0], [0.7])  # a seed in five collapses instead
    assert np.median(memorised) >= 0.9 and accuracy.max() <= 0.8


def test_lambda_and_beta_matter() -> None:
    """beta = 0 collapses; lambda = 1 only delays; lambda = 7 holds, and not with beta = 0.99."""
    accuracy, memorised = trained(task.elr, [7.0, 1.0, 7.0, 7.0], [0.0, 0.7, 0.7, 0.99])
    assert accuracy[0].max() <= 0.3
    assert memorised[1].min() >= 0.9
    assert memorised[2].max() <= 0.1
    assert memorised[3].min() >= 0.8


# ---- MNIST -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif("DYNAMICS_DATA" not in os.environ, reason="needs MNIST in DYNAMICS_DATA")
def test_mnist() -> None:
    """8,000 of its examples, 40 % wrong: the last epoch, 3 paired seeds."""
    point = Config(
        data=DataConfig(source="mnist", num_train=8000, num_test=2000),
        train=optim.Train(nesterov=False, weight_decay=1e-3, batch_size=128),
        study=Curves(replicas=3, every=40.0, detected_at=()),
    )
    table = early_learning.run(point, early_learning.load(point))
    elr, ce = (last(table, "test_accuracy", method=m) for m in ("elr", "ce"))
    assert (elr - ce).min() >= 0.15
    assert last(table, "wrong_memorised", method="elr").max() <= 0.10
    assert last(table, "wrong_memorised", method="ce").min() >= 0.9
