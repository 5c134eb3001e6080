"""Configs: frozen nested dataclasses, checked when they are made, fingerprinted when they are used.

A config holds values and nothing else. Every value in it can change the result, so every value is
in the fingerprint; what can't (folders, meshes, cadences of checkpoints) is an argument elsewhere.
"""

from dynamics.config.points import choices, flatten, grid, group, hints, override, replica_fields
from dynamics.config.text import fingerprint, from_json, to_dict, to_json
from dynamics.config.values import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Replica,
    Seed,
    frozen,
    perhaps,
    shown,
)

__all__ = [
    "Count",
    "Fraction",
    "NonNegative",
    "Positive",
    "Range",
    "Replica",
    "Seed",
    "choices",
    "fingerprint",
    "flatten",
    "from_json",
    "frozen",
    "grid",
    "group",
    "hints",
    "override",
    "perhaps",
    "replica_fields",
    "shown",
    "to_dict",
    "to_json",
]
