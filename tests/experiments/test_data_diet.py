"""The Data Diet study: its protocol, its storage, and its claims on digits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamics import config as configs
from dynamics import record, statistics
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import Train
from experiments import data_diet
from experiments.data_diet import METHODS, Config, Pruning, Scoring

TINY = Config(
    data=DataConfig(num_train=200, num_test=100),
    model=MLP(width=8, depth=1),
    train=Train(batch_size=20),
    score=Scoring(epochs=1.0, replicas=2),
    prune=Pruning(fractions=(0.2, 0.5), replicas=2, epochs=2.0),
)


@pytest.fixture(scope="module")
def data() -> Any:
    return data_diet.load(TINY)


@pytest.fixture(scope="module")
def table(data: Any) -> record.Table:
    return data_diet.run(TINY, data)


def assert_equal(a: record.Table, b: record.Table) -> None:
    assert a.rows.keys() == b.rows.keys() and a.arrays.keys() == b.arrays.keys()
    for name in a.rows:
        np.testing.assert_array_equal(a.rows[name], b.rows[name], err_msg=name)
    for name in a.arrays:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=name)


def test_the_table(table: record.Table) -> None:
    rows, arrays = table
    subsets = 1 + 2 * len(METHODS)
    assert all(len(column) == 2 * subsets for column in rows.values())
    np.testing.assert_array_equal(rows["kept"], np.round(200 * rows["fraction"]))
    assert set(rows["method"]) == {"full", *METHODS}
    assert ((rows["test_accuracy"] > 0) & (rows["test_accuracy"] < 1)).all()
    assert arrays["el2n"].shape == arrays["grand_init"].shape == (2, 200)
    assert (np.diff(arrays["index"]) > 0).all() and arrays["index"].max() < 1797
    assert not arrays["mislabelled"].any()


def test_seeds_are_paired(table: record.Table) -> None:
    """Replica r of every subset starts from the same network in the same order of batches: two
    subsets that are the same set of examples end in the same accuracy."""
    keys = data_diet._keys((TINY,), 3, data_diet.RETRAINING)
    again = data_diet._keys((TINY,), 2, data_diet.RETRAINING)
    assert (keys[:2] == again).all()  # a replica does not depend on how many there are
    other = data_diet._keys((configs.override(TINY, {"seed": 1}),), 2, data_diet.RETRAINING)
    assert not (other == again).any()


def test_subsets(table: record.Table) -> None:
    arrays = table.arrays
    mean = arrays["el2n"].mean(axis=0)
    hard = data_diet._subset("el2n_hard", 0.2, arrays, 0, 0)
    easy = data_diet._subset("el2n_easy", 0.2, arrays, 0, 1)
    assert mean[hard].min() >= np.delete(mean, hard).max()
    assert mean[easy].max() <= np.delete(mean, easy).min()
    random = [data_diet._subset("random", 0.2, arrays, 0, replica) for replica in (0, 0, 1)]
    np.testing.assert_array_equal(random[0], random[1])  # drawn from the seed ...
    assert set(random[0]) != set(random[2])  # ... anew for each paired seed
    assert all(len(set(rows)) == 40 for rows in (hard, easy, *random))


def test_a_store_changes_nothing_and_a_second_call_computes_nothing(
    data: Any, table: record.Table, tmp_path: Path, monkeypatch: Any
) -> None:
    assert_equal(table, data_diet.run(TINY, data, store=tmp_path))
    monkeypatch.setattr(data_diet, "_train", None)
    assert_equal(table, data_diet.run(TINY, data, store=tmp_path))
    # another study of the same scores trains no scoring run
    stages = []
    monkeypatch.setattr(data_diet, "score", lambda *_: stages.append("score"))
    monkeypatch.setattr(data_diet, "prune", lambda *_: [table])
    other = configs.override(TINY, {"prune.fractions": (0.3,)})
    data_diet.run(other, data, store=tmp_path)
    assert stages == []


def test_points_of_a_sweep_share_one_program_and_equal_single_runs(
    data: Any, table: record.Table, tmp_path: Path, monkeypatch: Any
) -> None:
    points = configs.grid(TINY, {"train.learning_rate": [0.02, 0.1], "noise": [0.0, 0.3]})
    assert [len(group) for group in configs.group(points)] == [4]
    data_diet.run(points[0], data, store=tmp_path)
    calls = []
    train = data_diet._train
    monkeypatch.setattr(
        data_diet, "_train", lambda points, *a, **k: calls.append(points) or train(points, *a, **k)
    )
    tables = data_diet.sweep(points, data, store=tmp_path)
    assert [len(points) for points in calls] == [3, 3]  # the point on disk is skipped
    assert {p.parent.name for p in tmp_path.glob("data_diet/*/done.json")} == {
        configs.fingerprint(point) for point in points
    }
    for name in ("el2n", "grand"):
        np.testing.assert_allclose(tables[0].arrays[name], table.arrays[name], rtol=2e-4, atol=1e-6)
    alone = data_diet.run(points[3], data)
    np.testing.assert_allclose(tables[3].arrays["el2n"], alone.arrays["el2n"], rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(tables[3].arrays["labels"], alone.arrays["labels"])
    assert tables[3].arrays["mislabelled"].sum() == 60
    assert np.abs(tables[3].arrays["el2n"] - tables[0].arrays["el2n"]).max() > 0.1


def test_the_claims_on_digits() -> None:
    """Clean labels: hard beats random beats easy, and GraNd at init is the input norm."""
    config = Config(
        score=Scoring(epochs=5.0, replicas=20),
        prune=Pruning(fractions=(0.3,), replicas=5, epochs=20.0),
        seed=11,
    )
    table = data_diet.run(config, data_diet.load(config))
    accuracy = {
        m: 100 * table.rows["test_accuracy"][table.rows["method"] == m] for m in ("full", *METHODS)
    }
    assert (accuracy["el2n_hard"] - accuracy["random"]).mean() >= 0.5
    assert (accuracy["grand_hard"] - accuracy["random"]).mean() >= 0.5
    assert (accuracy["el2n_easy"] - accuracy["random"]).mean() <= -5
    assert (accuracy["grand_init_hard"] - accuracy["random"]).mean() <= 0
    scores = {name: table.arrays[name].mean(axis=0) for name in ("el2n", "grand", "grand_init")}
    assert statistics.spearman(scores["el2n"], scores["grand"]) >= 0.97
    assert statistics.spearman(scores["grand_init"], table.arrays["input_norm"]) >= 0.75
    assert abs(statistics.spearman(scores["grand_init"], scores["el2n"])) <= 0.3


def test_noisy_labels_turn_keeping_the_hardest_into_a_catastrophe() -> None:
    config = Config(
        score=Scoring(epochs=5.0, replicas=8),
        prune=Pruning(fractions=(0.3,), replicas=5, epochs=20.0),
        noise=0.2,
    )
    table = data_diet.run(config, data_diet.load(config))
    accuracy = {m: 100 * table.rows["test_accuracy"][table.rows["method"] == m] for m in METHODS}
    assert (accuracy["el2n_hard"] - accuracy["random"]).mean() <= -30
    found = statistics.auc(table.arrays["el2n"].mean(axis=0), table.arrays["mislabelled"])
    assert found >= 0.98
    control = statistics.auc(table.arrays["grand_init"].mean(axis=0), table.arrays["mislabelled"])
    assert 0.42 <= control <= 0.62


def test_a_batch_larger_than_a_subset_is_refused(data: Any) -> None:
    config = configs.override(TINY, {"train.batch_size": 41})
    with pytest.raises(ValueError, match=r"train.batch_size 41 is more than the 40 examples that"):
        data_diet.run(config, data)


@pytest.mark.parametrize("fractions", [(), (0.2, 0.2), (1.0,), (0.0,)])
def test_impossible_fractions_are_refused(fractions: Any) -> None:
    with pytest.raises(ValueError, match="fractions"):
        dataclasses.replace(TINY, prune=Pruning(fractions=fractions))


def test_a_diverging_point_of_a_sweep_spoils_no_other(data: Any) -> None:
    points = configs.grid(TINY, {"train.learning_rate": [0.02, 1e30]})
    fine, broken = data_diet.sweep(points, data)
    assert np.isfinite(fine.rows["test_accuracy"]).all()
    assert np.isinf(fine.arrays["diverged"]).all()
    assert np.isfinite(broken.arrays["diverged"]).all()
    assert np.isnan(broken.rows["test_accuracy"]).all()
