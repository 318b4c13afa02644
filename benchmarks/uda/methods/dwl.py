"""DWL: alignment and discriminability, weighed by which of them is behind.

Xiao and Zhang, "Dynamic Weighted Learning for Unsupervised Domain Adaptation", CVPR 2021.
The generator confuses a discriminator and lowers the discrepancy of its heads; the share
of the former rises as the domains drift apart, and falls as the classes blur. The paper
was not at hand, but the code published with the GH paper was. From that differ, beside the
steps (see ``steps``):

* Its discriminator lowers the cross entropy of its outputs on the source with those on the
  target as labels, and G raises it. Here both play for the usual one, as in DANN.
* Its heads are led to differ in one of their three pairs, here in all.
* A fourth step of G trains on the target's own predictions as labels, sure or not. It is
  left out: neither task of the pair has a part in it.
* The two balances are measured each 100 steps, there each epoch.
"""

import torch
from torch import Tensor

from benchmarks.uda.data import Batch
from benchmarks.uda.methods import (
    Losses,
    classification_loss,
    discrepancy,
    domain_loss,
    probabilities_of,
)
from benchmarks.uda.methods.features import linear_mmd, max_j
from benchmarks.uda.methods.networks import Networks

CONFUSION = 0.2
"""Factor of the generator's adversarial loss, of the published code."""


class Balance:
    """How much alignment is needed, measured on the features of the last updates.

    Args:
        classes: how many there are.
        every: number of updates from one measurement to the next, which is of the
            batches of all of them: their images should be ten times the features, or
            classes that mean nothing look separable.

    Attributes:
        share: T in [0, 1], of the alignment: M / (M + 1 - J), where M is the distance of
            the domains' means and J the lesser separability of the classes in the two
            domains, both brought to [0, 1] by their least and greatest value so far.
            One half until they have changed.
    """

    def __init__(self, classes: int, every: int = 100) -> None:
        self.share = 0.5
        self._classes = classes
        self._every = every
        self._batches: list[tuple[Tensor, ...]] = []
        self._distances: list[float] = []
        self._separabilities: list[float] = []

    def see(
        self, source: Tensor, labels: Tensor, target: Tensor, predictions: Tensor
    ) -> None:
        """Take the features ``[B, f]`` of a batch, with labels, and measure if due."""
        self._batches.append(
            tuple(one.detach() for one in (source, labels, target, predictions))
        )
        if len(self._batches) < self._every:
            return
        columns = zip(*self._batches, strict=True)
        self._batches = []
        source, labels, target, predictions = (torch.cat(one) for one in columns)
        self._distances.append(linear_mmd(source, target))
        self._separabilities.append(
            min(
                max_j(source, labels, self._classes),
                max_j(target, predictions, self._classes),
            )
        )
        self.share = share_of(_scaled(self._distances), _scaled(self._separabilities))


def share_of(distance: float, separability: float) -> float:
    """Weigh alignment by the need for it: T of distance and separability in [0, 1]."""
    need = 1 - separability
    return distance / (distance + need) if distance + need > 0 else 0.5


def dwl_losses(
    networks: Networks, batch: Batch, balance: Balance, trade_off: float
) -> Losses:
    """What the generator lowers: a pair weighed by ``balance``.

    The alignment loss is ``trade_off`` T times the discriminator's cross entropy with its
    sign changed. The other is cross entropy on the source plus (1 - T) times the heads'
    discrepancy on the target. (DWL, and the code published with the GH paper, leave cross
    entropy to a step of its own; see ``steps._mcd_step`` for why it is here.)
    """
    source = networks.generator(batch.source)
    target = networks.generator(batch.target)
    with torch.no_grad():
        predictions = probabilities_of(networks, target).mean(0).argmax(1)
    balance.see(source, batch.labels, target, predictions)
    domain = domain_loss(networks.discriminator(torch.cat([source, target])))
    return Losses(
        -trade_off * CONFUSION * balance.share * domain,
        classification_loss(networks, source, batch.labels)
        + (1 - balance.share) * discrepancy(networks, target),
    )


def dwl_rest_loss(networks: Networks, batch: Batch) -> Tensor:
    """What heads and discriminator lower while G rests, a scalar.

    Heads that classify the source and differ on the target, and a discriminator that
    tells the domains apart. G gets no gradient from it.
    """
    with torch.no_grad():
        source = networks.generator(batch.source)
        target = networks.generator(batch.target)
    return (
        classification_loss(networks, source, batch.labels)
        - discrepancy(networks, target)
        + domain_loss(networks.discriminator(torch.cat([source, target])))
    )


def _scaled(values: list[float]) -> float:
    """Bring the last value to [0, 1]; one half while all are the same."""
    low, high = min(values), max(values)
    return (values[-1] - low) / (high - low) if high > low else 0.5
