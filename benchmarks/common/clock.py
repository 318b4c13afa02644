"""One clock for all timings, which other work on the machine does not reach."""

import time
from collections.abc import Callable
from typing import TypeAlias

import torch

Timer: TypeAlias = Callable[[Callable[[], object]], float]
"""Gives the seconds that a call takes."""


def make_timer(device: torch.device) -> Timer:
    """Make what times a call in seconds: CPU time, or between two CUDA events."""
    return _device_seconds if device.type == "cuda" else cpu_seconds


def cpu_seconds(call: Callable[[], object]) -> float:
    """Time a call, not counting what other processes take."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _device_seconds(call: Callable[[], object]) -> float:
    start, end = (
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        for _ in range(2)
    )
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
