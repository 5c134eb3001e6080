"""The empirical neural tangent kernel, how far it moves, and regression with a kernel."""

from dynamics.kernel import ridge
from dynamics.kernel.ntk import ntk
from dynamics.kernel.velocity import velocity

__all__ = ["ntk", "ridge", "velocity"]
