"""The figures of the theory of early learning, from runs whose every effect is known."""

import csv
import json
import math

import made_up
import numpy as np
import pytest
from made_up import claims_of, failed

from paper_figures import early_learning_basin, early_learning_theory, self_distillation

REPLICAS = 3
STEPS = (0, 1, 10, 100, 1000)
# (dim, lambda) -> metric -> at each of the steps, the same for every replica
CE = {
    "cosine": (0.9, 0.8, 0.5, 0.1, 0.05),
    "corrected": (0.5, 0.7, 1.0, 0.5, 0.0),
    "memorised": (0.5, 0.3, 0.0, 0.5, 1.0),
    "test": (0.5, 0.7, 1.0, 0.9, 0.8),
    "along": (0.0, 0.05, 0.2, 1.0, 2.0),
    "kappa_clean": (1.0, 0.9, 0.8, 0.2, 0.0),
    "kappa_wrong": (1.0, 1.1, 1.2, 0.5, 0.0),
}
ELR = CE | {
    "corrected": (0.5, 1, 1, 1, 1),
    "memorised": (0.5, 0, 0, 0, 0),
    "test": (0.5,) + (1,) * 4,
}
FEW = CE | {"memorised": (0.5, 0.3, 0.0, 0.2, 0.4)}
PHASES = {(380, 0.0): CE, (380, 1.0): CE, (380, 3.0): ELR, (100, 0.0): FEW}
AT_PEAK = "wrong-labelled given the true label, at the peak"


def run_of(kind, rows, arrays, study):
    config = {"kind": "Config", "study": {"kind": kind, **study}, "seed": 0}
    return made_up.run_of("early_learning_theory", config, {kind.lower(): rows}, arrays)


def phases(changed=None):
    """A run of ``Phases``; ``changed`` is (dim, lambda) -> metric -> values."""
    rows = []
    for key, metrics in PHASES.items():
        values = metrics | (changed or {}).get(key, {})
        rows += [
            {"dim": key[0], "elr_lambda": key[1], "step": step, "replica": replica}
            | {name: float(found[i]) for name, found in values.items()}
            for i, step in enumerate(STEPS)
            for replica in range(REPLICAS)
        ]
    study = {"lambdas": [0.0, 1.0, 3.0], "dim": 380, "control": 100, "examples": 400, "flip": 0.4,
             "sigma": 0.2}  # fmt: skip
    return run_of("Phases", rows, {}, study)


def basin(measured=None, true=None):
    """A run of ``Basin``: every threshold as the formula says, spread ones 0.1 lower."""
    lambdas, starts, steps = np.array([1.0, 2.1, 3.0]), np.array([0.25, 0.75, 0.99]), np.arange(4)
    rows = []
    for case in ("two classes", "many classes", "spread"):
        for e in lambdas:
            predicted = e / (2 * (e - 1)) if e > 2 else 1.0
            found = predicted - 0.1 * (case == "spread")
            found = (measured or {}).get((case, e), found)
            rows.append({"case": case, "elr_lambda": e, "measured": found, "predicted": predicted})
    ends = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1]]) if true is None else true
    path = np.linspace(np.broadcast_to(starts, (3, 3)), ends, len(steps), axis=-1)
    true = made_up.array_of(
        np.moveaxis(path, -1, 0)[None], ("case", "step", "elr_lambda", "start"),
        case=["two classes"], step=steps, elr_lambda=lambdas, start=starts,
    )  # fmt: skip
    study = {"classes": 10, "learning_rate": 0.02, "beta": 0.7}
    return run_of("Basin", rows, {"true": true}, study)


LOSS = {0.0: (0.3, 0.2, 0.4), 0.35: (0.3, 0.25, 0.2), 1.0: (0.3, 0.3, 0.3)}
LIMIT = {0.0: 0.5, 0.35: 0.2, 1.0: 0.3}


def distillation(loss=None, best=(0.3, 0.2, 0.15), training=2.5):
    """A run of ``Distillation`` of three students."""
    rows = []
    for replica in range(REPLICAS):
        for alpha, values in (LOSS | (loss or {})).items():
            cells = [("fixed", alpha, t + 1, value, None) for t, value in enumerate(values)]
            cells.append(("limit", alpha, None, LIMIT[alpha], None))
            rows += [(*cell, replica) for cell in cells]
        for t, value in enumerate(best):
            weight = (None, 0.2, 0.3)[t]
            rows.append(("best", weight, t + 1, value, training if t else None, replica))
    names = ("method", "alpha", "step", "loss", "training", "replica")
    d = np.array([2.0, 1.0, 0.5])
    a = d / (d + 0.2)
    left = np.stack([a ** np.arange(1, 4)[:, None]] + [np.stack([a] * 3)] * 2)
    study = {"alphas": [0.0, 0.35, 1.0], "examples": 3, "noise": 0.5, "ridge": 0.2, "gamma": 80.0,
             "steps": 3}  # fmt: skip
    rows = [dict(zip(names, row, strict=True)) for row in rows]
    return run_of("Distillation", rows, {"shrinkage": left, "eigenvalues": d}, study)


FIGURES = {
    "early_learning_theory": (early_learning_theory, phases),
    "early_learning_basin": (early_learning_basin, basin),
    "self_distillation": (self_distillation, distillation),
}


def expected(claims, wanted):
    """Effects, gates and kinds, in this order."""
    assert list(claims) == list(wanted)
    for quantity, (effect, gate, kind) in wanted.items():
        claim = claims[quantity]
        assert math.isclose(claim.effect, effect, abs_tol=1e-6), quantity
        assert (claim.gate, claim.kind, claim.holds) == (gate, kind, True), quantity


def test_the_claims_of_the_phases_are_the_effects_put_in():
    claims = claims_of(early_learning_theory, phases())
    expected(
        claims,
        {
            "least cosine with v before T": (0.8, ">= 0.166667", "claim"),
            AT_PEAK: (1.0, ">= 0.95", "claim"),
            "wrong labels memorised in the end": (1.0, ">= 0.98", "claim"),
            "best - last test accuracy": (20.0, ">= +8", "claim"),
            "kappa^2 at T - at the start, clean": (-0.2, "<= -0.05", "claim"),
            "kappa^2 at T - at the start, wrong-labelled": (0.2, ">= 0.05", "claim"),
            "memorised in the end with ELR of lambda 3": (0.0, "<= 0.02", "claim"),
            "ELR of lambda 3 - cross-entropy, last test accuracy": (20.0, ">= +8", "claim"),
            "memorised in the end with ELR of lambda 1": (1.0, ">= 0.9", "control"),
            "memorised in the end in 100 dimensions": (0.4, "<= 0.7", "control"),
        },
    )
    assert {claim.seeds for claim in claims.values()} == {REPLICAS}
    assert {claim.scale for claim in claims.values()} == {
        "two Gaussians of sigma 0.2, 400 examples in 380 dimensions, about 20 % wrong labels"
    }


def test_the_claims_of_the_basin_are_the_effects_put_in():
    expected(
        claims_of(early_learning_basin, basin()),
        {
            "two classes: largest |measured - formula|": (0.0, "<= 0.005", "claim"),
            "10 classes: largest |measured - formula| from lambda 2.1": (0.0, "<= 0.005", "claim"),
            "from 0.99 to, at lambda 2.1": (1.0, ">= 0.9", "claim"),
            "from 0.99 to, at lambda 1": (0.0, "<= 0.1", "control"),
            "rest spread over all classes: largest |measured - formula|": (
                *(0.1, ">= 0.05", "control"),
            ),
        },
    )


def test_the_claims_of_distillation_are_the_effects_put_in():
    d = np.array([2.0, 1.0, 0.5]) / (np.array([2.0, 1.0, 0.5]) + 0.2)
    expected(
        claims_of(self_distillation, distillation()),
        {
            "alpha 0: loss of student 1 - student 2": (0.1, ">= 0.02", "claim"),
            "alpha 0: loss of student 3 - student 2": (0.2, ">= 0.05", "claim"),
            "alpha 0: least growth of the ratio of neighbours in a step": (
                *((d[:-1] / d[1:]).min(), ">= 1", "claim"),
            ),
            "alpha 0.35: |loss of student 3 - of ridge / alpha|": (0.0, "<= 0.002", "claim"),
            "student 3: loss of the best alpha of the grid, 0.35 - held-out weight": (
                *(0.05, ">= 0", "claim"),
            ),
            "alpha 1: largest change of the loss": (0.0, "<= 0.0001", "control"),
            "weight from the training examples": (2.5, ">= 1", "control"),
        },
    )


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({(380, 0.0): {"cosine": (0.9, 0.1, 0, 0, 0)}}, ["least cosine with v before T"]),
        ({(380, 0.0): {"corrected": (0.5, 0.6, 0.9, 0.5, 0)}}, [AT_PEAK]),
        ({(380, 0.0): {"memorised": (0, 0, 0, 0, 0.9)}}, ["wrong labels memorised in the end"]),
        (
            {(380, 0.0): {"test": (0.5, 1, 1, 1, 0.95)}},
            [
                "best - last test accuracy",
                "ELR of lambda 3 - cross-entropy, last test accuracy",
            ],
        ),
        (
            {(380, 0.0): {"kappa_clean": (1, 1, 1, 0, 0), "kappa_wrong": (1, 1, 1, 0, 0)}},
            [f"kappa^2 at T - at the start, {of}" for of in ("clean", "wrong-labelled")],
        ),
        (
            {(380, 3.0): {"memorised": (0, 0, 0, 0, 0.1)}},
            ["memorised in the end with ELR of lambda 3"],
        ),
        (
            {(380, 1.0): {"memorised": (0, 0, 0, 0, 0.1)}},
            ["memorised in the end with ELR of lambda 1"],
        ),
        ({(100, 0.0): {"memorised": (0, 0, 0, 0, 1)}}, ["memorised in the end in 100 dimensions"]),
    ],
)
def test_other_phases_do_not_hold(changed, what):
    assert failed(claims_of(early_learning_theory, phases(changed))) == what


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"measured": {("two classes", 3.0): 0.76}},
            ["two classes: largest |measured - formula|"],
        ),
        (
            {"measured": {("many classes", 3.0): 0.76}},
            ["10 classes: largest |measured - formula| from lambda 2.1"],
        ),
        (
            {"measured": {("spread", 3.0): 0.75, ("spread", 2.1): 0.95}},
            ["rest spread over all classes: largest |measured - formula|"],
        ),
        (
            {"true": np.array([[0, 0, 1], [0, 0, 0], [0, 1, 1]])},
            ["from 0.99 to, at lambda 2.1", "from 0.99 to, at lambda 1"],
        ),
    ],
)
def test_another_basin_does_not_hold(options, what):
    assert failed(claims_of(early_learning_basin, basin(**options))) == what


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"loss": {0.0: (0.3, 0.29, 0.4)}}, ["alpha 0: loss of student 1 - student 2"]),
        ({"loss": {0.0: (0.3, 0.2, 0.21)}}, ["alpha 0: loss of student 3 - student 2"]),
        (
            {"loss": {0.35: (0.3, 0.25, 0.21)}},
            ["alpha 0.35: |loss of student 3 - of ridge / alpha|"],
        ),
        (
            {"best": (0.3, 0.3, 0.25)},
            ["student 3: loss of the best alpha of the grid, 0.35 - held-out weight"],
        ),
        ({"loss": {1.0: (0.3, 0.31, 0.3)}}, ["alpha 1: largest change of the loss"]),
        ({"training": 0.5}, ["weight from the training examples"]),
    ],
)
def test_another_distillation_does_not_hold(options, what):
    assert failed(claims_of(self_distillation, distillation(**options))) == what


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_drawn_is_written(tmp_path, name):
    module, make = FIGURES[name]
    files, claims = module.draw([make()], tmp_path)
    assert {path.name for path in files.values()} == {f"{name}.{s}" for s in files}
    assert all(path.stat().st_size > 300 for path in files.values())
    with files["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert {row["panel"] for row in rows} >= {"a", "b", "c"} and all(row["y"] for row in rows)
    about = json.loads(files["json"].read_text())
    assert about["fingerprints"] == ["00c0ffee"]
    assert [one["quantity"] for one in about["claims"]] == [one.quantity for one in claims]
    assert claims == module.measure([make()])


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (
            "early_learning_theory",
            lambda r: made_up.without_rows(r, dim=380, elr_lambda=3.0),
            "no rows for dim 380, elr_lambda 3, step 0",
        ),
        (
            "early_learning_theory",
            lambda r: made_up.without_rows(r, dim=100, elr_lambda=0.0),
            "no rows for dim 100",
        ),
        (
            "early_learning_theory",
            lambda r: made_up.with_rows(r, lambda frame: frame.drop("cosine")),
            "no column 'cosine'",
        ),
        (
            "early_learning_basin",
            lambda r: made_up.without_rows(r, case="spread"),
            r"needs rows of case 'spread' for lambdas up to 2 and above, got \[\]",
        ),
        (
            "early_learning_basin",
            lambda r: made_up.with_array(r, "true", r.arrays["true"].renamed(step="time")),
            r"'true' must have the dims case and .*, got \('case', 'time', ",
        ),
        (
            "self_distillation",
            lambda r: made_up.without_rows(r, method="limit", alpha=0.35),
            "no rows for method 'limit', alpha 0.35, step None",
        ),
        (
            "self_distillation",
            lambda r: made_up.without_rows(r, method="best", step=3),
            r"needs rows of method 'best' for steps \[1, 2, 3\]",
        ),
        (
            "self_distillation",
            lambda r: made_up.without_array(r, "shrinkage"),
            "no array 'shrinkage'",
        ),
    ],
)
def test_what_a_run_lacks_is_named(name, broken, message):
    module, make = FIGURES[name]
    with pytest.raises(ValueError, match=f"00c0ffee.*{message}"):
        module.measure([broken(make())])


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_of_one_run(name):
    module, make = FIGURES[name]
    with pytest.raises(ValueError, match="this figure is of one run"):
        module.measure([make(), make()])
