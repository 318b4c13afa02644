"""What a rule costs: a training step with it, over the plain summed step."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import cycle, islice
from statistics import median

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.common.clock import WARM_UPS, cpu_seconds, time_rounds
from benchmarks.common.digits import SIZE
from benchmarks.uda.data import Task, batches
from benchmarks.uda.methods import Losses
from benchmarks.uda.methods.networks import build_networks
from benchmarks.uda.methods.steps import Config, Step, make_step
from benchmarks.uda.methods.updates import (
    MakeUpdate,
    Update,
    harmonized,
    plain_update,
)
from ghopt import gh, harmonized_loss

ROUNDS = 25


def updates_of(*rules: str) -> dict[str, MakeUpdate]:
    """Name the updates of rules, to be timed."""
    return {rule: partial(harmonized, rule=rule) for rule in rules}


def three_passes(sgd: SGD, shared: Iterable[nn.Parameter]) -> Update:
    """Make the update of the paper's Algorithm 1: the losses weighed, for all parameters."""
    parameters = list(shared)

    def update(losses: Losses) -> None:
        weighed = harmonized_loss(losses, parameters, gh)
        sgd.zero_grad()
        torch.autograd.backward(weighed)
        sgd.step()

    return update


def time_ratios(
    task: Task,
    method: str,
    updates: Mapping[str, MakeUpdate],
    rounds: int = ROUNDS,
    size: int = SIZE,
) -> tuple[float, dict[str, float]]:
    """CPU time of a whole step with each update, relative to the plain sum's.

    The plain sum is what one writes without ``ghopt``: ``(l1 + l2).backward()`` and
    bare SGD. Each update has networks of its own; in a round all make one step, on one
    batch. The forward pass and, for MCD and DWL, the steps that are never harmonized are
    part of each.

    Args:
        task: whose batches are seen.
        method: with two losses.
        updates: by name.
        rounds: how many count, after a few that warm up.
        size: of the images.

    Returns:
        Milliseconds of the plain step, the median over the rounds, and for each update
        the median of the rounds' ratios to it.
    """
    config = Config(task.name, method, "sum", 0, WARM_UPS + rounds, size=size)
    stream = cycle(batches(task, config.batch_size, 8, seed=0))
    steps = [_step(config, make) for make in (plain_update, *updates.values())]
    # Halfway through a training: the gradient's reversal is warm.
    calls = (
        [partial(step, batch, 0.5) for step in steps]
        for batch in islice(stream, config.steps)
    )
    seconds = [*time_rounds(calls, cpu_seconds)]
    ratios = {
        name: median(row[place] / row[0] for row in seconds)
        for place, name in enumerate(updates, start=1)
    }
    return 1000 * median(row[0] for row in seconds), ratios


def _step(config: Config, make_update: MakeUpdate) -> Step:
    return make_step(
        config, build_networks(config.method, config.seed, config.size), make_update
    )
