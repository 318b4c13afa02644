"""What a task is: one scalar or several, in every micro-batch or in some."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, backward, harmonized_loss, measure
from ghopt.harmonize import Passes
from tests import models
from tests.literal import grads, literal_gradients, literal_update
from tests.models import Tasks

pytestmark = pytest.mark.usefixtures("passes")

NAMES = ("cls", "box", "mask")


def step_input(tasks: int = 4, seed: int = 0) -> tuple[Tasks, list[Tensor]]:
    model = models.make(models.heads_on_a_trunk, tasks)
    return model, model(*models.batch(tasks, seed))


def wrap(model: nn.Module) -> HarmonizedOptimizer:
    return HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))


# Several scalars are one task


FORMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "mapping": lambda ls: {"cls": [ls[0], ls[1]], "box": ls[2], "mask": (ls[3],)},
    "list": lambda ls: [[ls[0], ls[1]], ls[2], ls[3]],
    "iterator": lambda ls: iter([(ls[0], ls[1].reshape(1)), ls[2], [ls[3]]]),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=[*FORMS])
def test_scalars_of_a_group_are_one_task_and_one_pass(
    form: Callable[[list[Tensor]], Any],
) -> None:
    model, losses = step_input()
    literal = [losses[0] + losses[1], losses[2], losses[3]]
    parameters = [*model.parameters()]
    expected = literal_update(literal_gradients(literal, parameters))
    passes = []

    def counted(loss: Tensor, retain_graph: bool) -> None:
        passes.append(loss)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    optimizer = wrap(model)
    optimizer.backward(form(losses), backward_fn=counted)
    assert len(passes) == 3
    assert optimizer.last is not None
    assert len(optimizer.last.names) == 3
    found = torch.cat([g.reshape(-1) for g in grads(model) if g is not None])
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_names_stay_names_and_one_scalar_stays_the_same_tensor() -> None:
    model, losses = step_input()
    seen: list[Tensor] = []
    optimizer = wrap(model)
    given: dict[str, Any] = {"cls": losses[:2], "box": losses[2]}

    def noted(loss: Tensor, retain_graph: bool) -> None:
        seen.append(loss)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    optimizer.backward(given, backward_fn=noted)
    assert optimizer.last is not None
    assert optimizer.last.names == ("cls", "box")
    assert seen[1] is losses[2]


@pytest.mark.parametrize("take", [harmonized_loss, measure])
def test_groups_go_wherever_losses_go(take: Callable[..., Any]) -> None:
    model, losses = step_input()
    parameters = [*model.parameters()]
    grouped = take([losses[:2], losses[2:]], parameters)
    summed = take([losses[0] + losses[1], losses[2] + losses[3]], parameters)
    if isinstance(grouped, Tensor):
        assert_close(grouped, summed)
    else:
        assert_close(grouped.gramian, summed.gramian)
    found = backward([losses[:2], losses[2:]], parameters)
    assert found is not None
    assert len(found.names) == 2


def test_each_scalar_of_a_group_enters_by_its_own_factor() -> None:
    model, losses = step_input()
    optimizer = wrap(model)
    a, b, c, d = losses
    total = (2 * a + 0.5 * b + 3 * c + 0 * d) / 4
    literal = [(2 * a + 0.5 * b) / 4, 3 * c / 4]
    parameters = [*model.parameters()]
    expected = literal_update(literal_gradients(literal, parameters))
    # The scalar with the factor 0 is in a group that goes on without it.
    optimizer.backward({"cls": [a, b], "box": [c, d]}, total=total)
    found = torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1)
            for p in parameters
        ]
    )
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_group_without_a_factor_costs_no_pass() -> None:
    model, losses = step_input()
    a, b, c, _ = losses
    passes = []

    def counted(loss: Tensor, retain_graph: bool) -> None:
        passes.append(loss)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    given: dict[str, Any] = {"cls": [a, b], "box": c}
    wrap(model).backward(given, total=0 * a + 0 * b + c, backward_fn=counted)
    assert len(passes) == 1


def test_a_scalar_of_a_group_that_is_not_in_the_total_is_named() -> None:
    model, losses = step_input()
    given: dict[str, Any] = {"cls": losses[:2], "box": losses[2]}
    with pytest.raises(ValueError, match=r"total must contain losses\['cls'\]"):
        wrap(model).backward(given, total=losses[0] + 1)


def test_losses_of_another_optimizer_are_seen_inside_a_group() -> None:
    model, losses = step_input()
    trunk = HarmonizedOptimizer(SGD(model.trunk.parameters(), lr=0.1))
    heads = HarmonizedOptimizer(SGD(model.heads.parameters(), lr=0.1))
    trunk.backward([losses[:2], losses[2:]], retain_graph=True)
    with pytest.raises(ValueError, match="went through the backward passes of another"):
        heads.backward([losses[:3], losses[3]])


def test_a_closure_may_return_groups() -> None:
    model, _ = step_input()
    optimizer = HarmonizedOptimizer(Adam(model.parameters()))
    optimizer.step(lambda: dict(zip(("a", "b"), groups(model), strict=True)))
    assert optimizer.last is not None
    assert optimizer.last.names == ("a", "b")


def groups(model: Tasks) -> list[list[Tensor]]:
    losses = model(*models.batch(4))
    return [losses[:2], losses[2:]]


# Tasks come and go


def literal_of(model: Tasks, sums: list[Tensor]) -> Tensor:
    return literal_update(literal_gradients(sums, [*model.parameters()]))


def all_grads(model: Tasks) -> Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1)
            for p in model.parameters()
        ]
    )


@pytest.mark.parametrize(
    "batches",
    [
        [("cls",), ("box",), ("mask",)],
        [("cls", "box"), ("box", "mask"), ("cls",)],
        [("mask", "cls"), ("cls", "mask")],
    ],
    ids=str,
)
def test_a_task_that_is_absent_from_a_micro_batch_adds_nothing(
    batches: list[tuple[str, ...]],
) -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    optimizer = wrap(model)
    sums: dict[str, Tensor] = {}
    for number, present in enumerate(batches):
        losses = dict(zip(NAMES, model(*models.batch(3, number)), strict=True))
        mine = {name: losses[name] for name in present}
        for name, loss in mine.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + loss
        is_last = number == len(batches) - 1
        optimizer.backward(mine, accumulate_only=not is_last, retain_graph=True)
    assert optimizer.last is not None
    assert optimizer.last.names == tuple(sums)
    expected = literal_of(model, [*sums.values()])
    assert_close(all_grads(model), expected, rtol=1e-9, atol=1e-11)


def test_lists_must_keep_their_length() -> None:
    model, losses = step_input(3)
    optimizer = wrap(model)
    optimizer.backward(losses, accumulate_only=True, retain_graph=True)
    cure = r"got \['0', '1'\]: where tasks come and go, give them names"
    with pytest.raises(ValueError, match=cure):
        optimizer.backward(losses[:2])
    with pytest.raises(ValueError, match="give them names"):
        optimizer.backward({"cls": losses[0]})
    optimizer.backward(losses)  # nothing was lost


def test_layers_are_not_deferred_where_a_task_is_absent() -> None:
    layer = nn.Linear(64, 64)
    reference = nn.Linear(64, 64)
    reference.load_state_dict(layer.state_dict())
    settings: list[tuple[nn.Module, Passes]] = [
        (layer, "auto"),
        (reference, "separate"),
    ]
    for one, passes in settings:
        optimizer = HarmonizedOptimizer(SGD(one.parameters()), passes=passes)
        x = torch.linspace(-1, 1, 64)[None]
        optimizer.backward({"a": one(x).square().mean()}, accumulate_only=True)
        out = one(x)
        optimizer.backward({"b": (out - 1).abs().mean(), "c": out.mean()})
        assert optimizer.last is not None
        assert optimizer.last.names == ("a", "b", "c")
    for mine, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_close(mine.grad, theirs.grad)


# Finish late


def test_what_is_pending_can_be_harmonized_before_clipping() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    optimizer = wrap(model)
    halves = [model(*models.batch(3, seed)) for seed in range(2)]
    for losses in halves:
        optimizer.backward(losses, accumulate_only=True, retain_graph=True)
    assert all(p.grad is None for p in model.parameters())
    optimizer.finish_accumulation()
    sums = [a + b for a, b in zip(*halves, strict=True)]
    assert_close(all_grads(model), literal_of(model, sums), rtol=1e-9, atol=1e-11)
    before = all_grads(model)
    optimizer.finish_accumulation()  # nothing is pending any more
    assert all_grads(model).equal(before)


def test_what_is_pending_can_be_harmonized_before_a_scaler_unscales() -> None:
    model, losses = step_input(2)
    optimizer, scaler = wrap(model), GradScaler("cpu", init_scale=8.0)
    optimizer.backward(scaler.scale(losses), accumulate_only=True, retain_graph=True)
    optimizer.finish_accumulation()
    scaler.unscale_(optimizer)
    assert_close(all_grads(model), literal_of(model, losses), rtol=1e-9, atol=1e-11)
    scaler.step(optimizer)


def test_the_step_to_come_is_served_by_what_was_finished() -> None:
    model, losses = step_input(2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), project_step=True)
    seen: list[Any] = []
    optimizer.register_change_hook(seen.append)
    optimizer.backward(losses, accumulate_only=True)
    optimizer.finish_accumulation()
    optimizer.step()
    assert seen[0].names == ("0", "1")
