"""The networks: a small LeNet as generator G, heads C, discriminator D."""

import torch
from torch import Tensor, nn

from benchmarks.uda.data import SIZE

CLASSES = 10
FEATURES = 128
HIDDEN = 128


class Networks(nn.Module):
    """What a method trains (section 3.2): G, its heads, perhaps a discriminator.

    Attributes:
        generator: images ``[B, 1, 16, 16]`` to features ``[B, 128]``; shared.
        heads: classifiers, features ``[B, 128]`` to logits ``[B, 10]``; two for MCD.
        discriminator: its input to one logit ``[B, 1]``, positive for the source
            domain; the identity for methods that have none.
    """

    def __init__(
        self, generator: nn.Module, heads: list[nn.Module], discriminator: nn.Module
    ) -> None:
        super().__init__()
        self.generator = generator
        self.heads = nn.ModuleList(heads)
        self.discriminator = discriminator

    def forward(self, images: Tensor) -> Tensor:
        """Return class probabilities, ``[B, 10]``: the mean over the heads."""
        features = self.generator(images)
        return torch.stack([head(features).softmax(1) for head in self.heads]).mean(0)


def build_networks(method: str, seed: int) -> Networks:
    """Build a method's networks with initial weights that ``seed`` alone decides.

    Sets the global random state, from which dropout draws later: runs of one method and
    seed therefore also drop the same units.
    """
    torch.manual_seed(seed)
    generator = _lenet()
    if method == "MCD":
        heads: list[nn.Module] = [_perceptron(FEATURES, CLASSES) for _ in range(2)]
    else:
        heads = [nn.Linear(FEATURES, CLASSES)]
    discriminator: nn.Module = nn.Identity()
    if method == "DANN":
        discriminator = _perceptron(FEATURES, 1)
    elif method == "CDAN+E":
        discriminator = _perceptron(FEATURES * CLASSES, 1)
    networks = Networks(generator, heads, discriminator)
    for parameter in generator.parameters():
        if parameter.dim() == 4:
            # Same arithmetic, half the time of these convolutions on a CPU.
            weight = parameter.data.contiguous(memory_format=torch.channels_last)
            parameter.data = weight
    return networks


def reverse_gradient(tensor: Tensor, coefficient: float) -> Tensor:
    """Return ``tensor``'s values, whose gradient is multiplied by ``-coefficient``."""
    # The difference is exactly 0 in value, and its gradient is that of ``tensor``.
    constant = tensor.detach()
    return constant - coefficient * (tensor - constant)


def _lenet() -> nn.Sequential:
    side = (SIZE // 2 - 4) // 2
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, FEATURES),
        nn.ReLU(),
        nn.Dropout(),
    )


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    )
