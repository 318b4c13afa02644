"""Shares and how sure they are: against simulated steps of known dependence."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from ghopt.certainty import independent_steps, share_below


def correlated(count: int, rho: float, seed: int) -> Tensor:
    """Draw an autoregressive series of mean 0 and variance 1."""
    draws = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=draws, dtype=torch.float64).tolist()
    values = noise[:1]
    for one in noise[1:]:
        values.append(rho * values[-1] + math.sqrt(1 - rho**2) * one)
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_correlated_steps_count_as_many_as_the_variance_of_their_mean_says(
    rho: float,
) -> None:
    # The variance of the mean of n steps is (1 + rho) / (1 - rho) / n.
    counts = [independent_steps(correlated(2000, rho, seed)) for seed in range(20)]
    expected = 2000 * (1 - rho) / (1 + rho)
    assert sum(counts) / 20 == pytest.approx(expected, rel=0.15)


def test_the_autocorrelations_are_the_literal_ones_up_to_the_first_pair_below_zero() -> (
    None
):
    values = correlated(101, 0.8, seed=1)
    centered = values - values.mean()
    rho = [
        float((centered[lag:] * centered[: len(values) - lag]).sum())
        / float(centered.square().sum())
        for lag in range(len(values))
    ]
    time = -1.0
    for lag in range(0, 100, 2):
        if rho[lag] + rho[lag + 1] <= 0:
            break
        time += 2 * (rho[lag] + rho[lag + 1])
    assert independent_steps(values) == pytest.approx(101 / time)


def test_of_a_trend_few_steps_are_left_however_many_there_are() -> None:
    for count in (100, 10_000):
        trend = torch.linspace(0, 1, count, dtype=torch.float64)
        assert 1 <= independent_steps(trend) < 6


def test_values_that_are_the_same_or_alternate_count_as_independent() -> None:
    assert independent_steps(torch.full((50,), 0.1).double()) == 50
    almost = torch.full((50,), 0.1).double() + torch.arange(50) % 7 * 1e-17
    assert independent_steps(almost) == 50
    assert independent_steps(torch.tensor([1.0, -1.0] * 25).double()) == 50
    for count in range(1, 4):
        assert independent_steps(torch.arange(count).double()) == count


@pytest.mark.parametrize(("rho", "center"), [(0.0, 0.5), (0.8, 0.5), (0.8, 1.5)])
def test_the_interval_holds_the_share_nineteen_times_of_twenty(
    rho: float, center: float
) -> None:
    truth = NormalDist().cdf(-center)
    found = [share_below(correlated(400, rho, seed) + center) for seed in range(200)]
    held = sum(one.low <= truth <= one.high for one in found)
    assert 180 <= held <= 200
    # Not by being wide: of 400 steps that count as 44 it is no wider than of 30.
    widths = sorted(one.high - one.low for one in found)
    assert widths[100] < 2 * 1.96 * math.sqrt(truth * (1 - truth) / 30)


@pytest.mark.parametrize("below", [0, 1, 3, 5, 10])
def test_the_interval_ends_where_the_share_would_be_two_deviations_off(
    below: int,
) -> None:
    # Alternating where it can: ten steps that count as ten.
    values = torch.ones(10).double()
    values[: 2 * below : 2] = -1
    values = values if below < 10 else -values.abs()
    found = share_below(values)
    assert found.independent == 10
    for end in (found.low, found.high):
        deviation = math.sqrt(end * (1 - end) / 10)
        assert abs(end - below / 10) == pytest.approx(1.96 * deviation, abs=1e-4)


def test_halves_are_counted_apart_and_steps_without_a_value_not_at_all() -> None:
    values = torch.tensor([-1.0, torch.nan, -1.0, 1.0, torch.nan, 1.0, 1.0]).double()
    found = share_below(values)
    assert (found.share, found.first, found.last) == pytest.approx((0.4, 2 / 3, 0))
    assert share_below(torch.tensor([0.5]).double()).last == 0
    none = share_below(torch.full((3,), torch.nan).double())
    assert (none.low, none.share, none.high, none.independent) == (0, 0, 1, 0)
    assert not none.far


def test_a_share_is_of_values_below_its_line() -> None:
    values = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    assert share_below(values, 0.25).share == 0.5
    assert share_below(values, 0.2).share == 0.25


def test_far_is_what_stays_above_the_line_if_it_goes_on_as_it_went() -> None:
    ahead = torch.linspace(1, 0.8, 100).double()
    toward = torch.linspace(1, 0.3, 100).double()
    noisy = correlated(100, 0.0, 0) + 1
    assert share_below(ahead).far
    assert not share_below(toward).far
    assert share_below(toward.flip(0)).far
    assert not share_below(noisy).far
    assert not share_below(ahead, 0.9).far
