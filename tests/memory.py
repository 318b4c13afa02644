"""What a call allocates, as torch's profiler sees it."""

from collections.abc import Callable

import torch


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most that it held at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    assert profile.profiler is not None
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return held, peak
