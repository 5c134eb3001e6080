"""The claims and the drawing of pruning, from runs whose every effect is known."""

import csv

import made_up
import numpy as np
import polars as pl
import pytest
from made_up import EXAMPLES, PRUNING, REPLICAS, claims_of, expected, failed, pruning

from paper_figures import data_diet_pruning, draw

HARD = "hard - random at 30 % kept"
INIT = "GraNd at init - random at 30 % kept"
NORM = "GraNd at init - input norm at 30 % kept"
SAME = "Spearman(EL2N, GraNd) after 5 epochs"


def test_the_claims_are_the_effects_put_in():
    claims = claims_of(data_diet_pruning, pruning())
    expected(
        claims,
        {
            HARD: (2.0, ">= +0.5", "claim"),
            "easy - random at 30 % kept": (-9.0, "<= -5", "claim"),
            SAME: (1.0, ">= 0.97", "claim"),
            "Spearman(GraNd at init, input norm)": (1.0, ">= 0.75", "control"),
            INIT: (-1.75, "<= 0", "control"),
            NORM: (-0.25, "<= +1", "control"),
        },
    )
    assert {claim.figure for claim in claims.values()} == {"data_diet_pruning"}
    assert "2107.07075" in claims[HARD].paper
    assert "2303.14753" in claims[INIT].paper and "2303.14753" in claims[NORM].paper


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ("el2n_hard", [HARD]),
        ("el2n_easy", ["easy - random at 30 % kept"]),
        ("grand_init_hard", [INIT, NORM]),
    ],
)
def test_a_flipped_sign_does_not_hold_and_is_reported(method, what):
    claims = claims_of(data_diet_pruning, pruning(PRUNING | {method: -PRUNING[method]}))
    assert claims[what[0]].effect == pytest.approx(-PRUNING[method], abs=1e-9)
    assert failed(claims) == what
    text = draw.report(list(claims.values()))
    assert f"does not hold  {what[0]} = {-PRUNING[method]:+.2f} points" in text


def test_an_effect_below_the_gate_does_not_hold():
    above = PRUNING | {"el2n_hard": 0.4, "el2n_easy": -4.9, "input_norm_hard": -3.0}
    claims = claims_of(data_diet_pruning, pruning(above))
    assert failed(claims) == [HARD, "easy - random at 30 % kept", NORM]


@pytest.mark.parametrize("name", ["grand", "grand_init"])
def test_shuffled_scores_do_not_hold(name):
    run = pruning()
    mixed = run.arrays[name].values[:, np.random.default_rng(1).permutation(EXAMPLES)]
    run = made_up.with_array(run, name, mixed)
    claims = claims_of(data_diet_pruning, run)
    about = "GraNd at init, input norm" if name == "grand_init" else "EL2N, GraNd"
    assert failed(claims) == [next(q for q in claims if about in q)]
    low, high = claims[failed(claims)[0]].interval
    assert -1 <= low <= claims[failed(claims)[0]].effect <= high <= 1


def test_label_noise_turns_the_claim_round():
    claims = claims_of(data_diet_pruning, pruning(PRUNING | {"el2n_hard": -60.0}, noise=0.2))
    assert (claims[HARD].holds, claims[HARD].gate) == (True, "<= -30")
    assert claims[HARD].scale == made_up.NOISY_SCALE
    assert not any("easy" in quantity for quantity in claims)
    assert claims[SAME].gate == ">= 0.95"
    assert HARD in failed(claims_of(data_diet_pruning, pruning(noise=0.2)))


def test_the_nearest_fraction_is_named():
    claims = claims_of(data_diet_pruning, pruning(fractions=(0.1, 0.25, 0.5)))
    assert "hard - random at 25 % kept (nearest to 30 %)" in claims
    as_float32 = tuple(float(np.float32(f)) for f in made_up.FRACTIONS)
    assert HARD in claims_of(data_diet_pruning, pruning(fractions=as_float32))


def test_what_the_run_has_is_drawn_and_claimed(tmp_path):
    arrays = made_up.scored()
    del arrays["grand_init"]
    options = {"balanced": True, "cutoff": 0.1}
    run = pruning({"coverage": 1.0, "el2n_hard": 2.0}, arrays=arrays, study=options)
    assert list(claims_of(data_diet_pruning, run)) == [HARD, SAME]
    paths, _ = data_diet_pruning.draw([run], tmp_path)
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert {row["panel"] for row in rows} == set("abc")
    assert "coverage-centric (EL2N)" in {row["series"] for row in rows}
    caption = data_diet_pruning._caption(data_diet_pruning._study(run))
    assert "Every class keeps the same fraction" in caption and "hardest 10 %" in caption


def test_the_table_holds_the_numbers_drawn(tmp_path):
    paths, _ = data_diet_pruning.draw([pruning()], tmp_path, name="other")
    assert paths["csv"] == tmp_path / "other.csv"
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    panels = {p: [r for r in rows if r["panel"] == p] for p in "abcd"}
    assert {p: len(r) for p, r in panels.items()} == {
        "a": 6 * 3 + 1, "b": 5 * 3, "c": EXAMPLES, "d": EXAMPLES
    }  # fmt: skip
    at = [r for r in panels["a"] if r["series"] == "random" and float(r["x"]) == 0.3]
    assert float(at[0]["y"]) == pytest.approx(83 + np.mean(range(REPLICAS)))
    assert float(at[0]["low"]) < float(at[0]["y"]) < float(at[0]["high"])
    b = {(r["series"], float(r["x"])): float(r["y"]) for r in panels["b"]}
    assert b["EL2N (easiest)", 0.5] == pytest.approx(-9)
    ratio = [float(r["y"]) / float(r["x"]) for r in panels["c"]]
    np.testing.assert_allclose(ratio, 5, rtol=1e-5)
    assert [int(r["index"]) for r in panels["d"]] == list(range(EXAMPLES))


def lacking(array, value=None):
    if value is None:
        return lambda run: made_up.without_array(run, array)
    return lambda run: made_up.with_array(run, array, value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: made_up.with_rows(r, lambda f: f.drop("replica")), "no column 'replica'"),
        (lambda r: made_up.without_rows(r, method="random"), "no rows for method 'random'"),
        (lambda r: made_up.without_rows(r, method="full"), "no rows for .*'full', fraction 1$"),
        (
            lambda r: made_up.without_rows(r, method="el2n_easy", fraction=0.5),
            "no rows for method 'el2n_easy', fraction 0.5",
        ),
        (
            lambda r: made_up.without_rows(r, method="grand_hard", replica=2, fraction=0.3),
            "need the same replicas everywhere",
        ),
        (
            lambda r: made_up.with_rows(r, lambda f: pl.concat([f, f[:1]])),
            "two rows for method 'full'",
        ),
        (lambda r: made_up.with_accuracy(r, 97.0), r"must be in \[0, 1\], got 97.0 for .*'full'"),
        (lambda r: made_up.with_study(r, methods=["depth_hard"]), "no name for .* 'depth_hard'"),
        (lambda r: made_up.with_study(r, scored_at=None), "no 'study.scored_at' in its config"),
        (lambda r: made_up.with_study(r, kind="Timing"), r"no frame 'timing', .*'pruning'"),
        (lambda r: r._replace(config={"noise": 0.0}), "no 'study.kind' in its config"),
        (lacking("grand"), "no array 'grand'; it has .*'el2n'"),
        (lacking("el2n", np.ones(5)), r"'el2n' must be finite with 2 axes"),
        (lacking("el2n", np.full((4, 60), np.nan)), "240 values that are not"),
        (lacking("input_norm", np.ones(7)), "'input_norm' must be of the 60 examples .*, got 7"),
        (lacking("grand", np.ones((2, 60))), r"the same replicas .*'grand': \(2, 60\)"),
        (lacking("index", np.arange(9)), r"'index': \(4, 9\)"),
    ],
)
def test_what_a_run_lacks_is_named(broken, message):
    with pytest.raises(ValueError, match=f"data_diet run \\w+.*{message}"):
        data_diet_pruning.measure([broken(pruning())])


def test_it_is_a_figure_of_one_run():
    with pytest.raises(ValueError, match="this figure is of one run, got"):
        data_diet_pruning.measure([pruning(), pruning()])
