"""Lint, format and types are part of the tests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.py"))
ARITHMETIC = re.compile(r"np\.(?:repeat|tile|lexsort)\b|\bpartition\([\"']@|\bremoveprefix\(")


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


def test_experiments_do_no_index_arithmetic_and_take_no_names_apart() -> None:
    """Members are rows of a table, and what was measured is found by its labels."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in EXPERIMENTS
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ARITHMETIC.search(line)
    ]
    assert not found, "\n".join(found)


def test_experiments_are_at_most_5200_lines() -> None:
    assert sum(len(path.read_text().splitlines()) for path in EXPERIMENTS) <= 5200
