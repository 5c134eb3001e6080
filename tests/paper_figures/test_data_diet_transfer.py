"""The claims of transfer, from runs whose every effect is known."""

import made_up
import numpy as np
import polars as pl
import pytest
from made_up import TRANSFER, claims_of, expected, failed, transfer

from paper_figures import data_diet_transfer

OTHER = "scores of the other {} at 30 % kept, the {} of 2 ways"
RANKS = "Spearman(EL2N, EL2N of the other {})"


def test_the_claims_are_the_effects_put_in():
    expected(
        claims_of(data_diet_transfer, transfer()),
        {
            OTHER.format("architecture - own", "lower"): (-0.5, ">= -1", "claim"),
            OTHER.format("learning rate - own", "lower"): (-0.5, ">= -1", "claim"),
            RANKS.format("architecture"): (1.0, ">= 0.9", "claim"),
            RANKS.format("learning rate"): (1.0, ">= 0.9", "claim"),
            "random - own scores at 30 % kept": (-2.5, "<= -0.5", "control"),
        },
    )


def test_with_wrong_labels_every_choice_fails():
    expected(
        claims_of(data_diet_transfer, transfer(0.2)),
        {
            OTHER.format("architecture - random", "higher"): (-59.0, "<= -30", "claim"),
            OTHER.format("learning rate - random", "higher"): (-57.0, "<= -30", "claim"),
            RANKS.format("architecture"): (1.0, ">= 0.9", "claim"),
            RANKS.format("learning rate"): (1.0, ">= 0.9", "claim"),
            "random - own scores at 30 % kept": (62.0, ">= +30", "control"),
        },
        scale=made_up.NOISY_SCALE,
    )


@pytest.mark.parametrize(
    ("noise", "cell", "points", "what"),
    [
        (0.0, ("model", "own"), 1.5, OTHER.format("architecture - own", "lower")),
        (0.0, ("own", "rate"), 1.4, OTHER.format("learning rate - own", "lower")),
        (0.0, ("own", "own"), 0.4, "random - own scores at 30 % kept"),
        (0.2, ("model", "own"), -20.0, OTHER.format("architecture - random", "higher")),
        (0.2, ("own", "rate"), -20.0, OTHER.format("learning rate - random", "higher")),
        (0.2, ("own", "own"), -20.0, "random - own scores at 30 % kept"),
    ],
)
def test_another_effect_does_not_hold(noise, cell, points, what):
    run = transfer(noise, TRANSFER[noise] | {cell: points})
    assert failed(claims_of(data_diet_transfer, run)) == [what]


def test_other_orders_do_not_hold():
    run = transfer()
    run = made_up.with_array(run, "el2n_rate", run.arrays["el2n_rate"].values[:, ::-1])
    claims = claims_of(data_diet_transfer, run)
    assert failed(claims) == [RANKS.format("learning rate")]
    assert claims[RANKS.format("learning rate")].effect == pytest.approx(-1)


def test_the_diagonal_is_between_halves_of_the_replicas():
    run = transfer()
    score = run.arrays["el2n_own"].values[:1]
    turned = np.concatenate([score, score, -score, -score])
    study = data_diet_transfer._study(made_up.with_array(run, "el2n_own", turned))
    assert study.ranks("own", "own").mean == pytest.approx(-1)
    assert study.ranks("model", "model").mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            lambda r: made_up.without_rows(r, target="rate", source="model"),
            "no rows for target 'rate', source 'model'",
        ),
        (lambda r: made_up.without_array(r, "el2n_rate"), "no array 'el2n_rate'"),
        (
            lambda r: made_up.with_array(r, "el2n_model", np.ones((2, 60))),
            r"same replicas of the same examples, got .*'el2n_model': \(2, 60\)",
        ),
        (
            lambda r: made_up.with_rows(
                r, lambda f: f.with_columns(diverged=pl.Series([None, 7, None, None])), "scored"
            ),
            "scoring replica 1 diverged",
        ),
        (lambda r: made_up.with_study(r, learning_rate=None), "no 'study.learning_rate' in its"),
    ],
)
def test_what_a_run_lacks_is_named(broken, message):
    with pytest.raises(ValueError, match=f"data_diet run \\w+.*{message}"):
        data_diet_transfer.measure([broken(transfer())])
