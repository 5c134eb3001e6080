"""A few rounds of ``python tests/faults.py``, which must end well."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel for faults")


def rounds(number: int, seed: int, *options: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name("faults.py")), f"--rounds={number}"]
    done = subprocess.run([*command, f"--seed={seed}", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_faults() -> None:
    """Two kills, what damages a run that goes on, and one that is finished."""
    kinds = ("SIGKILL", "SIGTERM", "file size limit", "flipped bit", "flipped bit, finished run")
    said = rounds(5, 1, *[f"--only={kind}" for kind in kinds])
    assert "| all | 5 |" in said


@pytest.mark.slow
def test_every_kind_of_fault() -> None:
    rounds(36, 2)
