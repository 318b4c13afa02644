"""What the ranks of a process group share: task gradients, and agreement about them.

The Gramian of the mean gradients is not the mean of the ranks' Gramians, so what is
averaged over the ranks are the gradients of each task, before they are harmonized. This
is for models replicated on every rank, as by DDP. Gradients that are DTensors, as under
FSDP2 and tensor parallelism, are complete already: only inner products are summed.
"""

import gc
import hashlib
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, Union

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store
    from torch.distributed.tensor import DTensor

SyncGroup: TypeAlias = Union["ProcessGroup", DistributedDataParallel, bool]
"""Ranks to average over: a group, that of a DDP model, or True for the default one."""

# Gradients of this many elements travel by themselves and in place, shorter ones packed
# to messages of up to _PACK bytes, as in DDP: a message costs as much as many kB.
_ALONE = 2**20
_PACK = 25 * 2**20

_CURE = (
    "run the forward pass and backward() inside `with model.no_sync():`, and pass "
    "sync_group=model to backward()"
)

# How many synchronised calls this process has begun with a group.
_calls: "weakref.WeakKeyDictionary[ProcessGroup, int]" = weakref.WeakKeyDictionary()


def process_group(sync_group: SyncGroup) -> "ProcessGroup":
    """Find the process group that is meant, and refuse what would go wrong.

    Raises:
        TypeError: if ``sync_group`` is no DDP model, not True and no group of which
            this rank is a member.
        ValueError: if there is no default group, or the model has ``static_graph``.
    """
    if isinstance(sync_group, DistributedDataParallel):
        if sync_group.static_graph:
            raise ValueError(
                "sync_group must be a DDP model with static_graph=False, got True: "
                "it allows one backward pass for each forward pass"
            )
        return sync_group.process_group
    if not (dist.is_available() and dist.is_initialized()):
        given = f"got {sync_group!r} without"
        raise ValueError(f"sync_group needs init_process_group(), {given}")
    group = dist.group.WORLD if sync_group is True else sync_group
    if not isinstance(group, dist.ProcessGroup):
        kind = type(group)
        raise TypeError(
            f"sync_group must be a DDP model, a group of this rank or True, got {kind}"
        )
    return group


def beside(sync_group: SyncGroup | None, parameters: Iterable[Tensor]) -> list[Tensor]:
    """List what else a DDP model trains, beside these parameters."""
    if not isinstance(sync_group, DistributedDataParallel):
        return []
    known = set(parameters)
    trained = (p for p in sync_group.parameters() if p.requires_grad)
    return [parameter for parameter in trained if parameter not in known]


def ddp_models(
    parameters: Iterable[Tensor],
) -> list[weakref.ref[DistributedDataParallel]]:
    """Search the process for the DDP models of these parameters.

    For :func:`refuse_single_pass`. Takes as long as Python's garbage collection, some
    ten milliseconds. There is no other way: the hooks by which DDP learns of a gradient
    cannot be seen from the parameter.
    """
    wanted = set(parameters)
    return [
        weakref.ref(found)
        for found in gc.get_objects()
        # Of the type: an object may lie about its class, or warn when asked for it.
        if issubclass(type(found), DistributedDataParallel)
        and not wanted.isdisjoint(found.parameters())
    ]


def refuse_single_pass(
    models: Iterable[weakref.ref[DistributedDataParallel]],
) -> None:
    """Refuse several passes through a DDP model that will average the first one only.

    torch raises if the tasks reach different parameters. If they reach the same ones the
    later passes stay local, and the ranks drift apart without an error.

    Raises:
        RuntimeError: if the last forward pass of a model ran outside ``no_sync``.
    """
    for reference in models:
        model = reference()
        if model is not None and _expects_one_pass(model):
            raise RuntimeError(
                "losses need one backward pass each, but the DDP model of these "
                f"parameters averages the first one only: {_CURE}"
            )


def _expects_one_pass(model: DistributedDataParallel) -> bool:
    """Say whether the last forward pass prepared for a backward pass that averages."""
    # By this flag the forward pass notes whether it ran under no_sync. Lightning calls
    # training_step, and that backward, in the middle of one, and prepares each pass.
    inside = DistributedDataParallel._active_ddp_module is model
    used = model._lazy_init_ran  # before the first forward pass the flag is True, too
    return bool(model.require_forward_param_sync) and used and not inside


class Ranks:
    """One synchronised ``backward``: what this rank tells the others, and hears.

    The messages, the same and in the same order on every rank: one about the tasks and
    parameters; then for each average one about which parameters have a gradient, two
    bytes each, and the gradients. A rank that fails says so in one of the former, so
    that the others fail with it instead of waiting.

    Args:
        group: the ranks.
    """

    def __init__(self, group: "ProcessGroup") -> None:
        self._group = group
        self._rank, self._size = group.rank(), group.size()
        # The host reads what is agreed: on the CPU without waiting for the device.
        on_cpu = "cpu:" in dist.get_backend_config(group)
        self._device = torch.device("cpu" if on_cpu else "cuda")
        # Messages that the others expect of this rank, the next first, of zeros as yet.
        self._expected = [torch.zeros(3 * self._size, dtype=torch.int64)]
        _mark(group)

    def agree(self, names: Sequence[str], parts: Sequence[Sequence[Tensor]]) -> None:
        """See that all ranks are about to do the same.

        Args:
            names: of the tasks.
            parts: the parameters of each average that will follow.

        Raises:
            ValueError: if ranks differ in the tasks or in the parameters.
            RuntimeError: if a rank failed or does not answer.
        """
        plain = [_replicated(part) for part in parts]
        # Of integers alone: Python hashes strings differently in each process.
        kinds = hash(
            tuple(tuple((*p.shape, p.dtype.itemsize) for p in part) for part in plain)
        )
        table = torch.zeros(self._size, 3, dtype=torch.int64)
        table[self._rank] = torch.tensor([len(names), _digest(names), kinds & _LARGEST])
        rows = self._tell(table.flatten()).view(-1, 3).tolist()
        if any(row[:2] != rows[0][:2] for row in rows):
            told: list[list[str]] = [[]] * self._size
            with self._explained():
                dist.all_gather_object(told, list(names), group=self._group)
            given = "; ".join(
                f"{said} on rank {rank}" for rank, said in enumerate(told)
            )
            raise ValueError(f"losses must be those of the same tasks, got {given}")
        odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if odd:
            raise ValueError(
                "parameters must be the same, and the same ones frozen, on all ranks, "
                f"got others on rank(s) {odd} than on rank 0"
            )
        self._expected = [
            torch.zeros(2 * len(part), dtype=torch.uint8) for part in plain
        ]

    def average(
        self, gradients: dict[Tensor, Tensor], parameters: Sequence[Tensor]
    ) -> Callable[[], None]:
        """Start to average the gradients of one task over the ranks.

        A rank without a gradient that another one has counts as zero; where no rank has
        one there stays none.

        Args:
            gradients: of this rank, by parameter. Nothing else may hold them.
            parameters: those that may have one. DTensors are passed over: what they
                have is complete.

        Returns:
            What waits for the end and leaves the means in ``gradients``.

        Raises:
            RuntimeError: if a rank failed or does not answer; so does what is returned.
        """
        plain = _replicated(parameters)
        mine = [gradients.get(parameter) for parameter in plain]
        dense = [grad is not None and not grad.is_sparse for grad in mine]
        sparse = [grad is not None and grad.is_sparse for grad in mine]
        flags = torch.tensor([*dense, *sparse], dtype=torch.uint8)
        flags = self._tell(flags)
        dense, sparse = flags.view(2, -1).tolist()
        dense_ones = [p for p, has in zip(plain, dense, strict=True) if has]
        # One that is dense on some rank travels as a dense one.
        sparse_ones = [
            parameter
            for parameter, has, others in zip(plain, sparse, dense, strict=True)
            if has and not others
        ]
        with self._explained():
            ends = [self._start(gradients, pack) for pack in _packs(dense_ones)]
            ends += [self._start_sparse(gradients, p) for p in sparse_ones]

        def end() -> None:
            with self._explained(), torch.no_grad():
                for wait in ends:
                    wait()

        return end

    def fail(self) -> None:
        """Tell the other ranks that this one failed, if they wait for it."""
        # An error here, as when they are gone, must not hide the one that led here.
        with suppress(RuntimeError):
            if self._expected:
                self._tell(self._expected[0], failed=True)

    def _tell(self, payload: Tensor, *, failed: bool = False) -> Tensor:
        """Give whole numbers, and take the largest that any rank gave.

        Raises:
            RuntimeError: if a rank failed or does not answer.
        """
        del self._expected[0]
        failures = payload.new_zeros(self._size)
        failures[self._rank] = failed
        message = torch.cat([failures, payload]).to(self._device)
        with self._explained():
            dist.all_reduce(message, dist.ReduceOp.MAX, group=self._group)
        failures, payload = message.cpu().split_with_sizes([self._size, len(payload)])
        if failures.any():
            self._expected.clear()
            ranks = failures.nonzero().flatten().tolist()
            raise RuntimeError(
                f"rank(s) {ranks} failed in backward(): the error is in their output"
            )
        return payload

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Say which ranks are missing when one of torch's collectives fails."""
        try:
            yield
        except RuntimeError as error:
            self._expected.clear()  # nothing more can be told
            raise RuntimeError(f"{_absence(self._group)}: {error}") from error

    def _start(
        self, gradients: dict[Tensor, Tensor], pack: list[Tensor]
    ) -> Callable[[], None]:
        """Start to average the dense gradients of one message."""
        grads = []
        for parameter in pack:
            grad = gradients.get(parameter)
            if grad is None:
                grad = torch.zeros_like(parameter, requires_grad=False)
            elif grad.is_sparse:  # where another rank has a dense one
                grad = grad.to_dense()
            gradients[parameter] = grad
            grads.append(_real(grad))
        # In place if it can be: flatten copies only what is not contiguous.
        flat = grads[0].flatten() if len(pack) == 1 else _packed(grads)
        # Before they are summed, as in DDP: a sum of halves may overflow.
        flat /= self._size
        work = dist.all_reduce(flat, group=self._group, async_op=True)

        def wait() -> None:
            work.wait()
            means = flat.split_with_sizes([grad.numel() for grad in grads])
            for grad, mean in zip(grads, means, strict=True):
                if grad.data_ptr() != mean.data_ptr():
                    grad.copy_(mean.view(grad.shape))

        return wait

    def _start_sparse(
        self, gradients: dict[Tensor, Tensor], parameter: Tensor
    ) -> Callable[[], None]:
        """Start to average a gradient that is sparse on every rank that has one."""
        grad = gradients.get(parameter)
        if grad is None:
            grad = torch.zeros_like(parameter, layout=torch.sparse_coo)
        flat = grad.coalesce() / self._size
        work = dist.all_reduce(flat, group=self._group, async_op=True)

        def wait() -> None:
            work.wait()
            gradients[parameter] = flat

        return wait


@contextmanager
def together(group: "ProcessGroup") -> Iterator[Ranks]:
    """Fail together: an exception on this rank is told to the others."""
    ranks = Ranks(group)
    try:
        yield ranks
    except Exception:
        ranks.fail()
        raise


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether a tensor is a DTensor."""
    if type(tensor) is Tensor:
        return False
    # Who has made one has imported the module, which to import takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def placed_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Give a DTensor the placements of its parameter; in other tensors, nothing to do.

    A gradient may be partial, to be summed over the mesh before it can be used.
    """
    if not (is_dtensor(gradient) and is_dtensor(parameter)):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


def local(tensor: Tensor) -> Tensor:
    """Give the shard of this rank; of other tensors, all."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_groups(tensor: Tensor) -> "tuple[ProcessGroup, ...]":
    """List the groups over which the shards of a tensor are spread, one per mesh axis.

    The inner product of two tensors is the sum of those of the shards over all of them.
    """
    if not is_dtensor(tensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )


def sum_over(groups: "Iterable[ProcessGroup]", tensor: Tensor) -> Tensor:
    """Sum over the ranks of every group, in place."""
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor


_LARGEST = 2**63 - 1  # int64


def _replicated(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if not is_dtensor(parameter)]


def _digest(names: Sequence[str]) -> int:
    digest = hashlib.blake2b(repr(list(names)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _packs(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group parameters so that the gradients of a group travel in one message."""
    packs: list[list[Tensor]] = []
    filling: dict[object, list[Tensor]] = {}
    sizes: dict[object, int] = defaultdict(int)
    for parameter in parameters:
        kind = parameter.dtype, parameter.device
        if parameter.numel() >= _ALONE:
            packs.append([parameter])
            continue
        if kind not in filling or sizes[kind] + parameter.nbytes > _PACK:
            filling[kind] = []
            sizes[kind] = 0
            packs.append(filling[kind])
        filling[kind].append(parameter)
        sizes[kind] += parameter.nbytes
    return packs


def _packed(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _real(tensor: Tensor) -> Tensor:
    """Give a complex tensor as pairs of reals, in the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _mark(group: "ProcessGroup") -> None:
    """Leave word in the store of the group that this rank begins one more call."""
    _calls[group] = _calls.get(group, 0) + 1
    store = _store(group)
    if store is not None:
        store.set(f"ghopt/{group.rank()}", str(_calls[group]))


def _store(group: "ProcessGroup") -> "Store | None":
    """Find the store of a group, but one in a file, which grows with every word."""
    store = under = group.get_group_store()
    while hasattr(under, "underlying_store"):
        under = under.underlying_store
    return None if type(under).__name__ == "FileStore" else store


def _absence(group: "ProcessGroup") -> str:
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
