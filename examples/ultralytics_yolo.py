"""Ultralytics YOLO: a trainer that harmonizes box and class.

Run it with `python -m examples.ultralytics_yolo`.

For whom: you train a detector with `ultralytics`, and mean to keep its trainer: augmentation,
warm-up, EMA, validation, checkpoints.

What changes: you pass `trainer=HarmonizedTrainer` to `YOLO(...).train`, or call the trainer
yourself, as below. The trainer runs the backward pass of one sum, inside a loop that cannot be
changed, and decides only after it whether a step follows. So the passes run where the model
returns its losses (`accumulate_only=True`), the trainer gets losses without a graph, and
`finish_accumulation` harmonizes before the trainer unscales, clips and steps.

What you get: a step that opposes neither the boxes (IoU and DFL are one task) nor the classes,
for two backward passes. Epochs, logs and files are as before.

Limits: one process, since the trainer's DDP would average the first pass only, which ghopt
refuses. AMP was not tried. Other than detectors (segments, poses) have other losses: adapt
`tasks_of`. Ultralytics is licensed under AGPL-3.0.

Versions: run by hand on 2026-11-29, with ultralytics 8.4.190, torchvision 0.28.0 and torch
2.13.0 on a CPU. With `plain_sum` as the weighting, 1, 2 and 4 epochs ended as with the plain
trainer, but for 5e-5 of the way that the parameters went. It needs torchvision, which wants the
CUDA build of torch, so our tests run this script only where they find it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionTrainer

from ghopt import HarmonizedOptimizer


def tasks_of(losses: Tensor) -> dict[str, Any]:
    """Name the losses of a detector, ``[3]``: IoU, class and DFL, weighted as configured."""
    iou, classes, dfl = losses.unbind()
    return {"box": [iou, dfl], "class": classes}


class HarmonizedTrainer(DetectionTrainer):  # type: ignore[misc]  # it has no types
    """A trainer whose optimizer steps on harmonized gradients."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Not earlier: what is validated and saved is a copy of the model, made before.
        self.add_callback("on_train_start", _hook)

    def build_optimizer(self, *args: Any, **options: Any) -> HarmonizedOptimizer:
        """Wrap what the trainer builds."""
        return HarmonizedOptimizer(super().build_optimizer(*args, **options))

    def optimizer_step(self) -> None:
        """Harmonize what the micro-batches left, then unscale, clip and step."""
        self.optimizer.finish_accumulation()
        super().optimizer_step()

    def keep_gradients(
        self, _: nn.Module, __: Any, output: tuple[Tensor, Any]
    ) -> tuple[Tensor, Any]:
        """Run the passes where the model returns its losses, and give it plain numbers."""
        losses, shown = output
        with torch.autocast(losses.device.type, enabled=False):
            tasks = tasks_of(self.scaler.scale(losses))
            self.optimizer.backward(tasks, accumulate_only=True)
        return losses.detach().requires_grad_(), shown


def _hook(trainer: HarmonizedTrainer) -> None:
    trainer.model.register_forward_hook(trainer.keep_gradients)


def write_data(folder: Path, count: int = 8) -> Path:
    """Write images of noise with a bright square each; give the file that describes them."""
    generator = torch.Generator().manual_seed(0)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(count):
        pixels = torch.randint(64, (64, 64, 3), generator=generator, dtype=torch.uint8)
        x, y = torch.randint(32, (2,), generator=generator).tolist()
        label = number % 2
        pixels[y : y + 32, x : x + 32, label] += 128
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{number}.png")
        box = f"{label} {(x + 16) / 64} {(y + 16) / 64} 0.5 0.5\n"
        (folder / "labels" / f"{number}.txt").write_text(box, encoding="utf-8")
    data = folder / "data.yaml"
    data.write_text(
        f"path: {folder}\ntrain: images\nval: images\nnames: {{0: red, 1: green}}\n",
        encoding="utf-8",
    )
    return data


def train(folder: Path, **options: Any) -> HarmonizedTrainer:
    """Train YOLOv8n from random weights, in steps of two micro-batches of four images."""
    settings = {
        "model": "yolov8n.yaml",
        "data": str(write_data(folder)),
        "project": str(folder),
        "device": "cpu",
        "imgsz": 64,
        "epochs": 4,
        "batch": 4,
        "nbs": 8,
        "warmup_epochs": 0,
        "workers": 0,
        "optimizer": "AdamW",
        "amp": False,
        "val": False,
        "plots": False,
    }
    trainer = HarmonizedTrainer(overrides=settings | options)
    trainer.train()
    return trainer


def main() -> None:
    """Train, and print what the last step found."""
    with TemporaryDirectory() as folder:
        last = train(Path(folder)).optimizer.last
    print(f"cosine of {last.names[0]} and {last.names[1]}: {last.cosines[0, 1]:+.2f}")


if __name__ == "__main__":
    main()
