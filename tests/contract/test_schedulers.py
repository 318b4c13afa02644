"""Schedulers and averaging do with the wrapper what they do with its base."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR, AveragedModel
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer
from tests import models
from tests.bases import BASES, CASES, Base, Case, bare, every_case, train, wrapped
from tests.models import Tasks

assert_equal = partial(assert_close, rtol=0, atol=0)
Make: TypeAlias = Callable[[Optimizer], LRScheduler]


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    """Cycle the momentum as well, where the defaults hold one."""
    cycles = bool({"momentum", "betas"} & optimizer.defaults.keys())
    return OneCycleLR(optimizer, 0.5, total_steps=12, cycle_momentum=cycles)


def chained(optimizer: Optimizer) -> ChainedScheduler:
    parts = [LinearLR(optimizer, total_iters=4), ExponentialLR(optimizer, 0.8)]
    return ChainedScheduler(parts)


def sequential(optimizer: Optimizer) -> SequentialLR:
    parts = [LinearLR(optimizer, total_iters=4), ExponentialLR(optimizer, 0.8)]
    return SequentialLR(optimizer, parts, milestones=[4])


SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(
        optimizer, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]
    ),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(
        optimizer, lambda _: 0.9
    ),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[2, 5]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=3),
    "LinearLR": LinearLR,
    "ExponentialLR": partial(ExponentialLR, gamma=0.8),
    "SequentialLR": sequential,
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, power=2),
    "CosineAnnealingLR": partial(CosineAnnealingLR, T_max=5),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": partial(ReduceLROnPlateau, patience=1),
    "CyclicLR": partial(CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": partial(CosineAnnealingWarmRestarts, T_0=3),
    "OneCycleLR": one_cycle,
    "SWALR": partial(SWALR, swa_lr=0.005, anneal_epochs=4),
}

# What torch 2.8 says of its own SequentialLR.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter")
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)
attached_to = pytest.mark.parametrize("target", ["wrapper", "base"])


def in_two_groups(base: Base) -> Base:
    """Give the first parameter a group and a learning rate of its own."""

    def make(params: Any) -> Optimizer:
        first, *rest = params
        optimizer = base([{"params": [first]}, {"params": rest}])
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] / 2
        return optimizer

    return make


def advance(scheduler: LRScheduler) -> None:
    """Step a scheduler; on a plateau, if it looks for one."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def trace(model: Tasks, optimizer: Optimizer, *schedulers: LRScheduler) -> list[Any]:
    """Train, reload in the middle, and note the groups after each step."""
    groups = []
    for seed in range(10):
        train(model, optimizer, [seed])
        for scheduler in schedulers:
            advance(scheduler)
        if seed == 4:  # replaces the groups and their state
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        groups.append(copy.deepcopy(optimizer.state_dict()["param_groups"]))
    return groups


def chosen(optimizer: HarmonizedOptimizer, target: str) -> Optimizer:
    return optimizer if target == "wrapper" else optimizer.base_optimizer


def assert_scheduled_alike(case: Case, makes: list[Make], targets: list[str]) -> None:
    expected, plain = bare(case)
    groups = trace(expected, plain, *(make(plain) for make in makes))
    rates = {float(step[-1]["lr"]) for step in groups}
    assert len(rates) > 1
    actual, optimizer = wrapped(case)
    schedulers = [
        make(chosen(optimizer, target))
        for make, target in zip(makes, targets, strict=True)
    ]
    assert_equal(trace(actual, optimizer, *schedulers), groups)
    assert_equal(actual.state_dict(), expected.state_dict())
    # Read from the groups, not from the scheduler: those are what the base sees.
    last = [group["lr"] for group in optimizer.base_optimizer.param_groups]
    assert_equal(schedulers[-1].get_last_lr(), last)


def test_the_table_holds_every_scheduler_of_torch() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, LRScheduler)
    }
    # The last two are the base class, under its name of today and of old.
    assert found == {*SCHEDULERS, "LRScheduler", "_LRScheduler"}


@attached_to
@every_scheduler
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW", "Adam tensor lr"])
def test_every_scheduler_gives_the_rates_and_weights_of_the_bare_base(
    base: str, name: str, target: str
) -> None:
    case = in_two_groups(BASES[base]), models.heads_on_a_trunk
    assert_scheduled_alike(case, [SCHEDULERS[name]], [target])


@attached_to
@every_case
def test_every_base_follows_a_scheduler_as_without_the_wrapper(
    case: Case, target: str
) -> None:
    assert_scheduled_alike(case, [one_cycle], [target])


@pytest.mark.parametrize(
    "targets",
    [
        ["wrapper", "wrapper"],
        ["wrapper", "base"],
        ["base", "wrapper"],
    ],
)
def test_two_schedulers_work_together_wherever_they_are_attached(
    targets: list[str],
) -> None:
    makes = [SCHEDULERS["ExponentialLR"], SCHEDULERS["StepLR"]]
    assert_scheduled_alike(CASES["AdamW"], makes, targets)


def warned(optimizer: Optimizer, name: str) -> list[str]:
    """Step a scheduler before its optimizer; give the warnings."""
    scheduler = SCHEDULERS[name](optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        advance(scheduler)
    return [str(warning.message) for warning in caught]


@attached_to
@every_scheduler
def test_a_scheduler_that_steps_first_is_warned_about_as_with_the_base(
    name: str, target: str
) -> None:
    case = in_two_groups(BASES["AdamW"]), models.heads_on_a_trunk
    expected = warned(bare(case)[1], name)
    assert warned(chosen(wrapped(case)[1], target), name) == expected
    # torch does not look in those.
    silent = name in (
        "ReduceLROnPlateau",
        "SequentialLR",
        "CosineAnnealingWarmRestarts",
    )
    assert silent or "`lr_scheduler.step()` before `optimizer.step()`" in expected[0]


@attached_to
def test_every_form_of_step_survives_a_scheduler(target: str) -> None:
    expected, plain = wrapped(CASES["AdamW"], tasks=2)
    actual, optimizer = wrapped(CASES["AdamW"], tasks=2)
    scheduler = SCHEDULERS["LinearLR"](chosen(optimizer, target))
    with_scheduler = SCHEDULERS["LinearLR"](plain)
    train(expected, plain, range(3), tasks=2)
    optimizer.step(losses=actual(*models.batch(2, 0)))
    optimizer.step(lambda: actual(*models.batch(2, 1)))

    def closure() -> float:
        optimizer.zero_grad()
        optimizer.backward(actual(*models.batch(2, 2)))
        return 1.0

    assert optimizer.step(closure=closure) is not None
    scheduler.step()
    with_scheduler.step()
    assert_equal(actual.state_dict(), expected.state_dict())
    assert_equal(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_a_scheduler_can_be_copied_with_the_wrapper_in_it(
    copied: Callable[[Any], Any],
) -> None:
    model, optimizer = wrapped(CASES["AdamW"])
    scheduler = SCHEDULERS["LinearLR"](optimizer)
    train(model, optimizer, range(1))
    advance(scheduler)
    again, other, copied_scheduler = copied((model, optimizer, scheduler))
    for m, o, s in (
        (model, optimizer, scheduler),
        (again, other, copied_scheduler),
    ):
        train(m, o, range(1, 2))
        advance(s)
    assert copied_scheduler.optimizer is other
    assert_equal(other.state_dict(), optimizer.state_dict())
    assert_equal(again.state_dict(), model.state_dict())


@attached_to
@every_scheduler
def test_a_schedule_resumed_with_the_wrapper_goes_on_as_without_interruption(
    name: str, target: str
) -> None:
    case = in_two_groups(BASES["AdamW"]), models.heads_on_a_trunk
    (expected, whole), (actual, resumed) = wrapped(case), wrapped(case)
    goes_on = SCHEDULERS[name](chosen(whole, target))
    restarts = SCHEDULERS[name](chosen(resumed, target))
    for seed in range(3):
        train(expected, whole, [seed])
        advance(goes_on)
    restarts.load_state_dict(copy.deepcopy(goes_on.state_dict()))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    actual.load_state_dict(expected.state_dict())
    for seed in range(3, 6):
        train(expected, whole, [seed])
        advance(goes_on)
        train(actual, resumed, [seed])
        advance(restarts)
    assert_equal(actual.state_dict(), expected.state_dict())
    assert_equal(resumed.state_dict(), whole.state_dict())


# Averaging

AVERAGES: dict[str, Callable[..., AveragedModel]] = {
    "plain": AveragedModel,
    "SWA": lambda model: AveragedModel(
        model,
        multi_avg_fn=swa_utils.get_swa_multi_avg_fn(),  # type: ignore[no-untyped-call]  # torch's
    ),
    "EMA": lambda model: AveragedModel(
        model,
        multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9),  # type: ignore[no-untyped-call]  # torch's
    ),
    "EMA one by one, with buffers": lambda model: AveragedModel(
        model,
        avg_fn=swa_utils.get_ema_avg_fn(0.9),  # type: ignore[no-untyped-call]  # torch's
        use_buffers=True,
    ),
}


@attached_to
@pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=[*AVERAGES])
def test_averages_of_the_weights_are_those_of_the_bare_base(
    average: Callable[..., AveragedModel], base: str, target: str
) -> None:
    case = BASES[base], models.batch_norm
    expected, plain = bare(case)
    actual, optimizer = wrapped(case)
    averaged_expected = averaged(expected, plain, plain, average)
    averaged_actual = averaged(actual, optimizer, chosen(optimizer, target), average)
    assert_equal(averaged_actual, averaged_expected)
    weight = "module.0.weight"
    assert not torch.equal(averaged_actual[weight], actual.trunk[0].weight)  # type: ignore[index]  # Sequential
    assert_equal(actual.state_dict(), expected.state_dict())


def averaged(
    model: Tasks,
    optimizer: Optimizer,
    scheduled: Optimizer,
    average: Callable[..., AveragedModel],
) -> dict[str, Any]:
    """Train as the documentation of SWA does, to the statistics of the batch norm."""
    mean = average(model.trunk)
    scheduler = SWALR(scheduled, swa_lr=0.02, anneal_epochs=3)
    for seed in range(6):
        train(model, optimizer, [seed])
        mean.update_parameters(model.trunk)
        scheduler.step()
    swa_utils.update_bn([models.batch(1, seed)[0] for seed in range(3)], mean)
    return mean.state_dict()
