"""Networks to step on, each with the losses of K tasks on one fixed batch.

Every task reaches every parameter, since some peers treat a parameter that a task does
not reach as one with a zero gradient, and others fail: so all do the same work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

OUTPUTS = 32


@dataclass(frozen=True)
class Problem:
    """A network and what gives its K losses, with a new graph at each call.

    Attributes:
        model: holds all parameters.
        losses: gives the K losses.
        with_features: gives them, and the last hidden representation of the trunk.
    """

    model: nn.Module
    losses: Callable[[], list[Tensor]]
    with_features: Callable[[], tuple[list[Tensor], Tensor]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the network, in its order."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """Bytes of one copy of the gradients."""
        return sum(parameter.nbytes for parameter in self.parameters)


@dataclass(frozen=True)
class Network:
    """How to build a network, and how to draw its batch."""

    build: Callable[[], nn.Sequential]
    draw: Callable[[], Tensor]


def make(name: str, tasks: int, device: torch.device | str = "cpu") -> Problem:
    """Build a network of :data:`NETWORKS` and its losses, always with the same numbers.

    The losses are squared errors of its ``[batch, 32]`` outputs. The targets of every
    second task have a correlation of -0.5 with those of the task before: these two are
    in conflict, but not nearly opposite.
    """
    network = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = network.build(), network.draw()
        targets = torch.randn(tasks, len(inputs), OUTPUTS)
    targets[1::2] = 0.75**0.5 * targets[1::2] - 0.5 * targets[: tasks // 2 * 2 : 2]
    model, inputs, targets = model.to(device), inputs.to(device), targets.to(device)

    def compare(outputs: Tensor) -> list[Tensor]:
        return [nn.functional.mse_loss(outputs, target) for target in targets]

    def with_features() -> tuple[list[Tensor], Tensor]:
        features = model[:-1](inputs)
        return compare(model[-1](features)), features

    return Problem(model, lambda: compare(model(inputs)), with_features)


def make_pair(ratio: float, size: int = 10**5) -> Problem:
    """Make two tasks whose gradients have a cosine of -0.5 and this ratio of norms."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, size, generator=generator, dtype=torch.float64)
    other -= one.dot(other) / one.dot(one) * one
    other *= one.norm() / other.norm()
    rows = torch.stack([ratio * one, 0.75**0.5 * other - 0.5 * one])
    model = _Product(rows.float())

    def with_features() -> tuple[list[Tensor], Tensor]:
        features = model.vector * 1
        return list((model.get_buffer("rows") @ features).unbind()), features

    return Problem(model, lambda: list(model().unbind()), with_features)


class _Product(nn.Module):
    """Products of the parameters with constant rows: these are their gradients."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.vector = nn.Parameter(torch.zeros(rows.shape[1]))

    def forward(self) -> Tensor:
        return self.get_buffer("rows") @ self.vector


class _Block(nn.Module):
    """Two convolutions around which the input is added, as in ResNet-18."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.inner = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.outer = nn.Sequential()
        if stride > 1:
            self.outer.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.outer.append(nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        sums: Tensor = self.inner(images) + self.outer(images)
        return sums.relu()


def _resnet() -> nn.Sequential:
    """ResNet-18 as usual for 32x32 images: begins with 3x3, and pools nothing."""
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    blocks = [_Block(*pair) for pair in pairwise(widths)]
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, OUTPUTS),
    )


class _Layer(nn.Module):
    """Attention over all tokens and a layer of four times the width, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.inner = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        parts = self.project(self.norm(tokens)).view(batch, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
        seen = nn.functional.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.merge(seen.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = tokens + self.inner(tokens)
        return result


class _Mean(nn.Module):
    """Mean over the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


def _transformer() -> nn.Sequential:
    """Six layers of width 256, with an embedding of 1000 tokens."""
    layers = [_Layer(256, heads=4) for _ in range(6)]
    head = nn.Linear(256, OUTPUTS)
    return nn.Sequential(nn.Embedding(1000, 256), *layers, _Mean(), head)


def _mlp(*widths: int) -> nn.Sequential:
    model = nn.Sequential()
    for pair in pairwise(widths):
        model.extend([nn.Linear(*pair), nn.ReLU()])
    return model.append(nn.Linear(widths[-1], OUTPUTS))


class _Residual(nn.Module):
    """The residual of Burgers' equation at each point, of a small network's solution."""

    def __init__(self) -> None:
        super().__init__()
        widths = (2, 64, 64, 64)
        layers = [[nn.Linear(*pair), nn.Tanh()] for pair in pairwise(widths)]
        self.solution = nn.Sequential(*chain(*layers), nn.Linear(64, 1))

    def forward(self, points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        solution = self.solution(points)[..., 0]
        slopes = _slopes(solution, points)
        bend = _slopes(slopes[..., 0], points)[..., 0]
        residual: Tensor = slopes[..., 1] + solution * slopes[..., 0] - 0.01 * bend
        # So small that the targets, which are noise, tell which way the tasks pull.
        return 0.02 * residual


def _slopes(values: Tensor, points: Tensor) -> Tensor:
    (slopes,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return slopes


def _pde() -> nn.Sequential:
    """A residual, and a head that leaves it as it is."""
    return nn.Sequential(_Residual(), nn.Identity())


NETWORKS = {
    # 11.2, 5.0, 4.8, 4.8, 0.05 and 0.01 million parameters.
    "resnet18": Network(_resnet, partial(torch.randn, 16, 3, 32, 32)),
    "transformer": Network(_transformer, partial(torch.randint, 1000, (8, 64))),
    "mlp128": Network(
        partial(_mlp, 512, 1536, 1536, 1024), partial(torch.randn, 128, 512)
    ),
    "mlp32": Network(
        partial(_mlp, 512, 1536, 1536, 1024), partial(torch.randn, 32, 512)
    ),
    "tiny": Network(partial(_mlp, 64, *[88] * 6), partial(torch.randn, 32, 64)),
    "pde": Network(_pde, partial(torch.randn, 8, OUTPUTS, 2)),
}
