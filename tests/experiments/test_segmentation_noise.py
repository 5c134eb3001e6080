"""Segmentation from wrong outlines: its protocol, its storage, and what correction gains."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamics import config as configs
from dynamics import mesh, record
from dynamics.models import Unet
from dynamics.optim import Train
from dynamics.revise import DETECT, Correction
from dynamics.types import NEVER
from experiments import segmentation_noise, training
from experiments.segmentation_noise import Comparison, Config, Consistency, Shapes, Timing
from experiments.segmentation_noise.measuring import FATES, fates, mean_iou

TINY = Config(
    data=Shapes(num_train=10, num_test=4),
    model=Unet(width=2, levels=1, convs=1, norm="none"),
    train=Train(rule="adam", learning_rate=0.01, batch_size=5),
    epochs=2,
    correction=Correction(confidence=0.4),
    consistency=Consistency(scales=(1.0,)),  # more take long to compile
    study=Comparison(methods=("ce", "early", "adele_consistency"), replicas=2),
)
PLAIN = dataclasses.replace(TINY, study=Comparison(methods=("ce", "early"), replicas=2))


@pytest.fixture(scope="module")
def data() -> Any:
    return segmentation_noise.load(TINY)


@pytest.fixture(scope="module")
def table(data: Any) -> record.Table:
    return segmentation_noise.run(TINY, data, mesh.make())  # on one device all share a program


def of(table: record.Table, method: str, column: str) -> np.ndarray:
    """[R, E]"""
    rows = table.rows
    epochs = len(np.unique(rows["epoch"]))
    return rows[column][rows["method"] == method].reshape(-1, epochs)


def assert_equal(a: record.Table, b: record.Table) -> None:
    assert a.rows.keys() == b.rows.keys() and a.arrays.keys() == b.arrays.keys()
    for name in a.rows:
        np.testing.assert_array_equal(a.rows[name], b.rows[name], err_msg=name)
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)


def test_the_data(data: Any) -> None:
    assert len(data.train) == 10 and len(data.test) == 4 and data.num_classes == 3
    more = dataclasses.replace(TINY, data=Shapes(num_train=12, num_test=2))
    np.testing.assert_array_equal(segmentation_noise.load(more).train.x[:10], data.train.x)
    np.testing.assert_array_equal(segmentation_noise.load(more).test.x, data.test.x[2:])


def test_the_table(table: record.Table, data: Any) -> None:
    rows, arrays = table
    assert all(len(column) == 3 * 2 * 2 for column in rows.values())
    np.testing.assert_array_equal(of(table, "ce", "epoch"), [[1, 2], [1, 2]])
    np.testing.assert_array_equal(of(table, "ce", "replica"), [[0, 0], [1, 1]])
    assert np.isinf(rows["diverged"]).all()
    for c in (1, 2):
        total = sum(rows[f"{fate}.{c}"] for fate in FATES)
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert np.isinf(of(table, "ce", f"onset.{c}")).all()
        assert (of(table, "early", f"onset.{c}") == 1).all()
    assert np.isnan(of(table, "ce", "at")).all() and (of(table, "early", "at") == 1).all()
    wrong = [segmentation_noise.labels(TINY, data, r) for r in range(2)]
    for r in range(2):
        np.testing.assert_allclose(
            of(table, "ce", "label_accuracy")[r], 1 - wrong[r].rate, rtol=1e-6
        )
    assert (of(table, "early", "label_accuracy") != of(table, "ce", "label_accuracy")).all()
    assert arrays["fit"].shape == (3, 2, 2, 4)
    assert arrays["shown_corrected"].shape == arrays["shown_predicted"].shape == (3, 3, 32, 32)
    shown = segmentation_noise.shown(wrong[0])
    np.testing.assert_array_equal(arrays["shown_labels"], wrong[0].labels[shown])
    np.testing.assert_array_equal(arrays["shown_corrected"][0], wrong[0].labels[shown])
    assert (arrays["shown_corrected"][1] != wrong[0].labels[shown]).any()
    sizes = (arrays["shown_labels"] > 0).sum((1, 2)) - (arrays["shown_clean"] > 0).sum((1, 2))
    assert sizes.min() < 0 < sizes.max()


def test_methods_are_paired(table: record.Table, data: Any) -> None:
    """Replica r of every method has the same labels and start: until the first correction ``ce``
    and ``early`` are one run, and a replica does not depend on how many there are."""
    for column in ("iou.1", "train_iou", "correct.1"):
        before = of(table, "ce", column)[:, 0]
        np.testing.assert_array_equal(before, of(table, "early", column)[:, 0])
    labels = [segmentation_noise.labels(TINY, data, r).labels for r in (0, 0, 1)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()
    other = dataclasses.replace(TINY, seed=1)
    assert (segmentation_noise.labels(other, data, 0).labels != labels[0]).any()


def test_the_cells_of_a_study() -> None:
    cells = segmentation_noise._cells
    late = Config(study=Comparison(methods=("late", "consistency", "adele"), late=0.5))
    assert [tuple(cell) for cell in cells(late)] == [
        ("late", 30), ("consistency", NEVER), ("adele", DETECT)
    ]  # fmt: skip
    timing = Config(study=Timing(at=(1, 20)))
    assert [tuple(cell) for cell in cells(timing)] == [
        ("ce", NEVER), ("adele", DETECT), ("at", 1), ("at", 20)
    ]  # fmt: skip


def test_a_store_changes_nothing_and_a_second_call_computes_nothing(
    data: Any, table: record.Table, tmp_path: Path, monkeypatch: Any
) -> None:
    assert_equal(table, segmentation_noise.run(TINY, data, mesh.make(), store=tmp_path))
    monkeypatch.setattr(training, "train", None)
    assert_equal(table, segmentation_noise.run(TINY, data, mesh.make(), store=tmp_path))


@pytest.mark.slow
def test_points_of_a_sweep_share_one_program_and_equal_single_runs(
    data: Any, table: record.Table, monkeypatch: Any
) -> None:
    points = configs.grid(PLAIN, {"seed": [0, 3]})
    calls = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda points, *a, **k: calls.append(points) or train(points, *a, **k)
    )
    tables = segmentation_noise.sweep(points, data, mesh.make())
    assert [len(points) for points in calls] == [2]
    for method in ("ce", "early"):
        for column in ("train_iou", "label_accuracy", "memorised.1"):
            a, b = of(tables[0], method, column), of(table, method, column)
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)  # a pixel of 500 may differ
    assert (of(tables[0], "ce", "label_accuracy") != of(tables[1], "ce", "label_accuracy")).all()


def test_iou_and_fates_against_loops() -> None:
    draw = np.random.default_rng(0)
    clean = draw.integers(0, 3, (4, 6, 6))
    labels = np.where(draw.random((2, *clean.shape)) < 0.3, draw.integers(0, 3, clean.shape), clean)
    predicted = draw.integers(0, 3, labels.shape)
    found, scores = fates(predicted, labels, clean), mean_iou(predicted, clean)
    for k in range(2):
        ious = []
        for c in (1, 2):
            counts, both, either = dict.fromkeys(FATES, 0), 0, 0
            for p, y, t in zip(predicted[k].flat, labels[k].flat, clean.flat, strict=True):
                both, either = both + (p == c == t), either + (c in (p, t))
                if y != t and c in (y, t):
                    counts["correct" if p == t else "memorised" if p == y else "other"] += 1
            for fate, count in counts.items():
                wanted = count / sum(counts.values())
                np.testing.assert_allclose(found[f"{fate}.{c}"][k], wanted, rtol=1e-12)
            ious.append(both / either)
        np.testing.assert_allclose(scores[k], np.mean(ious), rtol=1e-12)
    nothing = fates(predicted, np.stack([clean] * 2), clean)
    assert all(np.isnan(values).all() for values in nothing.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Comparison(methods=()), r"Comparison.methods must be different, got \(\)"),
        (lambda: Comparison(methods=("ce", "ce")), r"must be different, got \('ce', 'ce'\)"),
        (lambda: Timing(at=(5, 3)), r"Timing.at must be rising epochs, got \(5, 3\)"),
        (lambda: Config(epochs=20, study=Timing()), "Timing.at must be at most the 20 epochs"),
        (lambda: Shapes(iterations=()), r"Shapes.iterations must name at least one, got \(\)"),
    ],
)
def test_bad_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_larger_than_the_data_is_refused(data: Any) -> None:
    large = configs.override(TINY, {"train.batch_size": 11})
    with pytest.raises(ValueError, match="train.batch_size 11 is more than the 10 examples"):
        segmentation_noise.run(large, data)


@pytest.mark.slow
def test_the_claims_on_shapes() -> None:
    """Cross-entropy learns the true outlines first and then memorises the wrong ones; corrected at
    the detection of each class, the large one first, labels and segmentation are better. Corrected
    before anything was learned they are worse."""
    study = Comparison(methods=("ce", "adele", "early"), replicas=4)
    config = Config(study=study)
    table = segmentation_noise.run(config, segmentation_noise.load(config))
    ce, adele, early = ({} for _ in range(3))
    for method, found in (("ce", ce), ("adele", adele), ("early", early)):
        for column in ("label_accuracy", "train_iou", "correct.1", "memorised.1"):
            found[column] = of(table, method, column)
    assert (ce["correct.1"].max(axis=1) >= 0.7).all() and (ce["correct.1"][:, -1] <= 0.25).all()
    assert (ce["memorised.1"][:, -1] >= 0.75).all()
    gain = {name: adele[name] - ce[name] for name in ce}
    assert (gain["label_accuracy"][:, -1] >= 0.01).all()
    assert (gain["train_iou"][:, -5:].mean(axis=1) >= 0.06).all()
    assert (gain["memorised.1"][:, -1] <= -0.2).all()
    onsets = [of(table, "adele", f"onset.{c}")[:, -1] for c in (1, 2)]
    assert (onsets[0] < onsets[1]).all()
    assert (early["label_accuracy"][:, -1] < ce["label_accuracy"][:, -1]).all()
