"""``backward`` for loops of their own, the equivalent model, and what is run per step."""

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
    Accumulation,
    HarmonizedOptimizer,
    backward,
    gh,
    ghpp,
    ghpp_printed,
    harmonized_loss,
    measure,
)
from ghopt.measuring import weigh
from tests import models
from tests.memory import allocated
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
    base = SGD(layer.parameters(), lr=0.1)
    optimizer = HarmonizedOptimizer(base, passes="separate")
    held, peak = allocated(lambda: optimizer.backward(losses))
    copy = 4 * (1000 * 1000 + 1000)
    # Beside K copies 2 MB, whatever the size: sums of the Gramian, activations.
    assert tasks * copy <= peak < tasks * copy + 2**21
    assert held == pytest.approx(copy, rel=0.01)


def test_it_works_inside_no_grad_and_autocast() -> None:
    model, losses = conflict()
    HarmonizedOptimizer(SGD(model.parameters())).backward(losses)
    expected = [p.grad for p in model.parameters()]
    model, losses = conflict()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        HarmonizedOptimizer(SGD(model.parameters())).backward(losses)
    assert_close([p.grad for p in model.parameters()], expected, rtol=0, atol=0)


def test_an_optimizer_may_freeze_a_parameter_between_passes_of_the_same_losses() -> (
    None
):
    model, losses = conflict()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    optimizer.backward(losses, retain_graph=True)
    next(model.parameters()).requires_grad_(False)
    optimizer.backward(losses)  # no other optimizer's


def test_losses_whose_passes_another_call_ran_are_refused() -> None:
    model, losses = conflict()
    trunk, heads = [*model.trunk.parameters()], [*model.heads.parameters()]
    backward(losses, trunk, retain_graph=True)
    backward(losses, trunk, retain_graph=True)  # the same parameters once more
    with pytest.raises(ValueError, match="went through the backward passes of another"):
        backward(losses, heads, retain_graph=True)


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


@pytest.mark.parametrize("name", ["ConFIG", "ExcessMTL", "ExcessMTLWeighting"])
def test_what_takes_gradients_and_has_no_twin_of_gramians_is_refused_too(
    name: str,
) -> None:
    model, losses = conflict()
    of_gradients: Any = getattr(torchjd.aggregation, name)()
    with pytest.raises(TypeError, match=rf"{name}\(\): pass one of its weightings"):
        harmonized_loss(losses, model.parameters(), of_gradients)


def test_a_class_is_refused_where_an_object_of_it_is_meant() -> None:
    model, losses = conflict()
    aggregator: Any = UPGrad
    with pytest.raises(TypeError, match=r"UPGrad\(\): pass UPGradWeighting\(\)"):
        harmonized_loss(losses, model.parameters(), aggregator)
    weighting: Any = UPGradWeighting
    with pytest.raises(
        TypeError, match=r"the class UPGradWeighting: .* UPGradWeig.*\(\)"
    ):
        harmonized_loss(losses, model.parameters(), weighting)


def test_its_weighting_is_welcome() -> None:
    model, losses = conflict()
    HarmonizedOptimizer(SGD(model.parameters()), UPGradWeighting()).backward(losses)


# For loops with optimizers of their own


@pytest.mark.parametrize("weighting", [gh, ghpp])
@pytest.mark.parametrize("network", [models.heads_on_a_trunk, models.one_head_for_all])
def test_backward_alone_does_what_the_optimizer_does(
    weighting: Callable[[Tensor], Tensor], network: Callable[[int], Tasks]
) -> None:
    expected, actual = models.make(network, 2), models.make(network, 2)
    optimizer = HarmonizedOptimizer(SGD(expected.parameters()), weighting)
    optimizer.backward(expected(*models.batch(2)))
    found = backward(actual(*models.batch(2)), actual.parameters(), weighting)
    assert found is not None
    assert optimizer.last is not None
    assert found.names == optimizer.last.names
    assert_close(found.gramian, optimizer.last.gramian, rtol=0, atol=0)
    assert_close(found.weights, optimizer.last.weights, rtol=0, atol=0)
    grads = [[p.grad for p in model.parameters()] for model in (actual, expected)]
    assert_close(*grads, rtol=0, atol=0)


def test_two_base_optimizers_step_on_one_harmonized_gradient() -> None:
    """As Muon for the matrices beside AdamW for the rest."""
    expected, actual = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    whole = HarmonizedOptimizer(SGD(expected.parameters(), lr=0.1))
    matrices = [p for p in actual.parameters() if p.dim() == 2]
    others = [p for p in actual.parameters() if p.dim() != 2]
    parts = [SGD(matrices, lr=0.1), SGD(others, lr=0.1)]
    for seed in range(3):
        whole.step(losses=expected(*models.batch(2, seed)))
        actual.zero_grad()
        backward(actual(*models.batch(2, seed)), [*matrices, *others])
        for part in parts:
            part.step()
    # The order of the parameters is another one, and so are the last digits.
    pairs = zip(actual.parameters(), expected.parameters(), strict=True)
    for one, other in pairs:
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_other_parameters_receive_the_plain_sum() -> None:
    model, losses = conflict()
    heads = list(model.heads.parameters())
    expected = gradients(torch.stack(losses).sum(), heads)
    backward(losses, model.trunk.parameters(), summed_params=heads)
    assert_close(tuple(p.grad for p in heads), expected)


def test_micro_batches_share_an_accumulation() -> None:
    expected, losses = conflict()
    backward([2 * loss for loss in losses], expected.parameters())
    model, losses = conflict()
    kept = Accumulation()
    first = backward(
        losses,
        model.parameters(),
        retain_graph=True,
        accumulate_only=True,
        accumulation=kept,
    )
    assert first is None
    assert kept
    assert all(p.grad is None for p in model.parameters())
    backward(losses, model.parameters(), accumulation=kept)
    assert not kept
    grads = [[p.grad for p in m.parameters()] for m in (model, expected)]
    assert_close(*grads)


def test_backward_names_what_is_wrong() -> None:
    model, losses = conflict()
    with pytest.raises(ValueError, match="accumulation must be given"):
        backward(losses, model.parameters(), accumulate_only=True)
    with pytest.raises(TypeError, match=r"pass model.parameters\(\)"):
        backward(losses, model)  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="backward_fn must be callable, got 1"):
        backward(losses, model.parameters(), backward_fn=1)  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="weighting must be callable"):
        backward(losses, model.parameters(), "gh")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="losses must reach a parameter"):
        backward(losses, [nn.Parameter(torch.ones(2))])


def test_losses_belong_to_one_optimizer() -> None:
    """A second one would add the plain sum to the parameters of the first, unseen."""
    model, losses = conflict()
    trunk, heads = (
        HarmonizedOptimizer(SGD(part.parameters()))
        for part in (model.trunk, model.heads)
    )
    trunk.backward(losses, retain_graph=True)
    trunk.backward(losses, retain_graph=True)  # twice the same is as in torch
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(ValueError, match=r"'0'.* another HarmonizedOptimizer already"):
        heads.backward(losses)
    assert_close([p.grad for p in model.parameters()], before, rtol=0, atol=0)
    heads.backward(model(*models.batch(2)))  # a new graph is another matter


@pytest.mark.parametrize("which", ["trunk", "all"])
def test_frozen_shared_parameters_leave_the_plain_sum(which: str) -> None:
    model, _ = conflict()
    shared = list(model.trunk.parameters())
    optimizer = HarmonizedOptimizer(
        SGD(model.parameters()), shared_params=shared if which == "trunk" else None
    )
    outside = nn.Parameter(torch.ones((), dtype=torch.float64))
    for p in shared if which == "trunk" else model.parameters():
        p.requires_grad_(False)
    losses = [outside * loss for loss in model(*models.batch(2))]
    wanted = [outside, *(p for p in model.parameters() if p.requires_grad)]
    expected = gradients(torch.stack(losses).sum(), wanted)
    passes = []

    def run(loss: Tensor, retain_graph: bool) -> None:
        passes.append(loss)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    optimizer.backward(losses, backward_fn=run)
    assert len(passes) == 1
    assert optimizer.last is None
    assert_close(tuple(p.grad for p in wanted), expected)
