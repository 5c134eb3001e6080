"""Segmentation from wrong outlines: its protocol, its storage, and what correction gains."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dynamics import config as configs
from dynamics import mesh, training
from dynamics.models import Unet
from dynamics.optim import Adam
from dynamics.record import Findings
from dynamics.revise import DETECT, Correction
from dynamics.training import Train
from dynamics.types import NEVER
from experiments import segmentation_noise
from experiments.segmentation_noise import Comparison, Config, Consistency, Shapes, Timing
from experiments.segmentation_noise.measuring import FATES, fates, mean_iou

TINY = Config(
    data=Shapes(num_train=10, num_test=4),
    model=Unet(width=2, levels=1, convs=1, norm="none"),
    train=Train(optimizer=Adam(learning_rate=0.01), batch_size=5),
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
def found(data: Any) -> Findings:
    return segmentation_noise.run(TINY, data, mesh.make())  # on one device all share a program


def of(found: Findings, method: str, column: str) -> np.ndarray:
    """[R, E]"""
    mine = found.frames["comparison"].filter(pl.col("method") == method).sort("replica", "epoch")
    return np.stack([own[column].to_numpy() for own in mine.partition_by("replica")])


def assert_equal(a: Findings, b: Findings) -> None:
    assert a.frames.keys() == b.frames.keys() and a.arrays.keys() == b.arrays.keys()
    for name in a.frames:
        assert a.frames[name].equals(b.frames[name])
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name].values, b.arrays[name].values, err_msg=name)
        assert a.arrays[name].dims == b.arrays[name].dims


def test_the_data(data: Any) -> None:
    assert len(data.train) == 10 and len(data.test) == 4 and data.num_classes == 3
    more = dataclasses.replace(TINY, data=Shapes(num_train=12, num_test=2))
    np.testing.assert_array_equal(segmentation_noise.load(more).train.x[:10], data.train.x)
    np.testing.assert_array_equal(segmentation_noise.load(more).test.x, data.test.x[2:])


def test_the_table(found: Findings, data: Any) -> None:
    frame, arrays = found.frames["comparison"], found.arrays
    assert len(frame) == 3 * 2 * 2 and frame["diverged"].is_null().all()
    np.testing.assert_array_equal(of(found, "ce", "epoch"), [[1, 2], [1, 2]])
    np.testing.assert_array_equal(of(found, "ce", "replica"), [[0, 0], [1, 1]])
    ce, early = (frame.filter(pl.col("method") == method) for method in ("ce", "early"))
    for c in (1, 2):
        total = sum(frame[f"{fate}.{c}"].to_numpy() for fate in FATES)
        np.testing.assert_allclose(total, 1, atol=1e-6)
        assert ce[f"onset.{c}"].is_null().all() and (early[f"onset.{c}"] == 1).all()
    assert ce["at"].is_null().all() and (early["at"] == 1).all()
    wrong = [segmentation_noise.labels(TINY, data, r) for r in range(2)]
    for r in range(2):
        np.testing.assert_allclose(
            of(found, "ce", "label_accuracy")[r], 1 - wrong[r].rate, rtol=1e-6
        )
    assert (of(found, "early", "label_accuracy") != of(found, "ce", "label_accuracy")).all()
    fit = arrays["fit"]
    assert fit.values.shape == (3, 2, 2, 4)
    assert fit.dims == ("cell", "replica", "class", "parameter")
    assert fit.coords["cell"].tolist() == ["ce", "early", "adele_consistency"]
    for name in ("shown_corrected", "shown_predicted"):
        assert arrays[name].values.shape == (3, 3, 32, 32)
        assert arrays[name].dims == ("cell", "image", "y", "x")
    shown, images = segmentation_noise.shown(wrong[0]), arrays["shown_labels"].values
    np.testing.assert_array_equal(images, wrong[0].labels[shown])
    ce, early = (arrays["shown_corrected"].at(cell=cell).values for cell in ("ce", "early"))
    np.testing.assert_array_equal(ce, images)
    assert (early != images).any()
    sizes = (images > 0).sum((1, 2)) - (arrays["shown_clean"].values > 0).sum((1, 2))
    assert sizes.min() < 0 < sizes.max()


def test_methods_are_paired(found: Findings, data: Any) -> None:
    """Replica r of every method has the same labels and start: until the first correction ``ce``
    and ``early`` are one run, and a replica does not depend on how many there are."""
    for column in ("iou.1", "train_iou", "correct.1"):
        before = of(found, "ce", column)[:, 0]
        np.testing.assert_array_equal(before, of(found, "early", column)[:, 0])
    labels = [segmentation_noise.labels(TINY, data, r).labels for r in (0, 0, 1)]
    np.testing.assert_array_equal(labels[0], labels[1])
    assert (labels[0] != labels[2]).any()
    other = dataclasses.replace(TINY, seed=1)
    assert (segmentation_noise.labels(other, data, 0).labels != labels[0]).any()


def test_the_cells_of_a_study() -> None:
    def cells(point: Config) -> list[Any]:
        found = segmentation_noise.cells(point, point.study)
        return [(cell["method"], cell["when"]) for cell in found]

    late = Config(study=Comparison(methods=("late", "consistency", "adele"), late=0.5))
    assert cells(late) == [("late", 30), ("consistency", NEVER), ("adele", DETECT)]
    timing = Config(study=Timing(at=(1, 20)))
    assert cells(timing) == [("ce", NEVER), ("adele", DETECT), ("at", 1), ("at", 20)]


def test_a_store_changes_nothing_and_a_second_call_computes_nothing(
    data: Any, found: Findings, tmp_path: Path, monkeypatch: Any
) -> None:
    assert_equal(found, segmentation_noise.run(TINY, data, mesh.make(), store=tmp_path))
    monkeypatch.setattr(training, "train", None)
    assert_equal(found, segmentation_noise.run(TINY, data, mesh.make(), store=tmp_path))


@pytest.mark.slow
def test_points_of_a_sweep_share_one_program_and_equal_single_runs(
    data: Any, found: Findings, monkeypatch: Any
) -> None:
    points = configs.grid(PLAIN, {"seed": [0, 3]})
    calls = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda members, *a, **k: calls.append(members) or train(members, *a, **k)
    )
    both = segmentation_noise.sweep(points, data, mesh.make())
    assert [members["point"].n_unique() for members in calls] == [2]
    for method in ("ce", "early"):
        for column in ("train_iou", "label_accuracy", "memorised.1"):
            a, b = of(both[0], method, column), of(found, method, column)
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-3)  # a pixel of 500 may differ
    assert (of(both[0], "ce", "label_accuracy") != of(both[1], "ce", "label_accuracy")).all()


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
    found = segmentation_noise.run(config, segmentation_noise.load(config))
    ce, adele, early = ({} for _ in range(3))
    for method, its in (("ce", ce), ("adele", adele), ("early", early)):
        for column in ("label_accuracy", "train_iou", "correct.1", "memorised.1"):
            its[column] = of(found, method, column)
    assert (ce["correct.1"].max(axis=1) >= 0.7).all() and (ce["correct.1"][:, -1] <= 0.25).all()
    assert (ce["memorised.1"][:, -1] >= 0.75).all()
    gain = {name: adele[name] - ce[name] for name in ce}
    assert (gain["label_accuracy"][:, -1] >= 0.01).all()
    assert (gain["train_iou"][:, -5:].mean(axis=1) >= 0.06).all()
    assert (gain["memorised.1"][:, -1] <= -0.2).all()
    onsets = [of(found, "adele", f"onset.{c}")[:, -1] for c in (1, 2)]
    assert (onsets[0] < onsets[1]).all()
    assert (early["label_accuracy"][:, -1] < ce["label_accuracy"][:, -1]).all()
