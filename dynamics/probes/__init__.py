"""Probes: what looks at a run while it trains; one file each."""

from dynamics.probes.batch_sharpness import BatchSharpness
from dynamics.probes.cartography import Cartography
from dynamics.probes.evaluate import Evaluate
from dynamics.probes.forgetting import Forgetting
from dynamics.probes.margins import AreaUnderMargin
from dynamics.probes.measure import Measure
from dynamics.probes.memorisation import Memorisation
from dynamics.probes.path import Path
from dynamics.probes.score import Score
from dynamics.probes.sharpness import Sharpness
from dynamics.probes.spectrum import Spectrum
from dynamics.probes.transformer import Attention, Outputs, Updates
from dynamics.probes.velocity import KernelVelocity
from dynamics.probes.vog import VarianceOfGradients

__all__ = [
    "AreaUnderMargin",
    "Attention",
    "BatchSharpness",
    "Cartography",
    "Evaluate",
    "Forgetting",
    "KernelVelocity",
    "Measure",
    "Memorisation",
    "Outputs",
    "Path",
    "Score",
    "Sharpness",
    "Spectrum",
    "Updates",
    "VarianceOfGradients",
]
