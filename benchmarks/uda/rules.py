"""The rules under comparison, and what they make of a Gramian of two tasks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import ghopt
from ghopt import Weighting


class Rule(NamedTuple):
    """A weighting, and the coefficients ``[2, 2]`` of the gradients it stands for."""

    weighting: Weighting
    coefficients: Callable[[Tensor], Tensor]


def sum_weights(gramian: Tensor) -> Tensor:
    """Weights of the plain sum, ``[K]``: all 1."""
    return torch.ones_like(gramian.diagonal())


def sum_coefficients(gramian: Tensor) -> Tensor:
    """Coefficients of the plain sum, ``[K, K]``: the identity."""
    return sum_weights(gramian).diag()


RULES = {
    "sum": Rule(sum_weights, sum_coefficients),
    "gh": Rule(ghopt.gh, ghopt.gh_coefficients),
    "ghpp": Rule(ghopt.ghpp, ghopt.ghpp_coefficients),
    "ghpp_printed": Rule(ghopt.ghpp_printed, ghopt.ghpp_printed_coefficients),
}


def harmonized_gramian(rule: str, gramian: Tensor) -> Tensor:
    """Gramian of the harmonized gradients, ``[2, 2]``, from that of the originals."""
    coefficients = RULES[rule].coefficients(gramian)
    return coefficients @ gramian @ coefficients.T
