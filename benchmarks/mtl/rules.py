"""The rules under comparison: weightings, made anew for each run.

TorchJD's have the form that ``HarmonizedOptimizer`` takes. Two of them are means, in the
sense that their weights are those of the plain mean, 1 / K, where nothing conflicts
(UPGrad), or sum to 1 (MGDA): both are multiplied by the number of tasks, so that all
rules here have the scale of a sum.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

import ghopt
from benchmarks.mtl.problem import Problem
from ghopt import Weighting
from ghopt.extras import from_extra


@dataclass(frozen=True)
class Rule:
    """A way to weigh tasks.

    Attributes:
        make: gives a weighting; raises ImportError, with the extra, if a package lacks.
        fewest: number of tasks that it is shown for.
        most: number of tasks that it is for.
        projects: whether the step is projected, too (``project_step``).
        protects: whether the main task is protected, and only that.
    """

    make: Callable[[], Weighting]
    fewest: int = 2
    most: int = 1000
    projects: bool = False
    protects: bool = False


def torchjd_weighting(name: str, *, is_mean: bool) -> Weighting:
    """Make a weighting of TorchJD's, at the scale of a sum.

    Raises:
        ImportError: if TorchJD, or what it needs for this, is missing; names the extra.
    """
    with from_extra("mtl"):
        from torchjd import aggregation

        weighting: Weighting = getattr(aggregation, f"{name}Weighting")()
    return partial(_times_tasks, weighting=weighting) if is_mean else weighting


def _times_tasks(gramian: Tensor, weighting: Weighting) -> Tensor:
    return weighting(gramian) * len(gramian)


RULES = {
    "sum": Rule(lambda: ghopt.plain_sum),
    "gh": Rule(lambda: ghopt.gh),
    "gh_projected": Rule(lambda: ghopt.gh, projects=True),
    "gh_protect": Rule(lambda: ghopt.gh, protects=True),
    "ghpp": Rule(lambda: ghopt.ghpp),
    "ghpp_balanced": Rule(lambda: ghopt.ghpp_balanced, most=2),
    "upgrad": Rule(partial(torchjd_weighting, "UPGrad", is_mean=True)),
    "mgda": Rule(partial(torchjd_weighting, "MGDA", is_mean=True)),
    # With two tasks it is gh.
    "pcgrad": Rule(partial(torchjd_weighting, "PCGrad", is_mean=False), fewest=3),
}


def rules_for(problem: Problem, wanted: list[str]) -> list[str]:
    """Name those of the wanted rules that are for a problem, the sum first."""
    return [
        name
        for name, rule in RULES.items()
        if (name in wanted or name == "sum")
        and rule.fewest <= len(problem.tasks) <= rule.most
        and (problem.main or not rule.protects)
    ]
