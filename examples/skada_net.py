"""skada: deep domain adaptation; the adaptation loss meets that of the classifier.

Run it with `python -m examples.skada_net`. skada adds the two losses up by itself, the
second with a factor `reg`. Each is kept where it is computed, and `total=` finds the factor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from skada.deep import DeepCoralLoss
from skada.deep.base import (
    DomainAwareCriterion,
    DomainAwareModule,
    DomainAwareNet,
    DomainBalancedDataLoader,
)
from skorch.dataset import unpack_data
from torch import Tensor, nn
from torch.optim import SGD

from ghopt import HarmonizedOptimizer


class Kept(nn.Module):
    """A loss that keeps what it gave last."""

    last: Tensor

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Give the loss."""
        self.last = self.loss(*args, **kwargs)
        return self.last

    def take(self) -> Tensor:
        """Give the last loss and forget it: copies of this would fail on its graph."""
        last = self.last
        del self.last
        return last


class HarmonizedNet(DomainAwareNet):  # type: ignore[misc]  # skada has no types
    """A domain-aware net that trains on harmonized gradients."""

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """Do what the net does, but one backward pass per loss."""
        self._set_training(True)
        inputs, labels = unpack_data(batch)
        outputs = self.infer(inputs, **fit_params)
        loss = self.get_loss(outputs, labels, X=inputs, training=True)
        criterion = self.criterion_
        losses = {
            "labels": criterion.base_criterion.take(),
            "domains": criterion.adapt_criterion.take(),
        }
        self.optimizer_.backward(losses, total=loss)
        return {"loss": loss, "y_pred": outputs}


def harmonized_sgd(params: Iterable[Tensor], **options: Any) -> HarmonizedOptimizer:
    """Make the optimizer; takes what skorch finds as ``optimizer__...``."""
    return HarmonizedOptimizer(SGD(params, **options))


class Classifier(nn.Module):
    """Two layers; what the first gives is aligned between the domains."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.features = nn.Sequential(nn.Linear(2, 8), nn.Tanh())
            self.head = nn.Linear(8, 2)

    def forward(self, inputs: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Give the scores of two classes, shape ``[batch, 2]``; skada names weights."""
        del sample_weight
        scores: Tensor = self.head(self.features(inputs))
        return scores


def make_domains(size: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Draw inputs ``[2 size, 2]``, labels and domains: the target is turned and wider.

    skada marks a label as unknown by -1 and the target by a negative domain.
    """
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(2 * size, 2, generator=generator)
    labels = (inputs[:, 0] > 0).long()
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    inputs[size:] = 2 * inputs[size:] @ turn
    domains = torch.ones(2 * size, dtype=torch.long)
    domains[size:], labels[size:] = -2, -1
    return inputs, labels, domains


def make_net(**options: Any) -> HarmonizedNet:
    """Give what ``skada.deep.DeepCoral`` gives, for harmonized gradients.

    Args:
        options: of the net, among them ``criterion__reg``, the factor of the second
            loss.
    """
    defaults: dict[str, Any] = {
        "module": DomainAwareModule,
        "module__base_module": Classifier(),
        "module__layer_name": "features",
        "iterator_train": DomainBalancedDataLoader,
        "train_split": None,
        "criterion": DomainAwareCriterion,
        "criterion__base_criterion": Kept(nn.CrossEntropyLoss()),
        "criterion__adapt_criterion": Kept(DeepCoralLoss()),
        "optimizer": harmonized_sgd,
        "optimizer__momentum": 0.9,
        "lr": 0.02,
        "batch_size": 16,
    }
    return HarmonizedNet(**(defaults | options))


def main() -> None:
    """Train for ten epochs."""
    inputs, labels, domains = make_domains()
    make_net().fit(inputs, labels, sample_domain=domains)


if __name__ == "__main__":
    main()
