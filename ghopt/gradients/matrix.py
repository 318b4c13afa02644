"""The gradients of K tasks as one dense matrix, ``[K, n]``, on the CPU."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ghopt.gradients.entries import BLOCK, Entries, first_of

# A pack has this many elements of a task at most, or those of one tensor: so it takes
# little memory beside the gradients, and the caches hold it.
_PACK = 2**16
# From this size on float32 products of so many elements each are quicker than float64
# ones, by a fifth at K = 2 and a half at K = 8, and off by 1e-8 to 3e-8: measured on an
# EPYC, with the squares of random numbers, by MKL's fastest kernels and its plainest.
_LEAST, _LENGTH = 2**14, 2**8


@torch.no_grad()
def gramian_of(matrix: Tensor) -> Tensor:
    """Take the inner products of rows, in float64.

    Args:
        matrix: shape ``[K, n]``, of any real floating-point dtype.

    Returns:
        Shape ``[K, K]``, float64, symmetric to the last bit.
    """
    total = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    _add_wide(total, matrix, last=False)
    return total.triu() + total.triu(1).T


@torch.no_grad()
def weighted_row(matrix: Tensor, weights: Tensor, *, wide: bool) -> Tensor:
    """Sum rows with weights.

    Args:
        matrix: shape ``[K, n]``, float32 or float64.
        weights: shape ``[K]``, float64.
        wide: sum in float64 and round once, as rows that cancel need it.

    Returns:
        Shape ``[n]``, in the dtype of the matrix and memory of its own.
    """
    if not wide:
        return weights.to(matrix.dtype) @ matrix
    row = matrix.new_empty(matrix.shape[1])
    parts = zip(torch.split(matrix, BLOCK, dim=1), torch.split(row, BLOCK), strict=True)
    for block, part in parts:
        part.copy_(weights @ block.double())
    return row


class Pack(NamedTuple):
    """Small gradients of one dtype that the same tasks reach.

    Attributes:
        numbers: of these tasks.
        parameters: the gradients of each.
        size: number of elements of a task.
    """

    numbers: tuple[int, ...]
    parameters: list[Entries]
    size: int

    @property
    def is_long(self) -> bool:
        """Say whether float32 products come out right, and are less work."""
        is_short = self.size < _LEAST
        return not is_short and first_of(self.parameters[0]).dtype is torch.float32


def packed(parameters: Iterable[Entries]) -> list[Pack]:
    """Group small gradients, plain ones, see :func:`ghopt.gradients.entries.is_plain`."""
    packs: list[Pack] = []
    filling: dict[object, int] = {}
    for entries in parameters:
        numbers, first = tuple(entries), first_of(entries)
        kind, size = (first.dtype, numbers), first.numel()
        place = filling.get(kind)
        if place is None or packs[place].size + size > _PACK:
            filling[kind] = len(packs)
            packs.append(Pack(numbers, [entries], size))
        else:
            pack = packs[place]
            pack.parameters.append(entries)
            packs[place] = pack._replace(size=pack.size + size)
    return packs


def multiply_packs(
    packs: Iterable[Pack], tasks: int, *, last: bool = False, short: bool = False
) -> Tensor:
    """Take the inner products of small gradients.

    Args:
        packs: of all.
        tasks: number of tasks, K.
        last: take those with the last task alone.
        short: in float32 over short parts, and only these summed in float64: off by less
            than 4e-8 of the product of the norms.

    Returns:
        Shape ``[K, K]``, float64, of which the upper triangle is right.
    """
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device="cpu")
    for pack in packs:
        numbers = pack.numbers
        if last and numbers[-1] < tasks - 1:
            continue
        is_whole = len(numbers) == tasks
        part = total if is_whole else total.new_zeros(len(numbers), len(numbers))
        parts = [
            entries[task].flatten() for task in numbers for entries in pack.parameters
        ]
        rows = torch.cat(parts).view(len(numbers), -1)
        if short:
            _add_short(part, rows)
        else:
            _add_wide(part, rows, last=last)
        if not is_whole:
            place = torch.tensor(numbers, device="cpu")
            total[place[:, None], place] += part
    return total


def _add_short(total: Tensor, rows: Tensor) -> None:
    """Add the inner products of float32 rows, summed in float64 over short parts."""
    whole = rows.shape[1] // _LENGTH * _LENGTH
    parts = rows[:, :whole].view(len(rows), -1, _LENGTH).transpose(0, 1)
    total += torch.bmm(parts, parts.mT).sum(0, dtype=torch.float64)
    if whole < rows.shape[1]:
        rest = rows[:, whole:].double()
        total.addmm_(rest, rest.T)


def _add_wide(total: Tensor, rows: Tensor, *, last: bool) -> None:
    """Add the inner products of rows in float64, or those with the last alone."""
    # By blocks, so that what is made float64 takes little memory and stays in the cache.
    for block in torch.split(rows, BLOCK, dim=1):
        wide = block.double()
        if last:
            total[:, -1].addmv_(wide, wide[-1])
        else:
            total.addmm_(wide, wide.T)
