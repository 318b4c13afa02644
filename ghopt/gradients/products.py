"""Inner products and weighted sums of the gradients of K tasks, parameter by parameter.

The gradients of one parameter are :data:`Entries`: a dictionary from the number of the
task, missing where it does not reach the parameter. An entry may have any floating-point
or complex dtype (a complex number counts as a pair of reals) and any strides, be sparse,
or be a DTensor without partial values. Nothing here knows how gradients are made.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable
from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations_with_replacement
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ghopt.forms import (
    as_real,
    local,
    writable,
)
from ghopt.geometry import cosines

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Entries: TypeAlias = dict[int, Tensor]
"""The gradients of one parameter by task, missing ones left out; at least one."""

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
_PACK_ELEMENTS = 2**16

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


class Prepared(NamedTuple):
    """Gradients sorted by what multiplies and adds them.

    Attributes:
        groups: over which the shards are spread, one per mesh axis; none for tensors
            that this rank has as a whole.
        fused: what kernels take: each table, and the tensors whose addresses it holds.
        rest: all others.
    """

    groups: "tuple[ProcessGroup, ...]"
    fused: list[tuple[Any, list[Entries]]]
    rest: list[Entries]


def prepare(
    groups: "tuple[ProcessGroup, ...]", parameters: list[Entries], tasks: int
) -> Prepared:
    """Sort the gradients of some parameters.

    Args:
        groups: over which their shards are spread.
        parameters: what this rank has of each, see :func:`local_entries`.
        tasks: number of tasks, K.
    """
    return Prepared(groups, *_fusible(parameters, tasks))


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

    Of DTensors, the ranks sum the ``[K, K]`` products of their shards.

    Args:
        prepared: of all gradients.
        tasks: number of tasks, K.
        known: the inner products of all but the last, ``[K - 1, K - 1]``. Then only those
            with the last are taken, which is less work.

    Returns:
        Shape ``[K, K]``, float64, symmetric, on the device of the first gradient; zeros
        on the CPU if there is none.
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
        gramian is None or _cancel(gramian, weights)
    )
    for part in prepared:
        for table, entries in part.fused:
            on_device = weights.to(first_of(entries[0]).device, torch.float64)
            _kernels().combine(table, on_device.contiguous())
        _add_rest(part.rest, weights, wide=wide)


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
    on_cpu = weights.device.type == "cpu"
    if on_cpu and not active:
        return
    mine, grads = writable(local(target)), local_entries(entries)
    if on_cpu and not _is_sparse(grads) and mine.is_contiguous():
        _shift_by_blocks(_flat({-1: mine, **grads}), weights.tolist())
        return
    wide = _WIDER.get(mine.dtype, mine.dtype)
    moved = mine.to(wide)
    for task, grad in grads.items():
        moved = moved + grad.to(wide) * weights[task].to(mine.device)
    mine.copy_(torch.where(active.to(mine.device), moved, mine.to(wide)))


def _shift_by_blocks(flat: Entries, factors: list[float]) -> None:
    """Add the weighted sum of flat gradients to entry -1, block by block."""
    dtype = flat[-1].dtype
    scratch = flat[-1].new_empty(_BLOCK, dtype=_WIDER.get(dtype, dtype))
    for block in zip(*(torch.split(t, _BLOCK) for t in flat.values()), strict=True):
        moved = scratch[: len(block[0])].copy_(block[0])
        for task, part in zip([*flat][1:], block[1:], strict=True):
            if factors[task]:
                moved.add_(part, alpha=factors[task])
        block[0].copy_(moved)


def local_entries(entries: Entries) -> Entries:
    """Take what this rank has, such that it can be written."""
    return {task: writable(local(grad)) for task, grad in entries.items()}


def first_of(entries: Entries) -> Tensor:
    """Take the entry of the first task that has one."""
    return next(iter(entries.values()))


def _cancel(gramian: Tensor, weights: Tensor) -> bool:
    """Say whether gradients cancel in their weighted sum, or may."""
    # In plain numbers: for few tasks quicker than a single call of torch.
    rows, factors = gramian.tolist(), weights.tolist()
    lengths = [math.sqrt(row[task]) for task, row in enumerate(rows)]
    reach = sum(map(mul, map(abs, factors), lengths))
    slopes = [sum(map(mul, factors, row)) for row in rows]
    square = sum(map(mul, factors, slopes))
    return bool(square <= (_REMAINDER * reach) ** 2)


def _sum_over(groups: "Iterable[ProcessGroup]", tensor: Tensor) -> Tensor:
    """Sum over the ranks of every group, in place."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


def _add_rest(parameters: list[Entries], weights: Tensor, *, wide: bool) -> None:
    """Sum what no kernel takes, with calls of torch."""
    # To read weights on the CPU is free, and numbers are faster than tensors there.
    on_cpu = weights.device.type == "cpu"
    factors = weights.tolist() if on_cpu else list(weights.unbind())
    kinds: dict[object, list[Entries]] = defaultdict(list)
    for entries in parameters:
        first = first_of(entries)
        if _is_sparse(entries):
            entries[min(entries)] = _add_sparse(entries, factors)
        elif first.dtype in _HALVES or (wide and first.dtype in _WIDER):
            _add_widened(entries, factors)
        else:
            kinds[first.dtype, first.device, tuple(entries)].append(entries)
    for kind in kinds.values():
        _add_alike(kind, factors)


@cache
def _kernels() -> Any:
    """Import the kernels, if triton is there."""
    return import_module("ghopt.gradients.kernels") if find_spec("triton") else None


def _on_gpu(tensor: Tensor) -> bool:
    # The table of a captured kernel would be read again at each replay.
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()


def _fusible(
    parameters: list[Entries], tasks: int
) -> tuple[list[tuple[Any, list[Entries]]], list[Entries]]:
    """Sort out what kernels can take, by dtype and device, and what remains."""
    fused: dict[object, list[Entries]] = defaultdict(list)
    rest = []
    for entries in parameters:
        first = first_of(entries)
        if not (_on_gpu(first) and _kernels() and tasks <= _kernels().MAX_TASKS):
            rest.append(entries)
            continue
        reals = {task: as_real(grad) for task, grad in entries.items()}
        if _kernels().fits(reals):
            fused[first_of(reals).dtype, first.device].append(reals)
        else:
            rest.append(entries)
    tables = [(_kernels().tabulate(group, tasks), group) for group in fused.values()]
    return tables, rest


def _is_sparse(entries: Entries) -> bool:
    return any(tensor.layout is not torch.strided for tensor in entries.values())


def _is_long(flat: Tensor) -> bool:
    """Say whether float32 products, summed in float64 over blocks, come out right."""
    on_cpu = flat.device.type == "cpu"
    return on_cpu and flat.dtype is torch.float32 and len(flat) > _LONG


def _flat(entries: Entries) -> Entries:
    """Flatten the gradients of one parameter, complex ones as pairs of reals.

    In the order in memory, so that one in channels_last is flattened without a copy.
    All tasks take the order of the first, which keeps their elements side by side.
    """
    entries = {task: as_real(grad) for task, grad in entries.items()}
    first = first_of(entries)
    if not first.is_contiguous():
        order = sorted(range(first.dim()), key=first.stride, reverse=True)
        entries = {task: grad.permute(order) for task, grad in entries.items()}
    return {task: grad.reshape(-1) for task, grad in entries.items()}


def _products_of(part: Prepared, tasks: int, known: Tensor | None) -> Tensor:
    """Take the inner products of all that this rank has."""
    last = known is not None
    products: list[Tensor] = [_kernels().gramian(table) for table, _ in part.fused]
    small, quick = [], []
    for entries in part.rest:
        if _is_sparse(entries):
            products.append(_multiply_sparse(entries, tasks, last=last))
            continue
        flat = _flat(entries)
        first = first_of(flat)
        if first.numel() <= _SMALL:
            small.append(flat)
        # Shards may be long on some ranks and short on others, and doubt is for all.
        elif _is_long(first) and not part.groups:
            quick.append(flat)
        else:
            products.append(_multiply_large(flat, tasks, last=last))
    rows = [_packed(pack, tasks) for pack in _packs(small)]
    products += [_multiply_packed(pack, last=last) for pack in rows]
    fast = [_multiply_as_they_are(flat, tasks, last=last) for flat in quick]
    total = _sum([*products, *fast])
    if quick and _in_doubt(total, known):
        sure = [_multiply_large(flat, tasks, last=last) for flat in quick]
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
    return torch.cat(parts).view(tasks, -1)


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
    size = min(_WIDE_BLOCK if first.device.type == "cpu" else _DEVICE_BLOCK, len(first))
    total = first.new_zeros(tasks, tasks, dtype=torch.float64)
    # One piece of memory for all blocks: to allocate each costs more than its products.
    # The rows of missing tasks stay zero.
    scratch = first.new_zeros(tasks, size, dtype=torch.float64)
    for block in zip(*(torch.split(t, size) for t in flat.values()), strict=True):
        rows = scratch[:, : len(block[0])]
        for task, part in zip(flat, block, strict=True):
            rows[task].copy_(part)
        if last:
            total[:, -1].addmv_(rows, rows[-1])
        else:
            total.addmm_(rows, rows.T)
    return total


def _multiply_as_they_are(flat: Entries, tasks: int, *, last: bool) -> Tensor:
    """Take the inner products of one parameter, block by block in its own dtype."""
    products: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    blocks = [torch.split(tensor, _BLOCK) for tensor in flat.values()]
    pairs = _pairs(flat, tasks, last=last)
    for block in zip(*blocks, strict=True):
        parts = dict(zip(flat, block, strict=True))
        for i, j in pairs:
            products[i, j].append(torch.dot(parts[i], parts[j]))
    total = first_of(flat).new_zeros(tasks, tasks, dtype=torch.float64)
    for (i, j), parts_ij in products.items():
        total[i, j] = torch.stack(parts_ij).sum(dtype=torch.float64)
    return total


def _multiply_sparse(entries: Entries, tasks: int, *, last: bool) -> Tensor:
    """Take the inner products of a parameter that has a sparse gradient."""
    # Coalescing first: a product must meet the sum of all entries of a row.
    wide = {
        task: tensor.coalesce().double() if tensor.is_sparse else tensor.double()
        for task, tensor in entries.items()
    }
    total = torch.zeros(
        tasks, tasks, dtype=torch.float64, device=first_of(entries).device
    )
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


def _add_alike(kind: list[Entries], factors: list[float] | list[Tensor]) -> None:
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


def _add_widened(entries: Entries, factors: list[float] | list[Tensor]) -> None:
    """Sum the dense gradients of one parameter in a wider dtype, and round once."""
    first = first_of(entries)
    total = torch.zeros_like(first, dtype=_WIDER[first.dtype])
    for task, entry in entries.items():
        factor = factors[task]
        if isinstance(factor, Tensor):
            total += entry.to(total.dtype) * factor.to(entry.device)
        else:
            total.add_(entry, alpha=factor)
    first.copy_(total)


def _add_sparse(entries: Entries, factors: list[float] | list[Tensor]) -> Tensor:
    """Sum the gradients of one parameter of which some are sparse."""
    terms = [entry * _beside(factors[task], entry) for task, entry in entries.items()]
    # torch adds a sparse tensor to a dense one, not the reverse.
    return reduce(torch.add, sorted(terms, key=lambda term: term.is_sparse))


def _beside(factor: float | Tensor, entry: Tensor) -> float | Tensor:
    """Bring a factor to the device of what it multiplies."""
    return factor.to(entry.device) if isinstance(factor, Tensor) else factor
