"""What changes between the calls of a ``HarmonizedOptimizer``.

In one object that is changed in place: see the docstring of ``optimizer.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ghopt.accumulation import Accumulation
from ghopt.gradients import StoredGradients
from ghopt.harmonize import Outcome
from ghopt.losses import weighted_sum
from ghopt.measuring import Harmonization
from ghopt.ranks import Replicas

Mean: TypeAlias = Callable[[Tensor], Tensor]
"""Takes the mean of a number over the ranks."""


@dataclass
class Progress:
    """All that changes between calls.

    Attributes:
        accumulation: micro-batches that await the last one.
        last: what the last harmonization found and did.
        steps: number of steps that the weights in ``last`` have served.
        is_measured: whether they serve the step to come, or in progress.
        is_stepping: whether a step of the base optimizer is in progress.
        values: losses of the micro-batches in an evaluation by a closure, by task.
        value: weighted sum of the losses of that evaluation that are harmonized so far.
        is_known: whether ``backward`` was ever called, or the lack of it warned of.
        clears_to: whether ``zero_grad`` of the base takes ``set_to_none``, once known.
        replicas: the DDP models of this process.
        evaluations: by a closure, in this step.
        gradients: of the tasks since the last step, where the step is looked at; of the
            first evaluation by a closure.
        is_evaluated: whether they are those of a closure in this step.
        tasks: names of all tasks ever measured, as keys.
    """

    accumulation: Accumulation = field(default_factory=Accumulation)
    last: Harmonization | None = None
    steps: int = 0
    is_measured: bool = False
    is_stepping: bool = False
    values: dict[str, Tensor] = field(default_factory=dict)
    value: Tensor | None = None
    is_known: bool = False
    clears_to: bool | None = None
    replicas: Replicas = field(default_factory=Replicas)
    evaluations: int = 0
    gradients: StoredGradients | None = None
    is_evaluated: bool = False
    tasks: dict[str, None] = field(default_factory=dict)

    def forget(self) -> None:
        """Drop a started accumulation."""
        self.accumulation.forget()
        self.values.clear()

    def clear(self) -> None:
        """Forget what ``zero_grad`` clears."""
        self.forget()
        self.value = None
        if not self.is_stepping:
            self.is_measured = False
            self.gradients = None

    def drop_cleared(self) -> None:
        """Drop kept gradients of which ``.grad`` was cleared by another ``zero_grad``."""
        kept = self.gradients
        if kept and not self.is_stepping and all(p.grad is None for p in kept):
            self.gradients = None

    def note(self, outcome: Outcome, mean: Mean) -> None:
        """Note what a ``backward`` did.

        Args:
            outcome: of it.
            mean: takes the mean of a number over the ranks.
        """
        new, mine = outcome.gradients, self.gradients
        if new is not None and self.evaluations <= 1:
            # The first evaluation by a closure measures anew: what was before is over.
            is_over = self.is_stepping and not self.is_evaluated
            self.gradients = new if mine is None or is_over else mine.add(new)
            self.is_evaluated = self.is_stepping
        if outcome.found is not None:
            self.tasks |= dict.fromkeys(outcome.found.names)
            self.last, self.steps, self.is_measured = outcome.found, 0, True
        elif outcome.reused is not None and not self.accumulation:
            self.is_measured |= outcome.reused is self.last
        if self.is_stepping:
            self._add_up(outcome, mean)

    def _add_up(self, outcome: Outcome, mean: Mean) -> None:
        """Add up the losses of an evaluation by a closure, and weigh them at its end."""
        for name, loss in outcome.losses.items():
            value = loss.detach().reshape(())
            self.values[name] = self.values.get(name, 0) + value
        if self.accumulation or not self.values:
            return
        if outcome.found is None:
            weights = torch.ones(len(self.values), dtype=torch.float64, device="cpu")
            values = [*self.values.values()]
        else:
            weights = outcome.found.weights
            # A task that only other ranks have adds nothing here.
            nothing = torch.zeros((), dtype=torch.float64, device="cpu")
            values = [self.values.get(n, nothing) for n in outcome.found.names]
        # The gradient is that of all ranks, and a line search on each must see the same.
        value = mean(weighted_sum(values, weights))
        self.value = value if self.value is None else self.value + value
        self.values.clear()

    def end_step(self) -> None:
        """Forget what was for this step only."""
        self.forget()
        self.steps += self.is_measured
        self.is_measured = self.is_stepping = False
        self.value = self.gradients = None
        self.evaluations, self.is_evaluated = 0, False
