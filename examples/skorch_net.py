"""skorch: one method of the net, `train_step_single`, is replaced.

Run it with `python -m examples.skorch_net`. The criterion returns the sum, so that
validation, callbacks and the history work as always, and keeps the losses.
"""

from typing import Any

import torch
from skorch import NeuralNet
from skorch.dataset import unpack_data
from torch import Tensor, nn
from torch.optim import SGD

from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedFromParams


class SumOfLosses(nn.Module):
    """The criterion: gives the sum of the task losses and keeps them."""

    def forward(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Give the sum."""
        self.losses = task_losses(outputs, targets)
        return torch.stack([*self.losses.values()]).sum()


class HarmonizedNet(NeuralNet):  # type: ignore[misc]  # skorch has no types
    """A net that trains on harmonized gradients."""

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """Do what the net does, but one backward pass per task."""
        self._set_training(True)
        inputs, targets = unpack_data(batch)
        outputs = self.infer(inputs, **fit_params)
        loss = self.get_loss(outputs, targets, X=inputs, training=True)
        self.optimizer_.backward(self.criterion_.losses)
        return {"loss": loss, "y_pred": outputs}


def make_net(**options: Any) -> HarmonizedNet:
    """Give a net for the two tasks; options are those of ``skorch.NeuralNet``."""
    defaults = {
        "module": TwoHeads,
        "criterion": SumOfLosses,
        "optimizer": HarmonizedFromParams,
        "optimizer__base_class": SGD,
        "optimizer__momentum": 0.9,
        "lr": 0.02,
        "batch_size": 16,
    }
    return HarmonizedNet(**(defaults | options))


def main() -> None:
    """Train for ten epochs, validating on a fifth of the data."""
    make_net().fit(*make_data())


if __name__ == "__main__":
    main()
