"""Reductions on a CPU: XLA's own, which keep NaN and don't stop for ever."""

import os
import subprocess
import sys

import pytest

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
LARGEST = """
import jax, jax.numpy as jnp
x = jnp.ones((128, 128)).at[5, 6].set(jnp.nan)
print(jax.jit(lambda x: jnp.max(jnp.abs(x)))(x))
"""
LINEAR_ALGEBRA = """
from dynamics import mesh
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import PartitionSpec

def one(x):
    values, vectors = jnp.linalg.eigh(x @ x.T / len(x))
    return jnp.sum(x**2), values[-1], jnp.sum(vectors**2 * values[None])

lies, devices = PartitionSpec("replica"), mesh.make(len(jax.devices()))
run = jax.jit(jax.shard_map(jax.vmap(one), mesh=devices, in_specs=lies, out_specs=lies))
x = np.random.default_rng(0).normal(size=(64, 60, 100)).astype(np.float32)
for _ in range(60):
    out = run(x)
print(np.isfinite(jax.device_get(out)[0]).all())
"""


def python(code: str, devices: int = 2, flags: str = "") -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "XLA_FLAGS": flags}
    env |= {"JAX_PLATFORMS": "cpu"}
    env.pop("JAX_NUMPY_RANK_PROMOTION", None)
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )


def test_the_largest_of_numbers_one_of_which_is_nan_is_nan() -> None:
    done = python("from dynamics import mesh" + LARGEST)
    assert done.stdout.split() == ["nan"], done.stderr


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_batched_linear_algebra_beside_reductions_ends_on_several_devices(devices: int) -> None:
    """Stops for ever on two cores where reductions are handed to YNNPACK."""
    done = python(LINEAR_ALGEBRA, devices)
    assert done.stdout.split() == ["True"], done.stderr


@pytest.mark.parametrize(
    ("flags", "late", "why"),
    [
        ("", True, "jax was started before dynamics.mesh was imported"),
        (f"{FLAG}+eltwise", False, "XLA_FLAGS has"),
        (f"{FLAG}dot,reduce", False, "XLA_FLAGS has"),
        (f"{FLAG}-reduce", True, ""),
        (f"{FLAG}dot", False, ""),
        (FLAG, False, ""),
    ],
)
def test_settings_that_bring_it_back_are_said(flags: str, late: bool, why: str) -> None:
    first = "import jax; jax.devices(); " if late else ""
    done = python(f"{first}from dynamics import mesh; mesh.make(1); mesh.make(2)", 2, flags)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("may stop for ever") == bool(why), done.stderr
    assert why in done.stderr


def test_other_flags_are_kept() -> None:
    code = "from dynamics import mesh; import os; print(os.environ['XLA_FLAGS'])"
    done = python(code, flags="--xla_cpu_enable_fast_math=false")
    assert done.stdout.split() == ["--xla_cpu_enable_fast_math=false", f"{FLAG}-reduce"]
