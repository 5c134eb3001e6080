"""What all figures of data_diet do alike: the same bytes, the claims beside them, refusals."""

import csv
import json
import math

import polars as pl
import pytest
from made_up import pruning, rescoring, timing, transfer, window, with_accuracy, with_rows

from dynamics import record, scores
from paper_figures import (
    data_diet_pruning,
    data_diet_rescoring,
    data_diet_scores,
    data_diet_timing,
    data_diet_transfer,
    data_diet_window,
    draw,
)

FIGURES = [
    (data_diet_pruning, pruning),
    (data_diet_timing, timing),
    (data_diet_window, window),
    (data_diet_transfer, transfer),
    (data_diet_rescoring, rescoring),
]


def of(module, make, **options):
    """The runs that the figure shows together."""
    return [make(noise=n, **options) for n in ((0.0, 0.2) if module.TOGETHER else (0.0,))]


@pytest.fixture(params=FIGURES, ids=lambda figure: figure[0].STUDY)
def figure(request, monkeypatch):
    monkeypatch.setattr(draw, "DPI", 50)
    return request.param


def test_rows_in_any_order_give_the_same_bytes(figure, tmp_path):
    module, make = figure
    runs = of(module, make)
    mixed = [with_rows(r, lambda f: f.sample(fraction=1.0, shuffle=True, seed=1)) for r in runs]
    one, _ = module.draw(runs, tmp_path / "one")
    other, _ = module.draw(mixed, tmp_path / "other")
    for suffix in one:
        assert one[suffix].read_bytes() == other[suffix].read_bytes()


def test_the_drawn_figure_carries_its_runs_and_claims(figure, tmp_path):
    module, make = figure
    runs = of(module, make)
    paths, claims = module.draw(runs, tmp_path)
    name = module.__name__.rpartition(".")[2]
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.{s}" for s in paths}
    assert claims == module.measure(runs)
    assert all(claim.figure == name and claim.holds for claim in claims)
    assert {claim.kind for claim in claims} == {"claim", "control"}
    assert len({claim.scale for claim in claims}) == len(runs)
    stored = json.loads(paths["json"].read_text())
    assert stored["fingerprints"] == [run.fingerprint for run in runs]
    assert [c["effect"] for c in stored["claims"]] == [c.effect for c in claims]
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    assert all(row["y"] and row["series"] for row in rows)
    assert sorted({row["panel"] for row in rows}) == [*"abcdef"[: len({r["panel"] for r in rows})]]


def test_one_run_and_one_replica_have_no_intervals(figure, tmp_path):
    module, make = figure
    run = make(replicas=1)
    paths, claims = module.draw([run], tmp_path)
    assert paths["pdf"].stat().st_size > 10_000
    for claim in claims:
        if "Spearman" not in claim.quantity:
            assert (claim.seeds, claim.interval) == (1, (-math.inf, math.inf))


def test_a_diverged_run_is_refused_in_one_line(figure, tmp_path):
    module, make = figure
    run = make()
    bad = pl.when(pl.col("replica") != 2).then(pl.col("test_accuracy"))
    with pytest.raises(ValueError, match=r"data_diet run \w+: test_acc.*got None .*diverged") as e:
        module.draw([with_rows(run, lambda f: f.with_columns(test_accuracy=bad))], tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"test_accuracy must be in \[0, 1\], got -0.5"):
        module.draw([with_accuracy(run, -0.5)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stored_run_is_drawn_from_its_directory(figure, tmp_path):
    module, make = figure
    run = make()
    recorder = record.Recorder(tmp_path / "data_diet" / run.fingerprint, run.config)
    recorder.finish(record.Findings(run.frames, run.arrays))
    path = record.runs(tmp_path, module.EXPERIMENT)[-1]
    assert module.measure([record.read(path)]) == module.measure([run])


def test_figures_know_which_end_of_a_score_is_hard():
    """They may not import jax, so they have a list of their own."""
    low = {name for name, end in scores.HARD.items() if end == "low"}
    assert set(data_diet_scores.LOW) <= low
    assert set(data_diet_scores.LABELS) & low == set(data_diet_scores.LOW)
