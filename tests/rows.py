"""Gradients as rows ``[K][P]``, one list per task, for the arithmetic of ``ghopt``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ghopt.gradients import StoredGradients

Rows = Sequence[Sequence[Tensor | None]]


def stored(rows: Rows) -> tuple[StoredGradients, list[Tensor]]:
    """Store them, and give the parameters that stand for the columns."""
    names = [str(task) for task in range(len(rows))]
    parameters = [torch.empty(0, device="cpu") for _ in rows[0]]
    gradients = StoredGradients(names, parameters)
    for name, row in zip(names, rows, strict=True):
        pairs = zip(parameters, row, strict=True)
        gradients[name].update({p: grad for p, grad in pairs if grad is not None})
    return gradients, parameters


def gramian(rows: Rows) -> Tensor:
    """Take their inner products."""
    return stored(rows)[0].gramian()


def combine(
    rows: Rows, weights: Tensor, products: Tensor | None = None
) -> list[Tensor | None]:
    """Sum them with weights, in place."""
    gradients, parameters = stored(rows)
    sums = gradients.combine(weights, products)
    return [sums.get(parameter) for parameter in parameters]
