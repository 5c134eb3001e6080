"""A sweep in several processes, and the examples of the page about it."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("submitit")
yaml = pytest.importorskip("yaml")


from dynamics import config as configs  # noqa: E402
from dynamics import record  # noqa: E402
from experiments import __main__ as cli  # noqa: E402
from experiments import early_learning_theory as theory  # noqa: E402
from experiments import launch, worker  # noqa: E402

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "launching.md").read_text()
NAME = "early_learning_theory"
PRESET = f"configs/{NAME}/default.py"
STUDY = theory.Distillation(replicas=2, validated=4, examples=4)
GRID = {"study.steps": (2, 3, 4), "seed": (0, 1, 2, 3)}
POINTS = configs.grid(theory.Config(study=STUDY), GRID)
SWEEP = [
    *("sweep", NAME, PRESET, "--study", "distillation", "--study.replicas", "2"),
    *("--study.validated", "4", "--study.examples", "4"),
    *("--study.steps", "2", "3", "4", "--seed", "0", "1", "2", "3"),
]


@pytest.fixture(autouse=True)
def here(monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    monkeypatch.setenv("DYNAMICS_CACHE", os.environ["JAX_COMPILATION_CACHE_DIR"])


# ---- a worker is killed -------------------------------------------------------------------------


def kill_who_takes(unit: launch.Unit, home: Path, over: threading.Event, killed: list[int]) -> None:
    """SIGKILL every worker that begins the unit, until the launch is over."""
    while not over.wait(0.005):
        for folder in home.glob("launches/*"):
            beside = worker.job_of(folder, unit, "taken")  # submitit's process beside the worker
            if beside and not worker.done(home, unit):
                children = Path(f"/proc/{beside}/task/{beside}/children")
                for pid in map(int, children.read_text().split() if children.exists() else ()):
                    if pid not in killed:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)


def began(home: Path) -> list[set[str]]:
    """Of each launch the units that were begun."""
    return [{p.stem for p in f.glob("*.taken")} for f in sorted(home.glob("launches/*"))]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a worker through /proc")
def test_a_killed_worker_takes_no_other_with_it(tmp_path: Path, capsys: Any) -> None:
    home, command = tmp_path / NAME, [*SWEEP, "--runs", str(tmp_path), "--workers", "2"]
    cut = launch.units(POINTS, 2)
    victim, over, killed = cut[0], threading.Event(), []
    killer = threading.Thread(target=kill_who_takes, args=(victim, home, over, killed))
    killer.start()
    try:
        assert cli.main(command) == 1
    finally:
        over.set()
        killer.join()
    said = capsys.readouterr().err
    assert len(killed) == 1 + launch.AGAIN
    assert f"{len(victim)} of 12 runs of {NAME} are missing" in said
    assert "its worker died 2 times" in said and "_log.err" in said
    assert "the same command computes what is missing" in said
    others = [point for unit in cut[1:] for point in unit]
    assert worker.done(home, others) and not any(worker.done(home, (p,)) for p in victim)

    stamps = {path: path.stat() for path in home.glob("*/done.json")}
    assert len(stamps) == len(others)
    assert cli.main(command) == 0
    assert f"12 runs of {NAME}" in capsys.readouterr().out
    assert all(path.stat() == stamp for path, stamp in stamps.items())
    assert began(home)[1:] == [{configs.fingerprint(victim)}]
    assert len(list(sorted(home.glob("launches/*"))[1].glob("*_submitted.pkl"))) == 1

    assert cli.main(command) == 0 and len(began(home)) == 2  # nothing is left to launch
    for group in configs.group(POINTS):
        for point, table in zip(group, theory.sweep(group), strict=True):
            found = record.read(home / configs.fingerprint(point))
            for name, values in table.rows.items():
                np.testing.assert_array_equal(found.rows[name].to_numpy(), values)
            for name, values in table.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], values)
