"""Kernel velocities that rise, fall or do neither by a known factor."""

import csv
import json
import math

import numpy as np
import polars as pl
import pytest
from made_up import run_of, with_rows

from paper_figures import data_diet_velocity as figure

REPLICAS, GROUPS, EPOCHS = 5, 9, 3
RANKS = tuple((g + 0.5) / GROUPS for g in range(GROUPS))
RISE = "velocity, highest EL2N / lowest"
RISE_NOISE = "velocity, highest EL2N with right labels / lowest"
EACH = "runs in which it is above 1"
FALL = "velocity, highest EL2N / next highest"
EVEN = "|velocity, last / first group in a random order - 1|"
WRONG = (0.0,) * 6 + (0.02, 0.96, 1.0)


def made_up(shape, wrong=(0.0,) * GROUPS, noise=0.0, replicas=REPLICAS, control=(1.0,) * GROUPS):
    """Velocity 0.01 / epoch, another factor for each replica, times ``shape`` of the group."""
    rows = [
        (order, epoch, RANKS[g], 0.1 * g, wrong[g], k, 0.01 / epoch * (1 + k) * factor)
        for order, factors in (("el2n", shape), ("random", control))
        for g, factor in enumerate(factors)
        for epoch in range(1, EPOCHS + 1)
        for k in range(replicas)
    ]
    names = ["order", "epoch", "rank", "el2n", "mislabelled", "replica", "velocity"]
    config = {
        "kind": "Config",
        "data": {"kind": "DataConfig", "source": "digits"},
        "model": {"kind": "MLP", "width": 128, "depth": 2},
        "score": {"kind": "Scoring", "draws": 8, "replicas": 4},
        "study": {"kind": "Velocity", "epochs": EPOCHS, "examples": 10, "scored_at": 5.0},
        "noise": noise,
    }
    arrays = {"index": np.arange(100, dtype=np.int32)}
    frames = {"velocity": pl.DataFrame(rows, schema=names, orient="row")}
    return run_of("data_diet", config, frames, arrays, f"{round(100 * noise):016x}")


RISING = tuple(2.0 ** (g / (GROUPS - 1)) for g in range(GROUPS))  # twice, straight in logarithms
PEAK = (*RISING[:7], 2.0, 1.0)


def claims_of(*runs):
    return {claim.quantity: claim for claim in figure.measure(runs)}


def test_a_rise_is_found_whatever_the_run_and_the_epoch():
    claims = claims_of(made_up(RISING))
    assert list(claims) == [RISE, EACH, EVEN]
    assert claims[RISE].effect == pytest.approx(2.0)
    assert claims[RISE].interval == pytest.approx((2.0, 2.0))  # paired: the runs' factors go
    assert (claims[EACH].effect, claims[EACH].gate) == (1.0, ">= 1")
    assert claims[EVEN].effect == pytest.approx(0.0, abs=1e-9)
    assert claims[EVEN].kind == "control"
    assert all(claim.holds and claim.seeds == REPLICAS for claim in claims.values())


def test_wrong_labels_are_claimed_apart():
    claims = claims_of(made_up(PEAK, WRONG, noise=0.2))
    assert list(claims) == [RISE_NOISE, EACH, FALL, EVEN]
    assert claims[RISE_NOISE].effect == pytest.approx(2.0 ** (6 / 8))  # the last with right labels
    assert claims[FALL].effect == pytest.approx(0.5)
    assert claims[FALL].gate == "<= 1"


def test_a_fall_does_not_hold():
    claims = claims_of(made_up(RISING[::-1]))
    assert [q for q, c in claims.items() if not c.holds] == [RISE, EACH]
    assert claims[RISE].effect == pytest.approx(0.5)
    claims = claims_of(made_up(RISING, WRONG, noise=0.2))  # and no fall at the top is none
    assert [q for q, c in claims.items() if not c.holds] == [FALL]


def test_most_runs_are_not_every_run():
    run = made_up(RISING)
    here = (pl.col("replica") == 2) & (pl.col("rank") > 0.9) & (pl.col("order") == "el2n")
    one = pl.col("velocity") * pl.when(here).then(0.4).otherwise(1.0)
    claims = claims_of(with_rows(run, lambda rows: rows.with_columns(velocity=one)))
    assert claims[RISE].effect == pytest.approx(2 * 0.4 ** (1 / REPLICAS))
    assert claims[EACH].effect == pytest.approx(1 - 1 / REPLICAS)
    assert claims[RISE].holds and not claims[EACH].holds


def test_groups_that_differ_for_no_reason_fail_the_control():
    claims = claims_of(made_up(RISING, control=(1.0,) * (GROUPS - 1) + (1.3,)))
    assert claims[EVEN].effect == pytest.approx(0.3)
    assert [q for q, c in claims.items() if not c.holds] == [EVEN]


def test_an_order_without_meaning_has_no_ratio():
    flat = claims_of(made_up((1.0,) * GROUPS))
    assert flat[RISE].effect == pytest.approx(1.0)
    assert (flat[EACH].effect, flat[EACH].holds) == (0.0, False)


def test_one_run_has_no_interval(tmp_path):
    run = made_up(RISING, replicas=1)
    figure.draw([run], tmp_path)
    for claim in figure.measure([run]):
        assert (claim.seeds, claim.interval) == (1, (-math.inf, math.inf))


def test_the_table_holds_the_numbers_drawn(tmp_path):
    runs = [made_up(RISING), made_up(PEAK, WRONG, noise=0.2)]
    paths, claims = figure.draw(runs, tmp_path)
    assert claims == figure.measure(runs)
    stored = json.loads(paths["json"].read_text())
    assert stored["fingerprints"] == [run.fingerprint for run in runs]
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert {row["panel"] for row in rows} == set("abcd")
    found = {(r["panel"], r["series"], round(float(r["x"]), 3)): float(r["y"]) for r in rows}
    first, last = round(RANKS[0], 3), round(RANKS[-1], 3)
    assert found["a", "epoch 2", first] == pytest.approx(0.005 * np.mean(range(1, REPLICAS + 1)))
    assert found["b", "mean of epochs", last] == pytest.approx(2.0)
    assert found["d", "wrong labels", last] == 1.0


def test_rows_in_any_order_give_the_same_bytes(tmp_path):
    run = made_up(PEAK, WRONG, noise=0.2)
    shuffled = with_rows(run, lambda rows: rows.sample(fraction=1.0, shuffle=True, seed=1))
    one, _ = figure.draw([run], tmp_path / "one")
    other, _ = figure.draw([shuffled], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


def change(run, column, value):
    return with_rows(run, lambda rows: rows.with_columns(pl.lit(value).alias(column)))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: with_rows(r, lambda f: f.drop("velocity")), "no column 'velocity'"),
        (lambda r: with_rows(r, lambda f: f.drop("mislabelled")), "no column 'mislabelled'"),
        (lambda r: change(r, "velocity", None), "got None for rank .* diverged"),
        (lambda r: change(r, "velocity", 0.0), "velocity must be above 0"),
        (lambda r: change(r, "mislabelled", 1.0), "of lowest EL2N must have right labels"),
        (lambda r: change(r, "mislabelled", 3.0), r"a part in \[0, 1\] for each group"),
        (lambda r: with_rows(r, lambda f: f.filter(pl.col("rank") < 0.3)), "4 groups .* got 3"),
        (lambda r: with_rows(r, lambda f: f[:-1]), "same replicas everywhere"),
        (lambda r: r._replace(config={"study": r.config["study"]}), "no '.*' in its config"),
    ],
)
def test_what_a_run_lacks_is_named(tmp_path, broken, message):
    with pytest.raises(ValueError, match=f"data_diet run 0000000000000000.*{message}"):
        figure.draw([broken(made_up(RISING))], tmp_path)
    assert not list(tmp_path.iterdir())
