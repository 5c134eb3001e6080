"""A few rounds of ``python tests/kill.py``."""

import subprocess
import sys
from pathlib import Path

import pytest


def rounds(kills: int, terminations: int, seed: int) -> None:
    script = Path(__file__).with_name("kill.py")
    command = [sys.executable, str(script), f"--kills={kills}", f"--term={terminations}"]
    done = subprocess.run([*command, f"--seed={seed}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal bit for bit, nothing left behind" in done.stdout


def test_a_killed_run_ends_with_the_same_bits() -> None:
    rounds(kills=2, terminations=1, seed=1)


@pytest.mark.slow
def test_a_run_killed_ten_times() -> None:
    rounds(kills=10, terminations=3, seed=2)
