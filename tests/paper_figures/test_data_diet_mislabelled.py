"""Scores that find wrong labels by construction, to a known part."""

import csv
import json
import math

import numpy as np
import polars as pl
import pytest
from made_up import with_rows
from made_up_scores import (
    DRAWS,
    REPLICAS,
    N,
    claims_of,
    ranking,
    scored,
    value,
    with_array,
    with_config,
    with_score,
)

from dynamics import statistics
from paper_figures import data_diet_mislabelled as figure
from paper_figures.data_diet_scores import Score

EL2N = f"AUC of EL2N after 5 epochs, averaged over {REPLICAS // DRAWS} runs"
SINGLE = "AUC of EL2N after 5 epochs, of one run"
AUM = f"AUC of AUM after 20 epochs, averaged over {REPLICAS // DRAWS} runs"
CONTROLS = ("|AUC - 0.5| of GraNd at init", "|AUC - 0.5| of the input norm",
            "AUC of VoG after 20 epochs")  # fmt: skip


def test_scores_that_rank_wrong_labels_first_have_an_area_of_one():
    claims = claims_of(figure, ranking())
    assert list(claims) == [EL2N, SINGLE, AUM, *CONTROLS]
    for quantity in (EL2N, SINGLE, AUM):
        claim = claims[quantity]
        assert (claim.effect, claim.interval, claim.kind) == (1.0, (1.0, 1.0), "claim")
        assert claim.holds and claim.seeds == DRAWS
    assert all(claims[quantity].kind == "control" for quantity in CONTROLS)
    wrong = value(ranking(), "mislabelled")[0]
    off = abs(statistics.auc(value(ranking(), "input_norm"), wrong) - 0.5)
    assert claims[CONTROLS[1]].effect == pytest.approx(off)
    assert claims[CONTROLS[0]].effect == pytest.approx(off)  # the same order


def test_a_known_part_is_found():
    """Of 18 wrong labels, 2 the easiest of all: each is below all 72 right ones."""
    wrong = value(ranking(), "mislabelled")[0]
    hardness = np.where(wrong, 2.0, 1.0) + np.arange(N) / (10 * N)
    hardness[np.flatnonzero(wrong)[:2]] = [0.1, 0.2]
    claims = claims_of(figure, ranking(hardness=hardness))
    for quantity in (EL2N, SINGLE, AUM):
        assert claims[quantity].effect == pytest.approx(16 / 18)
        assert not claims[quantity].holds


def test_scores_turned_round_and_shuffled_do_not_hold():
    run = ranking()
    turned = with_score(run, "aum", 20.0, -value(run, "aum", 20.0))
    failed = [q for q, claim in claims_of(figure, turned).items() if not claim.holds]
    assert failed == [AUM]
    shuffled = value(run, "el2n", 5.0)[:, np.random.default_rng(1).permutation(N)]
    claims = claims_of(figure, with_score(run, "el2n", 5.0, shuffled))
    assert [q for q, claim in claims.items() if not claim.holds] == [EL2N]


def test_controls_that_know_the_labels_do_not_hold():
    run = ranking()
    tracin = value(run, "tracin")
    told = (
        with_score(run, "grand", 0.0, tracin),
        with_array(run, "input_norm", tracin[0]),
        with_score(run, "vog", 20.0, tracin),
    )
    for one, quantity in zip(told, CONTROLS, strict=True):
        assert [q for q, c in claims_of(figure, one).items() if not c.holds] == [quantity]


def test_never_learned_is_hardest_and_never_shown_counts_for_nothing():
    run = ranking()
    wrong = value(run, "mislabelled")[0]
    forgetting = np.where(wrong, np.inf, np.arange(N) % 3).astype(np.float32)
    forgetting = np.tile(forgetting, (REPLICAS, 1))
    forgetting[0] = np.nan  # this run was shown nothing yet
    changed = with_score(run, "forgetting", 5.0, forgetting)
    study = figure._study(changed)
    assert study.auc(Score("forgetting", 5.0)).mean == 1.0


def test_the_curve_goes_through_ties_in_straight_lines():
    scores = np.array([3.0, 2.0, 2.0, 1.0])
    suspected, found = figure.roc(scores, np.array([True, False, True, False]))
    assert suspected.tolist() == [0, 0, 0.5, 1] and found.tolist() == [0, 0.5, 1, 1]


def test_the_area_under_the_curve_is_the_auc():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 200).astype(float)
    scores[:30] = np.inf
    wrong = rng.random(200) < 0.2 + 0.1 * np.minimum(scores, 5)
    suspected, found = figure.roc(scores, wrong)
    assert np.trapezoid(found, suspected) == pytest.approx(statistics.auc(scores, wrong))


def test_runs_without_wrong_labels_are_left_out_and_alone_refused(tmp_path):
    clean, noisy = ranking(noise=0.0), ranking(noise=0.2)
    paths, claims = figure.draw([clean, noisy], tmp_path)
    assert claims == figure.measure([noisy])
    assert json.loads(paths["json"].read_text())["fingerprints"] == [noisy.fingerprint]
    with pytest.raises(ValueError, match="there are no wrong labels to find") as error:
        figure.draw([clean], tmp_path)
    assert "\n" not in str(error.value)


def test_two_levels_of_noise_are_two_rows(tmp_path):
    runs = [ranking(noise=0.2), ranking(noise=0.4)]
    paths, claims = figure.draw(runs, tmp_path)
    assert {c.scale.split(", ")[2] for c in claims} == {"20 % wrong labels", "40 % wrong labels"}
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert {row["panel"] for row in rows} == set("abcd")
    assert {row["y"] for row in rows if row["panel"] == "b" and row["series"] == "AUM"} == {"1.0"}


def test_the_same_bytes_twice_and_in_any_order(tmp_path):
    run = ranking(spread=0.3)
    shuffled = with_rows(run, lambda rows: rows.sample(fraction=1.0, shuffle=True, seed=1))
    one, _ = figure.draw([run], tmp_path / "one")
    other, _ = figure.draw([shuffled], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


def test_one_run_has_no_intervals(tmp_path):
    figure.draw([ranking(replicas=1)], tmp_path)
    for claim in figure.measure([ranking(replicas=1)]):
        assert (claim.seeds, claim.interval) == (1, (-math.inf, math.inf))


def test_scores_not_asked_for_are_left_out(tmp_path):
    run = with_score(ranking(), "grand", 0.0, None)
    for name in ("vog", "pvi"):
        run = with_array(run, name, None)
    _, claims = figure.draw([run], tmp_path)
    assert [c.quantity for c in claims if c.kind == "control"] == [CONTROLS[1]]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: with_score(r, "el2n", 5.0, None), "'el2n': the array has no epoch 5.0"),
        (lambda r: with_score(r, "aum", 5.0, None), "'aum': the array has no epoch 5.0"),
        (lambda r: with_array(r, "tracin", None), "no array 'tracin'"),
        (
            lambda r: with_array(r, "mislabelled", None),
            r"'mislabelled' must be bool\[2, 90\], got no",
        ),
        (
            lambda r: with_array(r, "mislabelled", np.ones((2, 90), bool)),
            r"got \[90, 90\] wrong of 90",
        ),
        (lambda r: with_array(r, "loss", np.ones((4, 2, 90))), "8 replicas and 90 examples, got"),
        (lambda r: with_rows(r, lambda _: scored(8, 3), "scored"), "scoring replica 0 diverged"),
        (lambda r: with_config(r, score={}), "no 'score.epochs' in its config"),
        (lambda r: with_rows(r, lambda rows: rows.drop("auc")), "no column 'auc'"),
        (
            lambda r: with_rows(r, lambda rows: rows.filter(pl.col("replica") != 2)),
            "each of 8 replicas",
        ),
    ],
)
def test_what_a_run_lacks_is_named(tmp_path, broken, message):
    with pytest.raises(ValueError, match=f"data_diet run 0000000000000014.*{message}"):
        figure.draw([broken(ranking())], tmp_path)
    assert not list(tmp_path.iterdir())
