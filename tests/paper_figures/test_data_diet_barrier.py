"""Barriers that are made up: highest on hard examples, gone when children part late."""

import csv
import json
import math

import numpy as np
import polars as pl
import pytest
from made_up import run_of, with_rows

from paper_figures import data_diet_barrier as figure

REPLICAS, SPAWNS, EPOCHS = 8, (0.0, 1.0, 5.0), 20.0
START = "spawned at epoch 0"
HIGH, LOW, PAIRS = f"high, {START}", f"low, {START}", f"pairs with high > low, {START}"
ONSET = "first spawn without a barrier over 1 point, high - low"
BETWEEN = f"smaller of high - random and random - low, {START}"
LATE = "largest of the three, spawned at 5"
APART = "high - low, children that share nothing"
# Points of error for replica 0, one more tenth for each replica, where it isn't 0.
NOISY = {
    "high": (40.0, 8.0, 3.0, 0.0),
    "low": (10.0, 0.0, 0.0, 0.0),
    "random": (20.0, 2.0, 0.5, 0.0),
}
CLEAN = {
    "high": (20.0, 0.0, 0.0, 0.0),
    "low": (2.0, 0.0, 0.0, 0.0),
    "random": (9.0, 0.0, 0.0, 0.0),
}


def made_up(points=NOISY, noise=0.2, replicas=REPLICAS, independent=True):
    """``points`` of each subset: of children that share nothing, then at each spawn epoch."""
    rows = []
    for subset, values in points.items():
        for spawn, value in zip((None, *SPAWNS), values, strict=True):
            for replica in range(replicas):
                if spawn is None and not independent:
                    continue
                barrier = (value + 0.1 * replica * (value > 0)) / 100
                rows.append((spawn, subset, replica, barrier, 2 * barrier, 0.25))
    names = ["spawn", "subset", "replica", "error_barrier", "loss_barrier", "end_error"]
    config = {
        "kind": "Config",
        "data": {"kind": "DataConfig", "source": "digits"},
        "model": {"kind": "MLP", "width": 128, "depth": 1},
        "score": {"kind": "Scoring", "draws": 8, "replicas": 4},
        "study": {"kind": "Connectivity", "epochs": EPOCHS, "examples": 30, "scored_at": 5.0},
        "noise": noise,
    }
    arrays = {"index": np.arange(100, dtype=np.int32)}
    frames = {"connectivity": pl.DataFrame(rows, schema=names, orient="row")}
    return run_of("data_diet", config, frames, arrays, f"{round(100 * noise):016x}")


def claims_of(*runs):
    return {claim.quantity: claim for claim in figure.measure(runs)}


def test_the_claims_are_the_effects_put_in():
    claims = claims_of(made_up())
    tenths = 0.1 * np.mean(range(REPLICAS))
    expected = {
        HIGH: (8 + tenths, ">= +4", "claim"),
        LOW: (0.0, "<= +0.5", "claim"),
        PAIRS: (1.0, ">= 1", "claim"),
        ONSET: (5.0, ">= 0.5", "claim"),  # high is over a point at epoch 1, low never is
        BETWEEN: (2 + tenths, ">= 0", "claim"),
        LATE: (0.0, "<= +2", "control"),
    }
    assert list(claims) == list(expected)
    for quantity, (effect, gate, kind) in expected.items():
        claim = claims[quantity]
        assert claim.effect == pytest.approx(effect)
        assert (claim.holds, claim.gate, claim.kind) == (True, gate, kind)
        assert claim.seeds == REPLICAS
        assert claim.interval[0] <= claim.effect <= claim.interval[1]
        assert claim.scale == "digits, 100 examples, 20 % wrong labels, MLP 1 x 128"


def test_clean_labels_are_claimed_of_children_that_share_nothing():
    claims = claims_of(made_up(CLEAN, noise=0.0))
    assert list(claims) == [APART, BETWEEN.replace(START, "sharing nothing"), LATE]
    assert claims[APART].effect == pytest.approx(18.0)
    assert claims[APART].interval == pytest.approx((18.0, 18.0))  # paired: no spread
    assert claims[BETWEEN.replace(START, "sharing nothing")].effect == pytest.approx(7.0)
    assert list(claims_of(made_up(CLEAN, noise=0.0, independent=False))) == [LATE]


def test_a_little_noise_is_claimed_as_a_difference():
    claims = claims_of(made_up(noise=0.1))
    assert list(claims) == [f"high - low, {START}", BETWEEN, LATE]
    assert claims[f"high - low, {START}"].gate == ">= +0.5"


def test_ends_swapped_do_not_hold():
    claims = claims_of(made_up(NOISY | {"high": NOISY["low"], "low": NOISY["high"]}))
    failed = [quantity for quantity, claim in claims.items() if not claim.holds]
    assert failed == [HIGH, LOW, PAIRS, ONSET, BETWEEN]
    assert claims[ONSET].effect == pytest.approx(-5.0)


def test_random_examples_outside_the_ends_do_not_hold():
    claims = claims_of(made_up(NOISY | {"random": (50.0, 12.0, 0.0, 0.0)}))
    assert [q for q, c in claims.items() if not c.holds] == [BETWEEN]
    assert claims[BETWEEN].effect == pytest.approx(-4.0)


def test_a_late_barrier_fails_the_control():
    claims = claims_of(made_up(NOISY | {"random": (20.0, 2.0, 0.5, 3.0)}))
    assert [q for q, c in claims.items() if not c.holds] == [LATE]
    assert claims[LATE].effect == pytest.approx(3 + 0.1 * np.mean(range(REPLICAS)))


@pytest.mark.parametrize(
    ("high", "onset"),
    [((8.0, 8.0, 8.0), 5.0), ((8.0, 0.0, 8.0), 5.0), ((8.0, 0.0, 0.0), 1.0), ((0.9, 0.0, 0.0), 0)],
)
def test_the_onset_is_where_barriers_are_gone_for_good(high, onset):
    study = figure._study(made_up(NOISY | {"high": (40.0, *high)}, replicas=2))
    assert study.onset("high").tolist() == [onset, onset]


def test_one_pair_has_no_interval(tmp_path):
    figure.draw([made_up(replicas=1)], tmp_path)
    for claim in figure.measure([made_up(replicas=1)]):
        assert (claim.seeds, claim.interval) == (1, (-math.inf, math.inf))


def test_levels_of_noise_are_panels(tmp_path):
    runs = [made_up(CLEAN, noise=0.0), made_up(noise=0.1), made_up(noise=0.2)]
    paths, claims = figure.draw(runs, tmp_path)
    assert claims == figure.measure(runs)
    stored = json.loads(paths["json"].read_text())
    assert stored["fingerprints"] == [run.fingerprint for run in runs]
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert {row["panel"] for row in rows} == set("abc")
    found = {(row["panel"], row["series"], row["x"]): float(row["y"]) for row in rows}
    tenths = 0.1 * np.mean(range(REPLICAS))
    assert found["c", "highest EL2N", "0.0"] == pytest.approx(8 + tenths)
    assert found["a", "lowest EL2N", "independent"] == pytest.approx(2 + tenths)
    assert found["b", "own error, random", "all"] == pytest.approx(25.0)


def test_rows_in_any_order_give_the_same_bytes(tmp_path):
    run = made_up()
    shuffled = with_rows(run, lambda rows: rows.sample(fraction=1.0, shuffle=True, seed=1))
    one, _ = figure.draw([run], tmp_path / "one")
    other, _ = figure.draw([shuffled], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


def without(run, **equal):
    keep = pl.lit(False)
    for column, value in equal.items():
        keep = keep | (pl.col(column) != value)
    return with_rows(run, lambda rows: rows.filter(keep))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: with_rows(r, lambda f: f.drop("spawn")), "no column 'spawn'"),
        (lambda r: with_rows(r, lambda f: f.drop("end_error")), "no column 'end_error'"),
        (lambda r: without(r, subset="random"), "no rows for spawn 0, subset 'random'"),
        (lambda r: without(r, subset="low", spawn=5.0), "no rows for spawn 5, subset 'low'"),
        (lambda r: without(r, subset="low", replica=3), "same replicas everywhere"),
        (lambda r: with_rows(r, lambda f: pl.concat([f, f[:1]])), "two rows for"),
        (
            lambda r: with_rows(r, lambda f: f.with_columns(error_barrier=pl.lit(None))),
            r"error_barrier must be in \[0, 1\], got None",
        ),
        (lambda r: with_rows(r, lambda f: f.filter(pl.col("spawn").is_null())), "share a parent"),
        (lambda r: r._replace(config={"study": r.config["study"]}), "no '.*' in its config"),
    ],
)
def test_what_a_run_lacks_is_named(tmp_path, broken, message):
    with pytest.raises(ValueError, match=f"data_diet run 0000000000000014.*{message}"):
        figure.draw([broken(made_up())], tmp_path)
    assert not list(tmp_path.iterdir())
