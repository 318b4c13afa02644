"""Hugging Face DETR in a plain loop: its `loss_dict` as two tasks, class and box.

Run it with `python -m examples.detr`.

For whom: you train `DetrForObjectDetection` in a loop of your own. Other detectors return a
`loss_dict`, too, with losses of other names: group those.

What changes: `backward(tasks_of(out.loss_dict), total=out.loss)` in place of
`out.loss.backward()`. `total` keeps the weights of DETR's configuration (5 for L1 and 2 for
GIoU): each loss counts as it does in `out.loss`. With auxiliary losses there are three losses
for each layer of the decoder, 18 in all for the standard model. They are grouped: the losses of
one kind are one task, with one backward pass. `cardinality_error` is no loss, and has no
gradient: it stays outside.

What you get: a step that opposes neither the classes nor the boxes, for two backward passes.

Limits: L1 and GIoU are one task here. To part them, make three groups.

Versions: transformers 5.24.0, in each run of our tests. Nothing is downloaded: the model is
tiny, and its weights are random.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from ghopt import HarmonizedOptimizer


def tasks_of(loss_dict: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Group the losses by kind, those of the auxiliary heads included."""
    kinds = {"class": ("loss_ce",), "box": ("loss_bbox", "loss_giou")}
    return {
        task: [loss for name, loss in loss_dict.items() if name.startswith(prefixes)]
        for task, prefixes in kinds.items()
    }


def make_model() -> nn.Module:
    """Give a DETR of 23 thousand parameters with three decoder layers."""
    torch.manual_seed(0)
    backbone: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    }
    settings: dict[str, Any] = {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": ResNetConfig(**backbone),
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "num_queries": 5,
        "num_labels": 3,
        "auxiliary_loss": True,
    }
    model: nn.Module = DetrForObjectDetection(DetrConfig(**settings))
    return model


def make_batch(step: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Draw four images ``[4, 3, 64, 64]`` of noise, with a bright square each."""
    generator = torch.Generator().manual_seed(step)
    images = 0.1 * torch.rand(4, 3, 64, 64, generator=generator)
    labels = []
    for image in images:
        x, y = torch.randint(32, (2,), generator=generator).tolist()
        kind = int(torch.randint(3, (1,), generator=generator))
        image[kind, y : y + 32, x : x + 32] += 1
        box = torch.tensor([[x + 16.0, y + 16.0, 32.0, 32.0]]) / 64
        labels.append({"class_labels": torch.tensor([kind]), "boxes": box})
    return images, labels


def train(model: nn.Module, steps: int = 20) -> list[float]:
    """Train on harmonized gradients; give the cosine of class and box at each step."""
    optimizer = HarmonizedOptimizer(AdamW(model.parameters(), lr=1e-3))
    cosines = []
    for step in range(steps):
        images, labels = make_batch(step)
        out = model(pixel_values=images, labels=labels)
        optimizer.zero_grad()
        optimizer.backward(tasks_of(out.loss_dict), total=out.loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert optimizer.last is not None  # backward has just run
        cosines.append(float(optimizer.last.cosines[0, 1]))
    return cosines


def main() -> None:
    """Train, and print how class and box got along."""
    cosines = train(make_model())
    conflicts = sum(cosine < 0 for cosine in cosines)
    mean = sum(cosines) / len(cosines)
    print(f"{conflicts} of {len(cosines)} steps in conflict, mean cosine {mean:+.2f}")


if __name__ == "__main__":
    main()
