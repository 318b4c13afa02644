"""The rules under comparison, and what they make of a Gramian of two tasks."""

from collections.abc import Callable
from functools import partial
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
"""Those of the main job."""


def flipped(task: int) -> Rule:
    """Sum the gradients with the sign of one of them changed, as in the paper's Fig. 13."""

    def weights(gramian: Tensor) -> Tensor:
        signs = sum_weights(gramian)
        signs[task] = -1
        return signs

    return Rule(weights, lambda gramian: weights(gramian).diag())


FLIPS = {"minus_alignment": flipped(0), "minus_classification": flipped(1)}

ALL_RULES = {
    **RULES,
    "ghpp_balanced": Rule(ghopt.ghpp_balanced, ghopt.ghpp_balanced_coefficients),
    **FLIPS,
}
"""Those of the longer tables, too."""

LAMBDAS = {
    0.0: "ghpp_lam_0",
    0.25: "ghpp_lam_0.25",
    0.5: "ghpp",
    0.75: "ghpp_lam_0.75",
    1.0: "ghpp_lam_1",
}
"""GH++ by the share of the turn that task 1, alignment, takes, as in the paper's Fig. 14."""

_ANY_RULE = {
    **{
        name: Rule(
            partial(ghopt.ghpp, lam=lam), partial(ghopt.ghpp_coefficients, lam=lam)
        )
        for lam, name in LAMBDAS.items()
    },
    **ALL_RULES,
}


def find_rule(name: str) -> Rule:
    """Look up a rule of ``ALL_RULES`` or ``LAMBDAS`` by its name."""
    return _ANY_RULE[name]


def harmonized_gramian(rule: str, gramian: Tensor) -> Tensor:
    """Gramian of the harmonized gradients, ``[2, 2]``, from that of the originals."""
    coefficients = find_rule(rule).coefficients(gramian)
    return coefficients @ gramian @ coefficients.T
