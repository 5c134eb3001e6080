"""Which paired seeds of a run are a result: those of which no member diverged."""

from collections.abc import Mapping
from typing import NamedTuple

import polars as pl

SCORED = "scored"  # the status of networks that only scored examples: seeds of their own


class Seeds(NamedTuple):
    """The replicas of a run, rising: those that are whole, and those that lost a member."""

    whole: tuple[int, ...]
    lost: tuple[int, ...]

    def __str__(self) -> str:
        """``2 of 10 seeds diverged``; empty if none did."""
        count, lost = len(self.whole) + len(self.lost), len(self.lost)
        return f"{lost} of {count} seed{'s' * (count != 1)} diverged" if lost else ""


def seeds(frames: Mapping[str, pl.DataFrame]) -> Seeds:
    """The replicas of all frames that say who ``diverged``; one is lost if any of its members did.

    What is compared is paired by seed, in every frame, so a seed is whole in all of them or a
    result in none. The seeds of frame ``scored`` are other ones, and are not among them.
    """
    told = [
        frame.select("replica", gone=pl.col("diverged").is_not_null())
        for name, frame in frames.items()
        if name != SCORED and {"replica", "diverged"} <= set(frame.columns)
    ]
    if not told:
        return Seeds((), ())
    found = pl.concat(told).group_by("replica").agg(pl.col("gone").any()).sort("replica")
    whole, lost = (found.filter(pl.col("gone") == is_lost)["replica"] for is_lost in (False, True))
    return Seeds(tuple(whole.to_list()), tuple(lost.to_list()))


def all_diverged(frames: Mapping[str, pl.DataFrame]) -> bool:
    """Whether every member that the frames tell of diverged: there is no result."""
    told = {n: frame["diverged"] for n, frame in frames.items() if "diverged" in frame.columns}
    results = [column for name, column in told.items() if name != SCORED] or list(told.values())
    return any(map(len, results)) and all(column.is_not_null().all() for column in results)


def without_status(frames: Mapping[str, pl.DataFrame]) -> list[str]:
    """The frames that have replicas, if none of the frames says which of them diverged."""
    has = [name for name, frame in frames.items() if "replica" in frame.columns]
    return [] if any("diverged" in frames[name].columns for name in has) else has
