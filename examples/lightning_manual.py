"""Lightning with manual optimization: `training_step` runs the passes and the step.

Run it with `python -m examples.lightning_manual`. Mixed precision, loss scaling, clipping
and checkpoints are Lightning's own. For DDP take
`strategy=DDPStrategy(find_unused_parameters=True)`: Lightning prepares DDP anew before
each `manual_backward`, so the gradients of each task are averaged over the ranks before
they meet; with the flag a task may leave the head of another without a gradient.
"""

from typing import cast

import lightning
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer


class ManualModule(lightning.LightningModule):
    """Trains on harmonized gradients, of several micro-batches if asked to.

    Args:
        model: gives the outputs of both tasks.
        accumulate: micro-batches per step; an epoch holds a multiple of them.
        clip: norm that the harmonized gradient is clipped to, if any.
    """

    def __init__(
        self, model: TwoHeads, *, accumulate: int = 1, clip: float | None = None
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.accumulate, self.clip = model, accumulate, clip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Run one pass per task; step after the last micro-batch."""
        # Lightning's proxy of it, which steps through the precision plugin.
        optimizer = cast(HarmonizedOptimizer, self.optimizers())
        inputs, targets = batch
        losses = task_losses(self.model(inputs), targets)
        last = (batch_idx + 1) % self.accumulate == 0
        optimizer.backward(
            {name: loss / self.accumulate for name, loss in losses.items()},
            backward_fn=self.manual_backward,
            accumulate_only=not last,
        )
        if last:
            optimizer.step()
            optimizer.zero_grad()
            cast(ExponentialLR, self.lr_schedulers()).step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip here, where a loss scaler has unscaled the gradients."""
        if self.clip is not None:
            self.clip_gradients(optimizer, self.clip, "norm")

    def configure_optimizers(self) -> tuple[list[Optimizer], list[ExponentialLR]]:
        """Wrap the optimizer; the scheduler takes the wrapper."""
        base = SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        optimizer = HarmonizedOptimizer(base)
        return [optimizer], [ExponentialLR(optimizer, 0.9)]


def main() -> None:
    """Train for ten epochs of four steps."""
    module = ManualModule(TwoHeads(), accumulate=2, clip=5.0)
    loader = DataLoader(TensorDataset(*make_data()), batch_size=8)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
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
