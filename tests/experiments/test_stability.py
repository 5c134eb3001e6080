"""The edge of stability on digits: checks 9 to 13 and 25 of the specification."""

import dataclasses
from typing import Any

import numpy as np
import polars as pl
import pytest

from dynamics import training
from dynamics.data import DataConfig
from dynamics.models import MLP
from dynamics.record import Findings
from experiments import stability
from experiments.stability import Batches, Config, Edge, Spectra
from experiments.stability.edge import setting

TINY = Config(
    data=DataConfig(num_train=40),
    model=MLP(width=8, depth=1, activation="tanh"),
    study=Edge(rules=("gd", "adam"), steps=8, every=4, replicas=2),
)


def rows(frame: pl.DataFrame, **equal: Any) -> pl.DataFrame:
    here = frame.filter(**equal)
    assert len(here), equal
    return here


def test_the_frame_of_spectra() -> None:
    study = Spectra(steps=6, measured=(0, 3, 9), k=4, num=3, replicas=2)
    found = stability.run(dataclasses.replace(TINY, study=study), stability.load(TINY))
    assert found.arrays["nodes"].dims == ("step", "replica", "vector", "node")
    assert found.arrays["nodes"].coords["step"].tolist() == [0, 3, 6]
    nodes, weights = (found.arrays[name].values for name in ("nodes", "weights"))
    assert nodes.shape == weights.shape == (3, 2, 3, 4)
    for i, step in enumerate((0, 3, 6)):
        for replica in range(2):
            here = rows(found.frames["spectra"], step=step, replica=replica)
            n = 64 * 8 + 8 + 8 * 10 + 10
            trace = n * (nodes[i, replica] * weights[i, replica]).sum(-1)
            np.testing.assert_allclose(here["trace"], trace.mean(), rtol=1e-5)
            np.testing.assert_allclose(here["trace_error"], trace.std(ddof=1) / 3**0.5, rtol=1e-4)
            assert nodes[i, replica].max() < here["sharpness"][0] * (1 + 1e-5)
            np.testing.assert_allclose(here["sharpness"] / here["ratio"], 2 / 0.3, rtol=1e-5)


@pytest.mark.slow
def test_the_frame_of_batches(tmp_path: Any, monkeypatch: Any) -> None:
    point = dataclasses.replace(
        TINY, study=Batches(sizes=(8, 40), steps=6, every=3, averaged=1, replicas=2)
    )
    data = stability.load(point)
    frame = stability.run(point, data, store=tmp_path).frames["batches"]
    assert set(frame["size"]) == {8, 40} and set(frame["step"]) == {0, 3, 6}
    assert (frame["averaged"] == (frame["step"] == 6)).all()
    whole = rows(frame, size=40)
    np.testing.assert_allclose(whole["batch_sharpness"], whole["interaction"], rtol=1e-3)
    np.testing.assert_allclose(whole["noise"], whole["interaction"], rtol=1e-3)
    monkeypatch.setattr(training, "train", None)
    assert stability.run(point, data, store=tmp_path).frames["batches"].equals(frame)


def test_refusals() -> None:
    point = dataclasses.replace(TINY, study=Batches(sizes=(8, 41), steps=6))
    with pytest.raises(ValueError, match="study.sizes must be at most the 40 examples, got 41"):
        stability.run(point, stability.load(point))
    with pytest.raises(ValueError, match=r"Edge.rules must be one or more different"):
        Edge(rules=())
    with pytest.raises(ValueError, match="Spectra.num must be at least 2, one has no error"):
        Spectra(num=1)
    with pytest.raises(ValueError, match="Spectra.measured must be steps >= 0, got"):
        Spectra(measured=(-1,))
    assert setting("heavy_ball", Edge(), TINY).momentum == 0.9


# ---- at the size of the specification -----------------------------------------------------------


@pytest.fixture(scope="module")
def edge() -> Findings:
    """Gradient descent, Nesterov and Adam: 2,500 steps, 2 initialisations."""
    point = Config(study=Edge(rules=("gd", "nesterov", "adam"), every=50, replicas=2))
    return stability.run(point, stability.load(point))


def test_the_frames_of_the_edge(edge: Findings) -> None:
    frame = edge.frames["edge"]
    assert set(frame["rule"]) == {"gd", "adam", "nesterov", "control"}
    gd, control = (rows(frame, rule=rule) for rule in ("gd", "control"))
    assert set(gd["step"]) == set(range(0, 2501, 50)) and set(gd["replica"]) == {0, 1}
    np.testing.assert_allclose(gd["sharpness"] / gd["ratio"], 2 / 0.3, rtol=1e-5)
    np.testing.assert_allclose(control["sharpness"] / control["ratio"], 2 / 0.3 / 0.33, rtol=1e-5)
    nesterov = rows(frame, rule="nesterov")
    threshold = (2 + 2 * 0.9) / (1 + 2 * 0.9) / 0.2
    np.testing.assert_allclose(nesterov["sharpness"] / nesterov["ratio"], threshold, rtol=1e-5)
    for other in (control, nesterov):  # the same networks at the start
        a, b = (rows(part, step=0)["sharpness"] for part in (gd, other))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    assert set(rows(frame, rule="adam")["step"]) == set(range(50, 2501, 50))  # no moments before
    for rule in ("gd", "adam"):
        assert len(rows(edge.frames["loss"], rule=rule)) == 2 * 2500
    data = stability.load(TINY)
    x = (np.asarray(data.train.x, np.float32) - data.train.mean) / data.train.std
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-6)
    assert x.max() <= 1 and x.min() >= -1


def test_the_edge_of_stability(edge: Findings) -> None:
    for rule, low, high in (("gd", 0.97, 1.06), ("nesterov", 0.95, 1.07), ("adam", 0.92, 1.08)):
        for replica in range(2):  # 9, 12, 13
            found = rows(edge.frames["edge"], rule=rule, replica=replica)
            settled = found.filter("reached")["step"].to_numpy()
            assert len(settled) > 20, "the edge is not reached"
            after = found.filter(pl.col("step") >= settled[0] + 100)["ratio"].to_numpy()
            assert low <= after.mean() <= high
            if rule == "gd":
                assert np.quantile(after, 0.05) >= 0.93
                assert np.quantile(after, 0.95) <= 1.12


def test_the_loss_falls_until_the_edge(edge: Findings) -> None:
    found = rows(edge.frames["rises"], rule="gd")  # 10: at every step before it
    assert (found["before"] == 0).all() and (found["after"] > 0.1).all()
    found = rows(edge.frames["edge"], rule="control")  # 11: at a lower rate it is not reached
    assert found["ratio"].to_numpy().max() < 0.8
    rises = rows(edge.frames["rises"], rule="control")
    assert (rises["before"] == 0).all() and rises["step"].null_count() == len(rises)


@pytest.mark.slow
def test_small_batches_keep_it_lower() -> None:  # 25
    point = Config(study=Batches(replicas=2))
    frame = stability.run(point, stability.load(point)).frames["batches"].filter("averaged")
    means = [rows(frame, size=size)["ratio"].to_numpy().mean() for size in (8, 32, 128, 500)]
    assert (np.diff(means) > 0).all() and 0.95 <= means[-1] <= 1.05
