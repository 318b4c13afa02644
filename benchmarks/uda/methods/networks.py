"""The networks: a LeNet or, for SSRT, a transformer as G; heads C, discriminator D."""

import torch
from torch import Tensor, nn

from benchmarks.common.digits import SIZE
from benchmarks.uda.data import LARGE
from benchmarks.uda.methods.vit import WIDTH, VisionTransformer

CLASSES = 10
HIDDEN = 128
HEADS = {"MCD": 2, "DWL": 3}
"""How many heads a method has, if not one."""


class Networks(nn.Module):
    """What a method trains (section 3.2): G, its heads, perhaps a discriminator.

    Attributes:
        generator: images ``[B, ...]`` to features ``[B, f]``; shared.
        heads: classifiers, features ``[B, f]`` to logits ``[B, c]``; several for MCD
            and DWL, a :class:`Bridged` one for GVB.
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
        """Return class probabilities, ``[B, c]``: the mean over the heads."""
        features = self.generator(images)
        return torch.stack([head(features).softmax(1) for head in self.heads]).mean(0)


class Bridged(nn.Module):
    """A linear map without what its bridge says that the domains do not share (GVB).

    Attributes:
        trunk: what comes before both.
        whole: the map itself.
        bridge: of the same shape; its output is taken away, and kept small.
    """

    def __init__(self, trunk: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.whole = nn.Linear(inputs, outputs)
        self.bridge = nn.Linear(inputs, outputs)

    def split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of the map, and what is taken away, ``[B, c]`` each."""
        hidden = self.trunk(features)
        bridge: Tensor = self.bridge(hidden)
        return self.whole(hidden) - bridge, bridge

    def forward(self, features: Tensor) -> Tensor:
        """Return what is left of the map, ``[B, c]``."""
        left, _ = self.split(features)
        return left


def build_networks(method: str, seed: int, size: int = SIZE) -> Networks:
    """Build a method's networks for digits of a size that ``_LENETS`` knows.

    ``seed`` alone decides the initial weights. Sets the global random state, from which
    dropout draws later: runs of one method and seed therefore drop the same units, too.
    """
    torch.manual_seed(seed)
    generator, features = _transformer(size) if method == "SSRT" else _LENETS[size]()
    networks = assemble(method, generator, features, CLASSES)
    in_channels_last(generator)
    return networks


class ChannelsLast(nn.Module):
    """Says of images ``[B, 1, h, w]`` that their one channel is last.

    Else torch takes them for the usual layout, and G needs half as much time again.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Return the same numbers in the same order, with other strides."""
        return images.to(memory_format=torch.channels_last)


def in_channels_last(module: nn.Module) -> nn.Module:
    """Lay out convolutions with their channels last, in place; return the module.

    Same arithmetic, half the time of these on a CPU.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4:
            weight = parameter.data.contiguous(memory_format=torch.channels_last)
            parameter.data = weight
    return module


def assemble(
    method: str, generator: nn.Module, features: int, classes: int
) -> Networks:
    """Add what a method needs to a generator of so many features."""
    heads: list[nn.Module]
    if method in HEADS:
        heads = [_perceptron(features, classes) for _ in range(HEADS[method])]
    else:
        heads = [nn.Linear(features, classes)]
    discriminator: nn.Module = nn.Identity()
    if method in ("DANN", "DWL", "SSRT"):
        discriminator = _perceptron(features, 1)
    elif method == "CDAN+E":
        discriminator = _perceptron(features * classes, 1)
    elif method == "GVB":
        heads = [Bridged(nn.Identity(), features, classes)]
        hidden = nn.Sequential(nn.Linear(classes, HIDDEN), nn.ReLU())
        discriminator = Bridged(hidden, HIDDEN, 1)
    return Networks(generator, heads, discriminator)


def reverse_gradient(tensor: Tensor, coefficient: float) -> Tensor:
    """Return ``tensor``'s values, whose gradient is multiplied by ``-coefficient``."""
    # The difference is exactly 0 in value, and its gradient is that of ``tensor``.
    constant = tensor.detach()
    return constant - coefficient * (tensor - constant)


def _small_lenet() -> tuple[nn.Module, int]:
    """Make one of 30 000 parameters, for 16x16."""
    lenet = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 128),
        nn.ReLU(),
        nn.Dropout(),
    )
    return lenet, 128


def lenet() -> tuple[nn.Module, int]:
    """Make the one of the paper's digits, for 28x28: 430 000 parameters."""
    lenet = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(20, 50, 5),
        nn.Dropout2d(),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Dropout(),
    )
    return lenet, 500


def _transformer(size: int) -> tuple[nn.Module, int]:
    return VisionTransformer(size), WIDTH


_LENETS = {SIZE: _small_lenet, LARGE: lenet}


def adversary(first: nn.Linear, second: nn.Linear, last: nn.Linear) -> nn.Sequential:
    """Make a published discriminator of three layers, which drops half of its units."""
    return nn.Sequential(
        first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout(), last
    )


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    )
