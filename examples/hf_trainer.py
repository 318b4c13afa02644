"""Hugging Face Trainer: a model that returns `loss_dict` needs another Trainer, no more.

Run it with `python -m examples.hf_trainer`. Accumulation, clipping, precision, checkpoints
and processes are arguments of the Trainer. For a model without `loss_dict` a subclass has
a method `losses(outputs, inputs)`.
"""

from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer
from ghopt.integrations.transformers import HarmonizedTrainer


class LossModel(nn.Module):
    """A model as the Trainer wants it: from a batch to its loss, and what it is made of."""

    def __init__(self, model: TwoHeads) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Give the loss, and that of each task."""
        losses = task_losses(self.model(inputs), targets)
        return {"loss": torch.stack([*losses.values()]).sum(), "loss_dict": losses}


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


def main() -> None:
    """Train in bfloat16 for ten epochs of four steps."""
    model = TwoHeads()
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            bf16=True,
            learning_rate=0.02,
            num_train_epochs=10,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            max_grad_norm=5.0,
            save_strategy="no",
            report_to="none",
        )
        trainer = HarmonizedTrainer(
            LossModel(model),
            arguments,
            train_dataset=Rows(*make_data()),
            # Without it: gh, and no option.
            harmonize=partial(HarmonizedOptimizer, project_step=True),
        )
        trainer.train()
    inputs, targets = make_data()
    print(task_losses(model.cpu()(inputs), targets))


if __name__ == "__main__":
    main()
