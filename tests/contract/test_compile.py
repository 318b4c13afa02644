"""torch.compile: a compiled model with one backward pass per task, a compiled step."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch._inductor.cpu_vec_isa
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, measure
from tests import models
from tests.memory import allocated
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
    """Let no test see what another compiled, in this process or on the disk."""
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
def test_a_model_that_ran_before_it_was_wrapped_trains_as_an_uncompiled_one(
    before: Before,
) -> None:
    both = pair(models.heads_on_a_trunk)
    compiled = torch.compile(both[1], backend="aot_eager")
    before(compiled(*models.batch(2)), *optimizers(both[1:], momentum))
    both[1].zero_grad()
    check_training(both, compiled)


def test_a_compiled_loop_of_the_plain_sum_is_measured_on_the_way() -> None:
    model, eager = pair(models.heads_on_a_trunk)
    compiled = torch.compile(model, backend="aot_eager")
    data = models.batch(2)
    torch.stack(compiled(*data)).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    actual = measure(compiled(*data), model.parameters())
    assert_close(actual.gramian, measure(eager(*data), eager.parameters()).gramian)


def test_a_model_that_one_task_ran_through_may_meet_others() -> None:
    """A batch without the labels of a task comes first, or one of another shape later."""
    both = pair(models.heads_on_a_trunk)
    # Without momentum: a compiled backward pass gives zeros where another gives None.
    eager, other = optimizers(both, partial(SGD, lr=0.05))
    compiled = torch.compile(both[1], backend="aot_eager")
    for size, tasks in [(32, 1), (32, 2), (7, 1), (7, 2), (32, 2)]:
        data = models.batch(2, size, size=size)
        eager.step(losses=dict(zip("ab"[:tasks], both[0](*data), strict=False)))
        other.step(losses=dict(zip("ab"[:tasks], compiled(*data), strict=False)))
    assert_close(both[1].state_dict(), both[0].state_dict(), rtol=1e-12, atol=1e-12)


def compiled_earlier(model: Tasks) -> Model:
    """Compile a model as if ghopt was imported after its first backward pass."""
    compiled = torch.compile(model, backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=True):
        run(torch.stack(compiled(*models.batch(2))).sum(), retain_graph=False)
    return compiled


def by_backward(losses: list[Tensor], optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(losses)


def by_backward_fn(losses: list[Tensor], optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(losses, backward_fn=run)


def by_one_kept_pass(losses: list[Tensor], optimizer: HarmonizedOptimizer) -> None:
    optimizer.backward(losses[:1], retain_graph=True)


def by_measure(losses: list[Tensor], optimizer: HarmonizedOptimizer) -> None:
    measure(losses, optimizer.param_groups[0]["params"])


@pytest.mark.parametrize(
    "several", [by_backward, by_backward_fn, by_one_kept_pass, by_measure]
)
def test_a_graph_that_is_older_than_ghopt_is_refused_and_nothing_is_lost(
    several: Before,
) -> None:
    both = pair(models.heads_on_a_trunk)
    compiled = compiled_earlier(both[1])
    (optimizer,) = optimizers(both[1:], momentum)
    held = [
        (p.grad, p.grad.clone()) for p in both[1].parameters() if p.grad is not None
    ]
    assert len(held) == 6
    with pytest.raises(RuntimeError, match=r"compiled before.*torch\.compiler\.reset"):
        several([2 * loss for loss in compiled(*models.batch(2))], optimizer)
    for p, (grad, value) in zip(both[1].parameters(), held, strict=True):
        assert p.grad is grad
        assert grad.equal(value)
    torch.compiler.reset()
    counters.clear()
    both[1].zero_grad()
    check_training(both, compiled)


def test_an_older_graph_still_serves_one_pass() -> None:
    both = pair(models.heads_on_a_trunk)
    eager, other = optimizers(both, momentum)
    compiled = compiled_earlier(both[1])
    other.step(losses=compiled(*models.batch(2))[:1])
    eager.step(losses=both[0](*models.batch(2))[:1])
    assert_close(both[1].state_dict(), both[0].state_dict(), rtol=1e-12, atol=1e-12)


def test_a_graph_donates_nothing_where_several_passes_are_its_first() -> None:
    both = pair(models.heads_on_a_trunk)
    with torch._functorch.config.patch(donated_buffer=True):
        check_training(both, torch.compile(both[1], backend="aot_eager"))


@looks_at_grad
def test_a_total_that_was_compiled_earlier_is_refused() -> None:
    weight = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
    matrix = torch.eye(2, dtype=torch.float64)
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1))

    @torch.compile(backend="aot_eager")
    def total(a: Tensor, b: Tensor) -> Tensor:
        return (torch.stack([a, b])[None] @ matrix).tanh().sum()

    with torch._functorch.config.patch(donated_buffer=True):
        run(total(weight.sin(), weight.cos()), retain_graph=False)
    losses = [weight.sin(), weight.cos()]
    with pytest.raises(RuntimeError, match="compiled before"):
        optimizer.backward(losses, total=total(*losses))


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
def _fast_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # To look for vector instructions and compile headers takes half a minute. The
    # option `cpp.vec_isa_ok = False` would be remembered for the rest of the process,
    # where code that another process has stored for vectors then doesn't compile.
    monkeypatch.setattr(torch._inductor.cpu_vec_isa, "valid_vec_isa_list", list)
    with torch._inductor.config.patch(
        {
            "cpp_cache_precompile_headers": False,
            "compile_threads": 1,
        }
    ):
        yield


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="inductor needs a compiler"
)


@needs_compiler
@pytest.mark.usefixtures("_fast_inductor")
def test_no_pass_of_inductor_reuses_memory_of_the_forward_pass() -> None:
    weight = nn.Parameter(torch.eye(8, dtype=torch.float64))
    inputs, _ = models.batch(1, size=8)
    inputs = torch.cat([inputs, inputs[:, :2]], 1)

    def losses() -> list[Tensor]:
        features = ((inputs @ weight).tanh() @ weight).sigmoid()
        return [features.square().sum(), features.sin().sum()]

    compiled = torch.compile(losses)
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1))
    one_task(compiled(), optimizer)
    optimizer.zero_grad()
    # With buffers donated the second of these passes would be wrong by 0.1.
    optimizer.backward(compiled())
    actual = weight.grad
    optimizer.zero_grad()
    optimizer.backward(losses())
    assert_close(actual, weight.grad, rtol=1e-12, atol=1e-12)


MODEL = """
import sys, torch
import torch._functorch.config, torch._inductor.config
from torch._dynamo.utils import counters

torch._inductor.config.cpp.vec_isa_ok = False
torch._inductor.config.cpp_cache_precompile_headers = False
torch._inductor.config.compile_threads = 1
torch._functorch.config.enable_autograd_cache = sys.argv[1] == "both"
torch.manual_seed(0)
weight = torch.nn.Parameter(torch.eye(8, dtype=torch.float64))
inputs = torch.randn(8, 8, dtype=torch.float64)

def losses():
    features = ((inputs @ weight).tanh() @ weight).sigmoid()
    return [features.square().sum(), features.sin().sum()]

compiled = torch.compile(losses)
"""

PLAIN = """
sum(compiled()).backward()
"""

HARMONIZED = """
from ghopt import HarmonizedOptimizer

optimizer = HarmonizedOptimizer(torch.optim.SGD([weight], lr=0.1))
optimizer.backward(compiled())
actual = weight.grad
optimizer.zero_grad()
optimizer.backward(losses())
torch.testing.assert_close(actual, weight.grad, rtol=1e-12, atol=1e-12)
"""

HITS = """
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@needs_compiler
@pytest.mark.slow
def test_a_plain_training_leaves_no_wrong_graphs_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline first, then with ghopt: without it the gradient was wrong by 0.1."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def hits(program: str, caches: str) -> int:
        command = [sys.executable, "-c", MODEL + program + HITS, caches]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert hits(PLAIN, "both") == 0
    assert hits(HARMONIZED, "inductor") == 0
    for caches in ("both", "inductor"):
        assert hits(HARMONIZED, caches) > 0
        assert hits(PLAIN, caches) > 0


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()]
    return nn.Sequential(*layers, *layers, *layers), torch.randn(1024, 64)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(64, 4, 256, 0.0, "gelu", batch_first=True)
    return layer, torch.randn(16, 64, 64)


def peak_of_plain_training(
    network: Callable[[], tuple[nn.Module, Tensor]], *, donated: bool
) -> int:
    """Count the bytes that a compiled training of one loss holds at once."""
    model, inputs = network()
    compiled = torch.compile(model)

    def train() -> None:
        model.zero_grad()
        run(compiled(inputs).square().mean(), retain_graph=False)

    with torch._functorch.config.patch(donated_buffer=donated):
        train()
        return allocated(train)[1]


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("_fast_inductor")
@pytest.mark.parametrize("network", [mlp, transformer])
def test_a_plain_training_needs_no_more_memory_where_buffers_are_kept(
    network: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    given_away = peak_of_plain_training(network, donated=True)
    torch._dynamo.reset()
    assert peak_of_plain_training(network, donated=False) == given_away


def adamw(params: list[nn.Parameter]) -> Optimizer:
    return AdamW(params, lr=0.01)


Train = Callable[[HarmonizedOptimizer, list[Tensor]], object]


def compiled_method(optimizer: HarmonizedOptimizer) -> Train:
    step = torch.compile(optimizer.step, backend="aot_eager")

    def train(optimizer: HarmonizedOptimizer, losses: list[Tensor]) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses)
        step()

    return train


def compiled_function(optimizer: HarmonizedOptimizer) -> Train:
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
    compiled: Callable[[HarmonizedOptimizer], Train],
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
