"""Exact Gradient Harmonization (GH, GH++) for multi-task training with PyTorch."""

from ghopt.accumulation import Accumulation
from ghopt.change import Change
from ghopt.compiled import keep_buffers
from ghopt.from_params import HarmonizedFromParams
from ghopt.geometry import (
    Weighting,
    dual_cone,
    gh,
    gh_coefficients,
    ghpp,
    ghpp_balanced,
    ghpp_balanced_coefficients,
    ghpp_coefficients,
    ghpp_printed,
    ghpp_printed_coefficients,
    plain_sum,
)
from ghopt.harmonize import backward
from ghopt.measuring import Harmonization, harmonized_loss
from ghopt.optimizer import HarmonizedOptimizer
from ghopt.recorder import Recorder, measure
from ghopt.recording import Recording

# A literal: setup.cfg reads it without importing torch.
__version__ = "0.2.0"

# Before a model is compiled: this cannot wait for the first optimizer.
keep_buffers()

__all__ = [
    "Accumulation",
    "Change",
    "Harmonization",
    "HarmonizedFromParams",
    "HarmonizedOptimizer",
    "Recorder",
    "Recording",
    "Weighting",
    "__version__",
    "backward",
    "dual_cone",
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
    "plain_sum",
]
