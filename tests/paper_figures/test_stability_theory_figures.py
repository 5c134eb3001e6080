"""The figures of the theory of stability, from runs whose every effect is known."""

import csv
import itertools
import json
import math

import made_up
import numpy as np
import polars as pl
import pytest
from made_up import claims_of, failed

from paper_figures import matrix_sensing, perceptron_limit, robust_sensing, sgd_stability

REPLICAS = 3


def run_of(kind, rows, study, **frames):
    config = {"kind": "Config", "study": {"kind": kind, **study}, "seed": 0}
    return made_up.run_of("stability_theory", config, {kind.lower(): rows, **frames})


# (batch, rate) -> trace, top, necessary at the end; everything is 1.5 at step 0
DIAGONAL = {
    (1, 0.01): (0.8, 0.1, 0.8), (1, 0.02): (0.7, 0.1, 0.7),
    (4, 0.01): (0.9, 0.1, 0.3), (4, 0.02): (1.7, 0.2, 0.5),
    (20, 0.01): (0.9, 0.1, 0.1), (20, 0.02): (1.8, 0.2, 0.2), (20, 0.1): (8.0, 0.9, 0.9),
}  # fmt: skip


def diagonal(changed=None, mistake=1e-9, critical=None):
    """A run of ``Diagonal``."""
    rows = []
    for (batch, rate), last in (DIAGONAL | (changed or {})).items():
        for step, r in itertools.product((0, 1, 100), range(REPLICAS)):
            values = last if step == 100 else (1.5, 1.5, 1.5)
            named = dict(zip(("trace", "top", "necessary"), values, strict=True))
            rows.append({"batch": batch, "learning_rate": rate, "step": step, "replica": r,
                         "mistake": mistake, **named})  # fmt: skip
    traces = {"equal": (1.0, 3.0), "normal": (0.8, 2.0), "heavy": (0.1, 0.3)} | (critical or {})
    exact = [
        {"kind": kind, "batch": batch, "replacement": again, "replica": r, "trace": trace,
         "necessary": 1.0 if kind == "equal" else 0.9}
        for kind, found in traces.items()
        for batch, trace in zip((1, 4), found, strict=True)
        for again in (True, False)
        for r in range(REPLICAS)
    ]  # fmt: skip
    study = {"batches": [1, 4], "examples": 20, "dim": 50, "learning_rates": [0.01, 0.02],
             "large_rates": [0.1]}  # fmt: skip
    return run_of("Diagonal", rows, study, critical=exact)


GAMMAS = (0.1, 1.0, 10.0, 100.0, 1e8)
WORST = {"descent": (math.inf, math.inf, math.inf, 308.0, 301.0), "normalised": (157, 16, 2, 2, 2)}


def perceptron(worst=None, distance=1e-15, moderate=0.1, digits=62.0, peak=1e4, first=12.5):
    """A run of ``Perceptron``."""
    rows = []
    for problem, (method, steps) in itertools.product(
        ("worst", "digits"), (WORST | (worst or {})).items()
    ):
        for g, gamma in enumerate(GAMMAS):
            for r in range(REPLICAS if problem == "digits" else 1):
                far = distance if gamma == 1e8 else moderate
                largest = peak if gamma == 1e8 else 0.04
                right = float(steps[g]) if problem == "worst" else digits
                row = {"problem": problem, "method": method, "gamma": gamma, "replica": r}
                rows.append(row | {"iterations": right, "perceptron": 62.0, "distance": far,
                                   "mistake": largest})  # fmt: skip
    losses = {
        "worst": lambda gamma: [1.0] * 321,
        "pair": lambda gamma: [gamma / 100 * loss for loss in (0.7, first, 0.0, 0.0)],
    }
    path = [
        {"problem": problem, "method": "descent", "gamma": gamma, "replica": 0, "step": step,
         "mistake": loss}
        for problem, made in losses.items()
        for gamma in GAMMAS
        for step, loss in enumerate(made(gamma))
    ]  # fmt: skip
    study = {"gammas": list(GAMMAS), "classes": [3, 8], "examples": 1000}
    return run_of("Perceptron", rows, study, path=path)


BEFORE, ETA = 100.0, 0.1


def sensing(power=-2.0, constant=1.0, exact=1e-30, falls=None, equal=-2.0):
    """A run of ``Sensing`` whose errors are power laws and exponentials."""
    rows, steps = [], np.geomspace(10, 1e4, 13).round()
    of_two = np.array([10.0, 50, 100, 110, 120, 130, 140])
    least = {0.05: 0.1, 0.1: 0.2}
    raised = -2 * math.log(1 - ETA * 0.6**2)
    rate = {(m, s): -2 * math.log(1 - ETA * least[s] ** 2) for m in ("asymmetric",) for s in least}
    rate |= {("modified", s): raised for s in least} | (falls or {})

    def add(method, k, scale, at, errors):
        rows.extend(
            {"method": method, "columns": k, "scale": scale, "step": t, "replica": r, "error": e,
             "least": least.get(scale, 0.0)}
            for t, e in zip(at, errors, strict=True) for r in range(REPLICAS)
        )  # fmt: skip

    for k in (2, 3, 4):
        own = constant * (k - 2) / (4 * ETA**2) * 1e-8 * (steps / 1e4) ** power
        add("symmetric", k, 0.1, steps, own if k > 2 else np.full(13, exact))
    for scale in least:
        for method in ("asymmetric", "modified"):
            late = np.exp(-rate[method, scale] * (of_two - BEFORE))
            add(method, 4, scale, of_two, 1e-6 * late)
        add("balanced", 4, scale, of_two, of_two**equal)
    study = {"columns": [2, 3, 4], "rank": 2, "width": 4, "scales": [0.05, 0.1], "start": 0.1,
             "learning_rate": ETA, "before": BEFORE, "raised": 0.6, "dim": 20}  # fmt: skip
    return run_of("Sensing", rows, study)


ROBUST = {  # (method, columns) -> error by scale
    ("absolute", 2): (1e-6, 1e-6), ("absolute", 20): (1e-6, 1e-3),
    ("square", 2): (1.5, 1.5), ("square", 20): (2.0, 2.0),
}  # fmt: skip


def robust(changed=None, loss=8.0):
    """A run of ``Robust``."""
    rows = [
        {"method": m, "columns": k, "scale": scale, "replica": r, "error": e, "loss": loss,
         "truth": 9.0}
        for (m, k), errors in (ROBUST | (changed or {})).items()
        for scale, e in zip((1e-6, 0.1), errors, strict=True)
        for r in range(REPLICAS)
    ]  # fmt: skip
    study = {"columns": [2, 20], "scales": [1e-6, 0.1], "dim": 20, "rank": 2, "outliers": 0.3,
             "measurements": 1200}  # fmt: skip
    return run_of("Robust", rows, study)


FIGURES = {
    "sgd_stability": (sgd_stability, diagonal),
    "perceptron_limit": (perceptron_limit, perceptron),
    "matrix_sensing": (matrix_sensing, sensing),
    "robust_sensing": (robust_sensing, robust),
}
TABLED = "largest |steps - table 1| of 5 runs"
LIMITS = ("log10 |theta / gamma - perceptron| at gamma 1e+08",
          "the same of normalised descent at gamma 1e+08")  # fmt: skip
RATIO = "rate from scale 0.1 over rate from 0.05"
EFFECTS = {
    "sgd_stability": {
        "largest eta tr H / 2, batches of 1": (0.8, "<= 1", "claim"),
        "largest eta lambda_max / 2, gradient descent": (0.9, "<= 1", "claim"),
        "largest side of the inequality": (0.8, "<= 1", "claim"),
        "log10 of the largest loss": (-9.0, "<= -6", "claim"),
        "equal norms, batches of 1: |eta tr H / 2 - 1|": (0.0, "<= 0.0001", "claim"),
        "largest side of the inequality - 1": (0.0, "<= 1e-06", "claim"),
        "heavy tails, batches of 1: eta tr H / 2": (0.1, "<= 0.7", "control"),
        "equal norms, batches of 4: eta tr H / 2": (3.0, ">= 1.5", "control"),
        "largest eta tr H / 2, batches of 4": (1.7, ">= 1.05", "control"),
        "largest eta tr H / 2, gradient descent": (8.0, ">= 1.05", "control"),
    },
    "perceptron_limit": {
        LIMITS[0]: (-15.0, "<= -10", "claim"),
        LIMITS[1]: (-15.0, "<= -10", "claim"),
        "|steps to separate - perceptron's| at gamma 1e+08": (0.0, "<= 0", "claim"),
        TABLED: (0.0, "<= 0", "claim"),
        "steps of descent / of normalised at gamma 100": (154.0, ">= 10", "claim"),
        "log10 of the largest losses, gamma 1e+08 over 100": (
            *(math.log10(1e4 / 0.04), ">= 1", "claim"),
        ),
        "steps at gamma 1e+08 - at 100": (-7.0, "<= 0", "claim"),
        "two examples: |loss / gamma - 1/8| at gamma 100": (0.0, "<= 1e-06", "claim"),
        "log10 |theta / gamma - perceptron| at gamma 100": (-1.0, ">= -3", "control"),
    },
    "matrix_sensing": {
        "largest |slope + 2|, k = 3, 4": (0.0, "<= 0.07", "claim"),
        "largest |4 (eta T)^2 error / (k - r) - 1|": (0.0, "<= 0.02", "claim"),
        "|rate / -2 log(1 - eta s^2) - 1|, scale 0.05": (0.0, "<= 0.05", "claim"),
        RATIO: (math.log(1 - 0.004) / math.log(1 - 0.001), ">= 3", "claim"),
        f"modified: |{RATIO} - 1|": (0.0, "<= 0.05", "claim"),
        "modified: |rate / -2 log(1 - eta beta^2) - 1|": (0.0, "<= 0.05", "claim"),
        "log10 of the error at step 10,000, k = r": (-30.0, "<= -20", "control"),
        "equal starts of scale 0.1: slope": (-2.0, ">= -2.5", "control"),
    },
    "robust_sensing": {
        "log10 of the error of 20 columns from scale 1e-06": (-6.0, "<= -3", "claim"),
        "20 columns: log10 of the error, scale 0.1 - 1e-06": (3.0, ">= 1", "claim"),
        "2 columns: log10 of the error, scale 0.1 - 1e-06": (0.0, "<= 0.5", "control"),
        "squares: error of 20 columns": (2.0, ">= 0.5", "control"),
        "squares: its mean loss - the truth's": (-1.0, "<= 0", "control"),
    },
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_claims_are_the_effects_put_in(name):
    module, make = FIGURES[name]
    claims, wanted = claims_of(module, make()), EFFECTS[name]
    assert list(claims) == list(wanted)
    for quantity, (effect, gate, kind) in wanted.items():
        claim = claims[quantity]
        assert math.isclose(claim.effect, effect, abs_tol=1e-6), quantity
        assert (claim.gate, claim.kind, claim.holds) == (gate, kind, True), quantity
        assert claim.figure == name
    assert {claim.seeds for claim in claims.values()} <= {REPLICAS, 1}


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        (
            "sgd_stability",
            {"changed": {(1, 0.01): (1.1, 0.1, 0.8)}},
            ["largest eta tr H / 2, batches of 1"],
        ),
        (
            "sgd_stability",
            {"changed": {(20, 0.1): (8.0, 1.1, 0.9)}},
            ["largest eta lambda_max / 2, gradient descent"],
        ),
        (
            "sgd_stability",
            {"changed": {(4, 0.02): (1.7, 0.1, 1.2)}},
            ["largest side of the inequality"],
        ),
        ("sgd_stability", {"mistake": 1e-3}, ["log10 of the largest loss"]),
        (
            "sgd_stability",
            {"critical": {"equal": (0.99, 1.2), "heavy": (0.9, 1.0)}},
            [
                "equal norms, batches of 1: |eta tr H / 2 - 1|",
                "heavy tails, batches of 1: eta tr H / 2",
                "equal norms, batches of 4: eta tr H / 2",
            ],
        ),
        (
            "sgd_stability",
            {"changed": {(4, 0.02): (1.0, 0.1, 0.5), (20, 0.02): (1.0, 0.2, 0.2),
                         (20, 0.1): (1.0, 0.9, 0.9)}},
            [f"largest eta tr H / 2, {of}" for of in ("batches of 4", "gradient descent")],
        ),
        ("perceptron_limit", {"distance": 1e-6}, list(LIMITS)),
        (
            "perceptron_limit",
            {"digits": 63.0},
            ["|steps to separate - perceptron's| at gamma 1e+08"],
        ),
        ("perceptron_limit", {"worst": {"normalised": (157, 16, 3, 2, 2)}}, [TABLED]),
        (
            "perceptron_limit",
            {"worst": {"normalised": (157, 16, 2, 100, 2)}},
            [TABLED, "steps of descent / of normalised at gamma 100"],
        ),
        (
            "perceptron_limit",
            {"worst": {"descent": (math.inf,) * 3 + (308.0, 309.0)}, "peak": 0.04},
            [
                "log10 of the largest losses, gamma 1e+08 over 100",
                "steps at gamma 1e+08 - at 100",
            ],
        ),
        (
            "perceptron_limit",
            {"first": 12.0, "moderate": 1e-6},
            [
                "two examples: |loss / gamma - 1/8| at gamma 100",
                "log10 |theta / gamma - perceptron| at gamma 100",
            ],
        ),
        ("matrix_sensing", {"power": -1.8}, ["largest |slope + 2|, k = 3, 4"]),
        ("matrix_sensing", {"constant": 1.05}, ["largest |4 (eta T)^2 error / (k - r) - 1|"]),
        ("matrix_sensing", {"exact": 1e-9}, ["log10 of the error at step 10,000, k = r"]),
        ("matrix_sensing", {"equal": -4.0}, ["equal starts of scale 0.1: slope"]),
        ("matrix_sensing", {"falls": {("asymmetric", 0.1): 0.004}}, [RATIO]),
        (
            "matrix_sensing",
            {"falls": {("asymmetric", 0.05): 0.0022}},
            ["|rate / -2 log(1 - eta s^2) - 1|, scale 0.05"],
        ),
        (
            "matrix_sensing",
            {"falls": {("modified", 0.05): 0.06}},
            [f"modified: |{RATIO} - 1|", "modified: |rate / -2 log(1 - eta beta^2) - 1|"],
        ),
        (
            "robust_sensing",
            {"changed": {("absolute", 20): (1e-2, 2e-2)}},
            [
                "log10 of the error of 20 columns from scale 1e-06",
                "20 columns: log10 of the error, scale 0.1 - 1e-06",
            ],
        ),
        (
            "robust_sensing",
            {"changed": {("absolute", 2): (1e-6, 1e-5)}},
            ["2 columns: log10 of the error, scale 0.1 - 1e-06"],
        ),
        (
            "robust_sensing",
            {"changed": {("square", 20): (0.1, 0.1)}, "loss": 9.5},
            ["squares: error of 20 columns", "squares: its mean loss - the truth's"],
        ),
    ],
)  # fmt: skip
def test_another_effect_does_not_hold(name, options, what):
    module, make = FIGURES[name]
    assert failed(claims_of(module, make(**options))) == what


def test_a_bound_above_one_does_not_hold():
    above = pl.when(pl.col("kind") == "normal").then(1.01).otherwise("necessary")
    run = made_up.with_rows(
        diagonal(), lambda frame: frame.with_columns(necessary=above), "critical"
    )
    assert failed(claims_of(sgd_stability, run)) == ["largest side of the inequality - 1"]


def test_another_size_has_no_table():
    run = made_up.with_study(perceptron(), examples=500)
    assert TABLED not in claims_of(perceptron_limit, run)


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_drawn_is_written(tmp_path, name):
    module, make = FIGURES[name]
    files, claims = module.draw([make()], tmp_path)
    assert {path.name for path in files.values()} == {f"{name}.{s}" for s in files}
    assert all(path.stat().st_size > 300 for path in files.values())
    with files["csv"].open() as f:
        rows = list(csv.DictReader(f))
    panels = {"sgd_stability": "abcd", "robust_sensing": "a"}.get(name, "abc")
    assert {row["panel"] for row in rows} == set(panels) and all(row["y"] for row in rows)
    about = json.loads(files["json"].read_text())
    assert about["fingerprints"] == ["00c0ffee"]
    assert [one["quantity"] for one in about["claims"]] == [one.quantity for one in claims]
    assert claims == module.measure([make()])


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [
        (
            "sgd_stability",
            lambda r: made_up.without_rows(r, batch=4, learning_rate=0.02),
            "no rows for batch 4, learning_rate 0.02, step 100",
        ),
        (
            "sgd_stability",
            lambda r: made_up.without_rows(r, batch=20, learning_rate=0.1),
            "no rows for batch 20, learning_rate 0.1, step 100",
        ),
        (
            "sgd_stability",
            lambda r: made_up.with_rows(
                r, lambda f: f.filter(pl.col("kind") != "heavy"), "critical"
            ),
            "no rows for kind 'heavy', replacement True, batch 1",
        ),
        ("sgd_stability", lambda r: made_up.with_study(r, batches=[1]), "of batch 1 and of anoth"),
        (
            "perceptron_limit",
            lambda r: made_up.without_rows(r, problem="digits", method="normalised"),
            "no rows for problem 'digits', method 'normalised', gamma 0.1",
        ),
        (
            "perceptron_limit",
            lambda r: made_up.with_rows(r, lambda f: f.filter(pl.col("gamma") > 1), "path"),
            "needs the loss of every step on problem 'worst' for 5 gammas, got \\[0, 0, 321",
        ),
        (
            "perceptron_limit",
            lambda r: made_up.with_rows(r, lambda f: f.with_columns(distance=pl.lit(math.nan))),
            "distance must be >= 0, got nan",
        ),
        (
            "matrix_sensing",
            lambda r: made_up.without_rows(r, method="symmetric", columns=3),
            "no rows for method 'symmetric', columns 3, scale 0.1",
        ),
        (
            "matrix_sensing",
            lambda r: made_up.with_study(r, before=135.0),
            "needs two steps of 'asymmetric' after 135",
        ),
        (
            "robust_sensing",
            lambda r: made_up.without_rows(r, method="square", columns=2),
            "no rows for method 'square', columns 2, scale 1e-06",
        ),
        (
            "robust_sensing",
            lambda r: made_up.with_rows(r, lambda f: f.drop("loss")),
            "no column 'loss'",
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
