"""The claims of timing, from runs whose every effect is known."""

import made_up
import pytest
from made_up import TIMING, claims_of, expected, failed, timing

from paper_figures import data_diet_timing


def test_the_claims_are_the_effects_put_in():
    claims = claims_of(data_diet_timing, timing())
    expected(
        claims,
        {
            "EL2N after 5 epochs - random at 30 % kept": (2.0, ">= +0.5", "claim"),
            "EL2N after 5 epochs - after 20 at 30 % kept": (-0.25, ">= -0.5", "claim"),
            "EL2N at epoch 0 - random at 30 % kept": (-20.0, "<= 0", "control"),
            "GraNd at epoch 0 - random at 30 % kept": (-5.0, "<= 0", "control"),
        },
    )
    papers = [claim.paper for claim in claims.values()]
    assert "2107.07075" in papers[0] and "2303.14753" in papers[-1]


def test_with_wrong_labels_the_highest_epoch_counts():
    expected(
        claims_of(data_diet_timing, timing(0.2)),
        {
            "EL2N - random at 30 % kept, the highest of epochs 1 to 20": (-50, "<= -30", "claim"),
            "EL2N at epoch 0 - after 5 at 30 % kept": (35.0, ">= +10", "control"),
            "GraNd at epoch 0 - random at 30 % kept": (-6.0, "<= 0", "control"),
        },
        scale=made_up.NOISY_SCALE,
    )


@pytest.mark.parametrize(
    ("noise", "cell", "points", "what"),
    [
        (0.0, ("el2n_hard", 5.0), -2.0, ["EL2N after 5 epochs - random", "after 20"]),
        (0.0, ("el2n_hard", 20.0), 3.0, ["EL2N after 5 epochs - after 20"]),
        (0.0, ("el2n_hard", 0.0), 1.0, ["EL2N at epoch 0 - random"]),
        (0.0, ("grand_hard", 0.0), 0.5, ["GraNd at epoch 0 - random"]),
        (0.2, ("el2n_hard", 1.0), -20.0, ["the highest of epochs 1 to 20"]),
        (0.2, ("el2n_hard", 0.0), -59.0, ["EL2N at epoch 0 - after 5"]),
    ],
)
def test_another_effect_does_not_hold(noise, cell, points, what):
    claims = claims_of(data_diet_timing, timing(noise, TIMING[noise] | {cell: points} | GRAND))
    found = failed(claims)
    assert len(found) == len(what)
    assert all(part in quantity for part, quantity in zip(what, found, strict=True))


GRAND = {("grand_hard", 5.0): 0.0}


def test_scores_of_the_stream_begin_later_and_others_may_be_missing():
    above = {("el2n_hard", 5.0): 2.0, ("aum_hard", 1.0): 1.0, ("aum_hard", 5.0): 1.0}
    run = made_up.with_study(timing(above=above), methods=["el2n", "aum"])
    assert list(claims_of(data_diet_timing, run)) == ["EL2N after 5 epochs - random at 30 % kept"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: made_up.without_rows(r, method="random"), "no rows for method 'random', sco"),
        (lambda r: made_up.without_rows(r, method="full"), "no rows for method 'full', scored_at"),
        (lambda r: made_up.without_rows(r, method="grand_hard"), "no rows for 'grand_hard' after"),
        (lambda r: made_up.with_study(r, methods=["vog"]), "no name for method 'vog_hard'"),
        (lambda r: made_up.with_study(r, methods=None), "no 'study.methods' in its config"),
        (lambda r: made_up.with_study(r, kept="30 %"), "'study.kept' must be a number, got '30 %'"),
    ],
)
def test_what_a_run_lacks_is_named(broken, message):
    with pytest.raises(ValueError, match=f"data_diet run \\w+.*{message}"):
        data_diet_timing.measure([broken(timing())])
