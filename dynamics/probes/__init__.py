"""Probes: what looks at a run while it trains; one file each."""

from dynamics.probes.evaluate import Evaluate
from dynamics.probes.score import Score

__all__ = ["Evaluate", "Score"]
