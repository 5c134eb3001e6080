"""What the figures of data_diet read a run with: numbers by cell, words for a config."""

import math

import made_up
import numpy as np
import polars as pl
import pytest

from dynamics import record, statistics
from paper_figures import data_diet, reading


def test_cells_hold_each_replica_in_order():
    cells = reading.cells(made_up.window(), "method", "dropped")
    assert cells.replicas == made_up.REPLICAS
    np.testing.assert_allclose(cells.of("window", 0.1), [81, 82, 83, 84])
    np.testing.assert_allclose(cells.of("random", None), [80, 81, 82, 83])
    assert cells.places(method="window") == made_up.DROPPED
    assert cells.has("easy", None) and not cells.has("window", 0.11)
    assert cells.paired(("window", 0.1), ("random", None)).mean == pytest.approx(1)
    assert cells.estimate("easy", None) == statistics.bootstrap(cells.of("easy", None))


def test_other_columns_and_ranges():
    run = made_up.rescoring()
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\], got None .*epoch 2"):
        reading.cells(run, "method", "epoch", of="overlap")
    late = reading.frame(run).filter((pl.col("epoch") > 2) & (pl.col("method") != "full"))
    cells = reading.cells(run, "method", "epoch", rows=late, of="overlap", times=1.0)
    assert cells.of("again", 5.0).tolist() == [0.25] * made_up.REPLICAS


def test_scale_says_data_size_labels_and_model():
    run = made_up.window(0.2)
    assert data_diet.scale(run) == made_up.NOISY_SCALE
    assert data_diet.scale(run, noise=False) == "digits, 60 examples, MLP 2 x 128"
    assert data_diet.scale(run, noise=False, net=False) == "digits, 60 examples"
    convnet = {"kind": "ConvNet", "channels": [16, 32]}
    assert reading.model(convnet) == "ConvNet 16-32"
    assert reading.model({"kind": "Linear"}) == "Linear"


def test_the_correlation_is_of_the_averages_and_stays_in_its_range():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 40))
    b = a.mean(axis=0) + 0.01 * rng.normal(size=40)
    draws = data_diet.Draws([np.arange(5)], True)
    rho = data_diet.correlation(a, b[None], draws)
    assert rho.mean == statistics.spearman(a.mean(axis=0), b)
    assert -1 <= rho.low <= rho.mean <= rho.high <= 1
    one = data_diet.Draws([np.array([0])], True)
    assert data_diet.correlation(a[:1], b[None], one)[1:] == (-math.inf, math.inf)
    noisy = data_diet.Draws([np.array([0, 1]), np.array([2, 3, 4])], False)
    each = [statistics.spearman(a[mine].mean(axis=0), b) for mine in noisy.runs]
    rho = data_diet.correlation(a, b[None], noisy)
    assert rho.mean == pytest.approx(np.mean(each))  # of averages on the same labels, over draws
    assert (noisy.count, noisy.seeds) == (2, 2) and noisy.first.tolist() == [0, 1]


def test_an_array_is_read_whole_or_at_a_label():
    epochs = {"epoch": np.array([0.0, 5.0])}
    score = record.Array(np.arange(6.0).reshape(2, 3), ("epoch", "example"), epochs)
    run = made_up.with_array(made_up.window(), "el2n", score)
    assert reading.array(run, "el2n", 2).shape == (2, 3)
    assert reading.array(run, "el2n", 1, epoch=5.0).tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"data_diet run \w+: 'el2n': the array has no epoch 1.0"):
        reading.array(run, "el2n", 1, epoch=1.0)
    with pytest.raises(ValueError, match=r"with 2 axes, got shape \(3,\)"):
        reading.array(run, "el2n", 2, epoch=0.0)


def test_words():
    assert reading.count(1.0, "epoch") == "1 epoch"
    assert reading.count(0.5, "epoch") == "0.5 epochs"
    assert reading.percent(0.125) == "12.5 %"
    assert reading.minus("a - b") == "a \N{MINUS SIGN} b"
    assert reading.nearest([0.2, 0.4], 0.3) == 0.2


def test_cells_without_a_class_are_named():
    run = made_up.window()
    assert data_diet.bereft(run, "method", "dropped") == set()
    easy = (pl.col("method") == "easy") & (pl.col("replica") == 1)
    rarest = pl.when(easy).then(0).otherwise(pl.col("rarest")).alias("rarest")
    run = made_up.with_rows(run, lambda frame: frame.with_columns(rarest))
    assert data_diet.bereft(run, "method", "dropped") == {("easy", None)}
