"""What a rule costs: a training step with it, over the plain summed step.

``python -m benchmarks.uda.timing`` prints it, as the paper's Table 6 does for MCD.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.common.clock import cpu_seconds
from benchmarks.common.options import positive
from benchmarks.uda.data import DEMO, LARGE, SIZE, Task, batches, load_task
from benchmarks.uda.methods import Losses
from benchmarks.uda.methods.networks import build_networks
from benchmarks.uda.methods.steps import (
    ALL_METHODS,
    SOURCE_ONLY,
    Config,
    Step,
    make_step,
)
from benchmarks.uda.methods.updates import (
    Harmonized,
    MakeUpdate,
    Record,
    Update,
    plain_update,
)
from ghopt import gh, harmonized_loss

WARM_UPS = 3
ROUNDS = 25

NOTES = """\
plain: CPU time of a training step with the sum of the losses, in milliseconds.
gh, ghpp: with HarmonizedOptimizer, one backward pass per task, over plain.
three passes: gh as the paper's Algorithm 1 has it, two passes for the weights and one
  of the weighed losses, over plain.
Table 6 of the paper, MCD with GH over MCD: 1.18 (MNIST to USPS), 1.11 (USPS to MNIST)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: a line per method, on embedded data."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.timing", description=__doc__
    )
    parser.add_argument(
        "--rounds", type=positive, default=100, metavar="N", help="(default: 100)"
    )
    parser.add_argument(
        "--size",
        type=int,
        choices=[SIZE, LARGE],
        default=SIZE,
        help=f"of the images (default: {SIZE})",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        task = load_task(DEMO, size=options.size)
    except ImportError as error:
        parser.error(str(error))
    updates = {**harmonized("gh", "ghpp"), "three passes": three_passes}
    print("".join(f"{name:>14}" for name in ("", "plain, ms", *updates)))
    for method in ALL_METHODS:
        if method != SOURCE_ONLY:
            plain, ratios = time_ratios(
                task, method, updates, options.rounds, options.size
            )
            print(
                f"{method:14}{plain:14.2f}"
                + "".join(f"{ratio:14.2f}" for ratio in ratios.values())
            )
    print(f"\n{NOTES}")


def harmonized(*rules: str) -> dict[str, MakeUpdate]:
    """Name the updates of rules, to be timed."""
    return {rule: partial(Harmonized, rule=rule, record=Record()) for rule in rules}


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
    batch, one after another: what else happens on the machine reaches all. The forward
    pass and, for MCD and DWL, the steps that are never harmonized are part of each.

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
    seconds = []
    for _ in range(config.steps):
        batch = next(stream)
        # Halfway through a training: the gradient's reversal is warm.
        seconds.append([cpu_seconds(partial(step, batch, 0.5)) for step in steps])
    kept = seconds[WARM_UPS:]
    ratios = {
        name: median(row[place] / row[0] for row in kept)
        for place, name in enumerate(updates, start=1)
    }
    return 1000 * median(row[0] for row in kept), ratios


def _step(config: Config, make_update: MakeUpdate) -> Step:
    return make_step(
        config, build_networks(config.method, config.seed, config.size), make_update
    )


if __name__ == "__main__":
    main()
