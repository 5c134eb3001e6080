"""The command line as a stranger meets it."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from dynamics import config as configs
from dynamics import record, scores
from runner import command as cli

ROOT = Path(__file__).parent.parent.parent
PRESET = "configs/data_diet/digits.py"
SMALL = [
    *("--data.num-train", "200", "--data.num-test", "50", "--train.batch-size", "20"),
    *("--score.draws", "2", "--score.replicas", "2", "--study.scored-at", "1"),
    *("--study.replicas", "2", "--study.epochs", "1"),
]
EPOCHS = ["--score.epochs", "0", "1", "--score.also"]  # of one run
EPOCHS_SWEPT = ["--score.epochs", "[0, 1]", "--score.also", "[]"]  # a list is one value there


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"} | environment,
        capture_output=True,
        text=True,
    )


def entries(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if p.name.endswith("-cache")}


def test_run_sweep_and_draw(tmp_path: Path) -> None:
    runs, cache = str(tmp_path / "runs"), tmp_path / "cache"
    rate = ("--train.optimizer.learning-rate", "0.05")
    one = ("experiments", "data_diet", PRESET, *SMALL, *EPOCHS, *rate)
    first = call(*one, "--runs", runs, DYNAMICS_CACHE=str(cache))
    assert first.returncode == 0, first.stderr
    assert "1 run of data_diet" in first.stdout and "retrain: step 10 of 10" in first.stderr
    compiled = entries(cache)
    assert compiled
    again = call(*one, "--runs", runs, DYNAMICS_CACHE=str(cache))
    assert again.returncode == 0 and "retrain" not in again.stderr
    elsewhere = call(*one, "--runs", str(tmp_path / "more"), DYNAMICS_CACHE=str(cache))
    assert elsewhere.returncode == 0 and "retrain: step 10 of 10" in elsewhere.stderr
    assert entries(cache) == compiled  # the second run of anything compiles nothing
    grid = ("--train.optimizer.learning-rate", "0.05", "0.1", "--model.width", "128", "16")
    swept = call(
        *("experiments", "sweep", "data_diet", PRESET, *SMALL, *EPOCHS_SWEPT, *grid),
        *("--runs", runs),
    )
    assert swept.returncode == 0, swept.stderr
    assert "4 runs of data_diet" in swept.stdout
    assert swept.stdout.count("train.optimizer.learning_rate=0.05") == 2
    assert len(list((tmp_path / "runs" / "data_diet").glob("*/done.json"))) == 4
    drawn = call("paper_figures", "data_diet", "--runs", runs, "--out", str(tmp_path / "out"))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "out" / "data_diet_pruning.pdf").exists()
    assert "claims on digits" in drawn.stdout
    for done in sorted((tmp_path / "runs" / "data_diet").glob("*/done.json"))[:1]:
        check_export(done.parent, tmp_path / "exported")


def check_export(run: Path, out: Path) -> None:
    """Scores and a subset of a run, as npz and parquet, in the order of the dataset."""
    options = ("--keep", "0.3", "--score", "el2n", "--drop", "0.1", "--out", str(out))
    done = call("experiments", "export", str(run), *options)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    arrays = {name: array.values for name, array in record.read(run).arrays.items()}
    columns = dict(np.load(out / "scores.npz"))
    table = pl.read_parquet(out / "scores.parquet")
    assert table.columns == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(table[name].to_numpy(), values)
    np.testing.assert_array_equal(columns["index"], arrays["index"])
    np.testing.assert_allclose(columns["el2n"], arrays["el2n"].mean(axis=0), rtol=1e-6)
    error = arrays["el2n"].std(axis=0, ddof=1) / np.sqrt(4)  # of 2 draws
    np.testing.assert_allclose(columns["el2n_se"], error, rtol=1e-4, atol=1e-9)
    subset, about = np.load(out / "subset.npz"), json.loads((out / "subset.json").read_text())
    expected = scores.window(columns["el2n"], 60, drop=20)
    np.testing.assert_array_equal(subset["row"], expected)
    np.testing.assert_array_equal(subset["index"], arrays["index"][expected])
    assert about["run"] == run.name and about["replicas"]["el2n"] == 4
    assert about["data"] == record.read(run).provenance["data"]
    assert about["chosen"]["count"] == 60
    for wrong in (("--keep", "2"), ("--keep", "0.5", "--score", "el3n")):
        refused = call("experiments", "export", str(run), "--score", "el2n", *wrong)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "no experiment 'nothing'; there are: data_diet"),
        (["data_diet", "nope.py"], "no preset file nope.py; there are: configs/data_diet"),
        (["data_diet", "--train.batch-size", "500"], "train.batch_size 500 is more than the 135"),
        (["data_diet", "--model", "foo"], "Config.model must be Linear or MLP"),
        (["data_diet", "--study", "foo"], "Config.study must be Pruning or Timing or Window"),
        (["data_diet", "--study.scored-at", "3"], "study.scored_at must be one of score.epochs"),
        (["export", "nowhere"], "nowhere holds no run"),
        (["data_diet", "--mesh", "16", "1", "1"], "needs 16 devices, this machine has 8"),
        (["data_diet", "--data.source", "mnist"], "set DYNAMICS_DATA or --data-folder"),
        (["data_diet", "--data.num-train", "5000"], "num_train"),
        (["sweep", "data_diet"], "nothing to sweep"),
        (["sweep", "data_diet", PRESET, "0.1"], "expected --field VALUE"),
        (["sweep", "data_diet", "--noise"], "grid: 'noise' has no values"),
        (["sweep", "data_diet", "--train.lr", "1"], "Train has no field 'lr'"),
        (["sweep", "data_diet", "--train.optimizer.lr", "1"], "SGD has no field 'lr'"),
        (["data_diet", "--train.optimizer", "adm"], "Train.optimizer must be SGD or Adam, got"),
        (["sweep", "data_diet", "--noise", "high"], "Config.noise must be float, got 'high'"),
    ],
)
def test_refusals(argv: list[str], message: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DYNAMICS_DATA", raising=False)
    monkeypatch.setenv("DYNAMICS_CACHE", "off")
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.splitlines()) == 1
    assert printed.out == ""


def test_a_preset_of_something_else_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "odd.py").write_text("config = 3\n")
    assert cli.main(["data_diet", str(tmp_path / "odd.py")]) == 2
    assert "must define config = Config(...)" in capsys.readouterr().err


def test_help_names_every_value(capsys: Any) -> None:
    assert cli.main(["data_diet", "--model", "convnet", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--train.optimizer {sgd,adam}: which kind" in shown
    assert "second-moment" not in shown  # of Adam
    assert cli.main(["data_diet", "--train.optimizer=adam", "--help"]) == 0
    adam = capsys.readouterr().out
    assert "--train.optimizer.second-moment" in adam and "nesterov" not in adam
    for text in (
        "--model.channels",
        "--train.optimizer.learning-rate",
        "(default: 0.02)",
        "--study.fractions",
    ):
        assert text in shown


@pytest.mark.parametrize("name", [p.name for p in (ROOT / "configs").iterdir() if p.is_dir()])
def test_every_experiment_has_help_for_every_study(name: str, capsys: Any) -> None:
    module = importlib.import_module(f"experiments.{name}")
    for study in [None, *configs.choices(module.Config()).get("study", {})]:
        argv = [name, *(["--study", study] if study else []), "--help"]
        assert cli.main(argv) == 0
        shown = capsys.readouterr().out
        assert "--seed INT" in shown and "Seed of " in shown
        assert not re.search(r"--[\w.-]+ [^\n]*\n\W+(Of|Its|Their) ", shown), "a riddle"


def test_help_for_a_sweep_is_of_a_sweep(capsys: Any) -> None:
    assert cli.main(["sweep", "data_diet", PRESET, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "sweep data_diet [PRESET.py] [--field VALUE VALUE ...]" in shown
    assert "--train.optimizer.learning-rate, " in shown and "--workers N" in shown
    assert cli.main(["plan", "data_diet", "--help"]) == 0 and "usage" in capsys.readouterr().out
