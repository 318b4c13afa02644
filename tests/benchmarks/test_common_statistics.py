"""Differences of paired seeds: mean, error, margin, and what is noise."""

import math

import pytest
from scipy.stats import t, ttest_rel

from benchmarks.common.statistics import STUDENT, paired_difference


def test_the_difference_is_paired_by_seed() -> None:
    difference = paired_difference([51.0, 62.0, 70.0], [50.0, 60.0, 67.0])
    assert difference.mean == pytest.approx(2)
    assert difference.error == pytest.approx(1 / math.sqrt(3))
    assert difference.margin == pytest.approx(4.303 / math.sqrt(3))
    assert difference.is_noise


def test_the_margin_narrows_to_two_standard_errors() -> None:
    for count in (21, 22, 200):
        rule = [float(seed % 2) for seed in range(count)]
        difference = paired_difference(rule, [0.0] * count)
        assert difference.margin == pytest.approx(2 * difference.error, rel=0.05)


def test_below_three_seeds_everything_is_noise() -> None:
    assert paired_difference([60.0], [50.0]).is_noise
    assert paired_difference([60.0, 60.0], [50.0, 50.0]).is_noise
    assert not paired_difference([60.0] * 3, [50.0] * 3).is_noise
    assert not math.isfinite(paired_difference([60.0], [50.0]).error)


def test_accuracies_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zip\(\)"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="no accuracies"):
        paired_difference([], [])


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    rule, plain = [51.0, 62.0, 70.0, 55.0, 58.0], [50.0, 60.0, 67.0, 56.0, 53.0]
    found = paired_difference(rule, plain)
    expected = ttest_rel(rule, plain).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low, rel=1e-3)
    assert found.high == pytest.approx(expected.high, rel=1e-3)
    # Seeds that all differ alike leave no doubt; two seeds leave it all.
    sure = paired_difference([2.0] * 3, [1.0] * 3)
    assert (sure.low, sure.high) == (1, 1)
    few = paired_difference([2.0, 3.0], [1.0, 1.0])
    assert (few.low, few.high) == (-math.inf, math.inf)


def test_the_quantiles_are_those_of_student() -> None:
    expected = [t.ppf(0.975, freedom) for freedom in range(1, len(STUDENT) + 1)]
    assert [*STUDENT] == pytest.approx(expected, abs=6e-4)
