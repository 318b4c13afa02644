"""What a call allocates, read from torch's profiler."""

import gc
from collections.abc import Callable

import torch
from torch._C._profiler import _EventType


def allocated(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most that it held at once.

    Only what the call allocates counts, and its release. Of a block that is older the
    profiler knows no size, or that of another block that once had its address.
    """
    # A cycle that the collector happens to free would make the peak lower by chance.
    gc.collect()
    gc.disable()
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            run()
    finally:
        gc.enable()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.experimental_event_tree()
    changes = []
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0] == _EventType.Allocation:
            changes.append((event.start_time_ns, event.typed[1]))
    sizes: dict[int, int] = {}
    held, peak = 0, 0
    for _, change in sorted(changes, key=lambda timed: timed[0]):
        if change.alloc_size > 0:
            sizes[change.ptr] = change.alloc_size
            held += change.alloc_size
            peak = max(peak, held)
        else:
            held -= sizes.pop(change.ptr, 0)
    return held, peak
