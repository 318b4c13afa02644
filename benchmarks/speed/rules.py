"""Rules by themselves: microseconds from a Gramian to weights, beside UPGrad's.

The gradients are random, with some conflict in each Gramian, or *dependent*: half of
them are opposite to others but for the rounding of float32.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, repeat

import torch
from torch import Tensor

from benchmarks.common.clock import Call, cpu_seconds, time_rounds
from benchmarks.speed.measure import repeated, spread
from benchmarks.speed.methods import torchjd_weighting
from benchmarks.speed.results import Figure
from ghopt import Weighting, gh, ghpp

NUMBERS, QUICK_NUMBERS = (2, 3, 4, 8, 10, 12, 16, 32, 64, 256), (2, 3, 8)
GRAMIANS, REPEATS = 20, 10
LONG = 32  # with more tasks one call is long enough, and two Gramians are enough


def rule_times(numbers: Sequence[int], rounds: int) -> list[Figure]:
    """Time rules on the same Gramians of 2, 3, ... tasks, in turns, on the CPU."""
    rules: dict[str, Weighting] = {
        "gh": gh,
        "ghpp": ghpp,
        "UPGrad": torchjd_weighting("UPGrad"),
    }
    found = []
    for kind in ("random", "dependent"):
        for tasks in numbers:
            gramians = [*_gramians(kind, tasks)]
            repeats = REPEATS if tasks <= LONG else 1
            turns: Iterator[list[Call]] = (
                [
                    partial(repeated, partial(rule, gramian), repeats)
                    for rule in rules.values()
                ]
                for gramian in chain.from_iterable(repeat(gramians, rounds))
            )
            seconds = zip(*time_rounds(turns, cpu_seconds), strict=True)
            for name, values in zip(rules, seconds, strict=True):
                figure = spread([1e6 * value / repeats for value in values])
                found.append(
                    Figure("rules", 0, f"{name}, {kind}", f"K = {tasks}", *figure)
                )
    return found


def _gramians(kind: str, tasks: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    count = GRAMIANS if tasks <= LONG else 2
    while count:
        rows = torch.randn(tasks, 4 * tasks, generator=generator)
        if kind == "dependent":
            half = tasks // 2
            noise = rows[half : 2 * half].abs() * 1e-7
            rows[half : 2 * half] = -rows[:half] * (1 + noise)
        products = rows.double() @ rows.double().T
        if (products < 0).any():
            count -= 1
            yield products
