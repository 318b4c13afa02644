"""Gradients of K tasks: their Gramian, and their weighted sum in place.

The gradients of one task are a list with one entry per parameter, ``None`` where the
task does not reach the parameter; the lists of all tasks follow the same parameters.
An entry may have any floating-point or complex dtype (a complex number counts as a pair
of reals) and any strides, be sparse, or be a DTensor without partial values. Nothing here
knows how gradients are made.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations_with_replacement
from operator import mul
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ghopt.distributed import (
    as_real,
    is_dtensor,
    local,
    shard_groups,
    sum_over,
    writable,
)
from ghopt.losses import check_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TaskGradients: TypeAlias = Sequence[Sequence[Tensor | None]]
"""``[K][P]``: one list per task, one entry per parameter."""

_Entries: TypeAlias = dict[int, Tensor]
"""The gradients of one parameter by task, missing ones left out."""

# Elements per block on the CPU: a block, and the float64 copy of one, stay in the cache
# for every product that they enter. How many sums of float32 a dot product keeps side by
# side is the processor's choice: over blocks of 64K elements the whole was off by up to
# 2e-8 on a Xeon and 2e-7 on an EPYC, over 16K by 4e-8 there, for a third more time.
_BLOCK = 2**14
_WIDE_BLOCK = 2**15
# Elsewhere a block only bounds the memory that its float64 copy takes, to 32 MB a task.
_DEVICE_BLOCK = 2**22
# A float32 dot product over one block is off by up to 4e-7, the sum of many blocks, in
# float64, by far less (one dot product over 1e8 elements by 1e-3). Shorter gradients
# have too few blocks for that.
_LONG = 2**19
# Tensors up to this size are packed: their arithmetic costs less than a call of torch.
_SMALL = 2**14
# A pack has this many elements of a task and one tensor more at most, so that packing
# takes no memory to speak of, however many small tensors there are.
_PACK = 2**16

# Where each dtype is summed if more digits are needed than it has.
_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}
_HALVES = (torch.float16, torch.bfloat16)
# A float32 sum is off by 1e-7 of what it adds up; where less than this remains of that,
# float64 keeps four digits.
_REMAINDER = 1e-3


@torch.no_grad()
def gramian(gradients: TaskGradients) -> Tensor:
    """Inner products of the gradients of K tasks.

    The products are float64 and so is their sum, with one exception. On the CPU long
    float32 gradients are multiplied in float32, block by block, with an error below
    1e-7 of the product of the norms; where that could spoil the weights (overflow,
    norms below 1e-10, gradients in conflict and nearly dependent) they are multiplied
    again in float64. Elsewhere to ask for such a case would make the device wait.

    Of DTensors, the ranks sum the ``[K, K]`` products of their shards.

    Args:
        gradients: one list per task; a missing entry counts as zero.

    Returns:
        Shape ``[K, K]``, float64, symmetric, on the device of the first gradient.

    Raises:
        ValueError: if all entries are missing.
    """
    parameters = list(filter(None, _by_parameter(gradients)))
    if not parameters:
        raise ValueError("gradients must have an entry that is not None, got none")
    spread: dict[tuple[ProcessGroup, ...], list[_Entries]] = defaultdict(list)
    for entries in parameters:
        spread[shard_groups(_first(entries))].append(_local(entries))
    totals = [
        sum_over(groups, _products(part, len(gradients), sharded=bool(groups)))
        for groups, part in spread.items()
    ]
    return reduce(lambda total, more: total + more.to(total.device), totals)


def gramian_over(
    tasks: Sequence[Mapping[Tensor, Tensor]], parameters: Sequence[Tensor]
) -> Tensor | None:
    """Inner products over some parameters alone; None where no task has a gradient.

    Args:
        tasks: the gradients of each by parameter.
        parameters: the same on all ranks, and in the same order, if there are DTensors.
    """
    rows = [[task.get(parameter) for parameter in parameters] for task in tasks]
    reached = any(gradient is not None for row in rows for gradient in row)
    return gramian(rows) if reached else None


@torch.no_grad()
def combine(
    gradients: TaskGradients, weights: Tensor, gramian: Tensor | None = None
) -> list[Tensor | None]:
    """Sum the gradients of K tasks with their weights, in place.

    The result takes the memory of the first task that has an entry; the other entries
    may be spoilt. float16 and bfloat16 gradients are summed in float32 and rounded once.
    So are float32 gradients on the CPU, in float64, unless the Gramian shows that they
    do not cancel; on a GPU the kernels do that at no cost. Gradients that have a graph
    of their own (``create_graph=True``) are summed with it, in new memory; the weights
    count as constant.

    Args:
        gradients: one list per task. Nothing else may hold these tensors.
        weights: shape ``[K]``, float64.
        gramian: inner products of the gradients, ``[K, K]``; saves time.

    Returns:
        One entry per parameter; ``None`` where no task has one.

    Raises:
        ValueError: if the dtype of a gradient cannot hold a finite weight; on the CPU.
    """
    check_range(weights, (g.dtype for task in gradients for g in task if g is not None))
    if any(g is not None and g.requires_grad for task in gradients for g in task):
        return _combine_with_graph(gradients, weights)
    wide = weights.device.type == "cpu" and (
        gramian is None or _cancel(gramian, weights)
    )
    parameters = _by_parameter(gradients)
    locals_ = [_local(entries) for entries in parameters]
    fused, rest = _fusible(locals_, len(gradients))
    for group in fused:
        _add_fused(group, weights)
    if rest:
        _add_rest(rest, weights, wide=wide)
    return [
        # What was written is the shard of a DTensor.
        _first(given if is_dtensor(_first(given)) else entries) if given else None
        for given, entries in zip(parameters, locals_, strict=True)
    ]


def _combine_with_graph(
    gradients: TaskGradients, weights: Tensor
) -> list[Tensor | None]:
    """Sum gradients such that their sum can be differentiated."""
    with torch.enable_grad():
        scaled = [
            {
                task: grad * weights[task].to(grad.device, grad.dtype)
                for task, grad in entries.items()
            }
            for entries in _by_parameter(gradients)
        ]
        return [
            reduce(torch.add, terms.values()) if terms else None for terms in scaled
        ]


def _cancel(gramian: Tensor, weights: Tensor) -> bool:
    """Say whether gradients cancel in their weighted sum, or may."""
    # In plain numbers: for few tasks quicker than a single call of torch.
    rows, factors = gramian.tolist(), weights.tolist()
    lengths = [math.sqrt(row[task]) for task, row in enumerate(rows)]
    reach = sum(map(mul, map(abs, factors), lengths))
    slopes = [sum(map(mul, factors, row)) for row in rows]
    square = sum(map(mul, factors, slopes))
    return bool(square <= (_REMAINDER * reach) ** 2)


def _add_rest(parameters: list[_Entries], weights: Tensor, *, wide: bool) -> None:
    """Sum what no kernel takes, with calls of torch."""
    # To read weights on the CPU is free, and numbers are faster than tensors there.
    on_cpu = weights.device.type == "cpu"
    factors = weights.tolist() if on_cpu else list(weights.unbind())
    kinds: dict[object, list[_Entries]] = defaultdict(list)
    for entries in parameters:
        first = _first(entries)
        if _is_sparse(entries):
            entries[min(entries)] = _add_sparse(entries, factors)
        elif first.dtype in _HALVES or (wide and first.dtype in _WIDER):
            _add_widened(entries, factors)
        else:
            kinds[first.dtype, first.device, tuple(entries)].append(entries)
    for kind in kinds.values():
        _add_alike(kind, factors)


def _by_parameter(gradients: TaskGradients) -> list[_Entries]:
    return [
        {task: grad for task, grad in enumerate(entries) if grad is not None}
        for entries in zip(*gradients, strict=True)
    ]


def _local(entries: _Entries) -> _Entries:
    """Take what this rank has, such that it can be written."""
    return {task: writable(local(grad)) for task, grad in entries.items()}


def _first(entries: _Entries) -> Tensor:
    return next(iter(entries.values()))


@cache
def _kernels() -> Any:
    """Import the kernels, if triton is there."""
    return import_module("ghopt.kernels") if find_spec("triton") else None


def _on_gpu(tensor: Tensor) -> bool:
    # The table of a captured kernel would be read again at each replay.
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _fusible(
    parameters: list[_Entries], tasks: int
) -> tuple[list[list[_Entries]], list[_Entries]]:
    """Sort out what kernels can take, by dtype and device, and what remains."""
    fused: dict[object, list[_Entries]] = defaultdict(list)
    rest = []
    for entries in filter(None, parameters):
        first = _first(entries)
        if not (_on_gpu(first) and _kernels() and tasks <= _kernels().MAX_TASKS):
            rest.append(entries)
            continue
        reals = {task: as_real(grad) for task, grad in entries.items()}
        if _kernels().fits(reals):
            fused[_first(reals).dtype, first.device].append(reals)
        else:
            rest.append(entries)
    return list(fused.values()), rest


def _multiply_fused(group: list[_Entries], tasks: int) -> Tensor:
    products: Tensor = _kernels().gramian(_kernels().tabulate(group, tasks))
    return products


def _add_fused(group: list[_Entries], weights: Tensor) -> None:
    weights = weights.to(_first(group[0]).device, torch.float64)
    table = _kernels().tabulate(group, len(weights))
    _kernels().combine(table, weights.contiguous())


def _is_sparse(entries: _Entries) -> bool:
    return any(tensor.layout is not torch.strided for tensor in entries.values())


def _is_long(flat: Tensor) -> bool:
    """Say whether float32 products, summed in float64 over blocks, come out right."""
    on_cpu = flat.device.type == "cpu"
    return on_cpu and flat.dtype is torch.float32 and len(flat) > _LONG


def _flat(entries: _Entries) -> _Entries:
    """Flatten the gradients of one parameter, complex ones as pairs of reals.

    In the order in memory, so that one in channels_last is flattened without a copy.
    All tasks take the order of the first, which keeps their elements side by side.
    """
    entries = {task: as_real(grad) for task, grad in entries.items()}
    first = _first(entries)
    if not first.is_contiguous():
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        entries = {task: grad.permute(order) for task, grad in entries.items()}
    return {task: grad.reshape(-1) for task, grad in entries.items()}


def _products(parameters: list[_Entries], tasks: int, *, sharded: bool) -> Tensor:
    """Take the inner products of all parameters that this rank has."""
    fused, rest = _fusible(parameters, tasks)
    products = [_multiply_fused(group, tasks) for group in fused]
    small, quick = [], []
    for entries in rest:
        if _is_sparse(entries):
            products.append(_multiply_sparse(entries, tasks))
            continue
        flat = _flat(entries)
        first = _first(flat)
        if first.numel() <= _SMALL:
            small.append(flat)
        # Shards may be long on some ranks and short on others, and doubt is for all.
        elif _is_long(first) and not sharded:
            quick.append(flat)
        else:
            products.append(_multiply_large(flat, tasks))
    products += [_multiply_packed(_packed(pack, tasks)) for pack in _packs(small)]
    total = _sum([*products, *(_multiply_as_they_are(flat, tasks) for flat in quick)])
    if quick and _in_doubt(total):
        total = _sum([*products, *(_multiply_large(flat, tasks) for flat in quick)])
    return total


def _sum(products: list[Tensor]) -> Tensor:
    """Sum Gramians, of which only the upper triangle need be right."""
    device = products[0].device
    total = reduce(torch.add, (each.to(device) for each in products))
    return total.triu() + total.triu(1).T


def _packs(parameters: list[_Entries]) -> list[list[_Entries]]:
    """Group flat gradients of a kind, so many that a group is worth its calls."""
    packs: list[list[_Entries]] = []
    filling: dict[object, list[_Entries]] = {}
    sizes: dict[object, int] = defaultdict(int)
    for entries in parameters:
        first = _first(entries)
        kind = first.dtype, first.device
        if kind not in filling or sizes[kind] > _PACK:
            filling[kind], sizes[kind] = [], 0
            packs.append(filling[kind])
        filling[kind].append(entries)
        sizes[kind] += len(first)
    return packs


def _packed(pack: list[_Entries], tasks: int) -> Tensor:
    """Lay flat gradients side by side: ``[K, n]``, zeros where one is missing."""
    sizes = [len(_first(entries)) for entries in pack]
    zeros = _first(pack[0]).new_zeros(max(sizes))
    parts = [
        entries[task] if task in entries else zeros[:size]
        for task in range(tasks)
        for entries, size in zip(pack, sizes, strict=True)
    ]
    return torch.cat(parts).view(tasks, -1)


def _multiply_packed(rows: Tensor) -> Tensor:
    """Take the inner products of rows ``[K, n]`` of one pack in float64."""
    wide = rows.double()
    return wide @ wide.T


def _multiply_large(flat: _Entries, tasks: int) -> Tensor:
    """Take the inner products of one parameter in float64, block by block."""
    first = _first(flat)
    if first.dtype is torch.float64 and first.device.type == "cpu":
        return _multiply_as_they_are(flat, tasks)
    size = min(_WIDE_BLOCK if first.device.type == "cpu" else _DEVICE_BLOCK, len(first))
    total = first.new_zeros(tasks, tasks, dtype=torch.float64)
    # One piece of memory for all blocks: to allocate each costs more than its products.
    # The rows of missing tasks stay zero.
    scratch = first.new_zeros(tasks, size, dtype=torch.float64)
    for block in zip(*(torch.split(t, size) for t in flat.values()), strict=True):
        rows = scratch[:, : len(block[0])]
        for task, part in zip(flat, block, strict=True):
            rows[task].copy_(part)
        total.addmm_(rows, rows.T)
    return total


def _multiply_as_they_are(flat: _Entries, tasks: int) -> Tensor:
    """Take the inner products of one parameter, block by block in its own dtype."""
    products: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    blocks = [torch.split(tensor, _BLOCK) for tensor in flat.values()]
    for block in zip(*blocks, strict=True):
        parts = dict(zip(flat, block, strict=True))
        for i, j in combinations_with_replacement(flat, 2):
            products[i, j].append(torch.dot(parts[i], parts[j]))
    total = _first(flat).new_zeros(tasks, tasks, dtype=torch.float64)
    for (i, j), parts_ij in products.items():
        total[i, j] = torch.stack(parts_ij).sum(dtype=torch.float64)
    return total


def _multiply_sparse(entries: _Entries, tasks: int) -> Tensor:
    """Take the inner products of a parameter that has a sparse gradient."""
    # Coalescing first: a product must meet the sum of all entries of a row.
    wide = {
        task: tensor.coalesce().double() if tensor.is_sparse else tensor.double()
        for task, tensor in entries.items()
    }
    total = torch.zeros(
        tasks, tasks, dtype=torch.float64, device=_first(entries).device
    )
    for i, j in combinations_with_replacement(wide, 2):
        a, b = wide[i], wide[j]
        if a.is_sparse and b.is_sparse:
            total[i, j] = (a * b).coalesce().values().sum()
        elif a.is_sparse or b.is_sparse:
            rows, dense = (a, b) if a.is_sparse else (b, a)
            total[i, j] = (rows.values() * dense[tuple(rows.indices())]).sum()
        else:
            total[i, j] = (a * b).sum()
    return total


def _in_doubt(gramian: Tensor) -> bool:
    """Say whether float32 products may have spoilt a Gramian on the CPU."""
    # Below 1e-20 squares of elements begin to underflow.
    if not all(1e-20 < square < math.inf for square in gramian.diagonal().tolist()):
        return True
    if gramian.min() >= 0:
        return False
    norms = gramian.diagonal().sqrt()
    cosines = gramian / norms / norms[:, None]
    # An error reaches the weights magnified by 1 / the lowest eigenvalue.
    return bool(torch.linalg.eigvalsh(cosines)[0] < 0.1)


def _add_alike(kind: list[_Entries], factors: list[float] | list[Tensor]) -> None:
    """Sum the dense gradients of parameters alike in dtype, device and tasks.

    Into those of the first task, with one or two calls of torch a task.
    """
    columns = {task: [entries[task] for entries in kind] for task in kind[0]}
    first = next(iter(columns.values()))
    for task, column in columns.items():
        factor = factors[task]
        if isinstance(factor, Tensor):
            torch._foreach_mul_(column, factor.to(column[0].device))
            if column is not first:
                torch._foreach_add_(first, column)
        elif column is not first:
            torch._foreach_add_(first, column, alpha=factor)
        elif factor != 1:  # saves a pass wherever nothing conflicts
            torch._foreach_mul_(first, factor)


def _add_widened(entries: _Entries, factors: list[float] | list[Tensor]) -> None:
    """Sum the dense gradients of one parameter in a wider dtype, and round once."""
    first = _first(entries)
    total = torch.zeros_like(first, dtype=_WIDER[first.dtype])
    for task, entry in entries.items():
        factor = factors[task]
        if isinstance(factor, Tensor):
            total += entry.to(total.dtype) * factor.to(entry.device)
        else:
            total.add_(entry, alpha=factor)
    first.copy_(total)


def _add_sparse(entries: _Entries, factors: list[float] | list[Tensor]) -> Tensor:
    """Sum the gradients of one parameter of which some are sparse."""
    terms = []
    for task, entry in entries.items():
        factor = factors[task]
        if isinstance(factor, Tensor):
            factor = factor.to(entry.device)
        terms.append(entry * factor)
    # torch adds a sparse tensor to a dense one, not the reverse.
    return reduce(torch.add, sorted(terms, key=lambda term: term.is_sparse))
