"""The rules under comparison, and what they make of a Gramian of two tasks."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

import ghopt
from ghopt import Weighting


class Rule(NamedTuple):
    """What a step does with its pair of losses.

    Attributes:
        weighting: of the two gradients.
        coefficients: of the gradients that the weights stand for, ``[2, 2]``.
        projects: whether momentum and step are projected, too (``project_step``).
    """

    weighting: Weighting
    coefficients: Callable[[Tensor], Tensor]
    projects: bool = False


def sum_coefficients(gramian: Tensor) -> Tensor:
    """Coefficients of the plain sum, ``[K, K]``: the identity."""
    return ghopt.plain_sum(gramian).diag()


RULES = {
    "sum": Rule(ghopt.plain_sum, sum_coefficients),
    "gh": Rule(ghopt.gh, ghopt.gh_coefficients),
    "ghpp": Rule(ghopt.ghpp, ghopt.ghpp_coefficients),
    "ghpp_printed": Rule(ghopt.ghpp_printed, ghopt.ghpp_printed_coefficients),
}
"""Those of the main job."""


def flipped(task: int) -> Rule:
    """Sum the gradients with the sign of one of them changed, as in the paper's Fig. 13."""

    def weights(gramian: Tensor) -> Tensor:
        signs = ghopt.plain_sum(gramian)
        signs[task] = -1
        return signs

    return Rule(weights, lambda gramian: weights(gramian).diag())


FLIPS = {"minus_alignment": flipped(0), "minus_classification": flipped(1)}

ALL_RULES = {
    **RULES,
    "gh_projected": Rule(ghopt.gh, ghopt.gh_coefficients, projects=True),
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
