"""The literal loop that judges every recipe: no ghopt, no framework, two tasks."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from examples.problem import task_losses

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs and targets."""

MicroBatch: TypeAlias = tuple[Tensor, ...]
"""What the losses are computed from."""

Steps: TypeAlias = Sequence[Sequence[MicroBatch]]
"""Of each step, the micro-batches."""


def wide(data: Batch) -> Batch:
    """Give the data in float64, so that only rounding separates two right results."""
    inputs, targets = data
    return inputs.double(), targets.double()


def steps_of(
    data: Batch, batch_size: int = 8, accumulate: int = 1, epochs: int = 1
) -> Steps:
    """Cut the data, in their order, into steps of micro-batches."""
    parts = (torch.split(tensor, batch_size) for tensor in data)
    batches = list(zip(*parts, strict=True))
    firsts = range(0, len(batches), accumulate)
    return [batches[first : first + accumulate] for first in firsts] * epochs


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.02, momentum=0.9)


def decay(optimizer: Optimizer) -> LRScheduler:
    return ExponentialLR(optimizer, 0.9)


def of_both_heads(model: nn.Module, batch: MicroBatch) -> list[Tensor]:
    inputs, targets = batch
    return list(task_losses(model(inputs), targets).values())


def theorem_1(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Give the weights of GH for two tasks: the paper's closed form."""
    products = torch.stack([first, second]) @ torch.stack([first, second]).T
    (g11, g12), (_, g22) = products.tolist()
    return (1 - g12 / g11, 1 - g12 / g22) if g12 < 0 else (1, 1)


def train(
    model: nn.Module,
    steps: Steps,
    *,
    losses_of: Callable[[nn.Module, MicroBatch], list[Tensor]] = of_both_heads,
    harmonize: bool = True,
    clip: float | None = None,
    make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    autocast: torch.dtype | None = None,
    scale: float = 1,
    optimizer: Optimizer | None = None,
) -> int:
    """Train on steps of micro-batches of one size, and count those in conflict.

    Args:
        model: gives the outputs of both tasks; changed in place.
        steps: of each step, the micro-batches.
        losses_of: gives the two losses of a micro-batch.
        harmonize: weigh the gradients by GH; otherwise they are summed.
        clip: norm of the update.
        make_scheduler: its scheduler makes a step after each step.
        autocast: precision of the forward pass.
        scale: of the losses in the backward pass.
        optimizer: steps on; by default a new one.
    """
    parameters = list(model.parameters())
    optimizer = sgd(model) if optimizer is None else optimizer
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    conflicts = 0
    for micro_batches in steps:
        rows = [torch.zeros(0)] * 2
        for batch in micro_batches:
            # Without its cache: that of an outer autocast would outlive the step.
            with torch.autocast("cpu", autocast, autocast is not None, False):
                losses = losses_of(model, batch)
            for task, loss in enumerate(losses):
                gradients = torch.autograd.grad(
                    loss * scale / len(micro_batches),
                    parameters,
                    retain_graph=True,
                    materialize_grads=True,
                )
                flat = torch.cat([gradient.flatten() for gradient in gradients])
                rows[task] = flat if not len(rows[task]) else rows[task] + flat
        first, second = (row.double() / scale for row in rows)
        tau = theorem_1(first, second)
        conflicts += tau != (1, 1)
        update = tau[0] * first + tau[1] * second if harmonize else first + second
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, torch.split(update, sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return conflicts
