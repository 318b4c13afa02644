"""Continual learning: earlier tasks are kept better, and GEM is the GEM of its paper."""

from functools import cache

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.optim import SGD

from examples.continual_learning import accuracies, gem, harmonized, make_tasks, train

SEEDS = (0, 1)


@cache
def accuracy(way: str, seed: int) -> tuple[float, float]:
    """Of the earlier tasks, in the mean, and of the last."""
    *earlier, last = accuracies(*train(way, seed))
    return sum(earlier) / len(earlier), last


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("way", ["gem", "protect"])
def test_earlier_tasks_are_forgotten_less_and_the_new_one_learned(
    way: str, seed: int
) -> None:
    (earlier, last), (without, alone) = accuracy(way, seed), accuracy("new", seed)
    assert earlier > without + 15
    assert last > alone - 5


def test_tasks_are_the_same_digits_with_their_pixels_in_another_order() -> None:
    first, second, _ = make_tasks(seed=0)
    assert first.labels.equal(second.labels)
    assert not first.images.equal(second.images)
    assert first.images.sort(1).values.equal(second.images.sort(1).values)


@pytest.mark.parametrize("product", [-0.5, 0.0, 0.5])
def test_gem_with_one_memory_is_the_projection_of_a_gem(product: float) -> None:
    new, memory = torch.tensor([1.0, 0.0]), torch.tensor([product, 1.0])
    gradients = torch.stack([new, memory])
    weights = gem(gradients @ gradients.T)
    expected = new - min(0.0, product) / memory.square().sum() * memory
    torch.testing.assert_close(weights @ gradients, expected)


def test_no_step_of_gem_sets_a_memory_back_whatever_the_momentum() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    base = SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = harmonized("gem", base, ["a", "b"])
    inputs, targets = torch.randn(3, 16, 4).double(), torch.randn(3, 16, 1).double()
    parameters = [*model.parameters()]
    opposed = 0
    for _ in range(50):
        pairs = zip(["new", "a", "b"], inputs, targets, strict=True)
        losses = {name: (model(x) - y).square().mean() for name, x, y in pairs}
        slopes = [grad(losses[name], parameters, retain_graph=True) for name in "ab"]
        before = [parameter.detach().clone() for parameter in parameters]
        optimizer.step(losses=losses)
        for memory in slopes:
            steps = zip(memory, parameters, before, strict=True)
            rise = sum(((now - old) * slope).sum() for slope, now, old in steps)
            assert rise < 1e-6
        assert optimizer.last is not None
        opposed += bool((optimizer.last.cosines[0] < 0).any())
        # A memory is not trained on: it counts only as far as the update would oppose it.
        weights, gramian = optimizer.last.weights, optimizer.last.gramian
        assert weights[0] == 1
        assert (weights * (gramian @ weights))[1:].abs().max() < 1e-6
    assert opposed > 10
