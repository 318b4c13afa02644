"""What the ranks of a group must agree on before they average or share gradients."""

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ghopt.forms import is_dtensor
from ghopt.ranks.replicas import SyncGroup, models_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

# How many synchronised calls this process has begun with a group.
_calls: "weakref.WeakKeyDictionary[ProcessGroup, int]" = weakref.WeakKeyDictionary()


def process_group(sync_group: SyncGroup) -> "ProcessGroup":
    """Find the process group that is meant, and refuse what would go wrong.

    Raises:
        TypeError: if ``sync_group`` is no DDP model, no list of them, not True and no
            group of which this rank is a member.
        ValueError: if there is no default group, a model has ``static_graph``, or the
            models are of several groups.
    """
    models = models_of(sync_group)
    if any(model.static_graph for model in models):
        raise ValueError(
            "sync_group must be a DDP model with static_graph=False, got True: "
            "it allows one backward pass for each forward pass"
        )
    if models:
        first: ProcessGroup = models[0].process_group
        if any(model.process_group != first for model in models):
            raise ValueError(
                "sync_group must hold DDP models of one process group, got several groups"
            )
        return first
    if not (dist.is_available() and dist.is_initialized()):
        given = f"got {sync_group!r} without"
        raise ValueError(f"sync_group needs init_process_group(), {given}")
    group: object = dist.group.WORLD if sync_group is True else sync_group
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group)
        raise TypeError(
            "sync_group must be a DDP model, a list of them, a group of this rank or "
            f"True, got {kind}"
        )
    return group


def world_size() -> int:
    """Count the ranks of the default process group; 1 without one."""
    is_there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if is_there else 1


def has_to_average(sync_group: SyncGroup, parameters: Iterable[Tensor]) -> bool:
    """Say whether there is anything to average: DTensors are averaged already."""
    several = process_group(sync_group).size() > 1
    return several and not all(is_dtensor(parameter) for parameter in parameters)


def agree_on_passes(parameters: Iterable[Tensor], losses: Mapping[str, Tensor]) -> None:
    """See that all ranks of sharded parameters will run the same backward passes.

    Each pass gathers and scatters: a rank that skips one, since its loss does not require
    grad, lets the others wait. One small message to each mesh axis. Where the group has
    no CPU backend the host waits for the device.

    Args:
        parameters: nothing is sent unless there are DTensors on a mesh of several ranks.
        losses: of this rank, by name; none if it failed before.

    Raises:
        ValueError: if the ranks differ.
        RuntimeError: if a rank failed before.
    """
    mesh = _mesh_of(parameters)
    if mesh is None:
        return
    flags = [loss.requires_grad for loss in losses.values()]
    rows = _gathered(mesh, [digest([*losses, *flags]), len(flags)])
    if all(row == rows[0] for row in rows):
        return
    ranks = mesh.mesh.flatten().tolist()
    failed = [rank for rank, (_, tasks) in zip(ranks, rows, strict=True) if not tasks]
    if failed:
        raise RuntimeError(
            f"rank(s) {failed} failed before the backward passes: the error is in their "
            f"output. {_NOTHING_THERE}"
        )
    most = max(tasks for _, tasks in rows)
    # Of a task that a rank does not have: 0.
    table = _gathered(mesh, [1 + flag for flag in flags] + [0] * (most - len(flags)))
    names = [*losses]
    for task, kinds in enumerate(zip(*table, strict=True)):
        if len({*kinds}) > 1:
            idle = [rank for rank, kind in zip(ranks, kinds, strict=True) if kind < 2]
            name = repr(names[task]) if task < len(names) else f"number {task}"
            raise ValueError(
                f"losses must require grad on all ranks or on none, got task {name} "
                f"without on rank(s) {idle}, whose backward pass the others would wait "
                f"for. {_NOTHING_THERE}"
            )
    raise ValueError(
        f"losses must be those of the same tasks on all ranks, got {names}"
    )


_NOTHING_THERE = "Where a rank has nothing for a task, use 0 * out.sum()"


@contextmanager
def failing_together(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Tell the ranks of sharded parameters of an error before :func:`agree_on_passes`."""
    try:
        yield
    except Exception:
        with suppress(RuntimeError):
            agree_on_passes(parameters, {})
        raise


def _mesh_of(parameters: Iterable[Tensor]) -> "DeviceMesh | None":
    """Find the largest mesh of some parameters, if several ranks share one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    meshes = [p.device_mesh for p in parameters if is_dtensor(p)]
    mesh = max(meshes, key=lambda mesh: mesh.size(), default=None)
    return None if mesh is None or mesh.size() == 1 else mesh


def _gathered(mesh: "DeviceMesh", row: list[int]) -> list[list[int]]:
    """Give the rows of all ranks of a mesh, in their order in it."""
    place = (mesh.mesh == dist.get_rank()).flatten().to("cpu", torch.int64)
    table = place[:, None] * torch.tensor(row, dtype=torch.int64, device="cpu")
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        message = table.to(talking_device(group))
        dist.all_reduce(message, group=group)
        table = message.cpu()
    rows: list[list[int]] = table.tolist()
    return rows


def mean_over_ranks(
    value: Tensor, sync_group: SyncGroup | None, parameters: Iterable[Tensor]
) -> Tensor:
    """Average a number over the ranks that average the gradients, or share them."""
    mesh = _mesh_of(parameters)
    groups = [mesh.get_group(axis) for axis in range(mesh.ndim)] if mesh else []
    if not groups and sync_group is not None and sync_group is not False:
        groups = [process_group(sync_group)]
    mean = value.clone()
    for group in groups:
        dist.all_reduce(mean, group=group)
        mean /= group.size()
    return mean


def sum_over_mesh(products: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Sum inner products over the ranks that share parameters as shards, if some do.

    Divided by the square of their number: as of losses that are means over the batch of
    all of them.
    """
    mesh = _mesh_of(parameters)
    for group in mesh.get_all_groups() if mesh else []:
        dist.all_reduce(products, group=group)
        products /= group.size() ** 2
    return products


def talking_device(group: "ProcessGroup") -> torch.device:
    """Where to put what the host will read: on the CPU it waits for no device."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    return torch.device("cpu" if on_cpu else "cuda")


def digest(given: Sequence[object]) -> int:
    """Give a number that is the same in every process, and fits an int64."""
    digest = hashlib.blake2b(repr(list(given)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def mark(group: "ProcessGroup") -> None:
    """Leave word in the store of the group that this rank begins one more call."""
    _calls[group] = _calls.get(group, 0) + 1
    store = _store(group)
    if store is not None:
        store.set(f"ghopt/{group.rank()}", str(_calls[group]))


def _store(group: "ProcessGroup") -> "Store | None":
    """Find the store of a group, but one in a file, which grows with every word."""
    # Older versions of torch do not give it away.
    store: Any = getattr(group, "get_group_store", lambda: None)()
    under = store
    while hasattr(under, "underlying_store"):
        under = under.underlying_store
    return None if type(under).__name__ == "FileStore" else store


def absence(group: "ProcessGroup") -> str:
    """Say which ranks have not begun as many calls as this one."""
    missing = []
    with suppress(RuntimeError):  # the store may have ended with its rank
        store = _store(group)
        if store is not None:
            for rank in range(group.size()):
                key = f"ghopt/{rank}"
                begun = int(store.get(key)) if store.check([key]) else 0
                if begun < _calls[group]:
                    missing.append(rank)
    if missing:
        return f"rank(s) {missing} did not come to backward()"
    return "a rank ended or was cut off during backward()"
