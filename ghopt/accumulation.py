"""Micro-batches that await the last one: :class:`Accumulation`."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ghopt.gradients import StoredGradients


@dataclass
class Accumulation:
    """Micro-batches that await the last one: pass the same object to each ``backward``.

    Attributes:
        collected: gradients of the harmonized parameters, by the name of the task.
        summed: those of the other parameters, of all tasks.
        is_weighed: whether they are those of one weighted sum, not of tasks.
        is_local: whether they are those of this rank alone, and must be averaged.
        is_listed: whether the tasks have no names of their own, but places in a list.
    """

    collected: dict[str, dict[Tensor, Tensor]] = field(default_factory=dict)
    summed: dict[Tensor, Tensor] = field(default_factory=dict)
    is_weighed: bool = False
    is_local: bool = False
    is_listed: bool = False

    def __bool__(self) -> bool:
        """Say whether something is kept."""
        return bool(self.collected)

    @property
    def parameters(self) -> set[Tensor]:
        """Those for which a gradient is kept."""
        return {p for task in self.collected.values() for p in task} | {*self.summed}

    def forget(self) -> None:
        """Drop what is kept."""
        self.collected.clear()
        self.summed.clear()
        self.is_weighed = self.is_local = self.is_listed = False

    def joined(self, names: Collection[str], *, listed: bool) -> list[str]:
        """List the tasks of all micro-batches, those of a new one included.

        Raises:
            ValueError: if it has other tasks, and they are not told apart by names.
        """
        is_same = self.collected.keys() == {*names}
        is_named = not (listed or self.is_listed or self.is_weighed)
        if self.collected and not (is_same or is_named):
            raise ValueError(
                f"losses must be those of tasks {[*self.collected]}, got {[*names]}: "
                "where tasks come and go, give them names, {name: loss}"
            )
        return [*dict.fromkeys([*self.collected, *names])]

    def take(
        self, names: Collection[str], parameters: list[Tensor]
    ) -> tuple[StoredGradients, dict[Tensor, Tensor]]:
        """Hand over what is kept: the gradients of these tasks, and the sums."""
        gradients = StoredGradients(names, parameters, dict(self.collected))
        summed = dict(self.summed)
        self.collected.clear()
        self.summed.clear()
        return gradients, summed

    def keep(self, gradients: StoredGradients, summed: Mapping[Tensor, Tensor]) -> None:
        """Keep the gradients of one more micro-batch, with those before it."""
        self.collected.update({name: gradients[name] for name in gradients.names})
        self.summed.update(summed)
