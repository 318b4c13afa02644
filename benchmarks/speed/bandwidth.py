"""Gramian and combination by themselves: beside a copy, and in kernel launches.

They cannot move less than 5N elements for two tasks: read both gradients, then read
both again and write one; (2K + 1)N for K tasks.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.clock import WARM_UPS, Call, make_timer, time_rounds
from benchmarks.speed.measure import spread
from benchmarks.speed.problems import make
from benchmarks.speed.results import Figure
from ghopt import gh
from ghopt.gradients import StoredGradients

SHARE = "share of the bandwidth of a copy"
LAUNCHES = "kernel launches"


def bandwidths(
    tasks: int, rounds: int, device: torch.device, network: str = "resnet18"
) -> list[Figure]:
    """Measure Gramian and combination of gradients in the shapes of a network.

    Of ResNet-18 by default, three times: 186 tensors, 33.6 million elements. Kernel
    launches are counted on CUDA alone. Pairs of gradients are in conflict.
    """
    shapes = [p.shape for p in make(network, 1).parameters] * 3
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        rows = [[torch.randn(s, device=device) for s in shapes] for _ in range(tasks)]
        for one, other in zip(rows[::2], rows[1::2], strict=True):
            torch._foreach_sub_(other, one, alpha=0.5)
        rows = [[tensor.to(dtype) for tensor in row] for row in rows]
        column = str(dtype).removeprefix("torch.")
        share = _share(rows, rounds, device)
        found.append(Figure("bandwidth", tasks, SHARE, column, *share))
        if device.type == "cuda":
            launches = count_launches(rows)
            found.append(Figure("bandwidth", tasks, LAUNCHES, column, launches))
    return found


def count_launches(rows: Sequence[Sequence[Tensor]]) -> int:
    """Count the kernels that Gramian and combination run, by the profiler."""
    harmonize(rows)  # compiles
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        harmonize(rows)
        torch.cuda.synchronize()
    events = profiler.events() or []
    return sum("LaunchKernel" in event.name for event in events)


def harmonize(rows: Sequence[Sequence[Tensor]]) -> None:
    """Harmonize gradients in place, as one step does."""
    gradients = stored(rows)
    products = gradients.gramian()
    gradients.combine(gh(products), products)


def stored(rows: Sequence[Sequence[Tensor]]) -> StoredGradients:
    """Take rows, one for each task, for what the passes of a step left."""
    names = [str(task) for task in range(len(rows))]
    parameters = list(rows[0])  # any tensors will do for their names
    by_task = {
        name: dict(zip(parameters, row, strict=True))
        for name, row in zip(names, rows, strict=True)
    }
    return StoredGradients(names, parameters, by_task)


def _share(
    rows: Sequence[Sequence[Tensor]], rounds: int, device: torch.device
) -> tuple[float, float, float]:
    """Take the bandwidth over that of a copy in the same round, and its spread."""
    timer = make_timer(device)
    size = sum(tensor.nbytes for tensor in rows[0])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    first = [tensor.clone() for tensor in rows[0]]

    def pairs() -> Iterator[tuple[Call, Call]]:
        for _ in range(WARM_UPS + rounds):
            yield partial(harmonize, rows), partial(_copy, source, target)
            # Else the next round would find no conflict.
            torch._foreach_copy_(list(rows[0]), first)

    return spread(
        [
            (2 * len(rows) + 1) * size / taken / (2 * size / copied)
            for taken, copied in time_rounds(pairs(), timer)
        ]
    )


def _copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)
