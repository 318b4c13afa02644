"""Gramian and weighted sum of the gradients of K tasks on a GPU, in Triton.

Each reads every gradient once, whatever the number of parameters, in a launch or two.
Nothing is read back to the host. Needs the optional extra ``[triton]``; import it where
it is used.

Both work off a table of chunks, :class:`Table`, that the host builds once for the two.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A typed name: triton tells a type checker nothing.
_kernel: Callable[[Callable[..., Any]], Any] = triton.jit

MAX_TASKS = 8
"""The Gramian keeps K (K + 1) / 2 sums per thread in registers."""

# Elements of a task per program. Two tasks of 25M float32 give 12 programs to each
# multiprocessor of an H200; much more per program would leave some of them idle.
_CHUNK = 2**14
_THREADS = 128

_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Table(NamedTuple):
    """Where the gradients of K tasks lie on the device, cut into C chunks.

    Holds addresses, not the tensors: it is worth as much as long as they live.
    """

    rows: Tensor
    """Shape ``[C, 2 + K]``, int64: number of elements; how many of them, from the
    first, may be loaded 16 bytes at a time; their address by task, 0 where missing."""

    dtype: torch.dtype


def fits(entries: Mapping[int, Tensor]) -> bool:
    """Say whether the kernels can take the gradients of one parameter.

    That is if they have one shape, one device, one dtype of float64, float32, bfloat16
    and float16, and are contiguous, all in the same memory format.

    Args:
        entries: the gradients by task.
    """
    # Called for every parameter at every step: plain loops, the usual case first.
    if not entries:
        return False
    first, *others = entries.values()
    if first.dtype not in _DTYPES or first.layout is not torch.strided:
        return False
    for other in others:
        if (
            other.dtype is not first.dtype
            or other.shape != first.shape
            or other.device != first.device
        ):
            return False
    for order in _FORMATS:
        for tensor in entries.values():
            if not tensor.is_contiguous(memory_format=order):
                break
        else:
            return True
    return False


def tabulate(
    parameters: Sequence[Mapping[int, Tensor]], tasks: int, chunk: int = _CHUNK
) -> Table:
    """Build the table of the gradients of K tasks and send it to their device.

    On a GPU it goes through pinned memory and nobody waits for it. Not for the capture
    of a CUDA graph: a replay would read that memory again, when others have it.

    Args:
        parameters: the gradients of each parameter by task, missing ones left out; all
            of one dtype, on one device. No two tensors share memory.
        tasks: K.
        chunk: elements of a task per chunk.

    Raises:
        ValueError: if ``tasks`` is not in 1 to 8, there is no parameter, or one does
            not fit (see :func:`fits`), names a task beyond K or differs from the first
            in dtype or device.
    """
    _check(parameters, tasks)
    firsts = [next(iter(entries.values())) for entries in parameters]
    dtype, device = firsts[0].dtype, firsts[0].device
    # On the CPU explicitly: the default device may be a GPU.
    addresses = torch.tensor(
        [[e[k].data_ptr() if k in e else 0 for k in range(tasks)] for e in parameters],
        dtype=torch.int64,
        device="cpu",
    )
    sizes = addresses.new_tensor([first.numel() for first in firsts])
    counts = (sizes + chunk - 1) // chunk
    owners = torch.repeat_interleave(counts)
    earlier = counts.cumsum(0) - counts
    places = torch.arange(len(owners), dtype=torch.int64, device="cpu")
    starts = (places - earlier[owners]) * chunk
    lengths = (sizes[owners] - starts).clamp(max=chunk)
    missing = addresses[owners] == 0
    pointers = addresses[owners] + starts[:, None] * dtype.itemsize
    pointers.masked_fill_(missing, 0)
    aligned = (pointers % 16 == 0).all(1)
    full = (lengths - lengths % _step(tasks, dtype)) * aligned
    rows = torch.cat([lengths[:, None], full[:, None], pointers], dim=1)
    rows = rows.pin_memory() if device.type == "cuda" else rows
    return Table(rows.to(device, non_blocking=True), dtype)


def _check(parameters: Sequence[Mapping[int, Tensor]], tasks: int) -> None:
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"tasks must be from 1 to {MAX_TASKS}, got {tasks}")
    if not parameters:
        raise ValueError("parameters must hold at least one, got none")
    kinds = set()
    for entries in parameters:
        if not fits(entries) or not 0 <= min(entries) <= max(entries) < tasks:
            given = {t: (g.dtype, g.shape, g.stride()) for t, g in entries.items()}
            raise ValueError(f"parameters must fit {tasks} tasks, got {given}")
        first = next(iter(entries.values()))
        kinds.add((first.dtype, first.device))
    if len(kinds) > 1:
        raise ValueError(f"parameters must have one dtype and device, got {kinds}")


def gramian(table: Table) -> Tensor:
    """Inner products of the gradients of K tasks, in a fixed order, so that repeated calls agree bit for bit.

    Products and sums are float64: the products of float32 and shorter are exact. A
    missing gradient counts as zeros, also beside infinity (the product is NaN).

    Returns:
        Shape ``[K, K]``, float64, symmetric, on the device of the gradients.
    """
    tasks, rows = _tasks(table), table.rows
    pairs = tasks * (tasks + 1) // 2
    partial = rows.new_empty(len(rows), pairs, dtype=torch.float64)
    result = rows.new_empty(tasks, tasks, dtype=torch.float64)
    with torch.cuda.device(rows.get_device()):
        if len(rows):
            _multiply_chunk[(len(rows),)](
                rows,
                partial,
                K=tasks,
                DTYPE=_DTYPES[table.dtype],
                LANES=_lanes(tasks, table.dtype),
                THREADS=_THREADS,
                UNROLL=_unroll(tasks),
                num_warps=_THREADS // 32,
                # Where rounding differs at all (float64), fused is better; triton warns
                # of its default, which is about to change.
                enable_fp_fusion=True,
            )
        _sum_chunks[(tasks, tasks)](
            partial, result, len(rows), K=tasks, WIDTH=1024, enable_fp_fusion=True
        )
    return result


def combine(table: Table, weights: Tensor) -> None:
    """Sum the gradients of K tasks with their weights, in place.

    The sum takes the memory of the first task that has the gradient; the others stay.
    It is taken in float64, of half precision in float32, and rounded once to their
    dtype. A missing gradient adds nothing, whatever its weight.

    Args:
        table: the gradients.
        weights: shape ``[K]``, float64, contiguous, on the device of the gradients.

    Raises:
        ValueError: if ``weights`` are not that.
    """
    tasks, rows = _tasks(table), table.rows
    if (
        weights.shape != (tasks,)
        or weights.dtype is not torch.float64
        or weights.device != rows.device
        or not weights.is_contiguous()
    ):
        given = f"{weights.dtype} {list(weights.shape)} on {weights.device}"
        raise ValueError(f"weights must be float64 [{tasks}], got {given}")
    # A sum of float32 in float32 would lose what nearly opposite gradients leave.
    wide = table.dtype.itemsize >= 4
    with torch.cuda.device(rows.get_device()):
        if len(rows):
            _combine_chunk[(len(rows),)](
                rows,
                weights,
                K=tasks,
                DTYPE=_DTYPES[table.dtype],
                SUM=tl.float64 if wide else tl.float32,
                LANES=_lanes(tasks, table.dtype),
                THREADS=_THREADS,
                UNROLL=_unroll(tasks),
                num_warps=_THREADS // 32,
                enable_fp_fusion=True,
            )


def _tasks(table: Table) -> int:
    return table.rows.shape[1] - 2


def _lanes(tasks: int, dtype: torch.dtype) -> int:
    """Elements that a thread loads at once: 16 bytes of them, the most it can."""
    # More than 4 of more than 4 tasks: the products would spill out of the registers.
    return min(16 // dtype.itemsize, 4 if tasks > 4 else 8)


def _unroll(tasks: int) -> int:
    """Loads of a thread per task before their first use: together they hide latency."""
    return max(1, 4 // tasks)


def _step(tasks: int, dtype: torch.dtype) -> int:
    """Elements of a task that a program handles at once."""
    return _lanes(tasks, dtype) * _THREADS * _unroll(tasks)


# In the kernels a step is FULL if all of it lies inside the chunk and is aligned. A step
# is UNROLL tiles of shape [THREADS, LANES], each row of a tile in one thread.
# Where a kernel ends in a loop, coverage misses the end: the interpreter moves it.


@_kernel
def _offsets(
    start: tl.tensor,
    tile: tl.constexpr,
    LANES: tl.constexpr,
    THREADS: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tensor:
    """Places of the elements of one tile in the chunk, ``[THREADS, LANES]``."""
    threads = tl.arange(0, THREADS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    begin = start + tile * LANES * THREADS
    # One load for all lanes of a thread, or neighbours to neighbouring threads.
    return begin + (threads * LANES + lanes if FULL else threads + lanes * THREADS)


@_kernel
def _pointer(address: tl.tensor, DTYPE: tl.constexpr, FULL: tl.constexpr) -> tl.tensor:
    pointer = address.to(tl.pointer_type(DTYPE))
    # Only with this promise does the compiler load 16 bytes at a time.
    return tl.multiple_of(pointer, 16) if FULL else pointer


@_kernel
def _load_step(
    addresses: tl.tuple,
    start: tl.tensor,
    length: tl.tensor,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tuple:
    """Load the tiles of one step, those of all tasks and then the next ones."""
    tiles = tl.tuple(())
    for tile in tl.static_range(UNROLL):
        offsets = _offsets(start, tile, LANES, THREADS, FULL)
        for task in tl.static_range(len(addresses)):
            # In this order: the interpreter broadcasts truth values to integers.
            mask = tl.broadcast_to(addresses[task], [THREADS, LANES]) != 0
            if not FULL:
                mask = mask & (offsets < length)
            pointer = _pointer(addresses[task], DTYPE, FULL)
            tiles += (tl.load(pointer + offsets, mask=mask, other=0.0),)
    return tiles


@_kernel
def _multiply_step(
    sums: tl.tuple,
    addresses: tl.tuple,
    start: tl.tensor,
    length: tl.tensor,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    FULL: tl.constexpr,
) -> tl.tuple:
    """Add the products of one step to the sums of all pairs, ``[THREADS]`` each."""
    K: tl.constexpr = len(addresses)
    tiles = _load_step(addresses, start, length, DTYPE, LANES, THREADS, UNROLL, FULL)
    for tile in tl.static_range(UNROLL):
        wide = tl.tuple(())
        for task in tl.static_range(K):
            wide += (tiles[tile * K + task].to(tl.float64),)
        added = tl.tuple(())
        for i in tl.static_range(K):
            for j in tl.static_range(i, K):
                added += (sums[len(added)] + tl.sum(wide[i] * wide[j], axis=1),)
        sums = added
    return sums


@_kernel
def _multiply_chunk(
    rows: tl.tensor,
    partial: tl.tensor,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Write the inner products over one chunk, the upper triangle row by row."""
    STEP: tl.constexpr = LANES * THREADS * UNROLL
    PAIRS: tl.constexpr = K * (K + 1) // 2
    chunk = tl.program_id(0).to(tl.int64)
    row = rows + chunk * (2 + K)
    # Within a chunk int32 will do, and is faster.
    length = tl.load(row).to(tl.int32)
    full = tl.load(row + 1).to(tl.int32)
    addresses = tl.tuple(())
    for task in tl.static_range(K):
        addresses += (tl.load(row + 2 + task),)
    sums = tl.tuple(())
    for _ in tl.static_range(PAIRS):
        sums += (tl.full([THREADS], 0.0, tl.float64),)
    for start in range(0, full, STEP):
        sums = _multiply_step(
            sums, addresses, start, length, DTYPE, LANES, THREADS, UNROLL, True
        )
    for start in range(full, length, STEP):
        sums = _multiply_step(
            sums, addresses, start, length, DTYPE, LANES, THREADS, UNROLL, False
        )
    for pair in tl.static_range(PAIRS):  # pragma: no branch
        tl.store(partial + chunk * PAIRS + pair, tl.sum(sums[pair], axis=0))


@_kernel
def _sum_chunks(
    partial: tl.tensor,
    result: tl.tensor,
    chunks: tl.tensor,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Sum one inner product over all chunks, and write it to its place."""
    PAIRS: tl.constexpr = K * (K + 1) // 2
    i = tl.minimum(tl.program_id(0), tl.program_id(1))
    j = tl.maximum(tl.program_id(0), tl.program_id(1))
    pair = i * K - i * (i - 1) // 2 + j - i
    sums = tl.full([WIDTH], 0.0, tl.float64)
    for start in range(0, chunks, WIDTH):
        chunk = start + tl.arange(0, WIDTH)
        place = partial + chunk.to(tl.int64) * PAIRS + pair
        sums += tl.load(place, mask=chunk < chunks, other=0.0)
    tl.store(result + tl.program_id(0) * K + tl.program_id(1), tl.sum(sums, axis=0))


@_kernel
def _combine_step(
    target: tl.tensor,
    factors: tl.tuple,
    addresses: tl.tuple,
    start: tl.tensor,
    length: tl.tensor,
    DTYPE: tl.constexpr,
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
    FULL: tl.constexpr,
) -> None:
    """Write the weighted sum of one step."""
    K: tl.constexpr = len(addresses)
    tiles = _load_step(addresses, start, length, DTYPE, LANES, THREADS, UNROLL, FULL)
    pointer = _pointer(target, DTYPE, FULL)
    for tile in tl.static_range(UNROLL):  # pragma: no branch
        total = tl.full([THREADS, LANES], 0.0, SUM)
        for task in tl.static_range(K):
            total += factors[task] * tiles[tile * K + task].to(SUM)
        offsets = _offsets(start, tile, LANES, THREADS, FULL)
        if FULL:
            tl.store(pointer + offsets, total.to(DTYPE))
        else:
            tl.store(pointer + offsets, total.to(DTYPE), mask=offsets < length)


@_kernel
def _combine_chunk(
    rows: tl.tensor,
    weights: tl.tensor,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
) -> None:
    """Write the weighted sum of one chunk to its first task that is not missing."""
    STEP: tl.constexpr = LANES * THREADS * UNROLL
    row = rows + tl.program_id(0).to(tl.int64) * (2 + K)
    length = tl.load(row).to(tl.int32)
    full = tl.load(row + 1).to(tl.int32)
    addresses = tl.tuple(())
    factors = tl.tuple(())
    for task in tl.static_range(K):
        address = tl.load(row + 2 + task)
        addresses += (address,)
        # Where a gradient is missing so is its weight: NaN times zeros is NaN.
        factor = tl.load(weights + task, mask=address != 0, other=0.0)
        factors += (factor.to(SUM),)
    target = addresses[K - 1]
    for task in tl.static_range(K - 2, -1, -1):
        target = tl.where(addresses[task] != 0, addresses[task], target)
    for start in range(0, full, STEP):
        _combine_step(
            target,
            factors,
            addresses,
            start,
            length,
            DTYPE,
            SUM,
            LANES,
            THREADS,
            UNROLL,
            True,
        )
    for start in range(full, length, STEP):  # pragma: no branch
        _combine_step(
            target,
            factors,
            addresses,
            start,
            length,
            DTYPE,
            SUM,
            LANES,
            THREADS,
            UNROLL,
            False,
        )
