"""What a step does with its pair of losses: harmonize it, or sum it as a reference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.uda.methods import Losses
from benchmarks.uda.methods.rules import find_rule
from benchmarks.uda.results import Row
from ghopt import HarmonizedOptimizer

Update: TypeAlias = Callable[[Losses], None]
"""Zero the gradients, go backward through both losses, step."""

MakeUpdate: TypeAlias = Callable[[SGD, Iterable[nn.Parameter]], Update]
"""An update of an optimizer's parameters, given those that both tasks share."""


@dataclass
class Record:
    """What an update saw.

    Attributes:
        gramians: ``[2, 2]`` each, of the gradients over the shared parameters, one per
            update.
        null: Gramians of unrelated gradients, see :func:`unrelated_gramians`.
    """

    gramians: list[Tensor] = field(default_factory=list)
    null: list[Row] = field(default_factory=list)


class Harmonized:
    """An update with ``HarmonizedOptimizer``.

    Args:
        record: what it sees is appended to this.
        null_every: how many updates pass from one look at unrelated gradients to the
            next; None for no look.
        seed: of the unrelated gradients.
    """

    def __init__(
        self,
        sgd: SGD,
        shared: Iterable[nn.Parameter],
        *,
        rule: str,
        record: Record,
        null_every: int | None = None,
        seed: int = 0,
    ) -> None:
        self._shared = list(shared)
        self._optimizer = HarmonizedOptimizer(
            sgd, weighting=find_rule(rule).weighting, shared_params=self._shared
        )
        self._record = record
        self._null_every = null_every
        # Its own, so that the signs do not disturb what the runs of a seed share.
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, losses: Losses) -> None:
        """Harmonize the pair and step."""
        record = self._record
        if self._null_every and len(record.gramians) % self._null_every == 0:
            record.null += unrelated_gramians(losses, self._shared, self._generator)
        self._optimizer.zero_grad()
        self._optimizer.backward(losses._asdict())
        self._optimizer.step()
        last = self._optimizer.last
        assert last is not None  # backward has just run
        record.gramians.append(last.gramian)


def plain_update(sgd: SGD, shared: Iterable[nn.Parameter]) -> Update:  # noqa: ARG001
    """Make the update that everybody writes: the sum, one backward pass, bare SGD."""

    def update(losses: Losses) -> None:
        sgd.zero_grad()
        torch.autograd.backward(losses.alignment + losses.classification)
        sgd.step()

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


def to_row(first: Tensor, product: Tensor, second: Tensor) -> Row:
    """Round to 8 digits what is stored of a Gramian: g1.g1, g1.g2 and g2.g2."""
    a, b, c = (float(f"{float(number):.8g}") for number in (first, product, second))
    return a, b, c


def _row_sums(tensor: Tensor) -> Tensor:
    """Sum all but the first dimension, ``[n, ...]`` to ``[n]``."""
    return tensor.reshape(len(tensor), -1).sum(1)
