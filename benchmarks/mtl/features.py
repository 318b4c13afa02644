"""What `features=` keeps of the promise on the parameters: how often tasks are opposed.

Trains with conflicts removed at the features. In each step the gradients of all tasks on the
shared parameters are taken as well, and the sum, the update made of the features and `gh` on
the parameters are held against them.
"""

import argparse
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common.options import positive
from benchmarks.common.table import lay_out
from benchmarks.mtl.problem import Problem
from benchmarks.mtl.problems import PROBLEMS
from ghopt import HarmonizedOptimizer, gh

# Those whose models have a `trunk` that makes all features.
NAMES = ("cells", "detection-plain")
SEEDS = 3

# Cosines nearer to 0 than this are no conflict: rounding of float32 gradients.
ORTHOGONAL = 1e-6


class Opposed(NamedTuple):
    """Shares of the tasks and steps of a training in which an update opposes the task.

    Attributes:
        by_sum: by the plain sum.
        by_both: by it and by the update made of the features.
        by_features: by that update.
        by_gh: by `gh` on the parameters.
    """

    by_sum: float
    by_both: float
    by_features: float
    by_gh: float


def opposed(problem: Problem, seed: int, steps: int) -> Opposed:
    """Train once, and count."""
    training = problem.start(seed)
    trunk = training.model.get_submodule("trunk")
    kept: list[Tensor] = []
    trunk.register_forward_hook(lambda _, __, out: kept.append(out))
    optimizer = HarmonizedOptimizer(training.optimizer)
    found = []
    for batch in islice(training.batches, steps):
        kept.clear()
        losses = training.losses(batch)
        jacobian = _jacobian(losses.values(), training.shared)
        optimizer.zero_grad()
        optimizer.backward(losses, features=kept)
        update = _flat(p.grad for p in training.shared)
        by_sum, by_features, by_gh = (
            _cosines(jacobian, vector) < -ORTHOGONAL
            for vector in (
                jacobian.sum(0),
                update,
                gh(jacobian @ jacobian.T) @ jacobian,
            )
        )
        found.append(torch.stack([by_sum, by_sum & by_features, by_features, by_gh]))
        optimizer.step()
    return Opposed(*torch.stack(found, 1).flatten(1).double().mean(1).tolist())


def _jacobian(losses: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Take the gradients one by one, ``[K, N]``, float64."""
    return torch.stack(
        [
            _flat(torch.autograd.grad(loss, parameters, retain_graph=True))
            for loss in losses
        ]
    )


def _flat(gradients: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([g.flatten().double() for g in gradients if g is not None])


def _cosines(jacobian: Tensor, vector: Tensor) -> Tensor:
    lengths: Tensor = jacobian.norm(dim=1) * vector.norm()
    return jacobian @ vector / lengths


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.mtl.features", description=__doc__
    )
    parser.add_argument("--problems", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", type=positive, default=SEEDS, metavar="N")
    parser.add_argument("--steps", type=positive, metavar="N", help="(default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [["problem", "sum", "sum and features", "features", "gh"]]
    for name in options.problems:
        problem = PROBLEMS[name]
        steps = options.steps or problem.steps
        runs = [opposed(problem, seed, steps) for seed in range(options.seeds)]
        means = torch.tensor(runs, dtype=torch.float64).mean(0).tolist()
        rows.append([name, *(f"{100 * mean:.1f}" for mean in means)])
    print(f"tasks and steps opposed, in percent; {options.seeds} seeds")
    print(lay_out(rows))


if __name__ == "__main__":
    main()
