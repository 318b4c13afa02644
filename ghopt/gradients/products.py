"""Inner products of the gradients of K tasks, parameter by parameter."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import reduce
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ghopt.forms import has_float64, home_of_numbers
from ghopt.geometry import cosines
from ghopt.gradients.entries import (
    BLOCK,
    DEVICE_BLOCK,
    Entries,
    Prepared,
    blocks,
    first_of,
    flattened,
    is_sparse,
    kernels,
)
from ghopt.gradients.matrix import multiply_small
from ghopt.gradients.narrow import quick_products

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WIDE_BLOCK = 2**15
# To multiply shorter gradients in float64 takes little, and is never done twice.
_LONG = 2**19
# How many sums of float32 a dot product keeps side by side is the processor's choice,
# and with it the error: over blocks of 64K elements up to 2e-8 on a Xeon and 2e-7 on an
# AMD EPYC (family 25, model 1), and there, over 16K, 2e-8 of normal numbers and 2e-7 of
# their squares. So here none is taken that could be long. Measured on that EPYC, over
# five million elements, beside dot products of 16K:
# - Two or three tasks add their products to so many sums each, of so many products at
#   most: off by 6e-10 and 9e-9, in 0.8 of the time at K = 2.
_SUMS, _TERMS = 2**16, 128
# - More are copied side by side, where so many products of [K, n] by [n, K] are one
#   call: off by 6e-9 and 4e-8, in 0.9 to 1.0 of the time at K = 4, 0.7 at 8, 0.4 at 16.
_STACKED, _LENGTH = 32, 2**10
_FEW = 3
# Tensors up to this size are packed: their arithmetic costs less than a call of torch.
_SMALL = 2**14
# A pack has this many elements of a task and one tensor more at most, so that packing
# takes no memory to speak of, however many small tensors there are.
_PACK_ELEMENTS = 2**16


@torch.no_grad()
def multiply(
    prepared: Iterable[Prepared], tasks: int, known: Tensor | None = None
) -> Tensor:
    """Inner products of the gradients of K tasks.

    The products are float64 and so is their sum, with one exception. On the CPU long
    float32 gradients are multiplied in float32, block by block, with an error below
    1e-7 of the product of the norms; where that could spoil the weights (overflow,
    norms below 1e-10, gradients in conflict and nearly dependent) they are multiplied
    again in float64. Elsewhere to ask for such a case would make the device wait.

    Of gradients on a device without float64 the Gramian is on the CPU, and as exact: see
    ``narrow.py``. There the host waits for the device.

    Of DTensors, the ranks sum the ``[K, K]`` products of their shards.

    Args:
        prepared: of all gradients.
        tasks: number of tasks, K.
        known: the inner products of all but the last, ``[K - 1, K - 1]``. Then only those
            with the last are taken, which is less work.

    Returns:
        Shape ``[K, K]``, float64, symmetric, on the device of the first gradient, or on
        the CPU where that has no float64; zeros on the CPU if there is none.
    """
    totals = [
        _sum_over(part.groups, _products_of(part, tasks, known)) for part in prepared
    ]
    if not totals:
        return torch.zeros(tasks, tasks, dtype=torch.float64, device="cpu")
    total = reduce(lambda total, more: total + more.to(total.device), totals)
    if known is not None:
        total[:-1, :-1] = known
    return total


def _sum_over(groups: "Iterable[ProcessGroup]", tensor: Tensor) -> Tensor:
    """Sum over the ranks of every group, in place."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def _is_long(flat: Tensor) -> bool:
    """Say whether float32 products, summed in float64 over blocks, come out right."""
    on_cpu = flat.device.type == "cpu"
    return on_cpu and flat.dtype is torch.float32 and len(flat) > _LONG


def _products_of(part: Prepared, tasks: int, known: Tensor | None) -> Tensor:
    """Take the inner products of all that this rank has."""
    last = known is not None
    products: list[Tensor] = [kernels().gramian(table) for table, _ in part.fused]
    small, quick, short, packed = [], [], [], []
    for entries in part.rest:
        if part.is_plain and first_of(entries).numel() <= _SMALL:
            packed.append(entries)
            continue
        if not part.is_plain and is_sparse(entries):
            products.append(_multiply_sparse(entries, tasks, last=last))
            continue
        flat = flattened(entries)
        first = first_of(flat)
        if first.numel() <= _SMALL:
            small.append(flat)
        elif not has_float64(first.device):
            short.append(flat)
        # Shards may be long on some ranks and short on others, and doubt is for all.
        elif _is_long(first) and not part.groups:
            quick.append(flat)
        else:
            products.append(_multiply_large(flat, tasks, last=last))
    rows = [_packed(pack, tasks) for pack in _packs(small)]
    products += [_multiply_packed(pack, last=last) for pack in rows]
    if packed:
        products.append(multiply_small(packed, tasks, last=last))
    fast = [_multiply_as_they_are(flat, tasks, last=last) for flat in quick]
    fast += [quick_products(short, tasks, last=last)] if short else []
    total = _sum([*products, *fast])
    if fast and _in_doubt(total, known):
        sure = [_multiply_large(flat, tasks, last=last) for flat in [*quick, *short]]
        total = _sum([*products, *sure])
    return total


def _pairs(tasks: Collection[int], count: int, *, last: bool) -> list[tuple[int, int]]:
    """List the pairs of tasks whose products are wanted: all, or those with the last."""
    every = combinations_with_replacement(tasks, 2)
    return [(i, j) for i, j in every if not last or j == count - 1]


def _sum(products: list[Tensor]) -> Tensor:
    """Sum Gramians, of which only the upper triangle need be right."""
    device = products[0].device
    total = reduce(torch.add, (each.to(device) for each in products))
    return total.triu() + total.triu(1).T


def _packs(parameters: list[Entries]) -> list[list[Entries]]:
    """Group flat gradients of a kind, so many that a group is worth its calls."""
    packs: list[list[Entries]] = []
    filling: dict[object, list[Entries]] = {}
    sizes: dict[object, int] = defaultdict(int)
    for entries in parameters:
        first = first_of(entries)
        kind = first.dtype, first.device
        if kind not in filling or sizes[kind] > _PACK_ELEMENTS:
            filling[kind], sizes[kind] = [], 0
            packs.append(filling[kind])
        filling[kind].append(entries)
        sizes[kind] += len(first)
    return packs


def _packed(pack: list[Entries], tasks: int) -> Tensor:
    """Lay flat gradients side by side: ``[K, n]``, zeros where one is missing."""
    sizes = [len(first_of(entries)) for entries in pack]
    zeros = first_of(pack[0]).new_zeros(max(sizes))
    parts = [
        entries[task] if task in entries else zeros[:size]
        for task in range(tasks)
        for entries, size in zip(pack, sizes, strict=True)
    ]
    rows = torch.cat(parts).view(tasks, -1)
    return rows.to(home_of_numbers(rows.device))


def _multiply_packed(rows: Tensor, *, last: bool) -> Tensor:
    """Take the inner products of rows ``[K, n]`` of one pack in float64."""
    wide = rows.double()
    if not last:
        return wide @ wide.T
    total = wide.new_zeros(len(wide), len(wide))
    total[:, -1] = wide @ wide[-1]
    return total


def _multiply_large(flat: Entries, tasks: int, *, last: bool) -> Tensor:
    """Take the inner products of one parameter in float64, block by block."""
    first = first_of(flat)
    if first.dtype is torch.float64 and first.device.type == "cpu":
        return _multiply_as_they_are(flat, tasks, last=last)
    size = min(_WIDE_BLOCK if first.device.type == "cpu" else DEVICE_BLOCK, len(first))
    home = home_of_numbers(first.device)
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device=home)
    # One piece of memory for all blocks: to allocate each costs more than its products.
    # The rows of missing tasks stay zero.
    scratch = total.new_zeros(tasks, size)
    for block in blocks(flat, size):
        rows = scratch[:, : len(first_of(block))]
        for task, part in block.items():
            rows[task].copy_(part.to(home))
        if last:
            total[:, -1].addmv_(rows, rows[-1])
        else:
            total.addmm_(rows, rows.T)
    return total


def _multiply_as_they_are(flat: Entries, tasks: int, *, last: bool) -> Tensor:
    """Take the inner products of one parameter in its own dtype, summed in float64."""
    if first_of(flat).dtype is torch.float64:
        return _multiply_wide(flat, tasks, last=last)
    if last or len(flat) <= _FEW:
        return _multiply_elements(flat, tasks, last=last)
    return _multiply_stacked(flat, tasks)


def _multiply_wide(flat: Entries, tasks: int, *, last: bool) -> Tensor:
    """Do so for float64, of which a long dot product loses nothing that counts."""
    total = first_of(flat).new_zeros(tasks, tasks)
    products: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    pairs = _pairs(flat, tasks, last=last)
    # By blocks, which stay in the cache for every pair.
    for block in blocks(flat, BLOCK):
        for i, j in pairs:
            products[i, j].append(torch.dot(block[i], block[j]))
    for (i, j), parts in products.items():
        total[i, j] = torch.stack(parts).sum()
    return total


def _multiply_elements(flat: Entries, tasks: int, *, last: bool) -> Tensor:
    """Do so pair by pair, in many sums side by side."""
    first = first_of(flat)
    pairs = _pairs(flat, tasks, last=last)
    sums = first.new_empty(len(pairs), _SUMS)
    products = first.new_zeros(len(pairs), dtype=torch.float64)
    runs = [torch.split(tensor, _SUMS * _TERMS) for tensor in flat.values()]
    for run in zip(*runs, strict=True):
        sums.zero_()
        for block in zip(*(torch.split(part, _SUMS) for part in run), strict=True):
            parts = dict(zip(flat, block, strict=True))
            rows = sums[:, : len(block[0])].unbind()
            for row, (i, j) in zip(rows, pairs, strict=True):
                row.addcmul_(parts[i], parts[j])
        for place, row in enumerate(sums):  # all at once would be made float64 first
            products[place] += row.sum(dtype=torch.float64)
    total = first.new_zeros(tasks, tasks, dtype=torch.float64)
    for (i, j), product in zip(pairs, products, strict=True):
        total[i, j] = product
    return total


def _multiply_stacked(flat: Entries, tasks: int) -> Tensor:
    """Do so for all pairs at once, in many short products."""
    first = first_of(flat)
    rows = first.new_empty(_STACKED, len(flat), _LENGTH)
    products = first.new_zeros(len(flat), len(flat), dtype=torch.float64)
    size = _STACKED * _LENGTH
    whole = len(first) // size * size
    for block in blocks({task: row[:whole] for task, row in flat.items()}, size):
        parts = [part.view(_STACKED, _LENGTH) for part in block.values()]
        torch.stack(parts, 1, out=rows)
        products += torch.bmm(rows, rows.mT).sum(0, dtype=torch.float64)
    rest = torch.stack([tensor[whole:].double() for tensor in flat.values()])
    products.addmm_(rest, rest.T)
    if len(flat) == tasks:
        return products
    total = first.new_zeros(tasks, tasks, dtype=torch.float64)
    numbers = torch.tensor([*flat], device="cpu")
    total[numbers[:, None], numbers] = products
    return total


def _multiply_sparse(entries: Entries, tasks: int, *, last: bool) -> Tensor:
    """Take the inner products of a parameter that has a sparse gradient."""
    # Coalescing first: a product must meet the sum of all entries of a row.
    home = home_of_numbers(first_of(entries).device)
    wide = {
        task: (tensor.coalesce() if tensor.is_sparse else tensor).to(home).double()
        for task, tensor in entries.items()
    }
    total = torch.zeros(tasks, tasks, dtype=torch.float64, device=home)
    for i, j in _pairs(wide, tasks, last=last):
        a, b = wide[i], wide[j]
        if a.is_sparse and b.is_sparse:
            total[i, j] = (a * b).coalesce().values().sum()
        elif a.is_sparse or b.is_sparse:
            rows, dense = (a, b) if a.is_sparse else (b, a)
            total[i, j] = (rows.values() * dense[tuple(rows.indices())]).sum()
        else:
            total[i, j] = (a * b).sum()
    return total


def _in_doubt(gramian: Tensor, known: Tensor | None) -> bool:
    """Say whether float32 products may have spoilt a Gramian on the CPU.

    Args:
        gramian: of the products.
        known: that of all tasks but the last, if only products with the last were taken.
    """
    # Below 1e-20 squares of elements begin to underflow.
    squares = gramian.diagonal() if known is None else gramian.diagonal()[-1:]
    if not all(1e-20 < square < math.inf for square in squares.tolist()):
        return True
    if gramian.min() >= 0:
        return False
    # An error reaches the weights magnified by 1 / the lowest eigenvalue.
    matrix = cosines(gramian if known is None else known)
    return not torch.linalg.eigvalsh(matrix.nan_to_num(0, 0, 0))[0] >= 0.1
