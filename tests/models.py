"""Small float64 networks for tests, one for each way of sharing parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Tasks(nn.Module):
    """A trunk with one head per task; ``forward`` gives the K losses of a batch."""

    def __init__(self, trunk: nn.Module, heads: list[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(heads)

    def forward(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        features = self.trunk(inputs)
        outputs = [head(features)[:, 0] for head in self.heads]
        errors = zip(outputs, targets, strict=True)
        return [(output - target).square().mean() for output, target in errors]


def heads_on_a_trunk(tasks: int) -> Tasks:
    trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return Tasks(trunk, [nn.Linear(8, 1) for _ in range(tasks)])


def one_head_for_all(tasks: int) -> Tasks:
    head = nn.Linear(8, 1)
    return Tasks(nn.Sequential(nn.Linear(6, 8), nn.Tanh()), [head] * tasks)


def tied_weights(tasks: int) -> Tasks:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    trunk = nn.Sequential(first, nn.Tanh(), second)
    return Tasks(trunk, [nn.Linear(6, 1) for _ in range(tasks)])


def frozen_and_unused(tasks: int) -> Tasks:
    model = heads_on_a_trunk(tasks)
    model.trunk[0].bias.requires_grad_(False)  # type: ignore[index]  # Sequential
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    return model


def batch_norm(tasks: int) -> Tasks:
    trunk = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())
    return Tasks(trunk, [nn.Linear(8, 1) for _ in range(tasks)])


class Embedding(nn.Module):
    """Rows of a table, chosen by the signs of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        powers = 2 ** torch.arange(inputs.shape[1])
        rows: Tensor = self.table(((inputs > 0) * powers).sum(1))
        return rows.tanh()


def embedding(tasks: int) -> Tasks:
    return Tasks(Embedding(), [nn.Linear(8, 1) for _ in range(tasks)])


NETWORKS: list[Callable[[int], Tasks]] = [
    heads_on_a_trunk,
    one_head_for_all,
    tied_weights,
    frozen_and_unused,
    batch_norm,
    embedding,
]


def make(network: Callable[[int], Tasks], tasks: int, seed: int = 0) -> Tasks:
    """Build a network in float64 with weights that depend on the seed alone.

    All heads start alike, so that opposite targets put their tasks in conflict.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(tasks).double()
    for head in model.heads[1:]:
        head.load_state_dict(model.heads[0].state_dict())
    return model


def batch(tasks: int, seed: int = 0, size: int = 16) -> tuple[Tensor, Tensor]:
    """Draw inputs ``[size, 6]`` and targets ``[tasks, size]``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, 6, dtype=torch.float64, generator=generator)
    targets = torch.randn(tasks, size, dtype=torch.float64, generator=generator)
    # Every second target is about the opposite of the one before: tasks in conflict.
    targets[1::2] = 0.3 * targets[1::2] - targets[: tasks // 2 * 2 : 2]
    return inputs, targets


class WithFeatures(nn.Module):
    """A model that gives its features beside the losses, as one does for DDP."""

    def __init__(self, model: Tasks) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], Tensor]:
        features = self.model.trunk(inputs)
        outputs = [head(features)[:, 0] for head in self.model.heads]
        errors = zip(outputs, targets, strict=True)
        return [(output - y).square().mean() for output, y in errors], features
