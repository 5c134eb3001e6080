"""Figures of early learning, from runs whose every effect is known."""

import csv
import itertools
import math

import made_up
import numpy as np
import pytest
from made_up import claims_of, failed, run_of, with_rows

from paper_figures import (
    draw,
    early_learning_grid,
    early_learning_memorisation,
    early_learning_rates,
)

REPLICAS = 4
CONFIG = made_up.CONFIG | {
    "noise": "symmetric",
    "rate": 0.4,
    "strength": 7.0,
    "beta": 0.7,
    "epochs": 40.0,
}
CURVES = {  # method -> epoch -> what is measured
    "ce": {
        0.0: {"test_accuracy": 0.1},
        3.0: {"test_accuracy": 0.9, "wrong_correct": 0.9, "wrong_memorised": 0.04, "recall": 0.95},
        40.0: {"test_accuracy": 0.7, "wrong_memorised": 0.95, "wrong_correct": 0.03, "recall": 0.05,
               "loss_auc": 0.75},
    },
    "elr": {
        0.0: {"test_accuracy": 0.1},
        3.0: {"test_accuracy": 0.9, "wrong_correct": 0.9, "wrong_memorised": 0.04},
        40.0: {"test_accuracy": 0.95, "wrong_memorised": 0.02, "wrong_correct": 0.96},
    },
}  # fmt: skip
USUAL = {
    "wrong_correct": 0.1,
    "wrong_memorised": 0.1,
    "wrong_other": 0.0,
    "loss_auc": 0.98,
    "fit_wrong": 1.2,
    "fit_clean": 0.2,
    "precision": 0.96,
    "recall": 0.97,
}


def made(name, rows, **study):
    """A run of rows that each replica has."""
    rows = [{**row, "replica": s} for row in rows for s in range(REPLICAS)]
    config = CONFIG | {"study": {"kind": name.capitalize(), **study}}
    arrays = {"index": np.arange(60, dtype=np.int32)}
    return run_of("early_learning", config, {name: rows}, arrays)


def curves(**changed):
    """A run of Curves; ``ce_wrong_memorised=0.5`` changes the last epoch of a method."""
    rows = []
    for method, epochs in CURVES.items():
        for epoch, values in epochs.items():
            late = {k: v for k, v in changed.items() if k.startswith(f"{method}_") and epoch == 40}
            mine = {k.removeprefix(f"{method}_"): v for k, v in late.items()}
            rows.append({"method": method, "epoch": epoch, **USUAL, **values, **mine})
    return made("curves", rows)


def rates(**at_40):
    """A run of Rates: 98 % on clean labels, at 40 % what is given."""
    found = {"ce": 0.7, "gce": 0.9, "sce": 0.85, "elr": 0.95, "elr_plus": 0.96} | at_40
    rows = []
    for (method, accuracy), rate in itertools.product(found.items(), (0.0, 0.4)):
        part = None if not rate else 0.5
        value = accuracy if rate else 0.98
        rows.append(
            {"method": method, "rate": rate, "test_accuracy": value, "wrong_memorised": part}
        )
    return made("rates", rows)


def grid(**changed):
    """A run of Grid: lambda 1 and beta 0.99 memorise, beta 0 collapses."""
    memorised = {(1.0, b): 0.8 for b in (0.0, 0.7, 0.99)} | {(7.0, 0.99): 0.85}
    rows = [
        {
            "method": "ce",
            "strength": 0.0,
            "beta": 0.0,
            "test_accuracy": 0.7,
            "wrong_memorised": 0.97,
        }
    ]
    for s, b in itertools.product((1.0, 7.0), (0.0, 0.7, 0.99)):
        accuracy = changed.get("collapsed", 0.1) if (s, b) == (7.0, 0.0) else 0.9
        part = memorised.get((s, b), changed.get("held", 0.02))
        rows.append({"method": "elr", "strength": s, "beta": b, "test_accuracy": accuracy,
                     "wrong_memorised": part})  # fmt: skip
    return made("grid", rows)


FIGURES = [
    (early_learning_memorisation, curves),
    (early_learning_rates, rates),
    (early_learning_grid, grid),
]


@pytest.fixture(params=FIGURES, ids=lambda figure: figure[0].STUDY)
def figure(request, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 50)
    return request.param


def test_rows_in_any_order_give_the_same_bytes(figure, tmp_path):
    module, make = figure
    run = make()
    mixed = with_rows(run, lambda frame: frame.sample(fraction=1.0, shuffle=True, seed=1))
    one, claims = module.draw([run], tmp_path / "one")
    other, _ = module.draw([mixed], tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()
    assert claims == module.measure([run])
    assert all(claim.holds for claim in claims)
    assert {claim.kind for claim in claims} == {"claim", "control"}
    with one["csv"].open() as f:
        assert all(row["y"] and row["series"] for row in csv.DictReader(f))


def effects(module, run):
    return {q: round(c.effect, 6) for q, c in claims_of(module, run).items()}


def test_the_claims_of_memorisation_are_the_effects_put_in():
    assert effects(early_learning_memorisation, curves()) == {
        "truly predicted, peak - end, CE": 87,
        "memorised at the end, CE": 95,
        "memorised at the end, ELR": 2,
        "test accuracy, ELR - CE": 25,
        "test accuracy, ELR - CE's best epoch": 5,
        "wrong labels found, ELR": 97,
        "right of those found, ELR": 96,
        "AUC of the loss, epoch 3 - epoch 40, CE": 23,
        "wrong labels found, CE": 5,
    }


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"ce_wrong_correct": 0.5}, ["truly predicted, peak - end, CE"]),
        ({"ce_wrong_memorised": 0.8}, ["memorised at the end, CE"]),
        ({"elr_wrong_memorised": 0.2}, ["memorised at the end, ELR"]),
        ({"elr_recall": 0.9}, ["wrong labels found, ELR"]),
        ({"ce_recall": 0.2}, ["wrong labels found, CE"]),
        ({"ce_loss_auc": 0.95}, ["AUC of the loss, epoch 3 - epoch 40, CE"]),
        (
            {"elr_test_accuracy": 0.8},
            ["test accuracy, ELR - CE", "test accuracy, ELR - CE's best epoch"],
        ),
    ],
)
def test_another_effect_does_not_hold(changed, what):
    assert failed(claims_of(early_learning_memorisation, curves(**changed))) == what


def test_the_claims_of_rates():
    assert effects(early_learning_rates, rates()) == {
        "ELR - CE at 40 %": 25,
        "ELR - GCE at 40 %": 5,
        "ELR - SCE at 40 %": 10,
        "ELR+ - ELR at 40 %": 1,
        "ELR - CE on clean labels": 0,
    }
    found = claims_of(early_learning_rates, rates(elr=0.8))
    assert failed(found) == ["ELR - CE at 40 %", "ELR - GCE at 40 %", "ELR - SCE at 40 %"]


def test_the_claims_of_the_grid():
    assert effects(early_learning_grid, grid()) == {
        "memorised at lambda 7, beta 0.7": 2,
        "memorised at lambda 1, beta 0.7": 80,
        "memorised at lambda 7, beta 0.99": 85,
        "test accuracy at lambda 7, beta 0": 10,
    }
    assert failed(claims_of(early_learning_grid, grid(held=0.2))) == [
        "memorised at lambda 7, beta 0.7"
    ]
    assert failed(claims_of(early_learning_grid, grid(collapsed=0.9)))


@pytest.mark.parametrize(
    ("module", "run", "message"),
    [
        (early_learning_memorisation, made_up.without_rows(curves(), method="elr"), "'elr'"),
        (early_learning_memorisation, curves(ce_test_accuracy=math.nan), "the run diverged"),
        (early_learning_rates, made_up.without_rows(rates(), rate=0.4), "needs a rate above 0"),
        (
            early_learning_grid,
            made_up.without_rows(grid(), method="elr"),
            "no rows of method 'elr'",
        ),
        (
            early_learning_grid,
            made_up.without_rows(grid(), strength=7.0, beta=0.7),
            "strength 7, beta 0.7",
        ),
    ],
)
def test_what_a_run_lacks_is_named(module, run, message):
    with pytest.raises(ValueError, match=message):
        module.measure([run])
