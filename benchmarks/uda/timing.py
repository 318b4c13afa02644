"""What a rule costs: a training step with it, over the plain summed step."""

import time
from functools import partial
from itertools import cycle
from statistics import median

from benchmarks.uda.data import Batch, Task, batches
from benchmarks.uda.networks import build_networks
from benchmarks.uda.rules import RULES
from benchmarks.uda.steps import Config, Step, make_step
from benchmarks.uda.updates import Harmonized, MakeUpdate, Record, plain_update

WARM_UPS = 3
ROUNDS = 25


def time_ratios(task: Task, method: str, rounds: int = ROUNDS) -> dict[str, float]:
    """CPU time of a whole step with each rule, relative to the plain sum's.

    The plain sum is what one writes without ``ghopt``: ``(l1 + l2).backward()`` and
    bare SGD, on networks of its own. Every step with a rule is timed right after a
    plain one on the same batch, A B A B, and the ratios of these neighbours have their
    median taken: what else happens on the machine reaches both. The forward pass and,
    for MCD, the steps that are never harmonized are part of both.

    Returns:
        Ratio per rule, without ``sum``.
    """
    config = Config(task.name, method, "sum", seed=0, steps=WARM_UPS + rounds)
    stream = cycle(batches(task, config.batch_size, 8, seed=0))
    plain = _step(config, plain_update)
    ratios = {}
    for rule in RULES:
        if rule == "sum":
            continue
        harmonized = _step(config, partial(Harmonized, rule=rule, record=Record()))
        seconds = []
        for _ in range(WARM_UPS + rounds):
            batch = next(stream)
            seconds.append((_seconds(plain, batch), _seconds(harmonized, batch)))
        ratios[rule] = median(b / a for a, b in seconds[WARM_UPS:])
    return ratios


def _step(config: Config, make_update: MakeUpdate) -> Step:
    return make_step(config, build_networks(config.method, config.seed), make_update)


def _seconds(step: Step, batch: Batch) -> float:
    start = time.process_time()
    step(batch, 0.5)  # halfway: the gradient's reversal is warm
    return time.process_time() - start
