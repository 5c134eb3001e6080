"""Settings that catch JAX bugs; they must be in the environment before jax is imported."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Compiling is most of the tests' time, and many tests run the same program: compile it once a
# session, whichever worker gets there first.
_session = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
_cache = Path(tempfile.gettempdir()) / f"training-dynamics-tests-{_session}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Compiled programs of a module go with it; the cache on the disk knows them if need be."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(_cache, ignore_errors=True)
