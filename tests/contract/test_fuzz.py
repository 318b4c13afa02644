"""A wrapper and a literal model of it, side by side through random calls.

The model takes its promises from the docstrings and shares no code with ghopt: dense
vectors, one formula of the paper for each rule, and the plain optimizer of torch.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, gh, ghpp, ghpp_printed
from ghopt.geometry import Weighting
from ghopt.harmonize import Passes
from tests import models
from tests.models import Tasks
from tests.versions import needs

Groups = list[dict[str, list[nn.Parameter]]]
Tensors = dict[str, Tensor | None]
Gradients = dict[str, dict[str, Tensor]]
"""By task and by name of the parameter."""

# With the default of 1e-8 (1e-10) for eps a rounding error of 1e-16 in a gradient that
# should be zero would be magnified to 1e-8 (1e-6) of a step.
BASES: dict[str, Callable[[Groups], Optimizer]] = {
    "SGD": lambda groups: SGD(groups, lr=0.02, momentum=0.9),
    "AdamW": lambda groups: AdamW(groups, lr=0.02, weight_decay=0.1, eps=1e-6),
    "Adagrad": lambda groups: Adagrad(groups, lr=0.02, eps=1e-6),
}
SHARED = ("trunk.0.weight", "trunk.0.bias")
LATE = (("trunk.2.bias",), ("heads.2.weight", "heads.2.bias"))
"""Groups of parameters that the losses reach, but that join the optimizer later."""


# A random training may well begin with a plain backward pass.
pytestmark = [
    pytest.mark.filterwarnings("ignore:step.. found gradients, but backward"),
    pytest.mark.usefixtures("never_separate"),
]


class Failure(Exception):
    """Raised in the middle of a call, by a pass or by the weighting."""


def network() -> Tasks:
    """Build a trunk that uses one matrix twice, three heads and an unused parameter."""
    model = models.make(models.tied_weights, 3)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.register_parameter("unused", unused)
    return model


NAMES = [name for name, _ in network().named_parameters()]


@dataclass(frozen=True)
class Task:
    """The loss of one head on one batch; ``factor`` 0 stands for one without grad."""

    head: int
    factor: float

    def loss(self, losses: list[Tensor]) -> Tensor:
        chosen = losses[self.head]
        return chosen * self.factor if self.factor else chosen.detach()


@dataclass
class Call:
    """Arguments of one ``backward``, and where it breaks.

    ``breaks``: in this pass or, counted on, in the weighting; None: nowhere.
    """

    tasks: dict[str, Task]
    seed: int
    as_list: bool = False
    accumulate_only: bool = False
    breaks: int | None = None

    def losses(self, model: Tasks) -> dict[str, Tensor]:
        losses = model(*models.batch(3, self.seed))
        return {name: task.loss(losses) for name, task in self.tasks.items()}

    def check(self, model: Tasks) -> None:
        if not any(loss.requires_grad for loss in self.losses(model).values()):
            raise ValueError


# The rules, on dense rows


def theorem_1(first: Tensor, second: Tensor) -> Tensor:
    product = first @ second
    if product >= 0:
        return first + second
    return (first - product / (second @ second) * second) + (
        second - product / (first @ first) * first
    )


def lemma_1(rows: Tensor) -> Tensor:
    """Sum the projections on the dual cone; by Moreau, with nearest points of a cone."""
    jacobian = rows.numpy()
    projected = [row + jacobian.T @ nnls(jacobian.T, -row)[0] for row in jacobian]
    return torch.from_numpy(np.sum(projected, axis=0))


def literal_gh(rows: Tensor) -> Tensor:
    if len(rows) == 1:
        return rows[0]
    return theorem_1(*rows) if len(rows) == 2 else lemma_1(rows)


def angle(first: Tensor, second: Tensor) -> tuple[float, Tensor, Tensor]:
    """Angle from the first to the second, and the axes of their plane."""
    along = first / first.norm()
    across = second - (second @ along) * along
    across = across / across.norm()
    return math.atan2(float(second @ across), float(second @ along)), along, across


def literal_ghpp(rows: Tensor) -> Tensor:
    """Turn both by half of the excess over a right angle, in the plane of the two."""
    if len(rows) == 1 or not rows[0] @ rows[1] < 0:
        return rows.sum(0)
    theta, along, across = angle(*rows)
    half = (theta - math.pi / 2) / 2
    turned = [half, theta - half]
    return torch.stack(
        [
            row.norm() * (math.cos(to) * along + math.sin(to) * across)
            for row, to in zip(rows, turned, strict=True)
        ]
    ).sum(0)


def literal_ghpp_printed(rows: Tensor) -> Tensor:
    """Rescale by eq. 43."""
    if len(rows) == 1 or not rows[0] @ rows[1] < 0:
        return rows.sum(0)
    excess = angle(*rows)[0] - math.pi / 2
    turn = 2 * math.sin(excess / 4)
    return (1 + turn) * rows[0] + (1 - turn) * rows[1]


RULES: dict[Weighting, Callable[[Tensor], Tensor]] = {
    gh: literal_gh,
    ghpp: literal_ghpp,
    ghpp_printed: literal_ghpp_printed,
}
MOST_TASKS: dict[Weighting, int] = {gh: 4, ghpp: 2, ghpp_printed: 2}


def is_degenerate(rows: Tensor) -> bool:
    """Say whether rounding decides: these the machine leaves out.

    Where gradients are opposite, or dependent but for rounding, the rules magnify an
    error of 1e-16 by 1 / the lowest eigenvalue of the cosines; a gradient that is the
    rounding error of a sum points anywhere. An inner product near zero does no harm:
    every rule is continuous there.
    """
    norms = rows.norm(dim=1)
    if ((norms > 0) & (norms < 1e-5)).any():
        return True
    units = rows[norms > 0] / norms[norms > 0, None]
    cosines = units @ units.T
    if cosines.numel() and cosines.min() < -1 + 1e-4:
        return True
    values = torch.linalg.eigvalsh(cosines)
    # An eigenvalue of zero is a task that is there twice.
    return bool(((values > 1e-12) & (values < 1e-4)).any())


def added(pending: Gradients, passes: Gradients, measured: list[str]) -> Gradients:
    """Add the measured gradients of these passes to the pending ones."""
    collected: Gradients = {task: dict(kept) for task, kept in pending.items()}
    for task, gradients in passes.items():
        collected.setdefault(task, {})
        for name in gradients.keys() & measured:
            before = collected[task].get(name, torch.zeros(()))
            collected[task][name] = before + gradients[name]
    return collected


@dataclass
class Literal:
    """The promises of ``HarmonizedOptimizer`` on a network and optimizer of its own."""

    model: Tasks
    base: Optimizer
    rule: Callable[[Tensor], Tensor]
    shared: tuple[str, ...] | None
    pending: Gradients = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    listed: bool = False
    rows: Tensor | None = None
    tasks: tuple[str, ...] = ()

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def own(self) -> list[str]:
        """Name the parameters of the optimizer that are trained or await a gradient."""
        own = {p for group in self.base.param_groups for p in group["params"]}
        waiting = set(self.sums).union(*self.pending.values())
        return [
            name
            for name, p in self.parameters().items()
            if p in own and (p.requires_grad or name in waiting)
        ]

    def measured(self) -> list[str]:
        own = self.own()
        return [name for name in own if self.shared is None or name in self.shared]

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Take the gradient of one loss for all parameters that it reaches."""
        if not loss.requires_grad:
            return {}
        wanted = {name: p for name, p in self.parameters().items() if p.requires_grad}
        found = torch.autograd.grad(
            loss, [*wanted.values()], retain_graph=True, allow_unused=True
        )
        pairs = zip(wanted, found, strict=True)
        return {name: grad for name, grad in pairs if grad is not None}

    def add(self, name: str, gradient: Tensor) -> None:
        p = self.parameters()[name]
        p.grad = gradient.clone() if p.grad is None else p.grad + gradient

    def dense(self, collected: Gradients, measured: list[str]) -> Tensor:
        """Stack the gradients of the tasks as rows, zeros where there is none."""
        zeros = {name: torch.zeros_like(p) for name, p in self.parameters().items()}
        rows = [
            [task.get(name, zeros[name]).reshape(-1) for name in measured]
            for task in collected.values()
        ]
        return torch.stack([torch.cat([*row, torch.zeros(0)]) for row in rows])

    def is_degenerate(self, call: Call, *, alone: bool = False) -> bool:
        """Say so of the tasks, ``alone`` without what is pending."""
        losses = call.losses(self.model).items()
        passes = {name: self.gradients(loss) for name, loss in losses}
        measured = self.measured()
        rows = added({} if alone else self.pending, passes, measured)
        return is_degenerate(self.dense(rows, measured))

    def weighs_nothing(self) -> bool:
        """Say whether there is nothing to measure, and no accumulation that was."""
        parameters = self.parameters()
        frozen = not any(parameters[name].requires_grad for name in self.measured())
        return frozen and all("sum" in task for task in self.pending)

    def backward(self, call: Call) -> None:
        losses = call.losses(self.model)
        if weighs_nothing := self.weighs_nothing():
            call.check(self.model)
            losses = {f"weighted sum of {sorted(losses)}": sum_of(losses)}
        # Tasks with names may come and go.
        listed = call.as_list or self.listed or any("sum" in t for t in self.pending)
        if self.pending and self.pending.keys() != losses.keys() and listed:
            raise ValueError
        call.check(self.model)
        losses = {
            task: losses[task]
            for task in dict.fromkeys([*self.pending, *losses])
            if task in losses
        }
        was_listed = self.listed
        own, measured = self.own(), self.measured()
        pending, sums = self.pending, self.sums
        self.drop()
        passes: Gradients = {}
        done = 0
        for task, loss in losses.items():
            if loss.requires_grad and done == call.breaks:
                raise Failure
            passes[task] = self.gradients(loss)
            done += loss.requires_grad
            for name in passes[task].keys() - own:
                self.add(name, passes[task][name])
            for name in passes[task].keys() & set(own) - set(measured):
                sums[name] = sums.get(name, torch.zeros(())) + passes[task][name]
        collected = added(pending, passes, measured)
        if not (weighs_nothing or any(collected.values())):
            raise ValueError
        if call.accumulate_only:
            self.pending, self.sums = collected, sums
            self.listed = was_listed or (call.as_list and not weighs_nothing)
            return
        if weighs_nothing:
            (alone,) = collected.values()
            for name, gradient in alone.items():
                self.add(name, gradient)
        else:
            self.harmonize(collected, measured, fails=call.breaks is not None)
        for name, gradient in sums.items():
            self.add(name, gradient)

    def harmonize(
        self, collected: Gradients, measured: list[str], *, fails: bool
    ) -> None:
        tasks = collected.values()
        reached = [name for name in measured if any(name in task for task in tasks)]
        if fails:
            raise Failure
        rows = self.dense(collected, measured)
        sizes = [self.parameters()[name].numel() for name in measured]
        update = dict(zip(measured, torch.split(self.rule(rows), sizes), strict=True))
        self.rows, self.tasks = rows, tuple(collected)
        for name in reached:
            self.add(name, update[name].view_as(self.parameters()[name]))

    def drop(self) -> None:
        """Drop a started accumulation."""
        self.pending, self.sums, self.listed = {}, {}, False

    def step(self) -> None:
        if self.pending:
            pending, sums, measured = self.pending, self.sums, self.measured()
            if all("sum" in task for task in pending):
                sums = {**sums, **next(iter(pending.values()))}
            else:
                self.harmonize(pending, measured, fails=False)
            for name, gradient in sums.items():
                self.add(name, gradient)
        self.drop()
        self.base.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.drop()
        self.base.zero_grad(set_to_none)


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([*losses.values()]).sum()


# The machine


@dataclass
class Breakable:
    """A weighting that fails on demand."""

    rule: Weighting
    fails: bool = False

    def __call__(self, gramian: Tensor) -> Tensor:
        if self.fails:
            raise Failure
        return self.rule(gramian)


def tensors(model: nn.Module) -> Tensors:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def grads(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters()}


def assert_alike(actual: Tensors, expected: Tensors) -> None:
    """Compare, None included.

    1e-15 of a gradient, times 1e4 where tasks are nearly opposite, and some more for
    the small divisors of Adam and Adagrad and for up to 30 steps.
    """
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def groups_of(model: nn.Module) -> Groups:
    named = dict(model.named_parameters())
    late = [name for names in LATE for name in names]
    heads = [name for name in NAMES if name.startswith("heads") and name not in late]
    others = [name for name in NAMES if name not in [*heads, *late]]
    return [{"params": [named[name] for name in names]} for names in (others, heads)]


def schedule(optimizer: Optimizer) -> ExponentialLR:
    return ExponentialLR(optimizer, gamma=0.9)


FACTORS = (1.0, 1.0, 0.5, 0.01, -0.5, 0.0)
four_tasks = st.tuples(
    *[st.sampled_from([Task(head, by) for head in range(3) for by in FACTORS])] * 4
)
FourTasks = tuple[Task, ...]
seeds = st.integers(0, 3)
counts = st.sampled_from([0, 2, 0, 3, 0, 4, 1])


class Training(RuleBasedStateMachine):
    """``self.optimizer`` under test, ``self.literal`` what is expected of it."""

    @initialize(
        base=st.sampled_from([*BASES]),
        weighting=st.sampled_from([*RULES]),
        shared=st.booleans(),
        scheduled=st.sampled_from(["wrapper", "base"]),
        passes=st.sampled_from(get_args(Passes)),
    )
    def start(
        self,
        base: str,
        weighting: Weighting,
        shared: bool,
        scheduled: str,
        passes: Passes,
    ) -> None:
        self.base, self.scheduled = BASES[base], scheduled
        self.passes = passes
        names = SHARED if shared else None
        self.model, expected = network(), network()
        self.weighting = Breakable(weighting)
        self.literal = Literal(
            expected, self.base(groups_of(expected)), RULES[weighting], names
        )
        self.optimizer = self.wrap(self.base(groups_of(self.model)))
        self.attach()
        self.late = [*LATE] if needs.can_grow(self.base) else []
        self.left: tuple[Tasks, Tensors, Tensors] | None
        self.left = None

    def wrap(self, base: Optimizer) -> HarmonizedOptimizer:
        named, names = dict(self.model.named_parameters()), self.literal.shared
        shared = None if names is None else [named[name] for name in names]
        return HarmonizedOptimizer(
            base, self.weighting, shared_params=shared, passes=self.passes
        )

    def attach(self) -> None:
        """Start a scheduler for each of the two."""
        on_base = self.scheduled == "base"
        optimizer = self.optimizer.base_optimizer if on_base else self.optimizer
        self.scheduler = schedule(optimizer)
        self.expected_scheduler = schedule(self.literal.base)
        self.stepped = False

    def call(self, tasks: FourTasks, seed: int, as_list: bool, count: int) -> Call:
        """Choose ``count`` tasks, or with 0 as many as are being accumulated."""
        most = MOST_TASKS[self.weighting.rule]
        count = count or len(self.literal.pending) or 3
        named = {str(task): tasks[task] for task in range(min(count, most))}
        if not as_list:  # a mapping, in another order: it must be the names that count
            named = dict(reversed(named.items()))
        return Call(named, seed, as_list)

    def backward(self, call: Call) -> None:
        """Call ``backward`` of the wrapper."""
        losses = call.losses(self.model)
        passes = 0

        def run(loss: Tensor, retain_graph: bool) -> None:
            nonlocal passes
            if passes == call.breaks:
                raise Failure
            passes += 1
            loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

        self.weighting.fails = call.breaks is not None
        try:
            self.optimizer.backward(
                list(losses.values()) if call.as_list else losses,
                accumulate_only=call.accumulate_only,
                backward_fn=None if call.breaks is None else run,
            )
        finally:
            self.weighting.fails = False

    def both(self, expected: Callable[[], None], actual: Callable[[], None]) -> None:
        """Do both; where the first raises, the second must raise the same."""
        try:
            expected()
        except (Failure, ValueError) as error:
            with pytest.raises(type(error)):
                actual()
        else:
            actual()

    @rule(
        tasks=four_tasks,
        seed=seeds,
        as_list=st.booleans(),
        count=counts,
        micro_batches=st.sampled_from([0, 0, 1, 2]),
        frozen=st.sampled_from([None, None, "heads.0.bias", *SHARED]),
    )
    def collect(
        self,
        tasks: FourTasks,
        seed: int,
        as_list: bool,
        count: int,
        micro_batches: int,
        frozen: str | None,
    ) -> None:
        for before in range(micro_batches):
            self.accumulate(tasks, seed + 1 + before, not as_list, count)
        if micro_batches and frozen is not None:
            self.freeze(frozen, trained=False)
        call = self.call(tasks, seed, as_list, count)
        if not self.literal.is_degenerate(call):
            self.both(lambda: self.literal.backward(call), lambda: self.backward(call))

    @rule(tasks=four_tasks, seed=seeds, as_list=st.booleans(), count=counts)
    def accumulate(
        self, tasks: FourTasks, seed: int, as_list: bool, count: int
    ) -> None:
        call = self.call(tasks, seed, as_list, count)
        call.accumulate_only = True
        self.both(lambda: self.literal.backward(call), lambda: self.backward(call))

    @rule(tasks=four_tasks, seed=seeds, breaks=st.integers(0, 4), last=st.booleans())
    def fail(self, tasks: FourTasks, seed: int, breaks: int, last: bool) -> None:
        call = self.call(tasks, seed, as_list=True, count=0)
        call.breaks, call.accumulate_only = breaks, not last
        self.both(lambda: self.literal.backward(call), lambda: self.backward(call))

    @rule(
        tasks=four_tasks,
        seed=seeds,
        as_list=st.booleans(),
        count=counts,
        how=st.sampled_from(["losses", "closure", "closure of losses"]),
    )
    def step_on_losses(
        self, tasks: FourTasks, seed: int, as_list: bool, count: int, how: str
    ) -> None:
        if how != "losses":
            self.zero_grad(True)  # or weights that were measured before were held
        call = self.call(tasks, seed, as_list, count)

        def expected() -> None:
            if how != "closure":
                call.check(self.literal.model)  # before zero_grad
            self.literal.zero_grad()
            self.literal.backward(call)
            self.literal.step()
            self.stepped = True

        def evaluate() -> float:
            self.optimizer.zero_grad()
            self.backward(call)
            return 0.5

        def actual() -> None:
            losses = call.losses(self.model)
            if how == "losses":
                self.optimizer.step(losses=losses)
                return
            frozen = self.literal.weighs_nothing()
            closure = evaluate if how == "closure" else lambda: losses
            value = self.optimizer.step(closure)
            last = self.optimizer.last
            ones = torch.ones(4, dtype=torch.float64)
            weights = ones if frozen or last is None else last.weights
            values = torch.stack([loss.detach() for loss in losses.values()])
            assert value == pytest.approx(float(weights[: len(values)] @ values))

        if not self.literal.is_degenerate(call, alone=True):
            self.both(expected, actual)

    @rule()
    def step(self) -> None:
        literal = self.literal
        if literal.pending and is_degenerate(
            literal.dense(literal.pending, literal.measured())
        ):
            return
        literal.step()
        self.optimizer.step()
        self.stepped = True

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.literal.zero_grad(set_to_none)
        self.optimizer.zero_grad(set_to_none)

    @rule(set_to_none=st.booleans())
    def zero_grad_of_the_model(self, set_to_none: bool) -> None:
        """Clear ``.grad`` only: an accumulation goes on."""
        self.literal.model.zero_grad(set_to_none)
        self.model.zero_grad(set_to_none)

    @rule(seed=seeds, head=st.sampled_from([0, 2, None]))
    def plain_backward(self, seed: int, head: int | None) -> None:
        for model in (self.literal.model, self.model):
            unused = dict(model.named_parameters())["unused"]
            losses = model(*models.batch(3, seed))
            loss = unused.square().sum() if head is None else losses[head]
            if loss.requires_grad:
                loss.backward()

    @rule(lr=st.sampled_from([0.01, 0.05]))
    def add_param_group(self, lr: float) -> None:
        if not self.late:
            return
        names = self.late.pop()
        for model, optimizer in (
            (self.literal.model, self.literal.base),
            (self.model, self.optimizer),
        ):
            named = dict(model.named_parameters())
            params = [named[name] for name in names]
            optimizer.add_param_group({"params": params, "lr": lr})

    @rule(name=st.sampled_from(NAMES), trained=st.sampled_from([False, True, True]))
    def freeze(self, name: str, trained: bool) -> None:
        for model in (self.literal.model, self.model):
            dict(model.named_parameters())[name].requires_grad_(trained)

    @precondition(lambda self: self.stepped)  # torch warns of the other order
    @rule()
    def step_scheduler(self) -> None:
        self.expected_scheduler.step()
        self.scheduler.step()

    @rule()
    def load_its_own_state(self) -> None:
        self.literal.base.load_state_dict(copy.deepcopy(self.literal.base.state_dict()))
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.literal.drop()

    @rule(through_plain=st.booleans())
    def resume(self, through_plain: bool) -> None:
        """Go on with new optimizers that load the state of the old ones."""
        state, expected, *schedules = copy.deepcopy(
            [
                self.optimizer.state_dict(),
                self.literal.base.state_dict(),
                self.scheduler.state_dict(),
                self.expected_scheduler.state_dict(),
            ]
        )
        if through_plain:
            plain = self.again(self.optimizer)
            plain.load_state_dict(state)
            state = copy.deepcopy(plain.state_dict())
        self.optimizer = self.wrap(self.again(self.optimizer))
        self.literal.base = self.again(self.literal.base)
        self.attach()
        self.optimizer.load_state_dict(state)
        self.literal.base.load_state_dict(expected)
        self.scheduler.load_state_dict(schedules[0])
        self.expected_scheduler.load_state_dict(schedules[1])
        self.forget()

    def again(self, optimizer: Optimizer) -> Optimizer:
        groups = optimizer.param_groups
        return self.base([{"params": [*group["params"]]} for group in groups])

    def forget(self) -> None:
        """Expect an optimizer that has not been used yet."""
        self.literal.drop()
        self.literal.rows = None

    @rule()
    def go_on_with_a_copy(self) -> None:
        held = {name: copy.deepcopy(grad) for name, grad in grads(self.model).items()}
        self.left = self.model, tensors(self.model), held
        self.model, self.optimizer, self.weighting = copy.deepcopy(
            (self.model, self.optimizer, self.weighting)
        )
        self.literal.model, self.literal.base = copy.deepcopy(
            (self.literal.model, self.literal.base)
        )
        self.attach()
        self.forget()

    @invariant()
    def weights_and_grad_are_as_expected(self) -> None:
        assert_alike(tensors(self.model), tensors(self.literal.model))
        assert_alike(grads(self.model), grads(self.literal.model))

    @invariant()
    def groups_are_those_of_the_base(self) -> None:
        optimizer, expected = self.optimizer, self.literal.base
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        assert optimizer.state is optimizer.base_optimizer.state
        assert optimizer.defaults is optimizer.base_optimizer.defaults
        assert len(optimizer.state) == len(expected.state)
        for group, other in zip(
            optimizer.param_groups, expected.param_groups, strict=True
        ):
            assert group.keys() == other.keys()
            assert group["lr"] == other["lr"]

    @invariant()
    def no_gradient_shares_memory(self) -> None:
        held = [grad for grad in grads(self.model).values() if grad is not None]
        assert not any(grad.requires_grad for grad in held)
        held += self.model.parameters()
        places = {tensor.untyped_storage().data_ptr() for tensor in held}
        assert len(places) == len(held)

    @invariant()
    def last_tells_names_and_gramian(self) -> None:
        last, rows = self.optimizer.last, self.literal.rows
        assert (last is None) == (rows is None)
        if last is not None and rows is not None:
            assert last.names == self.literal.tasks
            assert_close(last.gramian, rows @ rows.T, rtol=1e-7, atol=1e-8)
            assert last.weights.isfinite().all()

    @invariant()
    def what_was_copied_stays_as_it_was(self) -> None:
        if self.left is not None:
            model, *before = self.left
            assert_close([tensors(model), grads(model)], before, rtol=0, atol=0)


DEFAULT = settings.get_profile(settings.get_current_profile_name())
TestTraining = Training.TestCase
TestTraining.settings = settings(
    max_examples=DEFAULT.max_examples * 2 // 3,
    stateful_step_count=30,
    phases=[phase for phase in Phase if phase is not Phase.explain],  # minutes long
)
