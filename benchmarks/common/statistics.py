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


# Below so many seeds the least and the greatest difference are no 95 % apart.
FEWEST = 5


@dataclass(frozen=True)
class Difference:
    """Accuracy of a rule minus that of the plain sum, in points, paired by seed.

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


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Take the 95 % bootstrap interval of a mean; without end below 5 values.

    Percentiles as far out as Student's t makes them of normal values (Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015, section 4.3): they hold the mean
    95 times in 100 with 10 values and 92 with 5, where those with bias corrected and
    accelerated (BCa) do 91 and 83 times, too short for so few seeds.
    """
    import numpy as np
    from scipy.stats import bootstrap, norm, t

    count = len(differences)
    if count < FEWEST:
        return -math.inf, math.inf
    if len(set(differences)) == 1:
        return differences[0], differences[0]
    tail = norm.cdf(-math.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1))
    found = bootstrap(
        [differences],
        np.mean,
        confidence_level=1 - 2 * tail,
        method="percentile",
        n_resamples=99_999,
        rng=0,
    ).confidence_interval
    return float(found.low), float(found.high)
