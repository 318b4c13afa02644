"""Object detection: the loss of the categories against that of the boxes, on shapes.

A small dense detector without anchors, after FCOS (Tian et al., 2019): every cell of a
grid says what it is the middle of, and how far the sides of the box are. Focal loss (Lin
et al., 2017) and generalized IoU (Rezatofighi et al., 2019).
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mtl.problem import Batch, Metric, Problem, Training, generator
from benchmarks.mtl.problems.average_precision import (
    Detections,
    Truths,
    average_precisions,
    iou,
)
from benchmarks.mtl.problems.networks import make_layer
from benchmarks.mtl.problems.shapes import CATEGORIES, SIDE, Labels, read_coco, shapes

STRIDE = 4
CELLS = SIDE // STRIDE
NOTHING = len(CATEGORIES)
WIDTH = 24
BATCH = 16
TESTS = 500
RATE = 3e-3
# Logit of a score of 0.01 before training, as in the paper of the focal loss.
SURPRISE = 4.6
LEAST_SCORE, CANDIDATES, OVERLAP = 0.05, 50, 0.5
# COCO's ten. The columns of the paper's Table 7 are the mean and five of them; its text
# says "from 0.5 to 0.9", but only with 0.95 does its mean fit its columns.
THRESHOLDS = torch.linspace(0.5, 0.95, 10, dtype=torch.float64)
SHOWN = {"AP50": 0, "AP60": 2, "AP70": 4, "AP80": 6, "AP90": 8}


class Data(NamedTuple):
    """Images with targets to train on, images with truths to test on.

    Attributes:
        images: ``[n, 1, 48, 48]``.
        categories: of every cell, int64 ``[n, 12, 12]``.
        distances: of every cell that is not of nothing, ``[n, 4, 12, 12]``.
        exam: ``[m, 1, 48, 48]``.
        truths: of the exam.
    """

    images: Tensor
    categories: Tensor
    distances: Tensor
    exam: Tensor
    truths: list[Truths]


class Detector(nn.Module):
    """A trunk of convolutions, a head for categories and one for boxes."""

    def __init__(self, *, normalised: bool = True) -> None:
        super().__init__()
        layer = partial(make_layer, normalised=normalised)
        self.trunk = nn.Sequential(
            *layer(1, WIDTH // 2, 5, 2),
            *layer(WIDTH // 2, WIDTH, 3, 2),
            *layer(WIDTH, WIDTH, 3),
            *layer(WIDTH, WIDTH, 3),
        )
        self.classify = nn.Sequential(
            *layer(WIDTH, WIDTH, 3), nn.Conv2d(WIDTH, len(CATEGORIES), 1)
        )
        self.locate = nn.Sequential(*layer(WIDTH, WIDTH, 3), nn.Conv2d(WIDTH, 4, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, 3, 12, 12]`` and distances in pixels ``[B, 4, 12, 12]``."""
        features = self.trunk(images)
        return self.classify(features) - SURPRISE, STRIDE * F.softplus(
            self.locate(features)
        )


def start(seed: int, *, normalised: bool = True) -> Training:
    """Give the training of a seed; sets the global random state."""
    data = load()
    torch.manual_seed(seed)
    model = Detector(normalised=normalised)

    def losses(batch: Batch) -> dict[str, Tensor]:
        images, categories, distances = batch
        logits, estimates = model(images)
        return {
            "classification": focal_loss(logits, categories),
            "box": box_loss(estimates, distances, categories != NOTHING),
        }

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        logits, distances = model(data.exam)
        found = [decode(*one) for one in zip(logits, distances, strict=True)]
        each = 100 * average_precisions(found, data.truths, THRESHOLDS)
        shown = {name: float(each[index]) for name, index in SHOWN.items()}
        return {"AP": float(each.mean()), **shown}

    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.trunk.parameters()),
        _batches(data, seed),
        losses,
        evaluate,
    )


def _problem(name: str, title: str, *, normalised: bool) -> Problem:
    return Problem(
        name,
        title,
        ("classification", "box"),
        (Metric("AP"), *(Metric(name, headline=False) for name in SHOWN)),
        steps=400,
        start=partial(start, normalised=normalised),
        weighted=("box",),
    )


PROBLEM = _problem(
    "detection", "shapes, what they are against where they are", normalised=True
)
PLAIN = _problem("detection-plain", "the same without normalization", normalised=False)
PROBLEMS = (PROBLEM, PLAIN)


@cache
def load() -> Data:
    """Draw the shapes, and split them: the last 500 are the exam."""
    images, annotations = shapes()
    labels = read_coco(annotations)
    return Data(
        images[:-TESTS],
        *targets(labels[:-TESTS]),
        images[-TESTS:],
        [Truths(_corners(one), one.categories) for one in labels[-TESTS:]],
    )


def targets(labels: Sequence[Labels]) -> tuple[Tensor, Tensor]:
    """Say what every cell of every image should answer.

    A cell is of a box if its middle is less than a cell away from the box's, along both
    axes: one to four cells are. Boxes must not overlap, or it may be of any of them.

    Returns:
        Categories, int64 ``[n, 12, 12]``, and distances from the middle of the cell to
        the left, top, right and bottom of its box in pixels, ``[n, 4, 12, 12]``, 0 where
        there is none.
    """
    corners = torch.cat([_corners(one) for one in labels]).float()[:, :, None, None]
    left_top, right_bottom = corners[:, :2], corners[:, 2:]
    middles = _middles()
    near = ((middles - (left_top + right_bottom) / 2).abs() < STRIDE).all(1)
    sides = torch.cat([middles - left_top, right_bottom - middles], 1)
    box, row, column = near.nonzero(as_tuple=True)
    counts = torch.tensor([len(one.categories) for one in labels])
    image = torch.arange(len(labels)).repeat_interleave(counts)[box]
    categories = torch.full((len(labels), CELLS, CELLS), NOTHING)
    categories[image, row, column] = torch.cat([one.categories for one in labels])[box]
    distances = torch.zeros(len(labels), 4, CELLS, CELLS)
    distances[image, :, row, column] = sides[box, :, row, column]
    return categories, distances


def focal_loss(
    logits: Tensor, categories: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss: the sum over cells and categories, by the number of cells with a box.

    Args:
        logits: ``[B, C, h, w]``.
        categories: int64 ``[B, h, w]``, C where there is no box.
        alpha: weight of what is there; that of what is not is 1 - alpha.
        gamma: how little counts what is right already.
    """
    wanted = F.one_hot(categories, logits.shape[1] + 1)[..., :-1].permute(0, 3, 1, 2)
    entropy = F.binary_cross_entropy_with_logits(
        logits, wanted.to(logits.dtype), reduction="none"
    )
    wrong = (wanted - logits.sigmoid()).abs()
    weights = torch.where(wanted == 1, alpha, 1 - alpha)
    return (weights * wrong**gamma * entropy).sum() / wanted.sum().clamp(min=1)


def box_loss(estimates: Tensor, distances: Tensor, chosen: Tensor) -> Tensor:
    """Mean of 1 - generalized IoU.

    The boxes of a cell both hold its middle, so that distances say all.

    Args:
        estimates: distances to the left, top, right and bottom, ``[B, 4, h, w]``.
        distances: those of the box.
        chosen: cells with a box, bool ``[B, h, w]``, at least one.
    """
    first, second = (sides.movedim(1, -1)[chosen] for sides in (estimates, distances))
    common = _area(torch.minimum(first, second))
    union = _area(first) + _area(second) - common
    hull = _area(torch.maximum(first, second))
    return (1 - common / union + (hull - union) / hull).mean()


def decode(logits: Tensor, distances: Tensor) -> Detections:
    """Make boxes of the answers of the cells of an image.

    Args:
        logits: ``[C, h, w]``.
        distances: ``[4, h, w]``.

    Returns:
        The surest boxes, the surest first, without those that overlap a surer one of
        the same category.
    """
    middles = _middles()
    corners = torch.cat([middles - distances[:2], middles + distances[2:]]).flatten(1).T
    scores, order = logits.sigmoid().flatten().sort(descending=True, stable=True)
    order = order[:CANDIDATES][scores[:CANDIDATES] > LEAST_SCORE]
    categories, cells = order // CELLS**2, order % CELLS**2
    kept = suppress(corners[cells], categories)
    return Detections(
        corners[cells][kept], categories[kept], scores[: len(order)][kept]
    )


def suppress(corners: Tensor, categories: Tensor) -> list[int]:
    """Non-maximum suppression: places of the boxes that stay.

    Args:
        corners: left, top, right, bottom, the surest first, ``[n, 4]``.
        categories: ``[n]``.
    """
    close = (iou(corners, corners) > OVERLAP) & (categories[:, None] == categories)
    kept: list[int] = []
    for index, row in enumerate(close.tolist()):
        if not any(row[other] for other in kept):
            kept.append(index)
    return kept


def _corners(labels: Labels) -> Tensor:
    left_top, size = labels.boxes[:, :2], labels.boxes[:, 2:]
    return torch.cat([left_top, left_top + size], 1)


def _middles() -> Tensor:
    """Abscissae and ordinates of the middles of the cells, ``[2, 12, 12]``."""
    along = (torch.arange(CELLS) + 0.5) * STRIDE
    return torch.stack([along.expand(CELLS, -1), along[:, None].expand(-1, CELLS)])


def _area(sides: Tensor) -> Tensor:
    return (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])


def _batches(data: Data, seed: int) -> Iterator[Batch]:
    draws = generator(seed, 1)
    while True:
        rows = torch.randint(len(data.images), (BATCH,), generator=draws)
        yield data.images[rows], data.categories[rows], data.distances[rows]
