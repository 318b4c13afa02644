"""torchvision detection: the dict of losses goes straight in.

Run it with `python -m examples.torchvision_detection`.

For whom: you train a detector of `torchvision.models.detection`. In training each of them
returns a dict of losses: SSD and RetinaNet two, FCOS three, Faster R-CNN four, Mask R-CNN five.

What changes: `optimizer.backward(losses)` in place of `sum(losses.values()).backward()`.
Nothing else.

What you get: a step that opposes neither of the losses, and the record of their conflicts.

Limits: one backward pass for each loss. The four losses of Faster R-CNN are two of the
proposals and two of the boxes: as `{"classes": [losses["loss_objectness"],
losses["loss_classifier"]], "boxes": [losses["loss_rpn_box_reg"], losses["loss_box_reg"]]}` they
are two passes.

Versions: run by hand on 2026-11-29, with torchvision 0.28.0 and torch 2.13.0 on a CPU, without
torchvision's compiled operators, which SSDlite does not use in training; and three steps of
Faster R-CNN, in two and in four tasks, with operators written in Python. The packages of
torchvision want the CUDA build of torch, so our tests run this script only where they find it.
"""

import torch
from torch import Tensor
from torch.optim import SGD
from torchvision.models.detection import ssdlite320_mobilenet_v3_large

from ghopt import HarmonizedOptimizer


def make_model() -> torch.nn.Module:
    """Give an SSDlite of two classes and background; nothing is downloaded."""
    torch.manual_seed(0)
    model: torch.nn.Module = ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    return model


def make_batch(step: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Draw four images ``[3, 96, 96]`` of noise, with a bright square each."""
    generator = torch.Generator().manual_seed(step)
    images, targets = [], []
    for _ in range(4):
        image = 0.1 * torch.rand(3, 96, 96, generator=generator)
        x, y = torch.randint(48, (2,), generator=generator).tolist()
        kind = int(torch.randint(2, (1,), generator=generator))
        image[kind, y : y + 48, x : x + 48] += 0.8
        boxes = torch.tensor([[x, y, x + 48, y + 48]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": boxes, "labels": torch.tensor([kind + 1])})
    return images, targets


def train(model: torch.nn.Module, steps: int = 5) -> dict[str, list[float]]:
    """Train on harmonized gradients; give losses and cosine of each step."""
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.01, momentum=0.9))
    seen: dict[str, list[float]] = {"cosine": []}
    for step in range(steps):
        images, targets = make_batch(step)
        losses = model(images, targets)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        for name, loss in losses.items():
            seen.setdefault(name, []).append(loss.item())
        assert optimizer.last is not None  # backward has just run
        seen["cosine"].append(float(optimizer.last.cosines[0, 1]))
    return seen


def main() -> None:
    """Train, and print the losses and the cosine of each step."""
    for name, values in train(make_model()).items():
        print(f"{name:20}" + " ".join(f"{value:+.2f}" for value in values))


if __name__ == "__main__":
    main()
