import functools

import jax
import pytest


@pytest.fixture(scope="session")
def jit():
    """``jax.jit`` without optimisation: tiny nets spend their time in the compiler."""
    return functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
