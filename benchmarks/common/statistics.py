"""Differences of paired seeds, and what can be told from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. Two standard
# errors would be right for many seeds; at 3 they would call one noise in five a gain.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


# Two seeds often differ by exactly as many test images, as if there were no noise.
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Difference:
    """What a rule has more than the plain sum, paired by seed.

    Attributes:
        mean: over the seeds.
        error: its standard error; NaN for a single seed.
        margin: what a mean must exceed to be told from 0 at 95 % (Student's t times
            ``error``); infinite below 3 seeds.
    """

    mean: float
    error: float
    margin: float

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval of the mean."""
        return self.mean - self.margin

    @property
    def high(self) -> float:
        """Upper end of it."""
        return self.mean + self.margin

    @property
    def is_noise(self) -> bool:
        """Whether the seeds cannot tell this difference from 0."""
        return not abs(self.mean) > self.margin


def paired_difference(rule: Sequence[float], plain: Sequence[float]) -> Difference:
    """Compare accuracies of a rule and of the sum, element by element (seed by seed).

    Raises:
        ValueError: if their numbers differ, or there are none.
    """
    differences = [a - b for a, b in zip(rule, plain, strict=True)]
    count = len(differences)
    if count == 0:
        raise ValueError("Invalid rule value: no accuracies to compare")
    error = stdev(differences) / math.sqrt(count) if count > 1 else math.nan
    if count < FEWEST_SEEDS:
        return Difference(mean(differences), error, math.inf)
    # Beyond the table the quantile is within 0.3 % of 1.96 + 2.4 / freedom.
    freedom = count - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.4 / freedom
    return Difference(mean(differences), error, quantile * error)
