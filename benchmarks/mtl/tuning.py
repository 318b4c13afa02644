"""Rules at their best: each with the rate and the loss weight that suit it.

A rule is only worth its passes if a larger rate, another loss weight or more steps would
not have done the same for the plain sum. So each contender is trained in every cell of a
grid of rates and weights, on some seeds; in the cell that was best there it is trained
again, on other seeds, and only these are compared.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.common.store import hash_of
from benchmarks.mtl.problem import Problem
from benchmarks.mtl.problems import PROBLEMS
from ghopt import HarmonizedOptimizer, Weighting, gh, plain_sum

STORE = Path(__file__).with_name("tuned.jsonl")
"""The runs that are committed."""

CHOOSING, COMPARING = range(4), range(200, 210)
"""The seeds that choose a cell, and those of what is reported of it."""

REVISION = 1
"""Raise it where a run would end otherwise: stored runs count no more then."""


@dataclass(frozen=True)
class Contender:
    """A way to train.

    Attributes:
        weighting: of the tasks.
        projects: whether momentum and step are projected, too.
        in_one: whether the losses are one, their sum: one task, one pass.
        passes: whether it takes as many steps more as the others take passes.
        momentum: whether Adam keeps its average of gradients (its first beta).
    """

    weighting: Weighting = plain_sum
    projects: bool = False
    in_one: bool = False
    passes: bool = False
    momentum: bool = True


CONTENDERS = {
    "sum": Contender(in_one=True),
    "sum, K times the steps": Contender(in_one=True, passes=True),
    "sum, without momentum": Contender(in_one=True, momentum=False),
    # Adaptive restart of momentum (O'Donoghue and Candes, 2015): no multi-task idea.
    "sum, projected on itself": Contender(in_one=True, projects=True),
    "sum, projected": Contender(projects=True),
    "gh": Contender(gh),
    "gh, projected": Contender(gh, projects=True),
}


class Cell(NamedTuple):
    """Where a contender is trained.

    Attributes:
        rate: times the problem's.
        weight: of the losses that the problem names.
    """

    rate: float
    weight: float


@dataclass(frozen=True)
class Run:
    """What is kept of one training.

    Attributes:
        key: hash of what it is of.
        problem: its name.
        contender: its name.
        rate: of its cell.
        weight: of its cell.
        seed: of weights and batches.
        steps: number of training steps.
        metrics: after the last step, by name.
        torch: its version.
    """

    key: str
    problem: str
    contender: str
    rate: float
    weight: float
    seed: int
    steps: int
    metrics: dict[str, float]
    torch: str


class Order(NamedTuple):
    """A training to be done."""

    problem: str
    contender: str
    cell: Cell
    seed: int

    @property
    def steps(self) -> int:
        """Number of training steps."""
        problem = PROBLEMS[self.problem]
        times = len(problem.tasks) if CONTENDERS[self.contender].passes else 1
        return times * problem.steps

    @property
    def key(self) -> str:
        """Tell it from others: the settings, not the code, see ``REVISION``."""
        rate, weight = map(float, self.cell)
        settings = (self.problem, self.contender, rate, weight, self.seed, self.steps)
        return hash_of(*settings, REVISION)


def train(order: Order) -> Run:
    """Train once. Runs that differ in their contender only start alike and see the same."""
    problem, contender = PROBLEMS[order.problem], CONTENDERS[order.contender]
    training = problem.start(order.seed)
    for group in training.optimizer.param_groups:
        group["lr"] *= order.cell.rate
        if not contender.momentum:
            group["betas"] = (0.0, group["betas"][1])
    optimizer = HarmonizedOptimizer(
        training.optimizer,
        contender.weighting,
        shared_params=training.shared,
        project_step=contender.projects,
    )
    decay = LambdaLR(optimizer, lambda done: 1 - done / order.steps)
    for batch in islice(training.batches, order.steps):
        losses = weighted(problem, training.losses(batch), order.cell.weight)
        optimizer.zero_grad()
        together = torch.stack([*losses.values()]).sum()
        optimizer.backward([together] if contender.in_one else losses)
        optimizer.step()
        decay.step()
    return Run(
        order.key,
        order.problem,
        order.contender,
        *order.cell,
        order.seed,
        order.steps,
        training.evaluate(),
        torch.__version__,
    )


def weighted(
    problem: Problem, losses: Mapping[str, Tensor], weight: float
) -> dict[str, Tensor]:
    """Multiply the losses that the problem names."""
    return {
        name: weight * loss if name in problem.weighted else loss
        for name, loss in losses.items()
    }


def values(
    known: Mapping[str, Run], problem: str, contender: str, cell: Cell, seeds: range
) -> list[float]:
    """List the headline of the runs that are there, by seed."""
    headline = PROBLEMS[problem].metrics[0].name
    orders = [Order(problem, contender, cell, seed) for seed in seeds]
    return [known[one.key].metrics[headline] for one in orders if one.key in known]


def best_cell(
    known: Mapping[str, Run],
    problem: str,
    contender: str,
    cells: Sequence[Cell],
    seeds: range,
) -> Cell | None:
    """Choose the cell with the best mean; None until all cells are whole."""
    found = {cell: values(known, problem, contender, cell, seeds) for cell in cells}
    if any(len(of_cell) < len(seeds) for of_cell in found.values()):
        return None
    sign = 1 if PROBLEMS[problem].metrics[0].more_is_better else -1
    return max(cells, key=lambda cell: sign * mean(found[cell]))


def at_best(
    known: Mapping[str, Run], problem: str, cells: Sequence[Cell]
) -> dict[str, tuple[Cell, list[float]]]:
    """Give each contender's best cell, and its headline there by seed of ``COMPARING``.

    Those whose runs are not all there are left out.
    """
    found: dict[str, tuple[Cell, list[float]]] = {}
    for name in CONTENDERS:
        cell = best_cell(known, problem, name, cells, CHOOSING)
        figures = values(known, problem, name, cell, COMPARING) if cell else []
        if cell and len(figures) == len(COMPARING):
            found[name] = cell, figures
    return found


def whole_cells(known: Mapping[str, Run], problem: str) -> list[Cell]:
    """List the cells in which every contender has all runs that choose."""
    cells = {Cell(run.rate, run.weight) for run in known.values()}
    return sorted(
        cell
        for cell in cells
        if all(
            len(values(known, problem, name, cell, CHOOSING)) == len(CHOOSING)
            for name in CONTENDERS
        )
    )
