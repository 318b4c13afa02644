"""Rounds of calls that are compared: order, warm-ups, and what each took."""

from collections.abc import Callable
from functools import partial
from itertools import count, islice, repeat

import pytest
import torch

from benchmarks.common.clock import WARM_UPS, Call, cpu_seconds, make_timer, time_rounds

COSTS = {"a": 1.0, "b": 20.0, "c": 300.0}


def by_name(calls: list[str]) -> tuple[list[Call], Callable[[Call], float]]:
    """Make calls that note themselves, and a clock that knows what they cost."""

    def timer(call: Call) -> float:
        call()
        return COSTS[calls[-1]]

    return [partial(calls.append, name) for name in COSTS], timer


def test_every_second_round_goes_backwards_and_is_told_in_the_given_order() -> None:
    called: list[str] = []
    calls, timer = by_name(called)
    found = [*time_rounds(repeat(calls, 3), timer, warm_ups=0)]
    assert "".join(called) == "abc" + "cba" + "abc"
    assert found == [[1, 20, 300]] * 3


@pytest.mark.parametrize("warm_ups", [0, 1, 2])
def test_the_first_rounds_are_run_but_not_told(warm_ups: int) -> None:
    called: list[str] = []
    calls, timer = by_name(called)
    rounds = [calls[:1], calls[1:2], calls[2:]]
    told = [*time_rounds(rounds, timer, warm_ups)]
    assert told == [[1], [20], [300]][warm_ups:]
    assert "".join(called) == "abc"


def test_as_many_warm_up_as_the_constant_says() -> None:
    called: list[str] = []
    calls, timer = by_name(called)
    assert len([*time_rounds(repeat(calls, WARM_UPS + 2), timer)]) == 2


def test_a_round_is_made_and_run_only_when_it_is_asked_for() -> None:
    made = []
    called: list[str] = []
    calls, timer = by_name(called)

    def endless() -> list[Call]:
        made.append(len(called))
        return calls

    rounds = time_rounds((endless() for _ in count()), timer, warm_ups=0)
    assert [*islice(rounds, 2)] == [[1, 20, 300]] * 2
    assert made == [0, 3]  # the second, after the calls of the first


def test_a_call_is_timed_by_the_time_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 5.0

    def work() -> None:
        nonlocal now
        now += 2.5

    monkeypatch.setattr("time.process_time", lambda: now)
    assert make_timer(torch.device("cpu")) is cpu_seconds
    assert cpu_seconds(work) == 2.5
