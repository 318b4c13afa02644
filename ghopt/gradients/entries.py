"""The gradients of parameters, split into what the kernels of a GPU take and the rest.

The gradients of one parameter are :data:`Entries`: a dictionary from the number of the
task, missing where it does not reach the parameter. An entry may have any floating-point
or complex dtype (a complex number counts as a pair of reals) and any strides, be sparse,
or be a DTensor without partial values. Nothing here knows how gradients are made.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ghopt.forms import as_real, local, writable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Entries: TypeAlias = dict[int, Tensor]
"""The gradients of one parameter by task, missing ones left out; at least one."""

# Elements per block of a sum on the CPU: the float64 copy of one stays in the cache for
# every task that is added.
BLOCK = 2**14
# Elsewhere a block only bounds the memory that its float64 copy takes, to 32 MB a task.
DEVICE_BLOCK = 2**22


_PLAIN = (torch.float32, torch.float64)


class Prepared(NamedTuple):
    """Gradients, split into what the kernels take and the rest.

    Attributes:
        groups: over which the shards are spread, one per mesh axis; none for tensors
            that this rank has as a whole.
        fused: what kernels take: each table, and the tensors whose addresses it holds.
        rest: all others.
        is_plain: whether all are as :func:`is_plain` says.
    """

    groups: "tuple[ProcessGroup, ...]"
    fused: list[tuple[Any, list[Entries]]]
    rest: list[Entries]
    is_plain: bool = False


def prepare(
    groups: "tuple[ProcessGroup, ...]", parameters: list[Entries], tasks: int
) -> Prepared:
    """Split the gradients of some parameters.

    Args:
        groups: over which their shards are spread.
        parameters: what this rank has of each, see :func:`local_entries`.
        tasks: number of tasks, K.
    """
    return Prepared(groups, *_fusible(parameters, tasks))


def is_plain(entries: Entries) -> bool:
    """Say whether these are dense tensors of torch itself, on the CPU, real and without a graph.

    Nearly all are. What may be asked of all others costs more than their arithmetic where
    they are small.
    """
    # A loop: a generator takes twice as long.
    for grad in entries.values():
        if not (
            type(grad) is Tensor
            and grad.is_cpu
            and grad.layout is torch.strided
            and grad.dtype in _PLAIN
            and not grad.requires_grad
        ):
            return False
    return True


def local_entries(entries: Entries) -> Entries:
    """Take what this rank has, such that it can be written."""
    return {task: writable(local(grad)) for task, grad in entries.items()}


def first_of(entries: Entries) -> Tensor:
    """Take the entry of the first task that has one."""
    return next(iter(entries.values()))


def is_sparse(entries: Entries) -> bool:
    """Say whether a gradient of the parameter is sparse."""
    return any(tensor.layout is not torch.strided for tensor in entries.values())


def flattened(entries: Entries) -> Entries:
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


def blocks(flat: Entries, size: int) -> Iterator[Entries]:
    """Cut flat gradients in blocks of so many elements; the last may be shorter."""
    parts = [torch.split(tensor, size) for tensor in flat.values()]
    return (dict(zip(flat, block, strict=True)) for block in zip(*parts, strict=True))


@cache
def kernels() -> Any:
    """Import the kernels, if triton is there."""
    return import_module("ghopt.gradients.kernels") if find_spec("triton") else None


def _fusible(
    parameters: list[Entries], tasks: int
) -> tuple[list[tuple[Any, list[Entries]]], list[Entries]]:
    """Sort out what kernels can take, by dtype and device, and what remains."""
    fused: dict[object, list[Entries]] = defaultdict(list)
    rest = []
    for entries in parameters:
        first = first_of(entries)
        if not (_on_gpu(first) and kernels() and tasks <= kernels().MAX_TASKS):
            rest.append(entries)
            continue
        reals = {task: as_real(grad) for task, grad in entries.items()}
        if kernels().fits(reals):
            fused[first_of(reals).dtype, first.device].append(reals)
        else:
            rest.append(entries)
    tables = [(kernels().tabulate(group, tasks), group) for group in fused.values()]
    return tables, rest


def _on_gpu(tensor: Tensor) -> bool:
    # Not in a CUDA graph: a replay would read the table where it no longer is.
    return tensor.is_cuda and not torch.cuda.is_current_stream_capturing()
