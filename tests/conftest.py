"""Settings that catch JAX bugs; they must be in the environment before jax is imported."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# Compiling dominates most files (test_elr: 100 s of CPU, 72 without optimisation), not those that
# train for long (test_example_scores: 68 s, and 139). Optimised programs are asked for by name.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Compiling is most of the tests' time, and many tests run the same program: compile it once a
# session, whichever worker gets there first.
_session = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
_cache = Path(tempfile.gettempdir()) / f"training-dynamics-tests-{_session}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


FEW = r"needs \d+ devices, this machine has \d"

# What takes long to compile and is a variant of what is tried on an MLP, a smaller mesh or another
# option: tried by `make slow`, so that all the rest takes minutes on two cores.
LONG = re.compile(
    "|".join(
        [
            r"test_fit\.py::.*transformer",
            r"test_elr\.py::test_(composes|elr_plus_follows_the_algorithm\[options[12]\])",
            r"test_elr\.py::test_replicas_have_their_own",
            r"test_elr\.py::test_a_run_cut_and_continued_has_the_same_bits\[elr_plus\]",
            r"test_elr\.py::test_accumulation_writes_the_same_rows\[convnet\]",
            r"test_mesh\.py::test_every_mesh_gives_the_same_trajectory\[(convnet|transformer)-2x2x2-tp\]",
            r"test_mesh\.py::test_every_mesh_gives_the_same_trajectory\[mlp-1x1x8-tp\]",
            r"probes/test_streaming\.py::test_meshes_and_ways_agree\[(shape1-vmap|shape0-dispatch)\]",
            r"test_early_learning_theory\.py::test_points_and_replicas",
            r"test_stability\.py::test_the_table_of_spectra",
            r"test_data_diet\.py::test_every_study.*\[Rescoring\]",
            r"test_elr\.py::test_a_step_moves_rows_and_never_the_table\[shape[01]\]",
            r"probes/.*(transformer|convnet)\b",
            r"probes/test_path\.py::test_meshes_and_ways_agree.*2x2x2",
            r"probes/test_(velocity|streaming)\.py::test_tokens",
            r"probes/test_memorisation\.py::.*elr_plus",
            r"test_ghost_models\.py::.*(resnet 18|resnet 50|ntk)\]",
            r"test_own_models\.py::.*\[(flax|attention)\]",
            r"test_features\.py::.*\[resnet\]",
            r"test_adele\.py::test_convolutions_over_scales",
            r"test_data_diet\.py::test_(barriers_on_digits|a_diverging_point)",
            r"test_data_diet\.py::test_the_mesh_is_checked_for_what_a_study_trains\[[1-9]\]",
            r"test_early_learning\.py::test_(lambda_and_beta_matter|controls_memorise|elr_with_noise)",
            r"test_segmentation_noise\.py::test_(the_table|methods_are_paired)",
            r"test_command\.py::test_run_sweep_and_draw",
            r"test_trace\.py::test_xtrace_wins",
            r"test_pvi\.py::test_the_null_model_learns",
        ]
    )
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marked before the command line's ``-m`` chooses."""
    for item in items:
        if LONG.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """A machine of few devices, as one with a GPU, skips what needs a mesh of more."""
    report = yield
    if call.excinfo is not None and re.search(FEW, str(call.excinfo.value)):
        if len(sys.modules["jax"].devices()) < 8:
            path, line, _ = item.location
            report.outcome, report.longrepr = "skipped", (path, line or 0, str(call.excinfo.value))
    return report


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Compiled programs of a module go with it; the cache on the disk knows them if need be."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(_cache, ignore_errors=True)
