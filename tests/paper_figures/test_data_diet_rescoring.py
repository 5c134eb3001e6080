"""The claims of re-scoring, from runs whose every effect is known."""

import csv

import made_up
import polars as pl
import pytest
from made_up import RESCORING, claims_of, expected, failed, rescoring

from paper_figures import data_diet_rescoring

WARM = "|hardest - random| at the end of the warm-up, 2 epochs"
MEAN = "again - once, hardest (30 % kept), mean of epochs 5 and 8"


def test_the_claims_are_the_effects_put_in():
    expected(
        claims_of(data_diet_rescoring, rescoring()),
        {
            "hardest, again - all data (30 % kept)": (0.25, ">= -0.5", "claim"),
            "again - once, hardest (30 % kept)": (0.75, ">= 0", "claim"),
            "hardest - random, again (30 % kept)": (1.25, ">= 0", "claim"),
            "again - once, random (30 % kept)": (1.0, ">= +0.5", "control"),
            WARM: (0.0, "<= 0", "control"),
        },
    )


def test_with_wrong_labels_the_choices_are_averaged():
    expected(
        claims_of(data_diet_rescoring, rescoring(0.2)),
        {
            "hardest - random, once (30 % kept)": (-60.0, "<= -30", "claim"),
            MEAN: (38.0, ">= +10", "claim"),  # 40 at the end, 36 before
            "again - once, random (30 % kept)": (3.0, ">= +0.5", "control"),
            WARM: (0.0, "<= 0", "control"),
        },
        scale=made_up.NOISY_SCALE,
    )


@pytest.mark.parametrize(
    ("noise", "method", "points", "what"),
    [
        (0.0, "full", 3.0, ["hardest, again - all data (30 % kept)"]),
        (0.0, "once", 2.5, ["again - once, hardest (30 % kept)"]),
        (0.0, "random_again", 0.25, ["again - once, random (30 % kept)"]),
        (0.0, "random_again", 2.5, ["hardest - random, again (30 % kept)"]),
        (0.2, "once", -29.0, ["hardest - random, once (30 % kept)", MEAN]),
        (0.2, "again", -53.0, [MEAN]),
    ],
)
def test_another_effect_does_not_hold(noise, method, points, what):
    run = rescoring(noise, RESCORING[noise] | {method: points})
    assert failed(claims_of(data_diet_rescoring, run)) == what


def test_runs_that_differ_before_the_first_choice_do_not_hold():
    run = rescoring()
    early = (pl.col("method") == "again") & (pl.col("epoch") == 2.0) & (pl.col("replica") == 1)
    lower = pl.when(early).then(pl.col("test_accuracy") - 0.01).otherwise(pl.col("test_accuracy"))
    claims = claims_of(data_diet_rescoring, made_up.with_rows(run, lambda f: f.with_columns(lower)))
    assert failed(claims) == [WARM]
    assert claims[WARM].effect == pytest.approx(0.25)


def test_the_overlap_is_drawn_of_the_choices_that_have_one_before(tmp_path):
    paths, _ = data_diet_rescoring.draw([rescoring()], tmp_path)
    with paths["csv"].open() as f:
        drawn = [row for row in csv.DictReader(f) if row["panel"] == "b"]
    assert [(row["series"], float(row["x"]), float(row["y"])) for row in drawn] == [
        ("hardest, again", 5.0, 25.0),
        ("random, again", 5.0, 25.0),
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: made_up.without_rows(r, method="once"), "no rows for method 'once', epoch 2"),
        (lambda r: made_up.without_rows(r, method="full"), "no rows for method 'full'"),
        (lambda r: made_up.with_rows(r, lambda f: f.drop("overlap")), "no column 'overlap'"),
        (lambda r: made_up.with_study(r, every=None), "no 'study.every' in its config"),
    ],
)
def test_what_a_run_lacks_is_named(broken, message):
    with pytest.raises(ValueError, match=f"data_diet run \\w+.*{message}"):
        data_diet_rescoring.measure([broken(rescoring())])
