"""What lies between two parameter vectors."""

from dynamics.landscape.path import barrier, between, has_statistics, reestimated

__all__ = ["barrier", "between", "has_statistics", "reestimated"]
