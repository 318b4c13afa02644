"""Lightning with automatic optimization: the hook `backward` takes the sum apart again.

Run it with `python -m examples.lightning_automatic`. `training_step` returns the sum of the
losses, which Lightning divides by the number of micro-batches and scales. `total=` hands
both factors on to the losses. Clipping, accumulation, precision, checkpoints and DDP are
arguments of the Trainer.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer


class AutomaticModule(lightning.LightningModule):
    """Trains on harmonized gradients; the Trainer decides on everything else."""

    def __init__(self, model: TwoHeads) -> None:
        super().__init__()
        self.model = model
        self.losses: dict[str, Tensor] = {}
        self.stepping = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Keep the losses and return their sum."""
        del batch_idx
        inputs, targets = batch
        self.losses = task_losses(self.model(inputs), targets)
        return torch.stack([*self.losses.values()]).sum()

    def backward(self, loss: Tensor) -> None:
        """Run one pass per task, and harmonize where a step follows."""
        optimizer = cast(HarmonizedOptimizer, self.optimizers(use_pl_optimizer=False))
        optimizer.backward(
            self.losses,
            total=loss,
            accumulate_only=not self.stepping,
            sync_group=self.ddp(),
        )
        self.losses = {}

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Run the last micro-batch, without DDP's own averaging, and step after it.

        `step` drops an accumulation that was started before it, so the closure must not
        be left to it.
        """
        del epoch, batch_idx
        assert optimizer_closure is not None
        ddp = self.ddp()
        self.stepping = True
        with nullcontext() if ddp is None else ddp.no_sync():
            loss = optimizer_closure()
        self.stepping = False
        optimizer.step(lambda: loss)

    def ddp(self) -> DistributedDataParallel | None:
        """Give the model under DDP, if the Trainer has several processes."""
        model = self.trainer.model
        return model if isinstance(model, DistributedDataParallel) else None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Wrap the optimizer; the scheduler takes the wrapper."""
        base = SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        optimizer = HarmonizedOptimizer(base)
        scheduler = ExponentialLR(optimizer, 0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main() -> None:
    """Train for ten epochs of four steps."""
    module = AutomaticModule(TwoHeads())
    loader = DataLoader(TensorDataset(*make_data()), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=5.0,
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    inputs, targets = make_data()
    print(task_losses(module.model(inputs), targets))


if __name__ == "__main__":
    main()
