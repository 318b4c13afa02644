"""The base optimizers over which the contract of the wrapper is tested."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT

from ghopt import HarmonizedOptimizer
from tests import models
from tests.models import Tasks

Base: TypeAlias = Callable[[ParamsT], Optimizer]
"""From parameters, named parameters or groups to an optimizer."""

BASES: dict[str, Base] = {
    "SGD": partial(SGD, lr=0.05),
    "SGD momentum": partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
    "SGD foreach": partial(SGD, lr=0.05, momentum=0.9, foreach=True),
    "SGD fused": partial(SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam amsgrad": partial(optim.Adam, lr=0.01, amsgrad=True),
    # A tensor for each optimizer: schedulers write into it.
    "Adam tensor lr": lambda params: optim.Adam(
        params, lr=torch.tensor(0.01, dtype=torch.float64)
    ),
    "AdamW": partial(optim.AdamW, lr=0.01, weight_decay=0.1),
    "AdamW fused": partial(optim.AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "Adagrad": partial(optim.Adagrad, lr=0.05),
    "RMSprop": partial(optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "NAdam": partial(optim.NAdam, lr=0.01),
    "RAdam": partial(optim.RAdam, lr=0.01),
    "Adadelta": partial(optim.Adadelta, lr=0.5),
    "Adamax": partial(optim.Adamax, lr=0.01),
    "ASGD": partial(optim.ASGD, lr=0.05, t0=2),  # averages from the third step on
    "Rprop": partial(optim.Rprop, lr=0.01),
    "Adafactor": partial(optim.Adafactor, lr=0.01),
}

every_base = pytest.mark.parametrize("base", BASES.values(), ids=[*BASES])

# Apart, since they need a closure and sparse gradients. `sam` below is the third.
LBFGS: Base = partial(optim.LBFGS, lr=0.5, max_iter=5)
SparseAdam: Base = partial(optim.SparseAdam, lr=0.01)


class SAM(Optimizer):
    """Sharpness-aware minimisation: a base optimizer steps on the gradient uphill.

    In the form in which it is usually found (github.com/davda54/sam): ``step`` needs a
    gradient in ``.grad`` and a closure that makes another.

    Args:
        params: as for every optimizer.
        base: makes the optimizer that steps, from the groups of this one.
        rho: length of the move uphill.
    """

    def __init__(
        self,
        params: ParamsT,
        base: Callable[[list[dict[str, Any]]], Optimizer],
        rho: float = 0.05,
    ) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)
        self.defaults.update(self.base_optimizer.defaults)
        self.moves: dict[Tensor, Tensor] = {}
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @torch.no_grad()
    def first_step(self) -> None:
        """Move uphill, and clear the gradients."""
        groups = [
            (group["rho"], [p for p in group["params"] if p.grad is not None])
            for group in self.param_groups
        ]
        grads = [p.grad for _, params in groups for p in params]
        norm = torch.nn.utils.get_total_norm(grads) + 1e-12
        for rho, params in groups:
            for p in params:
                self.moves[p] = p.grad * (rho / norm)
                p.add_(self.moves[p])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Go back, and step on the gradients from uphill."""
        for p, move in self.moves.items():
            p.sub_(move)
        self.moves.clear()
        self.base_optimizer.step()

    def step(  # type: ignore[override]  # the closure is needed, as in the original
        self, closure: Callable[[], float]
    ) -> float:
        """Take both steps; ``closure`` makes the gradients of the second."""
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the base."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        """Keep the base optimizer too, which torch would leave behind."""
        return self.__dict__


def sam(params: ParamsT) -> SAM:
    return SAM(params, partial(SGD, lr=0.05, momentum=0.9))


def rows(tasks: int) -> Tasks:
    """Build a network of an embedding alone, whose gradients are sparse."""
    trunk = models.Embedding()
    trunk.table.sparse = True
    return Tasks(trunk, [nn.Identity() for _ in range(tasks)])


Case: TypeAlias = tuple[Base, Callable[[int], Tasks]]

# The table and the special ones, each with a network that it can train.
CASES: dict[str, Case] = {
    **{name: (base, models.heads_on_a_trunk) for name, base in BASES.items()},
    "LBFGS": (LBFGS, models.heads_on_a_trunk),
    "SAM": (sam, models.heads_on_a_trunk),
    "SparseAdam": (SparseAdam, rows),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])


def bare(case: Case, tasks: int = 1) -> tuple[Tasks, Optimizer]:
    base, network = case
    model = models.make(network, tasks)
    return model, base(model.parameters())


def wrapped(case: Case, tasks: int = 1) -> tuple[Tasks, HarmonizedOptimizer]:
    model, base = bare(case, tasks)
    return model, HarmonizedOptimizer(base)


def wants_closure(optimizer: Optimizer) -> bool:
    if isinstance(optimizer, HarmonizedOptimizer):
        optimizer = optimizer.base_optimizer
    return isinstance(optimizer, (SAM, optim.LBFGS))


def gradients(model: Tasks, optimizer: Optimizer, seed: int, tasks: int = 1) -> float:
    """Make those of one batch, harmonized or of the sum; give the sum of the losses."""
    optimizer.zero_grad()
    losses = model(*models.batch(tasks, seed))
    total = torch.stack(losses).sum()
    if isinstance(optimizer, HarmonizedOptimizer):
        optimizer.backward(losses)
    else:
        total.backward()  # type: ignore[no-untyped-call]  # torch's
    return total.item()


def train(
    model: Tasks, optimizer: Optimizer, seeds: Iterable[int], tasks: int = 1
) -> None:
    """Step once for each seed of a batch, in the form that the base asks for."""
    for seed in seeds:
        closure = partial(gradients, model, optimizer, seed, tasks)
        closure()
        if wants_closure(optimizer):
            optimizer.step(closure)
        else:
            optimizer.step()
