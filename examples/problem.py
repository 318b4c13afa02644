"""What all recipes train: one trunk, two heads, and targets that pull it apart."""

import torch
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A trunk with two heads that start alike; the weights depend on the seed alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
            self.up, self.down = nn.Linear(8, 1), nn.Linear(8, 1)
        self.down.load_state_dict(self.up.state_dict())

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Give the outputs of both heads, shape ``[batch]`` each."""
        features = self.trunk(inputs)
        return self.up(features)[:, 0], self.down(features)[:, 0]


def make_data(size: int = 64, *, conflict: bool = True) -> tuple[Tensor, Tensor]:
    """Draw inputs ``[size, 6]`` and targets ``[size, 2]``, of opposite sign or alike."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, 6, generator=generator)
    up = 2 + inputs[:, 0]
    down = -1.2 * up if conflict else 1.2 * up
    return inputs, torch.stack([up, down], 1)


def task_losses(outputs: tuple[Tensor, Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Give the mean squared error of each head."""
    up, down = outputs
    return {
        "up": (up - targets[:, 0]).square().mean(),
        "down": (down - targets[:, 1]).square().mean(),
    }


def difference(first: nn.Module, second: nn.Module) -> float:
    """Give the largest difference between the parameters of two models."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    with torch.no_grad():
        return max(float((one - other).abs().max()) for one, other in pairs)
