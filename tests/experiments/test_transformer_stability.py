"""Small transformers at large rates: interventions, pairing, rows; checks 22 and 23 (slow)."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from dynamics import config as configs
from dynamics import optim, record, statistics
from dynamics.optim import Constant, Cosine
from dynamics.record import Findings
from experiments import transformer_stability
from experiments.experiment import Job
from experiments.transformer_stability import Changes, Config, Rates, Text, Widths

ALL = Rates().interventions
TWO_PROGRAMS = ("none", "qk_norm", "z_loss", "no_decay", "scaled_decay")
RATES = (1e-2, 1e-1)  # populations of 16 and of 4 everywhere: programs that are compiled once


pytestmark = pytest.mark.slow  # compiling takes most of a minute


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: Any) -> Config:
    """A few steps of nets of width 8 on 2,000 letters."""
    file = tmp_path_factory.mktemp("text") / "letters.txt"
    file.write_bytes(np.random.default_rng(0).integers(97, 105, 2000).astype(np.uint8).tobytes())
    return Config(
        data=Text(source="file", file=str(file), context=8),
        depth=1,
        head_width=4,
        batch_size=4,
        steps=6,
        validation=8,
        probed=2,
        study=Rates(interventions=TWO_PROGRAMS, widths=(8,), rates=RATES, every=3, replicas=2),
    )


@pytest.fixture(scope="module")
def table(tiny: Config) -> Findings:
    return transformer_stability.run(tiny, transformer_stability.load(tiny))


def frame(found: Findings) -> pl.DataFrame:
    """The only one."""
    (rows,) = found.frames.values()
    return rows


def of(found: Findings, name: str, **equal: Any) -> np.ndarray:
    """A column where others have these values, by rate and replica."""
    rows = frame(found).filter(pl.col(key) == value for key, value in equal.items())
    assert len(rows), equal
    return rows.sort("rate", "replica")[name].to_numpy()


def test_the_table(tiny: Config, table: Findings) -> None:
    rows = frame(table)
    assert len(rows) == 5 * 2 * 2 * 3 and set(rows["step"]) == {0, 3, 6}
    assert set(rows["intervention"]) == set(TWO_PROGRAMS) and set(rows["rate"]) == set(RATES)
    assert set(table.frames) == {"rates"} and set(rows["width"]) == {8}
    # 4 matrices of attention, 2 of the MLP, 3 norms; qk_norm has 2 of a head's width more
    plain, normed = (of(table, "parameters", intervention=n) for n in ("none", "qk_norm"))
    assert set(plain) == {4 * 64 + 2 * 256 + 3 * 8} and set(normed) == {792 + 8}
    for name in ("test_loss", "test_accuracy", "max_logit", "max_logit_0", "entropy_0", "log_z",
                 "output_rms", "grad_rms"):  # fmt: skip
        assert rows[name].is_finite().all(), name
    assert (rows["update_rms"].is_null() == (rows["step"] == 0)).all()
    assert rows["diverged"].is_null().all() and len(table.arrays["index"].values) == 224


def test_interventions_are_paired_and_differ(table: Findings) -> None:
    """One network and one order of batches for each replica, whatever is changed."""
    first = {n: of(table, "test_loss", step=0, intervention=n) for n in TWO_PROGRAMS}
    for name in set(TWO_PROGRAMS) - {"none", "qk_norm"}:
        np.testing.assert_array_equal(first[name], first["none"])
    assert (first["none"][:2] == first["none"][2:]).all()  # of both rates
    assert first["none"][0] != first["none"][1]
    last = [tuple(of(table, "output_rms", step=6, intervention=n)) for n in TWO_PROGRAMS]
    assert len(set(last)) == len(TWO_PROGRAMS)


def test_what_an_intervention_changes() -> None:
    point = Config()
    recipe = {"learning_rate": 0.1, "weight_decay": 1e-4, "z_loss": 0.0}
    changed = {
        "no_decay": {"weight_decay": 0.0},
        "scaled_decay": {"weight_decay": pytest.approx(0.01)},
        "z_loss": {"z_loss": 1e-4},
    }
    for name in ALL:
        found = transformer_stability.scalars_of(name, 0.1, point)
        assert found == recipe | changed.get(name, {}), name
    members = transformer_stability.members(Job((point,), None))
    programs = dict(members.select("intervention", "program").unique().rows())
    same = {n for n in ALL if programs[n] == programs["none"]}
    assert same == {"none", "z_loss", "no_decay", "scaled_decay"}
    assert len(set(programs.values())) == 4 and programs["qk_norm"] == "d32-qk_norm"
    data = transformer_stability.load(point)
    for name in ALL:
        rule = transformer_stability.rule_of(name, point)
        assert rule.base_fan_in == (32 if name == "mu_param" else 0)
        assert rule.schedule == Cosine(warmup=0.25 if name == "long_warmup" else 0.05)
        module = transformer_stability.module_of(32, name, point, data)
        assert module.config.qk_norm == (name == "qk_norm")


@pytest.mark.slow
def test_coefficients_are_replicas_and_points_are_those_alone(tiny: Config) -> None:
    data = transformer_stability.load(tiny)
    study = Rates(interventions=("none", "z_loss"), widths=(8,), rates=RATES, every=6, replicas=1)
    points = configs.grid(
        dataclasses.replace(tiny, study=study),
        {"changes.z_loss": (0.0, 1.0), "optimizer.weight_decay": (1e-4,), "seed": (0, 1)},
    )
    assert len(configs.group(points)) == 1
    together = transformer_stability.sweep(points, data)
    alone = transformer_stability.run(points[3], data)
    assert_frame_equal(frame(together[3]), frame(alone), rel_tol=1e-3, abs_tol=0)
    for z, equal in ((0, True), (2, False)):  # a coefficient of 0 is the recipe
        none, with_z = (
            of(together[z], "test_loss", step=6, intervention=n) for n in ("none", "z_loss")
        )
        assert (none == with_z).all() == equal


def test_widths_stop_early_in_the_schedule_of_all_steps(tiny: Config, tmp_path: Path) -> None:
    data = transformer_stability.load(tiny)
    study = Widths(interventions=("none",), widths=(8,), rates=RATES, first=3, last=4, replicas=2)
    point = dataclasses.replace(tiny, study=study)
    found = transformer_stability.run(point, data, store=tmp_path)
    rows = frame(found)
    assert set(rows["step"]) == {0, 3, 4} and len(rows) == 4 * 3
    assert rows["max_logit"].is_finite().all()
    assert (rows["test_loss"].is_null() == (rows["step"] == 3)).all()
    whole = dataclasses.replace(
        point, study=Rates(interventions=("none",), widths=(8,), rates=RATES, every=4, replicas=2)
    )
    same = of(transformer_stability.run(whole, data), "max_logit", step=4)
    np.testing.assert_allclose(of(found, "max_logit", step=4), same, rtol=1e-5)
    # a finished run is read, not computed
    (home,) = record.runs(tmp_path, "transformer_stability")
    assert home.name == configs.fingerprint(point)
    again = transformer_stability.run(point, data, store=tmp_path)
    assert_frame_equal(frame(again), rows, check_exact=True)


def test_a_diverged_run_has_no_loss_from_then_on(tiny: Config) -> None:
    """Rows are what was measured, once each: of one that diverged, those up to then."""
    study = Rates(interventions=("none",), widths=(8,), rates=(0.1, 1e30), every=3, replicas=2)
    point = dataclasses.replace(tiny, study=study)
    table = transformer_stability.run(point, transformer_stability.load(tiny))
    assert np.isfinite(of(table, "test_loss", rate=0.1)).all()
    rows = frame(table)
    for rate, replica in itertools.product(study.rates, range(2)):
        own = rows.filter(pl.col("rate") == rate, pl.col("replica") == replica)
        (diverged,) = set(own["diverged"])
        assert (diverged is None) == (rate == 0.1)
        last = 6 if diverged is None else diverged
        assert own["step"].to_list() == [step for step in (0, 3, 6) if step <= last]
        assert last >= 3 or own["step"].to_list() == [0]
        assert own.filter(pl.col("step") == 0)["test_loss"].is_finite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_width": 5}, "head_width 5 must divide the widths, got 8"),
        ({"optimizer": optim.SGD()}, "Config.optimizer must be Adam, got SGD"),
        ({"optimizer": ("independent_decay", False)}, "optimizer must have independent_decay"),
        ({"optimizer": ("schedule", Constant())}, "schedule must be Cosine or Linear"),
        ({"optimizer": ("learning_rate", 0.5)}, "change study.rates instead, got 0.5"),
        ({"optimizer": ("base_fan_in", 8)}, "no base_fan_in"),
        ({"batch_size": 500}, "batch_size must be <= the 224 training windows, got 500"),
        ({"study": Widths(widths=(8,), last=80)}, "study.last must be <= steps 6, got 80"),
    ],
)
def test_what_does_not_fit_is_refused(tiny: Config, change: Any, message: str) -> None:
    ((name, value),) = change.items()
    if isinstance(value, tuple):
        value = dataclasses.replace(tiny.optimizer, **dict([value]))
    with pytest.raises(ValueError, match=message):
        point = dataclasses.replace(tiny, **{name: value})
        transformer_stability.run(point, transformer_stability.load(point))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Text(file="a.txt"), "Text.file must name a file for source 'file'"),
        (lambda: Rates(rates=(0.1, 0.01)), "Rates.rates must be one or more values that rise"),
        (lambda: Rates(interventions=("none", "none")), "different values"),
        (lambda: Widths(first=9, last=8), "Widths.first must be <= last 8, got 9"),
        (lambda: Changes(warmup=2.0), "Changes.warmup must be >= 0 and <= 1"),
    ],
)
def test_bad_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_examples_are_evenly_apart(tiny: Config) -> None:
    test = transformer_stability.load(tiny).test
    few = transformer_stability.evenly(test, 3)
    assert few.file_row.tolist() == [test.file_row[0], test.file_row[12], test.file_row[-1]]
    assert len(transformer_stability.evenly(test, 10**6)) == len(test)


# ---- on Python's documentation -------------------------------------------------------------------


def run(study: Any) -> Findings:
    point = Config(study=study)
    return transformer_stability.run(point, transformer_stability.load(point))


@pytest.mark.slow
def test_normalised_queries_and_keys_hold_the_logits() -> None:  # 22
    table = run(Rates(interventions=("none", "qk_norm"), every=300, replicas=2))
    rates = list(Rates().rates)
    logits, sensitivity = {}, {}
    for name in ("none", "qk_norm"):
        logits[name] = of(table, "max_logit", step=300, intervention=name, rate=0.1)
        losses = of(table, "test_loss", step=300, intervention=name).reshape(7, 2).T
        initial = of(table, "test_loss", step=0, intervention=name, rate=0.1)
        sensitivity[name] = statistics.learning_rate_sensitivity(rates, losses, initial)
    assert (logits["none"] / logits["qk_norm"]).min() > 30
    assert (sensitivity["none"] - sensitivity["qk_norm"]).min() >= 0.05


@pytest.mark.slow
def test_logits_grow_with_width_and_foretell_the_next() -> None:  # 23
    study = Widths(interventions=("none",), rates=(1e-2, 3e-2), replicas=2)
    table = run(study)
    for rate in study.rates:
        means = []
        for width in study.widths:
            steps = [of(table, "max_logit", width=width, rate=rate, step=t) for t in range(70, 81)]
            means.append(np.log(np.mean(steps, axis=0)).mean())
        if rate == 3e-2:
            assert np.diff([means[study.widths.index(w)] for w in (16, 32, 64)]).min() > 0
        sizes = [of(table, "parameters", width=w, step=0)[0] for w in study.widths]
        found = statistics.extrapolate(sizes[:-1], np.exp(means[:-1]), sizes[-1:])
        assert abs(np.log10(found.mean[0]) - means[-1] / np.log(10)) <= 0.5
