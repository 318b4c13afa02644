"""The gradients of K tasks as one object.

Whatever ran the passes leaves a :class:`TaskGradients`: gradients that were stored, layers
that were deferred, or both joined; what harmonizes them does not ask which. What looks at
the step needs them stored.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from ghopt.forms import is_dtensor, shard_groups
from ghopt.gradients.entries import (
    Entries,
    Prepared,
    first_of,
    is_plain,
    local_entries,
    prepare,
)
from ghopt.gradients.products import multiply
from ghopt.gradients.sums import accumulate, add, add_with_graph, shift
from ghopt.losses import check_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TaskGradients(Protocol):
    """Gradients of K tasks, by task and parameter."""

    def __bool__(self) -> bool:
        """Say whether a task reaches a parameter."""

    def gramian(self, over: Iterable[Tensor] | None = None) -> Tensor:
        """Take the inner products of the gradients.

        Args:
            over: these parameters alone; all of them if None. Where there are DTensors
                the same on all ranks.

        Returns:
            Shape ``[K, K]``, float64, symmetric; zeros where there is no gradient.
        """

    def combine(
        self, weights: Tensor, gramian: Tensor | None = None, *, keep: bool = False
    ) -> dict[Tensor, Tensor]:
        """Sum the gradients with weights, in place: they are spoilt unless ``keep``.

        Args:
            weights: shape ``[K]``, float64.
            gramian: what :meth:`gramian` gave of all parameters; saves time.
            keep: leave the gradients as they are, and take memory of its own for the sums.

        Returns:
            The sums by parameter, of those that a task reaches.

        Raises:
            ValueError: if the dtype of a gradient cannot hold a finite weight; on the
                CPU, where to ask costs nothing.
        """


class StoredGradients:
    """Gradients as autograd hands them over: a dictionary by parameter for each task.

    The dictionaries may be changed until the first product is taken.

    Args:
        names: of the tasks, in the order of the rows of the Gramian.
        parameters: that the tasks may reach, in the order of the arithmetic.
        by_task: the dictionaries, if there are some already.
    """

    def __init__(
        self,
        names: Iterable[str],
        parameters: Sequence[Tensor],
        by_task: dict[str, dict[Tensor, Tensor]] | None = None,
    ) -> None:
        self.names = tuple(names)
        self._parameters = parameters
        given = by_task or {}
        self._by_task = {name: given.get(name, {}) for name in self.names}
        self._all: _Parts | None = None
        self._gramian: Tensor | None = None

    def __getitem__(self, name: str) -> dict[Tensor, Tensor]:
        """Give the gradients of one task by parameter."""
        return self._by_task[name]

    def __bool__(self) -> bool:
        """Say whether a task reaches a parameter."""
        return any(self._by_task.values())

    def gramian(self, over: Iterable[Tensor] | None = None) -> Tensor:
        """See :meth:`TaskGradients.gramian`."""
        if over is not None:
            return multiply(self._parts(set(over)).prepared, len(self.names))
        if self._gramian is None:
            self._all = self._all or self._parts()
            self._gramian = multiply(self._all.prepared, len(self.names))
        return self._gramian

    def gramian_with(self, vector: Mapping[Tensor, Tensor]) -> Tensor:
        """Take the inner products of the gradients and, last, of one more vector.

        Args:
            vector: by parameter, of which a task reaches one at least. Where no task
                reaches one it does not count.

        Returns:
            Shape ``[K + 1, K + 1]``, float64, symmetric.
        """
        self._all = self._all or self._parts()
        last = len(self.names)
        given = {
            p: _alike({**entries, last: vector[p]})
            for p, entries in self._all.given.items()
            if p in vector  # elsewhere there is nothing to multiply with
        }
        return multiply(_sorted(given, last + 1).prepared, last + 1, self.gramian())

    def combine(
        self, weights: Tensor, gramian: Tensor | None = None, *, keep: bool = False
    ) -> dict[Tensor, Tensor]:
        """See :meth:`TaskGradients.combine`.

        The sums take the memory of the first task that reaches a parameter. Gradients that
        have a graph of their own (``create_graph=True``) are summed with it, in new
        memory.
        """
        parts = self._all or self._parts()
        every = [*chain.from_iterable(map(dict.values, parts.given.values()))]
        check_range(weights, (grad.dtype for grad in every), gramian)
        if not parts.is_plain and any(grad.requires_grad for grad in every):
            return {p: add_with_graph(e, weights) for p, e in parts.given.items()}
        if keep:
            copies = {p: _with_copy(e) for p, e in parts.given.items()}
            parts = _sorted(copies, len(self.names))
        add(parts.prepared, weights, gramian)
        if parts.is_plain:
            return {p: first_of(entries) for p, entries in parts.mine.items()}
        return {
            # Of a DTensor what was written is the shard.
            p: first_of(
                parts.given[p] if is_dtensor(first_of(parts.given[p])) else mine
            )
            for p, mine in parts.mine.items()
        }

    def add_to(
        self, targets: Mapping[Tensor, Tensor], weights: Tensor, active: Tensor
    ) -> None:
        """Add the weighted sum of the gradients to other tensors, in place.

        Args:
            targets: one for each parameter, which may be the parameter itself.
            weights: shape ``[K]``, float64.
            active: a bool scalar. Where it is False no bit changes, whatever the gradients.
        """
        self._all = self._all or self._parts()
        for parameter, entries in self._all.given.items():
            if parameter in targets:
                shift(targets[parameter], entries, weights, active)

    def _parts(self, over: Container[Tensor] | None = None) -> "_Parts":
        """Sort the gradients by parameter, and split them for the arithmetic."""
        tasks = [self._by_task[name] for name in self.names]
        # Each parameter is looked up once a task: its hash is made in Python.
        given: dict[Tensor, Entries] = {
            p: {} for p in self._parameters if over is None or p in over
        }
        for number, task in enumerate(tasks):
            for parameter, grad in task.items():
                entries = given.get(parameter)
                if entries is not None:
                    entries[number] = grad
        if not all(given.values()):
            given = {p: entries for p, entries in given.items() if entries}
        return _sorted(given, len(tasks))

    def __iter__(self) -> Iterator[Tensor]:
        """List the parameters that a task reaches."""
        reached = {p for of_task in self._by_task.values() for p in of_task}
        return (parameter for parameter in self._parameters if parameter in reached)

    def without_graph(self) -> "StoredGradients":
        """Give these, or copies of those that have a graph, so that it can be freed."""
        every = (g for of_task in self._by_task.values() for g in of_task.values())
        if not any(grad.requires_grad for grad in every):
            return self
        by_task = {
            name: {
                p: grad.detach().clone() if grad.requires_grad else grad
                for p, grad in of_task.items()
            }
            for name, of_task in self._by_task.items()
        }
        found = StoredGradients(self.names, self._parameters, by_task)
        found._gramian = self._gramian
        return found

    def over(self, parameters: Container[Tensor]) -> "StoredGradients":
        """Give those of some parameters; these themselves if that is all."""
        if all(p in parameters for p in self):
            return self
        by_task = {
            name: {p: grad for p, grad in of_task.items() if p in parameters}
            for name, of_task in self._by_task.items()
        }
        return StoredGradients(self.names, self._parameters, by_task)

    def add(self, other: "StoredGradients") -> "StoredGradients":
        """Add gradients of the same tasks or others, in place; those given are spoilt."""
        names = dict.fromkeys([*self.names, *other.names])
        by_task = {name: dict(self._by_task.get(name, {})) for name in names}
        for name in other.names:
            for parameter, grad in other[name].items():
                mine = by_task[name].get(parameter)
                by_task[name][parameter] = accumulate(mine, grad)
        parameters = dict.fromkeys([*self._parameters, *other._parameters])
        return StoredGradients(names, [*parameters], by_task)


def _sorted(given: dict[Tensor, Entries], tasks: int) -> "_Parts":
    """Split gradients for the arithmetic."""
    if all(map(is_plain, given.values())):
        plain = Prepared((), [], [*given.values()], is_plain=True)
        return _Parts(given, given, [plain] if given else [], is_plain=True)
    mine = {parameter: local_entries(entries) for parameter, entries in given.items()}
    spread: dict[tuple[ProcessGroup, ...], list[Entries]] = defaultdict(list)
    for parameter, entries in mine.items():
        spread[shard_groups(first_of(given[parameter]))].append(entries)
    prepared = [prepare(groups, part, tasks) for groups, part in spread.items()]
    return _Parts(given, mine, prepared)


def _alike(entries: Entries) -> Entries:
    """Bring entries to the widest of their dtypes: a base may keep averages in another."""
    dtypes = [entry.dtype for entry in entries.values()]
    widest = reduce(torch.promote_types, dtypes)
    return {task: entry.to(widest) for task, entry in entries.items()}


def _with_copy(entries: Entries) -> Entries:
    """Copy the first entry, in which the sum will be written."""
    return {**entries, min(entries): first_of(entries).clone()}


class _Parts(NamedTuple):
    """Stored gradients by parameter.

    Attributes:
        given: as autograd gave them.
        mine: what this rank has of them.
        prepared: these, sorted.
        is_plain: whether all are as :func:`is_plain` says.
    """

    given: dict[Tensor, Entries]
    mine: dict[Tensor, Entries]
    prepared: list[Prepared]
    is_plain: bool = False


class JoinedGradients:
    """Gradients of which each parameter is in one part, and only there."""

    def __init__(self, parts: Sequence[TaskGradients]) -> None:
        self._parts = parts

    def __bool__(self) -> bool:
        """Say whether a task reaches a parameter."""
        return any(self._parts)

    def gramian(self, over: Iterable[Tensor] | None = None) -> Tensor:
        """See :meth:`TaskGradients.gramian`."""
        wanted = None if over is None else list(over)
        products = [part.gramian(wanted) for part in self._parts]
        return reduce(lambda total, more: total + more.to(total.device), products)

    def combine(
        self, weights: Tensor, gramian: Tensor | None = None, *, keep: bool = False
    ) -> dict[Tensor, Tensor]:
        """See :meth:`TaskGradients.combine`."""
        sums: dict[Tensor, Tensor] = {}
        for part in self._parts:
            sums |= part.combine(weights, gramian, keep=keep)
        return sums
