"""Weighted sums of the gradients of K tasks, parameter by parameter."""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import reduce
from operator import mul
from typing import overload

import torch
from torch import Tensor

from ghopt.forms import home_of_numbers, local, writable
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
    local_entries,
)

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
def add(
    prepared: Iterable[Prepared], weights: Tensor, gramian: Tensor | None = None
) -> None:
    """Sum the gradients of K tasks with their weights, in place.

    The sum takes the place of the first entry of each parameter; the other entries may be
    spoilt. float16 and bfloat16 gradients are summed in float32 and rounded once. So are
    float32 gradients on the CPU, in float64, unless the Gramian shows that they do not
    cancel; on a GPU the kernels do that at no cost.

    Args:
        prepared: of all gradients. Nothing else may hold these tensors.
        weights: shape ``[K]``, float64.
        gramian: inner products of the gradients, ``[K, K]``; saves time.
    """
    wide = weights.device.type == "cpu" and (
        gramian is None or cancel(gramian, weights)
    )
    for part in prepared:
        for table, entries in part.fused:
            on_device = weights.to(first_of(entries[0]).device, torch.float64)
            kernels().combine(table, on_device.contiguous())
        _add_rest(part, weights, wide=wide)


def add_with_graph(entries: Entries, weights: Tensor) -> Tensor:
    """Sum the gradients of one parameter such that the sum can be differentiated.

    In new memory; the weights count as constant.
    """
    with torch.enable_grad():
        return reduce(
            torch.add,
            (
                grad * weights[task].to(grad.device, grad.dtype)
                for task, grad in entries.items()
            ),
        )


@overload
def accumulate(grad: Tensor | None, more: Tensor) -> Tensor: ...


@overload
def accumulate(grad: Tensor | None, more: Tensor | None) -> Tensor | None: ...


def accumulate(grad: Tensor | None, more: Tensor | None) -> Tensor | None:
    """Add to ``.grad`` as autograd does: in place, where both are dense."""
    if grad is None or more is None:
        return more if grad is None else grad
    has_graph = grad.requires_grad or more.requires_grad
    if grad.layout is more.layout is torch.strided and not has_graph:
        return grad.add_(more)
    # torch adds a sparse tensor to a dense one, not the reverse.
    return more + grad if grad.is_sparse else grad + more


@torch.no_grad()
def shift(target: Tensor, entries: Entries, weights: Tensor, active: Tensor) -> None:
    """Add the weighted sum of the gradients of one parameter to another tensor, in place.

    In a wider dtype, rounded once. Where ``active``, a bool scalar, is False no bit
    changes: not even of a zero with a sign, nor beside a gradient that is not finite.
    """
    if weights.device.type == "cpu" and not active:
        return
    mine, grads = writable(local(target)), local_entries(entries)
    if mine.numel() == 0:
        return
    flat = {} if is_sparse(grads) else flattened({-1: mine, **grads})
    # Unless it is dense in memory, what is flat is a copy.
    if flat and flat[-1].data_ptr() == mine.data_ptr():
        _shift_by_blocks(flat, weights, active)
        return
    wide, home = _wider(mine)
    old = mine.to(home).to(wide)
    moved = old
    for task, grad in grads.items():
        moved = moved + grad.to(home).to(wide) * weights[task].to(home)
    mine.copy_(torch.where(active.to(home), moved, old))


def _shift_by_blocks(flat: Entries, weights: Tensor, active: Tensor) -> None:
    """Add the weighted sum of flat gradients to entry -1, block by block."""
    wide, home = _wider(flat[-1])
    known = weights.device.type == "cpu"
    factors = weights.tolist() if known else [*weights.to(home).unbind()]
    on_cpu = flat[-1].device.type == "cpu"
    size = min(BLOCK if on_cpu else DEVICE_BLOCK, len(flat[-1]))
    scratch = torch.empty(size, dtype=wide, device=home)
    for block in blocks(flat, size):
        target = block.pop(-1)
        old = target.to(home)
        moved = scratch[: len(old)].copy_(old)
        for task, part in block.items():
            factor = factors[task]
            if isinstance(factor, Tensor):
                moved.addcmul_(part.to(wide), factor.to(wide))
            elif factor:
                moved.add_(part.to(home), alpha=factor)
        if not known:  # where to ask is free, we have not come here unless active
            moved = torch.where(active.to(home), moved, old.to(wide))
        target.copy_(moved)


def _wider(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    """Say in which dtype, and where, to sum what the dtype of a tensor is too short for."""
    wide = _WIDER.get(tensor.dtype, tensor.dtype)
    is_widest = wide in (torch.float64, torch.complex128)
    return wide, home_of_numbers(tensor.device) if is_widest else tensor.device


def cancel(gramian: Tensor, weights: Tensor) -> bool:
    """Say whether gradients cancel in their weighted sum, or may."""
    # In plain numbers: for few tasks quicker than a single call of torch.
    rows, factors = gramian.tolist(), weights.tolist()
    lengths = [math.sqrt(row[task]) for task, row in enumerate(rows)]
    reach = sum(map(mul, map(abs, factors), lengths))
    slopes = [sum(map(mul, factors, row)) for row in rows]
    square = sum(map(mul, factors, slopes))
    return bool(square <= (_REMAINDER * reach) ** 2)


def _add_rest(part: Prepared, weights: Tensor, *, wide: bool) -> None:
    """Sum what no kernel takes, with calls of torch."""
    # To read weights on the CPU is free, and numbers are faster than tensors there.
    on_cpu = weights.device.type == "cpu"
    factors = weights.tolist() if on_cpu else list(weights.unbind())
    kinds: dict[object, list[Entries]] = defaultdict(list)
    for entries in part.rest:
        if part.is_plain and not wide:  # one device, and calls of torch take two dtypes
            kinds[tuple(entries)].append(entries)
            continue
        first = first_of(entries)
        if not part.is_plain and is_sparse(entries):
            entries[min(entries)] = _add_sparse(entries, factors)
        elif first.dtype in _HALVES or (wide and first.dtype in _WIDER):
            _add_widened(entries, factors)
        else:
            kinds[first.dtype, first.device, tuple(entries)].append(entries)
    for kind in kinds.values():
        _add_alike(kind, factors)


def _add_alike(kind: list[Entries], factors: list[float] | list[Tensor]) -> None:
    """Sum the dense gradients of parameters alike in dtype, device and tasks.

    Into those of the first task, with one or two calls of torch a task.
    """
    columns = {task: [entries[task] for entries in kind] for task in kind[0]}
    first = next(iter(columns.values()))
    for task, column in columns.items():
        factor = factors[task]
        if isinstance(factor, Tensor):
            on_device = factor.to(column[0].device)
            if column is first:
                torch._foreach_mul_(first, on_device)
            else:  # which leaves the column as it is, for a step that is looked at
                torch._foreach_addcmul_(first, column, [on_device] * len(column))
        elif column is not first:
            torch._foreach_add_(first, column, alpha=factor)
        elif factor != 1:  # saves a pass wherever nothing conflicts
            torch._foreach_mul_(first, factor)


def _add_widened(entries: Entries, factors: list[float] | list[Tensor]) -> None:
    """Sum the dense gradients of one parameter in a wider dtype, and round once."""
    first = first_of(entries)
    wide, home = _wider(first)
    total = torch.zeros_like(first, dtype=wide, device=home)
    for task, entry in entries.items():
        factor = factors[task]
        if isinstance(factor, Tensor):
            total += entry.to(wide) * factor.to(entry.device)
        else:
            total.add_(entry.to(home), alpha=factor)
    first.copy_(total)


def _add_sparse(entries: Entries, factors: list[float] | list[Tensor]) -> Tensor:
    """Sum the gradients of one parameter of which some are sparse."""
    terms = [entry * _beside(factors[task], entry) for task, entry in entries.items()]
    # torch adds a sparse tensor to a dense one, not the reverse.
    return reduce(torch.add, sorted(terms, key=lambda term: term.is_sparse))


def _beside(factor: float | Tensor, entry: Tensor) -> float | Tensor:
    """Bring a factor to the device of what it multiplies."""
    return factor.to(entry.device) if isinstance(factor, Tensor) else factor
