"""`HarmonizedOptimizer` against a literal training loop, and its other promises."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close
from torchjd.aggregation import PCGradWeighting

from ghopt import HarmonizedOptimizer, gh, ghpp
from ghopt.measuring import Harmonization
from tests import models
from tests.literal import (
    Parameters,
    grads,
    literal_gradients,
    literal_step,
    literal_update,
    weights_of,
)
from tests.models import Tasks
from tests.versions import needs

Base = Callable[..., Optimizer]

BASES: dict[str, Base] = {
    "SGD": lambda params: SGD(params, lr=0.05),
    "SGD with momentum": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
    "Adagrad": lambda params: Adagrad(params, lr=0.05),
    "RMSprop": lambda params: RMSprop(params, lr=0.01),
}
base_optimizers = pytest.mark.parametrize("base", BASES.values(), ids=[*BASES])
networks = pytest.mark.parametrize("network", models.NETWORKS)


def training(network: Callable[[int], Tasks], tasks: int) -> tuple[Tasks, Parameters]:
    model = models.make(network, tasks)
    return model, list(model.parameters())


@networks
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
@base_optimizers
def test_twenty_steps_equal_the_update_of_the_paper(
    network: Callable[[int], Tasks], tasks: int, base: Base
) -> None:
    expected, parameters = training(network, tasks)
    actual, _ = training(network, tasks)
    literal, optimizer = (
        base(parameters),
        HarmonizedOptimizer(base(actual.parameters())),
    )
    conflicts = 0
    for seed in range(20):
        data = models.batch(tasks, seed)
        conflicts += literal_step(expected(*data), parameters, literal)
        optimizer.step(losses=actual(*data))
    # Adam divides by sqrt(v) + 1e-8, which magnifies the rounding of a tiny gradient.
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-9, atol=1e-9)
    assert conflicts > 0 or tasks == 1


@networks
@base_optimizers
def test_one_task_is_bit_identical_to_the_base_optimizer(
    network: Callable[[int], Tasks], base: Base
) -> None:
    expected, parameters = training(network, 1)
    actual, _ = training(network, 1)
    plain, optimizer = base(parameters), HarmonizedOptimizer(base(actual.parameters()))
    for seed in range(20):
        data = models.batch(1, seed)
        plain.zero_grad()
        expected(*data)[0].backward()
        plain.step()
        optimizer.zero_grad()
        optimizer.backward(actual(*data))
        optimizer.step()
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def step_input(tasks: int = 2) -> tuple[Tasks, HarmonizedOptimizer, list[Tensor]]:
    """Give a model, its optimizer and losses that are in conflict."""
    model = models.make(models.heads_on_a_trunk, tasks)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    return model, optimizer, model(*models.batch(tasks))


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        iter,
        torch.stack,
        lambda losses: {"align": losses[0], "classify": losses[1]},
    ],
    ids=["list", "tuple", "iterator", "1-D tensor", "mapping"],
)
def test_losses_come_in_many_forms(form: Callable[[list[Tensor]], Any]) -> None:
    expected, optimizer, losses = step_input()
    optimizer.backward(losses)
    actual, optimizer, losses = step_input()
    optimizer.backward(form(losses))
    assert_close(grads(actual), grads(expected), rtol=1e-15, atol=1e-15)


def test_last_tells_names_gramian_weights_and_cosines() -> None:
    model, optimizer, losses = step_input()
    assert optimizer.last is None
    jacobian = literal_gradients(losses, list(model.parameters()))
    optimizer.backward({"align": losses[0], "classify": losses[1]})
    last = optimizer.last
    assert last is not None
    assert last.names == ("align", "classify")
    assert_close(last.gramian, jacobian @ jacobian.T)
    assert_close(last.weights, gh(last.gramian))
    first, second = jacobian
    cosine = torch.cosine_similarity(first, second, dim=0)
    assert_close(
        last.cosines, torch.stack([cosine**0, cosine, cosine, cosine**0]).view(2, 2)
    )
    assert last.gramian.dtype is torch.float64
    assert not any(t.requires_grad for t in (last.gramian, last.weights, last.cosines))


def test_tasks_without_names_are_numbered() -> None:
    _, optimizer, losses = step_input(3)
    optimizer.backward(losses)
    assert optimizer.last is not None
    assert optimizer.last.names == ("0", "1", "2")


def test_the_cosine_with_a_zero_gradient_is_zero() -> None:
    gramian = torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    cosines = Harmonization(("a", "b"), gramian, torch.ones(2)).cosines
    assert cosines.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_gradient_is_added_to_grad_in_place() -> None:
    model, optimizer, losses = step_input()
    before = [torch.full_like(p, 0.5) for p in model.parameters()]
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad
    optimizer.backward(losses)
    added = [grad - 0.5 for grad in before]
    expected, optimizer, losses = step_input()
    optimizer.backward(losses)
    assert_close(added, grads(expected))
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))


def test_a_parameter_that_no_task_reaches_keeps_grad_none_and_its_value() -> None:
    model = models.make(models.frozen_and_unused, 2)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), weight_decay=0.5))
    unused = dict(model.named_parameters())["unused"]
    optimizer.step(losses=model(*models.batch(2)))
    assert unused.grad is None
    assert unused.eq(1).all()


def test_parameters_outside_the_optimizer_get_the_plain_sum() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.trunk.parameters(), lr=0.1))
    losses = model(*models.batch(2))
    heads = list(model.heads.parameters())
    expected = literal_gradients(losses, heads).sum(0)
    optimizer.backward(losses)
    outside = torch.cat([p.grad.reshape(-1) for p in heads if p.grad is not None])
    assert_close(outside, expected)
    assert optimizer.last is not None
    assert (optimizer.last.weights > 1).all()


def test_only_shared_params_are_measured_and_weighted() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    trunk, heads = list(model.trunk.parameters()), list(model.heads.parameters())
    optimizer = HarmonizedOptimizer(
        SGD(model.parameters(), lr=0.1), shared_params=model.trunk.parameters()
    )
    losses = model(*models.batch(2))
    shared, rest = literal_gradients(losses, trunk), literal_gradients(losses, heads)
    optimizer.backward(losses)
    assert optimizer.last is not None
    assert_close(optimizer.last.gramian, shared @ shared.T)
    assert shared[0] @ shared[1] < 0
    actual = torch.cat([p.grad.reshape(-1) for p in trunk if p.grad is not None])
    assert_close(actual, literal_update(shared))
    actual = torch.cat([p.grad.reshape(-1) for p in heads if p.grad is not None])
    assert_close(actual, rest.sum(0))


def test_without_conflict_the_gradient_is_that_of_the_sum() -> None:
    model, optimizer, losses = step_input(1)
    optimizer.backward([losses[0], 0.5 * losses[0]], retain_graph=True)
    actual = grads(model)
    optimizer.zero_grad()
    (losses[0] + 0.5 * losses[0]).backward()  # type: ignore[no-untyped-call]  # torch's
    assert_close(actual, grads(model), rtol=1e-12, atol=1e-15)


def test_a_loss_without_grad_counts_as_a_zero_gradient() -> None:
    expected, optimizer, losses = step_input()
    optimizer.backward(losses[:1])
    actual, optimizer, losses = step_input()
    optimizer.backward([losses[0], losses[1].detach()])
    assert_close(grads(actual)[:2], grads(expected)[:2], rtol=0, atol=0)
    assert optimizer.last is not None
    assert optimizer.last.weights.tolist() == [1.0, 1.0]


def test_the_graph_is_freed_unless_retained() -> None:
    _, optimizer, losses = step_input()
    optimizer.backward(losses, retain_graph=True)
    optimizer.backward([losses[1].detach(), *losses])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        optimizer.backward(losses)


@pytest.mark.parametrize(
    # A batch norm sees another batch.
    "network",
    [network for network in models.NETWORKS if network is not models.batch_norm],
)
def test_micro_batches_equal_the_full_batch(network: Callable[[int], Tasks]) -> None:
    whole, parts = (models.make(network, 3) for _ in range(2))
    data = models.batch(3, size=24)
    optimizer = HarmonizedOptimizer(SGD(whole.parameters(), lr=0.1))
    optimizer.backward(whole(*data))
    optimizer = HarmonizedOptimizer(SGD(parts.parameters(), lr=0.1))
    chunks = zip(torch.split(data[0], 6), torch.split(data[1], 6, dim=1), strict=True)
    for index, chunk in enumerate(chunks):
        losses = [loss / 4 for loss in parts(*chunk)]
        optimizer.backward(losses, accumulate_only=index < 3)
        assert index == 3 or all(grad is None for grad in grads(parts))
    assert_close(grads(parts), grads(whole), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("forget", ["zero_grad", "load_state_dict"])
def test_an_abandoned_accumulation_leaves_nothing_behind(forget: str) -> None:
    expected, optimizer, losses = step_input()
    optimizer.backward(losses)
    actual, optimizer, losses = step_input()
    optimizer.backward(
        [2 * losses[1], losses[0]], retain_graph=True, accumulate_only=True
    )
    state = (optimizer.state_dict(),) if forget == "load_state_dict" else ()
    getattr(optimizer, forget)(*state)
    optimizer.backward(losses)
    assert_close(grads(actual), grads(expected), rtol=0, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_step_harmonizes_what_was_only_accumulated(shared: bool) -> None:
    made = []
    for late in (False, True):
        model = models.make(models.heads_on_a_trunk, 2)
        optimizer = HarmonizedOptimizer(
            SGD(model.parameters(), lr=0.1),
            shared_params=model.trunk.parameters() if shared else None,
        )
        seen: list[object] = []
        optimizer.register_step_pre_hook(
            lambda _, *__, model=model, seen=seen: seen.append(grads(model))
        )
        for seed in range(3):
            losses = model(*models.batch(2, seed))
            optimizer.backward(losses, accumulate_only=late or seed < 2)
        optimizer.step()
        assert optimizer.last is not None
        made.append((grads(model), seen, optimizer.last.weights, weights_of(model)))
        optimizer.step()  # nothing is left to be harmonized
        assert_close(grads(model), made[-1][0], rtol=0, atol=0)
    assert_close(made[1], made[0], rtol=0, atol=0)


def test_what_was_only_accumulated_adds_to_what_is_in_grad() -> None:
    model, optimizer, losses = step_input()
    optimizer.backward(losses, retain_graph=True)
    once = [grad.clone() for grad in grads(model) if grad is not None]
    optimizer.backward(losses, accumulate_only=True)
    optimizer.step()
    assert_close(grads(model), [2 * grad for grad in once])


def test_an_accumulation_between_measurements_ends_late_too() -> None:
    made = []
    for late in (False, True):
        model, optimizer = reusing(3)
        for step in range(2):
            optimizer.zero_grad()
            optimizer.backward(
                model(*models.batch(2, step)), accumulate_only=late and step == 1
            )
            optimizer.step()
        made.append(weights_of(model))
    assert_close(made[1], made[0], rtol=0, atol=0)


def test_late_steps_count_as_steps() -> None:
    model, optimizer = reusing(3)
    measured = []
    optimizer.register_harmonize_hook(lambda found, _: measured.append(found))
    for step in range(7):
        optimizer.zero_grad()
        optimizer.backward(model(*models.batch(2, step)), accumulate_only=True)
        optimizer.step()
        assert len(measured) == 1 + step // 3


def test_micro_batches_must_be_of_the_same_tasks() -> None:
    _, optimizer, losses = step_input(3)
    optimizer.backward(losses[:2], retain_graph=True, accumulate_only=True)
    with pytest.raises(ValueError, match="losses must be those of tasks"):
        optimizer.backward(losses)
    # The error lost nothing: the accumulation goes on.
    optimizer.backward(losses[:2])
    assert optimizer.last is not None
    assert len(optimizer.last.names) == 2


class Failure(Exception):
    """Raised in the middle of a call of ``backward``."""


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("where", ["pass", "weighting"])
def test_an_exception_leaves_grad_as_it_was_and_holds_nothing(
    prior: bool, shared: bool, where: str
) -> None:
    model, _, losses = step_input()
    made: list[weakref.ref[Tensor]] = []

    def run(loss: Tensor, retain_graph: bool) -> None:
        if where == "pass" and not retain_graph:
            raise Failure
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # torch's
        made.extend(weakref.ref(grad) for grad in grads(model) if grad is not None)

    def refuse(_: Tensor) -> Tensor:
        raise Failure

    optimizer = HarmonizedOptimizer(
        SGD(model.parameters(), lr=0.1),
        refuse if where == "weighting" else gh,
        shared_params=model.trunk.parameters() if shared else None,
    )
    optimizer.backward(losses, retain_graph=True, accumulate_only=True)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if prior else None
    before = grads(model)
    values = copy.deepcopy(before)
    with pytest.raises(Failure):
        optimizer.backward(losses, backward_fn=run)
    gc.collect()
    assert all(a is b for a, b in zip(grads(model), before, strict=True))
    assert_close(before, values, rtol=0, atol=0)
    assert made
    assert all(grad() is None for grad in made)


def test_backward_fn_runs_every_pass_and_is_told_whether_to_keep_the_graph() -> None:
    _, optimizer, losses = step_input(3)
    kept = []

    def run(loss: Tensor, retain_graph: bool) -> None:
        kept.append(retain_graph)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    optimizer.backward([*losses[:2], losses[2].detach()], backward_fn=run)
    assert kept == [True, False]


def test_each_loss_counts_with_the_factor_with_which_it_enters_the_total() -> None:
    model, optimizer, (first, second) = step_input()
    constant = torch.tensor(3.0)
    losses = {"a": first, "b": second, "constant": constant}
    optimizer.backward(losses, total=(first + 0.25 * second.reshape(1) + constant) * 8)

    expected, plain, (first, second) = step_input()
    plain.backward([8 * first, 2 * second, 8 * constant])
    assert_close(grads(model), grads(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("total", "error", "message"),
    [
        (lambda *_: 1.0, TypeError, "total must be a tensor, got <class 'float'>"),
        (lambda a, b: torch.stack([a, b]), ValueError, r"a scalar .* shape \[2\]"),
        (lambda a, b: (a + b).detach(), ValueError, "requires_grad=False"),
        (lambda a, _: 2 * a, ValueError, r"total must contain losses\['1'\]"),
    ],
)
def test_a_total_that_is_not_made_of_the_losses_changes_nothing(
    total: Callable[[Tensor, Tensor], Any], error: type[Exception], message: str
) -> None:
    model, optimizer, losses = step_input()
    with pytest.raises(error, match=message):
        optimizer.backward(losses, total=total(*losses))
    assert all(grad is None for grad in grads(model))
    optimizer.backward(losses)  # the graph is as it was


def test_a_total_cannot_tell_a_loss_given_twice_from_two() -> None:
    _, optimizer, (first, _) = step_input()
    with pytest.raises(ValueError, match=r"distinct tensors, got \['0', '1'\]"):
        optimizer.backward([first, first], total=2 * first)


# Fewer passes


def reusing(every: int) -> tuple[Tasks, HarmonizedOptimizer]:
    model = models.make(models.heads_on_a_trunk, 2)
    base = SGD(model.parameters(), lr=0.1)
    return model, HarmonizedOptimizer(base, measure_every=every)


def test_between_measurements_one_pass_takes_the_last_weights() -> None:
    model, optimizer = reusing(3)
    parameters = list(model.parameters())
    weights = torch.ones(2)
    for step in range(7):
        losses = model(*models.batch(2, step))
        jacobian = literal_gradients(losses, parameters)
        passes: list[bool] = []

        def count(
            loss: Tensor, retain_graph: bool, passes: list[bool] = passes
        ) -> None:
            passes.append(retain_graph)
            loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

        optimizer.zero_grad()
        optimizer.backward(losses, backward_fn=count)
        assert optimizer.last is not None
        if step % 3 == 0:
            assert passes == [True, False]
            assert not torch.equal(weights, optimizer.last.weights)
            weights = optimizer.last.weights
            expected = literal_update(jacobian)
        else:
            assert passes == [False]
            assert torch.equal(weights, optimizer.last.weights)
            expected = weights @ jacobian
        update = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        assert_close(update, expected, rtol=1e-10, atol=1e-12)
        optimizer.step()


def test_micro_batches_between_measurements_equal_the_full_batch() -> None:
    (whole, full), (parts, split) = reusing(2), reusing(2)
    for step in range(4):
        inputs, targets = models.batch(2, step)
        full.zero_grad()
        full.backward(whole(inputs, targets))
        split.zero_grad()
        for half in range(2):
            losses = parts(inputs[half::2], targets[:, half::2])
            split.backward([loss / 2 for loss in losses], accumulate_only=half == 0)
        assert_close(grads(parts), grads(whole), rtol=1e-12, atol=1e-12)
        full.step()
        split.step()


def test_other_tasks_are_measured_anew_and_the_same_are_told_by_name() -> None:
    model, optimizer = reusing(10)
    optimizer.param_groups[0]["lr"] = 0.0
    data = models.batch(2)

    def names_and_weights(*names: str) -> tuple[tuple[str, ...], list[float]]:
        losses = dict(zip("ab", model(*data), strict=True))
        optimizer.zero_grad()
        optimizer.backward({name: losses[name[0]] for name in names})
        assert optimizer.last is not None
        optimizer.step()
        return optimizer.last.names, optimizer.last.weights.tolist()

    names, weights = names_and_weights("a", "b")
    first = grads(model)
    assert weights[0] != weights[1]
    assert names_and_weights("b", "a") == (names, weights)
    assert_close(grads(model), first, rtol=1e-12, atol=1e-12)
    assert names_and_weights("a") == (("a",), [1.0])
    assert names_and_weights("b", "a") == (names[::-1], weights[::-1])
    assert names_and_weights("a", "b") == (names[::-1], weights[::-1])


def test_steps_are_counted_and_not_calls_of_backward() -> None:
    model, optimizer = reusing(2)
    measured = []
    optimizer.register_harmonize_hook(lambda found, _: measured.append(found))
    for step in range(4):
        optimizer.zero_grad()
        for seed in range(2):
            optimizer.backward(model(*models.batch(2, 2 * step + seed)))
        optimizer.step()
    assert len(measured) == 4  # twice each in the first step and in the third
    optimizer.backward(model(*models.batch(2)))
    optimizer.zero_grad()  # a step that is not taken serves nobody
    optimizer.backward(model(*models.batch(2)))
    assert len(measured) == 6
    optimizer.step()
    optimizer.step()  # on the same gradients: no weights served it
    optimizer.zero_grad()
    optimizer.backward(model(*models.batch(2)))
    assert len(measured) == 6


@pytest.mark.parametrize("renew", ["load_state_dict", "copy"])
def test_a_loaded_checkpoint_and_a_copy_measure_first(renew: str) -> None:
    model, other = reusing(4)
    other.step(losses=model(*models.batch(2)))
    if renew == "load_state_dict":
        other.load_state_dict(other.state_dict())
    else:
        model, other = copy.deepcopy((model, other))
        assert other.measure_every == 4
    passes: list[Tensor] = []

    def count(loss: Tensor, retain_graph: bool) -> None:
        passes.append(loss)
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    other.backward(model(*models.batch(2)), backward_fn=count)
    assert len(passes) == 2


def test_weights_that_were_not_finite_serve_as_one() -> None:
    model, optimizer = reusing(2)
    first, second = model(*models.batch(2))
    optimizer.backward([first * torch.inf, second])
    assert optimizer.last is not None
    assert optimizer.last.weights.isnan().all()
    optimizer.param_groups[0]["lr"] = 0.0
    model.zero_grad()
    optimizer.step()
    optimizer.backward(model(*models.batch(2)))
    measured = grads(model)
    model.zero_grad()
    sum(model(*models.batch(2))).backward()
    assert_close(grads(model), measured, rtol=1e-12, atol=1e-12)


def test_bad_values_of_measure_every_are_named() -> None:
    base = SGD([torch.ones(2, requires_grad=True)])
    with pytest.raises(TypeError, match=r"measure_every must be an int, got 2\.0"):
        HarmonizedOptimizer(base, measure_every=2.0)  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="measure_every must be at least 1, got 0"):
        HarmonizedOptimizer(base, measure_every=0)
    shared = base.param_groups[0]["params"]
    with pytest.raises(ValueError, match="1 with shared_params, got 3"):
        HarmonizedOptimizer(base, shared_params=shared, measure_every=3)


def test_a_parameter_frozen_in_mid_training_is_left_alone() -> None:
    model, optimizer, losses = step_input()
    optimizer.step(losses=losses)
    bias = model.trunk[0].bias  # type: ignore[index]  # Sequential
    bias.requires_grad_(False)
    kept, grad = bias.clone(), bias.grad.clone()
    optimizer.backward(model(*models.batch(2)))
    assert_close(bias.grad, grad, rtol=0, atol=0)
    assert_close(bias, kept, rtol=0, atol=0)


def test_sparse_embeddings_keep_sparse_gradients() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = HarmonizedOptimizer(torch.optim.SparseAdam(table.parameters()))
    untouched = table.weight[5:].clone()
    for _ in range(2):
        out = table(torch.tensor([0, 1, 1, 4]))
        optimizer.step(losses=[out.sum(), -(out[:2] ** 2).sum()])
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    assert_close(table.weight[5:], untouched, rtol=0, atol=0)


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_sparse_and_dense_gradients_add_up(first: str) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = HarmonizedOptimizer(SGD(table.parameters(), lr=0.1))
    losses = [table(torch.tensor([1, 1])).sum(), table.weight.sum()]
    for loss in losses if first == "sparse" else losses[::-1]:
        optimizer.backward([loss])
    grad = table.weight.grad
    assert grad is not None
    assert grad.to_dense().tolist() == [[1, 1], [3, 3], [1, 1], [1, 1]]


def test_gradients_that_share_memory_are_copied() -> None:
    a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    shared = torch.zeros(3, dtype=torch.float64)

    def into_shared_memory(loss: Tensor, retain_graph: bool) -> None:
        for p, grad in zip((a, b), torch.autograd.grad(loss, (a, b)), strict=True):
            p.grad = shared.view(3) if retain_graph else shared
            p.grad.copy_(grad)

    optimizer = HarmonizedOptimizer(SGD([a, b], lr=0.1))
    losses = [(a + 2 * b).sum(), (3 * a + 5 * b).sum()]
    optimizer.backward(losses, backward_fn=into_shared_memory)
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.data_ptr() != b.grad.data_ptr()
    # Both parameters of a pass share memory: the second gradient overwrote the first.
    assert a.grad.tolist() == b.grad.tolist() == [7.0] * 3


def test_a_torchjd_weighting_plugs_in_unchanged() -> None:
    model, _, losses = step_input()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), PCGradWeighting())
    optimizer.backward(losses)
    assert optimizer.last is not None
    # Of two tasks PCGrad is GH.
    assert_close(optimizer.last.weights, gh(optimizer.last.gramian))


@needs.adam_on_meta
def test_the_whole_step_reads_no_value_back_to_the_host() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        for weighting in (gh, ghpp):
            base = AdamW(model.parameters(), foreach=True)
            optimizer = HarmonizedOptimizer(base, weighting)
            for _ in range(2):
                out = model(torch.empty(5, 4))
                optimizer.step(losses=[out.sum(), out.square().mean()])


# The contract of torch.optim.Optimizer


def test_it_is_an_optimizer_whose_groups_state_and_defaults_are_the_base_s() -> None:
    model, optimizer, losses = step_input()
    base = optimizer.base_optimizer
    optimizer.step(losses=losses)
    optimizer.load_state_dict(optimizer.state_dict())
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    replaced = copy.copy(base.param_groups), copy.copy(base.state), dict(base.defaults)
    optimizer.param_groups, optimizer.state, optimizer.defaults = replaced
    assert (base.param_groups, base.state, base.defaults) == replaced
    assert base.param_groups is replaced[0]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    assert base.param_groups[1]["lr"] == 0.5
    assert len(list(model.parameters())) == len(base.param_groups[0]["params"])


def test_a_checkpoint_loads_with_and_without_the_wrapper() -> None:
    model, optimizer, losses = step_input()
    optimizer = HarmonizedOptimizer(AdamW(model.parameters()))
    optimizer.step(losses=losses)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    plain = AdamW(model.parameters())
    plain.load_state_dict(state)
    assert_close(plain.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    again = HarmonizedOptimizer(AdamW(model.parameters()))
    again.load_state_dict(state_dict=plain.state_dict())
    assert_close(again.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]
)
def test_copies_train_on_their_own(copied: Callable[[Any], Any]) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(
        AdamW(model.parameters()), ghpp, shared_params=model.trunk.parameters()
    )
    optimizer.step(losses=model(*models.batch(2)))
    again, other = copied((model, optimizer))
    for m, o in ((model, optimizer), (again, other)):
        o.step(losses=m(*models.batch(2, 1)))
    assert other.weighting is ghpp
    assert other.base_optimizer is not optimizer.base_optimizer
    assert_close(weights_of(again), weights_of(model), rtol=0, atol=0)


@pytest.fixture
def fired() -> Iterator[list[str]]:
    """Count the global step hooks of torch."""
    names: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: names.append("pre")),
        register_optimizer_step_post_hook(lambda *_: names.append("post")),
    ]
    yield names
    for handle in handles:
        handle.remove()


def test_step_hooks_fire_once(fired: list[str]) -> None:
    _, optimizer, losses = step_input()
    seen: list[object] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append(args))
    optimizer.register_step_post_hook(lambda *args: seen.append(args))
    optimizer.step(losses=losses)
    assert seen == [(optimizer, (optimizer,), {"losses": losses})] * 2
    assert fired == ["pre", "post"]


def test_a_step_pre_hook_may_change_the_arguments() -> None:
    _, optimizer, losses = step_input()

    def swap(_: Optimizer, args: Any, __: Any) -> Any:
        return args, {"losses": losses[:1]}

    optimizer.register_step_pre_hook(swap)
    optimizer.step(losses=losses)
    assert optimizer.last is not None
    assert len(optimizer.last.names) == 1


def test_state_dict_hooks_fire_once_and_may_change_the_state() -> None:
    _, optimizer, _ = step_input()
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    optimizer.register_state_dict_post_hook(lambda _, state: state.update(other=2))
    state = optimizer.state_dict()
    assert (state["note"], state["other"]) == (1, 2)

    def halve(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 0.05} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(state)
    assert seen == ["save", "load", "loaded"]
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert state["param_groups"][0]["lr"] == 0.1


def test_public_names_are_the_base_s_and_private_ones_are_not() -> None:
    _, optimizer, _ = step_input()
    optimizer.base_optimizer.train = lambda: "training"  # type: ignore[attr-defined]  # as some bases have
    optimizer.base_optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # likewise
    assert optimizer.train() == "training"
    with pytest.raises(AttributeError, match="_step_supports_amp_scaling"):
        _ = optimizer._step_supports_amp_scaling
    with pytest.raises(AttributeError, match="nonsense"):
        _ = optimizer.nonsense


def test_schedulers_see_the_base_s_learning_rate() -> None:
    _, optimizer, losses = step_input()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=5)
    optimizer.step(losses=losses)
    scheduler.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]


def test_a_closure_goes_to_the_base_and_its_value_comes_back() -> None:
    model = models.make(models.one_head_for_all, 2)
    optimizer = HarmonizedOptimizer(torch.optim.LBFGS(model.parameters(), lr=0.5))
    data = models.batch(2)

    def closure() -> float:
        optimizer.zero_grad()
        losses = model(*data)
        optimizer.backward(losses)
        return float(torch.stack(losses).sum().detach())

    before = sum(model(*data))
    for _ in range(6):
        optimizer.step(closure)
    assert sum(model(*data)) < before


def test_repr_names_the_weighting_and_the_base() -> None:
    _, optimizer, _ = step_input()
    assert repr(optimizer).startswith("HarmonizedOptimizer(weighting=gh, SGD (")


# Errors


def wrong_shape(gramian: Tensor) -> Tensor:
    return gramian[0, :1]


def integers(gramian: Tensor) -> Tensor:
    return torch.ones(len(gramian), dtype=torch.int64)


def trainable(gramian: Tensor) -> Tensor:
    return nn.Parameter(gramian[0].clone())


def no_tensor(gramian: Tensor) -> Any:
    return gramian[0].tolist()


@pytest.mark.parametrize(
    ("weighting", "error", "message"),
    [
        (wrong_shape, ValueError, r"weighting must return .* got .*\[1\]"),
        (integers, ValueError, "weighting must return .* got torch.int64"),
        (trainable, ValueError, "weighting must return weights without grad"),
        (no_tensor, TypeError, "weighting must return a tensor, got .*list"),
    ],
)
def test_a_weighting_that_breaks_its_contract_changes_nothing(
    weighting: Any, error: type[Exception], message: str
) -> None:
    model, _, losses = step_input()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), weighting)
    with pytest.raises(error, match=message):
        optimizer.backward(losses)
    assert grads(model) == [None] * 6
    assert optimizer.last is None


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        ([], ValueError, "losses must hold at least one loss"),
        ({}, ValueError, "losses must hold at least one loss"),
        (3.0, TypeError, "losses must be a mapping or iterable, got .*float"),
        (
            torch.ones(()),
            ValueError,
            r"pass \[a, b\], not a \+ b",
        ),
        ([1.0], TypeError, "losses.*'0'.* must be a tensor, got .*float"),
        ({"a": torch.ones(2)}, ValueError, r"losses.*'a'.* must be a real .*\[2\]"),
        ([torch.ones((), dtype=torch.complex64)], ValueError, "must be a real scalar"),
        ([torch.ones(())], ValueError, "losses must require grad"),
        ({1: torch.ones(()), "1": torch.ones(())}, ValueError, "distinct names"),
    ],
)
def test_bad_losses_are_named_and_change_nothing(
    losses: Any, error: type[Exception], message: str
) -> None:
    model, optimizer, good = step_input()
    optimizer.backward(good)
    before = copy.deepcopy(grads(model))
    for call in (optimizer.backward, lambda given: optimizer.step(losses=given)):
        with pytest.raises(error, match=message):
            call(losses)
    assert_close(grads(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("shared", [True, False])
def test_losses_that_reach_no_parameter_are_an_error(shared: bool) -> None:
    model, _, _ = step_input()
    optimizer = HarmonizedOptimizer(
        SGD(model.parameters(), lr=0.1),
        shared_params=model.trunk.parameters() if shared else None,
    )
    elsewhere = torch.ones((), requires_grad=True)
    with pytest.raises(ValueError, match=r"losses must reach a (shared )?parameter"):
        optimizer.backward([elsewhere * 2])
    assert grads(model) == [None] * 6


def test_a_closure_and_losses_together_are_an_error() -> None:
    _, optimizer, losses = step_input()
    with pytest.raises(ValueError, match="closure must be None where losses are given"):
        optimizer.step(lambda: 0.0, losses=losses)


def test_bad_arguments_of_the_constructor_are_named() -> None:
    model, wrapped, _ = step_input()
    optimizer = wrapped.base_optimizer
    with pytest.raises(TypeError, match=r"base_optimizer must be .* got .*Linear"):
        HarmonizedOptimizer(nn.Linear(1, 1))  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match="weighting must be callable, got 'gh'"):
        HarmonizedOptimizer(optimizer, "gh")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match="shared_params must hold a parameter"):
        HarmonizedOptimizer(optimizer, shared_params=[])
    strange = [*model.parameters(), torch.ones(2)]
    with pytest.raises(ValueError, match=r"shared_params .* shape \[2\] at 6"):
        HarmonizedOptimizer(optimizer, shared_params=strange)
