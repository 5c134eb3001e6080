"""What a run of segmentation from noisy annotations is determined by."""

from typing import Annotated, Literal

from dynamics import models, optim
from dynamics.config import Count, Fraction, NonNegative, Positive, Replica, Seed, frozen
from dynamics.revise import Correction, Detection
from dynamics.training import Train

Method = Literal["ce", "adele", "early", "late", "consistency", "adele_consistency"]


@frozen
class Shapes:
    """Images of a disk and a square, and how their annotations go wrong."""

    num_train: Count = 30
    """Training images"""
    num_test: Count = 60
    """Test images, with clean labels"""
    noise: NonNegative = 0.5
    """Standard deviation of a pixel; disk and square have intensity 1 and -1"""
    iterations: tuple[Count, ...] = (1, 2)
    """Pixels, one of these for each image, by which its classes are eroded or dilated; the square
    by 1 less"""
    seed: Seed = 0
    """Seed of the images, which all networks share; what is wrong in their labels differs"""

    def __post_init__(self) -> None:
        if not self.iterations:
            raise ValueError("Shapes.iterations must name at least one, got ()")


@frozen
class Consistency:
    """Several scales: what labels are corrected to, and what a network is made to agree on."""

    weight: Annotated[NonNegative, Replica] = 1.0
    """Weight of the consistency loss, in the methods that have it"""
    rho: Fraction = 0.8
    """Probability of the most likely class above which a pixel counts"""
    per: Literal["pixel", "image"] = "pixel"
    """Whether each pixel must reach it, or any of the image"""
    scales: tuple[Positive, ...] = (0.75, 1.0, 1.5)
    """Factors by which images are resized"""
    cross_entropy: Literal["native", "scales"] = "scales"
    """For those methods: cross-entropy of the image as it is, or its mean over the scales"""


@frozen
class Comparison:
    """Methods beside one another, and corrections at the wrong time as controls."""

    methods: tuple[Method, ...] = ("ce", "adele", "early", "late", "consistency",
                                   "adele_consistency")  # fmt: skip
    """ce: no correction; adele: each class when it is due; early, late: all classes at once, after
    the first epoch or study.late; consistency: the loss over scales, alone or with adele"""
    late: Fraction = 0.75
    """Part of the training, 0 to 1, after which the method late corrects"""
    replicas: Count = 4
    """Networks trained by each method, with the same seeds (annotations, initialisation, order)"""

    def __post_init__(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"Comparison.methods must be different, got {self.methods}")


@frozen
class Timing:
    """All classes corrected at once, at an epoch that is given."""

    at: tuple[Count, ...] = (1, 3, 5, 7, 10, 15, 20, 30, 45)
    """Epochs after which labels are corrected"""
    replicas: Count = 4
    """Networks trained for each epoch, for no correction and for the detection; the same seeds"""

    def __post_init__(self) -> None:
        if not self.at or sorted(set(self.at)) != list(self.at):
            raise ValueError(f"Timing.at must be rising epochs, got {self.at}")


Study = Comparison | Timing


@frozen
class Config:
    """One study of segmentation from annotations whose outlines are wrong."""

    data: Shapes = Shapes()
    model: models.Unet = models.Unet(norm="none")
    train: Train = Train(optimizer=optim.Adam(learning_rate=3e-3), batch_size=5)
    epochs: Count = 60
    """Length of the training in epochs"""
    detection: Detection = Detection()
    correction: Correction = Correction()
    repeat: Literal["once", "restart", "cumulative"] = "once"
    """Whether a class is corrected once, or after every epoch from its detection on"""
    among: Literal["active", "due"] = "active"
    """What a correction changes: all classes detected so far, or the one that was just detected"""
    consistency: Consistency = Consistency()
    study: Study = Comparison()
    seed: Annotated[Seed, Replica] = 0
    """Seed of what is wrong in annotations, of initialisations and of the order of batches"""

    def __post_init__(self) -> None:
        if isinstance(self.study, Timing) and self.study.at[-1] > self.epochs:
            raise ValueError(
                f"Timing.at must be at most the {self.epochs} epochs, got {self.study.at}"
            )
