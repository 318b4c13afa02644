"""Average precision of a detector, as COCO defines it (all sizes, 100 boxes an image)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST = 100  # boxes of a category in an image, as COCO
# The recalls of COCO; i / 100 rounds otherwise, and recalls often are such numbers.
RECALLS = 0.01 * torch.arange(101, dtype=torch.float64)


class Detections(NamedTuple):
    """Boxes found in an image.

    Attributes:
        corners: left, top, right, bottom, ``[n, 4]``.
        categories: int64 ``[n]``.
        scores: more is surer, ``[n]``.
    """

    corners: Tensor
    categories: Tensor
    scores: Tensor


class Truths(NamedTuple):
    """Boxes that are in an image.

    Attributes:
        corners: left, top, right, bottom, ``[m, 4]``.
        categories: int64 ``[m]``.
    """

    corners: Tensor
    categories: Tensor


def average_precisions(
    found: Sequence[Detections], truths: Sequence[Truths], thresholds: Tensor
) -> Tensor:
    """Give the mean, over categories, of the average precision at every threshold.

    A box is right if a truth of its category and image, not yet taken by a surer box,
    covers it with an IoU of at least the threshold; it takes the one that covers it
    best. The average is of the best precisions at no less than a recall of 0, 0.01, ...,
    1. Categories without a truth do not count.

    Args:
        found: detections of every image.
        truths: of the same images.
        thresholds: of the IoU, ``[T]``.

    Returns:
        In [0, 1], float64 ``[T]``; NaN if there are no truths at all.

    Raises:
        ValueError: if the numbers of images differ.
    """
    if len(found) != len(truths):
        raise ValueError(
            f"{len(found)} images with detections, {len(truths)} with truths"
        )
    categories = {int(one) for image in truths for one in image.categories}
    each = [_of_category(found, truths, thresholds, one) for one in sorted(categories)]
    if not each:
        return torch.full(thresholds.shape, torch.nan, dtype=torch.float64)
    return torch.stack(each).mean(0)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of all pairs of boxes.

    Args:
        first: left, top, right, bottom, ``[n, 4]``.
        second: ``[m, 4]``.

    Returns:
        ``[n, m]``.
    """
    corner = torch.maximum(first[:, None, :2], second[:, :2])
    opposite = torch.minimum(first[:, None, 2:], second[:, 2:])
    common = (opposite - corner).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1] - common)


def hits(ious: Tensor, thresholds: Tensor) -> Tensor:
    """Say which detections are right.

    Args:
        ious: of detections, the surest first, with truths, ``[n, m]``.
        thresholds: ``[T]``.

    Returns:
        bool ``[T, n]``.
    """
    right = torch.zeros(len(thresholds), len(ious), dtype=torch.bool)
    if ious.numel() == 0:
        return right
    every = torch.arange(len(thresholds))
    taken = torch.zeros(len(thresholds), ious.shape[1], dtype=torch.bool)
    for index, row in enumerate(ious):
        best, truth = row.where(~taken, -1).max(1)
        right[:, index] = best >= thresholds
        taken[every, truth] |= right[:, index]
    return right


def interpolated(right: Tensor, truths: int) -> Tensor:
    """Average precision of one category.

    Args:
        right: which detections of all images are right, the surest first, ``[T, n]``.
        truths: their number, at least 1.

    Returns:
        float64 ``[T]``.
    """
    true = right.double().cumsum(1)
    recalls = true / truths
    precisions = true / torch.arange(1, right.shape[1] + 1)
    # From each place on, the best: no precision rises with recall.
    best = precisions.flip(1).cummax(1).values.flip(1) if right.shape[1] else precisions
    places = torch.searchsorted(recalls, RECALLS.expand(len(right), -1).contiguous())
    none = best.new_zeros(len(right), 1)  # where the recall is never reached
    return torch.cat([best, none], 1).gather(1, places).mean(1)


def _of_category(
    found: Sequence[Detections],
    truths: Sequence[Truths],
    thresholds: Tensor,
    category: int,
) -> Tensor:
    scores, right, count = [], [], 0
    for image, truth in zip(found, truths, strict=True):
        wanted = truth.corners[truth.categories == category].double()
        chosen = image.categories == category
        order = image.scores[chosen].argsort(descending=True, stable=True)[:MOST]
        boxes = image.corners[chosen][order].double()
        scores.append(image.scores[chosen][order])
        right.append(hits(iou(boxes, wanted), thresholds))
        count += len(wanted)
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return interpolated(torch.cat(right, 1)[:, order], count)
