"""No leaks: counts stay flat, and nothing keeps a graph or a gradient alive."""

import contextlib
import copy
import gc
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from ghopt import HarmonizedOptimizer, gh
from tests import models
from tests.models import Tasks

pytestmark = pytest.mark.usefixtures("passes")


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects() -> Iterator[None]:
    """Hide what is there already, which takes long to go through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave it to reference counts: a cycle would keep gradients for a long time."""
    # Lightning sets it; then torch for CUDA leaves cycles of its own where there is no GPU.
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Failure(Exception):
    """Raised in the middle of a call."""


def fail(*_: object, **__: object) -> Tensor:
    raise Failure


def fail_last(loss: Tensor, retain_graph: bool) -> None:
    if not retain_graph:
        raise Failure
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]  # torch's


def training() -> tuple[Tasks, HarmonizedOptimizer]:
    model = models.make(models.heads_on_a_trunk, 3)
    return model, HarmonizedOptimizer(AdamW(model.parameters()))


def count() -> tuple[int, int]:
    """Count the tensors and all objects that Python knows of."""
    objects = gc.get_objects()
    return sum(issubclass(type(one), Tensor) for one in objects), len(objects)


# What is done again and again


def step(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.step(losses=model(*models.batch(3)))


def step_on_a_closure(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.step(lambda: model(*models.batch(3)))


def accumulate(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    for last in (False, False, True):
        optimizer.backward(model(*models.batch(3)), accumulate_only=not last)
    optimizer.step()
    optimizer.zero_grad()


def accumulate_without_end(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(model(*models.batch(3)), accumulate_only=True)


def abandon(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(model(*models.batch(3)), accumulate_only=True)
    optimizer.zero_grad()


def fail_in_a_pass(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(model(*models.batch(3)), accumulate_only=True)
    with pytest.raises(Failure):
        optimizer.backward(model(*models.batch(3)), backward_fn=fail_last)


def fail_in_the_weighting(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.weighting = fail
    with pytest.raises(Failure):
        optimizer.backward(model(*models.batch(3)))
    optimizer.weighting = gh


def copy_and_drop(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    step(*copy.deepcopy((model, optimizer)))


def save_and_load(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    step(model, optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def retain(model: Tasks, optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(model(*models.batch(3)), retain_graph=True)


# pytest.raises, copies of modules, and load_state_dict of torch leave cycles.
IN_CYCLES = (fail_in_a_pass, fail_in_the_weighting, copy_and_drop, save_and_load)


@pytest.mark.parametrize(
    ("use", "times"),
    [
        (step, 200),
        (accumulate, 100),
        (step_on_a_closure, 60),
        (accumulate_without_end, 60),
        (abandon, 60),
        (fail_in_a_pass, 60),
        (fail_in_the_weighting, 60),
        (copy_and_drop, 60),
        (save_and_load, 60),
        (retain, 60),
    ],
)
def test_hundreds_of_steps_leave_no_object(
    use: Callable[[Tasks, HarmonizedOptimizer], None], times: int, passes: str
) -> None:
    model, optimizer = training()
    step(model, optimizer)
    for _ in range(10):
        use(model, optimizer)
    gc.collect()  # what pytest and torch themselves leave in cycles at first
    tensors, objects = count()
    for _ in range(times):
        use(model, optimizer)
    # So does torch's vmap, without a tensor.
    if use in IN_CYCLES or passes == "auto":
        assert count()[0] == tensors or use in IN_CYCLES
        gc.collect()
    more_tensors, more_objects = count()
    assert more_tensors == tensors
    # Caches of Python and torch may fill up; a leak would be one object a step.
    assert more_objects < objects + times / 2


def peak() -> int:
    """Give the most that the process has held of memory, in kilobytes."""
    resource = pytest.importorskip("resource", reason="Windows counts no memory")
    held: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held // 1024 if sys.platform == "darwin" else held


@pytest.mark.parametrize("use", [step, accumulate, abandon, fail_in_a_pass])
def test_memory_stays_flat(use: Callable[[Tasks, HarmonizedOptimizer], None]) -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    model.trunk = nn.Sequential(nn.Linear(6, 20_000), nn.Linear(20_000, 8)).double()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=1e-6))
    for _ in range(3):
        use(model, optimizer)
    before = peak()
    for _ in range(30):
        use(model, optimizer)
    more = peak() - before
    # Kilobytes. The gradients of one task are 2.3 MB, and those of 30 steps 70 MB.
    assert more < 30_000


# Graphs


class Handle:
    """Stands in the graph for one tensor that the backward pass needs."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


class Watch:
    """Counts what graphs made within it still hold."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Handle] = weakref.WeakSet()
        self.hooks = saved_tensors_hooks(self.pack, lambda handle: handle.tensor)

    def pack(self, tensor: Tensor) -> Handle:
        handle = Handle(tensor)
        self.alive.add(handle)
        return handle


def watched(model: Tasks) -> tuple[list[Tensor], Watch, Watch]:
    """Give the losses, and watch the graph of the trunk and those of the heads."""
    inputs, targets = models.batch(3)
    trunk, heads = Watch(), Watch()
    with trunk.hooks:
        features = model.trunk(inputs)
    with heads.hooks:
        outputs = [head(features)[:, 0] for head in model.heads]
        errors = zip(outputs, targets, strict=True)
        losses = [(output - target).square().mean() for output, target in errors]
    assert trunk.alive
    assert heads.alive
    return losses, trunk, heads


@pytest.mark.parametrize("accumulate_only", [True, False])
def test_the_last_pass_frees_the_graph_although_losses_are_held(
    accumulate_only: bool,
) -> None:
    model, optimizer = training()
    losses, trunk, heads = watched(model)
    optimizer.backward(losses, accumulate_only=accumulate_only)
    assert not trunk.alive
    # Only those of the last task: no pass that frees goes through the others again.
    del losses[:2]
    assert not heads.alive
    assert losses


def test_a_retained_graph_is_freed_with_the_losses() -> None:
    model, optimizer = training()
    losses, trunk, heads = watched(model)
    optimizer.backward(losses, retain_graph=True)
    assert trunk.alive
    assert heads.alive
    del losses
    assert not trunk.alive
    assert not heads.alive


def test_graphs_of_their_own_are_freed_with_the_losses() -> None:
    model, optimizer = training()
    watch = Watch()
    with watch.hooks:
        losses = [model(*models.batch(3))[task] for task in range(3)]
    optimizer.backward(losses)
    del losses
    assert not watch.alive


@pytest.mark.parametrize("where", ["pass", "weighting"])
def test_a_failed_call_holds_no_graph_and_no_gradient(where: str) -> None:
    model, optimizer = training()
    losses, trunk, heads = watched(model)
    before = count()[0]
    if where == "weighting":
        optimizer.weighting = fail
    with contextlib.suppress(Failure):
        optimizer.backward(losses, backward_fn=fail_last if where == "pass" else None)
    assert count()[0] <= before  # less, where the passes freed the graph
    del losses
    assert not trunk.alive
    assert not heads.alive


def test_no_intermediate_tensor_outlives_the_losses() -> None:
    model, optimizer = training()
    seen: list[weakref.ref[Tensor]] = []
    model.trunk.register_forward_hook(lambda *args: seen.append(weakref.ref(args[2])))
    losses = model(*models.batch(3))
    seen += map(weakref.ref, losses)
    optimizer.backward({str(task): loss for task, loss in enumerate(losses)})
    del losses
    assert optimizer.last is not None
    assert [tensor() for tensor in seen] == [None] * 4


def test_last_holds_two_small_tensors_without_a_graph() -> None:
    model, optimizer = training()
    optimizer.backward(model(*models.batch(3)))
    last = optimizer.last
    assert last is not None
    held = [one for one in vars(last).values() if isinstance(one, Tensor)]
    assert len(held) == 2
    for tensor in held:
        assert tensor.grad_fn is None
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == 8 * tensor.numel()


def test_only_the_last_harmonization_is_kept() -> None:
    model, optimizer = training()
    optimizer.backward(model(*models.batch(3)))
    assert optimizer.last is not None
    first = weakref.ref(optimizer.last)
    optimizer.backward(model(*models.batch(3)))
    assert first() is None


# Gradients and the wrapper itself


def test_between_steps_nothing_is_kept_but_what_last_shows() -> None:
    model, optimizer = training()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    before = count()[0]
    step(model, optimizer)
    optimizer.zero_grad()
    assert count()[0] == before + 2


def test_gradients_that_nobody_holds_are_gone_after_zero_grad() -> None:
    model, optimizer = training()
    optimizer.backward(model(*models.batch(3)))
    held = [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]
    assert len(held) == 8
    optimizer.zero_grad()
    assert [grad() for grad in held] == [None] * 8


@pytest.mark.parametrize("scheduled", [True, False])
@pytest.mark.parametrize("copied", [True, False])
def test_a_dropped_wrapper_takes_base_and_gradients_with_it(
    scheduled: bool, copied: bool
) -> None:
    step(*training())  # what torch imports at first has tensors of its own
    nothing = count()[0]
    model, optimizer = training()
    if copied:
        model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.register_step_post_hook(lambda *_: None)
    schedule = ExponentialLR(optimizer, 0.9) if scheduled else None
    step(model, optimizer)
    before = count()[0]
    optimizer.backward(model(*models.batch(3)), accumulate_only=True)
    assert count()[0] == before + 12
    dropped = (optimizer, optimizer.base_optimizer)
    held: list[weakref.ref[Optimizer]] = [weakref.ref(one) for one in dropped]
    del optimizer, schedule, dropped
    assert [one() for one in held] == [None] * 2
    # What is left is the model and its gradients.
    assert all(p.grad is not None for p in model.parameters())
    assert count()[0] == nothing + 2 * len([*model.parameters()])
