"""Eight tasks on one real table: breast cancer cells of Wisconsin, inside scikit-learn.

A row is one tumour: of ten measures of its cell nuclei (radius, texture, ...) the mean over
the nuclei, and the mean of the three worst. The network sees the ten means; one head
classifies the tumour as benign or malignant, seven heads estimate worst values.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mtl.problem import Batch, Metric, Problem, Training, generator
from ghopt.extras import from_extra

MEASURES = (
    "radius",
    "texture",
    "smoothness",
    "compactness",
    "concavity",
    "symmetry",
    "fractal dimension",
)
TASKS = ("malignant", *MEASURES)
HIDDEN = 16
BATCH = 64
TESTS = 169
RATE = 3e-3
MEAN = "mean score"


class EightHeads(nn.Module):
    """A small trunk with a linear head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(10, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()
        )
        self.heads = nn.ModuleDict({task: nn.Linear(HIDDEN, 1) for task in TASKS})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return a number per row, ``[B]``, by task: a logit, then standardised values."""
        features = self.trunk(inputs)
        return {task: head(features)[:, 0] for task, head in self.heads.items()}


def start(seed: int) -> Training:
    """Give the training of a seed, which splits the rows, too; sets the random state."""
    train, test = split(table(), seed)
    torch.manual_seed(seed)
    model = EightHeads()

    def losses(batch: Batch) -> dict[str, Tensor]:
        inputs, targets = batch
        return task_losses(model(inputs), targets)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        inputs, targets = test
        return scores(model(inputs), targets)

    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.trunk.parameters()),
        _batches(train, seed),
        losses,
        evaluate,
    )


PROBLEM = Problem(
    "cells",
    "a table of tumour cells, one classification and seven regressions",
    TASKS,
    (Metric(MEAN), *(Metric(task, headline=False) for task in TASKS)),
    steps=500,
    start=start,
    main="malignant",
    needs=("sklearn",),
)


@cache
def table() -> Batch:
    """Load the inputs, float32 ``[569, 10]``, and the targets ``[569, 8]``.

    Raises:
        ImportError: if scikit-learn is missing; names the extra.
    """
    with from_extra("mtl"):
        from sklearn.datasets import load_breast_cancer
    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    columns = torch.from_numpy(data.data).float()
    means = [index for index, name in enumerate(names) if name.startswith("mean ")]
    worst = [names.index(f"worst {measure}") for measure in MEASURES]
    malignant = torch.from_numpy(data.target == 0).float()
    return columns[:, means], torch.cat([malignant[:, None], columns[:, worst]], 1)


def split(rows: Batch, seed: int) -> tuple[Batch, Batch]:
    """Split the rows in 400 and 169; standardise all but labels by the former's."""
    inputs, targets = rows
    order = torch.randperm(len(inputs), generator=generator(seed, 3))
    test, train = order[:TESTS], order[TESTS:]
    inputs = _standardised(inputs, train)
    labels, values = targets[:, :1], _standardised(targets[:, 1:], train)
    targets = torch.cat([labels, values], 1)
    return (inputs[train], targets[train]), (inputs[test], targets[test])


def task_losses(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Cross entropy of the first task, mean squared error of the others."""
    return {
        task: F.mse_loss(outputs[task], target)
        if index
        else F.binary_cross_entropy_with_logits(outputs[task], target)
        for index, (task, target) in enumerate(
            zip(TASKS, targets.unbind(1), strict=True)
        )
    }


def scores(outputs: dict[str, Tensor], targets: Tensor) -> dict[str, float]:
    """Accuracy of the first task, R^2 of the others, and the mean of all, in percent."""
    found: dict[str, float] = {}
    for task, target in zip(TASKS, targets.double().unbind(1), strict=True):
        output = outputs[task].double()
        if task == TASKS[0]:
            share = ((output > 0) == (target > 0.5)).double().mean()
        else:
            error = (output - target).square().mean()
            share = 1 - error / target.var(correction=0)
        found[task] = 100 * float(share)
    return {MEAN: sum(found.values()) / len(found), **found}


def _standardised(columns: Tensor, train: Tensor) -> Tensor:
    known = columns[train]
    return (columns - known.mean(0)) / known.std(0)


def _batches(rows: Batch, seed: int) -> Iterator[Batch]:
    draws = generator(seed, 1)
    while True:
        chosen = torch.randint(len(rows[0]), (BATCH,), generator=draws)
        yield tuple(column[chosen] for column in rows)
