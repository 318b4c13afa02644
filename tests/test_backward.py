"""The equivalent model, `harmonized_loss`, and what `backward` runs per step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchjd.aggregation
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close
from torchjd.aggregation import UPGrad, UPGradWeighting

from ghopt import (
    HarmonizedOptimizer,
    gh,
    ghpp,
    ghpp_printed,
    harmonized_loss,
    measure,
)
from ghopt.backward import weigh
from tests import models
from tests.models import Tasks

WEIGHTINGS = [gh, ghpp, ghpp_printed]


def conflict(tasks: int = 2) -> tuple[Tasks, list[Tensor]]:
    model = models.make(models.heads_on_a_trunk, tasks)
    return model, model(*models.batch(tasks))


def gradients(
    loss: Tensor, parameters: list[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("tasks", [1, 2])
def test_the_gradient_of_the_equivalent_model_is_the_harmonized_one(
    weighting: Callable[[Tensor], Tensor], tasks: int
) -> None:
    model, losses = conflict(tasks)
    HarmonizedOptimizer(SGD(model.parameters()), weighting).backward(losses)
    expected = [p.grad for p in model.parameters()]
    model, losses = conflict(tasks)
    parameters = list(model.parameters())
    loss = harmonized_loss(losses, parameters, weighting)
    assert_close(gradients(loss, parameters), tuple(expected))


def test_its_value_is_the_sum_of_the_losses_with_constant_weights() -> None:
    model, losses = conflict()
    trunk = list(model.trunk.parameters())
    rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(
        loss, trunk, retain_graph=True)]) for loss in losses]  # fmt: skip
    dot = rows[0] @ rows[1]
    assert dot < 0
    tau = 1 - dot / rows[0].square().sum(), 1 - dot / rows[1].square().sum()  # eq. 42
    loss = harmonized_loss(dict(zip("ab", losses, strict=True)), iter(trunk), gh)
    expected = tau[0] * losses[0] + tau[1] * losses[1]
    assert_close(loss, expected)
    # As the authors do: measured on the shared network, applied to every parameter.
    everything = list(model.parameters())
    assert_close(gradients(loss, everything), gradients(expected, everything))


def test_it_leaves_grad_alone() -> None:
    model, losses = conflict()
    harmonized_loss(losses, model.parameters(), gh)
    assert [p.grad for p in model.parameters()] == [None] * 6


def test_a_loss_may_have_one_element_and_no_graph() -> None:
    model, losses = conflict()
    parameters = list(model.parameters())
    loss = harmonized_loss([losses[0].view(1), torch.ones(1, 1)], parameters, gh)
    assert loss.shape == ()
    assert_close(loss, losses[0] + 1)


@pytest.mark.parametrize(
    ("losses", "message"),
    [([], "losses must hold at least one loss"), ([torch.ones(2)], "losses.*'0'")],
)
def test_bad_losses_are_named(losses: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harmonized_loss(losses, conflict()[0].parameters(), gh)


@pytest.mark.parametrize("params", [[], [nn.Parameter(torch.ones(2))]])
def test_params_that_no_loss_reaches_are_an_error(params: list[nn.Parameter]) -> None:
    with pytest.raises(ValueError, match=f"params must hold one .* got {len(params)}"):
        harmonized_loss(conflict()[1], params, gh)


class Counting(torch.autograd.Function):
    """Count the backward passes through a point."""

    passes = 0

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:  # noqa: ARG004  # torch's signature
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004  # torch's signature
        Counting.passes += 1
        return grads[0]


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_each_task_takes_one_backward_pass(tasks: int) -> None:
    model, _ = conflict(tasks)
    inputs, targets = models.batch(tasks)
    features: Tensor = Counting.apply(model.trunk(inputs))  # type: ignore[no-untyped-call]  # torch's
    model.trunk = nn.Identity()
    Counting.passes = 0
    HarmonizedOptimizer(SGD(model.parameters())).backward(model(features, targets))
    assert Counting.passes == tasks


@pytest.mark.parametrize("tasks", [2, 4])
def test_a_step_holds_one_copy_of_the_gradients_per_task(tasks: int) -> None:
    layer = nn.Linear(1000, 1000)
    out = layer(torch.randn(8, 1000))
    losses = [out[:, task::tasks].square().mean() for task in range(tasks)]
    optimizer = HarmonizedOptimizer(SGD(layer.parameters(), lr=0.1))
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.backward(losses)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    copy = 4 * (1000 * 1000 + 1000)
    # A little more than K copies: blocks in float64, activations.
    assert tasks * copy <= peak < (tasks + 0.3) * copy
    assert held == pytest.approx(copy, rel=0.01)


def test_it_works_inside_no_grad_and_autocast() -> None:
    model, losses = conflict()
    HarmonizedOptimizer(SGD(model.parameters())).backward(losses)
    expected = [p.grad for p in model.parameters()]
    model, losses = conflict()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        HarmonizedOptimizer(SGD(model.parameters())).backward(losses)
    assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


def test_its_rule_is_gh_unless_another_is_given() -> None:
    model, losses = conflict()
    parameters = list(model.parameters())
    assert harmonized_loss(losses, parameters) == harmonized_loss(
        losses, parameters, gh
    )


def test_a_parameter_that_is_given_twice_counts_once() -> None:
    model, losses = conflict()
    once = list(model.parameters())
    expected = harmonized_loss(losses, once)
    assert harmonized_loss(losses, [*once, *model.trunk.parameters()]) == expected


def test_the_tensor_of_a_weighting_stays_its_own() -> None:
    mine = torch.tensor([2.0, 3.0], dtype=torch.float64)
    weights = weigh(lambda _: mine, torch.eye(2, dtype=torch.float64))
    assert weights.equal(mine)
    weights.zero_()  # as a rank does that takes those of the first
    assert mine.all()


@pytest.mark.parametrize("aggregator", [UPGrad(), torchjd.aggregation.Mean()])
@pytest.mark.parametrize("where", ["optimizer", "loss", "measure"])
def test_an_aggregator_of_torchjd_is_refused(aggregator: Any, where: str) -> None:
    model, losses = conflict()
    parameters = list(model.parameters())
    name = type(aggregator).__name__
    uses: dict[str, Callable[[], object]] = {
        "optimizer": lambda: HarmonizedOptimizer(SGD(parameters), aggregator),
        "loss": lambda: harmonized_loss(losses, parameters, aggregator),
        "measure": lambda: measure(losses, parameters, aggregator),
    }
    with pytest.raises(TypeError, match=rf"{name}\(\): pass {name}Weighting\(\)"):
        uses[where]()


def test_its_weighting_is_welcome() -> None:
    model, losses = conflict()
    HarmonizedOptimizer(SGD(model.parameters()), UPGradWeighting()).backward(losses)
