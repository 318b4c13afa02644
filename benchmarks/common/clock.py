"""One clock for all timings, which other work on the machine does not reach."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

import torch

Call: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Call], float]
"""Gives the seconds that a call takes."""

WARM_UPS = 3
"""Rounds, or calls, that do not count at first."""


def make_timer(device: torch.device) -> Timer:
    """Make what times a call in seconds: CPU time, or between two CUDA events."""
    return _device_seconds if device.type == "cuda" else cpu_seconds


def time_rounds(
    rounds: Iterable[Sequence[Call]],
    timer: Timer,
    warm_ups: int = WARM_UPS,
) -> Iterator[list[float]]:
    """Time calls that are to be compared, round by round, each as it is asked for.

    In a round all take their turns one after another, so that what else happens on the
    machine reaches all. Every second round goes backwards, so that none is always first.

    Args:
        rounds: the calls of each round, as many in each; may be without end.
        timer: times a call.
        warm_ups: how many rounds are left out at first.

    Yields:
        Seconds of each call of a round, in the order in which the calls were given.
    """
    for number, calls in enumerate(rounds):
        if number % 2:
            seconds = [timer(call) for call in reversed(calls)][::-1]
        else:
            seconds = [timer(call) for call in calls]
        if number >= warm_ups:
            yield seconds


def cpu_seconds(call: Call) -> float:
    """Time a call, not counting what other processes take."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _device_seconds(call: Call) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        for _ in range(2)
    )
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
