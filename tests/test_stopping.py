"""Signals: the first ends a stored run at its next chunk, the second ends the process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dynamics.stopping import interruptible, terminated
from runner.errors import answered

RUN = """
import sys
import jax
from dynamics import fit, mesh, models, optim, record, task
from dynamics.data import DataConfig, load
from dynamics.data.stream import resident
from runner.errors import answered

@answered("run")
def main(argv):
    data, rule, devices = load(DataConfig(num_train=200)), optim.SGD(), mesh.make()
    net = task.of_dataset(models.make(models.MLP(width=4, depth=1), 10), data.train)
    steps = int(argv[1])
    optimizer = rule.make(steps)
    keys = jax.random.split(jax.random.key(0), 1)
    state = fit.init(net, optimizer, keys, rule.hyperparameters(), devices)
    store = record.Recorder(argv[0], {"seed": 0})
    print("training", flush=True)
    fit.fit(net, optimizer, state, resident(data.train, 20, 1), steps, devices, store=store,
            record_every=1000)
    return 0

sys.exit(main())
"""


def started(folder: Path, steps: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(folder), str(steps)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stored_run_is_saved_and_does_not_look_finished(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = started(tmp_path / "run", 10**8)
    assert process.stdout is not None and process.stdout.readline() == "training\n"
    rows = tmp_path / "run" / "rows.jsonl"
    until = time.monotonic() + 60
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert said.count(f"stopped by {number.name} at step") == 1 and "Traceback" not in said
    run = tmp_path / "run"
    assert list((run / "checksums").iterdir()) and not (run / "done.json").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_not_training_ends_with_one_line(
    number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @answered("made up")
    def main(argv: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(10)
        return 0

    before = signal.getsignal(number)
    assert main([]) == status
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
    assert signal.getsignal(number) == before


def test_one_that_a_callback_swallows_is_heard_by_the_next_run() -> None:
    with interruptible():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            pass  # as callbacks of compiled code do
        with terminated(listen=True) as asked:
            assert asked.is_set() and asked.status == 130
    with terminated(listen=True) as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # another one: it is asked already
        assert asked.name == "SIGTERM" and asked.status == 143


def test_the_same_signal_again_ends_the_process_at_once() -> None:
    code = """
import os, signal, time
from dynamics.stopping import terminated
with terminated(listen=True):
    os.kill(os.getpid(), signal.SIGINT)
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT and done.stdout == "asked\n" and not done.stderr
