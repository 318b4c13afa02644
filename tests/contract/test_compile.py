"""torch.compile: a compiled model with one backward pass per task, a compiled step."""

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer
from tests import models
from tests.models import Tasks

Model = Callable[[Tensor, Tensor], list[Tensor]]

# From importing a part of torch while it compiles; the bare base optimizer meets it too.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
)

looks_at_grad = pytest.mark.filterwarnings(
    # torch looks at .grad of all tensors that come into what it compiles.
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(autouse=True)
def _compile_anew() -> Iterator[None]:
    """Let no test see what another compiled, in this process or on the disk.

    With its default settings the cache of inductor hands out graphs that were compiled
    under another ``donated_buffer``.
    """
    torch._dynamo.reset()
    counters.clear()
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        yield
    torch._dynamo.reset()


def optimizers(
    models: list[Tasks], base: Callable[..., Optimizer]
) -> list[HarmonizedOptimizer]:
    return [HarmonizedOptimizer(base(model.parameters())) for model in models]


def momentum(params: list[nn.Parameter]) -> Optimizer:
    return SGD(params, lr=0.05, momentum=0.9)


def pair(network: Callable[[int], Tasks], tasks: int = 2) -> list[Tasks]:
    """Build two alike, one to be compiled."""
    return [models.make(network, tasks) for _ in range(2)]


def check_training(pair: list[Tasks], compiled: Model) -> None:
    """Take five steps with each and compare."""
    eager, other = optimizers(pair, momentum)
    for seed in range(5):
        data = models.batch(len(pair[0].heads), seed)
        eager.step(losses=pair[0](*data))
        other.step(losses=compiled(*data))
    assert counters["stats"]["unique_graphs"] == 1
    assert other.last is not None
    assert (other.last.weights > 1).any()
    assert_close(pair[1].state_dict(), pair[0].state_dict(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "network", [models.tied_weights, models.batch_norm, models.frozen_and_unused]
)
def test_a_compiled_model_trains_as_an_uncompiled_one(
    network: Callable[[int], Tasks],
) -> None:
    both = pair(network, 3)
    check_training(both, torch.compile(both[1], backend="aot_eager"))


def test_the_losses_may_be_outside_the_compiled_graph() -> None:
    both = pair(models.heads_on_a_trunk, 3)
    compiled = torch.compile(both[1].trunk, backend="aot_eager")

    def losses(inputs: Tensor, targets: Tensor) -> list[Tensor]:
        features = compiled(inputs)
        outputs = [head(features)[:, 0] for head in both[1].heads]
        errors = zip(outputs, targets, strict=True)
        return [(output - target).square().mean() for output, target in errors]

    check_training(both, losses)


def plain(losses: list[Tensor], _: HarmonizedOptimizer) -> None:
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]  # torch's


def one_task(losses: list[Tensor], optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward([torch.stack(losses).sum()])


before = pytest.mark.parametrize("before", [plain, one_task])
Before = Callable[[list[Tensor], HarmonizedOptimizer], None]


def run(loss: Tensor, retain_graph: bool) -> None:
    loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's


@before
@pytest.mark.parametrize("backward_fn", [None, run])
def test_donated_buffers_are_an_error_that_names_its_cure(
    before: Before, backward_fn: Callable[..., None] | None
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    (optimizer,) = optimizers([model], momentum)
    compiled = torch.compile(model, backend="aot_eager")
    before(compiled(*models.batch(2)), optimizer)
    held = [(p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None]
    # Without the second, the cache returns the graph of before: see the last test.
    cure = r"donated_buffer = False.*fx_graph_cache = False"
    with pytest.raises(RuntimeError, match=cure) as raised:
        optimizer.backward(compiled(*models.batch(2)), backward_fn=backward_fn)
    assert "non-empty donated buffers" in str(raised.value.__cause__)
    assert len(held) == 6
    for p, (grad, value) in zip(model.parameters(), held, strict=True):
        assert p.grad is grad
        assert grad.equal(value)


@before
def test_the_cure_for_donated_buffers_cures(before: Before) -> None:
    both = pair(models.heads_on_a_trunk)
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(both[1], backend="aot_eager")
        before(compiled(*models.batch(2)), *optimizers(both[1:], momentum))
        both[1].zero_grad()
        check_training(both, compiled)


def test_another_error_of_a_pass_is_left_alone() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    (optimizer,) = optimizers([model], momentum)
    error = RuntimeError("something else")

    def fail(_: Tensor, **__: bool) -> None:
        raise error

    with pytest.raises(RuntimeError) as raised:
        optimizer.backward(model(*models.batch(2)), backward_fn=fail)
    assert raised.value is error
    assert error.__cause__ is None


@pytest.fixture
def _fast_inductor() -> Iterator[None]:
    with torch._inductor.config.patch(
        {
            # To look for vector instructions and compile headers takes half a minute.
            "cpp.vec_isa_ok": False,
            "cpp_cache_precompile_headers": False,
            "compile_threads": 1,
        }
    ):
        yield


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.usefixtures("_fast_inductor")
def test_the_cure_cures_inductor_whose_backward_pass_reuses_memory() -> None:
    weight = nn.Parameter(torch.eye(8, dtype=torch.float64))
    inputs, _ = models.batch(1, size=8)
    inputs = torch.cat([inputs, inputs[:, :2]], 1)

    def losses() -> list[Tensor]:
        features = ((inputs @ weight).tanh() @ weight).sigmoid()
        return [features.square().sum(), features.sin().sum()]

    compiled = torch.compile(losses)
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1))
    with torch._functorch.config.patch(donated_buffer=False):
        one_task(compiled(), optimizer)
        optimizer.zero_grad()
        # With buffers donated the second of these passes would be wrong by 0.1.
        optimizer.backward(compiled())
    actual = weight.grad
    optimizer.zero_grad()
    optimizer.backward(losses())
    assert_close(actual, weight.grad, rtol=1e-12, atol=1e-12)


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return AdamW(params, lr=0.01)


Step = Callable[[HarmonizedOptimizer, list[Tensor]], object]


def compiled_method(optimizer: HarmonizedOptimizer) -> Step:
    step = torch.compile(optimizer.step, backend="aot_eager")

    def train(optimizer: HarmonizedOptimizer, losses: list[Tensor]) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses)
        step()

    return train


def compiled_function(optimizer: HarmonizedOptimizer) -> Step:
    step = torch.compile(lambda: optimizer.step(), backend="aot_eager")

    def train(optimizer: HarmonizedOptimizer, losses: list[Tensor]) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses)
        step()

    return train


@pytest.mark.parametrize(
    ("compiled", "base", "exact"),
    [
        (compiled_method, momentum, 1e-12),
        # Compiled, torch keeps the number of steps of Adam in float32, and divides by it.
        (compiled_function, adamw, 1e-6),
    ],
)
def test_a_compiled_step_is_the_uncompiled_one(
    compiled: Callable[[HarmonizedOptimizer], Step],
    base: Callable[..., Optimizer],
    exact: float,
) -> None:
    both = pair(models.heads_on_a_trunk)
    eager, other = optimizers(both, base)
    step = compiled(other)
    for seed in range(4):
        data = models.batch(2, seed)
        eager.step(losses=both[0](*data))
        step(other, both[1](*data))
    assert counters["stats"]["unique_graphs"] > 0
    assert_close(both[1].state_dict(), both[0].state_dict(), rtol=exact, atol=exact)
    assert len(other.state) == 6


def test_a_compiled_step_follows_a_scheduler() -> None:
    both = pair(models.heads_on_a_trunk)

    def base(params: list[nn.Parameter]) -> Optimizer:
        return Adam(params, lr=torch.tensor(0.01, dtype=torch.float64))

    eager, other = optimizers(both, base)
    schedules = [ExponentialLR(optimizer, 0.5) for optimizer in (eager, other)]
    step = torch.compile(lambda: other.step(), backend="aot_eager")
    for seed in range(4):
        data = models.batch(2, seed)
        eager.step(losses=both[0](*data))
        other.zero_grad()
        other.backward(both[1](*data))
        step()
        for schedule in schedules:
            schedule.step()
    assert_close(both[1].state_dict(), both[0].state_dict(), rtol=1e-6, atol=1e-6)
    assert other.param_groups[0]["lr"] == 0.01 / 16


@looks_at_grad
def test_compiled_autograd_gives_the_same_gradients() -> None:
    both = pair(models.heads_on_a_trunk)
    eager, other = optimizers(both, momentum)
    for seed in range(2):
        data = models.batch(2, seed)
        eager.step(losses=both[0](*data))
        losses = both[1](*data)
        with compiled_autograd._enable(torch.compile(backend="aot_eager")):
            other.step(losses=losses)
    assert counters["compiled_autograd"]["captures"] > 0
    assert_close(both[1].state_dict(), both[0].state_dict(), rtol=1e-12, atol=1e-12)
