"""The Data Diet studies: their protocol, their storage, and their claims on digits."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dynamics import config as configs
from dynamics import scores, statistics, training
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.optim import SGD
from dynamics.record import Array, Findings
from dynamics.training import Train
from experiments import data_diet
from experiments.data_diet import (
    Config,
    Connectivity,
    Pruning,
    Ranking,
    Rescoring,
    Scoring,
    Timing,
    Transfer,
    Velocity,
    Window,
    landscape,
    scoring,
)
from experiments.data_diet.bank import Bank
from experiments.experiment import Job

METHODS = Pruning().methods
TINY = Config(
    data=DataConfig(num_train=200, num_test=100),
    model=MLP(width=8, depth=1),
    train=Train(batch_size=20),
    score=Scoring(epochs=(0.0, 1.0), draws=2, replicas=2),
    study=Pruning(fractions=(0.2, 0.5), scored_at=1.0, replicas=2, epochs=2.0),
)


@pytest.fixture(scope="module")
def data() -> Any:
    return data_diet.load(TINY)


@pytest.fixture(scope="module")
def pruned(data: Any) -> Findings:
    return data_diet.run(TINY, data)


def assert_equal(a: Findings, b: Findings) -> None:
    assert a.frames.keys() == b.frames.keys() and a.arrays.keys() == b.arrays.keys()
    for name, frame in a.frames.items():
        assert frame.schema == b.frames[name].schema and frame.equals(b.frames[name]), name
    for name, array in a.arrays.items():
        other = b.arrays[name]
        assert array.dims == other.dims and array.coords.keys() == other.coords.keys()
        np.testing.assert_array_equal(array.values, other.values, err_msg=name)
        for dim, labels in array.coords.items():
            np.testing.assert_array_equal(labels, other.coords[dim], err_msg=f"{name} {dim}")


def values_of(findings: Findings) -> dict[str, np.ndarray]:
    return {name: array.values for name, array in findings.arrays.items()}


def test_the_frame(pruned: Findings) -> None:
    frame, arrays = pruned.frames["pruning"], values_of(pruned)
    assert len(frame) == 2 * (1 + 2 * len(METHODS))
    assert frame["kept"].to_list() == (200 * frame["fraction"]).round().to_list()
    assert set(frame["method"]) == {"full", *METHODS}
    assert ((frame["test_accuracy"] > 0) & (frame["test_accuracy"] < 1)).all()
    assert frame["diverged"].null_count() == len(frame)
    assert pruned.frames["scored"].to_dict(as_series=False) == {
        "draw": [0, 0, 1, 1], "replica": [0, 1, 2, 3], "diverged": [None] * 4
    }  # fmt: skip
    assert pruned.arrays["el2n"].dims == ("replica", "example")
    assert arrays["el2n"].shape == arrays["grand_init"].shape == (4, 200)
    assert (np.diff(arrays["index"]) > 0).all() and arrays["index"].max() < 1797
    assert not arrays["mislabelled"].any()


def test_seeds_are_paired() -> None:
    """Replica r of every subset starts from the same network in the same order of batches: two
    subsets that are the same set of examples end in the same accuracy."""

    def keys(seed: int, replicas: int) -> Any:
        members = training.table([{"seed": seed}], lambda _: [{}], replicas)
        return training.keys(members, scoring.RETRAINING)

    again = keys(0, 2)
    assert (keys(0, 3)[:2] == again).all()  # a replica does not depend on how many there are
    assert not (keys(1, 2) == again).any()
    config = dataclasses.replace(
        TINY, study=Pruning(fractions=(0.995,), methods=("random",), replicas=2, epochs=2.0,
                            scored_at=1.0)
    )  # fmt: skip
    found = accuracies(data_diet.run(config, data_diet.load(config)).frames["pruning"])
    assert np.abs(found["full"] - found["random"]).max() < 10


def test_subsets(data: Any, pruned: Findings) -> None:
    (whole,) = scoring.banks(Job((TINY,), data))
    np.testing.assert_array_equal(whole.at("el2n", 1.0), pruned.arrays["el2n"].values)
    bank = whole.draw(0)

    def chosen(method: str, replica: int = 0, **options: Any) -> np.ndarray:
        return scoring.chosen(method, bank, 40, 0, replica, **({"at": 1.0} | options))  # pyright: ignore

    hard, easy = chosen("el2n_hard"), chosen("el2n_easy")
    mean = bank.at("el2n", 1.0).mean(axis=0)
    assert mean[hard].min() >= np.delete(mean, hard).max()
    assert mean[easy].max() <= np.delete(mean, easy).min()
    norm = bank["input_norm"]
    assert norm[chosen("input_norm_hard")].min() >= np.delete(norm, chosen("input_norm_hard")).max()
    start = bank.at("grand", 0.0).mean(axis=0)
    init = chosen("grand_init_hard")
    assert start[init].min() >= np.delete(start, init).max()
    low = bank.at("aum", 1.0).mean(axis=0)  # a low margin is hard
    assert low[chosen("aum_hard")].max() <= np.delete(low, chosen("aum_hard")).min()
    random = [chosen("random", replica) for replica in (0, 0, 1)]
    np.testing.assert_array_equal(random[0], random[1])  # drawn from the seed ...
    assert set(random[0]) != set(random[2])  # ... anew for each paired seed
    counts = np.bincount(bank["labels"][chosen("el2n_hard", balanced=True)], minlength=10)
    np.testing.assert_array_equal(counts, scores.quotas(bank["labels"], 40, 0))
    assert all(len(set(rows)) == 40 for rows in (hard, easy, *random, chosen("coverage")))


def test_means_over_runs_leave_out_what_diverged_and_know_what_was_never_learned() -> None:
    never, unseen = np.inf, np.nan
    events = np.array([[[0, never, unseen, unseen], [2, 1, 3, unseen], [9, 9, 9, 9]]])
    dims = ("epoch", "replica", "example")
    arrays = {"forgetting": Array(events, dims, {"epoch": np.array([1.0])})}
    runs = pl.DataFrame({"draw": 0, "replica": [0, 1, 2], "diverged": [None, None, 7]})
    bank = Bank(arrays, runs)
    np.testing.assert_array_equal(bank.mean("forgetting", 1.0), [1, never, 3, never])
    bank = dataclasses.replace(bank, runs=runs.with_columns(diverged=pl.Series([1, 2, 7])))
    np.testing.assert_array_equal(bank.mean("forgetting", 1.0), np.zeros(4))


def test_a_store_changes_nothing_and_a_second_call_computes_nothing(
    data: Any, pruned: Findings, tmp_path: Path, monkeypatch: Any
) -> None:
    assert_equal(pruned, data_diet.run(TINY, data, store=tmp_path))
    monkeypatch.setattr(training, "train", None)
    assert_equal(pruned, data_diet.run(TINY, data, store=tmp_path))
    # another study of the same scores trains nothing either
    ranked = data_diet.run(
        dataclasses.replace(TINY, study=Ranking(scored_at=1.0)), data, store=tmp_path
    )
    np.testing.assert_array_equal(
        ranked.arrays["el2n"].at(epoch=1.0).values, pruned.arrays["el2n"].values
    )


def test_points_of_a_sweep_share_one_program_and_equal_single_runs(
    data: Any, pruned: Findings, tmp_path: Path, monkeypatch: Any
) -> None:
    points = configs.grid(TINY, {"train.optimizer.learning_rate": [0.02, 0.1], "noise": [0.0, 0.3]})
    assert [len(group) for group in configs.group(points)] == [4]
    data_diet.run(points[0], data, store=tmp_path)
    calls = []
    train = training.train
    monkeypatch.setattr(
        training, "train", lambda members, *a, **k: calls.append(members) or train(members, *a, **k)
    )
    found = data_diet.sweep(points, data, store=tmp_path)
    assert [members["point"].n_unique() for members in calls] == [3, 3]  # one is on the disk
    assert {p.parent.name for p in tmp_path.glob("data_diet/*/done.json")} == {
        configs.fingerprint(point) for point in points
    }
    first, last, whole = values_of(found[0]), values_of(found[3]), values_of(pruned)
    for name in ("el2n", "grand"):
        np.testing.assert_allclose(first[name], whole[name], rtol=2e-4, atol=1e-6)
    alone = values_of(data_diet.run(points[3], data))
    np.testing.assert_allclose(last["el2n"], alone["el2n"], rtol=2e-4, atol=1e-6)
    np.testing.assert_array_equal(last["labels"], alone["labels"])
    assert last["mislabelled"].sum(axis=1).tolist() == [60, 60]
    assert (last["labels"][0] != last["labels"][1]).sum() > 60  # each draw has its own
    assert np.abs(last["el2n"] - first["el2n"]).max() > 0.1


def accuracies(frame: pl.DataFrame, column: str = "method") -> dict[Any, np.ndarray]:
    """Points of test accuracy for each value of a column, by replica."""
    groups = frame.sort("replica").group_by(column, maintain_order=True)
    return {value: 100 * rows["test_accuracy"].to_numpy() for (value,), rows in groups}


def test_the_claims_on_digits() -> None:
    """Clean labels: hard beats random beats easy, and GraNd at init is the input norm (5.3)."""
    study = Pruning(fractions=(0.3,), replicas=5)
    config = Config(score=Scoring(epochs=(0.0, 5.0), draws=5, replicas=10), study=study, seed=11)
    found = data_diet.run(config, data_diet.load(config))
    accuracy, arrays = accuracies(found.frames["pruning"]), values_of(found)
    assert (accuracy["el2n_hard"] - accuracy["random"]).mean() >= 0.5
    assert (accuracy["grand_hard"] - accuracy["random"]).mean() >= 0.5
    assert (accuracy["el2n_easy"] - accuracy["random"]).mean() <= -5
    assert (accuracy["grand_init_hard"] - accuracy["random"]).mean() <= 0
    assert (accuracy["input_norm_hard"] - accuracy["random"]).mean() <= 0
    easy = found.frames["pruning"].filter(pl.col("method") == "el2n_easy")
    assert (easy["rarest"] <= 4).all()  # of 40, were classes kept alike
    start = arrays["grand_init"].mean(axis=0)
    assert statistics.spearman(start, arrays["input_norm"]) >= 0.75  # S2


def test_noisy_labels_turn_keeping_the_hardest_into_a_catastrophe() -> None:
    """20 % wrong labels, 30 % kept (5.3): hard - random <= -30; without the top 25 % >= +4."""
    study = Window(kept=0.3, dropped=(0.0, 0.25), replicas=5)
    config = Config(score=Scoring(epochs=(5.0,), draws=5, replicas=4), study=study, noise=0.2)
    frame = data_diet.run(config, data_diet.load(config)).frames["window"]
    random = accuracies(frame)["random"]
    dropped = accuracies(frame.filter(pl.col("method") == "window"), "dropped")
    assert (dropped[0.0] - random).mean() <= -30
    assert (dropped[0.25] - random).mean() >= 4
    assert set(frame.filter(pl.col("dropped") == 0.25)["offset"]) == {1347 - 404 - 337}


def test_barriers_on_digits() -> None:
    """5.4: children of one initialisation, 20 % wrong labels; children that share nothing."""
    config = Config(
        model=MLP(width=128, depth=1),
        train=Train(optimizer=SGD(learning_rate=0.05), batch_size=32),
        score=Scoring(epochs=(5.0,), draws=8, replicas=4),
        study=Connectivity(spawn=(0.0,), epochs=40.0, replicas=8),
    )
    points = configs.grid(config, {"noise": [0.0, 0.2]})
    found = data_diet.sweep(points, data_diet.load(config))
    clean, noisy = (one.frames["connectivity"] for one in found)

    def barrier(frame: pl.DataFrame, subset: str, spawn: float | None) -> np.ndarray:
        here = frame.filter(pl.col("subset") == subset, pl.col("spawn").eq_missing(pl.lit(spawn)))
        assert len(here) == 8
        return here["error_barrier"].to_numpy()

    high, low = (barrier(noisy, subset, 0.0) for subset in ("high", "low"))
    assert high.mean() >= 0.04 and low.mean() <= 0.005 and (high > low).all()
    high, low = (barrier(clean, subset, None) for subset in ("high", "low"))
    assert (high - low).mean() >= 0.1


STUDIES = [
    TINY.study,
    Timing(kept=0.3, methods=("el2n", "grand", "forgetting", "aum"), replicas=2, epochs=2.0),
    Window(kept=0.3, dropped=(0.0, 0.2), scored_at=1.0, replicas=2, epochs=2.0),
    Transfer(model=MLP(width=4, depth=1), scored_at=1.0, replicas=2, epochs=2.0),
    Ranking(scored_at=1.0, shown=2),
    Rescoring(warmup=1.0, every=1.0, replicas=2, epochs=3.0),
    Connectivity(spawn=(0.0, 1.0), examples=40, points=5, scored_at=1.0, replicas=2, epochs=2.0),
    Velocity(groups=3, examples=20, scored_at=1.0, replicas=2, epochs=2),
]


LONG = (
    Transfer,
    Connectivity,
    Timing,
    Window,
    Velocity,
    Rescoring,
)  # to compile; each like one that is tried


@pytest.mark.parametrize(
    "study",
    [pytest.param(s, marks=[pytest.mark.slow] * isinstance(s, LONG)) for s in STUDIES],
    ids=lambda s: type(s).__name__,
)
def test_every_study_is_the_same_from_a_store_and_when_it_is_cut(
    study: Any, data: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Cut after each training in turn, and continued; with wrong labels, and vog and pvi."""
    config = dataclasses.replace(
        TINY,
        study=study,
        noise=0.2,
        score=Scoring(epochs=(0.0, 1.0), draws=2, replicas=2, also=("vog", "pvi")),
    )
    whole = data_diet.run(config, data)
    assert set(whole.frames) == {type(study).__name__.lower(), "scored"}
    assert whole.arrays["mislabelled"].values.sum() == 2 * 40
    train, trained = training.train, []

    class Cut(Exception):
        pass

    def cut(*args: Any, **options: Any) -> Any:
        results = train(*args, **options)
        place = options["store"].path
        if place not in trained:
            trained.append(place)
            raise Cut
        return results

    monkeypatch.setattr(training, "train", cut)
    for _ in range(30):
        try:
            found = data_diet.run(config, data, store=tmp_path)
            break
        except Cut:
            continue
    assert_equal(found, whole)
    assert trained and not list(tmp_path.rglob("stages"))


def test_the_bank_of_scores(data: Any) -> None:
    score = Scoring(epochs=(0.0, 1.0, 2.0), draws=1, replicas=2, also=("vog", "pvi"))
    config = dataclasses.replace(
        TINY, score=score, study=Ranking(scored_at=2.0, shown=2), noise=0.1
    )
    found = data_diet.run(config, data)
    for kind in ("el2n", "grand", "loss", "entropy", "logit_margin"):
        assert found.arrays[kind].dims == ("epoch", "replica", "example")
        assert found.arrays[kind].coords["epoch"].tolist() == [0.0, 1.0, 2.0]
        assert found.arrays[kind].values.shape == (3, 2, 200)
    for kind in ("forgetting", "aum", "confidence", "variability", "vog", "pvi"):
        assert found.arrays[kind].dims == ("epoch", "replica", "example")
        assert found.arrays[kind].coords["epoch"].tolist() == [1.0, 2.0]
        assert found.arrays[kind].values.shape == (2, 2, 200)
    arrays = values_of(found)
    arrays |= {name: arrays[name][0] for name in ("labels", "mislabelled")}  # one draw
    squares = (arrays["grand"][1:].astype(np.float64) ** 2).sum(axis=0)
    np.testing.assert_allclose(arrays["tracin"], 0.02 * squares, rtol=1e-5)
    prior = np.log2(np.bincount(arrays["labels"]) / 200)[arrays["labels"]]
    assert arrays["pvi"][-1].mean() <= -prior.mean()  # E13: at most the labels' entropy
    hardest, easiest = arrays["shown"]
    assert (arrays["labels"][hardest] == np.arange(10)[:, None]).all()
    mean = found.arrays["el2n"].at(epoch=2.0).values.mean(axis=0)
    assert (mean[hardest].min(axis=1) >= mean[easiest].max(axis=1)).all()
    np.testing.assert_array_equal(arrays["shown_images"], data.train.x[arrays["shown"]])
    assert (arrays["labels"] != arrays["clean"])[arrays["mislabelled"]].all()


def test_a_batch_larger_than_a_subset_is_refused(data: Any) -> None:
    config = configs.override(TINY, {"train.batch_size": 41})
    with pytest.raises(ValueError, match=r"train.batch_size 41 is more than the 40 examples that"):
        data_diet.run(config, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"study.scored_at": 2.0}, "study.scored_at must be one of score.epochs"),
        ({"score.epochs": (1.0,)}, "'grand_init_hard' needs 0 among score.epochs"),
        ({"score.epochs": (1.0, 0.0)}, "Scoring.epochs must rise"),
        ({"score.epochs": (0.0,)}, "Scoring.epochs must rise"),
        ({"study.replicas": 3}, "study.replicas must be at most score.draws 2, for each takes"),
        ({"score.horizon": 0.5}, "Scoring.horizon must be 0 or >= the last epoch 1"),
        ({"study.methods": ("el2n_hard",)}, "must have 'random' to compare with"),
        ({"study.methods": ("el3n_hard",)}, "perhaps 'el2n_hard'"),
        ({"study": "window", "study.kept": 0.9}, "must leave the 0.9 kept"),
        ({"study": "rescoring", "study.warmup": 20.0}, "warmup must be < epochs"),
        ({"study": "connectivity", "study.points": 4}, "odd points"),
    ],
)
def test_impossible_studies_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs.override(TINY, change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score.epochs": (0.0, 0.01, 1.0)}, "score.epochs must be at least a step of"),
        (
            {"study": Connectivity(examples=101, scored_at=1.0, replicas=2)},
            "at most 100 of 200, got 101",
        ),
        (
            {"study": Velocity(examples=201, scored_at=1.0, replicas=2)},
            "at most 200 of 200, got 201",
        ),
        ({"score.epochs": (0.0, 1.0, 1.01)}, "score.epochs must be at least a step apart"),
        ({"study": Rescoring(every=0.01, replicas=2)}, "study.every must be at least a step of"),
        (
            {"study": Rescoring(warmup=1.0, epochs=1.01, replicas=2)},
            "study.warmup must be a step shorter",
        ),
        ({"study": Timing(epochs=0.001, replicas=2)}, "study.epochs must be at least a step of"),
        (
            {"study": Connectivity(spawn=(0.0, 0.001), scored_at=1.0, replicas=2)},
            "study.spawn must be at least a step of",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused_before_anything_is_trained(
    change: Any, message: str, data: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(training, "train", None)
    with pytest.raises(ValueError, match=message):
        data_diet.run(configs.override(TINY, change), data)


@pytest.mark.parametrize("study", [0, 1, 2, 5, 6, 7])
def test_the_mesh_is_checked_for_what_a_study_trains(
    study: int, data: Any, monkeypatch: Any
) -> None:
    """The number of replicas told beforehand is that of the largest training, or divides it."""
    config = dataclasses.replace(TINY, study=STUDIES[study])
    trained = []
    train = training.train

    def counted(members: Any, *args: Any, **options: Any) -> Any:
        trained.append(len(members))
        return train(members, *args, **options)

    monkeypatch.setattr(training, "train", counted)
    data_diet.run(config, data)
    assert max(trained[1:]) % data_diet.members_of(config) == 0
    if not isinstance(config.study, Connectivity):  # whose children are two
        assert max(trained[1:]) == data_diet.members_of(config)


@pytest.mark.parametrize("fractions", [(), (0.2, 0.2), (1.0,), (0.0,)])
def test_impossible_fractions_are_refused(fractions: Any) -> None:
    with pytest.raises(ValueError, match="fractions"):
        Pruning(fractions=fractions)


def test_a_diverging_point_of_a_sweep_spoils_no_other(data: Any) -> None:
    points = configs.grid(TINY, {"train.optimizer.learning_rate": [0.02, 1e30]})
    fine, broken = data_diet.sweep(points, data)
    assert fine.frames["pruning"]["test_accuracy"].is_finite().all()
    assert fine.frames["scored"]["diverged"].null_count() == 4
    assert broken.frames["scored"]["diverged"].null_count() == 0
    lost = broken.frames["pruning"]
    assert lost["test_accuracy"].null_count() == lost["test_loss"].null_count() == len(lost)
    assert lost["diverged"].null_count() == 0 and lost["kept"].null_count() == 0


def test_children_that_diverged_have_no_barrier() -> None:
    """Of two pairs the second lost its second child at step 3."""
    members = pl.DataFrame(
        {
            "member": range(4), "point": 0, "replica": [0, 1, 0, 1], "child": [0, 0, 1, 1],
            "diverged": [None, None, None, 3],
        }
    )  # fmt: skip
    dims = ("step", "member", "place", "example")
    paths = {("path", m): Array(np.ones((1, 4, 2, 6)), dims) for m in ("accuracy", "loss")}
    trained = training.Trained(members, members, {}, paths, None)
    study = Connectivity(points=3)
    chosen = {(0, r): {"high": np.array([4, 7])} for r in range(2)}
    frame = landscape._barriers(trained, study, chosen, np.arange(3, 9), None)
    assert frame["diverged"].to_list() == [None, 3]
    assert frame["error_barrier"].to_list() == [0.0, None]
    assert frame["end_error"].to_list() == [0.0, None]
