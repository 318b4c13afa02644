"""Exact Gradient Harmonization (GH, GH++) for multi-task training with PyTorch."""

from ghopt.geometry import (
    Weighting,
    gh,
    gh_coefficients,
    ghpp,
    ghpp_balanced,
    ghpp_balanced_coefficients,
    ghpp_coefficients,
    ghpp_printed,
    ghpp_printed_coefficients,
)
from ghopt.harmonize import Accumulation, backward
from ghopt.measuring import Harmonization, harmonized_loss
from ghopt.optimizer import HarmonizedOptimizer
from ghopt.recorder import Recorder, measure
from ghopt.recording import Recording

__all__ = [
    "Accumulation",
    "Harmonization",
    "HarmonizedOptimizer",
    "Recorder",
    "Recording",
    "Weighting",
    "backward",
    "gh",
    "gh_coefficients",
    "ghpp",
    "ghpp_balanced",
    "ghpp_balanced_coefficients",
    "ghpp_coefficients",
    "ghpp_printed",
    "ghpp_printed_coefficients",
    "harmonized_loss",
    "measure",
]
