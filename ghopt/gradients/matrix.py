"""The gradients of K tasks as one dense matrix, ``[K, n]``, on the CPU."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ghopt.gradients.entries import BLOCK, Entries, first_of

# A matrix has this many elements of a task, and of all tasks, at most, or those of one
# tensor: so it takes little memory beside the gradients, and the caches hold it.
_PACK, _PACK_OF_ALL = 2**14, 2**16
# Matrices with at most so many columns are laid side by side: a call takes longer.
_NARROW = 2**11


@torch.no_grad()
def gramian_of(matrices: Iterable[Tensor], tasks: int) -> Tensor:
    """Take the inner products of rows that lie in several matrices, in float64.

    Args:
        matrices: each ``[K, n]`` on the CPU, of one real floating-point dtype.
        tasks: number of rows, K.

    Returns:
        Shape ``[K, K]``, float64, symmetric to the last bit; zeros without a matrix.
    """
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device="cpu")
    narrow = []
    for matrix in matrices:
        if matrix.shape[1] <= _NARROW:
            narrow.append(matrix)
        else:
            _add_blocks(total, matrix)
    if narrow:
        _add_blocks(total, torch.cat(narrow, dim=1))
    return total.triu() + total.triu(1).T


def _add_blocks(total: Tensor, matrix: Tensor) -> None:
    """Add the inner products of the rows of one matrix."""
    # By blocks, so that what is made float64 takes little memory and stays in the cache.
    for block in torch.split(matrix, BLOCK, dim=1):
        wide = block.double()
        total.addmm_(wide, wide.T)


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


def multiply_small(parameters: Iterable[Entries], tasks: int, *, last: bool) -> Tensor:
    """Take the inner products of small gradients, in float64.

    Args:
        parameters: the gradients of each, plain, see :func:`ghopt.gradients.entries.is_plain`.
        tasks: number of tasks, K.
        last: take those with the last task alone.

    Returns:
        Shape ``[K, K]``, float64, of which the upper triangle is right.
    """
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device="cpu")
    for numbers, pack in _packs(parameters):
        if last and numbers[-1] < tasks - 1:
            continue
        if len(numbers) == tasks:
            _add_products(total, pack, numbers, last=last)
            continue
        place = torch.tensor(numbers, device="cpu")
        part = total.new_zeros(len(numbers), len(numbers))
        _add_products(part, pack, numbers, last=last)
        total[place[:, None], place] += part
    return total


def _add_products(
    total: Tensor, pack: list[Entries], numbers: tuple[int, ...], *, last: bool
) -> None:
    """Add the inner products of a pack, or those with the last alone."""
    parts = [entries[task].flatten() for task in numbers for entries in pack]
    wide = torch.cat(parts).double().view(len(numbers), -1)
    if last:
        total[:, -1].addmv_(wide, wide[-1])
    else:
        total.addmm_(wide, wide.T)


def _packs(
    parameters: Iterable[Entries],
) -> list[tuple[tuple[int, ...], list[Entries]]]:
    """Group gradients of one dtype that the same tasks reach, with the tasks."""
    packs: list[tuple[tuple[int, ...], list[Entries]]] = []
    filling: dict[object, list[Entries]] = {}
    sizes: dict[object, int] = defaultdict(int)
    for entries in parameters:
        numbers, first = tuple(entries), first_of(entries)
        kind, size = (first.dtype, numbers), first.numel()
        sizes[kind] += size
        most = min(_PACK, _PACK_OF_ALL // len(numbers))
        if sizes[kind] > most or kind not in filling:
            filling[kind], sizes[kind] = [], size
            packs.append((numbers, filling[kind]))
        filling[kind].append(entries)
    return packs
