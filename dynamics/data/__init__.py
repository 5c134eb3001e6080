"""Data: files, their rows as datasets, label noise, synthetic problems, text, and the order."""

from dynamics.data.files import DataError
from dynamics.data.rows import subset
from dynamics.data.sources import DataConfig, load, of_arrays

__all__ = ["DataConfig", "DataError", "load", "of_arrays", "subset"]
