"""What a problem is to the rest of the benchmark, and what several of them use."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Batch: TypeAlias = tuple[Tensor, ...]
"""What a step trains on; what is in it is the problem's own affair."""


class Metric(NamedTuple):
    """One number that the evaluation gives.

    Attributes:
        name: the key in what ``Training.evaluate`` returns, and the title.
        form: format of the number.
        more_is_better: whether it is a merit, not an error.
        headline: whether it is compared with the sum. The others are shown apart.
    """

    name: str
    form: str = ".1f"
    more_is_better: bool = True
    headline: bool = True


class Training(NamedTuple):
    """One start of a problem. A seed alone decides everything that is in it.

    Attributes:
        model: holds all parameters.
        optimizer: of all parameters; not harmonized.
        shared: the parameters on which tasks can conflict; the others get the sum.
        batches: without end.
        losses: of one batch by the name of the task, with graphs; may draw.
        evaluate: gives every metric by name; leaves the model as it is.
    """

    model: nn.Module
    optimizer: Optimizer
    shared: list[nn.Parameter]
    batches: Iterator[Batch]
    losses: Callable[[Batch], dict[str, Tensor]]
    evaluate: Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Problem:
    """A training with several losses.

    Attributes:
        name: for the command line.
        title: what it is, in a line.
        tasks: names of the losses.
        metrics: what the evaluation gives.
        steps: of a full run.
        start: gives the training of a seed.
        weighted: tasks whose losses a loss weight multiplies, where one is tuned.
        main: the task that the others must not harm, if there is one.
        needs: packages that it imports when it starts.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    metrics: tuple[Metric, ...]
    steps: int
    start: Callable[[int], Training]
    weighted: tuple[str, ...] = ()
    main: str | None = None
    needs: tuple[str, ...] = ()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the rows of ``[n, classes]`` whose maximum is right, in percent."""
    return 100 * float((logits.argmax(1) == labels).double().mean())


def generator(seed: int, purpose: int = 0) -> torch.Generator:
    """Make a generator of a seed that no other purpose of this seed draws from."""
    return torch.Generator().manual_seed(1_000_003 * seed + purpose)
