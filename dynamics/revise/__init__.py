"""Revisions: what a run is trained on, changed while it trains."""

from dynamics.revise.adele import DETECT, Adele
from dynamics.revise.curve import Curve, Detection
from dynamics.revise.pixels import Correction
from dynamics.types import IGNORED

__all__ = ["DETECT", "IGNORED", "Adele", "Correction", "Curve", "Detection"]
