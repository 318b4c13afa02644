"""Replicated models: the gradients of each task are averaged over the ranks first."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, AdamW
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer
from ghopt.ranks import Ranks
from tests import models
from tests.literal import literal_step, weights_of
from tests.models import Tasks
from tests.ranks import RankError, needs_signals, run_on_ranks
from tests.versions import needs

STEPS = 20


def share(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cut this rank's part out of a batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return inputs.chunk(size)[rank], targets.chunk(size, dim=1)[rank]


def one_process(network: Callable[[int], Tasks], tasks: int) -> dict[str, Tensor]:
    """Train on the whole batch, on the update of the paper."""
    model = models.make(network, tasks)
    parameters = list(model.parameters())
    base = AdamW(parameters, lr=0.01)
    conflicts = 0
    for step in range(STEPS):
        losses = model(*models.batch(tasks, step))
        conflicts += literal_step(losses, parameters, base)
    assert conflicts > STEPS / 2
    return weights_of(model)


def train_replicas(
    network: Callable[[int], Tasks], tasks: int, how: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    """Train with DDP, each rank on its share of the batch."""
    model = models.make(network, tasks)
    ddp = DistributedDataParallel(model, **options)
    group = {"model": ddp, "group": dist.group.WORLD, "default": True}[how]
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    for step in range(STEPS):
        inputs, targets = share(*models.batch(tasks, step))
        with ddp.no_sync():
            losses = ddp(inputs, targets)
            optimizer.zero_grad()
            optimizer.backward(losses, sync_group=group)
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("network", "tasks", "how", "options"),
    [
        (models.heads_on_a_trunk, 2, "model", {}),
        (models.heads_on_a_trunk, 3, "group", {"find_unused_parameters": True}),
        (models.one_head_for_all, 3, "default", {"gradient_as_bucket_view": True}),
        (models.tied_weights, 2, "model", {"gradient_as_bucket_view": True}),
        (models.frozen_and_unused, 2, "default", {}),
        (models.embedding, 2, "model", {"broadcast_buffers": False}),
    ],
)
def test_replicas_equal_one_process_on_the_whole_batch(
    size: int,
    network: Callable[[int], Tasks],
    tasks: int,
    how: str,
    options: dict[str, Any],
) -> None:
    expected = one_process(network, tasks)
    for weights in run_on_ranks(size, train_replicas, network, tasks, how, options):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


# Features


def features_of_one_process(tasks: int, accumulated: bool = False) -> dict[str, Any]:
    """Train on the whole batch, as ``test_features.py`` compares with its oracle."""
    model = models.make(models.heads_on_a_trunk, tasks)
    both = models.WithFeatures(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    conflicts = 0
    for step in range(STEPS):
        for _ in range(1 + accumulated):
            losses, z = both(*models.batch(tasks, step))
            optimizer.backward(losses, features=z)
        assert optimizer.last is not None
        conflicts += bool((optimizer.last.gramian < 0).any())
        optimizer.step()
        optimizer.zero_grad()
    assert conflicts > STEPS / 2
    return {**weights_of(model), "gramian": optimizer.last.gramian}  # type: ignore[union-attr]


def train_on_features(how: str, tasks: int, views: bool) -> dict[str, Any]:
    """Train with DDP, armed as ever or inside ``no_sync``, each rank on its share."""
    model = models.make(models.heads_on_a_trunk, tasks)
    ddp = DistributedDataParallel(
        models.WithFeatures(model), gradient_as_bucket_view=views
    )
    groups: dict[str, Any] = {"named": ddp, "local": ddp, "group": True}
    group = groups.get(how)
    optimizer = HarmonizedOptimizer(
        AdamW(
            model.heads.parameters() if how == "outside" else model.parameters(),
            lr=0.01,
        )
    )
    other = AdamW(model.trunk.parameters(), lr=0.01)
    for step in range(STEPS):
        inputs, targets = share(*models.batch(tasks, step))
        for _ in range(1 + (how == "accumulated")):
            with ddp.no_sync() if how in ("local", "group") else nullcontext():
                losses, z = ddp(inputs, targets)
                optimizer.backward(losses, features=z, sync_group=group)
        optimizer.step()
        if how == "outside":
            other.step()
            other.zero_grad()
        optimizer.zero_grad()
    return {**weights_of(model), "gramian": optimizer.last.gramian}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("how", "views"),
    [
        ("armed", False),
        ("named", True),
        ("local", True),
        ("group", False),
        ("outside", False),
        ("accumulated", True),
    ],
)
def test_features_of_replicas_equal_those_of_one_process(how: str, views: bool) -> None:
    expected = features_of_one_process(3, accumulated=how == "accumulated")
    first, second = run_on_ranks(2, train_on_features, how, 3, views)
    assert_close(first, expected, rtol=1e-13, atol=1e-14)
    assert_close(first, second, rtol=0, atol=0)


def features_with_a_head_apart(sync_group: str) -> list[Tensor | None]:
    """Let an armed model average its own gradients, and ghopt those of a head outside."""
    model = models.make(models.heads_on_a_trunk, 2)
    trunk = DistributedDataParallel(model.trunk)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    inputs, targets = share(*models.batch(2))
    z = trunk(inputs)
    pairs = zip(model.heads, targets, strict=True)
    losses = [(head(z)[:, 0] - y).square().mean() for head, y in pairs]
    group = {"group": True, "none": None}[sync_group]
    optimizer.backward(losses, features=z, sync_group=group)
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("sync_group", ["group", "none"])
def test_with_features_what_no_armed_model_averages_is_averaged_too(
    sync_group: str,
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    losses, z = models.WithFeatures(model)(*models.batch(2))
    HarmonizedOptimizer(SGD(model.parameters())).backward(losses, features=z)
    expected = [p.grad for p in model.parameters()]
    for found in run_on_ranks(2, features_with_a_head_apart, sync_group):
        assert_close(found, expected, rtol=1e-13, atol=1e-15)


def features_with_labels_of_its_own() -> tuple[Any, Any]:
    model = models.make(models.heads_on_a_trunk, 3)
    ddp = DistributedDataParallel(models.WithFeatures(model))
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    losses, z = ddp(*share(*models.batch(3)))
    rank = dist.get_rank()
    named = dict(zip("abc", losses, strict=True))
    named = {name: named[name] for name in ("ab", "bc")[rank]}
    # The head without labels has a part in the pass, as DDP wants of each parameter.
    named["b"] = named["b"] + 0 * losses[2 - 2 * rank]
    optimizer.backward(named, features=z)
    assert optimizer.last is not None
    return optimizer.last, [p.grad for p in model.parameters()]


def test_features_of_ranks_with_other_tasks_are_those_of_all_tasks() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    both, (inputs, targets) = models.WithFeatures(model), models.batch(3)
    parts = zip(inputs.chunk(2), targets.chunk(2, dim=1), strict=True)
    (left, right), (z, y) = zip(*(both(*part) for part in parts), strict=True)
    losses = {"a": left[0] / 2, "b": (left[1] + right[1]) / 2, "c": right[2] / 2}
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    optimizer.backward(losses, features=[z, y])
    assert optimizer.last is not None
    for last, found in run_on_ranks(2, features_with_labels_of_its_own):
        assert last.names == ("a", "b", "c")
        assert_close(last.gramian, optimizer.last.gramian, rtol=1e-13, atol=1e-16)
        expected = [p.grad for p in model.parameters()]
        assert_close(found, expected, rtol=1e-13, atol=1e-15)


def features_that_are_refused(how: str) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    options: dict[str, Any] = {"static": {"static_graph": True}}.get(how, {})
    ddp = DistributedDataParallel(models.WithFeatures(model), **options)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    with ddp.no_sync() if how == "local" else nullcontext():
        losses, z = ddp(*share(*models.batch(2)))
        optimizer.backward(losses, features=z)


@pytest.mark.parametrize(
    ("how", "message"),
    [("local", "last ran inside no_sync"), ("static", "static_graph")],
)
def test_features_of_models_that_would_go_wrong_are_refused(
    how: str, message: str
) -> None:
    outcomes = run_on_ranks(2, features_that_are_refused, how, may_fail=True)
    assert all(message in str(outcome) for outcome in outcomes)


def features_that_stay_local() -> list[Tensor | None]:
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(models.WithFeatures(model))
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    with ddp.no_sync():
        losses, z = ddp(*share(*models.batch(2)))
        optimizer.backward(losses, features=z, sync_group=False)
    return [p.grad for p in model.parameters()]


def test_features_may_stay_local_on_purpose() -> None:
    for rank, found in enumerate(run_on_ranks(2, features_that_stay_local)):
        model = models.make(models.heads_on_a_trunk, 2)
        inputs, targets = models.batch(2)
        part = inputs.chunk(2)[rank], targets.chunk(2, dim=1)[rank]
        losses, z = models.WithFeatures(model)(*part)
        HarmonizedOptimizer(SGD(model.parameters())).backward(losses, features=z)
        assert_close(found, [p.grad for p in model.parameters()])


def features_with_a_weighting(how: str) -> Any:
    """Draw the weights at random, or fail, on rank 1."""
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(models.WithFeatures(model))

    def weighting(gramian: Tensor) -> Tensor:
        if how == "fails" and dist.get_rank():
            raise ArithmeticError("no weights today")
        return torch.full_like(gramian[0], 1.0 + dist.get_rank())

    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), weighting)
    losses, z = ddp(*share(*models.batch(2)))
    if how == "stale" and dist.get_rank():
        z = z * 1
    optimizer.backward(losses, features=z)
    assert optimizer.last is not None
    return optimizer.last.weights


@pytest.mark.parametrize(
    ("how", "told"), [("fails", "no weights today"), ("stale", "on which none depends")]
)
def test_a_rank_that_fails_with_features_is_an_error_on_all(
    how: str, told: str
) -> None:
    first, second = run_on_ranks(2, features_with_a_weighting, how, may_fail=True)
    assert "rank(s) [1] failed in backward()" in str(first)
    assert told in str(second)


def test_all_ranks_take_the_weights_of_the_first_with_features() -> None:
    for weights in run_on_ranks(2, features_with_a_weighting, "draws"):
        assert weights.tolist() == [1, 1]


def features_measured_less_often(local: bool) -> dict[str, Tensor]:
    model = models.make(models.heads_on_a_trunk, 3)
    ddp = DistributedDataParallel(models.WithFeatures(model))
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01), measure_every=3)
    for step in range(STEPS):
        with ddp.no_sync() if local else nullcontext():
            losses, z = ddp(*share(*models.batch(3, step)))
            optimizer.backward(losses, features=z, sync_group=ddp if local else None)
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize("local", [False, True])
def test_replicas_may_measure_at_the_features_less_often(local: bool) -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    both = models.WithFeatures(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01), measure_every=3)
    for step in range(STEPS):
        losses, z = both(*models.batch(3, step))
        optimizer.step(losses=losses, features=z)
    first, second = run_on_ranks(2, features_measured_less_often, local)
    assert_close(first, weights_of(model), rtol=1e-13, atol=1e-14)
    assert_close(first, second, rtol=0, atol=0)


# The step


def one_projected_process(tasks: int) -> dict[str, Tensor]:
    """Train on the whole batch, so that no step opposes a task.

    With what ``test_change.py`` compares with the literal step.
    """
    model = models.make(models.heads_on_a_trunk, tasks)
    base = AdamW(model.parameters(), lr=0.05)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    for step in range(STEPS):
        optimizer.step(losses=model(*models.batch(tasks, step)))
    return weights_of(model)


def train_projected_replicas(micros: int) -> dict[str, Tensor]:
    model = models.make(models.heads_on_a_trunk, 3)
    ddp = DistributedDataParallel(model)
    base = AdamW(model.parameters(), lr=0.05)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    for step in range(STEPS):
        inputs, targets = share(*models.batch(3, step))
        optimizer.zero_grad()
        with ddp.no_sync():
            for micro in range(micros):
                losses = ddp(inputs[micro::micros], targets[:, micro::micros])
                optimizer.backward(
                    [loss / micros for loss in losses],
                    accumulate_only=micro < micros - 1,
                    sync_group=ddp,
                )
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("micros", [1, 2])
def test_a_projected_step_of_replicas_equals_that_of_one_process(micros: int) -> None:
    expected = one_projected_process(3)
    first, second = run_on_ranks(2, train_projected_replicas, micros)
    assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert_close(first, second, rtol=0, atol=0)


def train_with_tasks_that_come_and_go(how: str) -> dict[str, Tensor]:
    """Give each rank labels of its own: rank 0 of a and b, rank 1 of b and c."""
    model = models.make(models.heads_on_a_trunk, 3)
    ddp = DistributedDataParallel(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    mine = ("a", "b") if dist.get_rank() == 0 else ("b", "c")
    for step in range(STEPS):
        inputs, targets = share(*models.batch(3, step))
        optimizer.zero_grad()
        with ddp.no_sync():
            losses = dict(zip("abc", ddp(inputs, targets), strict=True))
            here = {name: losses[name] for name in mine}
            if how == "finished":
                optimizer.backward(here, accumulate_only=True, sync_group=ddp)
                optimizer.finish_accumulation(sync_group=ddp)
            else:
                optimizer.backward(here, sync_group=ddp)
        assert optimizer.last is not None
        assert optimizer.last.names == ("a", "b", "c")
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("how", ["at once", "finished"])
def test_ranks_with_other_tasks_train_on_all_of_them(how: str) -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    parameters = list(model.parameters())
    base = AdamW(parameters, lr=0.01)
    for step in range(STEPS):
        inputs, targets = models.batch(3, step)
        pairs = zip(inputs.chunk(2), targets.chunk(2, dim=1), strict=True)
        (a, b, _), (_, other, c) = (model(*pair) for pair in pairs)
        # A rank without a task counts as zero in its mean.
        literal_step([a / 2, (b + other) / 2, c / 2], parameters, base)
    first, second = run_on_ranks(2, train_with_tasks_that_come_and_go, how)
    assert_close(first, weights_of(model), rtol=1e-12, atol=1e-12)
    assert_close(second, weights_of(model), rtol=1e-12, atol=1e-12)


def finished_over_ranks(measure_every: int) -> list[Tensor | None]:
    """Finish late with a model of which the optimizer has the trunk alone."""
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    base = SGD(model.trunk.parameters(), lr=0.1)
    optimizer = HarmonizedOptimizer(base, measure_every=measure_every)
    optimizer.finish_accumulation(sync_group=ddp)  # nothing is pending on any rank
    for step in range(2):
        model.zero_grad()
        optimizer.zero_grad()
        with ddp.no_sync():
            losses = ddp(*share(*models.batch(2, step)))
            optimizer.backward(losses, accumulate_only=True, sync_group=ddp)
            optimizer.finish_accumulation(sync_group=ddp)
    return grads_of(model)


@pytest.mark.parametrize("measure_every", [1, 3])
def test_finishing_late_averages_what_is_outside_the_optimizer_too(
    measure_every: int,
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    base = SGD(model.trunk.parameters(), lr=0.1)
    optimizer = HarmonizedOptimizer(base, measure_every=measure_every)
    for step in range(2):
        model.zero_grad()
        optimizer.zero_grad()
        optimizer.backward(model(*models.batch(2, step)), accumulate_only=True)
        optimizer.finish_accumulation()
    for grads in run_on_ranks(2, finished_over_ranks, measure_every):
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def step_on_own_gradients() -> str:
    ddp, optimizer, model = ddp_step()
    optimizer.project_step = True
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))
        with pytest.raises(
            ValueError, match=r"sync_group must average .* got False"
        ) as e:
            optimizer.backward(losses, sync_group=False)
        optimizer.backward(losses, accumulate_only=True, sync_group=ddp)
        with pytest.raises(ValueError, match=r"sync_group must average .* got False"):
            optimizer.finish_accumulation(sync_group=False)
    assert not any(p.grad is not None for p in model.parameters())
    return str(e.value)


def test_a_step_projected_on_gradients_of_each_rank_alone_is_refused() -> None:
    first, _ = run_on_ranks(2, step_on_own_gradients)
    assert "the parameters would drift apart" in first


def ddp_step(
    **options: Any,
) -> tuple[DistributedDataParallel, HarmonizedOptimizer, Tasks]:
    """Give what a test of one step needs."""
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model, **options)
    return ddp, HarmonizedOptimizer(SGD(model.parameters(), lr=0.1)), model


def grads_of(model: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in model.parameters()]


# Micro-batches, mixed precision, parts of the model


def train_with_micro_batches() -> dict[str, Tensor]:
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    for step in range(STEPS):
        inputs, targets = share(*models.batch(2, step))
        optimizer.zero_grad()
        with ddp.no_sync():
            for micro in range(4):
                losses = ddp(inputs[micro::4], targets[:, micro::4])
                optimizer.backward(
                    [loss / 4 for loss in losses],
                    accumulate_only=micro < 3,
                    sync_group=ddp,
                )
        optimizer.step()
    return weights_of(model)


def test_micro_batches_on_replicas_equal_one_process_on_the_whole_batch() -> None:
    expected = one_process(models.heads_on_a_trunk, 2)
    for weights in run_on_ranks(2, train_with_micro_batches):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def train_with_few_measurements(alone: bool) -> dict[str, Tensor]:
    model = models.make(models.heads_on_a_trunk, 2)
    base = AdamW(model.parameters(), lr=0.01)
    optimizer = HarmonizedOptimizer(base, measure_every=3)
    for step in range(STEPS):
        batch = models.batch(2, step)
        losses = model(*(batch if alone else share(*batch)))
        optimizer.zero_grad()
        optimizer.backward(losses, sync_group=not alone)
        optimizer.step()
    return weights_of(model)


def test_replicas_may_measure_the_conflict_less_often() -> None:
    expected = train_with_few_measurements(alone=True)
    for weights in run_on_ranks(2, train_with_few_measurements, False):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def train_with_loss_scaling() -> tuple[dict[str, Tensor], float]:
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for step in range(STEPS + 1):
        inputs, targets = share(*models.batch(2, step % STEPS if step else 0))
        with ddp.no_sync():
            losses = ddp(inputs, targets)
            if step == STEPS and dist.get_rank() == 1:
                losses[0] = losses[0] * torch.inf  # an overflow on one rank only
            optimizer.zero_grad()
            optimizer.backward(scaler.scale(losses), sync_group=ddp)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
    return weights_of(model), scaler.get_scale()


def test_loss_scaling_works_and_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    expected = one_process(models.heads_on_a_trunk, 2)
    for weights, scale in run_on_ranks(2, train_with_loss_scaling):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)
        assert scale == 2.0**9


def two_optimizers_step(shared_only: bool) -> list[Tensor | None]:
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    trunk = list(model.trunk.parameters())
    if shared_only:
        base = SGD(model.parameters())
        optimizer = HarmonizedOptimizer(base, shared_params=trunk)
    else:  # the heads belong to another optimizer
        optimizer = HarmonizedOptimizer(SGD(trunk))
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))
        if dist.get_rank() == 1:  # the second head is reached on the other one only
            losses[1] = losses[1].detach() + 0 * losses[0]
        optimizer.backward(losses, sync_group=ddp)
    return grads_of(model)


@pytest.mark.parametrize("shared_only", [False, True])
def test_parameters_that_get_the_plain_sum_are_averaged_too(shared_only: bool) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.trunk.parameters()))
    inputs, targets = models.batch(2)
    first = model(inputs, targets)[0]
    second = model(inputs[:8], targets[:, :8])[1] / 2
    optimizer.backward([first, second])
    for grads in run_on_ranks(2, two_optimizers_step, shared_only):
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def partly_used_step() -> list[Tensor | None]:
    """Task 1 uses ``unused`` on rank 1 only; on rank 0 task 1 is no tensor with grad."""
    model = models.make(models.frozen_and_unused, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    first, second = model(*models.batch(2))
    if dist.get_rank() == 1:
        second = second + model.get_parameter("unused").sum()
    else:
        second = torch.tensor(1.0)
    optimizer.backward([first, second], sync_group=True)
    return grads_of(model)


def test_a_parameter_used_on_one_rank_only_counts_as_zero_on_the_others() -> None:
    model = models.make(models.frozen_and_unused, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    first, second = model(*models.batch(2))
    second = (second + model.get_parameter("unused").sum()) / 2
    optimizer.backward([first, second])
    for grads in run_on_ranks(2, partly_used_step):
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def unreached_step() -> list[Tensor | None]:
    ddp, optimizer, model = ddp_step(find_unused_parameters=True)
    with ddp.no_sync():
        optimizer.backward(ddp(*share(*models.batch(2)))[:1], sync_group=ddp)
    return grads_of(model)


def test_a_parameter_that_no_rank_reaches_keeps_grad_none() -> None:
    for grads in run_on_ranks(2, unreached_step):
        assert [grad is None for grad in grads] == [False] * 4 + [True] * 2


# What a mean is


def means(which: str) -> list[tuple[Tensor | None, Tensor | None]]:
    """Average gradients of many kinds; pair the means with what was to be expected."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for _ in range(size)
        ]

    def only(of: int, grads: list[Tensor]) -> list[Tensor | None]:
        return [grad if rank == of else None for rank, grad in enumerate(grads)]

    def sparse(grads: list[Tensor]) -> list[Tensor]:
        return [(grad * (grad > 0)).to_sparse() for grad in grads]

    cases: dict[str, list[list[Any]]] = {
        "small, packed": [drawn(3), drawn(2, 2), drawn(5, dtype=torch.float64)],
        "none": [[None] * size, drawn(2)],
        "on one rank": [only(0, drawn(4)), only(1, drawn(2, 3)), drawn(2)],
        "empty and 0-dim": [drawn(0), drawn(), drawn(3, 0)],
        "halves": [drawn(9, dtype=torch.float16), drawn(9, dtype=torch.bfloat16)],
        "complex": [drawn(4, dtype=torch.complex64), only(1, drawn(2, 2))],
        "long": [drawn(2**20), only(1, drawn(2**20 + 1)), drawn(3)],
        "long, not contiguous": [[grad.T for grad in drawn(1024, 1025)]],
        "channels last": [
            [g.to(memory_format=torch.channels_last) for g in drawn(2, 3, 4, 4)]
        ],
        "many messages": [drawn(2**20 - 1) for _ in range(7)],
        "sparse": [sparse(drawn(6, 2)), only(1, sparse(drawn(6, 2)))],
        "sparse and dense": [[sparse(drawn(6, 2))[0], *drawn(6, 2)[1:]]],
    }
    given = cases[which]
    parameters = [
        torch.zeros_like(next(g for g in ranks if g is not None)).to_dense()
        if any(g is not None for g in ranks)
        else torch.zeros(2)
        for ranks in given
    ]
    mine = {
        parameter: ranks[rank].clone()
        for parameter, ranks in zip(parameters, given, strict=True)
        if ranks[rank] is not None
    }
    speaker = Ranks(dist.group.WORLD)  # type: ignore[arg-type]  # is initialised
    speaker.agree(["a"], parameters, [], listed=False)
    speaker.average(mine)()
    expected = [
        None
        if all(grad is None for grad in ranks)
        else sum(grad.to_dense() / size for grad in ranks if grad is not None)
        for ranks in given
    ]
    got = [mine.get(parameter) for parameter in parameters]
    for mean in got:
        assert mean is None or mean.is_sparse == (which == "sparse")
    return [
        (None if mean is None else mean.to_dense(), wanted)
        for mean, wanted in zip(got, expected, strict=True)
    ]


@pytest.mark.parametrize(
    "which",
    [
        "small, packed",
        "none",
        "on one rank",
        "empty and 0-dim",
        "halves",
        "complex",
        "long",
        "long, not contiguous",
        "channels last",
        "many messages",
        "sparse",
        "sparse and dense",
    ],
)
def test_the_mean_over_the_ranks_is_the_mean(which: str) -> None:
    for pairs in run_on_ranks(2, means, which):
        for mean, expected in pairs:
            assert_close(mean, expected)


# Several models


class Parts(nn.Module):
    """A generator and two heads, each a DDP model, as in MCD, DANN and GANs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g = nn.Sequential(nn.Linear(6, 8), nn.Tanh()).double()
        self.f = nn.Linear(8, 1).double()
        self.d = nn.Linear(8, 1).double()

    def losses(self, g: nn.Module, f: nn.Module, d: nn.Module) -> list[Tensor]:
        """Two tasks through G and F, of which one also through D."""
        inputs, _ = models.batch(2)
        size = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        hidden = g(inputs.chunk(size)[rank])
        out = f(hidden)
        return [(out - 1).square().mean(), (out + 1).square().mean() + d(hidden).mean()]


def step_of_parts(unsynced: str, given: str | None, in_optimizer: str) -> Any:
    """Run one backward; give the gradients by name, or the error.

    Args:
        unsynced: the models whose forward pass is under ``no_sync``.
        given: those of ``sync_group``; "" for the default group, None for none.
        in_optimizer: those whose parameters are harmonized.
    """
    parts = Parts()
    ddp = {name: DistributedDataParallel(getattr(parts, name)) for name in "gfd"}
    params = [p for name in in_optimizer for p in getattr(parts, name).parameters()]
    optimizer = HarmonizedOptimizer(SGD(params, lr=0.1))
    group: Any = [ddp[name] for name in given] if given else given is not None or None
    with ExitStack() as stack:
        for name in unsynced:
            stack.enter_context(ddp[name].no_sync())
        try:
            optimizer.backward(parts.losses(*ddp.values()), sync_group=group)
        except RuntimeError as error:
            assert all(grad is None for grad in grads_of(parts))
            return str(error)
    return {name: p.grad for name, p in parts.named_parameters()}


def grads_of_parts(in_optimizer: str) -> dict[str, Tensor | None]:
    parts = Parts()
    params = [p for name in in_optimizer for p in getattr(parts, name).parameters()]
    optimizer = HarmonizedOptimizer(SGD(params, lr=0.1))
    optimizer.backward(parts.losses(parts.g, parts.f, parts.d))
    return {name: p.grad for name, p in parts.named_parameters()}


@pytest.mark.parametrize(
    ("unsynced", "given", "in_optimizer"),
    [
        ("gfd", "gfd", "g"),
        ("gfd", "dgf", "f"),
        ("gfd", "gfd", "gfd"),
        ("gfd", "", "gfd"),  # all that a group needs to know
        ("gfd", "g", "gfd"),
        ("gf", "gf", "g"),  # one pass reaches D, which averages it
    ],
)
def test_several_models_are_averaged_together(
    unsynced: str, given: str, in_optimizer: str
) -> None:
    expected = grads_of_parts(in_optimizer)
    for found in run_on_ranks(2, step_of_parts, unsynced, given, in_optimizer):
        assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("unsynced", "given", "in_optimizer", "message"),
    [
        ("gfd", "g", "g", "Linear, a DDP model that last ran inside no_sync"),
        ("gfd", "gf", "g", "Linear, a DDP model that last ran inside no_sync"),
        ("gfd", "", "g", "Linear, a DDP model that last ran inside no_sync"),
        ("gfd", None, "gfd", "would give other gradients on every rank"),
        ("g", "g", "g", "Linear, a DDP model beside this optimizer, in 2 backward"),
        ("gd", "gd", "g", "Linear, a DDP model beside this optimizer, in 2 backward"),
        ("fd", "fd", "f", "Sequential, a DDP model beside this optimizer, in 2 back"),
        ("fd", None, "g", "averages the first one only"),
    ],
)
def test_a_model_that_nobody_would_average_is_refused(
    unsynced: str, given: str | None, in_optimizer: str, message: str
) -> None:
    for error in run_on_ranks(2, step_of_parts, unsynced, given, in_optimizer):
        assert message in error
        assert "sync_group=" in error


def test_models_that_stay_apart_on_purpose_do() -> None:
    found = run_on_ranks(2, apart_on_purpose)
    assert not torch.equal(found[0], found[1])


def apart_on_purpose() -> Tensor:
    parts = Parts()
    ddp = [DistributedDataParallel(getattr(parts, name)) for name in "gfd"]
    optimizer = HarmonizedOptimizer(SGD(parts.g.parameters(), lr=0.1))
    with ddp[0].no_sync(), ddp[1].no_sync(), ddp[2].no_sync():
        optimizer.backward(parts.losses(*ddp), sync_group=False)
    grad = next(parts.f.parameters()).grad
    assert grad is not None
    return grad


def odd_groups(which: str) -> str:
    parts = Parts()
    other = dist.new_group([0, 1])
    groups = [None, other if which == "two groups" else None]
    ddp: Any = [
        DistributedDataParallel(module, process_group=group)
        for module, group in zip((parts.g, parts.f), groups, strict=True)
    ]
    given: Any = {"two groups": ddp, "a module": [ddp[0], parts.f], "none": []}[which]
    optimizer = HarmonizedOptimizer(SGD(parts.parameters(), lr=0.1))
    with ddp[0].no_sync(), ddp[1].no_sync():
        losses = parts.losses(ddp[0], ddp[1], parts.d)
        try:
            optimizer.backward(losses, sync_group=given)
        except (TypeError, ValueError) as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("two groups", "of one process group, got several"),
        ("a module", r"DDP models only, got <class"),
        ("none", "a DDP model, got an empty list"),
    ],
)
def test_models_of_no_one_group_are_refused(which: str, message: str) -> None:
    for error in run_on_ranks(2, odd_groups, which):
        assert error.startswith("sync_group must hold")
        assert message in error


def late_step(group: Any) -> tuple[str, list[Tensor | None]]:
    """Step with nothing but accumulated micro-batches."""
    ddp, optimizer, model = ddp_step()
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))
        given = {"model": ddp}.get(group, group)
        optimizer.backward(losses, accumulate_only=True, sync_group=given)
    try:
        optimizer.step()
    except RuntimeError as error:
        # The micro-batches are still there, for the call that the error asks for.
        with ddp.no_sync():
            losses = ddp(*share(*models.batch(2)))
            optimizer.backward(losses, sync_group=ddp)
        return str(error), grads_of(model)
    return "", grads_of(model)


@pytest.mark.parametrize("group", ["model", True, None])
def test_a_step_does_not_harmonize_what_ranks_would_have_to_average(group: Any) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    literal = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    literal.backward([2 * loss for loss in model(*models.batch(2))])
    for error, grads in run_on_ranks(2, late_step, group):
        assert "finish_accumulation(), with sync_group" in error
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def test_a_step_harmonizes_what_shall_stay_local() -> None:
    for error, grads in run_on_ranks(2, late_step, False):
        assert not error
        assert all(grad is not None for grad in grads)


def fixed_weights() -> list[float]:
    """Average with a weighting that returns a tensor of its own, another on each rank."""
    mine = torch.tensor([1.0, 2.0 + dist.get_rank()], dtype=torch.float64)
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()), lambda _: mine)
    optimizer.backward(model(*models.batch(2)), sync_group=True)
    assert optimizer.last is not None
    assert optimizer.last.weights.tolist() == [1.0, 2.0]
    return mine.tolist()


def test_the_tensor_of_a_weighting_is_not_overwritten() -> None:
    assert run_on_ranks(2, fixed_weights) == [[1.0, 2.0], [1.0, 3.0]]


def late_reused_step(measure_every: int, tasks: int) -> str:
    """Step late between measurements, or with a single task."""
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    base = SGD(model.parameters(), lr=0.1)
    optimizer = HarmonizedOptimizer(base, measure_every=measure_every)
    with ddp.no_sync():
        optimizer.backward(ddp(*share(*models.batch(2)))[:tasks], sync_group=ddp)
        optimizer.step()
        optimizer.zero_grad()
        losses = ddp(*share(*models.batch(2)))[:tasks]
        optimizer.backward(losses, accumulate_only=True)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("measure_every", "tasks"), [(4, 2), (1, 1)])
def test_a_single_pass_that_was_accumulated_is_local_too(
    measure_every: int, tasks: int
) -> None:
    for error in run_on_ranks(2, late_reused_step, measure_every, tasks):
        assert "finish_accumulation(), with sync_group" in error


def late_step_of_one_rank() -> None:
    ddp, optimizer, _ = ddp_step()
    with ddp.no_sync():
        losses = ddp(*models.batch(2))
        optimizer.backward(losses, accumulate_only=True, sync_group=ddp)
    optimizer.step()


def test_a_single_rank_has_nothing_to_average() -> None:
    run_on_ranks(1, late_step_of_one_rank)


def lbfgs_on_shares() -> tuple[list[float], dict[str, Tensor]]:
    """Minimise with a line search, each rank on its share of the batch."""
    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    base = LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe")
    optimizer = HarmonizedOptimizer(base)

    def closure() -> float:
        optimizer.zero_grad()
        with ddp.no_sync():
            optimizer.backward(ddp(*share(*models.batch(2))), sync_group=ddp)
        return 0.0

    values: Any = [optimizer.step(closure) for _ in range(4)]
    return [value.item() for value in values], weights_of(model)


def test_a_line_search_sees_the_same_function_on_every_rank() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    base = LBFGS(model.parameters(), max_iter=8, line_search_fn="strong_wolfe")
    optimizer = HarmonizedOptimizer(base)
    expected: Any = [optimizer.step(lambda: model(*models.batch(2))) for _ in range(4)]
    for values, weights in run_on_ranks(2, lbfgs_on_shares):
        assert_close(
            torch.tensor(values).double(), torch.stack(expected), rtol=1e-4, atol=0
        )
        assert_close(weights, weights_of(model), rtol=1e-4, atol=1e-4)


def gradients_with_graph() -> str:
    ddp, optimizer, model = ddp_step()
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))
        try:
            optimizer.backward(
                losses,
                backward_fn=lambda loss, **_: loss.backward(create_graph=True),
                sync_group=ddp,
            )
        except ValueError as error:
            assert all(grad is None for grad in grads_of(model))
            return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_graphs_of_gradients_cannot_be_averaged() -> None:
    for error in run_on_ranks(2, gradients_with_graph):
        assert "create_graph=True with sync_group" in error


# What would go wrong is refused


def misused(how: str) -> tuple[str, bool]:
    """Step against the rules; give the error, and whether grads are as before."""
    ddp, optimizer, model = ddp_step()
    before = [torch.ones_like(parameter) for parameter in model.parameters()]
    for parameter, grad in zip(model.parameters(), before, strict=True):
        parameter.grad = grad.clone()
    group: Any = {"with the model": ddp, "with a group": True}.get(how)
    try:
        if how == "passes alone":  # the forward pass before them is armed
            losses = ddp(*share(*models.batch(2)))
            with ddp.no_sync():
                optimizer.backward(losses, sync_group=ddp)
        else:
            optimizer.backward(ddp(*share(*models.batch(2))), sync_group=group)
    except RuntimeError as error:
        grads = grads_of(model)
        same = all(map(torch.equal, grads, before))  # type: ignore[arg-type]  # not None
        return str(error), same
    return "", False


@pytest.mark.parametrize(
    "how", ["without a group", "with the model", "with a group", "passes alone"]
)
def test_several_passes_through_an_armed_ddp_model_are_refused(how: str) -> None:
    for error, same in [
        *run_on_ranks(2, misused, how),
        *run_on_ranks(1, misused, how),  # what works on one rank must work on more
    ]:
        assert "averages the first one only: run the forward pass and" in error
        assert same


def one_loss_step() -> list[Tensor | None]:
    ddp, optimizer, model = ddp_step()
    optimizer.backward([sum(ddp(*share(*models.batch(2))))])
    return grads_of(model)


def test_a_single_loss_may_leave_the_averaging_to_ddp() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    sum(model(*models.batch(2))).backward()
    for grads in run_on_ranks(2, one_loss_step):
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def rearmed_steps(views: bool) -> list[tuple[Tensor, Tensor] | None]:
    """Let DDP average each pass by itself, as Lightning does in its manual_backward."""
    ddp, optimizer, model = ddp_step(
        find_unused_parameters=True, gradient_as_bucket_view=views
    )
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))

    def rearm(loss: Tensor, retain_graph: bool) -> None:
        ddp.reducer._rebuild_buckets()
        ddp.reducer.prepare_for_backward([loss])
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.backward(losses, backward_fn=rearm, sync_group=False)
    before = [None if grad is None else grad.clone() for grad in grads_of(model)]
    with ddp.no_sync():  # once more, on top of gradients that may lie in buckets
        losses = ddp(*share(*models.batch(2)))
    optimizer.backward(losses, backward_fn=rearm, sync_group=False)
    pairs = zip(before, grads_of(model), strict=True)
    return [None if a is None or b is None else (a - 1, b - a) for a, b in pairs]


@pytest.mark.parametrize("views", [False, True])
def test_a_backward_fn_may_let_ddp_average_every_pass(views: bool) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    HarmonizedOptimizer(SGD(model.parameters())).backward(model(*models.batch(2)))
    expected = [(grad, grad) for grad in grads_of(model)]
    for added in run_on_ranks(2, rearmed_steps, views):
        assert_close(added, expected, rtol=1e-12, atol=1e-12)


def kept_gradients(views: bool) -> list[list[Tensor | None]]:
    """Let DDP average the only pass of each step, on top of what was there before."""
    ddp, optimizer, model = ddp_step(gradient_as_bucket_view=views)
    sum(ddp(*share(*models.batch(2)))).backward()  # leaves views of the buckets
    kept = []
    for _ in range(3):
        optimizer.backward([sum(ddp(*share(*models.batch(2))))])
        kept.append([None if g is None else g.clone() for g in grads_of(model)])
    return kept


@pytest.mark.parametrize("views", [False, True])
def test_gradients_in_the_buckets_of_ddp_are_added_to(views: bool) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    sum(model(*models.batch(2))).backward()
    for kept in run_on_ranks(2, kept_gradients, views):
        for times, grads in enumerate(kept, start=2):
            expected = [None if g is None else times * g for g in grads_of(model)]
            assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def unused_model_step() -> None:
    _, optimizer, model = ddp_step()
    optimizer.backward(model(*models.batch(2)))  # nothing went through DDP


def test_a_ddp_model_that_was_never_used_is_no_reason_to_refuse() -> None:
    run_on_ranks(2, unused_model_step)


def bad_group(which: str) -> str:
    ddp, optimizer, _ = ddp_step(static_graph=which == "static graph")
    pair = dist.new_group([0])
    group: Any = {"static graph": ddp, "not a member": pair, "a rank": 1.5}[which]
    if which == "not a member" and dist.get_rank() == 0:
        return "sync_group must"
    try:
        with ddp.no_sync():
            losses = ddp.module(*models.batch(2))
            optimizer.backward(losses, sync_group=group, accumulate_only=True)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("which", ["static graph", "not a member", "a rank"])
def test_a_group_that_cannot_be_used_is_refused(which: str) -> None:
    for error in run_on_ranks(2, bad_group, which):
        assert error.startswith("sync_group must")


def test_a_group_without_distributed_training_is_refused() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    losses = model(*models.batch(2))
    with pytest.raises(ValueError, match=r"needs init_process_group\(\), got True"):
        optimizer.backward(losses, sync_group=True)
    optimizer.backward(losses, sync_group=False)


def local_step(group: Any) -> str:
    ddp, optimizer, model = ddp_step()
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))
        try:
            optimizer.backward(losses, sync_group=group)
        except (RuntimeError, TypeError) as error:
            assert all(grad is None for grad in grads_of(model))
            return str(error)
    return ""


def test_gradients_that_would_stay_local_are_refused_unless_that_is_asked_for() -> None:
    for error in run_on_ranks(2, local_step, None):
        assert "pass sync_group=model to backward(), or sync_group=False" in error
    assert run_on_ranks(2, local_step, False) == ["", ""]
    assert run_on_ranks(1, local_step, None) == [""]


def compiled_group() -> str:
    ddp, optimizer, _ = ddp_step()
    group: Any = torch.compile(ddp)
    with ddp.no_sync():
        losses = ddp(*models.batch(2))
        try:
            optimizer.backward(losses, sync_group=group)
        except TypeError as error:
            return str(error)
    return ""


def test_a_compiled_model_is_no_group() -> None:
    (error,) = run_on_ranks(1, compiled_group)
    assert error.startswith("sync_group must be a DDP model")


def train_compiled_replicas(is_outside: bool) -> dict[str, Tensor]:
    """Compile DDP or what is in it; a step of the plain sum, which DDP averages, first."""
    model = models.make(models.heads_on_a_trunk, 2)
    compiled = torch.compile(model, backend="aot_eager")
    ddp = DistributedDataParallel(model if is_outside else compiled)
    run: Any = torch.compile(ddp, backend="aot_eager") if is_outside else ddp
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    sum(run(*share(*models.batch(2)))).backward()
    for step in range(STEPS):
        with ddp.no_sync():
            losses = run(*share(*models.batch(2, step)))
            optimizer.zero_grad()
            optimizer.backward(losses, sync_group=ddp)
        optimizer.step()
    return weights_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("is_outside", [True, False])
def test_compiled_replicas_equal_one_process_on_the_whole_batch(
    is_outside: bool,
) -> None:
    expected = one_process(models.heads_on_a_trunk, 2)
    for weights in run_on_ranks(2, train_compiled_replicas, is_outside):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def wrapped_later() -> list[str]:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    optimizer.backward(model(*models.batch(2)))
    ddp = DistributedDataParallel(model)
    errors = []
    for _ in range(3):
        try:
            optimizer.backward(ddp(*models.batch(2)))
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_a_model_that_is_wrapped_later_is_found_before_long() -> None:
    for errors in run_on_ranks(2, wrapped_later):
        assert any("averages the first one only" in error for error in errors)


# Ranks that disagree, fail or stay away


def disagreeing(about: str) -> str:
    ddp, optimizer, model = ddp_step()
    odd = dist.get_rank() == 1
    if about == "parameters" and odd:
        model.trunk[0].bias.requires_grad_(False)  # type: ignore[index]  # Sequential
    with ddp.no_sync():
        losses = ddp(*models.batch(2))
        given = {
            "number": losses[:1] if odd else losses,
            "names and places": {"a": losses[0], "b": losses[1]} if odd else losses,
            "parameters": losses,
            "no losses": [] if odd else losses,
            "no tensor": [losses[0], 1.0] if odd else losses,
        }[about]
        if about == "a pass" and odd:
            losses[1].register_hook(lambda _: 1 / 0)
        try:
            optimizer.backward(given, sync_group=ddp)
        except (RuntimeError, ValueError, TypeError) as error:
            assert all(grad is None for grad in grads_of(model))
            return str(error)
    return ""


def test_ranks_that_disagree_on_the_tasks_are_told_what_each_of_them_has() -> None:
    for error in run_on_ranks(2, disagreeing, "number"):
        assert "same tasks, got ['0', '1'] on rank 0; ['0'] on rank 1" in error
        assert "give them names, {name: loss}" in error
    for error in run_on_ranks(2, disagreeing, "names and places"):
        assert "same tasks, got ['0', '1'] on rank 0; ['a', 'b'] on rank 1" in error


def test_ranks_that_disagree_on_the_parameters_are_named() -> None:
    for error in run_on_ranks(3, disagreeing, "parameters"):
        assert error.startswith("parameters must be the same")
        assert "others on rank(s) [1] than on rank 0" in error


def mixed_up_halves() -> str:
    model = models.make(models.heads_on_a_trunk, 2)
    model.to(torch.bfloat16 if dist.get_rank() else torch.float16)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    inputs, targets = models.batch(2)
    kind = model.heads[0].weight.dtype
    assert isinstance(kind, torch.dtype)
    try:
        losses = model(inputs.to(kind), targets.to(kind))
        optimizer.backward(losses, sync_group=True)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_dtypes_of_the_same_size_are_named() -> None:
    for error in run_on_ranks(2, mixed_up_halves):
        assert "others on rank(s) [1] than on rank 0" in error


@pytest.mark.parametrize(
    ("about", "told"), [("no losses", "at least one loss"), ("no tensor", "a tensor")]
)
def test_bad_losses_on_one_rank_are_an_error_on_all(about: str, told: str) -> None:
    first, second = run_on_ranks(2, disagreeing, about)
    assert told in second
    assert first.startswith("rank(s) [1] failed in backward()")


def on_one_rank(gramian: Tensor) -> Tensor:
    if dist.get_rank() == 1:
        raise torch.OutOfMemoryError("in the weighting")
    return gramian.diagonal()


def failing_packing() -> str:
    """On rank 1 the memory ends between what is said and what is sent."""

    def fail(_: list[Tensor]) -> Tensor:
        raise torch.OutOfMemoryError("while packing")

    ddp, optimizer, model = ddp_step()
    with ddp.no_sync(), pytest.MonkeyPatch.context() as patch:
        losses = ddp(*models.batch(2))
        if dist.get_rank() == 1:
            patch.setattr("ghopt.ranks.averages._packed", fail)
        try:
            optimizer.backward(losses, sync_group=ddp)
        except torch.OutOfMemoryError as error:
            return str(error)
        except RuntimeError as error:
            assert all(grad is None for grad in grads_of(model))
            return str(error)
    return ""


def test_a_rank_without_memory_for_a_message_says_nothing_in_its_place() -> None:
    first, second = run_on_ranks(2, failing_packing, timeout=3)
    assert first.startswith("a rank ended or was cut off during backward()")
    assert second == "while packing"


def failing_weighting() -> str:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()), on_one_rank)
    try:
        optimizer.backward(model(*models.batch(2)), sync_group=True)
    except torch.OutOfMemoryError:
        assert dist.get_rank() == 1
        return "its own"
    except RuntimeError as error:
        assert all(grad is None for grad in grads_of(model))
        return str(error)
    return ""


def test_a_weighting_that_fails_on_one_rank_is_an_error_on_all() -> None:
    first, second = run_on_ranks(2, failing_weighting)
    assert first.startswith("rank(s) [1] failed in backward()")
    assert second == "its own"


def random_weights(gramian: Tensor) -> Tensor:
    return torch.full_like(gramian.diagonal(), 1.0 + dist.get_rank())


def random_step() -> list[Tensor | None]:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()), random_weights)
    optimizer.backward(model(*share(*models.batch(2))), sync_group=True)
    return grads_of(model)


def test_a_weighting_that_draws_at_random_gives_all_ranks_the_same() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    sum(model(*models.batch(2))).backward()
    for grads in run_on_ranks(2, random_step):
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def shuffled_step() -> list[Tensor | None]:
    """The parameters stand in another order on each rank."""
    model = models.make(models.one_head_for_all, 2)
    ddp = DistributedDataParallel(model)
    parameters = list(model.parameters())
    optimizer = HarmonizedOptimizer(SGD(parameters[:: 1 - 2 * dist.get_rank()]))
    with ddp.no_sync():
        optimizer.backward(ddp(*share(*models.batch(2))), sync_group=ddp)
    return grads_of(model)


def test_a_model_fixes_the_order_of_the_parameters() -> None:
    model = models.make(models.one_head_for_all, 2)
    HarmonizedOptimizer(SGD(model.parameters())).backward(model(*models.batch(2)))
    for grads in run_on_ranks(2, shuffled_step):
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def ignoring_step() -> bool:
    model = models.make(models.heads_on_a_trunk, 2)
    ignored = ["heads.1.bias"]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]  # torch's
        model, ignored
    )
    ddp = DistributedDataParallel(model)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()), lambda g: g.new_ones(2))
    inputs, targets = share(*models.batch(2))
    with ddp.no_sync():
        optimizer.backward(ddp(inputs, targets), sync_group=ddp)
    grad, bias = model.heads[1].bias.grad, model.heads[1].bias
    assert isinstance(bias, Tensor)
    (alone,) = torch.autograd.grad(model(inputs, targets)[1], bias)
    return torch.equal(torch.as_tensor(grad), alone)


def test_parameters_that_ddp_is_told_to_ignore_stay_local() -> None:
    assert run_on_ranks(2, ignoring_step) == [True, True]


def counted_step() -> tuple[int, int]:
    """Count the messages of a micro-batch that is not the last, and of the last."""
    ddp, optimizer, _ = ddp_step()
    counts = []
    for last in [False, True]:
        with ddp.no_sync(), CommDebugMode() as sent:  # type: ignore[no-untyped-call]  # torch's
            losses = ddp(*share(*models.batch(2)))
            optimizer.backward(losses, sync_group=ddp, accumulate_only=not last)
        counts.append(sent.get_total_counts())
    return counts[0], counts[1]


def test_nothing_is_sent_before_the_last_micro_batch() -> None:
    for before, last in run_on_ranks(2, counted_step):
        assert before == 0 < last


def failing_pass(task: int) -> str:
    """On rank 1, one task cannot be derived."""

    def fail(_: Tensor) -> Tensor:
        raise ArithmeticError("on this rank")

    ddp, optimizer, model = ddp_step()
    with ddp.no_sync():
        losses = ddp(*models.batch(2))
        if dist.get_rank() == 1:
            losses[task].register_hook(fail)
        try:
            optimizer.backward(losses, sync_group=ddp)
        except (RuntimeError, ArithmeticError) as error:
            assert all(grad is None for grad in grads_of(model))
            # The group is as good as before.
            optimizer.backward(ddp(*models.batch(2)), sync_group=ddp)
            return str(error)
    return ""


@pytest.mark.parametrize("task", [0, 1])
def test_a_pass_that_fails_on_one_rank_is_an_error_on_all(task: int) -> None:
    outcomes = run_on_ranks(4, failing_pass, task)
    assert outcomes[1] == "on this rank"
    for rank in (0, 2, 3):
        assert outcomes[rank].startswith("rank(s) [1] failed in backward()")


def staying_away(how: str) -> str:
    ddp, optimizer, _ = ddp_step()
    with ddp.no_sync():
        optimizer.backward(ddp(*models.batch(2)), sync_group=ddp)
        losses = ddp(*models.batch(2))
        if dist.get_rank() == 2:
            if how == "killed between":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "killed in a pass":
                losses[1].register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
            if how == "raised":
                raise ArithmeticError("in the loss of a task")
        try:
            optimizer.backward(losses, sync_group=ddp)
        except RuntimeError as error:
            return str(error)
    return ""


@needs.stores
def test_a_rank_that_does_not_come_is_named_when_the_group_s_time_is_up() -> None:
    outcomes = run_on_ranks(4, staying_away, "raised", timeout=3, may_fail=True)
    assert "in the loss of a task" in str(outcomes.pop(2))
    for outcome in outcomes:
        assert outcome.startswith("rank(s) [2] did not come to backward()")
        assert "Timed out" in outcome or "Connection closed" in outcome


@needs.stores
@needs_signals
def test_a_rank_that_is_killed_before_the_step_is_named() -> None:
    outcomes = run_on_ranks(4, staying_away, "killed between", timeout=3, may_fail=True)
    assert isinstance(outcomes.pop(2), RankError)
    for outcome in outcomes:
        assert outcome.startswith("rank(s) [2] did not come to backward()")


@needs_signals
def test_a_rank_that_is_killed_in_mid_step_leaves_the_others_with_an_error() -> None:
    outcomes = run_on_ranks(
        4, staying_away, "killed in a pass", timeout=3, may_fail=True
    )
    assert isinstance(outcomes.pop(2), RankError)
    for outcome in outcomes:
        assert outcome.startswith("a rank ended or was cut off during backward()")


def staying_away_from_a_file(path: Path) -> str:
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=path.as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=2),
    )
    _, optimizer, model = ddp_step()
    if rank == 1:
        return "away"
    try:
        optimizer.backward(model(*models.batch(2)), sync_group=True)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_store_in_a_file_which_would_grow_is_not_told_who_comes(
    tmp_path: Path,
) -> None:
    outcomes = run_on_ranks(
        2, staying_away_from_a_file, tmp_path / "store", timeout=None
    )
    assert outcomes[0].startswith("a rank ended or was cut off during backward()")


def nan_step() -> tuple[list[Tensor | None], Tensor]:
    ddp, optimizer, model = ddp_step()
    with ddp.no_sync():
        losses = ddp(*share(*models.batch(2)))
        if dist.get_rank() == 1:
            losses[0] = losses[0] * torch.nan
        optimizer.backward(losses, sync_group=ddp)
    assert optimizer.last is not None
    return grads_of(model), optimizer.last.weights


def test_nan_on_one_rank_is_seen_on_all() -> None:
    for grads, weights in run_on_ranks(2, nan_step):
        assert weights.isnan().all()
        assert all(grad.isnan().all() for grad in grads if grad is not None)


# Groups and optimizers of other kinds


def sparse_embedding(tasks: int) -> Tasks:
    model = models.embedding(tasks)
    model.trunk.table.sparse = True  # type: ignore[union-attr]  # an nn.Embedding
    return model


def half_of_the_ranks_step(with_model: bool) -> list[Tensor | None]:
    """The halves have tasks of their own, and their own messages."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half, rank = divmod(dist.get_rank(), 2)
    network = models.heads_on_a_trunk if with_model else sparse_embedding
    model = models.make(network, 2 + half)
    inputs, targets = models.batch(2 + half, seed=half)
    inputs, targets = inputs.chunk(2)[rank], targets.chunk(2, dim=1)[rank]
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    if with_model:
        ddp = DistributedDataParallel(model, process_group=groups[half])
        with ddp.no_sync():
            optimizer.backward(ddp(inputs, targets), sync_group=ddp)
    else:
        optimizer.backward(model(inputs, targets), sync_group=groups[half])
    return [None if grad is None else grad.to_dense() for grad in grads_of(model)]


@pytest.mark.parametrize("with_model", [False, True])
def test_a_group_averages_over_its_own_ranks(with_model: bool) -> None:
    outcomes = run_on_ranks(4, half_of_the_ranks_step, with_model)
    for rank, grads in enumerate(outcomes):
        half = rank // 2
        network = models.heads_on_a_trunk if with_model else models.embedding
        model = models.make(network, 2 + half)
        optimizer = HarmonizedOptimizer(SGD(model.parameters()))
        optimizer.backward(model(*models.batch(2 + half, seed=half)))
        assert_close(grads, grads_of(model), rtol=1e-12, atol=1e-12)


def train_with_zero() -> tuple[dict[str, Tensor], list[int] | None]:
    # To import it warns of torch's own use of torch.jit.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = models.make(models.heads_on_a_trunk, 2)
    ddp = DistributedDataParallel(model)
    base = ZeroRedundancyOptimizer(model.parameters(), AdamW, lr=0.01)
    optimizer = HarmonizedOptimizer(base)
    for step in range(STEPS):
        with ddp.no_sync():
            losses = ddp(*share(*models.batch(2, step)))
            optimizer.zero_grad()
            optimizer.backward(losses, sync_group=ddp)
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    states = optimizer.state_dict()["state"] if dist.get_rank() == 0 else None
    return weights_of(model), states and sorted(states)


def test_a_zero_redundancy_base_equals_one_process_and_consolidates_its_state() -> None:
    expected = one_process(models.heads_on_a_trunk, 2)
    outcomes = run_on_ranks(2, train_with_zero)
    for weights, _ in outcomes:
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    parameters = len(expected)
    assert [states for _, states in outcomes] == [list(range(parameters)), None]


# torchrun


def run_job(folder: Path, doomed: int) -> list[dict[str, Tensor]]:
    """Run ``tests/restarts.py`` on two ranks that torchrun starts, and once again."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.1"]
    command += ["-m", "tests.restarts", str(folder), str(doomed)]
    # Else torchrun keeps its store, where restarted ranks may find addresses of dead ones.
    fresh = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    subprocess.run(
        command, check=True, timeout=600, env=os.environ | fresh, capture_output=True
    )
    return [torch.load(folder / f"weights{rank}.pt") for rank in range(2)]


@needs_signals
@pytest.mark.slow
def test_a_job_that_torchrun_restarts_ends_bit_identically(tmp_path: Path) -> None:
    straight = run_job(tmp_path / "straight", doomed=-1)
    restarted = run_job(tmp_path / "restarted", doomed=7)
    for folder, start in [("straight", "0\n"), ("restarted", "6\n")]:
        assert (tmp_path / folder / "starts1").read_text(encoding="utf-8") == start
    for one, other in zip(straight, restarted, strict=True):
        assert_close(one, other, rtol=0, atol=0)
