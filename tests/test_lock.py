"""One process at a time writes a store: the second gets one sentence, and nothing is left held."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dynamics import artefact
from dynamics.checkpoint import Checkpoints
from dynamics.config import fingerprint
from dynamics.record import Array, Findings, Recorder, RecordError, completed, lock, read
from dynamics.types import TrainState

HOLD = """
import sys, time
from dynamics.record import Recorder
recorder = Recorder(sys.argv[1], ("run",))
print("has it", flush=True)
time.sleep(float(sys.argv[2]))
"""


def holding(folder: Path, seconds: float = 600) -> subprocess.Popen:
    """Another process that has a store."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    return process


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_second_process_gets_one_sentence(tmp_path: Path, end: int | None) -> None:
    process = holding(tmp_path, 600 if end else 1)
    try:
        before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
        said = f"{tmp_path} is being written by process {process.pid} on .*: wait until that has"
        with pytest.raises(RecordError, match=said):
            Recorder(tmp_path, ("run",))
        after = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
        assert after == before and not read(tmp_path).done  # it can be read
        if end:
            process.send_signal(end)
    finally:
        process.wait(timeout=60) if end is None else process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    Recorder(tmp_path, ("run",)).append("rows", {"step": np.arange(2)})  # however it ended


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
def test_points_and_groups_of_another_process_are_refused_before_anything_is_computed(
    tmp_path: Path,
) -> None:
    process = holding(tmp_path / fingerprint("run"))
    try:
        with pytest.raises(RecordError, match="is being written by process"):
            completed(tmp_path, ["run"], lambda points, recorder: [], {})
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
def test_checkpoints_alone_and_saved_states_are_locked_too(tmp_path: Path) -> None:
    state = TrainState(np.int32(0), {"w": np.zeros(1)}, {}, (), {}, np.zeros(1), np.int32(1))
    process = holding(tmp_path)
    try:
        for write in (Checkpoints, lambda folder: artefact.save(folder, state)):
            with pytest.raises(RecordError, match=f"is being written by process {process.pid} on"):
                write(tmp_path)
        assert Checkpoints(tmp_path, read_only=True).steps() == []
        assert not (tmp_path / "checkpoints").exists()
    finally:
        process.kill()
        process.communicate()
    checkpoints = Checkpoints(tmp_path)
    code = f"from dynamics.record import Recorder; Recorder({str(tmp_path)!r}, ('run',))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"is being written by process {os.getpid()} on" in done.stderr
    checkpoints.close()
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
def test_checkpoints_leave_a_recorder_its_lock(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ("run",))
    Checkpoints(tmp_path).close()
    assert lock.is_locked(tmp_path)
    recorder.finish(Findings({}))
    assert not lock.is_locked(tmp_path)


def test_a_process_may_open_its_own_store_again(tmp_path: Path) -> None:
    first = Recorder(tmp_path, ("run",))
    second = Recorder(tmp_path, ("run",))
    second.finish(Findings({}, {"x": Array(np.zeros(1), ("x",))}))
    assert read(tmp_path).done and not (tmp_path / lock.NAME).exists()
    del first, second


@pytest.mark.skipif(lock.fcntl is None, reason="no locks on this system")
def test_a_recorder_that_is_gone_and_one_that_is_finished_have_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "gone", ("run",))
    del recorder
    finished = Recorder(tmp_path / "finished", ("run",))
    finished.finish(Findings({}))
    for name in ("gone", "finished"):
        process = holding(tmp_path / name, 0)
        process.communicate()
        assert process.returncode == 0


def test_a_removed_store_is_begun_anew_by_the_same_process(tmp_path: Path) -> None:
    first = Recorder(tmp_path / "run", ("run",))
    shutil.rmtree(tmp_path / "run")
    second = Recorder(tmp_path / "run", ("another",))
    second.append("rows", {"step": np.arange(2)})
    assert len(read(tmp_path / "run").frames["rows"]) == 2 and first is not second
    if lock.fcntl is not None:
        code = f"from dynamics.record import Recorder; Recorder({str(tmp_path / 'run')!r}, 0)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "RecordError" in done.stderr and "is being written by" in done.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_works_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Without:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_: int) -> None:
            raise OSError(number, os.strerror(number))

    for name, found in (("refused", Without), ("missing", None)):
        monkeypatch.setattr(lock, "fcntl", found)
        recorder = Recorder(tmp_path / name, ("run",))
        recorder.append("rows", {"step": np.arange(2)})
        recorder.finish(Findings({}))
        assert read(tmp_path / name).done
