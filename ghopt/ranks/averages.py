"""What the ranks of a process group share: task gradients, and agreement about them.

The Gramian of the mean gradients is not the mean of the ranks' Gramians, so what is
averaged over the ranks are the gradients of each task, before they are harmonized. This
is for models replicated on every rank, as by DDP. Gradients that are DTensors, as under
FSDP2 and tensor parallelism, are complete already: only inner products are summed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ghopt.forms import as_real, is_dtensor, local, writable
from ghopt.ranks.agreement import (
    absence,
    digest,
    mark,
    process_group,
    sum_over_mesh,
    talking_device,
)
from ghopt.ranks.replicas import SyncGroup, models_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Gradients of this many elements travel by themselves and in place, shorter ones packed
# to messages of up to _MESSAGE_BYTES bytes, as in DDP: a message costs as much as many kB.
_LARGE = 2**20
_MESSAGE_BYTES = 25 * 2**20


class Alone:
    """A single process in place of :class:`Ranks`: there is nobody to agree with."""

    def agree(
        self,
        names: Sequence[str],
        shared: Sequence[Tensor],
        summed: Sequence[Tensor],
        *,
        listed: bool,
        messages: int | None = None,
    ) -> list[str]:
        """Give the tasks back."""
        del shared, summed, listed, messages
        return [*names]

    def average(
        self,
        gradients: dict[Tensor, Tensor],  # noqa: ARG002
        *,
        of_all_tasks: bool = False,  # noqa: ARG002
    ) -> Callable[[], None]:
        """Leave the gradients as they are."""
        return _nothing

    def sum_products(self, products: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """Sum inner products over the ranks that share parameters as shards, if any."""
        return sum_over_mesh(products, parameters)

    def first_weights(self, weights: Tensor) -> Tensor:
        """Give the weights back."""
        return weights


def _nothing() -> None:
    """Wait for nothing."""


ALONE = Alone()


class Ranks:
    """One synchronised ``backward``: what this rank tells the others, and hears.

    All ranks send the same messages in the same order:

    * one that tells the tasks and the parameters;
    * for each average one that tells which parameters have a gradient, two bytes each,
      and then the gradients;
    * one at the end, and the weights.

    With features one before the inner products, one before the weights, and at the end
    one average.

    A rank that fails says so in its next message, but for gradients. So the others fail,
    too, and do not wait.

    Args:
        group: the ranks.
        models: their DDP models, if known. They fix the order of the parameters, which
            are else taken in that of the optimizer, and which of them to leave alone.
    """

    def __init__(
        self, group: "ProcessGroup", models: Iterable[DistributedDataParallel] = ()
    ) -> None:
        self._group = group
        self._members = {*dist.get_process_group_ranks(group)}
        named = [(m, *pair) for m in models for pair in m.module.named_parameters()]
        self._places = {p: place for place, (_, _, p) in enumerate(named)}
        self._ignored = {p for m, name, p in named if name in m.parameters_to_ignore}
        self._rank, self._size = group.rank(), group.size()
        self._device = talking_device(group)
        # What the averages are of, in the order of the messages.
        self._shared: list[Tensor] = []
        self._summed: list[Tensor] = []
        # Messages that the others expect of this rank, the next first, of zeros as yet.
        self._expected = [torch.zeros(3 * self._size, dtype=torch.int64, device="cpu")]
        mark(group)

    def agree(
        self,
        names: Sequence[str],
        shared: Sequence[Tensor],
        summed: Sequence[Tensor],
        *,
        listed: bool,
        messages: int | None = None,
    ) -> list[str]:
        """See that all ranks are about to do the same.

        Args:
            names: of the tasks of this rank.
            shared: parameters of these averages. Passed over are DTensors on a mesh of
                all these ranks, since what they have is complete.
            summed: those of one more average at the end; if there are none, no average.
            listed: whether the tasks have no names of their own.
            messages: where the average of ``summed`` is the only one, and the last
                message: so many come before it.

        Returns:
            The tasks that any rank has, in one order: an average for each will follow.

        Raises:
            ValueError: if ranks differ in the parameters, or in tasks without names.
            RuntimeError: if a rank failed or does not answer.
        """
        self._shared, self._summed = self._to_average(shared), self._to_average(summed)
        kinds = [(tuple(p.shape), p.dtype) for p in [*self._shared, *self._summed]]
        table = [[0, 0, 0] for _ in range(self._size)]
        table[self._rank] = [len(names), digest(names), digest(kinds)]
        words = torch.tensor(table, dtype=torch.int64, device="cpu")
        rows = self._tell(words.flatten()).view(-1, 3).tolist()
        if any(row[:2] != rows[0][:2] for row in rows):
            names = self._union(names, listed=listed)
            rows = [[len(names), digest(names), row[2]] for row in rows]
        odd = [rank for rank, row in enumerate(rows) if row != rows[0]]
        if odd:
            raise ValueError(
                "parameters must be the same, in the same order and the same ones frozen, "
                f"on all ranks, got others on rank(s) {odd} than on rank 0"
            )
        if messages is None:
            lengths = [2 * len(self._shared)] * len(names)
            lengths += [2 * len(self._summed)] if summed else []
            lengths += [0]
        else:
            lengths = [0] * messages + [2 * len(self._summed)]
        self._expected = [
            torch.zeros(length, dtype=torch.uint8, device="cpu") for length in lengths
        ]
        return [*names]

    def _union(self, names: Sequence[str], *, listed: bool) -> list[str]:
        """List the tasks that any rank has, those of the first rank first.

        Raises:
            ValueError: if tasks have no names of their own on some rank.
        """
        told: list[tuple[list[str], bool]] = [([], False)] * self._size
        with self._explained():
            dist.all_gather_object(told, (list(names), listed), group=self._group)
        if any(is_listed for _, is_listed in told):
            given = "; ".join(f"{said} on rank {r}" for r, (said, _) in enumerate(told))
            raise ValueError(
                f"losses must be those of the same tasks, got {given}: where a rank may "
                "lack a task, give them names, {name: loss}"
            )
        return [*dict.fromkeys(name for said, _ in told for name in said)]

    def average(
        self, gradients: dict[Tensor, Tensor], *, of_all_tasks: bool = False
    ) -> Callable[[], None]:
        """Start to average the gradients of one task over the ranks.

        A rank without a gradient that another one has counts as zero; where no rank has
        one there stays none.

        Args:
            gradients: of this rank, by parameter. Nothing else may hold them.
            of_all_tasks: whether they are those of the parameters that are ``summed``.

        Returns:
            What waits for the end and leaves the means in ``gradients``.

        Raises:
            RuntimeError: if a rank failed or does not answer; so does what is returned.
        """
        wanted = self._summed if of_all_tasks else self._shared
        mine = [gradients.get(parameter) for parameter in wanted]
        if any(grad is not None and grad.requires_grad for grad in mine):
            raise ValueError(
                "backward_fn must not use create_graph=True with sync_group: gradients "
                "can be averaged over the ranks, but not the graphs that made them"
            )
        dense = [grad is not None and not grad.is_sparse for grad in mine]
        sparse = [grad is not None and grad.is_sparse for grad in mine]
        flags = torch.tensor([*dense, *sparse], dtype=torch.uint8, device="cpu")
        flags = self._tell(flags)
        dense, sparse = flags.view(2, -1).tolist()
        dense_ones = [p for p, has in zip(wanted, dense, strict=True) if has]
        # One that is dense on some rank travels as a dense one.
        sparse_ones = [
            parameter
            for parameter, has, others in zip(wanted, sparse, dense, strict=True)
            if has and not others
        ]
        try:
            ends = [self._start(gradients, pack) for pack in _packs(dense_ones)]
            ends += [self._start_sparse(gradients, p) for p in sparse_ones]
        except Exception:
            # The others wait for gradients now, in which no failure can be told.
            self._expected.clear()
            raise

        @torch.no_grad()
        def end() -> None:
            for wait in ends:
                wait()

        return end

    def sum_products(self, products: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """Sum inner products of what each rank has by itself over all ranks, in place.

        Args:
            products: ``[K, K]``, of losses that are means over the batch of this rank.
            parameters: of the optimizer. Ranks that share them as shards sum, too.

        Returns:
            Those of the means over the ranks.

        Raises:
            RuntimeError: if a rank failed or does not answer.
        """
        self._tell(self._expected[0])
        # Ranks of a mesh that holds this group sum there.
        if not any(self._is_complete(parameter) for parameter in parameters):
            self._sum(products)()
            products /= self._size**2
        return sum_over_mesh(products, parameters)

    def first_weights(self, weights: Tensor) -> Tensor:
        """See that no rank failed, and take the weights of the first rank.

        A weighting may draw at random, and even one that does not may see other last
        digits on another processor.

        Raises:
            RuntimeError: if a rank failed or does not answer.
        """
        self._tell(self._expected[0])
        weights = weights.contiguous()
        with self._explained():
            dist.broadcast(weights, group=self._group, group_src=0)
        return weights

    def fail(self) -> None:
        """Tell the other ranks that this one failed, if they wait for it."""
        # An error here, as when they are gone, must not hide the one that led here.
        with suppress(RuntimeError):
            if self._expected:
                self._tell(self._expected[0], failed=True)

    def _to_average(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """List the parameters whose gradients differ between the ranks, in their order."""
        wanted = [
            parameter
            for parameter in parameters
            if parameter not in self._ignored and not self._is_complete(parameter)
        ]
        last = len(self._places)
        return sorted(wanted, key=lambda parameter: self._places.get(parameter, last))

    def _is_complete(self, parameter: Tensor) -> bool:
        """Say whether the gradients of a parameter are averaged already: DTensors.

        Raises:
            ValueError: if some of the ranks share it, and others do not.
        """
        if not is_dtensor(parameter):
            return False
        met = self._members & {*parameter.device_mesh.mesh.flatten().tolist()}
        if 1 < len(met) < len(self._members):
            raise ValueError(
                "sync_group must hold all ranks of the mesh of a DTensor or one of them, "
                f"got {sorted(self._members)} for {parameter.device_mesh}"
            )
        return met == self._members

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
            raise RuntimeError(f"{absence(self._group)}: {error}") from error

    def _sum(self, tensor: Tensor) -> Callable[[], None]:
        """Start to sum over the ranks, in place; give what waits for it."""
        with self._explained():
            work = dist.all_reduce(tensor, group=self._group, async_op=True)

        def wait() -> None:
            with self._explained():
                work.wait()

        return wait

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
            gradients[parameter] = grad = writable(grad)
            grads.append(as_real(local(grad)))
        # In place if it can be: flatten copies only what is not contiguous.
        flat = grads[0].flatten() if len(pack) == 1 else _packed(grads)
        # Before they are summed, as in DDP: a sum of halves may overflow.
        flat /= self._size
        wait = self._sum(flat)

        def end() -> None:
            wait()
            means = flat.split_with_sizes([grad.numel() for grad in grads])
            for grad, mean in zip(grads, means, strict=True):
                if grad.data_ptr() != mean.data_ptr():
                    grad.copy_(mean.view(grad.shape))

        return end

    def _start_sparse(
        self, gradients: dict[Tensor, Tensor], parameter: Tensor
    ) -> Callable[[], None]:
        """Start to average a gradient that is sparse on every rank that has one."""
        grad = gradients.get(parameter)
        if grad is None:
            grad = torch.zeros_like(parameter, layout=torch.sparse_coo)
        mean = grad.coalesce() / self._size
        wait = self._sum(mean)

        def end() -> None:
            wait()
            gradients[parameter] = mean

        return end


@contextmanager
def together(sync_group: SyncGroup | None) -> Iterator[Alone | Ranks]:
    """Fail together: an exception on this rank is told to the others.

    Args:
        sync_group: the ranks; None for a call that concerns this one alone.
    """
    if sync_group is None:
        yield ALONE
        return
    ranks = Ranks(process_group(sync_group), models_of(sync_group))
    try:
        yield ranks
    except Exception:
        ranks.fail()
        raise


def _packs(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group parameters so that the gradients of a group travel in one message."""
    packs: list[list[Tensor]] = []
    filling: dict[object, list[Tensor]] = {}
    sizes: dict[object, int] = defaultdict(int)
    for parameter in parameters:
        kind = parameter.dtype, parameter.device
        if parameter.numel() >= _LARGE:
            packs.append([parameter])
            continue
        if kind not in filling or sizes[kind] + parameter.nbytes > _MESSAGE_BYTES:
            filling[kind] = []
            sizes[kind] = 0
            packs.append(filling[kind])
        filling[kind].append(parameter)
        sizes[kind] += parameter.nbytes
    return packs


def _packed(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
