"""Figures of segmentation from noisy outlines, from runs whose every effect is known."""

import csv
import math

import made_up
import numpy as np
import pytest
from made_up import array_of, claims_of, failed, run_of, with_rows

from paper_figures import (
    draw,
    segmentation_noise_correction,
    segmentation_noise_timing,
)
from paper_figures.segmentation_noise import outline

REPLICAS, EPOCHS = 4, 8
METHODS = ("ce", "adele", "early", "late", "consistency", "adele_consistency")
BASE = {"label_accuracy": 0.9, "train_iou": 0.6, "test_iou": 0.7, "correct": 0.1,
        "memorised": 0.9}  # fmt: skip
AT_THE_END = {  # what is above cross-entropy
    "adele": {"label_accuracy": 0.04, "train_iou": 0.12, "test_iou": 0.02, "memorised": -0.5},
    "early": {"label_accuracy": -0.01, "train_iou": -0.2},
    "late": {"label_accuracy": 0.005},
    "adele_consistency": {"label_accuracy": 0.05, "train_iou": 0.15, "memorised": -0.6},
}
AT = {1: -0.01, 5: 0.03, 10: 0.035, 30: 0.01}  # label accuracy above no correction


def rows_of(method, at, above, onsets, replica):
    """Epoch by epoch; wrong pixels are predicted truly halfway."""
    rows = []
    for epoch in range(1, EPOCHS + 1):
        values = {name: value + above.get(name, 0.0) for name, value in BASE.items()}
        if epoch == EPOCHS // 2:
            values |= {"correct": 0.85, "memorised": 0.1}
        row = {"method": method, "at": at, "replica": replica, "epoch": epoch}
        row |= {name: values[name] for name in ("label_accuracy", "train_iou", "test_iou")}
        for c, onset in onsets.items():
            row |= {f"correct.{c}": values["correct"], f"memorised.{c}": values["memorised"]}
            row |= {f"other.{c}": 0.0, f"iou.{c}": 0.6 * (1 - math.exp(-0.5 * epoch))}
            row |= {f"onset.{c}": onset if onset <= epoch else None}
        rows.append(row)
    return rows


def made(kind, rows, arrays, **study):
    config = {"kind": "Config", "epochs": EPOCHS, "among": "active",
              "model": {"kind": "Unet", "width": 8}, "study": {"kind": kind, **study}}  # fmt: skip
    arrays = {"index": np.arange(30, dtype=np.int32), **arrays}
    return run_of("segmentation_noise", config, {kind.lower(): rows}, arrays)


def comparison(methods=METHODS, onsets=(2, 5), **changed):
    """``changed`` are what a method is above cross-entropy: ``adele={"test_iou": -0.1}``."""
    rows = []
    for method in methods:
        above = AT_THE_END.get(method, {}) | changed.get(method, {})
        when = dict(zip((1, 2), onsets, strict=True)) if "adele" in method else {1: 99, 2: 99}
        for replica in range(REPLICAS):
            rows += rows_of(method, None, above, when, replica)
    masks = np.zeros((3, 12, 12), np.int32)
    masks[:, 2:6, 2:6], masks[:, 8:10, 8:10] = 1, 2
    fit = np.empty((len(methods), REPLICAS, 2, 4))
    fit[:] = [0.0, 0.6, 0.5, 1.0]
    fit[0, :, 1] = np.nan
    of_cells = ("cell", "image", "y", "x")
    arrays = {
        "fit": array_of(
            fit, ("cell", "replica", "class", "parameter"), **{"cell": methods, "class": (1, 2)}
        ),
        "shown_images": np.random.default_rng(0).normal(size=masks.shape).astype(np.float32),
        "shown_clean": masks,
        "shown_labels": np.roll(masks, 1, axis=1),
        "shown_corrected": array_of(np.stack([masks] * len(methods)), of_cells, cell=methods),
        "shown_predicted": array_of(np.stack([masks] * len(methods)), of_cells, cell=methods),
    }
    return made("Comparison", rows, arrays, methods=list(methods))


def timing(at=None, adele=0.04):
    at = AT if at is None else at
    cells = [("ce", None, 0.0), ("adele", None, adele)]
    cells += [("at", epoch, above) for epoch, above in at.items()]
    rows = []
    for method, epoch, above in cells:
        onsets = {1: 2, 2: 5} if method == "adele" else {1: 99, 2: 99}
        for replica in range(REPLICAS):
            rows += rows_of(method, epoch, {"label_accuracy": above}, onsets, replica)
    return made("Timing", rows, {}, at=list(at))


FIGURES = [(segmentation_noise_correction, comparison), (segmentation_noise_timing, timing)]
CE = "label accuracy, {} - CE"
OVER = "IoU of training images, last 5 epochs, ADELE over scales - ADELE"
IOU = "IoU of {} images, last 5 epochs, ADELE - CE"


@pytest.fixture(params=FIGURES, ids=lambda figure: figure[0].STUDY)
def figure(request, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 50)
    return request.param


def test_rows_in_any_order_give_the_same_bytes(figure, tmp_path):
    module, make = figure
    run = make()
    mixed = with_rows(run, lambda frame: frame.sample(fraction=1.0, shuffle=True, seed=1))
    one, claims = module.draw([run], tmp_path / "one")
    other, _ = module.draw([mixed], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()
    assert claims == module.measure([run])
    assert all(claim.holds for claim in claims)
    assert {claim.kind for claim in claims} == {"claim", "control"}
    with one["csv"].open() as f:
        assert all(row["y"] and row["series"] for row in csv.DictReader(f))


def effects(module, run):
    return {q: round(c.effect, 6) for q, c in claims_of(module, run).items()}


def test_the_claims_of_correction_are_the_effects_put_in():
    assert effects(segmentation_noise_correction, comparison()) == {
        "wrong pixels of the disk predicted truly, peak - end, CE": 75.0,
        "onset of the square - onset of the disk": 3.0,
        CE.format("ADELE"): 4.0,
        "wrong pixels of the disk memorised at the end, CE - ADELE": 50.0,
        IOU.format("training"): 12.0,
        IOU.format("test"): 2.0,
        "label accuracy, ADELE over scales - ADELE": 1.0,
        OVER: 3.0,
        CE.format("corrected after epoch 1"): -1.0,
        "label accuracy, corrected late - ADELE": -3.5,
    }
    few = claims_of(segmentation_noise_correction, comparison(("ce", "adele")))
    assert len(few) == 6


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"onsets": (5, 5)}, ["onset of the square - onset of the disk"]),
        ({"adele": {"test_iou": -0.01}}, [IOU.format("test")]),
        ({"adele": {"train_iou": 0.05}}, [IOU.format("training")]),
        ({"adele": {"memorised": -0.1}},
         ["wrong pixels of the disk memorised at the end, CE - ADELE"]),
        ({"early": {"label_accuracy": 0.02}}, [CE.format("corrected after epoch 1")]),
        ({"late": {"label_accuracy": 0.035}}, ["label accuracy, corrected late - ADELE"]),
        ({"adele_consistency": {"train_iou": 0.1}}, [OVER]),
        ({"adele_consistency": {"label_accuracy": 0.03}},
         ["label accuracy, ADELE over scales - ADELE"]),
    ],
)  # fmt: skip
def test_another_effect_does_not_hold(changed, what):
    assert failed(claims_of(segmentation_noise_correction, comparison(**changed))) == what


def test_a_class_that_was_never_detected_counts_as_later_than_all_epochs():
    found = effects(segmentation_noise_correction, comparison(onsets=(2, math.inf)))
    assert found["onset of the square - onset of the disk"] == EPOCHS + 1 - 2


TEXT = "label accuracy, {} - {}"


def test_the_claims_of_timing_are_the_effects_put_in():
    assert effects(segmentation_noise_timing, timing()) == {
        TEXT.format("ADELE", "mean over all epochs"): 2.375,
        TEXT.format("ADELE", "best epoch in hindsight"): 0.5,
        TEXT.format("corrected after epoch 1", "none"): -1.0,
        TEXT.format("corrected after epoch 30", "best epoch"): -2.5,
    }
    assert failed(claims_of(segmentation_noise_timing, timing(adele=0.0))) == [
        TEXT.format("ADELE", "mean over all epochs"),
        TEXT.format("ADELE", "best epoch in hindsight"),
    ]
    assert failed(claims_of(segmentation_noise_timing, timing(at=AT | {1: 0.01, 30: 0.03}))) == [
        TEXT.format("corrected after epoch 1", "none"),
        TEXT.format("corrected after epoch 30", "best epoch"),
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: made_up.without_rows(r, method="adele"), "'adele'"),
        (lambda r: with_rows(r, lambda frame: frame.drop("train_iou")), "no column 'train_iou'"),
        (lambda r: made_up.without_rows(r, method="ce", epoch=3.0), "other epochs"),
    ],
)  # fmt: skip
def test_what_a_run_lacks_is_named(figure, broken, message):
    module, make = figure
    with pytest.raises(ValueError, match=f"segmentation_noise run 00c0ffee.*{message}"):
        module.measure([broken(make())])


def test_arrays_it_needs_are_named():
    run = comparison()
    for name in ("fit", "shown_corrected"):
        with pytest.raises(ValueError, match=f"no array '{name}'"):
            segmentation_noise_correction.measure([made_up.without_array(run, name)])


def test_the_outline_is_made_of_the_edges_between_inside_and_outside():
    region = np.zeros((4, 5), bool)
    region[0, 0] = region[2, 1:3] = True
    found = {tuple(map(tuple, sorted(edge))) for edge in outline(region)}
    wanted = set()
    for i, j in np.argwhere(region):
        for edge in (((i, j), (i, j + 1)), ((i + 1, j), (i + 1, j + 1)),
                     ((i, j), (i + 1, j)), ((i, j + 1), (i + 1, j + 1))):  # fmt: skip
            wanted ^= {tuple((int(a), int(b)) for a, b in edge)}
    assert found == wanted
