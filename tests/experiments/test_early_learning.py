"""What networks make of wrong labels: checks A6-A9 of the specification, paired, as populations."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from references import elr as reference

from dynamics import config as configs
from dynamics import fit, losses, optim, task, training
from dynamics.data import DataConfig, corrupt
from dynamics.models import MLP, Convnet
from dynamics.probes import Evaluate, Memorisation
from dynamics.record import Findings
from dynamics.training import Train
from dynamics.types import Task, Written
from experiments import early_learning
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


def cells(found: Findings, name: str = "curves", **equal: Any) -> pl.DataFrame:
    """The rows of a frame where columns have these values."""
    here = found.frames[name].filter(*[pl.col(column) == value for column, value in equal.items()])
    assert len(here), equal
    return here


def last(found: Findings, column: str, **equal: Any) -> np.ndarray:
    """A column at the last epoch, by replica."""
    end = found.frames["curves"]["epoch"].max()
    return cells(found, epoch=end, **equal).sort("replica")[column].to_numpy()


def curve(found: Findings, column: str, **equal: Any) -> np.ndarray:
    """A column [replica, epoch]."""
    rows = cells(found, **equal).sort("replica", "epoch").partition_by("replica")
    return np.stack([row[column].to_numpy() for row in rows])


# ---- the study ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Any:
    return early_learning.load(TINY)


@pytest.fixture(scope="module")
def found(data: Any) -> Findings:
    return early_learning.run(TINY, data)


def test_the_frames(found: Findings) -> None:
    curves = cells(found)
    assert set(curves["method"]) == {"ce", "elr"} and set(curves["epoch"]) == {0, 1, 2, 3}
    assert len(curves) == 2 * 2 * 4 and curves["diverged"].is_null().all()
    parts = sum(curves[f"wrong_{name}"].to_numpy() for name in ("correct", "memorised", "other"))
    np.testing.assert_allclose(parts, 1, atol=1e-6)
    np.testing.assert_allclose(curves["wrong"], 0.4)
    assert not curves["test_accuracy"].is_null().any()
    assert set(cells(found, method="elr")["strength"]) == {7.0}
    assert set(cells(found, method="ce")["beta"]) == {0.0}
    detected = cells(found, "detected")
    assert len(detected) == 2 * 2 * 2 and set(detected["epoch"]) == {1, 3}
    wrong = found.arrays["labels"].values != found.arrays["clean"].values
    assert found.arrays["labels"].dims == ("replica", "example")
    assert wrong.sum(axis=1).tolist() == [48, 48] and (wrong[0] != wrong[1]).any()


def test_methods_are_paired(found: Findings) -> None:
    """Before the first step there is one network for each replica, whatever will train it."""
    for name in ("test_accuracy", "clean_correct", "wrong_memorised"):
        ce, elr = (curve(found, name, epoch=0, method=m) for m in ("ce", "elr"))
        np.testing.assert_array_equal(ce, elr)
    ce, elr = (last(found, "test_accuracy", method=m) for m in ("ce", "elr"))
    assert (ce != elr).any()


@pytest.mark.slow
def test_every_method_at_every_rate(data: Any) -> None:
    methods = ("smoothing", "gce", "sce", "elr_plus")
    point = dataclasses.replace(TINY, study=Rates(methods=methods, rates=(0.0, 0.5), replicas=1))
    found = early_learning.run(point, data)

    def rates(**equal: Any) -> pl.DataFrame:
        return cells(found, "rates", **equal)

    assert len(rates()) == 4 * 2 and set(rates()["epoch"]) == {3}
    assert rates(rate=0.0)["wrong_correct"].is_null().all()
    assert not rates(rate=0.5)["wrong_correct"].is_null().any()
    np.testing.assert_allclose(rates(rate=0.5)["wrong"], 0.5)
    assert rates(method="gce")["target_correct"].is_null().all()
    assert not rates(method="elr_plus", rate=0.5)["target_correct"].is_null().any()
    measured = [tuple(rates(method=m, rate=0.5)["fit_wrong"]) for m in methods]
    assert len(set(measured)) == len(methods)


def test_the_grid_is_one_population_with_one_row_for_cross_entropy(data: Any) -> None:
    study = Grid(strengths=(0.0, 2.0), betas=(0.0, 0.9), replicas=2)
    found = early_learning.run(dataclasses.replace(TINY, study=study), data)
    places = set(cells(found, "grid").select("method", "strength", "beta").rows())
    assert places == {("ce", 0, 0), ("elr", 2, 0), ("elr", 2, 0.9)}


def test_who_diverges_keeps_a_row_without_numbers(data: Any) -> None:
    wild = dataclasses.replace(TINY.train, optimizer=optim.SGD(learning_rate=1e30))
    study = Rates(methods=("ce",), rates=(0.4,), replicas=2)
    found = early_learning.run(dataclasses.replace(TINY, train=wild, study=study), data)
    frame = cells(found, "rates", epoch=3)
    assert len(frame) == 2 and frame["test_accuracy"].is_null().all()
    assert not frame["diverged"].is_null().any() and frame["wrong"].to_list() == [0.4, 0.4]


@pytest.mark.slow
def test_points_of_a_sweep_are_those_alone(data: Any) -> None:
    points = configs.grid(TINY, {"rate": (0.2, 0.4), "strength": (3.0,), "seed": (0, 1)})
    together = early_learning.sweep(points, data)
    alone = early_learning.run(points[3], data)
    order = ["method", "replica", "epoch"]
    ours, its = (found.frames["curves"].sort(order) for found in (together[3], alone))
    assert ours.columns == its.columns and ours.select(order).equals(its.select(order))
    for name in its.select(pl.selectors.float()).columns:
        np.testing.assert_allclose(ours[name], its[name], atol=0.03, err_msg=name)
    given = [found.arrays["labels"].values for found in (*together, alone)]
    np.testing.assert_array_equal(given[3], given[-1])
    assert (given[0] != given[1]).any()


def test_stored_is_not_computed_again(data: Any, tmp_path: Path, monkeypatch: Any) -> None:
    first = early_learning.run(TINY, data, store=tmp_path)
    monkeypatch.setattr(training, "train", None)
    again = early_learning.run(TINY, data, store=tmp_path)
    for name, frame in first.frames.items():
        assert frame.equals(again.frames[name])
    assert not list(tmp_path.glob("**/stages"))
    (folder,) = tmp_path.glob("**/weights/elr")
    assert int(fit.load(folder).step) == 18


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
        ({"study": Curves(every=1e-4)}, "study.every must be at least a step"),
        ({"study": Curves(detected_at=(1e-4, 3.0))}, "study.detected_at must be at least a step"),
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
        train=Train(optimizer=optim.Adam(learning_rate=1e-3), batch_size=20),
        study=Curves(replicas=1, methods=("elr",), detected_at=()),
        epochs=2.0,
    )
    found = early_learning.run(point, data)
    assert not np.isnan(last(found, "target_correct", method="elr")).any()


# ---- digits ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Findings:
    """CE and ELR with lambda = 7, beta = 0.7: 10 seeds, 40 epochs, 40 % wrong labels."""
    return early_learning.run(DIGITS, early_learning.load(DIGITS))


def test_early_learning_and_memorisation(digits: Findings) -> None:  # A6
    correct = curve(digits, "wrong_correct", method="ce")
    assert correct.max(axis=1).min() >= 0.75
    assert correct[:, -1].max() <= 0.05
    assert last(digits, "wrong_memorised", method="ce").min() >= 0.95
    accuracy = curve(digits, "test_accuracy", method="ce")
    assert (accuracy.max(axis=1) - accuracy[:, -1]).min() >= 0.10


def test_elr_does_not_memorise(digits: Findings) -> None:  # A7
    elr, ce = (last(digits, "test_accuracy", method=m) for m in ("elr", "ce"))
    assert (elr - ce).min() >= 0.15 and (elr - ce).mean() >= 0.20
    assert last(digits, "wrong_memorised", method="elr").max() <= 0.10
    oracle = curve(digits, "test_accuracy", method="ce").max(axis=1)
    assert (elr - oracle).min() >= 0  # over cross-entropy's best epoch, which nobody would know


def test_wrong_labels_are_found(digits: Findings) -> None:  # A9
    for name in ("precision", "recall"):
        assert last(digits, name, method="elr").min() >= 0.93
    assert last(digits, "recall", method="ce").max() <= 0.1  # the targets alone do not help


def test_the_loss_finds_wrong_labels_early(digits: Findings) -> None:  # A9b
    early = curve(digits, "loss_auc", method="ce", epoch=3)[:, 0]
    late = last(digits, "loss_auc", method="ce")
    assert early.min() >= 0.95 and (early - late).min() >= 0.08
    found = cells(digits, "detected", method="ce", epoch=3).mean()
    assert found["precision"].item() >= 0.85 and found["recall"].item() >= 0.9
    assert cells(digits, "detected", method="ce", epoch=40)["recall"].to_numpy().mean() < 0.5


def test_the_gradient_of_wrong_labels_fades_and_theirs_is_held(digits: Findings) -> None:
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
    found = early_learning.run(point, early_learning.load(point))
    elr, ce = (last(found, "test_accuracy", method=m) for m in ("elr", "ce"))
    assert (elr - ce).min() >= 0.13
    assert ((cells(found)["wrong"] - 0.36).abs() < 0.03).all()


# ---- negative controls (A8): what looks like ELR and memorises, 60 epochs, 5 seeds --------------


def kl(inner: Task, num_examples: int, num_classes: int) -> Task:
    """Held by the divergence instead of log(1 - <p, t>)."""

    def loss(params: Any, extras: Any, batch: Any, key: Any, hyperparameters: Any) -> Any:
        total, (_, aux) = inner.loss(params, {}, batch, key, hyperparameters)
        rows = losses.elr_targets(aux.logits, extras["targets"][batch.index], 0.7)
        total += hyperparameters["elr_lambda"] * reference.kl(aux.logits, rows).mean()
        return total, ({"targets": Written(batch.index, rows)}, aux)

    return task.elr(inner, num_examples, num_classes)._replace(loss=loss)


def by_place(inner: Task, num_examples: int, num_classes: int) -> Task:
    """Targets looked up by the place in the batch."""
    held = task.elr(inner, num_examples, num_classes)

    def loss(params: Any, extras: Any, batch: Any, key: Any, hyperparameters: Any) -> Any:
        place = jnp.arange(len(batch.index), dtype=jnp.int32)
        moved = dataclasses.replace(batch, index=place)
        return held.loss(params, extras, moved, key, hyperparameters)

    return held._replace(loss=loss)


def trained(make: Any, strength: Any, beta: Any) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracy and memorised fraction of 5 seeds after 60 epochs, [places, 5]."""
    splits = early_learning.load(DIGITS)
    n, y = len(splits.train), np.asarray(splits.train.y)
    places = [{"elr_lambda": s, "elr_beta": b} for s, b in zip(strength, beta, strict=True)]
    members = training.table([{"seed": 0}], lambda _: places, 5)
    given = np.stack([corrupt.symmetric(y, 0.4, 10, r).labels for r in members["replica"]])
    steps, roots = 60 * (n // 64), training.keys(members, 0)
    found = training.train(
        members,
        roots,
        make(training.net_of(DIGITS.model, splits), n, 10),
        DIGITS.train.optimizer,
        training.batches(DIGITS.train, splits.train, roots, labels=given),
        steps,
        name="control",
        scalars={"elr_lambda": 0.0, "elr_beta": 0.0},
        probes=[Memorisation((steps,), given, y), Evaluate((steps,))],
        data={"train": splits.train, "test": splits.test},
    )
    accuracy, memorised = found.at("test", steps), found.at("memory", steps)
    shape = (len(places), 5)
    return (
        accuracy["accuracy"].to_numpy().reshape(shape),
        memorised["wrong_memorised"].to_numpy().reshape(shape),
    )


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
        train=Train(optimizer=optim.SGD(nesterov=False, weight_decay=1e-3), batch_size=128),
        study=Curves(replicas=3, every=40.0, detected_at=()),
    )
    found = early_learning.run(point, early_learning.load(point))
    elr, ce = (last(found, "test_accuracy", method=m) for m in ("elr", "ce"))
    assert (elr - ce).min() >= 0.15
    assert last(found, "wrong_memorised", method="elr").max() <= 0.10
    assert last(found, "wrong_memorised", method="ce").min() >= 0.9
