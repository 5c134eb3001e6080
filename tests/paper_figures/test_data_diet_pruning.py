"""The figure of a run whose numbers are made up, so that every claim's effect is known."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from dynamics import record
from paper_figures import data_diet_pruning, draw

REPLICAS, EXAMPLES = 4, 60
FRACTIONS = (0.2, 0.3, 0.5)
# Points of accuracy above a random subset, at every fraction and for every replica.
ABOVE = {"random": 0.0, "el2n_hard": 2.0, "grand_hard": 1.5, "el2n_easy": -9.0,
         "grand_init_hard": -1.75}  # fmt: skip
CONFIG = {
    "kind": "Config",
    "data": {"kind": "Data", "source": "digits"},
    "model": {"kind": "MLP", "width": 128, "depth": 2},
    "score": {"kind": "Score", "epochs": 10, "replicas": 3},
    "prune": {"kind": "Prune", "fractions": list(FRACTIONS), "replicas": REPLICAS, "epochs": 20},
    "noise": 0.0,
    "seed": 0,
}


def made_up(above=ABOVE, fractions=FRACTIONS, replicas=REPLICAS, **config):
    """A run: accuracy 90 % + one point per replica + 10 x fraction + ``above``, all exact."""
    rows = [("prune", 1.0, "full", s, 0.97) for s in range(replicas)]
    for fraction in fractions:
        for method, points in above.items():
            rows += [
                ("prune", fraction, method, s, (80 + s + 10 * fraction + points) / 100)
                for s in reversed(range(replicas))
            ]
    rows.append(("score", math.nan, "", 0, math.nan))
    rng = np.random.default_rng(0)
    scores = rng.lognormal(size=(3, EXAMPLES)).astype(np.float32)
    norm = rng.normal(8, 1, size=EXAMPLES).astype(np.float32)
    arrays = {
        "el2n": scores,
        "grand": 5 * scores,  # the same order: Spearman is 1
        "grand_init": np.stack([norm, norm, norm]) * 1.5,
        "input_norm": norm,
        "index": np.arange(EXAMPLES, dtype=np.int32),
    }
    names = ["stage", "fraction", "method", "replica", "test_accuracy"]
    table = pl.DataFrame(rows, schema=names, orient="row")
    return record.Run(Path("made-up"), "00c0ffee00c0ffee", CONFIG | config, {}, table, arrays, True)


def claims_of(run):
    return {claim.quantity: claim for claim in data_diet_pruning.measure(run)}


def test_the_claims_are_the_effects_put_in():
    claims = claims_of(made_up())
    expected = {
        "hard - random at 30 % kept": (2.0, True, "claim", ">= +0.5"),
        "easy - random at 30 % kept": (-9.0, True, "claim", "<= -5"),
        "Spearman(EL2N, GraNd) after 10 epochs": (1.0, True, "claim", ">= 0.97"),
        "Spearman(GraNd at init, input norm)": (1.0, True, "control", ">= 0.75"),
        "GraNd at init - random at 30 % kept": (-1.75, True, "control", "<= 0"),
    }
    assert list(claims) == list(expected)
    for quantity, (effect, holds, kind, gate) in expected.items():
        claim = claims[quantity]
        assert claim.effect == pytest.approx(effect, abs=1e-9)
        assert claim.interval == pytest.approx((effect, effect), abs=1e-9)  # no spread within pairs
        assert (claim.holds, claim.kind, claim.gate) == (holds, kind, gate)
        assert claim.scale == "digits, 60 examples, clean labels, MLP 2 x 128"
        assert claim.seeds == (3 if "Spearman" in quantity else REPLICAS)
        assert claim.figure == "data_diet_pruning"
    assert "2107.07075" in claims["hard - random at 30 % kept"].paper
    assert "2303.14753" in claims["GraNd at init - random at 30 % kept"].paper


@pytest.mark.parametrize(
    ("method", "quantity"),
    [
        ("el2n_hard", "hard - random at 30 % kept"),
        ("el2n_easy", "easy - random at 30 % kept"),
        ("grand_init_hard", "GraNd at init - random at 30 % kept"),
    ],
)
def test_a_flipped_sign_does_not_hold_and_is_reported(method, quantity):
    flipped = ABOVE | {method: -ABOVE[method]}
    claims = claims_of(made_up(flipped))
    assert claims[quantity].effect == pytest.approx(-ABOVE[method], abs=1e-9)
    assert [q for q, claim in claims.items() if not claim.holds] == [quantity]
    text = draw.report(list(claims.values()))
    assert f"does not hold  {quantity} = {-ABOVE[method]:+.2f} points" in text


def test_an_effect_below_the_gate_does_not_hold():
    claims = claims_of(made_up(ABOVE | {"el2n_hard": 0.4, "el2n_easy": -4.9}))
    assert not claims["hard - random at 30 % kept"].holds
    assert not claims["easy - random at 30 % kept"].holds


@pytest.mark.parametrize("name", ["grand", "grand_init"])
def test_shuffled_scores_do_not_hold(name):
    run = made_up()
    run.arrays[name] = run.arrays[name][:, np.random.default_rng(1).permutation(EXAMPLES)]
    claims = claims_of(run)
    failed = [q for q, claim in claims.items() if not claim.holds]
    about = "GraNd at init, input norm" if name == "grand_init" else "EL2N, GraNd"
    assert failed == [next(q for q in claims if about in q)]
    low, high = claims[failed[0]].interval
    assert -1 <= low <= claims[failed[0]].effect <= high <= 1


def test_label_noise_turns_the_claim_round():
    claims = claims_of(made_up(ABOVE | {"el2n_hard": -60.0}, noise=0.2))
    hard = claims["hard - random at 30 % kept"]
    assert (hard.holds, hard.gate) == (True, "<= -30")
    assert hard.scale == "digits, 60 examples, 20 % wrong labels, MLP 2 x 128"
    assert not any("easy" in quantity for quantity in claims)
    assert claims["Spearman(EL2N, GraNd) after 10 epochs"].gate == ">= 0.95"
    assert not claims_of(made_up(noise=0.2))["hard - random at 30 % kept"].holds


def test_the_nearest_fraction_is_named():
    claims = claims_of(made_up(fractions=(0.1, 0.25, 0.5)))
    assert "hard - random at 25 % kept (nearest to 30 %)" in claims
    as_float32 = tuple(float(np.float32(f)) for f in FRACTIONS)
    assert "hard - random at 30 % kept" in claims_of(made_up(fractions=as_float32))


def test_one_replica_has_effects_and_no_intervals(tmp_path):
    run = made_up(replicas=1)
    for name in ("el2n", "grand", "grand_init"):
        run.arrays[name] = run.arrays[name][:1]
    data_diet_pruning.draw(run, tmp_path)
    claims = claims_of(run)
    for claim in claims.values():
        assert (claim.seeds, claim.interval) == (1, (-math.inf, math.inf))
    assert claims["hard - random at 30 % kept"].effect == pytest.approx(2.0)
    assert (tmp_path / "data_diet_pruning.pdf").stat().st_size > 10_000


def test_the_drawn_figure_carries_the_claims(tmp_path):
    run = made_up(ABOVE | {"el2n_hard": -2.0})
    paths, claims = data_diet_pruning.draw(run, tmp_path)
    assert claims == data_diet_pruning.measure(run)
    stored = json.loads(paths["json"].read_text())
    assert stored["fingerprints"] == [run.fingerprint]
    assert [c["holds"] for c in stored["claims"]] == [False, True, True, True, True]
    assert [c["effect"] for c in stored["claims"]] == [c.effect for c in claims]


def test_the_table_holds_the_numbers_drawn(tmp_path):
    paths, _ = data_diet_pruning.draw(made_up(), tmp_path, name="other")
    assert paths["csv"] == tmp_path / "other.csv"
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    panels = {p: [r for r in rows if r["panel"] == p] for p in "abcd"}
    assert {p: len(r) for p, r in panels.items()} == {
        "a": 5 * 3 + 1, "b": 4 * 3, "c": EXAMPLES, "d": EXAMPLES
    }  # fmt: skip
    at = [r for r in panels["a"] if r["series"] == "random" and float(r["x"]) == 0.3]
    assert float(at[0]["y"]) == pytest.approx(83 + np.mean(range(REPLICAS)))
    assert float(at[0]["low"]) < float(at[0]["y"]) < float(at[0]["high"])
    b = {(r["series"], float(r["x"])): float(r["y"]) for r in panels["b"]}
    assert b["EL2N (easiest)", 0.5] == pytest.approx(-9)
    ratio = [float(r["y"]) / float(r["x"]) for r in panels["c"]]
    np.testing.assert_allclose(ratio, 5, rtol=1e-5)
    assert [int(r["index"]) for r in panels["d"]] == list(range(EXAMPLES))


def test_rows_in_any_order_give_the_same_bytes(tmp_path):
    run = made_up()
    shuffled = run._replace(rows=run.rows.sample(fraction=1.0, shuffle=True, seed=1))
    one, _ = data_diet_pruning.draw(run, tmp_path / "one")
    other, _ = data_diet_pruning.draw(shuffled, tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


def test_a_stored_run_is_drawn_from_its_directory(tmp_path):
    run = made_up()
    columns = {name: run.rows[name].to_numpy() for name in run.rows.columns}
    recorder = record.Recorder(tmp_path / "data_diet" / run.fingerprint, run.config)
    recorder.finish(record.Table(columns, run.arrays))
    path = record.runs(tmp_path, data_diet_pruning.EXPERIMENT)[-1]
    _, claims = data_diet_pruning.draw(record.read(path), tmp_path / "read")
    assert claims == data_diet_pruning.measure(run)


def without_rows(run, **equal):
    keep = pl.lit(False)
    for column, value in equal.items():
        keep = keep | (pl.col(column) != value)
    return run._replace(rows=run.rows.filter(keep))


def without_array(run, name):
    return run._replace(arrays={k: v for k, v in run.arrays.items() if k != name})


def with_array(run, name, value):
    return run._replace(arrays=run.arrays | {name: value})


def set_accuracy(run, value):
    return run._replace(rows=run.rows.with_columns(test_accuracy=pl.lit(value)))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: r._replace(rows=r.rows.drop("replica")), "no column 'replica'"),
        (lambda r: without_rows(r, method="random"), "no rows for method 'random'"),
        (lambda r: without_rows(r, method="full"), "no rows for method 'full' at fraction 1"),
        (lambda r: without_rows(r, method="el2n_easy", fraction=0.5), "'el2n_easy' at frac.* 0.5"),
        (lambda r: without_rows(r, method="grand_hard", replica=2, fraction=0.3), "same replicas"),
        (lambda r: r._replace(rows=pl.concat([r.rows, r.rows[:1]])), "two rows for 'full'"),
        (lambda r: set_accuracy(r, 97.0), r"test_accuracy must be in \[0, 1\], got 97.0"),
        (lambda r: set_accuracy(r, math.nan), r"test_accuracy must be in \[0, 1\], got nan"),
        (lambda r: without_array(r, "grand"), "no array 'grand'; it has .*'el2n'"),
        (lambda r: with_array(r, "el2n", np.ones(5)), r"'el2n' must be finite with 2 axes"),
        (lambda r: with_array(r, "el2n", np.full((3, 60), np.nan)), "180 values that are not"),
        (lambda r: with_array(r, "input_norm", np.ones(7)), "same examples, got .*'input_norm': 7"),
        (lambda r: with_array(r, "grand", np.ones((2, 60))), "same scoring replicas, got 3 and 2"),
        (lambda r: r._replace(config={**r.config, "score": {}}), "no 'score.epochs' in its config"),
        (lambda r: r._replace(config={"noise": 0.0}), "no '.*' in its config"),
    ],
)
def test_what_a_run_lacks_is_named(tmp_path, broken, message):
    with pytest.raises(ValueError, match=f"data_diet run 00c0ffee00c0ffee.*{message}"):
        data_diet_pruning.draw(broken(made_up()), tmp_path)
    assert not list(tmp_path.iterdir())
