"""Fabric: `fabric.backward` runs each pass.

Run it with `python -m examples.fabric`. Precision and loss scaling are Fabric's own. With
several processes the gradients of each task are averaged before they meet: that takes the
forward pass and the backward passes without DDP's own averaging, and `sync_group`.
"""

from lightning.fabric import Fabric
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer


def train(
    fabric: Fabric,
    model: TwoHeads,
    data: TensorDataset,
    *,
    epochs: int = 10,
    batch_size: int = 8,
    accumulate: int = 1,
    clip: float | None = None,
) -> None:
    """Train on harmonized gradients.

    Args:
        fabric: decides on device, precision and processes.
        model: gives the outputs of both tasks; changed in place.
        data: inputs ``[n, 6]`` and targets ``[n, 2]``.
        epochs: rounds over the data.
        batch_size: of a micro-batch on one process.
        accumulate: micro-batches per step; an epoch holds a multiple of them.
        clip: norm that the harmonized gradient is clipped to, if any.
    """
    base = SGD(model.parameters(), lr=0.02, momentum=0.9)
    module, optimizer = fabric.setup(model, HarmonizedOptimizer(base))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size))
    several = fabric.world_size > 1
    for _ in range(epochs):
        for index, (inputs, targets) in enumerate(loader, 1):
            last = index % accumulate == 0
            with fabric.no_backward_sync(module, enabled=several):
                losses = task_losses(module(inputs), targets)
                optimizer.backward(
                    {name: loss / accumulate for name, loss in losses.items()},
                    backward_fn=fabric.backward,
                    accumulate_only=not last,
                    sync_group=True if several else None,
                )
            if last:
                if clip is not None:
                    fabric.clip_gradients(module, optimizer, max_norm=clip)
                optimizer.step()
                optimizer.zero_grad()


def main() -> None:
    """Train in bfloat16 for ten epochs of four steps."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = TwoHeads()
    train(fabric, model, TensorDataset(*make_data()), accumulate=2, clip=5.0)
    inputs, targets = make_data()
    print(task_losses(model(inputs), targets))


if __name__ == "__main__":
    main()
