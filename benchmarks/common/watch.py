"""Count what a step does and keeps, exactly and without a clock."""

from collections.abc import Callable
from typing import Any, TypeAlias
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Step: TypeAlias = Callable[[], object]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts operations of torch, and the bytes of the tensors that are alive.

    What an operation allocates and frees by itself is not seen.

    Attributes:
        counting: whether to count; what is alive is noted always.
        operations: that torch dispatched since :meth:`restart`.
        peak: most bytes alive after any of these.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.counting = True
        self._storages: WeakSet[torch.UntypedStorage] = WeakSet()
        self.restart()

    def restart(self) -> None:
        """Count anew, with what is known to be alive."""
        self.operations, self.peak = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor):
                self._storages.add(tensor.untyped_storage())
        if self.counting:
            alive = sum(storage.nbytes() for storage in self._storages)
            self.peak = max(self.peak, alive)
            self.operations += 1
        return result


def watch(step: Step, cycle: int = 1) -> Watch:
    """Run two cycles of so many steps and watch the second one.

    In the first the optimizer makes its state, and all that lives on becomes known.
    """
    watching = Watch()
    with watching:
        for _ in range(2):
            watching.restart()
            for _ in range(cycle):
                step()
    return watching
