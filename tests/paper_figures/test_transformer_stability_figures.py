"""Figures of small transformers, from runs whose every effect is known."""

import csv
import itertools
import math

import numpy as np
import polars as pl
import pytest
from made_up import claims_of, failed, run_of, with_rows, without_rows

from dynamics import statistics
from paper_figures import draw, transformer_stability_rates, transformer_stability_widths

REPLICAS = 4
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CONFIG = {
    "kind": "Config",
    "data": {"kind": "Text", "source": "docstrings", "file": "", "context": 32},
    "depth": 2,
    "head_width": 16,
    "steps": 300,
    "seed": 0,
}
ABOVE = {  # loss above the best one's, rate by rate; each adds to 7 times the sensitivity
    "none": [0.7, 0.3, 0.1, 0.0, 0.1, 0.3, 0.6],
    "qk_norm": [0.7, 0.3, 0.1, 0.0, 0.0, 0.1, 0.2],
    "z_loss": [0.7, 0.3, 0.1, 0.0, 0.1, 0.3, 0.6],
    "scaled_decay": [0.7, 0.3, 0.1, 0.0, 0.2, 0.4, 0.75],
    "mu_param": [0.7, 0.3, 0.1, 0.0, 0.1, 0.3, 0.6],
    "long_warmup": [0.7, 0.3, 0.1, 0.0, 0.05, 0.2, 0.5],
}
LOGITS = {"qk_norm": [3.0, 3, 3, 4, 7, 10, 30]}
GRADIENTS = [2e-3, 2e-3, 2e-3, 1e-3, 4e-4, 1e-4, 2e-5]


def made(kind, rows, config=CONFIG, **study):
    config = config | {"study": {"kind": kind, **study}}
    types = {"diverged": pl.Int64}
    rows = [{"width": 32, "diverged": None, **row} for row in rows]
    frame = pl.DataFrame(rows, infer_schema_length=None, schema_overrides=types)
    arrays = {"index": np.arange(60, dtype=np.int32)}
    return run_of("transformer_stability", config, {kind.lower(): frame}, arrays)


def rates(above=(), logits=(), widths=(32,), **changed):
    """A run of Rates: best loss 2.5 plus .01 a replica, initial loss 5 plus .01 a replica."""
    above, logits, rows = ABOVE | dict(above), LOGITS | dict(logits), []
    for width, name, (i, rate), s in itertools.product(
        widths, above, enumerate(RATES), range(REPLICAS)
    ):
        first = {"test_loss": 5 + 0.01 * s, "max_logit": 3.0, "grad_rms": 1e-3}
        last = {
            "test_loss": 2.5 + 0.01 * s + above[name][i],
            "max_logit": logits.get(name, [3.0, 3, 3, 10, 70, 4000, 1e5])[i] * (1 + 0.1 * s),
            "grad_rms": changed.get("gradients", GRADIENTS)[i],
        }
        for step, values in ((0, first), (300, last)):
            cell = {"intervention": name, "rate": rate, "replica": s, "step": step, "width": width}
            rows.append(cell | values)
    return made("Rates", rows)


def widths(at_widest=1.0, held=1.5, dip=1.0, sizes=(16, 32, 48, 64, 80, 96)):
    """A run of Widths: quadratics in the logarithms with a factor ``at_widest``."""
    rows = []
    for name, (i, width), rate, s, step in itertools.product(
        ("none", "qk_norm"), enumerate(sizes), (1e-2, 3e-2, 1e-1), range(REPLICAS), (0, 70, 71)
    ):
        n = 24.0 * width**2
        u = math.log10(n / 6144)
        logit = 10 ** (1 + (0.5 + 5 * rate) * u + 0.1 * u**2)
        logit *= (at_widest if i == len(sizes) - 1 else 1.0) * (dip if i == 1 else 1.0)
        logit = 3 * held ** (i / max(len(sizes) - 1, 1)) if name == "qk_norm" else logit
        logit *= 1 + 0.01 * (s - 1.5) + 0.2 * (step - 70.5) * (step > 0)
        rows.append({"intervention": name, "rate": rate, "replica": s, "step": step,
                     "width": width, "parameters": n, "max_logit": logit})  # fmt: skip
    return made("Widths", rows, first=70, last=71)


FIGURES = [(transformer_stability_rates, rates), (transformer_stability_widths, widths)]


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
    assert {claim.kind for claim in claims} == {"claim", "control"}
    with one["csv"].open() as f:
        assert all(row["y"] and row["series"] for row in csv.DictReader(f))


def effects(module, run):
    return {q: round(c.effect, 6) for q, c in claims_of(module, run).items()}


def test_the_claims_of_rates_are_the_effects_put_in():
    found = claims_of(transformer_stability_rates, rates())
    assert {q: round(c.effect, 6) for q, c in found.items()} == {
        "largest logit at rate 0.1, recipe / query-key norm": 400,
        "sensitivity, recipe - query-key norm": 0.1,
        "RMS gradient, rate 0.0003 / rate 0.1": 20,
        "sensitivity, decay times rate - recipe": 0.05,
        "sensitivity, recipe - long warm-up": 0.035714,
        "sensitivity, recipe - muParam, simple": 0,
        "loss at rate 0.01, query-key norm - recipe": 0,
        "sensitivity, recipe - z-loss": 0,
    }
    assert failed(found) == ["sensitivity, recipe - z-loss"]  # a control that is not to hold
    assert found["sensitivity, recipe - z-loss"].kind == "control"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        (
            {"logits": {"qk_norm": [3.0, 3, 3, 4, 7, 200, 300]}},
            "largest logit at rate 0.1, recipe / query-key norm",
        ),
        ({"above": {"qk_norm": ABOVE["none"]}}, "sensitivity, recipe - query-key norm"),
        ({"gradients": [1e-3] * 7}, "RMS gradient, rate 0.0003 / rate 0.1"),
        ({"above": {"scaled_decay": ABOVE["none"]}}, "sensitivity, decay times rate - recipe"),
        ({"above": {"long_warmup": ABOVE["none"]}}, "sensitivity, recipe - long warm-up"),
        ({"above": {"mu_param": ABOVE["qk_norm"]}}, "sensitivity, recipe - muParam, simple"),
        (
            {"above": {"qk_norm": [0.7, 0.3, 0.1, 0.1, 0.0, 0.1, 0.2]}},
            "loss at rate 0.01, query-key norm - recipe",
        ),
    ],
)
def test_another_effect_of_rates_does_not_hold(changed, what):
    found = failed(claims_of(transformer_stability_rates, rates(**changed)))
    assert set(found) == {what, "sensitivity, recipe - z-loss"}


def test_a_run_that_diverged_counts_as_one_that_learned_nothing(tmp_path, monkeypatch):
    """In the sensitivity; its logit has no logarithm, and its claim no effect."""
    monkeypatch.setattr(draw, "DPI", 50)
    above = {"none": [0.7, 0.3, 0.1, 0.0, 0.1, 0.3, 0.0]}
    run = rates(above=above, logits={"none": [3.0, 3, 3, 10, 70, math.inf, 1e5]})
    largest = (pl.col("intervention") == "none") & (pl.col("rate") == 0.3)
    run = with_rows(
        run,
        lambda frame: frame.with_columns(diverged=pl.when(largest).then(pl.lit(200))).filter(
            pl.col("step") <= pl.col("diverged").fill_null(300)
        ),
    )
    found = claims_of(transformer_stability_rates, run)
    assert found["sensitivity, recipe - query-key norm"].effect == pytest.approx(
        0.1 + (2.5 - 0.6) / 7
    )
    largest = found["largest logit at rate 0.1, recipe / query-key norm"]
    assert math.isnan(largest.effect) and not largest.holds
    paths, _ = transformer_stability_rates.draw([run], tmp_path)
    assert paths["pdf"].stat().st_size > 1000


def test_every_width_has_its_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 50)
    run = rates(widths=(32, 64))
    _, claims = transformer_stability_rates.draw([run], tmp_path)
    assert len(claims) == 16 and len({claim.scale for claim in claims}) == 2
    assert "width 64" in claims[-1].scale


def test_the_claims_of_widths_are_the_effects_put_in():
    found = claims_of(transformer_stability_widths, widths(at_widest=2.0))
    steps = [(0.5 + 5 * 0.03) * u + 0.1 * u**2 for u in 2 * np.log10(np.array([1, 2, 3, 4, 5, 6]))]
    steps[-1] += np.log10(2)
    assert {q: c.effect for q, c in found.items()} == {
        "least growth from a width to the next, rate 0.03": pytest.approx(
            10 ** np.diff(steps).min()
        ),
        "logit, width 96 / width 16, rate 0.03, recipe": pytest.approx(10 ** steps[-1]),
        "measured / predicted at width 96, rate 0.01, |log10|": pytest.approx(np.log10(2)),
        "measured / predicted at width 96, rate 0.03, |log10|": pytest.approx(np.log10(2)),
        "logit, width 96 / width 16, rate 0.03, query-key norm": pytest.approx(1.5),
    }
    assert failed(found) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"held": 4.0}, ["logit, width 96 / width 16, rate 0.03, query-key norm"]),
        (
            {"at_widest": 4.0},
            [f"measured / predicted at width 96, rate {r}, |log10|" for r in (0.01, 0.03)],
        ),
        ({"dip": 0.3}, ["least growth from a width to the next, rate 0.03"]),
    ],
)
def test_another_effect_of_widths_does_not_hold(changed, what):
    found = failed(claims_of(transformer_stability_widths, widths(**changed)))
    assert [quantity for quantity in found if quantity in what] == what


def test_few_widths_are_drawn_without_a_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 50)
    run = widths(sizes=(16, 32, 64))
    paths, claims = transformer_stability_widths.draw([run], tmp_path)
    assert not [claim for claim in claims if "predicted" in claim.quantity]
    assert "predicted" not in paths["csv"].read_text()


def test_the_prediction_is_of_all_widths_but_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 50)
    paths, _ = transformer_stability_widths.draw([widths(at_widest=2.0)], tmp_path)
    with paths["csv"].open() as f:
        rows = [row for row in csv.DictReader(f) if row["series"] == "recipe, rate 0.01, predicted"]
    x = 24.0 * np.array([16, 32, 48, 64, 80, 96]) ** 2
    u = np.log10(x / 6144)
    noise = np.exp(np.mean(np.log(1 + 0.01 * (np.arange(REPLICAS) - 1.5))))
    y = 10 ** (1 + 0.55 * u + 0.1 * u**2) * noise
    wanted = statistics.extrapolate(x[:-1], y[:-1], x[-1:])
    assert float(rows[0]["y"]) == pytest.approx(wanted.mean[0], rel=1e-6)
    assert float(rows[0]["x"]) == x[-1]


@pytest.mark.parametrize(
    ("module", "run", "message"),
    [
        (transformer_stability_rates, without_rows(rates(), step=300), "no rows of step 300"),
        (transformer_stability_rates, without_rows(rates(), step=0), "no rows of step 0"),
        (
            transformer_stability_rates,
            without_rows(rates(), intervention="none", rate=0.1, step=300),
            "'none', rate 0.1",
        ),
        (
            transformer_stability_rates,
            rates(above={"new": ABOVE["none"]}),
            "interventions must be of .*, got 'new'",
        ),
        (transformer_stability_widths, without_rows(widths(), step=71), "no rows of step 71"),
        (transformer_stability_widths, widths(sizes=(16,)), "needs two widths or more"),
    ],
)
def test_what_a_run_lacks_is_named(module, run, message):
    with pytest.raises(ValueError, match=message):
        module.measure([run])
