"""Micro-batches: with ``accumulate_only`` they are one batch, or leave nothing."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer
from tests import models
from tests.bases import Base, every_base
from tests.literal import grads, literal_gradients, literal_update, weights_of
from tests.models import Tasks

Batch = tuple[Tensor, Tensor]
Rows = list[list[float] | None]

networks = pytest.mark.parametrize(
    # A batch norm sees another batch in every micro-batch.
    "network",
    [network for network in models.NETWORKS if network is not models.batch_norm],
)
scopes = pytest.mark.parametrize("trunk_alone", [False, True], ids=["all", "trunk"])


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def wrap(model: Tasks, *, trunk_alone: bool = False) -> HarmonizedOptimizer:
    shared = trained(model.trunk) if trunk_alone else None
    return HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), shared_params=shared)


def step_input(tasks: int = 2) -> tuple[Tasks, HarmonizedOptimizer, list[Tensor]]:
    model = models.make(models.heads_on_a_trunk, tasks)
    return model, wrap(model), model(*models.batch(tasks))


def parts_of(model: Tasks, data: Batch, sizes: list[int]) -> Iterator[list[Tensor]]:
    """Give the losses of each part of a batch, so weighted that they add up to it."""
    inputs, targets = data
    parts = torch.split(inputs, sizes), torch.split(targets, sizes, dim=1)
    for part in zip(*parts, strict=True):
        yield [loss * (len(part[0]) / len(inputs)) for loss in model(*part)]


def accumulate(
    optimizer: HarmonizedOptimizer, model: Tasks, data: Batch, sizes: list[int]
) -> None:
    """Run ``backward`` on each part of a batch, and harmonize with the last."""
    for index, losses in enumerate(parts_of(model, data, sizes)):
        optimizer.backward(losses, accumulate_only=index < len(sizes) - 1)


def plain_backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]  # torch's


def linear(parameters: list[nn.Parameter], rows: Rows) -> Tensor:
    """Give a loss whose gradients are these rows, and which reaches no others."""
    terms = [
        p @ torch.tensor(row, dtype=p.dtype)
        for p, row in zip(parameters, rows, strict=True)
        if row is not None
    ]
    return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)


# As one batch


@networks
@scopes
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [[12, 12], [5, 1, 18]], ids=str)
def test_micro_batches_train_as_the_full_batch(
    network: Callable[[int], Tasks], tasks: int, trunk_alone: bool, sizes: list[int]
) -> None:
    whole, parts = models.make(network, tasks), models.make(network, tasks)
    full = wrap(whole, trunk_alone=trunk_alone)
    split = wrap(parts, trunk_alone=trunk_alone)
    for seed in range(3):
        data = models.batch(tasks, seed, size=24)
        full.zero_grad()
        full.backward(whole(*data))
        split.zero_grad()
        accumulate(split, parts, data, sizes)
        assert_close(grads(parts), grads(whole), rtol=1e-12, atol=1e-12)
        full.step()
        split.step()
    assert_close(weights_of(parts), weights_of(whole), rtol=1e-12, atol=1e-12)


@every_base
def test_micro_batches_of_one_task_equal_plain_accumulation(base: Base) -> None:
    plain, ours = (models.make(models.heads_on_a_trunk, 1) for _ in range(2))
    literal = base(plain.parameters())
    optimizer = HarmonizedOptimizer(base(ours.parameters()))
    for seed in range(3):
        data = models.batch(1, seed)
        literal.zero_grad()
        for losses in parts_of(plain, data, [4, 12]):
            plain_backward(losses[0])
        literal.step()
        optimizer.zero_grad()
        accumulate(optimizer, ours, data, [4, 12])
        optimizer.step()
    assert_close(weights_of(ours), weights_of(plain), rtol=0, atol=0)


def test_harmonizing_every_micro_batch_is_another_algorithm() -> None:
    whole, optimizer, losses = step_input()
    optimizer.backward(losses)
    parts = models.make(models.heads_on_a_trunk, 2)
    optimizer = wrap(parts)
    for losses in parts_of(parts, models.batch(2), [8, 8]):
        optimizer.backward(losses)
    # So a comparison of the two can tell one from the other.
    with pytest.raises(AssertionError):
        assert_close(grads(parts), grads(whole), rtol=1e-2, atol=1e-2)


def test_last_tells_of_the_whole_batch_and_not_before_its_end() -> None:
    model, optimizer, losses = step_input(3)
    jacobian = literal_gradients(losses, list(model.parameters()))
    first, second = parts_of(model, models.batch(3), [4, 12])
    optimizer.backward(first, accumulate_only=True)
    assert optimizer.last is None
    optimizer.backward(second)
    assert optimizer.last is not None
    assert_close(optimizer.last.gramian, jacobian @ jacobian.T)


def test_the_last_micro_batch_may_run_in_the_closure_of_step() -> None:
    """As in Lightning, whose closure is that of the last micro-batch."""
    inputs, targets = models.batch(2)
    whole, parts = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    optimizer = HarmonizedOptimizer(SGD(whole.parameters(), lr=0.1))
    optimizer.step(losses=whole(inputs, targets))

    accumulating = HarmonizedOptimizer(SGD(parts.parameters(), lr=0.1))
    halves = [
        [loss / 2 for loss in parts(inputs[half::2], targets[:, half::2])]
        for half in range(2)
    ]
    accumulating.backward(halves[0], accumulate_only=True)

    def closure() -> float:
        accumulating.backward(halves[1])
        return 1.5

    accumulating.step(closure)
    assert_close(weights_of(parts), weights_of(whole), rtol=1e-12, atol=1e-12)


def test_tasks_are_matched_by_name_and_not_by_order() -> None:
    whole, optimizer, (a, b) = step_input()
    optimizer.backward({"a": a, "b": b})
    parts = models.make(models.heads_on_a_trunk, 2)
    optimizer = wrap(parts)
    first, second = parts_of(parts, models.batch(2), [8, 8])
    optimizer.backward({"b": first[1], "a": first[0]}, accumulate_only=True)
    optimizer.backward({"a": second[0], "b": second[1]})
    assert_close(grads(parts), grads(whole), rtol=1e-12, atol=1e-12)


ROW, OTHER, AGAINST = [1.0, 2.0], [0.5, -1.0], [-3.0, 0.25]


@pytest.mark.parametrize(
    "batches",
    # Of every micro-batch, of every task: the gradient of each of three parameters.
    [
        [
            [[ROW, OTHER, None], [AGAINST, ROW, None]],
            [[OTHER, None, None], [OTHER, AGAINST, None]],
        ],
        [
            [[ROW, None, None], [AGAINST, None, None]],
            [[None, ROW, None], [None, AGAINST, OTHER]],
        ],
        [
            [[ROW, OTHER, None], [None, None, None]],
            [[AGAINST, None, None], [AGAINST, AGAINST, AGAINST]],
            [[None, None, None], [None, None, ROW]],
        ],
    ],
    ids=["one task", "other parameters", "a loss without grad"],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_task_may_reach_a_parameter_in_one_micro_batch_only(
    batches: list[list[Rows]], backwards: bool
) -> None:
    parameters = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
    optimizer = HarmonizedOptimizer(SGD(parameters, lr=0.1))
    batches = batches[::-1] if backwards else batches
    jacobian = torch.zeros(2, 6, dtype=torch.float64)
    for number, batch in enumerate(batches, 1):
        losses = [linear(parameters, rows) for rows in batch]
        optimizer.backward(losses, accumulate_only=number < len(batches))
        dense = [[row or [0.0, 0.0] for row in rows] for rows in batch]
        jacobian += torch.tensor(dense, dtype=torch.float64).flatten(1)
    for index, expected in enumerate(literal_update(jacobian).split(2)):  # type: ignore[no-untyped-call]  # torch's
        reached = any(rows[index] for batch in batches for rows in batch)
        actual = parameters[index].grad
        assert_close(actual, expected if reached else None, rtol=1e-12, atol=1e-12)


# Together with other gradients


@scopes
@pytest.mark.parametrize("when", [0, 1, 2], ids=["before", "between", "after"])
def test_a_plain_backward_adds_up_with_an_accumulation(
    when: int, trunk_alone: bool
) -> None:
    whole = models.make(models.heads_on_a_trunk, 2)
    optimizer = wrap(whole, trunk_alone=trunk_alone)
    optimizer.backward(whole(*models.batch(2)))
    penalties = [p.square().sum() for p in whole.parameters()]
    plain_backward(torch.stack(penalties).sum())
    parts = models.make(models.heads_on_a_trunk, 2)
    optimizer = wrap(parts, trunk_alone=trunk_alone)
    batches = [*parts_of(parts, models.batch(2), [4, 12])]
    for index in range(3):
        if index == when:
            penalties = [p.square().sum() for p in parts.parameters()]
            plain_backward(torch.stack(penalties).sum())
        if index < 2:
            optimizer.backward(batches[index], accumulate_only=index == 0)
    assert_close(grads(parts), grads(whole), rtol=1e-12, atol=1e-12)


@scopes
@pytest.mark.parametrize("prior", [False, True])
def test_accumulate_only_leaves_grad_alone(prior: bool, trunk_alone: bool) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = wrap(model, trunk_alone=trunk_alone)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if prior else None
    before = grads(model)
    optimizer.backward(model(*models.batch(2)), accumulate_only=True)
    assert all(a is b for a, b in zip(grads(model), before, strict=True))
    assert all(grad.eq(0.5).all() for grad in grads(model) if grad is not None)


@pytest.mark.parametrize("frozen", [0, 1], ids=["unfrozen", "frozen"])
def test_freezing_between_micro_batches_keeps_what_was_collected(frozen: int) -> None:
    plain, ours = (models.make(models.heads_on_a_trunk, 1) for _ in range(2))
    optimizer = wrap(ours)
    for model in plain, ours:
        bias = model.trunk[0].bias  # type: ignore[index]  # Sequential
        for index in range(2):
            bias.requires_grad_(index != frozen)
            losses = [*parts_of(model, models.batch(1), [4, 12])][index]
            if model is plain:
                plain_backward(losses[0])
            else:
                optimizer.backward(losses, accumulate_only=index == 0)
        assert bias.grad is not None
    assert_close(grads(ours), grads(plain), rtol=0, atol=0)


# Nothing is left behind

FORGET: dict[str, Callable[[HarmonizedOptimizer], object]] = {
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "zero_grad to zeros": lambda optimizer: optimizer.zero_grad(set_to_none=False),
    "load": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "copy": lambda _: None,
}


@scopes
@pytest.mark.parametrize("how", [*FORGET])
@pytest.mark.parametrize("after", [1, 2])
def test_an_abandoned_accumulation_is_forgotten(
    how: str, after: int, trunk_alone: bool
) -> None:
    fresh, used = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    expected = wrap(fresh, trunk_alone=trunk_alone)
    optimizer = wrap(used, trunk_alone=trunk_alone)
    for seed in range(after):
        losses = [7 * loss for loss in used(*models.batch(2, seed))]
        optimizer.backward(losses, accumulate_only=True)
    if how == "copy":
        used, optimizer = copy.deepcopy((used, optimizer))
    FORGET[how](optimizer)
    for model, each in (fresh, expected), (used, optimizer):
        accumulate(each, model, models.batch(2), [4, 12])
    assert_close(grads(used), grads(fresh), rtol=0, atol=0)


def test_step_with_losses_forgets_a_started_accumulation() -> None:
    fresh, expected, losses = step_input()
    expected.step(losses=losses)
    used, optimizer, losses = step_input()
    optimizer.backward(losses, accumulate_only=True, retain_graph=True)
    optimizer.step(losses=losses)
    assert_close(weights_of(used), weights_of(fresh), rtol=0, atol=0)


def test_a_copy_in_the_middle_does_not_end_the_accumulation() -> None:
    whole, parts = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    wrap(whole).backward(whole(*models.batch(2)))
    optimizer = wrap(parts)
    first, second = parts_of(parts, models.batch(2), [4, 12])
    optimizer.backward(first, accumulate_only=True)
    copy.deepcopy(optimizer)
    optimizer.state_dict()
    optimizer.backward(second)
    assert_close(grads(parts), grads(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clear", ["model", "optimizer", "optimizer to zeros"])
def test_it_does_not_matter_whose_zero_grad_a_loop_calls(clear: str) -> None:
    whole, parts = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    full, split = wrap(whole), wrap(parts)
    for seed in range(4):
        data = models.batch(2, seed)
        full.step(losses=whole(*data))
        accumulate(split, parts, data, [4, 12])
        split.step()
        if clear == "model":
            parts.zero_grad()
        else:
            split.zero_grad(set_to_none=clear == "optimizer")
    assert_close(weights_of(parts), weights_of(whole), rtol=1e-12, atol=1e-12)


def test_a_step_that_is_skipped_leaves_nothing_behind() -> None:
    fresh, expected, losses = step_input()
    expected.backward(losses)
    used, optimizer, _ = step_input()
    accumulate(optimizer, used, models.batch(2, 1), [4, 12])
    used.zero_grad()  # in place of step, as after an overflow
    accumulate(optimizer, used, models.batch(2), [16])
    assert_close(grads(used), grads(fresh), rtol=0, atol=0)


class Failure(Exception):
    """Raised in a pass."""


@scopes
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_after_a_failure_in_any_pass_of_any_micro_batch_all_begins_anew(
    batch: int, failing: int, trunk_alone: bool
) -> None:
    fresh, used = (models.make(models.heads_on_a_trunk, 3) for _ in range(2))
    wrap(fresh, trunk_alone=trunk_alone).backward(fresh(*models.batch(3)))
    optimizer = wrap(used, trunk_alone=trunk_alone)
    batches = [*parts_of(used, models.batch(3, 1), [4, 4, 8])]
    for losses in batches[:batch]:
        optimizer.backward(losses, accumulate_only=True)
    batches[batch][failing].register_hook(fail)  # type: ignore[no-untyped-call]  # torch's
    with pytest.raises(Failure):
        optimizer.backward(batches[batch], accumulate_only=batch < 2)
    assert grads(used) == [None] * 8
    optimizer.backward(used(*models.batch(3)))
    assert_close(grads(used), grads(fresh), rtol=0, atol=0)


def fail(_: Tensor) -> None:
    raise Failure
