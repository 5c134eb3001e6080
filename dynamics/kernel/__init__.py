"""The empirical neural tangent kernel, and how far it moves."""

from dynamics.kernel.ntk import ntk
from dynamics.kernel.velocity import velocity

__all__ = ["ntk", "velocity"]
