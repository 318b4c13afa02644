"""Conflicts removed where the tasks leave the trunk: ``backward(losses, features=z)``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, AdamW
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ghopt import (
    Accumulation,
    HarmonizedOptimizer,
    Recorder,
    Recording,
    backward,
    ghpp,
    plain_sum,
)
from ghopt.features import FeatureGradients, gradients_at
from ghopt.gradients import StoredGradients
from ghopt.losses import Loss
from ghopt.ranks import ALONE
from ghopt.report import judge
from tests import models
from tests.literal import grads, literal_gradients, literal_update
from tests.models import Tasks

Heads = Callable[..., list[Tensor]]
"""Gives the losses of some features."""


def heads_of(model: Tasks, targets: Tensor) -> Heads:
    def heads(features: Tensor) -> list[Tensor]:
        pairs = zip(model.heads, targets, strict=True)
        return [(head(features)[:, 0] - y).square().mean() for head, y in pairs]

    return heads


def literal_grads(
    features: Sequence[Tensor], heads: Heads, parameters: Sequence[Tensor]
) -> list[Tensor]:
    """Pull the literal update at the features back, and add what goes around them."""
    cut = [nn.Parameter(z.detach().clone()) for z in features]
    losses = heads(*cut)
    jacobian = literal_gradients(losses, cut)
    sizes = [z.numel() for z in cut]
    update = torch.split(literal_update(jacobian), sizes)
    pulled = torch.autograd.grad(
        features,
        parameters,
        [part.view_as(z) for part, z in zip(update, features, strict=True)],
        retain_graph=True,
        allow_unused=True,
    )
    plain = torch.autograd.grad(sum(losses), parameters, allow_unused=True)  # type: ignore[arg-type]  # sum of tensors
    return [
        sum((g for g in both if g is not None), torch.zeros_like(p))
        for p, *both in zip(parameters, pulled, plain, strict=True)
    ]


def wrapped(model: nn.Module, **options: Any) -> HarmonizedOptimizer:
    return HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), **options)


def start(tasks: int = 3, seed: int = 0) -> tuple[Tasks, Tensor, list[Tensor]]:
    """Give a model, its features and its losses, in conflict."""
    model = models.make(models.heads_on_a_trunk, tasks)
    inputs, targets = models.batch(tasks, seed)
    features = model.trunk(inputs)
    return model, features, heads_of(model, targets)(features)


# What each parameter receives


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("network", models.NETWORKS)
def test_the_weighted_sum_goes_on_behind_the_features_and_heads_get_their_sums(
    network: Callable[[int], Tasks], tasks: int
) -> None:
    model = models.make(network, tasks)
    inputs, targets = models.batch(tasks)
    heads, features = heads_of(model, targets), model.trunk(inputs)
    trained = [
        p for n, p in model.named_parameters() if p.requires_grad and n != "unused"
    ]
    expected = literal_grads([features], heads, trained)
    wrapped(model).backward(heads(features), features=features)
    assert_close([p.grad for p in trained], expected, rtol=1e-12, atol=1e-14)
    assert [p.grad for p in model.parameters() if p not in {*trained}] in (
        [],
        [None] * 2,
    )


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_it_is_so_for_any_number_of_tasks_and_any_numbers(
    tasks: int, seed: int
) -> None:
    model = models.make(models.heads_on_a_trunk, tasks, seed)
    inputs, targets = models.batch(tasks, seed)
    heads, features = heads_of(model, targets), model.trunk(inputs)
    expected = literal_grads([features], heads, list(model.parameters()))
    wrapped(model).backward(heads(features), features=features)
    assert_close(grads(model), expected, rtol=1e-9, atol=1e-12)


def test_no_task_is_opposed_in_what_the_features_shall_become() -> None:
    model, z, losses = start()
    jacobian = literal_gradients(losses, [z])  # type: ignore[list-item]  # no parameter
    assert (jacobian @ jacobian.sum(0)).min() < 0
    arrived: list[Tensor] = []
    optimizer = wrapped(model)
    optimizer.backward(losses, features=z)
    weights = optimizer.last.weights  # type: ignore[union-attr]
    arrived.append(weights @ jacobian)
    assert (jacobian @ arrived[0]).min() > -1e-15


def test_gradients_at_features_say_whether_a_task_has_one() -> None:
    z, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    stored = gradients_at([z], {"a": z.sum()}, ["a"])
    assert FeatureGradients(stored, ALONE, [other])
    assert not FeatureGradients(StoredGradients(["a"], [z]), ALONE, [other])


def test_several_features_count_as_one_vector() -> None:
    torch.manual_seed(0)
    trunks = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 5)]).double()
    outs = nn.ModuleList([nn.Linear(9, 1) for _ in range(3)]).double()
    model = nn.ModuleList([trunks, outs])
    inputs, targets = models.batch(3)

    def heads(one: Tensor, other: Tensor) -> list[Tensor]:
        both = torch.cat([one, other], 1)
        first, second = (out(both)[:, 0] for out in outs[:2])
        return [
            (first - targets[0]).square().mean(),
            (second - targets[1]).square().mean(),
            one.square().mean(),  # does not reach the other
        ]

    features = [trunk(inputs).tanh() for trunk in trunks]
    trained = [*trunks.parameters(), *outs[:2].parameters()]
    expected = literal_grads(features, heads, trained)
    wrapped(model).backward(heads(*features), features=iter(features))
    assert_close([p.grad for p in trained], expected, rtol=1e-12, atol=1e-14)


def test_a_parameter_that_is_reached_around_the_features_adds_the_plain_sum() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4).double()  # tied: looked up, and the classifier
    middle = nn.Linear(4, 4).double()
    model = nn.ModuleList([table, middle])
    words = torch.tensor([[0, 1, 2], [3, 4, 4]])
    targets = torch.tensor([[1, 0, 5], [8, 7, 0]]).flatten()

    def heads(features: Tensor) -> list[Tensor]:
        logits = (features @ table.weight.T).flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, targets)
        return [loss, -1.5 * loss + features.square().mean()]

    features = middle(table(words)).tanh()
    parameters = list(model.parameters())
    expected = literal_grads([features], heads, parameters)
    wrapped(model).backward(heads(features), features=features)
    assert_close([p.grad for p in parameters], expected, rtol=1e-12, atol=1e-14)


def test_a_task_that_does_not_reach_the_features_counts_as_zero_there() -> None:
    model, z, losses = start(2)
    extra = model.heads[0](torch.ones(1, 8).double()).sum()
    optimizer = wrapped(model)
    optimizer.backward([*losses, extra], features=z)
    assert optimizer.last is not None
    assert not optimizer.last.gramian[2].any()
    assert_close(optimizer.last.weights[2].item(), 1.0)
    found = model.heads[0].weight.grad
    model, z, losses = start(2)
    wrapped(model).backward(losses, features=z)
    alone = model.heads[0].weight.grad
    assert isinstance(found, Tensor)
    assert isinstance(alone, Tensor)
    assert_close(found, alone + 1)


def test_a_loss_without_grad_has_no_part() -> None:
    model, z, losses = start(2)
    optimizer = wrapped(model)
    optimizer.backward([*losses, torch.ones(())], features=z)
    assert optimizer.last is not None
    assert not optimizer.last.gramian[2].any()
    found = grads(model)
    model, z, losses = start(2)
    wrapped(model).backward(losses, features=z)
    assert_close(found, grads(model), rtol=1e-12, atol=1e-14)


def test_parameters_outside_the_optimizer_receive_the_same_as_inside() -> None:
    model, z, losses = start()
    wrapped(model).backward(losses, features=z)
    expected = grads(model)
    model, z, losses = start()
    wrapped(model.heads).backward(losses, features=z)
    assert_close(grads(model), expected, rtol=0, atol=0)


def test_without_conflict_it_is_the_plain_pass() -> None:
    model, z, losses = start(2)
    losses = [losses[0], 2 * losses[0]]
    sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
    expected = grads(model)
    model.zero_grad()
    wrapped(model).backward(losses, features=z)
    assert_close(grads(model), expected, rtol=1e-14, atol=1e-15)


def test_every_parameter_is_reached_by_one_pass_alone() -> None:
    model, z, losses = start()
    reached: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(reached.append)  # type: ignore[no-untyped-call]  # torch's
    wrapped(model).backward(losses, features=z)
    assert len(reached) == len(list(model.parameters()))


def test_step_and_the_function_take_features_too() -> None:
    model, z, losses = start()
    wrapped(model).backward(losses, features=z)
    expected = grads(model)
    model, z, losses = start()
    before = [p.detach().clone() for p in model.parameters()]
    wrapped(model).step(losses=losses, features=z)
    assert_close(grads(model), expected, rtol=0, atol=0)
    assert all(not a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    model, z, losses = start()
    found = backward(losses, model.trunk.parameters(), features=z)
    assert_close(grads(model), expected, rtol=0, atol=0)
    assert found is not None
    assert found.at_features


def test_gradients_add_to_what_is_there() -> None:
    model, z, losses = start()
    optimizer = wrapped(model)
    optimizer.backward(losses, features=z)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    _, targets = models.batch(3)
    z = model.trunk(models.batch(3)[0])
    optimizer.backward(heads_of(model, targets)(z), features=z)
    assert_close(grads(model), [2 * g for g in first])


# Forms of features and losses


def test_features_may_be_views_and_outputs_of_one_call() -> None:
    model, z, _ = start(2)
    _, targets = models.batch(2)
    one, other = torch.split(z * 1, 4, dim=1)
    losses = heads_of(model, targets)(torch.cat([one, other], 1))
    wrapped(model).backward(losses, features=[one, other])
    model_2, z_2, losses_2 = start(2)
    wrapped(model_2).backward(losses_2, features=z_2)
    assert_close(grads(model), grads(model_2), rtol=1e-14, atol=1e-16)


def test_features_changed_in_place_before_the_heads_are_what_they_have_become() -> None:
    model, z, _ = start(2)
    _, targets = models.batch(2)
    z = z * 1
    z.mul_(3.0)
    heads = heads_of(model, targets)
    expected = literal_grads([z], heads, list(model.parameters()))
    wrapped(model).backward(heads(z), features=z)
    assert_close(grads(model), expected, rtol=1e-12, atol=1e-14)


def test_the_same_features_twice_count_once() -> None:
    model, z, losses = start()
    optimizer = wrapped(model)
    optimizer.backward(losses, features=[z, z])
    model_2, z_2, losses_2 = start()
    other = wrapped(model_2)
    other.backward(losses_2, features=z_2)
    assert optimizer.last is not None
    assert other.last is not None
    assert_close(optimizer.last.gramian, other.last.gramian, rtol=0, atol=0)
    assert_close(grads(model), grads(model_2), rtol=0, atol=0)


def test_a_loss_that_is_given_twice_counts_twice() -> None:
    model, z, losses = start(2)
    wrapped(model).backward([losses[0], losses[0]], features=z)
    model_2, z_2, losses_2 = start(2)
    wrapped(model_2).backward([2 * losses_2[0]], features=z_2)
    assert_close(grads(model), grads(model_2))


def test_a_task_of_several_scalars_and_a_total_are_as_ever() -> None:
    model, z, losses = start()
    total = 0.5 * (losses[0] + 2 * losses[1] + losses[2])
    named: dict[str, Loss] = {"one": losses[:2], "other": losses[2]}
    wrapped(model).backward(named, total=total, features=z)
    model_2, z_2, (a, b, c) = start()
    wrapped(model_2).backward([0.5 * a + b, 0.5 * c], features=z_2)
    assert_close(grads(model), grads(model_2), rtol=1e-12, atol=1e-14)


def test_gradients_at_the_features_may_be_one_number_expanded() -> None:
    model, z, _ = start(2)

    def heads(features: Tensor) -> list[Tensor]:
        return [features.sum(), features[:, 0].sum() - 0.5 * features.sum()]

    trunk = list(model.trunk.parameters())
    expected = literal_grads([z], heads, trunk)
    wrapped(model).backward(heads(z), features=z)
    assert_close([p.grad for p in trunk], expected, rtol=1e-12, atol=1e-13)


def test_the_graph_is_freed_unless_it_is_to_be_retained() -> None:
    model, z, losses = start()
    optimizer = wrapped(model)
    optimizer.backward(losses, features=z, retain_graph=True)
    expected = grads(model)
    optimizer.zero_grad()
    optimizer.backward(losses, features=z)
    assert_close(grads(model), expected)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="the graph of these losses is gone"):
        optimizer.backward(losses, features=z)


def test_hooks_of_features_stay_and_ours_go() -> None:
    model, z, losses = start()
    seen: list[Tensor] = []
    z.register_hook(seen.append)  # type: ignore[no-untyped-call]  # torch's
    optimizer = wrapped(model)
    optimizer.backward(losses, features=z, retain_graph=True)
    assert len(seen) == 4  # of three tasks, and of the pass
    before = grads(model)
    optimizer.zero_grad()
    sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
    plain = grads(model)
    assert not torch.allclose(before[0], plain[0])  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(sum(losses), z)  # type: ignore[arg-type]
    assert_close(seen[-1], expected)


def test_our_hook_goes_also_where_the_pass_fails() -> None:
    model, z, losses = start()

    def refuse(_: Tensor) -> None:
        raise ArithmeticError("here")

    weight: Tensor = next(iter(model.parameters()))
    handle = weight.register_hook(refuse)  # type: ignore[no-untyped-call]  # torch's
    optimizer = wrapped(model)
    model.trunk[0].bias.grad = torch.full((8,), 7.0).double()  # type: ignore[index]  # Sequential
    before = grads(model)
    with pytest.raises(ArithmeticError, match="here"):
        optimizer.backward(losses, features=z, retain_graph=True)
    assert all(a is b for a, b in zip(before, grads(model), strict=True))
    assert (model.trunk[0].bias.grad == 7).all()  # type: ignore[index]  # Sequential
    handle.remove()
    optimizer.zero_grad()
    sum(losses).backward()  # type: ignore[union-attr]
    plain = grads(model)
    model, z, losses = start()
    sum(losses).backward()  # type: ignore[union-attr]
    assert_close(plain, grads(model), rtol=0, atol=0)


def test_features_that_retain_their_gradient_hold_the_weighted_sum() -> None:
    model, z, losses = start()
    jacobian = literal_gradients(losses, [z])  # type: ignore[list-item]  # no parameter
    z.retain_grad()
    wrapped(model).backward(losses, features=z)
    assert z.grad is not None
    assert_close(z.grad.flatten(), literal_update(jacobian))


def test_what_a_layer_behind_the_features_sees_is_the_weighted_sum() -> None:
    model, _, _ = start()
    inputs, targets = models.batch(3)
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, out: tuple[Tensor, ...] | Tensor) -> None:
        seen.append(out[0])

    model.trunk.register_full_backward_hook(note)
    z = model.trunk(inputs.requires_grad_())
    losses = heads_of(model, targets)(z)
    jacobian = literal_gradients(losses, [z])
    seen.clear()
    wrapped(model).backward(losses, features=z)
    assert_close(seen[-1].flatten(), literal_update(jacobian))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trunk_may_be_checkpointed(reentrant: bool) -> None:
    model, z, losses = start()
    wrapped(model).backward(losses, features=z)
    expected = grads(model)
    model, _, _ = start()
    inputs, targets = models.batch(3)
    z = checkpoint(model.trunk, inputs.requires_grad_(), use_reentrant=reentrant)
    wrapped(model).backward(heads_of(model, targets)(z), features=z)
    assert_close(grads(model), expected)


# Weightings, hooks and recordings


def test_any_weighting_is_applied_to_the_gramian_of_the_features() -> None:
    model, z, losses = start(2)
    jacobian = literal_gradients(losses, [z])  # type: ignore[list-item]
    given: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        given.append(gramian)
        return ghpp(gramian)

    optimizer = wrapped(model, weighting=weighting)
    optimizer.backward({"a": losses[0], "b": losses[1]}, features=z)
    assert_close(given[0], jacobian @ jacobian.T)
    assert optimizer.last is not None
    assert optimizer.last.at_features
    assert (optimizer.last.names, optimizer.last.rule) == (("a", "b"), "weighting")
    assert_close(optimizer.last.gramian, jacobian @ jacobian.T)


def test_protected_tasks_are_protected_at_the_features() -> None:
    model, z, losses = start(2)
    optimizer = wrapped(model, protect=[0])
    optimizer.backward(losses, features=z)
    gramian = optimizer.last.gramian  # type: ignore[union-attr]
    main = 1 - gramian[0, 1] / gramian[0, 0]
    assert_close(optimizer.last.weights, torch.stack([main, main / main]))  # type: ignore[union-attr]


def test_a_recording_says_which_steps_were_measured_at_the_features(
    tmp_path: Path,
) -> None:
    model, z, losses = start(2)
    optimizer, recorder = wrapped(model), Recorder()
    recorder.attach(optimizer)
    for at_features in (True, False, True):
        z = model.trunk(models.batch(2)[0])
        losses = heads_of(model, models.batch(2)[1])(z)
        optimizer.step(losses=losses, **({"features": z} if at_features else {}))
    recording = recorder.flush()
    recording.to_jsonl(tmp_path / "run.jsonl")
    for one in (recording, Recording.from_jsonl(tmp_path / "run.jsonl")):
        assert one.at_features.tolist() == [True, False, True]
        assert one.sgd_effects.isnan().any(1).tolist() == [True, False, True]
        assert one.where(one.at_features).at_features.tolist() == [True, True]
        said = str(judge(one))
        assert "2 of the 3 recorded steps were measured at the features" in said
        part = one.where(one.at_features)
        assert "All 2 recorded steps were measured at the features" in str(judge(part))
        assert "at the features" not in str(judge(one.where(~one.at_features)))


@pytest.mark.parametrize("how", ["layers", "hook"])
def test_layers_of_parameters_cannot_be_measured(how: str) -> None:
    model, z, losses = start()
    optimizer = wrapped(model)
    if how == "layers":
        Recorder().attach(optimizer, layers=model)
    else:
        optimizer.register_harmonize_hook(lambda _, over: over(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers of parameters cannot be measured"):
        optimizer.backward(losses, features=z)
    assert grads(model) == [None] * 8


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_under_loss_scaling_do_not_overflow_the_gramian(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    z64 = torch.randn(4, 3).double()
    rows = torch.tensor([[2.0, 1, 0], [-1, 1, 0.5]]).to(dtype)
    scale = 2.0**14
    weight = nn.Parameter(torch.ones(4, 3).to(dtype))
    z = weight * z64.to(dtype)
    losses = [(z * row).float().sum() * scale for row in rows]
    optimizer = wrapped(nn.ParameterList([weight]))
    optimizer.backward(losses, features=z)
    assert optimizer.last is not None
    jacobian = rows.double().repeat(1, 4) * scale
    assert_close(optimizer.last.gramian, jacobian @ jacobian.T, rtol=0, atol=0)
    assert optimizer.last.gramian[0, 0] > torch.finfo(torch.float16).max
    expected = literal_update(jacobian).view(4, 3) * z64
    assert weight.grad is not None
    assert_close(weight.grad.double(), expected, rtol=2e-2, atol=1.0)


def test_a_gradient_scaler_skips_the_step_of_an_overflow() -> None:
    model, z, losses = start()
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1)
    optimizer = wrapped(model)
    before = models.make(models.heads_on_a_trunk, 3)
    scaled = {str(k): scaler.scale(loss) for k, loss in enumerate(losses)}
    optimizer.backward(scaled, features=z)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 8
    plain, z, losses = start()
    other = wrapped(plain)
    other.step(losses=losses, features=z)
    assert_close(list(model.parameters()), list(plain.parameters()))
    z = model.trunk(models.batch(3)[0])
    kept = [p.detach().clone() for p in model.parameters()]
    losses = heads_of(model, models.batch(3)[1])(z)
    optimizer.zero_grad()
    optimizer.backward(
        [scaler.scale(loss) * (torch.inf if k else 1) for k, loss in enumerate(losses)],
        features=z,
    )
    scaler.step(optimizer)
    assert_close(list(model.parameters()), kept, rtol=0, atol=0)
    assert len(list(before.parameters())) == 8


# Steps in between, closures


def test_steps_in_between_run_the_losses_with_the_last_weights() -> None:
    model, z, losses = start()
    optimizer = wrapped(model, measure_every=2)
    optimizer.step(losses=losses, features=z)
    last = optimizer.last
    assert last is not None
    inputs, targets = models.batch(3, 1)
    z = model.trunk(inputs)
    losses = heads_of(model, targets)(z)
    weighted = sum(w * loss for w, loss in zip(last.weights, losses, strict=True))
    expected = torch.autograd.grad(
        weighted, list(model.parameters()), retain_graph=True
    )  # fmt: skip
    optimizer.zero_grad()
    optimizer.backward(losses, features=z)
    assert optimizer.last is last
    assert_close(tuple(grads(model)), expected)
    optimizer.step()
    z = model.trunk(inputs)
    optimizer.step(losses=heads_of(model, targets)(z), features=z)
    assert optimizer.last is not last


def test_frozen_parameters_leave_the_plain_sum() -> None:
    model, _, _ = start()
    optimizer = wrapped(model.heads)
    model.heads.requires_grad_(False)
    inputs, targets = models.batch(3)
    z = model.trunk(inputs)
    losses = heads_of(model, targets)(z)
    expected = torch.autograd.grad(
        sum(losses), list(model.trunk.parameters()), retain_graph=True  # type: ignore[arg-type]
    )  # fmt: skip
    optimizer.backward(losses, features=z)
    assert_close(tuple(p.grad for p in model.trunk.parameters()), expected)
    assert optimizer.last is None


def test_a_closure_may_harmonize_once_in_a_step() -> None:
    model, z, losses = start()
    wrapped(model).step(losses=losses, features=z)
    expected = [p.detach().clone() for p in model.parameters()]
    model, _, _ = start()
    optimizer = wrapped(model)
    inputs, targets = models.batch(3)

    def closure() -> None:
        optimizer.zero_grad()
        z = model.trunk(inputs)
        optimizer.backward(heads_of(model, targets)(z), features=z)

    optimizer.step(closure)
    assert_close(list(model.parameters()), expected)

    def twice() -> None:
        closure()
        closure()

    with pytest.raises(RuntimeError, match="once in a step: with shared_params or"):
        optimizer.step(twice)


def test_l_bfgs_is_refused_before_it_has_moved() -> None:
    model, _, _ = start()
    optimizer = HarmonizedOptimizer(LBFGS(model.parameters()))
    inputs, targets = models.batch(3)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> None:
        z = model.trunk(inputs)
        optimizer.backward(heads_of(model, targets)(z), features=z)

    with pytest.raises(ValueError, match="features must be None for L-BFGS"):
        optimizer.step(closure)
    assert_close(list(model.parameters()), before, rtol=0, atol=0)


# Errors


def refused(match: str, features: Any, **options: Any) -> None:
    """See that features are refused, and that nothing has changed."""
    model, z, losses = start()
    optimizer = wrapped(model, **options.pop("of_optimizer", {}))
    given = features(model, z) if callable(features) else features
    model.trunk[0].weight.grad = torch.ones(8, 6).double()  # type: ignore[index]  # Sequential
    before = grads(model)
    error = TypeError if match.startswith("TypeError") else ValueError
    with pytest.raises(error, match=match.removeprefix("TypeError ")):
        optimizer.backward(losses, features=given, **options)
    assert all(a is b for a, b in zip(before, grads(model), strict=True))
    assert (model.trunk[0].weight.grad == 1).all()  # type: ignore[index]  # Sequential
    # The graph is as it was.
    optimizer_2 = wrapped(model)
    optimizer_2.zero_grad()
    sum(losses).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("features", "match"),
    [
        (3.0, "TypeError features must be a tensor, or several, got <class 'float'>"),
        ({"z": 1}, "TypeError features must hold tensors alone, got <class 'str'>"),
        ([], "features must hold a tensor, got none"),
        (lambda _, z: z.detach(), r"features must require grad, got shape \[16, 8\]"),
        (lambda m, z: [z, m.trunk[0].weight], r"got a leaf of shape \[8, 6\]"),
        (lambda m, _: m.trunk(models.batch(3)[0]), "got 1 on which none depends"),
        (lambda _, z: [z, z * 2], r"must not lie behind .* got one of shape \[16, 8\]"),
        (lambda _, z: [(z * 2)[0], z], "must not lie behind"),
        (lambda m, z: [z, m.trunk(models.batch(3)[0])], "got 1 on which none dep"),
    ],
)
def test_features_that_cannot_be_used_are_refused(features: Any, match: str) -> None:
    refused(match, features)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"accumulate_only": True}, "features must be None with accumulate_only"),
        ({"backward_fn": print}, "features must be None with backward_fn"),
        ({"of_optimizer": {"project_step": True}}, "None with project_step"),
    ],
)
def test_what_needs_the_gradients_of_tasks_is_refused_beside_features(
    options: dict[str, Any], match: str
) -> None:
    refused(match, lambda _, z: z, **options)


def test_shared_and_summed_parameters_are_refused() -> None:
    model, z, losses = start()
    optimizer = wrapped(model, shared_params=model.parameters())
    with pytest.raises(ValueError, match="features must be None with shared_params:"):
        optimizer.backward(losses, features=z)
    with pytest.raises(ValueError, match="None with shared_params or summed_params"):
        backward(
            losses,
            model.trunk.parameters(),
            summed_params=model.heads.parameters(),
            features=z,
        )


def test_features_after_micro_batches_that_wait_are_refused() -> None:
    model, z, losses = start()
    kept = Accumulation()
    backward(losses, model.parameters(), accumulate_only=True, accumulation=kept)
    z = model.trunk(models.batch(3)[0])
    losses = heads_of(model, models.batch(3)[1])(z)
    with pytest.raises(ValueError, match="None with accumulate_only, or after it"):
        backward(losses, model.parameters(), accumulation=kept, features=z)
    assert kept


def test_a_recorder_of_steps_is_refused() -> None:
    model, z, losses = start()
    optimizer = wrapped(model)
    Recorder().attach(optimizer, step=True)
    with pytest.raises(ValueError, match="or hooks that look at the step"):
        optimizer.backward(losses, features=z)


def test_features_without_losses_are_no_step() -> None:
    model, z, _ = start()
    with pytest.raises(ValueError, match="features must come with losses here"):
        wrapped(model).step(features=z)


def test_heads_in_reentrant_checkpoints_are_an_error_of_torch() -> None:
    model, z, _ = start(2)
    losses = [
        checkpoint(head, z, use_reentrant=True).square().mean() for head in model.heads
    ]
    with pytest.raises(RuntimeError, match="use_reentrant"):
        wrapped(model).backward(losses, features=z)
    assert grads(model) == [None] * 6


def test_losses_that_another_optimizer_went_through_are_refused() -> None:
    model, z, losses = start()
    trunk, heads = wrapped(model.trunk), wrapped(model.heads)
    trunk.backward(losses, features=z, retain_graph=True)
    with pytest.raises(ValueError, match="went through the backward passes of another"):
        heads.backward(losses, features=z)


def test_the_plain_sum_as_weighting_is_the_plain_pass() -> None:
    model, z, losses = start()
    sum(losses).backward(retain_graph=True)  # type: ignore[union-attr]
    expected = grads(model)
    model.zero_grad()
    HarmonizedOptimizer(AdamW(model.parameters()), plain_sum).backward(
        losses, features=z
    )
    assert_close(grads(model), expected, rtol=1e-14, atol=1e-16)
