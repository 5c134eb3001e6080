"""No figure draws or claims a number of a member that diverged, and each says how many did."""

import csv
import json
import math

import made_up
import numpy as np
import polars as pl
import pytest
import test_data_diet_barrier as barrier
import test_data_diet_velocity as velocity
import test_early_learning_figures as early
import test_early_learning_theory_figures as early_theory
import test_segmentation_noise_figures as segmentation
import test_stability_figures as stability
import test_stability_theory_figures as theory
import test_transformer_stability_figures as transformer
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_scores import ranking

from dynamics import record, statistics
from paper_figures import (
    __main__,
    data_diet_barrier,
    data_diet_correlation,
    data_diet_examples,
    data_diet_mislabelled,
    data_diet_pruning,
    data_diet_rescoring,
    data_diet_timing,
    data_diet_transfer,
    data_diet_velocity,
    data_diet_window,
    draw,
    reading,
    stability_batches,
    stability_edge,
    stability_spectra,
    transformer_stability_rates,
    transformer_stability_widths,
)

PAIRED = {  # figure -> a run of which a whole seed is left out when a member of it diverges
    data_diet_barrier: barrier.made_up,
    data_diet_pruning: made_up.pruning,
    data_diet_rescoring: made_up.rescoring,
    data_diet_timing: made_up.timing,
    data_diet_transfer: made_up.transfer,
    data_diet_velocity: lambda: velocity.made_up(velocity.RISING),
    data_diet_window: made_up.window,
    **dict(early.FIGURES),
    **{module: make for module, make in early_theory.FIGURES.values()},
    **dict(segmentation.FIGURES),
    stability_batches: stability.batches,
    stability_edge: stability.edge,
    stability_spectra: stability.spectra,
    **{module: make for module, make in theory.FIGURES.values()},
}
SCORES = {data_diet_correlation: ranking, data_diet_examples: ranking,
          data_diet_mislabelled: ranking}  # fmt: skip
COUNTED = {transformer_stability_rates: transformer.rates,
           transformer_stability_widths: transformer.widths}  # fmt: skip
name_of = lambda module: module.__name__.rpartition(".")[2]  # noqa: E731
KEYS = {"replica", "step", "epoch", "diverged", "rarest", "fraction", "rate", "strength", "beta",
        "dropped", "scored_at", "spawn", "rank", "size", "columns", "scale", "batch", "at", "gamma",
        "learning_rate", "dim", "elr_lambda", "alpha", "width", "parameters"}  # fmt: skip
ONCE = settings(max_examples=6, deadline=None, derandomize=True)


def with_diverged(run, members, poison):
    """The run in which rows of its study, and all of their members, diverged at a step.

    Whatever they measured, and all else of the same seeds, is ``poison``.
    """
    own = run.config["study"]["kind"].lower()
    frame = run.frames[own]
    at = {i % len(frame): step for i, step in members.items()}
    told = pl.Series("diverged", [at.get(i) for i in range(len(frame))], pl.Int64)
    hit = frame["replica"].gather(list(at)).unique().to_list()
    frames = run.frames | {own: frame.with_columns(told)}
    for name in [n for n, f in frames.items() if "replica" in f.columns and n != record.SCORED]:
        numbers = [
            c for c, kind in frames[name].schema.items() if kind.is_float() and c not in KEYS
        ]
        mine = pl.col("replica").is_in(hit)
        frames[name] = frames[name].with_columns(
            pl.when(mine).then(poison).otherwise(pl.col(c)).alias(c) for c in numbers
        )
    arrays = run.arrays
    if record.SCORED not in frames:
        arrays = {name: poisoned(array, hit, poison) for name, array in arrays.items()}
    return run._replace(frames=frames, arrays=arrays), set(hit)


def poisoned(array, hit, poison):
    if "replica" not in array.dims:
        return array
    values = array.values.copy()
    np.moveaxis(values, array.dims.index("replica"), 0)[hit] = poison
    return array._replace(values=values)


def without(run, hit):
    """The run as if it had never had these seeds."""
    frames = {
        name: frame
        if "replica" not in frame.columns or name == record.SCORED
        else frame.filter(~pl.col("replica").is_in(list(hit)))
        for name, frame in run.frames.items()
    }
    arrays = dict(run.arrays)
    for name, array in arrays.items():
        if "replica" in array.dims and record.SCORED not in frames:
            axis = array.dims.index("replica")
            rest = [i for i in range(array.values.shape[axis]) if i not in hit]
            arrays[name] = array._replace(
                values=np.take(array.values, rest, axis=axis),
                coords={**array.coords, "replica": np.array(rest)},
            )
    return run._replace(frames=frames, arrays=arrays)


def outcome(module, run):
    """The claims, or why there are none."""
    try:
        return module.measure([run])
    except ValueError as error:
        return str(error)


def plain(claims):
    """Claims without what they say of members that diverged; NaN equal to itself."""
    if isinstance(claims, str):
        return claims
    return [repr(claim._replace(diverged="")) for claim in claims]


@pytest.mark.parametrize("module", [m for m in PAIRED if hasattr(m, "measure")], ids=name_of)
@given(
    members=st.dictionaries(st.integers(0, 10_000), st.integers(0, 10**6), min_size=1, max_size=4),
    poison=st.sampled_from([0.321, 0.777, math.nan]),
)
@ONCE
def test_claims_are_those_of_the_seeds_that_are_whole(module, members, poison):
    run = PAIRED[module]()
    if "replica" not in run.frames[run.config["study"]["kind"].lower()].columns:
        return  # nothing is random, one member diverging is refused: below
    asked = sorted(reading.frame(run)["replica"].drop_nulls().unique())
    run, hit = with_diverged(run, members, poison)
    found = outcome(module, run)
    if len(asked) - len(hit) < 2:
        assert f"not measured: {len(hit)} of {len(asked)} seeds diverged" in found
        return
    assert plain(found) == plain(outcome(module, without(run, hit)))
    if not isinstance(found, str):
        told = {claim.diverged for claim in found}
        assert told == {f"{len(hit)} of {len(asked)} seeds diverged, left out"}


def drawn(module, run, folder, monkeypatch):
    """Rows of the csv, claims of the json, and the caption; nothing is rendered."""
    captions = []
    monkeypatch.setattr(
        draw, "_render", lambda fig, *_: captions.append(fig.get_supxlabel()) or b""
    )
    paths, claims = module.draw([run], folder)
    with paths["csv"].open() as f:
        rows = list(csv.DictReader(f))
    return rows, json.loads(paths["json"].read_text())["claims"], captions[0], claims


@pytest.mark.parametrize("module", PAIRED, ids=name_of)
def test_the_csv_and_the_caption_are_those_of_the_seeds_that_are_whole(
    module, tmp_path, monkeypatch
):
    run = PAIRED[module]()
    frame = reading.frame(run)
    if "replica" not in frame.columns:
        return
    asked = sorted(frame["replica"].drop_nulls().unique())
    last = int(frame["replica"].to_list().index(asked[-1]))
    run, hit = with_diverged(run, {last: 3}, 0.777)
    rows, told, caption, claims = drawn(module, run, tmp_path, monkeypatch)
    wanted, others, said, _ = drawn(module, without(run, hit), tmp_path, monkeypatch)
    words = f"1 of {len(asked)} seeds diverged, left out"
    assert {row.pop("diverged") for row in rows} == {words}
    assert rows == wanted
    assert {claim.pop("diverged") for claim in told} == {words}
    assert told == others
    assert words in " ".join(caption.split()) and "diverged" not in said
    assert words in " ".join(draw.report(claims).split())


@pytest.mark.parametrize("module", SCORES, ids=name_of)
def test_scores_of_networks_that_diverged_are_refused(module):
    run = SCORES[module]()
    gone = pl.when(pl.col("replica") == 1).then(3).otherwise(None).alias("diverged")
    run = made_up.with_rows(run, lambda frame: frame.with_columns(gone), record.SCORED)
    assert "scoring replica 1 diverged" in outcome(module, run)


@pytest.mark.parametrize("module", COUNTED, ids=name_of)
@given(members=st.sets(st.integers(0, 10_000), min_size=1, max_size=30), poison=st.booleans())
@ONCE
def test_where_divergence_is_the_outcome_it_is_counted_and_its_numbers_are_not_read(
    module, members, poison
):
    run = COUNTED[module]()
    by = ["width", "intervention", "rate", "replica"]
    name = run.config["study"]["kind"].lower()
    frame, every = run.frames[name], run.frames[name].unique(by, maintain_order=True).select(by)
    hit = every[sorted({i % len(every) for i in members})].with_columns(gone=pl.lit(5))
    frame = frame.join(hit, on=by, how="left", maintain_order="left").with_columns(
        diverged=pl.col("gone").cast(pl.Int64)
    )
    after = pl.col("gone").is_not_null() & (pl.col("step") > 0)
    columns = [n for n in ("test_loss", "max_logit", "grad_rms") if n in frame.columns]
    worse = frame.with_columns(
        pl.when(after).then(0.777 if poison else 7.77).otherwise(pl.col(n)).alias(n)
        for n in columns
    )
    stored = frame.filter(~after)  # a run has no rows of what came after
    found = [outcome(module, run._replace(frames={name: f.drop("gone")})) for f in (stored, worse)]
    assert plain(found[0]) == plain(found[1])
    assert not isinstance(found[0], str)
    assert {c.diverged for c in found[0]} == {f"{len(hit)} of {len(every)} members diverged"}
    for claim in found[0]:
        assert (claim.holds is None) == math.isnan(claim.effect)


@pytest.mark.parametrize("module", COUNTED, ids=name_of)
def test_nothing_is_claimed_of_a_population_that_diverged_altogether(module):
    run = COUNTED[module]()
    name = run.config["study"]["kind"].lower()
    gone = run.frames[name].with_columns(diverged=pl.lit(1, pl.Int64))
    found = outcome(module, run._replace(frames={name: gone}))
    assert not isinstance(found, str) and {claim.holds for claim in found} == {None}
    text = " ".join(draw.report(found).split())
    assert "members diverged)" in text and " holds " not in f" {text} "


def test_a_basin_with_a_start_that_diverged_is_refused():
    from paper_figures import early_learning_basin

    run = early_theory.basin()
    true = run.arrays["true"]
    values = true.values.copy()
    values[0, -1, 0, 0] = math.nan
    run = made_up.with_array(run, "true", true._replace(values=values))
    assert "1 values that are not finite" in outcome(early_learning_basin, run)


def test_every_figure_is_in_this_test():
    assert set(__main__.figures()) == {name_of(m) for m in (*PAIRED, *SCORES, *COUNTED)}


def test_no_figure_reads_frames_past_the_door():
    folder = __main__.Path(__main__.__file__).parent
    past = [p.name for p in folder.glob("*.py") if ".frames" in p.read_text()]
    assert sorted(past) == ["__main__.py", "reading.py"]


def test_seeds_are_lost_in_all_frames_and_counted_once():
    a = pl.DataFrame({"replica": [0, 1, 2, 0], "diverged": [None, 3, None, None]})
    b = pl.DataFrame({"replica": [2, 3], "diverged": [0, None]})
    scored = pl.DataFrame({"replica": [0], "diverged": [1]})
    found = record.seeds({"a": a, "b": b, "scored": scored, "c": pl.DataFrame({"replica": [9]})})
    assert found == ((0, 3), (1, 2)) and str(found) == "2 of 4 seeds diverged"
    assert record.without_status({"c": pl.DataFrame({"replica": [9]})}) == ["c"]
    assert record.without_status({"a": a, "c": pl.DataFrame({"replica": [9]})}) == []
    assert str(record.seeds({"a": a.head(1)})) == ""


def test_a_claim_says_what_it_is_without():
    made = reading.judging("f", statistics.Scale("digits", "1 of 3 seeds diverged, left out"), 2)
    said = reading.Said("It helps.", "Nobody 2000")
    claim = made(statistics.Estimate(2.0, 1.0, 3.0), "a - b", said, at_least=0.5)
    assert (claim.holds, claim.diverged) == (True, "1 of 3 seeds diverged, left out")
    assert "2 seeds (1 of 3 seeds diverged, left out)" in draw.report([claim])
    nothing = made(statistics.Estimate(math.nan, -math.inf, math.inf), "a - b", said, at_least=0.5)
    assert nothing.holds is None
    assert "not measured   a - b: (1 of 3 seeds diverged, left out)" in draw.report([nothing])
