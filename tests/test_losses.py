"""Losses in every form, and the factor with which each enters a total."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, harmonized_loss, measure, plain_sum
from ghopt.losses import as_in_total, leaves, named_losses, weighted_sum
from tests import models
from tests.literal import grads
from tests.models import Tasks


def step_input() -> tuple[Tasks, HarmonizedOptimizer, list[Tensor]]:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    return model, optimizer, model(*models.batch(2))


def counting(passes: list[Tensor]) -> Callable[..., None]:
    def run(loss: Tensor, retain_graph: bool) -> None:
        passes.append(loss)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    return run


# What was meant


def test_a_sum_of_losses_is_told_from_a_list_of_them() -> None:
    _, optimizer, (a, b) = step_input()
    with pytest.raises(ValueError, match=r"pass \[a, b\], not a \+ b"):
        optimizer.backward(a + b)


@pytest.mark.parametrize("keys", ["ab", (0, 1)])
def test_a_scaled_mapping_is_told_how_to_be_scaled(keys: Any) -> None:
    _, optimizer, losses = step_input()
    scaler = GradScaler("cpu")
    scaled: Any = scaler.scale(dict(zip(keys, losses, strict=True)))
    with pytest.raises(TypeError, match=r"pass \{name: scaler.scale\(loss\) for name"):
        optimizer.backward(scaled)
    by_name = {
        name: scaler.scale(loss) for name, loss in zip("ab", losses, strict=True)
    }
    optimizer.backward(by_name)


def test_a_scaled_iterator_of_losses_is_all_right() -> None:
    model, optimizer, losses = step_input()
    scaler = GradScaler("cpu", init_scale=2.0)
    scaled: Any = scaler.scale(iter(losses))
    optimizer.backward(scaled)
    expected, literal, losses = step_input()
    literal.backward([2 * loss for loss in losses])
    assert_close(grads(model), grads(expected))


def test_a_graph_that_another_backward_pass_has_freed_is_named() -> None:
    model, optimizer, losses = step_input()
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    before = [None if grad is None else grad.clone() for grad in grads(model)]
    with pytest.raises(
        RuntimeError, match=r"graph .* is gone: .* as loss.backward\(\)"
    ):
        optimizer.backward(losses)
    assert_close(grads(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("count", [32, 33, 256])
def test_more_than_32_tasks_are_warned_of(count: int) -> None:
    weight = torch.ones(3, requires_grad=True)
    losses = (torch.randn(count, 3) @ weight).square()
    # Of another rule than gh, whose conflicts of 256 tasks take seconds.
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1), plain_sum)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.backward(losses)
    told = [str(warning.message) for warning in caught]
    assert len(told) == (count > 32)
    assert all(f"{count} tasks" in text and "losses.mean()" in text for text in told)


@pytest.mark.parametrize("use", [measure, harmonized_loss])
def test_a_model_in_place_of_its_parameters_is_told_so(use: Callable[..., Any]) -> None:
    model, _, losses = step_input()
    with pytest.raises(TypeError, match=r"got .*: pass model.parameters\(\)"):
        use(losses, model)
    with pytest.raises(TypeError, match=r"got .*: pass model.parameters\(\)"):
        use(losses, next(model.parameters()))


# In a total


@pytest.mark.parametrize("how", ["weights", "mean", "sum"])
def test_losses_may_be_one_tensor_in_a_total(how: str) -> None:
    model, optimizer, losses = step_input()
    whole = torch.stack(losses)
    factors = torch.tensor([0.3, 2.0], dtype=torch.float64)
    total = {"weights": whole @ factors, "mean": whole.mean(), "sum": whole.sum()}[how]
    optimizer.backward(whole, total=total)
    expected, literal, (a, b) = step_input()
    by = {"weights": [0.3, 2.0], "mean": [0.5, 0.5], "sum": [1.0, 1.0]}[how]
    literal.backward([by[0] * a, by[1] * b])
    assert_close(grads(model), grads(expected))


def test_a_tensor_that_is_not_in_the_total_is_an_error() -> None:
    model, optimizer, losses = step_input()
    whole = torch.stack(losses)
    with pytest.raises(ValueError, match=r"total .* got one that reaches a parameter"):
        optimizer.backward(whole, total=torch.stack(losses).sum())
    assert all(grad is None for grad in grads(model))


def test_a_task_with_the_factor_zero_costs_no_pass() -> None:
    model, optimizer, (a, b) = step_input()
    passes: list[Tensor] = []
    optimizer.backward([a, b], total=0 * a + 2 * b, backward_fn=counting(passes))
    assert len(passes) == 1
    assert optimizer.last is not None
    assert optimizer.last.names == ("0", "1")
    assert optimizer.last.gramian[0, 0] == 0
    expected, _, (_, b) = step_input()
    (2 * b).backward()  # type: ignore[no-untyped-call]  # torch's
    assert_close(grads(model), grads(expected))


def test_all_factors_may_be_zero() -> None:
    model, optimizer, (a, b) = step_input()
    optimizer.backward([a, b], total=0 * (a + b))
    assert all(grad is None or not grad.any() for grad in grads(model))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("extra", ["penalty", "weight of a loss"])
def test_what_else_is_in_the_total_is_an_error(extra: str, as_tensor: bool) -> None:
    model, optimizer, losses = step_input()
    given: Any = torch.stack(losses) if as_tensor else losses
    scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
    more = {
        "penalty": sum(p.square().sum() for p in model.parameters()),
        "weight of a loss": scale.sum() * losses[0].detach(),
    }[extra]
    total: Any = (given.sum() if as_tensor else sum(losses)) + more
    with pytest.raises(ValueError, match="its gradient there would be lost"):
        optimizer.backward(given, total=total)
    assert all(grad is None for grad in grads(model))
    # A constant is no such thing, nor is a factor without grad.
    constant = torch.tensor(2.0)
    optimizer.backward(losses, total=3 * torch.stack(losses).sum() / constant + 5)


def test_leaves_are_all_that_a_loss_was_computed_from() -> None:
    model, _, (a, b) = step_input()
    trunk, (head, other) = [*model.trunk.parameters()], model.heads
    assert {*leaves(a)} == {*trunk, *head.parameters()}
    assert {*leaves(a + b, but_through=[a])} == {*trunk, *other.parameters()}
    assert not [*leaves(a * b, but_through=[a, b])]
    assert not [*leaves(a, but_through=[a])]


def test_a_loss_without_grad_has_no_factor() -> None:
    a, b = torch.ones((), requires_grad=True), torch.ones(())
    scaled = as_in_total({"a": a, "b": b}, 3 * a + b)
    assert scaled["a"] == 3
    assert scaled["b"] == 1


# Weights


def test_a_weighted_sum_has_a_graph_also_inside_no_grad() -> None:
    a = torch.ones((), requires_grad=True)
    with torch.no_grad():
        total = weighted_sum([a, 2 * a.detach()], torch.tensor([2.0, 1.0]).double())
    assert total == 4
    assert total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_that_a_dtype_cannot_hold_is_an_error(dtype: torch.dtype) -> None:
    def rule(gramian: Tensor) -> Tensor:
        return torch.full_like(gramian[0], 2 * torch.finfo(dtype).max)

    weight = torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1), rule)
    with pytest.raises(ValueError, match=rf"weights that {dtype} can hold, got"):
        optimizer.backward([weight.sum(), -weight[0]])
    assert weight.grad is None
    with pytest.raises(ValueError, match=rf"weights that {dtype} can hold, got"):
        harmonized_loss([weight.sum(), -weight[0]], [weight], rule)


def test_half_precision_may_have_large_weights_of_small_gradients() -> None:
    """They are summed in float32, and what comes of it fits."""
    weight = torch.ones(2, dtype=torch.float16, requires_grad=True)
    tiny = (weight * torch.tensor([1e-4, 0], dtype=torch.float16)).sum()
    large = (weight * torch.tensor([-20.0, 5], dtype=torch.float16)).sum()
    optimizer = HarmonizedOptimizer(SGD([weight], lr=1e-3))
    optimizer.backward([tiny, large])
    assert optimizer.last is not None
    assert optimizer.last.weights.max() > 65504
    assert weight.grad is not None
    assert_close(weight.grad[1], torch.tensor(5.0, dtype=torch.float16))


def test_an_error_of_an_iterator_is_its_own() -> None:
    _, optimizer, _ = step_input()

    def fail(_: int) -> Tensor:
        raise ValueError("batch sizes differ")

    with pytest.raises(ValueError, match="batch sizes differ"):
        optimizer.backward(map(fail, range(2)))


def test_weights_that_are_not_finite_are_no_error() -> None:
    weight = torch.ones(3, requires_grad=True)
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1))
    optimizer.backward([torch.inf * weight.sum(), -weight[0]])
    assert weight.grad is not None
    assert weight.grad.isnan().all()


def test_names_are_those_of_the_mapping_or_numbers() -> None:
    a, b = torch.ones(2, requires_grad=True).unbind()
    assert [*named_losses([a, b])] == ["0", "1"]
    assert [*named_losses({"x": a, "y": b})] == ["x", "y"]
