"""Settings that catch JAX bugs; they must be in the environment before jax is imported."""

import os

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
