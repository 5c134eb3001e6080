"""Figures of the edge of stability, from runs whose every effect is known."""

import csv

import numpy as np
import polars as pl
import pytest
from made_up import (
    array_of,
    claims_of,
    failed,
    run_of,
    with_array,
    with_rows,
    without_array,
    without_rows,
)

from paper_figures import draw, stability_batches, stability_edge, stability_spectra

REPLICAS = 3
RATIOS = {"gd": 1.01, "heavy_ball": 0.98, "nesterov": 1.01, "adam": 0.99, "rmsprop": 1.08}
STEPS = (0, 20, 40, 60, 80)
CONFIG = {
    "kind": "Config",
    "data": {"kind": "DataConfig", "source": "digits"},
    "model": {"kind": "MLP", "width": 32, "depth": 2},
    "loss": "squared_error",
    "seed": 0,
}
BATCHES = {8: 0.55, 32: 0.82, 128: 0.93, 500: 1.0}


def made(kind, frames, arrays=(), config=None, **study):
    config = CONFIG | (config or {}) | {"study": {"kind": kind, "replicas": REPLICAS, **study}}
    arrays = {"index": np.arange(500, dtype=np.int32), **dict(arrays)}
    return run_of("stability", config, frames, arrays)


def edge(ratios=None, before=0.0, after=0.3, control=0.4, reached=True):
    """Every rule is at half its threshold until step 40, then at ``ratios``."""
    rows, rises, losses = [], [], []
    for rule, ratio in {**(RATIOS if ratios is None else ratios), "control": control}.items():
        late = rule != "control" and reached
        for r in range(REPLICAS):
            for step in STEPS:
                at = late and step >= 40
                rows.append(
                    {"rule": rule, "replica": r, "step": step}
                    | {"ratio": ratio if at else 0.4, "reached": at}
                )
            rises.append(
                {"rule": rule, "replica": r, "step": 40 if late else None}
                | {"before": before if late else 0.0, "after": after if late else None}
            )
            for step, loss in enumerate(np.geomspace(0.5, 0.01, 80)):
                losses.append({"rule": rule, "replica": r, "step": step, "loss": loss})
    return made("Edge", {"edge": rows, "rises": rises, "loss": losses})


def batches(ratios=BATCHES, batch=1.05):
    """The last of three measurements of each size are averaged; the first is far off."""
    rows = [
        {"size": size, "replica": r, "step": 500 * i}
        | {"averaged": i > 0, "ratio": ratio + 0.01 * (i - 1.5) if i else 9.0}
        | {"batch_sharpness": batch if size == 8 else 1.0, "interaction": 0.9, "noise": 1.0}
        for size, ratio in ratios.items()
        for r in range(REPLICAS)
        for i in range(3)
    ]
    return made("Batches", {"batches": rows}, learning_rate=0.2)


def spectra(loss="squared_error", near=(0.7, 0.95), negative=(0.1, 0.0), off=1.0):
    """Nodes at the sharpness, at zero, below and between, of known weights."""
    steps, top = np.array([0, 100], np.int32), 4.0
    rows = [
        {"replica": r, "step": int(s), "sharpness": top, "ratio": 0.6}
        for s in steps
        for r in range(REPLICAS)
    ]
    nodes = np.empty((2, REPLICAS, 5, 4))
    nodes[:] = [-1.0, 0.001, 1.0, top * off]
    weights = np.empty_like(nodes)
    for t in range(2):
        rest = 1 - near[t] - negative[t]
        weights[t] = [negative[t], near[t], 0.75 * rest, 0.25 * rest]
    dims = ("step", "replica", "vector", "node")
    arrays = {n: array_of(v, dims, step=steps) for n, v in (("nodes", nodes), ("weights", weights))}
    return made("Spectra", {"spectra": rows}, arrays, {"loss": loss})


def drawn(module, runs, tmp_path, monkeypatch, panels):
    monkeypatch.setattr(draw, "DPI", 50)
    paths, claims = module.draw(runs, tmp_path)
    assert set(paths) == {"pdf", "png", "csv", "json"} and all(
        p.stat().st_size for p in paths.values()
    )
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert {row["panel"] for row in rows} == set(panels)
    assert module.measure(runs) == claims
    return rows


def test_the_edge(tmp_path, monkeypatch):
    drawn(stability_edge, [edge()], tmp_path, monkeypatch, "abcde")
    claims = claims_of(stability_edge, edge())
    assert not failed(claims) and len(claims) == 8
    assert claims["|sharpness / threshold - 1|, RMSProp"].effect == pytest.approx(0.08)
    assert claims["loss rises at the edge"].effect == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"ratios": RATIOS | {"adam": 1.2}}, "|sharpness / threshold - 1|, Adam"),
        ({"before": 0.01}, "loss rises before the edge"),
        ({"after": 0.0}, "loss rises at the edge"),
    ],
)
def test_another_effect_at_the_edge_does_not_hold(changed, what):
    assert failed(claims_of(stability_edge, edge(**changed))) == [what]


def test_rules_that_stay_below_claim_nothing():
    claims = claims_of(stability_edge, edge(reached=False))
    assert [claim.kind for claim in claims.values()] == ["control"]


def test_batch_sizes(tmp_path, monkeypatch):
    rows = drawn(stability_batches, [batches()], tmp_path, monkeypatch, "a")
    first = [r for r in rows if r["series"] == "sharpness of all examples"][0]
    assert float(first["y"]) == pytest.approx(0.55)  # of what is averaged
    claims = claims_of(stability_batches, batches())
    assert not failed(claims)
    assert claims["sharpness, batch 500 - 8"].effect == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"batch": 1.4}, ["|batch sharpness - 1|, batch 8"]),
        ({"ratios": BATCHES | {128: 0.8}}, ["least rise from one size to the next"]),
        ({"ratios": BATCHES | {500: 1.1}}, ["|sharpness - 1|, batch 500"]),
    ],
)
def test_another_effect_of_batches_does_not_hold(changed, what):
    assert failed(claims_of(stability_batches, batches(**changed))) == what


def test_spectra_of_both_losses(tmp_path, monkeypatch):
    runs = [spectra("cross_entropy"), spectra()]
    rows = drawn(stability_spectra, runs, tmp_path, monkeypatch, "abcd")
    claims = stability_spectra.measure(runs)
    assert all(claim.holds for claim in claims) and len(claims) == 8
    assert "squared error" in claims[0].scale and "cross-entropy" in claims[4].scale
    first = [row for row in rows if row["series"] == "density at step 0" and row["panel"] == "a"]
    x, y = (np.array([float(row[name]) for row in first]) for name in "xy")
    assert np.trapezoid(y, x) == pytest.approx(1, abs=0.06)  # tails beyond the panel
    drawn(stability_spectra, [spectra()], tmp_path / "one", monkeypatch, "ab")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"near": (0.7, 0.85)}, ["within 1 % of the largest around zero, in the end"]),
        ({"near": (0.89, 0.95)}, ["within 1 % of the largest around zero, end - start"]),
        ({"negative": (0.1, 0.06), "near": (0.7, 0.93)}, ["negative, start - end"]),
        ({"off": 0.99}, ["largest |edge of the density / sharpness - 1|"]),
    ],
)
def test_another_spectrum_does_not_hold(changed, what):
    assert failed(claims_of(stability_spectra, spectra(**changed))) == what


@pytest.mark.parametrize(
    ("module", "run", "message"),
    [
        (
            stability_edge,
            with_rows(edge(), lambda frame: frame.filter(pl.col("rule") != "adam"), "loss"),
            "lacks losses of rule 'adam'",
        ),
        (stability_edge, without_rows(edge(), rule="adam", replica=1, step=40.0), "replicas"),
        (stability_batches, batches({8: 0.5}), "needs two batch sizes or more"),
        (stability_spectra, without_array(spectra(), "nodes"), "no array 'nodes'"),
        (
            stability_spectra,
            with_array(
                spectra(),
                "nodes",
                array_of(np.zeros((1, 3, 5, 4)), ("step", "replica", "vector", "node"), step=[0]),
            ),
            r"must be \[steps, replicas, ...\]",
        ),
        (stability_spectra, without_rows(spectra(), step=100.0), "no rows for step 100"),
    ],
)
def test_what_a_run_lacks_is_named(module, run, message):
    with pytest.raises(ValueError, match=message):
        module.measure([run])
