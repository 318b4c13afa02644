"""LoRA: what is frozen costs nothing, and the adapters train as in a literal loop."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.optim import SGD
from torch.testing import assert_close

from examples.peft_lora import losses_of, make_batch, make_model, train
from ghopt import HarmonizedOptimizer
from tests.examples.oracle import theorem_1
from tests.memory import allocated

# peft 0.21 asks transformers 5.24 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def size_of(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def split(model: torch.nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    parameters = [*model.parameters()]
    return (
        [p for p in parameters if p.requires_grad],
        [p for p in parameters if not p.requires_grad],
    )


def test_adapters_train_as_in_a_literal_loop_and_the_rest_stays() -> None:
    # Without dropout, which each draws by itself.
    model, expected = make_model().double().eval(), make_model().double().eval()
    adapters, _ = split(expected)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.5))
    literal = SGD(adapters, lr=0.5)
    conflicts = 0
    for step in range(6):
        optimizer.step(losses=losses_of(model, make_batch(step)))
        losses = losses_of(expected, make_batch(step)).values()
        parts = [torch.autograd.grad(loss, adapters) for loss in losses]
        rows = [torch.cat([part.flatten() for part in grads]) for grads in parts]
        weights = theorem_1(*rows)
        conflicts += weights != (1, 1)
        for parameter, first, second in zip(adapters, *parts, strict=True):
            parameter.grad = weights[0] * first + weights[1] * second
        literal.step()
    assert conflicts
    assert_close([*model.parameters()], [*expected.parameters()], rtol=0, atol=1e-10)
    assert_close(split(model)[1], split(make_model().double())[1], rtol=0, atol=0)


def test_both_tasks_are_learned() -> None:
    model = make_model()
    before = losses_of(model, make_batch(-1))
    train(model)
    after = losses_of(model, make_batch(-1))
    assert all(after[name] < before[name] - 0.5 for name in before)


def memory_of(
    run: Callable[[HarmonizedOptimizer, dict[str, Tensor]], object],
) -> tuple[float, float]:
    """Of forward and backward, what they leave and their peak, in copies of adapters."""
    model = make_model()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    batch = make_batch(0)
    gc.collect()  # what the profiler saw before would count as freed by this call
    held, peak = allocated(lambda: run(optimizer, losses_of(model, batch)))
    unit = size_of(split(model)[0])
    return held / unit, peak / unit


def literal(optimizer: HarmonizedOptimizer, losses: dict[str, Tensor]) -> None:
    """Keep the gradient of each task, of the adapters, and sum them."""
    parameters = optimizer.param_groups[0]["params"]
    adapters = [p for p in parameters if p.requires_grad]
    up = torch.autograd.grad(losses["up"], adapters, retain_graph=True)
    down = torch.autograd.grad(losses["down"], adapters)
    for parameter, first, second in zip(adapters, up, down, strict=True):
        parameter.grad = first.add_(second)


def test_memory_is_that_of_copies_of_the_adapters() -> None:
    adapters, frozen = split(make_model())
    assert size_of(frozen) > 15 * size_of(adapters)
    _, expected = memory_of(literal)
    left, needed = memory_of(lambda ours, losses: ours.backward(losses))
    kept, _ = memory_of(
        lambda ours, losses: ours.backward(losses, accumulate_only=True)
    )
    assert left == pytest.approx(1, abs=0.05)
    assert kept == pytest.approx(2, abs=0.05)
    assert needed < expected + 0.2
