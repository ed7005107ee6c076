"""Robust aggregation: rules that some clients cannot mislead. They need every single update."""

from fl_lightning.algorithms.robust.base import RobustAlgorithm
from fl_lightning.algorithms.robust.clipping import NormClipping
from fl_lightning.algorithms.robust.cohort import Cohort
from fl_lightning.algorithms.robust.coordinates import CoordinateMedian, TrimmedMean
from fl_lightning.algorithms.robust.geometric import GeometricMedian
from fl_lightning.algorithms.robust.krum import Krum, MultiKrum
from fl_lightning.algorithms.robust.little import ALittleIsEnough

__all__ = [
    "ALittleIsEnough",
    "Cohort",
    "CoordinateMedian",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "NormClipping",
    "RobustAlgorithm",
    "TrimmedMean",
]
