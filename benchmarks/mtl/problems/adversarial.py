"""Adversarial training: the loss of clean digits against that of attacked ones.

The attack is PGD (Madry et al., 2018): several steps along the sign of the gradient, from
a random start, inside the L-infinity ball of the radius and inside [0, 1].
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.digits import SIZE, Split
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

SMALL, LARGE = 0.1, 0.3
BATCH = 32
RATE = 3e-3
STEPS, TEST_STEPS, TEST_STARTS = 5, 20, 2
TESTS = 500


def start(seed: int, radius: float) -> Training:
    """Give the training of a seed; sets the global random state."""
    train, test = digits()
    exam = Split(test.images[:TESTS], test.labels[:TESTS])
    torch.manual_seed(seed)
    model = nn.Sequential(lenet(SIZE, 64), nn.Linear(64, 10))
    draws = generator(seed, 2)

    def losses(batch: Batch) -> dict[str, Tensor]:
        images, labels = batch
        attacked = pgd(model, images, labels, radius, STEPS, draws)
        return {
            "clean": F.cross_entropy(model(images), labels),
            "adversarial": F.cross_entropy(model(attacked), labels),
        }

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            clean = accuracy(model(exam.images), exam.labels)
        robust = robust_accuracy(model, exam, radius, generator(0))
        return {"clean acc. %": clean, "robust acc. %": robust}

    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.parameters()),
        _batches(train, seed),
        losses,
        evaluate,
    )


def make_problem(name: str, radius: float) -> Problem:
    """Make the problem of a radius, in units of the range of grey."""
    return Problem(
        name,
        f"clean digits against PGD of radius {radius}",
        ("clean", "adversarial"),
        (Metric("clean acc. %"), Metric("robust acc. %")),
        steps=300,
        start=partial(start, radius=radius),
        needs=("mlxtend",),
    )


PROBLEMS = (
    make_problem("adversarial-small", SMALL),
    make_problem("adversarial", LARGE),
)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    radius: float,
    steps: int,
    draws: torch.Generator,
) -> Tensor:
    """Attack images so that the cross entropy rises.

    Each step goes 2.5 radii divided by the number of steps, as in Madry et al. Does not
    touch the ``.grad`` of the model.

    Args:
        model: images to logits ``[B, classes]``.
        images: in [0, 1], ``[B, 1, s, s]``.
        labels: ``[B]``.
        radius: most that a pixel may change.
        steps: number of steps; 0 gives the random start.
        draws: for the random start.

    Returns:
        Attacked images, detached, in [0, 1].
    """
    low, high = (images - radius).clamp(min=0), (images + radius).clamp(max=1)
    noise = torch.rand(images.shape, generator=draws) * 2 - 1
    attacked = (images + radius * noise).clamp(0, 1)
    for _ in range(steps):
        attacked = attacked.detach().requires_grad_()
        loss = F.cross_entropy(model(attacked), labels)
        (slope,) = torch.autograd.grad(loss, attacked)
        moved = attacked.detach() + 2.5 * radius / steps * slope.sign()
        attacked = torch.minimum(torch.maximum(moved, low), high)
    return attacked


def robust_accuracy(
    model: nn.Module, exam: Split, radius: float, draws: torch.Generator
) -> float:
    """Share of images that are right as they are and under every attack, in percent.

    Stronger than in training: 20 steps, not 5, and two random starts.
    """
    with torch.no_grad():
        right = model(exam.images).argmax(1) == exam.labels
    for _ in range(TEST_STARTS):
        attacked = pgd(model, exam.images, exam.labels, radius, TEST_STEPS, draws)
        with torch.no_grad():
            right &= model(attacked).argmax(1) == exam.labels
    return 100 * float(right.double().mean())


def _batches(split: Split, seed: int) -> Iterator[Batch]:
    draws = generator(seed, 1)
    while True:
        rows = torch.randint(len(split.labels), (BATCH,), generator=draws)
        yield split.images[rows], split.labels[rows]
