"""Sharded models: gradients stay where they are, and only the Gramian is summed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, Recorder, measure
from ghopt.ranks.replicas import _root_of
from tests import models
from tests.literal import literal_update
from tests.models import Tasks
from tests.ranks import run_on_ranks
from tests.test_distributed import (
    STEPS,
    features_of_one_process,
    one_process,
    one_projected_process,
    share,
)


def full(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    weights = {}
    for name, weight in model.state_dict().items():
        whole = full(weight)
        assert whole is not None
        weights[name] = whole.clone()
    return weights


def sharded(
    network: Callable[[int], Tasks],
    tasks: int,
    mesh: DeviceMesh | None = None,
    by_layer: bool = True,
    **options: Any,
) -> Tasks:
    model = models.make(network, tasks)
    if by_layer:
        for part in [model.trunk, *dict.fromkeys(model.heads)]:
            fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def keep_gathered(model: FSDPModule, loss: Tensor, retain_graph: bool) -> None:
    """Gather the parameters once for all passes, as the guide has it."""
    model.set_reshard_after_backward(not retain_graph)
    loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's


def train_shards(
    network: Callable[[int], Tasks], tasks: int, how: str
) -> dict[str, Tensor]:
    """Train with FSDP2, each rank on its share of the batch."""
    mesh = None
    if how == "replicated shards":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    options = {"reshard_after_forward": False} if how == "kept after forward" else {}
    model = sharded(network, tasks, mesh, how != "root only", **options)
    assert isinstance(model, FSDPModule)
    passes = partial(keep_gathered, model) if how == "gathered once" else None
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    micros = 2 if how == "micro-batches" else 1
    for step in range(STEPS):
        inputs, targets = share(*models.batch(tasks, step))
        optimizer.zero_grad()
        for micro in range(micros):
            losses = model(inputs[micro::micros], targets[:, micro::micros])
            optimizer.backward(
                [loss / micros for loss in losses],
                backward_fn=passes,
                accumulate_only=micro < micros - 1,
            )
        for parameter in model.parameters():
            assert parameter.grad is None or isinstance(parameter.grad, DTensor)
        optimizer.step()
    return full_weights(model)


@pytest.mark.parametrize(
    ("size", "network", "tasks", "how"),
    [
        (2, models.heads_on_a_trunk, 2, "by layer"),
        pytest.param(4, models.heads_on_a_trunk, 3, "by layer", marks=pytest.mark.slow),
        (2, models.one_head_for_all, 2, "root only"),
        pytest.param(4, models.tied_weights, 2, "root only", marks=pytest.mark.slow),
        (2, models.heads_on_a_trunk, 2, "kept after forward"),
        pytest.param(
            4, models.heads_on_a_trunk, 2, "gathered once", marks=pytest.mark.slow
        ),
        (2, models.heads_on_a_trunk, 3, "micro-batches"),
        pytest.param(
            4, models.heads_on_a_trunk, 2, "replicated shards", marks=pytest.mark.slow
        ),
    ],
)
def test_shards_equal_one_process_on_the_whole_batch(
    size: int, network: Callable[[int], Tasks], tasks: int, how: str
) -> None:
    expected = one_process(network, tasks)
    for weights in run_on_ranks(size, train_shards, network, tasks, how):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def train_shards_on_features(how: str) -> dict[str, Tensor]:
    """Train with FSDP2 or tensor parallel layers, the conflict met at the features."""
    if how == "tensor parallel":
        tasks = models.make(models.heads_on_a_trunk, 3)
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(
            tasks.trunk, mesh, {"0": ColwiseParallel(output_layouts=Replicate())}
        )
        model = models.WithFeatures(tasks)
    else:
        make = models.make if how == "root" else sharded
        model = models.WithFeatures(make(models.heads_on_a_trunk, 3))
        if how == "root":
            fully_shard(model)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    group = True if how == "by layer" else None
    for step in range(STEPS):
        batch = models.batch(3, step)
        inputs, targets = batch if how == "tensor parallel" else share(*batch)
        losses, z = model(inputs, targets)
        optimizer.zero_grad()
        optimizer.backward(losses, features=z, sync_group=group)
        optimizer.step()
    assert optimizer.last is not None
    weights = full_weights(model)
    return {
        **{n.removeprefix("model."): w for n, w in weights.items()},
        "gramian": optimizer.last.gramian,
    }


@pytest.mark.parametrize("how", ["by layer", "root", "tensor parallel"])
def test_features_of_shards_equal_those_of_one_process(how: str) -> None:
    expected = features_of_one_process(3)
    if how == "tensor parallel":  # ranks with the same features
        expected["gramian"] = expected["gramian"] / 2
    first, second = run_on_ranks(2, train_shards_on_features, how)
    assert_close(first, expected, rtol=1e-12, atol=1e-12)
    assert_close(second, expected, rtol=1e-12, atol=1e-12)


def train_projected_shards(tasks: int, how: str) -> dict[str, Tensor]:
    """Train with FSDP2 or tensor parallel layers, so that no step opposes a task."""
    if how == "tensor parallel":
        model = models.make(models.heads_on_a_trunk, tasks)
        mesh = init_device_mesh("cpu", (2,))
        parallelize_module(
            model.trunk, mesh, {"0": ColwiseParallel(output_layouts=Replicate())}
        )
    else:
        model = sharded(models.heads_on_a_trunk, tasks)
    base = AdamW(model.parameters(), lr=0.05)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    recorder = Recorder()
    recorder.attach(optimizer, step=True)
    for step in range(STEPS):
        batch = models.batch(tasks, step)
        inputs, targets = batch if how == "tensor parallel" else share(*batch)
        optimizer.zero_grad()
        optimizer.backward(model(inputs, targets))
        optimizer.step()
    assert not recorder.flush().step_opposed.any()
    return full_weights(model)


@pytest.mark.parametrize("how", ["FSDP2", "tensor parallel"])
def test_a_projected_step_of_shards_equals_that_of_one_process(how: str) -> None:
    expected = one_projected_process(3)
    for weights in run_on_ranks(2, train_projected_shards, 3, how):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def pass_of_unlike_losses(how: str) -> str:
    """Give rank 1 another set of losses that require grad; give the error."""
    mesh = None
    if how == "on a mesh of two axes":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    model = sharded(models.heads_on_a_trunk, 2, mesh)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    a, b = model(*share(*models.batch(2)))
    losses = {"a": a, "b": b}
    if dist.get_rank() == 1:
        match how:
            case "a constant" | "on a mesh of two axes" | "a constant, as a group":
                losses["b"] = torch.zeros((), dtype=torch.float64)
            case "a constant with the cure":
                losses["b"] = 0 * b
            case "nothing but constants" | "nothing but constants, as a group":
                losses = dict.fromkeys("ab", torch.zeros((), dtype=torch.float64))
            case "a loss of another kind":
                losses["b"] = torch.zeros(2, requires_grad=True)
            case "a task less":
                del losses["b"]
            case "other names":
                losses = {"a": a, "c": b}
    if how == "constants on all ranks":
        losses["b"] = torch.zeros((), dtype=torch.float64)
    group = True if how.endswith("as a group") else None
    try:
        optimizer.backward(losses, sync_group=group)
    except (ValueError, RuntimeError) as error:
        assert all(parameter.grad is None for parameter in model.parameters())
        return str(error)
    return ""


@pytest.mark.parametrize(
    "how",
    [
        "nothing but constants",
        "nothing but constants, as a group",
        "a loss of another kind",
    ],
)
def test_a_rank_that_fails_before_its_passes_lets_no_other_wait(how: str) -> None:
    first, second = run_on_ranks(2, pass_of_unlike_losses, how)
    assert "rank(s) [1] failed" in first
    assert ("0 * out.sum()" in first) == ("as a group" not in how)
    assert second.startswith("losses")


@pytest.mark.parametrize(
    ("how", "size", "message"),
    [
        ("a constant", 2, "task 'b' without on rank(s) [1]"),
        ("a constant, as a group", 2, "task 'b' without on rank(s) [1]"),
        pytest.param(
            "on a mesh of two axes",
            4,
            "task 'b' without on rank(s) [1]",
            marks=pytest.mark.slow,
        ),
        ("a task less", 2, "without on rank(s) [1]"),
        ("other names", 2, "must be those of the same tasks on all ranks"),
        ("a constant with the cure", 2, ""),
        ("constants on all ranks", 2, ""),
    ],
)
def test_a_rank_that_would_skip_a_pass_is_named(
    how: str, size: int, message: str
) -> None:
    for error in run_on_ranks(size, pass_of_unlike_losses, how):
        assert message in error
        assert bool(error) == bool(message)
        assert ("0 * out.sum()" in error) == ("without" in message)


def step_with_a_closure() -> float:
    model = sharded(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    value: Any = optimizer.step(lambda: model(*share(*models.batch(2))))
    return float(value)


def test_the_value_of_a_closure_is_that_of_all_shards_of_the_batch() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    expected: Any = optimizer.step(lambda: model(*models.batch(2)))
    for value in run_on_ranks(2, step_with_a_closure):
        assert value == pytest.approx(float(expected), rel=1e-12)


def train_partly_sharded() -> dict[str, Tensor]:
    model = models.make(models.heads_on_a_trunk, 2)
    fully_shard(model, ignored_params=set(model.heads.parameters()))
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01, foreach=False))
    for step in range(STEPS):
        losses = model(*share(*models.batch(2, step)))
        optimizer.zero_grad()
        optimizer.backward(losses, sync_group=True)
        optimizer.step()
    return full_weights(model)


def test_parameters_that_are_not_sharded_can_be_averaged_beside_those_that_are() -> (
    None
):
    expected = one_process(models.heads_on_a_trunk, 2)
    for weights in run_on_ranks(2, train_partly_sharded):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


SEED = 3  # of a batch on which the tasks are in conflict


def mixed_precision_step() -> tuple[list[Tensor], Tensor]:
    """Give the update, and the gradients of each task from a pass of its own."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32
    )
    rows = []
    for task in range(2):
        model = sharded(models.heads_on_a_trunk, 2, mp_policy=policy)
        inputs, targets = share(*models.batch(2, seed=SEED))
        model(inputs, targets.bfloat16())[task].backward()
        entries = [
            torch.zeros(p.shape, dtype=p.dtype) if p.grad is None else full(p.grad)
            for p in model.parameters()
        ]
        rows.append(
            torch.cat([entry.flatten() for entry in entries if entry is not None])
        )
    model = sharded(models.heads_on_a_trunk, 2, mp_policy=policy)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    optimizer.backward(model(inputs, targets.bfloat16()))
    grads = [full(parameter.grad) for parameter in model.parameters()]
    return [grad for grad in grads if grad is not None], torch.stack(rows)


def test_a_mixed_precision_policy_harmonizes_what_its_passes_give() -> None:
    for grads, jacobian in run_on_ranks(2, mixed_precision_step):
        assert jacobian[0] @ jacobian[1] < 0
        update = torch.cat([grad.flatten() for grad in grads])
        assert_close(update, literal_update(jacobian), rtol=1e-10, atol=1e-12)


def full_layers(tasks: int) -> Tasks:
    trunk = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6), nn.Tanh()
    )
    return Tasks(trunk, [nn.Linear(6, 1) for _ in range(tasks)])


def train_tensor_parallel(norm: str) -> dict[str, Tensor]:
    model = models.make(full_layers, 2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if norm == "parallel norm":  # whose gradients are partial
        plan["2"] = RowwiseParallel(output_layouts=Shard(0))
        plan["3"] = SequenceParallel(sequence_dim=0)
        plan["4"] = PrepareModuleOutput(
            output_layouts=Shard(0), desired_output_layouts=Replicate()
        )
    parallelize_module(model.trunk, mesh, plan)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    for step in range(STEPS):
        optimizer.zero_grad()
        optimizer.backward(model(*models.batch(2, step)))
        optimizer.step()
    return full_weights(model)


@pytest.mark.parametrize("norm", ["plain norm", "parallel norm"])
def test_tensor_parallel_layers_equal_one_process(norm: str) -> None:
    expected = one_process(full_layers, 2)
    for weights in run_on_ranks(2, train_tensor_parallel, norm):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def train_tensor_parallel_replicas() -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = models.make(full_layers, 2)
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model.trunk, mesh["tp"], plan)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    group, rank = mesh["dp"].get_group(), mesh["dp"].get_local_rank()
    for step in range(STEPS):
        inputs, targets = models.batch(2, step)
        losses = model(inputs.chunk(2)[rank], targets.chunk(2, dim=1)[rank])
        optimizer.zero_grad()
        optimizer.backward(losses, sync_group=group)
        optimizer.step()
    return full_weights(model)


def test_replicas_of_tensor_parallel_layers_equal_one_process() -> None:
    expected = one_process(full_layers, 2)
    for weights in run_on_ranks(4, train_tensor_parallel_replicas):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def group_across_meshes() -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = models.make(full_layers, 2)
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model.trunk, mesh["tp"], plan)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    three = dist.new_group([0, 1, 2])
    losses = model(*models.batch(2))
    if dist.get_rank() < 3:
        try:
            optimizer.backward(losses, sync_group=three)
        except (ValueError, RuntimeError) as error:
            return str(error)
    return "away"


def test_a_group_with_a_part_of_a_mesh_is_refused() -> None:
    errors = run_on_ranks(4, group_across_meshes)
    assert errors[0].startswith("sync_group must hold all ranks of the mesh")


def ddp_over_shards() -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = models.make(full_layers, 2)
    plan: dict[str, Any] = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model.trunk, mesh["tp"], plan)
    ddp = nn.parallel.DistributedDataParallel(model, device_mesh=mesh["dp"])
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with ddp.no_sync():
        try:
            optimizer.backward(ddp(*models.batch(2)), sync_group=ddp)
        except ValueError as error:
            return str(error)
    return ""


def test_ddp_around_tensor_parallel_layers_is_refused() -> None:
    for error in run_on_ranks(2, ddp_over_shards):
        assert error.startswith("parameters must not be shards")


def test_the_root_of_a_mesh_is_found_where_torch_before_2_10_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    meshes = SimpleNamespace(get_root_mesh=lambda mesh: f"root of {mesh}")
    monkeypatch.setattr(device_mesh, "_mesh_resources", meshes, raising=False)
    assert _root_of("a mesh") == "root of a mesh"


def unsynchronised_accumulation() -> str:
    model = sharded(models.heads_on_a_trunk, 2)
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    try:
        optimizer.backward(model(*models.batch(2)), accumulate_only=True)
    except ValueError as error:
        return str(error)
    return ""


def test_gradients_that_fsdp_keeps_to_itself_are_missed() -> None:
    for error in run_on_ranks(2, unsynchronised_accumulation):
        assert (
            error == "losses must reach a parameter that is to be harmonized, got none"
        )


def train_from(start: int, stop: int, folder: Path | None, saves: bool) -> Any:
    model = sharded(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=0.01))
    if folder is not None and not saves:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
        )
    for step in range(start, stop):
        losses = model(*share(*models.batch(2, step)))
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
    if folder is not None and saves:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return full_weights(model)


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_four(tmp_path: Path) -> None:
    expected = one_process(models.heads_on_a_trunk, 2)
    run_on_ranks(2, train_from, 0, STEPS // 2, tmp_path / "step", True)
    for weights in run_on_ranks(
        4, train_from, STEPS // 2, STEPS, tmp_path / "step", False
    ):
        assert_close(weights, expected, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_of_two_ranks_continues_bit_identically(tmp_path: Path) -> None:
    straight = run_on_ranks(2, train_from, 0, STEPS, None, False)
    run_on_ranks(2, train_from, 0, STEPS // 2, tmp_path / "step", True)
    resumed = run_on_ranks(2, train_from, STEPS // 2, STEPS, tmp_path / "step", False)
    for one, other in zip(straight, resumed, strict=True):
        assert_close(one, other, rtol=0, atol=0)


def record_shards(how: str) -> dict[str, Tensor]:
    """Record one step of FSDP2, or of DDP, with its layers."""
    recorder = Recorder()
    inputs, targets = share(*models.batch(2, 0))
    if how == "FSDP2":
        model = sharded(models.heads_on_a_trunk, 2)
        optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
        recorder.attach(optimizer, layers=model)
        optimizer.backward(model(inputs, targets))
    else:
        model = models.make(models.heads_on_a_trunk, 2)
        ddp = DistributedDataParallel(model)
        optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
        recorder.attach(optimizer, layers=model)
        with ddp.no_sync():
            optimizer.backward(ddp(inputs, targets), sync_group=ddp)
        del ddp
    recording = recorder.flush()
    return {"": recording.gramians[0]} | {
        name: products[0] for name, products in recording.layers.items()
    }


@pytest.mark.parametrize("how", ["FSDP2", "DDP"])
def test_a_recording_on_ranks_is_that_of_the_whole_batch(how: str) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    seen = measure(
        model(*models.batch(2, 0)),
        model.parameters(),
        recorder=(own := Recorder()),
        layers=model,
    )
    expected = {"": seen.gramian} | {
        name: products[0] for name, products in own.flush().layers.items()
    }
    for found in run_on_ranks(2, record_shards, how):
        assert_close(found, expected, rtol=1e-10, atol=1e-12)
