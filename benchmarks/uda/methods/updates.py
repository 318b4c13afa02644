"""What a step does with its pair of losses: harmonize it, or sum it as a reference."""

from collections.abc import Callable, Iterable
from itertools import count
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.uda.methods import Losses
from benchmarks.uda.methods.gramians import Row, to_row
from benchmarks.uda.methods.rules import find_rule
from ghopt import HarmonizedOptimizer, Recorder

Update: TypeAlias = Callable[[Losses], None]
"""Zero the gradients, go backward through both losses, step."""

MakeUpdate: TypeAlias = Callable[[SGD, Iterable[nn.Parameter]], Update]
"""An update of an optimizer's parameters, given those that both tasks share."""


def harmonized(
    base: Optimizer,
    shared: Iterable[nn.Parameter],
    *,
    rule: str,
    recorder: Recorder | None = None,
) -> Update:
    """Make the update with ``HarmonizedOptimizer``; the recorder, if any, records it."""
    chosen = find_rule(rule)
    optimizer = HarmonizedOptimizer(
        base,
        chosen.weighting,
        shared_params=list(shared),
        project_step=chosen.projects,
    )
    if recorder is not None:
        recorder.attach(optimizer)

    def update(losses: Losses) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses._asdict())
        optimizer.step()

    return update


def plain_update(sgd: SGD, shared: Iterable[nn.Parameter]) -> Update:  # noqa: ARG001
    """Make the update that everybody writes: the sum, one backward pass, bare SGD."""

    def update(losses: Losses) -> None:
        sgd.zero_grad()
        torch.autograd.backward(losses.alignment + losses.classification)
        sgd.step()

    return update


def looking_at_unrelated(
    sgd: SGD,
    shared: Iterable[nn.Parameter],
    *,
    make_update: MakeUpdate,
    null: list[Row],
    every: int,
    seed: int = 0,
) -> Update:
    """Make an update that first looks at unrelated gradients, now and then.

    Args:
        sgd: of the update.
        shared: parameters that both tasks share.
        make_update: makes the update itself.
        null: takes what :func:`unrelated_gramians` gives.
        every: how many updates pass from one look to the next.
        seed: of the unrelated gradients.
    """
    parameters = list(shared)
    step = make_update(sgd, parameters)
    numbers = count()
    # Its own, so that the signs do not disturb what the runs of a seed share.
    generator = torch.Generator().manual_seed(seed)

    def update(losses: Losses) -> None:
        if next(numbers) % every == 0:
            null.extend(unrelated_gramians(losses, parameters, generator))
        step(losses)

    return update


def unrelated_gramians(
    losses: Losses,
    shared: list[nn.Parameter],
    generator: torch.Generator,
    draws: int = 32,
) -> list[Row]:
    """Gramians of gradients that keep everything but their relation, ``draws`` of them.

    These are the two gradients of ``losses`` themselves, with a random sign for every
    row of every tensor of the first. A row belongs to one unit of the network, and is
    the unit's error times what the unit saw: so both tasks keep which units saw what,
    and how strongly each task pulls at a unit, but in which direction the first task
    pulls is chance. By symmetry half of these pairs are obtuse. (Shuffled coordinates
    would not do: they lose what the tasks share by using one network, and their
    cosines come out several times too narrow; nor are half of them obtuse, since the
    mean of a shuffled tensor stays.) Does not touch ``.grad``.
    """
    first, second = (
        torch.autograd.grad(
            loss, shared, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in losses
    )
    rows = torch.cat(
        [_row_sums(a * b) for a, b in zip(first, second, strict=True)]
    ).double()
    signs = torch.randint(2, (draws, len(rows)), generator=generator).to(rows) * 2 - 1
    squares = [
        torch.cat([tensor.flatten() for tensor in gradient]).double().square().sum()
        for gradient in (first, second)
    ]
    return [to_row(squares[0], product, squares[1]) for product in signs @ rows]


def _row_sums(tensor: Tensor) -> Tensor:
    """Sum all but the first dimension, ``[n, ...]`` to ``[n]``."""
    return tensor.reshape(len(tensor), -1).sum(1)
