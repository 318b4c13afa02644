"""MCD and DWL as their authors' code trains them on MNIST and USPS, and harmonized.

MCD: Saito et al., "Maximum Classifier Discrepancy for Unsupervised Domain Adaptation",
CVPR 2018; ``classification/`` of ``mil-tokyo/MCD_DA`` at af10217. DWL: Xiao and Zhang,
"Dynamic Weighted Learning for Unsupervised Domain Adaptation", CVPR 2021;
``digital/classification/`` of ``NiXiao-cqu/TransferLearning-dwl-cvpr2021`` at 525aab8, which
grew from MCD's. Read, not copied. Each choice has its file there:

* Networks (``model/usps.py``): :func:`build_published`.
* Adam for each, a rate of 2e-4 that stays, weight decay 5e-4 (``main.py``, ``solver.py``).
* 128 images of each domain a step (``main.py``), which go through G one domain after the
  other, so that batch normalization sees one domain at a time (``solver.py``).
* 200 epochs (``main.py``) of 14 steps: the loop ends at the first batch that is not whole, the
  fifteenth of USPS's 1800 images (``solver.py``). So 2800 steps, and the limit of 20 000 that
  there is, too (``main.py``), is never reached.
* G's step is taken 4 times in MCD, 8 times in DWL (``num_k``, ``num_k3``).
* MCD predicts by the sum of its heads' logits; DWL by C alone, its first head. (Its code
  prints the best of five combinations, by the target's test labels.)

Not as there, but the same numbers up to rounding: G keeps no graph where its gradient is
thrown away, and pools before it rectifies, since both keep the order of numbers. Not the
same: theirs seeds the dropout of each epoch alike, and torch began the scales of batch
normalization at random then.

Where the losses meet on G, they can be harmonized: see :class:`Training`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.uda.data import Batch
from benchmarks.uda.methods import (
    Losses,
    classification_loss,
    discrepancy,
    mcd_heads_loss,
    mcd_losses,
)
from benchmarks.uda.methods.dwl import CONFUSION, share_of
from benchmarks.uda.methods.features import linear_mmd, max_j
from benchmarks.uda.methods.gramians import Row, to_rows
from benchmarks.uda.methods.networks import (
    CLASSES,
    ChannelsLast,
    Networks,
    adversary,
    in_channels_last,
)
from benchmarks.uda.methods.rules import find_rule
from benchmarks.uda.methods.steps import SOURCE_ONLY, Config, descend, generator_step
from benchmarks.uda.methods.updates import harmonized
from ghopt import Recorder, measure

MCD, MCD_HEADS, MCD_JOINT = "MCD", "MCD-heads", "MCD-joint"
DWL, DWL_UNWEIGHTED = "DWL", "DWL-unweighted"
CDAN = "CDAN+E"

REFERENCES = {
    SOURCE_ONLY: SOURCE_ONLY,
    MCD: MCD,
    MCD_HEADS: MCD,
    MCD_JOINT: MCD_JOINT,
    DWL: DWL,
    DWL_UNWEIGHTED: DWL,
    CDAN: CDAN,
}
"""The methods, and with which one's plain sum each is compared.

CDAN+E is in ``published_cdan``.
"""

INNER_STEPS = {
    SOURCE_ONLY: 4,
    **dict.fromkeys((MCD, MCD_HEADS, MCD_JOINT), 4),
    **dict.fromkeys((DWL, DWL_UNWEIGHTED), 8),
    CDAN: 1,
}
"""How often a step trains G on its pair, if it has one."""

EPOCH = 14
STEPS, BATCH, RATE, BETA, DECAY = 200 * EPOCH, 128, 2e-4, 0.9, 5e-4
FEATURES = 48 * 4 * 4


class Voting(Networks):
    """Networks whose first heads vote, by their logits."""

    def __init__(
        self,
        generator: nn.Module,
        heads: list[nn.Module],
        discriminator: nn.Module,
        voters: int,
    ) -> None:
        super().__init__(generator, heads, discriminator)
        self.voters = voters

    def forward(self, images: Tensor) -> Tensor:
        """Return the sum of the voters' logits, ``[B, c]``."""
        features = self.generator(images)
        votes = [head(features) for head in self.heads[: self.voters]]
        return torch.stack(votes).sum(0)


def build_published(method: str, seed: int) -> Voting:
    """Build MCD's or DWL's networks for images ``[B, 1, 28, 28]``.

    ``seed`` alone decides the initial weights. Sets the global random state, from which
    dropout draws later.
    """
    torch.manual_seed(seed)
    if method.startswith(DWL):
        return Voting(_generator(), _heads(3), _discriminator(), voters=1)
    return Voting(_generator(), _heads(2), nn.Identity(), voters=2)


def _generator() -> nn.Module:
    generator = nn.Sequential(
        ChannelsLast(),
        nn.Conv2d(1, 32, 5),
        nn.BatchNorm2d(32),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(32, 48, 5),
        nn.BatchNorm2d(48),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
    )
    return in_channels_last(generator)


def _heads(count: int) -> list[nn.Module]:
    return [_head() for _ in range(count)]


def _head() -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(),
        nn.Linear(FEATURES, 100),
        nn.BatchNorm1d(100),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(100, 100),
        nn.BatchNorm1d(100),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(100, CLASSES),
    )


def _discriminator() -> nn.Sequential:
    """Make DWL's, to one logit ``[B, 1]``, with its own initial weights."""
    linears = [nn.Linear(FEATURES, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 1)]
    for linear, spread in zip(linears, (0.01, 0.01, 0.3), strict=True):
        nn.init.normal_(linear.weight, std=spread)
        nn.init.zeros_(linear.bias)
    return adversary(*linears)


class PublishedBalance:
    """DWL's balance of alignment and discriminability, as its code measures it.

    At the end of each epoch, on the features of its batches (``solver.py``, ``main.py``).

    Attributes:
        share: T in [0, 1], of the alignment in the next epoch; one half in the first.
    """

    def __init__(self) -> None:
        self.share = 0.5
        self._farthest = 0.0
        self._low, self._high = 1.0, 1.0
        self._measured = False
        self._batches: list[tuple[Tensor, ...]] = []

    def see(
        self, source: Tensor, labels: Tensor, target: Tensor, predicted: Tensor
    ) -> None:
        """Take a batch's features ``[B, f]`` and classes ``[B]``; measure if due."""
        self._batches.append((source, labels, target, predicted))
        if len(self._batches) < EPOCH:
            return
        columns = zip(*self._batches, strict=True)
        self._batches = []
        source, labels, target, predicted = (torch.cat(one) for one in columns)
        self._measure(
            linear_mmd(source, target),
            max_j(source, labels, CLASSES),
            max_j(target, predicted, CLASSES),
        )

    def _measure(self, distance: float, *separabilities: float) -> None:
        # The least distance is taken as 0, and the least separability begins at the
        # greatest one of the first epoch; nothing is divided by 0.
        self._farthest = max(self._farthest, distance)
        self._high = max(self._high, *separabilities)
        self._low = min(self._low, *separabilities)
        span = self._high - self._low + 1e-6
        self.share = share_of(
            distance / (self._farthest + 1e-6),
            (min(separabilities) - self._low) / span,
        )
        if not self._measured:
            self._low, self._measured = self._high, True


class Training:
    """A method in training, which can be stopped and gone on with.

    * ``source-only``: MCD's networks on the source.
    * ``MCD``: three steps. A: G and the heads on the source. B: the heads on cross entropy
      minus discrepancy. C: G on the discrepancy, 4 times. The losses take turns on G, so
      that there is nothing to harmonize; ``sum`` is the only rule.
    * ``MCD-joint``: cross entropy joins step C, for the sum as well: there the losses
      meet on G.
    * ``MCD-heads``: where the code published with the GH paper (``mcd/mcd.py`` of
      ``fuxianghuang1/GH`` at 7684eaf) puts its weights: step B. They are measured on G, of
      cross entropy (task 1) and minus discrepancy (task 2), and weigh what the heads lower.
      The sum's weights are 1: that is ``MCD``.
    * ``DWL``: C and G on the source, 8 times. The discriminator. The heads, of which C1 and
      C2 are to differ. G on the sum of T times alignment and 1 - T times the discrepancy
      of all pairs, 8 times: here the losses meet. C and G on the target's predictions.
    * ``DWL-unweighted``: the weights of that sum are measured before T has a part in them,
      and multiply what T weighs: so in ``dwl/solver.py`` there. The sum is ``DWL``.

    Attributes:
        networks: see :func:`build_published`.
        rows: Gramians of the pairs so far, before harmonization.
    """

    def __init__(self, config: Config) -> None:
        self.networks = build_published(config.method, config.seed)
        self.rows: list[Row] = []
        self._config = config
        self._recorder = Recorder(config.steps * config.inner_steps)
        self._balance = PublishedBalance()
        self._adams = [
            Adam(
                module.parameters(),
                lr=config.lr,
                betas=(config.momentum, 0.999),
                weight_decay=config.weight_decay,
            )
            for module in (
                self.networks.generator,
                nn.ModuleList([self.networks.heads, self.networks.discriminator]),
            )
        ]
        self._weighting = find_rule(config.rule).weighting
        self._update = harmonized(
            self._adams[0],
            self.networks.generator.parameters(),
            rule=config.rule,
            recorder=self._recorder,
        )
        self._train: Callable[[Batch], None] = (
            self._dwl_step if config.method.startswith(DWL) else self._mcd_step
        )

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        self._train(batch)

    def state(self) -> dict[str, Any]:
        """Return all that changes, for ``torch.save``; the random state, too."""
        self.rows += to_rows(self._recorder.flush().gramians)
        return {
            "networks": self.networks.state_dict(),
            "adams": [adam.state_dict() for adam in self._adams],
            "balance": vars(self._balance),
            "rows": self.rows,
            "random": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.networks.load_state_dict(state["networks"])
        for adam, one in zip(self._adams, state["adams"], strict=True):
            adam.load_state_dict(one)
        vars(self._balance).update(state["balance"])
        self.rows = state["rows"]
        torch.set_rng_state(state["random"])

    def _mcd_step(self, batch: Batch) -> None:
        networks, times = self.networks, self._config.inner_steps
        source = networks.generator(batch.source)
        descend(classification_loss(networks, source, batch.labels), *self._adams)
        if self._config.method == SOURCE_ONLY:
            return
        if self._config.method == MCD_HEADS:
            self._weighed_heads_step(batch)
        else:
            heads_loss = mcd_heads_loss(networks, batch, self._config.trade_off)
            descend(heads_loss, self._adams[1])
        if self._config.method == MCD_JOINT:
            losses = partial(mcd_losses, networks, batch, self._config.trade_off)
            generator_step(networks, self._update, losses, times)
        else:
            self._discrepancy_steps(batch.target, times)

    def _discrepancy_steps(self, target: Tensor, times: int) -> None:
        """Lower the discrepancy by G alone."""
        self.networks.heads.requires_grad_(False)
        for _ in range(times):
            features = self.networks.generator(target)
            loss = self._config.trade_off * discrepancy(self.networks, features)
            descend(loss, self._adams[0])
        self.networks.heads.requires_grad_(True)

    def _weighed_heads_step(self, batch: Batch) -> None:
        """Train the heads on losses with weights that are measured on G."""
        networks = self.networks
        generator = list(networks.generator.parameters())
        # One domain after the other, as in step B of MCD: batch normalization averages.
        source = networks.generator(batch.source)
        classification = classification_loss(networks, source, batch.labels)
        apart = discrepancy(networks, networks.generator(batch.target))
        losses = {
            "classification": classification,
            "minus discrepancy": -self._config.trade_off * apart,
        }
        self._adams[1].zero_grad()
        found = measure(losses, generator, self._weighting, recorder=self._recorder)
        both = torch.stack([*losses.values()])
        heads = list(networks.heads.parameters())
        torch.autograd.backward(both @ found.weights.to(both), inputs=heads)
        self._adams[1].step()

    def _dwl_step(self, batch: Batch) -> None:
        networks, share = self.networks, self._balance.share
        times, first = self._config.inner_steps, networks.heads[0]
        for _ in range(times):
            logits = first(networks.generator(batch.source))
            descend(F.cross_entropy(logits, batch.labels), *self._adams)
        descend(_discriminator_loss(networks, batch), self._adams[1])
        descend(_heads_loss(networks, batch), self._adams[1])
        pair = partial(dwl_pair, networks, batch)
        if self._config.method == DWL_UNWEIGHTED:
            self._unweighted_steps(pair, times)
        else:
            generator_step(
                networks, self._update, lambda: weigh_pair(pair(), share), times
            )
        logits = first(networks.generator(batch.target))
        descend(pseudo_label_loss(logits), *self._adams)
        self._balance.see(*_seen(networks, batch))

    def _unweighted_steps(self, make_pair: Callable[[], Losses], times: int) -> None:
        """Weigh by T what has weights that were measured without T."""
        generator = list(self.networks.generator.parameters())
        weighting, share = self._weighting, self._balance.share

        def update(pair: Losses) -> None:
            losses = pair._asdict()
            found = measure(losses, generator, weighting, recorder=self._recorder)
            both = torch.stack(weigh_pair(pair, share))
            descend(both @ found.weights.to(both), self._adams[0])

        generator_step(self.networks, update, make_pair, times)


def dwl_pair(networks: Networks, batch: Batch) -> Losses:
    """DWL's two losses of G: alignment, and the heads' discrepancy on the target.

    Alignment is 0.2 times minus the cross entropy of what D says of the source, with what
    it says of the target as labels; these are constants, so G moves the source alone.
    """
    source = networks.generator(batch.source)
    target = _features_twice(networks.generator, batch.target)
    alignment = -CONFUSION * _domain_loss(networks, source, target)
    return Losses(alignment, discrepancy(networks, target))


def weigh_pair(pair: Losses, share: float) -> Losses:
    """Weigh DWL's two losses by T and 1 - T."""
    return Losses(share * pair.alignment, (1 - share) * pair.classification)


def pseudo_label_loss(logits: Tensor) -> Tensor:
    """DWL's loss on the target's own predictions, a scalar, from logits ``[B, c]``.

    2 mu times the cross entropy with the predicted classes, where mu is 1 if all of the
    batch is sure. That the entropy is to fall, too, has no effect in the code: it loses
    its graph there, and so it has none here.
    """
    entropy = -(logits.softmax(1) * logits.log_softmax(1)).mean().detach()
    mu = (torch.exp(-entropy) - 1 / CLASSES) / (1 - 1 / CLASSES)
    return 2 * mu * F.cross_entropy(logits, logits.detach().argmax(1))


def _discriminator_loss(networks: Networks, batch: Batch) -> Tensor:
    """What D lowers while G rests: the opposite of G's alignment, at half its weight."""
    with torch.no_grad():
        source = networks.generator(batch.source)
        target = networks.generator(batch.target)
    return 0.1 * _domain_loss(networks, source, target)


def _heads_loss(networks: Networks, batch: Batch) -> Tensor:
    """What the heads lower while G rests; of the three pairs C1 and C2 are to differ."""
    with torch.no_grad():
        source = networks.generator(batch.source)
        target = networks.generator(batch.target)
    classification = classification_loss(networks, source, batch.labels)
    _, one, other = (head(target).softmax(1) for head in networks.heads)
    return classification - F.l1_loss(one, other)


def _domain_loss(networks: Networks, source: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of what D says of the source, with what it says of the target."""
    with torch.no_grad():
        labels = networks.discriminator(target).sigmoid()
    return F.binary_cross_entropy(networks.discriminator(source).sigmoid(), labels)


def _features_twice(generator: nn.Module, images: Tensor) -> Tensor:
    """Compute features ``[B, f]`` that the published code computes twice in a row.

    They are the same, since G drops nothing; but batch normalization averages twice.
    """
    norms = [one for one in generator.modules() if isinstance(one, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1 - 0.9**2
    features: Tensor = generator(images)
    for norm in norms:
        norm.momentum = 0.1
    return features


@torch.no_grad()
def _seen(networks: Networks, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the balance is measured on: in training mode, as there."""
    source = networks.generator(batch.source)
    target = _features_twice(networks.generator, batch.target)
    return source, batch.labels, target, networks.heads[0](target).argmax(1)
