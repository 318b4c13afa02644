"""Time and memory of the steps of all methods on one network."""

import gc
import random
from collections.abc import Sequence
from functools import partial
from itertools import repeat
from statistics import quantiles

import torch

from benchmarks.common.clock import WARM_UPS, Call, Timer, make_timer, time_rounds
from benchmarks.common.watch import watch
from benchmarks.speed.methods import FLOOR, PLAIN, Method, Step
from benchmarks.speed.problems import make
from benchmarks.speed.results import Figure, attempt

# In a shorter time the clock would show, and what the caches still hold.
SHORTEST = 0.02


def time_ratios(
    methods: Sequence[Method],
    network: str,
    tasks: int,
    rounds: int,
    device: torch.device,
    floor: Method = FLOOR,
    table: str = "time",
) -> list[Figure]:
    """Time whole steps of all methods, each over one of the floor right beside it.

    Every method has a network and an optimizer of its own. In each round all take their
    turns, in another order: A B with the floor, in the next round B A. The floor takes a
    turn against itself: its quartiles tell the noise. Steps too short for a clock are
    repeated within a turn, after one that is not timed; steps that differ in cost, in
    turns of whole cycles. The floor is one of the methods.
    """
    timer = make_timer(device)
    steps: dict[str, Step] = {}
    errors = {}
    for method in methods:
        step, error = attempt(partial(_warm_step, method, network, tasks, device))
        if step is None:
            errors[method.name] = error
        else:
            steps[method.name] = step
    repeats = max(1, round(SHORTEST / timer(steps[floor.name])))
    turns = {
        method.name: time_rounds(
            repeat((steps[method.name], steps[floor.name])),
            partial(_timed, timer=timer, cycles=repeats, cycle=method.cycle),
            warm_ups=0,  # each by itself has had its own
        )
        for method in methods
        if method.name in steps
    }
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    orders = random.Random(0)
    for _ in range(rounds):
        gc.collect()
        for name in orders.sample(list(steps), len(steps)):
            own, beside = next(turns[name])
            ratios[name].append(own / beside)
    found = []
    for method in methods:
        name, error = method.name, errors.get(method.name, "")
        middle, low, high = (None,) * 3 if error else spread(ratios[name])
        found.append(Figure(table, tasks, name, network, middle, low, high, error))
    return found


def peak_copies(
    methods: Sequence[Method], network: str, tasks: int, device: torch.device
) -> list[Figure]:
    """Take the peak of live tensors over that of the plain step, in gradient copies.

    The step is a second one, so the state of the optimizer is in both. A kernel's own
    scratch memory is not seen, see :class:`benchmarks.common.watch.Watch`.
    """
    problem = make(network, tasks, device)
    plain = watch(PLAIN.start(problem)).peak

    def copies(method: Method) -> float:
        step = method.start(make(network, tasks, device))
        peak = watch(step, method.cycle).peak
        return (peak - plain) / problem.size

    found = []
    for method in methods:
        value, error = attempt(partial(copies, method))
        found.append(Figure("memory", tasks, method.name, network, value, error=error))
    return found


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Take the median, the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _warm_step(method: Method, network: str, tasks: int, device: torch.device) -> Step:
    step = method.start(make(network, tasks, device))
    repeated(step, WARM_UPS)
    return step


def _timed(step: Call, timer: Timer, cycles: int, cycle: int) -> float:
    if cycles > 1:
        repeated(step, cycle)
    return timer(partial(repeated, step, cycles * cycle))


def repeated(step: Call, times: int) -> None:
    """Make a call so many times."""
    for _ in range(times):
        step()
