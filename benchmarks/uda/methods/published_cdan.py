"""CDAN+E as its authors' code trains it on MNIST and USPS, and harmonized.

Long et al., "Conditional Adversarial Domain Adaptation", NeurIPS 2018; ``pytorch/`` of
``thuml/CDAN`` at c904cd3, read and not copied. Each choice has its file there:

* Networks: :func:`build_cdan` (``network.py``).
* 64 images of each domain a step, 50 epochs of as many steps as MNIST has batches
  (``README.md``, ``train_uspsmnist.py``).
* SGD with momentum 0.9 and weight decay 5e-4. The rate is 0.01. That of G and the head is
  halved when epochs 6, 12, ... 48 begin from USPS to MNIST, 5, 10, ... 50 in reverse; the
  discriminator's stays (``train_uspsmnist.py``).
* The first epoch is on the source alone (``train_uspsmnist.py``).
* Two reversals, of other strengths: of the discriminator's input, and of the entropy that
  weighs the examples. The first counts the discriminator's calls, the second all steps, so
  that it begins an epoch further (``loss.py``, ``network.py``). The predictions in the outer
  product are constants (``loss.py``).

Not as there:

* The target passes through G in no step of the first epoch: the same in distribution.
* Their images were files of JPEG, and were scaled in 8 bits. Ours are the pixels, scaled in
  floats. (Their files of USPS were not at hand. That they have its 16x16 pixels, which fill
  the frame, is inferred from the order of their labels and from what makes the files.)
* Theirs begins USPS's images anew with each epoch, ours when all were seen.
* The discriminator's cross entropy is of logits, theirs of probabilities, which gives no
  gradient where a logit is above 17 or so.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from benchmarks.uda.data import Batch
from benchmarks.uda.methods import (
    Losses,
    certainty_weights,
    classification_loss,
    domain_loss,
    outer_product,
    warm_up,
)
from benchmarks.uda.methods.gramians import Row, to_rows
from benchmarks.uda.methods.networks import (
    CLASSES,
    ChannelsLast,
    Networks,
    adversary,
    in_channels_last,
    lenet,
    reverse_gradient,
)
from benchmarks.uda.methods.steps import Config, descend
from benchmarks.uda.methods.updates import harmonized
from ghopt import Recorder

BATCH, RATE, MOMENTUM, DECAY = 64, 0.01, 0.9, 5e-4
EPOCHS, EPOCH = 50, 60_000 // BATCH
STEPS = EPOCHS * EPOCH
HALVED_EVERY = {"usps-mnist": 6, "mnist-usps": 5}
"""Epochs from one halving of the rate of G and the head to the next, by the task."""

HIDDEN = 500
RISE = 10_000
"""Steps over which a reversal rises to its full strength."""


def build_cdan(seed: int) -> Networks:
    """Build CDAN's networks for images ``[B, 1, 28, 28]``.

    ``seed`` alone decides the initial weights. Sets the global random state, from which
    dropout draws later.
    """
    torch.manual_seed(seed)
    network, features = lenet()
    head = nn.Linear(features, CLASSES)
    generator = nn.Sequential(ChannelsLast(), in_channels_last(network))
    return Networks(generator, [head], _discriminator(features))


def _discriminator(features: int) -> nn.Sequential:
    linears = [
        nn.Linear(features * CLASSES, HIDDEN),
        nn.Linear(HIDDEN, HIDDEN),
        nn.Linear(HIDDEN, 1),
    ]
    for linear in linears:
        nn.init.xavier_normal_(linear.weight)
        nn.init.zeros_(linear.bias)
    return adversary(*linears)


class CdanTraining:
    """CDAN+E in training, which can be stopped and gone on with.

    The losses meet on G, and there they are harmonized; the head, which the adversarial
    loss reaches by the weights of the examples, takes their plain sum.

    Attributes:
        networks: see :func:`build_cdan`.
        rows: Gramians of the pairs so far, before harmonization.
    """

    def __init__(self, config: Config) -> None:
        self.networks = build_cdan(config.seed)
        self.rows: list[Row] = []
        self._config = config
        self._done = 0
        self._recorder = Recorder(config.steps)
        generator, heads = self.networks.generator, self.networks.heads
        adversary = self.networks.discriminator
        self._sgd = SGD(
            [
                {"params": [*generator.parameters(), *heads.parameters()]},
                {"params": [*adversary.parameters()]},
            ],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._update = harmonized(
            self._sgd,
            generator.parameters(),
            rule=config.rule,
            recorder=self._recorder,
        )

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        epoch = 1 + self._done // EPOCH
        halvings = epoch // HALVED_EVERY[self._config.task]
        self._sgd.param_groups[0]["lr"] = self._config.lr / 2**halvings
        if epoch == 1:
            source = self.networks.generator(batch.source)
            descend(classification_loss(self.networks, source, batch.labels), self._sgd)
        else:
            self._update(cdan_pair(self.networks, batch, self._done))
        self._done += 1

    def state(self) -> dict[str, Any]:
        """Return all that changes, for ``torch.save``; the random state, too."""
        self.rows += to_rows(self._recorder.flush().gramians)
        return {
            "networks": self.networks.state_dict(),
            "sgd": self._sgd.state_dict(),
            "done": self._done,
            "rows": self.rows,
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.networks.load_state_dict(state["networks"])
        self._sgd.load_state_dict(state["sgd"])
        self._done = state["done"]
        self.rows = state["rows"]
        torch.set_rng_state(state["random"])


def cdan_pair(networks: Networks, batch: Batch, done: int) -> Losses:
    """CDAN+E's two losses after ``done`` steps, those of the first epoch included.

    The alignment loss is the discriminator's cross entropy, weighed by certainty.
    """
    features = networks.generator(torch.cat([batch.source, batch.target]))
    logits = networks.heads[0](features)
    probabilities = logits.softmax(1)
    # The discriminator counts its calls, from 1; that of the entropy counts all steps.
    reversal, other = (warm_up(count / RISE) for count in (done - EPOCH + 1, done))
    seen = reverse_gradient(outer_product(features, probabilities.detach()), reversal)
    entropy = -(probabilities * (probabilities + 1e-5).log()).sum(1)
    weights = certainty_weights(reverse_gradient(entropy, other))
    return Losses(
        domain_loss(networks.discriminator(seen), weights),
        F.cross_entropy(logits[: len(batch.source)], batch.labels),
    )
