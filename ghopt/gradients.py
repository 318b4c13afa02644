"""Gradients of K tasks: their Gramian, and their weighted sum in place.

The gradients of one task are a list with one entry per parameter, ``None`` where the
task does not reach the parameter; the lists of all tasks follow the same parameters.
An entry may have any floating-point or complex dtype (a complex number counts as a pair
of reals) and any strides, or be sparse. Nothing here knows how gradients are made.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import reduce
from itertools import combinations_with_replacement
from typing import TypeAlias

import torch
from torch import Tensor

TaskGradients: TypeAlias = Sequence[Sequence[Tensor | None]]
"""``[K][P]``: one list per task, one entry per parameter."""

_Entries: TypeAlias = dict[int, Tensor]
"""The gradients of one parameter by task, missing ones left out."""

# Elements per block on the CPU: 64K float32 stay in the cache for every product that
# they enter, and so does a float64 copy of half as many.
_BLOCK = 2**16
_WIDE_BLOCK = 2**15
# Elsewhere a block only bounds the memory that its float64 copy takes, to 32 MB.
_DEVICE_BLOCK = 2**22
# A float32 dot product over one block is off by up to 4e-7, the sum of many blocks, in
# float64, by far less (one dot product over 1e8 elements by 1e-3). Shorter gradients
# have too few blocks for that.
_LONG = 2**19
# Tensors up to this size are packed: their arithmetic costs less than a call of torch.
_SMALL = 2**14

_HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def gramian(gradients: TaskGradients) -> Tensor:
    """Inner products of the gradients of K tasks.

    The products are float64 and so is their sum, with one exception. On the CPU long
    float32 gradients are multiplied in float32, block by block, with an error below
    1e-7 of the product of the norms; where that could spoil the weights (overflow,
    norms below 1e-10, gradients in conflict and nearly dependent) they are multiplied
    again in float64. Elsewhere to ask for such a case would make the device wait.

    Args:
        gradients: one list per task; a missing entry counts as zero.

    Returns:
        Shape ``[K, K]``, float64, on the device of the first gradient.

    Raises:
        ValueError: if all entries are missing.
    """
    parameters = _by_parameter(gradients)
    tensors = [tensor for entries in parameters for tensor in entries.values()]
    if not tensors:
        raise ValueError("gradients must have an entry that is not None, got none")
    device, tasks = tensors[0].device, len(gradients)
    segments = _segments(parameters)
    fast = device.type == "cpu" and any(_is_long(segment) for segment in segments)
    total = _total(segments, tasks, device, fast=fast)
    if fast and _in_doubt(total):
        return _total(segments, tasks, device, fast=False)
    return total


@torch.no_grad()
def combine(gradients: TaskGradients, weights: Tensor) -> list[Tensor | None]:
    """Sum the gradients of K tasks with their weights, in place.

    The result takes the memory of the first task that has an entry. float16 and
    bfloat16 gradients are summed in float32 and rounded once.

    Args:
        gradients: one list per task. Nothing else may hold these tensors.
        weights: shape ``[K]``.

    Returns:
        One entry per parameter; ``None`` where no task has one.
    """
    # To read weights on the CPU is free, and numbers are faster than tensors there.
    on_cpu = weights.device.type == "cpu"
    scales = weights.tolist() if on_cpu else list(weights.unbind())
    return [
        _weighted_sum(entries, scales) if entries else None
        for entries in _by_parameter(gradients)
    ]


def _by_parameter(gradients: TaskGradients) -> list[_Entries]:
    return [
        # A conjugate view of complex numbers cannot be viewed as pairs of reals.
        {task: g.resolve_conj() for task, g in enumerate(entries) if g is not None}
        for entries in zip(*gradients, strict=True)
    ]


def _segments(parameters: list[_Entries]) -> list[_Entries]:
    """Flatten the gradients of each parameter, and pack small ones of a kind."""
    segments = []
    small: dict[object, list[_Entries]] = defaultdict(list)
    for entries in filter(None, parameters):
        first = next(iter(entries.values()))
        if _is_sparse(entries):
            segments.append(entries)
            continue
        tensors = [tensor.reshape(-1) for tensor in _in_memory_order(entries)]
        flat = dict(zip(entries, tensors, strict=True))
        if first.numel() <= _SMALL:
            small[first.dtype, first.device, tuple(entries)].append(flat)
        else:
            segments.append(flat)
    return segments + [
        {task: torch.cat([flat[task] for flat in kind]) for task in kind[0]}
        for kind in small.values()
    ]


def _in_memory_order(entries: _Entries) -> list[Tensor]:
    """View complex numbers as pairs, and permute dimensions to the order in memory.

    So a gradient in channels_last is flattened without a copy. All tasks take the order
    of the first, which keeps their elements side by side whatever their own strides.
    """
    tensors = list(entries.values())
    if tensors[0].is_complex():
        tensors = [torch.view_as_real(tensor) for tensor in tensors]
    if all(tensor.is_contiguous() for tensor in tensors):
        return tensors
    first = tensors[0]
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    return [tensor.permute(order) for tensor in tensors]


def _is_sparse(entries: _Entries) -> bool:
    return any(tensor.layout is not torch.strided for tensor in entries.values())


def _is_long(segment: _Entries) -> bool:
    """Say whether float32 products, summed in float64 over blocks, come out right."""
    first = next(iter(segment.values()))
    return first.dtype is torch.float32 and first.numel() > _LONG


def _total(
    segments: list[_Entries], tasks: int, device: torch.device, *, fast: bool
) -> Tensor:
    """Sum the inner products over all segments; ``fast``: in float32 where it is long."""
    partial: dict[tuple[int, int, torch.device], list[Tensor]] = defaultdict(list)
    for segment in segments:
        for i, j, product in _products(segment, fast=fast and _is_long(segment)):
            partial[i, j, product.device].append(product)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    total = [[zero] * tasks for _ in range(tasks)]
    for (i, j, _), products in partial.items():
        entry = torch.stack(products).sum(dtype=torch.float64).to(device)
        total[i][j] = total[j][i] = total[i][j] + entry
    return torch.stack([torch.stack(row) for row in total])


def _products(segment: _Entries, *, fast: bool) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the inner products of each pair of tasks, block by block."""
    pairs = list(combinations_with_replacement(segment, 2))
    if _is_sparse(segment):
        for i, j in pairs:
            yield i, j, _sparse_product(segment[i], segment[j])
        return
    for block in _blocks(list(segment.values()), fast=fast):
        parts = dict(zip(segment, block, strict=True))
        for i, j in pairs:
            yield i, j, torch.dot(parts[i], parts[j])


def _blocks(tensors: list[Tensor], *, fast: bool) -> Iterator[tuple[Tensor, ...]]:
    """Yield aligned blocks of flat tensors, in float64 unless ``fast``.

    A float64 block lives until the next one: all share one piece of memory, since to
    allocate as much for each costs more than the products.
    """
    first = tensors[0]
    if fast or first.dtype is torch.float64:
        yield from zip(*(torch.split(t, _BLOCK) for t in tensors), strict=True)
        return
    limit = _WIDE_BLOCK if first.device.type == "cpu" else _DEVICE_BLOCK
    size = min(limit, first.numel())
    scratch = first.new_empty((len(tensors), size), dtype=torch.float64)
    for block in zip(*(torch.split(t, size) for t in tensors), strict=True):
        rows = scratch[:, : len(block[0])]
        yield tuple(row.copy_(part) for row, part in zip(rows, block, strict=True))


def _sparse_product(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, float64, of two gradients of a parameter that has a sparse one."""
    # Coalescing first: a product must meet the sum of all entries of a row.
    a, b = (t.coalesce().double() if t.is_sparse else t.double() for t in (a, b))
    if a.is_sparse and b.is_sparse:
        return (a * b).coalesce().values().sum()
    if a.is_sparse or b.is_sparse:
        rows, dense = (a, b) if a.is_sparse else (b, a)
        return (rows.values() * dense[tuple(rows.indices())]).sum()
    return (a * b).sum()


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


def _weighted_sum(entries: _Entries, scales: list[float] | list[Tensor]) -> Tensor:
    """Sum the gradients of one parameter, in the memory of the first."""
    factors = [scales[task] for task in entries]
    if _is_sparse(entries):
        terms = [
            t * factor for t, factor in zip(entries.values(), factors, strict=True)
        ]
        # torch adds a sparse tensor to a dense one, not the reverse.
        return reduce(torch.add, sorted(terms, key=lambda term: term.is_sparse))
    tensors = _in_memory_order(entries)
    blocks = [tuple(tensors)]
    if tensors[0].device.type == "cpu" and all(t.is_contiguous() for t in tensors):
        flat = [torch.split(tensor.view(-1), _BLOCK) for tensor in tensors]
        blocks = list(zip(*flat, strict=True))
    for block in blocks:
        _add_up(block, factors)
    return next(iter(entries.values()))


def _add_up(block: tuple[Tensor, ...], factors: list[float | Tensor]) -> None:
    """Leave the weighted sum of the tensors in the first of them."""
    first, *others = block
    total = first.float() if first.dtype in _HALVES else first
    for term, factor in zip([total, *others], factors, strict=True):
        if isinstance(factor, Tensor):
            factor = factor.to(total.device)
            if term is total:
                total.mul_(factor)
            else:
                total.addcmul_(term.to(total.dtype), factor)
        elif term is not total:
            total.add_(term, alpha=factor)
        elif factor != 1:  # saves a pass wherever nothing conflicts
            total.mul_(factor)
    if total is not first:
        first.copy_(total)
