"""What lies between two parameter vectors."""

from dynamics.landscape.path import barrier, between, reestimated

__all__ = ["barrier", "between", "reestimated"]
