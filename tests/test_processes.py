"""Runs of several processes: what one gives, stopped together, and ended when one is lost."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from processes import EVERY, start, trained

from dynamics.checkpoint import PENDING, Checkpoints
from dynamics.hosts import LOST

STEPS = 200
LIMIT = 120  # seconds; a run that takes longer hangs


def saved(folder: Path) -> list[int]:
    seals = folder.glob("*/checksums/*.json")
    return sorted(int(seal.stem) for seal in seals if seal.read_text() != PENDING)


def log(folder: Path, process: int) -> str:
    return Path(f"{folder}.{process}.log").read_text()


def begun(folder: Path, count: int, devices: int, shape: tuple[int, ...]) -> list[subprocess.Popen]:
    """The processes, once a checkpoint is there."""
    running = start(folder, count, devices, shape, STEPS)
    until = time.monotonic() + LIMIT
    while not saved(folder) and time.monotonic() < until:
        assert all(process.poll() is None for process in running), log(folder, 0)
        time.sleep(0.02)
    return running


def ended(running: list[subprocess.Popen]) -> list[int]:
    """The exit status of each; a hang is an error."""
    try:
        return [process.wait(timeout=LIMIT) for process in running]
    finally:
        for process in running:
            process.kill()


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """One process, undisturbed."""
    return trained(tmp_path_factory.mktemp("alone") / "run", (1, 4, 1), STEPS)


def test_two_processes_stop_together_and_go_on(tmp_path: Path, alone: dict) -> None:
    """Asked by one of them; gradients are reduced across both."""
    folder = tmp_path / "run"
    running = begun(folder, 2, 2, (1, 4, 1))
    running[1].send_signal(signal.SIGTERM)
    assert ended(running) == [143, 143], log(folder, 0) + log(folder, 1)
    (at,) = saved(folder)[-1:]
    assert at < STEPS
    assert f"stopped by SIGTERM at step {at}" in log(folder, 0)
    assert f"stopped by SIGTERM at step {at}" in log(folder, 1)
    assert ended(start(folder, 2, 2, (1, 4, 1), STEPS)) == [0, 0], log(folder, 0) + log(folder, 1)
    first, second = (dict(np.load(f"{folder}.{process}.npz")) for process in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    close(first, alone)
    rows = first["rows.step"] * 10 + first["rows.member"]
    assert len(np.unique(rows)) == len(rows) == STEPS * 4  # each once
    tested = first["test.step"] * 10 + first["test.member"]
    assert len(np.unique(tested)) == len(tested) == (STEPS // EVERY + 1) * 4


def test_the_others_end_when_one_is_killed(tmp_path: Path, alone: dict) -> None:
    """And one process with other devices goes on where they were."""
    folder = tmp_path / "run"
    running = begun(folder, 4, 1, (2, 2, 1))
    running[2].kill()
    assert ended(running)[2] == -signal.SIGKILL
    for process in (0, 1, 3):
        assert running[process].returncode == LOST, log(folder, process)
        said = log(folder, process)
        assert "process 2 of 4 has given no sign of life" in said, said
        assert "Start all again to continue from the newest checkpoint" in said
    (run,) = folder.iterdir()
    at = Checkpoints(run).steps()[-1]
    assert EVERY <= at < STEPS
    close(trained(folder, (2, 1, 1), STEPS), alone)


@pytest.mark.slow
def test_one_that_does_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives, and the other waits for it as long as it was told."""
    monkeypatch.setenv("SLEEPER", "1")
    folder = tmp_path / "run"
    running = start(folder, 2, 1, (2, 1, 1), STEPS, patience=5)
    assert running[0].wait(timeout=LIMIT) == LOST, log(folder, 0)
    assert ended(running)[1] == LOST, log(folder, 1)
    for process in range(2):
        assert "process 1 of 2 is at step 20, where others have waited for it" in log(
            folder, process
        )


@pytest.mark.slow
def test_one_that_is_suspended(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    running = begun(folder, 2, 1, (1, 2, 1))
    running[1].send_signal(signal.SIGSTOP)
    assert running[0].wait(timeout=LIMIT) == LOST, log(folder, 0)
    assert "process 1 of 2 has given no sign of life" in log(folder, 0)
    running[1].kill()
    assert ended(running) == [LOST, -signal.SIGKILL]


@pytest.mark.slow
def test_the_first_is_killed(tmp_path: Path) -> None:
    """jax itself ends the others, for its service was there; they can be started again."""
    folder = tmp_path / "run"
    running = begun(folder, 2, 1, (1, 2, 1))
    running[0].kill()
    assert ended(running)[1] not in (0, None)
    assert "Terminating process because" in log(folder, 1)
    assert ended(start(folder, 2, 1, (1, 2, 1), STEPS)) == [0, 0]
