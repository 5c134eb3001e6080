import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.__main__ import BENCHMARKS
from benchmarks.measure import OverError, Result, race
from benchmarks.scores import Same

ROOT = Path(__file__).parents[2]


def test_sides_take_turns_and_are_ended():
    heard, ended = [], []

    def side(name):
        def run(lap):
            try:
                while True:
                    heard.append(name)
                    lap()
            except OverError:
                ended.append(name)
                raise

        return run

    found = race({"a": side("a"), "b": side("b")}, rounds=2)
    assert heard == ["a", "b"] * 5
    assert ended == ["a", "b"]
    assert all(seconds.shape == (5,) for seconds in found.seconds.values())


def test_an_error_of_a_side_is_raised():
    def broken(lap):
        lap()
        raise KeyError("here")

    with pytest.raises(KeyError, match="here"):
        race({"broken": broken}, rounds=2)


def test_goals():
    assert Result("a", "", ratio=1.0, goal=1.0).met
    assert not Result("a", "", ratio=float("nan"), goal=1.0).met
    assert Result("a", "", ratio=1.0).met is None
    assert Result("a", "", goal=1.0, skipped="no torch").met is None


@pytest.fixture
def lenient():
    """What we race with promotes as jax does by itself."""
    before = jax.config.jax_numpy_dtype_promotion, jax.config.jax_numpy_rank_promotion
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", before[0])
    jax.config.update("jax_numpy_rank_promotion", before[1])


@pytest.mark.parametrize("name", ["grand_mlp", "grand_convnet", "dataset", "importance"])
def test_scores_run(name, lenient):
    rows = {row.name: row for row in BENCHMARKS[name](True)}
    assert rows
    assert all(row.skipped or np.isfinite(row.ratio) for row in rows.values())
    if name == "grand_mlp":  # counted, so true on a busy machine
        assert rows["grand_mlp_flops"].met and rows["grand_mlp_memory"].met


def test_norms_that_differ_are_not_raced():
    same = Same()
    same.check("ghost", np.array([1.0, 2.0]))
    same.check("vmap", np.array([1.0, 2.00001]))
    with pytest.raises(ValueError, match="torch differs"):
        same.check("torch", np.array([1.0, 2.1]))
    with pytest.raises(ValueError, match="torch differs"):
        same.check("torch", np.array([1.0, np.nan]))


@pytest.mark.slow
def test_quick_run_writes_the_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path)]
    strict = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")  # not for what we race with
    settings = {name: value for name, value in os.environ.items() if name not in strict}
    settings |= {"JAX_NUM_CPU_DEVICES": "2", "DYNAMICS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = found["results"]
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert {"fit_mnist", "population", "convnet", "order_sort", "checkpoint_mnist"} <= set(names)
    assert {"grand_mlp_vmap", "grand_convnet_torch", "el2n_dataset", "sampled"} <= set(names)
    assert {"grand_resnet_vmap", "grand_transformer_vmap"} <= set(names)  # slow to compile
    assert all(row["skipped"] or np.isfinite(row["ratio"]) for row in rows)
    assert next(row for row in rows if row["name"] == "compiled")["ours"] == 0
    table = next(tmp_path.glob("*.md")).read_text()
    assert table.strip().endswith(done.stdout.strip())
    assert all(f"| {name} " in table for name in names)
