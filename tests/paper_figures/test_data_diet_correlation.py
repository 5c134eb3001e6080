"""Scores of one hardness, and of none: rank correlations are known."""

import csv
import math

import numpy as np
import pytest
from made_up_scores import (
    REPLICAS,
    N,
    claims_of,
    ranking,
    value,
    with_array,
    with_config,
    with_score,
)

from dynamics import statistics
from paper_figures import data_diet_correlation as figure
from paper_figures.data_diet import Draws

SAME = "Spearman(EL2N @ 5, GraNd @ 5)"
NORM = "Spearman(GraNd at init, input norm)"
SOON = "Spearman(EL2N @ 5, EL2N @ 20)"
HALVES = "Spearman(EL2N @ 5, itself), 4 runs each - one each"
NOTHING = "|Spearman(GraNd at init, EL2N @ 5)|"


def test_monotone_functions_of_one_hardness_agree_entirely():
    claims = claims_of(figure, ranking(noise=0.0))
    assert list(claims) == [SAME, NORM, SOON, HALVES, NOTHING]
    for quantity in (SAME, NORM, SOON):
        assert claims[quantity].effect == pytest.approx(1.0)
        assert claims[quantity].interval == pytest.approx((1.0, 1.0))
        assert claims[quantity].seeds == REPLICAS
    assert claims[HALVES].effect == pytest.approx(0.0, abs=1e-12)  # no noise to average away
    assert not claims[HALVES].holds
    run = ranking(noise=0.0)
    rho = statistics.spearman(value(run, "input_norm"), value(run, "el2n", 5.0)[0])
    assert claims[NOTHING].effect == pytest.approx(abs(rho))
    assert claims[NOTHING].kind == "control"


def test_averaging_helps_as_much_as_it_should():
    """Of normal scores with variance 1 + 1 / k over k runs, Pearson's r is k / (k + 1)."""
    rng = np.random.default_rng(0)
    replicas = rng.normal(size=4000) + rng.normal(size=(8, 4000))
    for count, expected in ((1, 1 / 2), (2, 2 / 3), (4, 4 / 5)):
        found = figure.agreement(replicas, count, Draws([np.arange(8)], True))
        expected = 6 / math.pi * math.asin(expected / 2)  # Spearman's of a normal pair
        assert found.mean == pytest.approx(expected, abs=0.03)
        assert found.low < found.mean < found.high
    claims = claims_of(figure, ranking(noise=0.0, spread=0.3))
    assert claims[HALVES].holds and claims[HALVES].effect > 0.05


def test_agreement_is_spearman_of_disjoint_averages():
    replicas = np.random.default_rng(1).normal(size=(4, 50)) + np.arange(50) / 20
    means = [replicas[[i, (i + 1) % 4]].mean(axis=0) for i in range(4)]
    by_hand = np.mean([statistics.spearman(means[i], means[(i + 2) % 4]) for i in range(4)])
    draws = Draws([np.arange(4)], True)
    assert figure.agreement(replicas, 2, draws).mean == pytest.approx(by_hand)
    pairs = [statistics.spearman(replicas[i], replicas[(i + 1) % 4]) for i in range(4)]
    assert figure.agreement(replicas, 1, draws).mean == pytest.approx(np.mean(pairs))


def test_noise_lowers_the_gate_and_drops_the_claim_on_late_scores():
    for noise, gate in ((0.2, ">= 0.95"), (0.4, ">= 0.93")):
        claims = claims_of(figure, ranking(noise=noise))
        assert claims[SAME].gate == gate and SOON not in claims


@pytest.mark.parametrize(
    ("kind", "epoch", "failed"),
    [
        ("grand", 5.0, [SAME]),
        ("el2n", 20.0, [SOON]),
        ("input_norm", None, [NORM]),
        ("grand", 0.0, [NORM]),
    ],
)
def test_shuffled_scores_do_not_hold(kind, epoch, failed):
    run = ranking(noise=0.0, spread=0.05)
    mixed = value(run, kind, epoch)[..., np.random.default_rng(5).permutation(N)]
    if epoch is None:
        run = with_array(run, kind, mixed)
    else:
        run = with_score(run, kind, epoch, mixed)
    claims = claims_of(figure, run)
    assert [q for q, c in claims.items() if not c.holds and q != HALVES] == failed


def test_a_control_that_knows_does_not_hold():
    run = ranking(noise=0.0)
    claims = claims_of(figure, with_score(run, "grand", 0.0, -value(run, "el2n", 5.0)))
    assert claims[NOTHING].effect == pytest.approx(1.0)  # either way round
    assert not claims[NOTHING].holds


def test_the_table_is_the_matrix(tmp_path):
    paths, claims = figure.draw([ranking(noise=0.0)], tmp_path)
    assert claims == figure.measure([ranking(noise=0.0)])
    with paths["csv"].open() as f:
        rows = [r for r in csv.DictReader(f) if r["panel"] == "a"]
    found = {row["series"]: float(row["y"]) for row in rows}
    assert len(found) == 16 * 17 // 2 - 1  # all but the norm with itself
    assert found["AUM @ 20 ~ EL2N @ 5"] == pytest.approx(1.0)  # low is hard, turned
    assert found["GraNd @ 0 ~ input norm"] == pytest.approx(1.0)
    assert found["EL2N @ 5 ~ EL2N @ 5"] == pytest.approx(1.0)


def test_a_constant_score_has_no_number(tmp_path):
    run = with_score(ranking(), "variability", 20.0, np.zeros((REPLICAS, N), np.float32))
    paths, _ = figure.draw([run], tmp_path)
    with paths["csv"].open() as f:
        assert not any("variability" in row["series"] for row in csv.DictReader(f))


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (0.996, "1"), (0.5, ".50"), (-0.5, "\N{MINUS SIGN}.50"), (-0.001, ".00"),
     (-1.0, "\N{MINUS SIGN}1")],
)  # fmt: skip
def test_numbers_are_short(value, text):
    assert figure._short(value) == text


def test_the_same_bytes_twice(tmp_path):
    one, _ = figure.draw([ranking(spread=0.3)], tmp_path / "one")
    other, _ = figure.draw([ranking(spread=0.3)], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: with_array(r, "el2n", None), "no array 'el2n'"),
        (lambda r: with_score(r, "el2n", 5.0, None), "'el2n': the array has no epoch 5.0, it has"),
        (lambda r: with_score(r, "grand", 0.0, None), "'grand': the array has no epoch 0"),
        (lambda r: with_array(r, "input_norm", None), "no array 'input_norm'"),
        (lambda r: with_array(r, "input_norm", np.ones(7)), "got shape \\(1, 7\\)"),
        (lambda r: with_config(r, study={"kind": "Ranking"}), "no 'study.scored_at'"),
        (lambda r: ranking(replicas=3), "score.replicas must be >= 4 .* got 1"),
    ],
)
def test_what_a_run_lacks_is_named(tmp_path, broken, message):
    with pytest.raises(ValueError, match=f"data_diet run 0000000000000014.*{message}"):
        figure.draw([broken(ranking())], tmp_path)
    with pytest.raises(ValueError, match="of one run, got 2"):
        figure.draw([ranking(), ranking()], tmp_path)
    assert not list(tmp_path.iterdir())
