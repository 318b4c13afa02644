"""What the tests ask of modules: their values, and what a loss does to them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def values(module: nn.Module) -> list[Tensor]:
    """Copy the parameters."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(one: Iterable[Tensor], two: Iterable[Tensor]) -> bool:
    """Tell whether all are equal to the bit."""
    return all(a.equal(b) for a, b in zip(one, two, strict=True))


def without_dropout(module: nn.Module) -> None:
    """Drop nothing from now on, in training mode either."""
    for one in module.modules():
        if isinstance(one, nn.Dropout | nn.Dropout2d):
            one.p = 0.0


def gradients(loss: Tensor, module: nn.Module) -> list[Tensor]:
    """Of each parameter, zeros where the loss does not reach; keeps the graph."""
    return list(
        torch.autograd.grad(
            loss, list(module.parameters()), retain_graph=True, materialize_grads=True
        )
    )
