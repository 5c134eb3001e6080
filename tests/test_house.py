"""Lint, format and types are part of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("command", [("check",), ("format", "--check")])
def test_ruff(command: tuple[str, ...]) -> None:
    pytest.importorskip("ruff")
    done = call("ruff", *command)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pyright() -> None:
    pytest.importorskip("pyright")
    if call("pyright", "--version").returncode:
        pytest.skip("pyright can't start here: it needs node, or a network to fetch it once")
    done = call("pyright", "--pythonpath", sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
