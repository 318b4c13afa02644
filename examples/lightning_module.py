"""Lightning: `training_step` returns the losses, and the Trainer does the rest.

Run it with `python -m examples.lightning_module`. Clipping, accumulation, precision,
checkpoints and DDP are arguments of the Trainer, as in any module.
"""

import lightning
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer
from ghopt.integrations.lightning import HarmonizedModule


class TwoHeadsModule(HarmonizedModule):
    """Trains two heads on harmonized gradients."""

    def __init__(self, model: TwoHeads) -> None:
        super().__init__()
        self.model = model

    def training_step(
        self, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> dict[str, Tensor]:
        """Give the loss of each task."""
        del batch_idx
        inputs, targets = batch
        return task_losses(self.model(inputs), targets)

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
    module = TwoHeadsModule(TwoHeads())
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
    print(task_losses(module.model(inputs), targets), trainer.callback_metrics)


if __name__ == "__main__":
    main()
