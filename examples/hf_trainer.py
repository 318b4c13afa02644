"""Hugging Face Trainer: one method, `training_step`, is replaced.

Run it with `python -m examples.hf_trainer`. Accumulation, clipping, precision, checkpoints
and processes are arguments of the Trainer. The model returns its losses, not their sum.
"""

from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer


class LossModel(nn.Module):
    """A model as the Trainer wants it: from a batch to its losses."""

    def __init__(self, model: TwoHeads) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Give the loss of each task."""
        return task_losses(self.model(inputs), targets)


class Rows(Dataset[dict[str, Tensor]]):
    """Inputs ``[n, 6]`` and targets ``[n, 2]``, row by row, by name."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Give one row."""
        return {"inputs": self.inputs[index], "targets": self.targets[index]}


class HarmonizedTrainer(Trainer):
    """A Trainer whose optimizer is a ``HarmonizedOptimizer``."""

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one pass per task on a micro-batch.

        Returns:
            The sum of the losses, for the log.
        """
        del num_items_in_batch
        model.train()
        inputs = self._prepare_inputs(inputs)
        accelerator = self.accelerator
        # no_sync: each task is averaged over the processes by itself, see sync_group.
        with accelerator.no_sync(model):
            with self.compute_loss_context_manager():
                losses = model(**inputs)
            steps = self.current_gradient_accumulation_steps
            losses = {name: loss / steps for name, loss in losses.items()}
            prepared = cast(AcceleratedOptimizer, self.optimizer)
            prepared.optimizer.backward(
                losses,
                backward_fn=accelerator.backward,
                accumulate_only=not accelerator.sync_gradients,
                sync_group=True if accelerator.num_processes > 1 else None,
            )
        return torch.stack([loss.detach() for loss in losses.values()]).sum()


def make_trainer(
    model: TwoHeads, data: Rows, arguments: TrainingArguments
) -> HarmonizedTrainer:
    """Give a Trainer that steps on harmonized gradients."""
    base = SGD(model.parameters(), lr=0.02, momentum=0.9)
    return HarmonizedTrainer(
        LossModel(model),
        arguments,
        train_dataset=data,
        optimizers=(HarmonizedOptimizer(base), None),
    )


def main() -> None:
    """Train in bfloat16 for ten epochs of four steps."""
    model = TwoHeads()
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=True,
            num_train_epochs=10,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=5.0,
            save_strategy="no",
            report_to="none",
        )
        make_trainer(model, Rows(*make_data()), arguments).train()
    inputs, targets = make_data()
    print(task_losses(model.cpu()(inputs), targets))


if __name__ == "__main__":
    main()
