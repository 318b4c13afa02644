"""The training steps of the methods, one batch at a time.

Every step hands its pair of losses to an *update* (``updates``), which alone knows
whether they are summed or harmonized.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from benchmarks.common.digits import SIZE
from benchmarks.uda.data import Batch
from benchmarks.uda.methods import (
    Losses,
    cdan_losses,
    classification_loss,
    dann_losses,
    mcd_heads_loss,
    mcd_losses,
    warm_up,
)
from benchmarks.uda.methods.dwl import Balance, dwl_losses, dwl_rest_loss
from benchmarks.uda.methods.gvb import gvb_losses
from benchmarks.uda.methods.networks import CLASSES, Networks
from benchmarks.uda.methods.ssrt import INTERVAL, SafeTraining, ssrt_losses
from benchmarks.uda.methods.updates import MakeUpdate, Update

SOURCE_ONLY = "source-only"
METHODS = (SOURCE_ONLY, "DANN", "CDAN+E", "MCD")
"""Those of the main job."""

ALL_METHODS = (*METHODS, "GVB", "DWL", "SSRT")
"""Those of the longer tables, too."""

REVISIONS = {"GVB": 2, "SSRT": 2}
"""Of methods that compute something else than in runs that once were kept."""

Step: TypeAlias = Callable[[Batch, float], None]
"""Train on one batch at a progress in [0, 1)."""


@dataclass(frozen=True)
class Config:
    """One run: everything that decides its numbers.

    Attributes:
        rule: a key of ``ALL_RULES``; ``sum`` for ``source-only``, which has one loss.
        trade_off: factor of the alignment loss, before harmonization.
        inner_steps: how often MCD repeats its step C (its paper: 4; here 1, for time),
            and DWL its generator's step (published code: 8).
        evaluations: how often the target test set is read, the last step included.
        size: of the images.
    """

    task: str
    method: str
    rule: str
    seed: int
    steps: int
    batch_size: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    trade_off: float = 1.0
    inner_steps: int = 1
    evaluations: int = 10
    size: int = SIZE

    def settings(self) -> dict[str, object]:
        """All fields and, where the method has one, its revision: what a key is made of."""
        revision = REVISIONS.get(self.method)
        return asdict(self) | ({} if revision is None else {"revision": revision})

    def is_evaluated(self, done: int) -> bool:
        """Tell whether the target test set is read after so many steps."""
        every = max(1, self.steps // self.evaluations)
        return done % every == 0 or done == self.steps


def make_step(
    config: Config,
    networks: Networks,
    make_update: MakeUpdate,
    slow: Iterable[nn.Parameter] = (),
    classes: int = CLASSES,
) -> Step:
    """Build a method's training step, with the learning rate's schedule inside.

    Args:
        config: of the run.
        networks: of the method.
        make_update: makes what is done with each pair of losses.
        slow: parameters that learn at a tenth of the rate, as trained ones should.
        classes: how many there are.
    """
    slow = set(slow)

    def new_sgd(parameters: Iterable[nn.Parameter]) -> SGD:
        return SGD(
            _split(parameters, slow),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )

    if config.method in ("MCD", "DWL"):
        rest = [*networks.heads.parameters(), *networks.discriminator.parameters()]
        sgds = [new_sgd(networks.generator.parameters()), new_sgd(rest)]
        update = make_update(sgds[0], networks.generator.parameters())
        if config.method == "MCD":
            train = partial(_mcd_step, config, networks, sgds, update)
        else:
            balance = Balance(classes)
            train = partial(_dwl_step, config, networks, sgds[1], update, balance)
    else:
        sgds = [new_sgd(networks.parameters())]
        if config.method == SOURCE_ONLY:
            train = partial(_source_step, networks, sgds)
        else:
            update = make_update(sgds[0], networks.generator.parameters())
            train = partial(_adversarial_step, config, networks, update)
            if config.method == "SSRT":
                safe = SafeTraining(networks, safe_interval(config.steps))
                train = partial(_ssrt_step, config, networks, safe, update)

    def step(batch: Batch, progress: float) -> None:
        for sgd in sgds:
            for group in sgd.param_groups:
                rate = group["share"] * config.lr
                group["lr"] = rate * (1 + 10 * progress) ** -0.75
        train(batch, progress)

    return step


def _split(
    parameters: Iterable[nn.Parameter], slow: Collection[nn.Parameter]
) -> list[dict[str, Any]]:
    """Group parameters by their share of the learning rate."""
    every = list(parameters)
    groups = {
        1.0: [one for one in every if one not in slow],
        0.1: [one for one in every if one in slow],
    }
    return [{"params": own, "share": share} for share, own in groups.items() if own]


def _source_step(
    networks: Networks, sgds: list[SGD], batch: Batch, _progress: float
) -> None:
    """Train G and the head on the source alone."""
    source = networks.generator(batch.source)
    descend(classification_loss(networks, source, batch.labels), *sgds)


def descend(loss: Tensor, *optimizers: Optimizer) -> None:
    """Lower one loss: the steps that are never harmonized."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    torch.autograd.backward(loss)
    for optimizer in optimizers:
        optimizer.step()


def generator_step(
    networks: Networks, update: Update, make_losses: Callable[[], Losses], times: int
) -> None:
    """Lower a pair of losses by G alone, ``times`` times, each on losses made anew.

    Leaves heads and discriminator and their gradients as they are. ``update`` must be
    one of G's parameters alone.
    """
    resting = (networks.heads, networks.discriminator)
    for module in resting:
        module.requires_grad_(False)
    for _ in range(times):
        update(make_losses())
    for module in resting:
        module.requires_grad_(True)


def _adversarial_step(
    config: Config, networks: Networks, update: Update, batch: Batch, progress: float
) -> None:
    """Train everything at once, through the reversed gradient."""
    losses_of = {"DANN": dann_losses, "CDAN+E": cdan_losses, "GVB": gvb_losses}
    update(
        losses_of[config.method](networks, batch, warm_up(progress), config.trade_off)
    )


def _ssrt_step(
    config: Config,
    networks: Networks,
    safe: SafeTraining,
    update: Update,
    batch: Batch,
    progress: float,
) -> None:
    """Train everything at once, as strongly and for as long as Safe Training lets it."""
    losses, predicted = ssrt_losses(
        networks, batch, warm_up(progress), config.trade_off, safe.strength
    )
    update(losses)
    safe.after_step(predicted)


def safe_interval(steps: int) -> int:
    """Choose Safe Training's interval: the paper's, but ten in a run at least."""
    return min(INTERVAL, max(2, steps // 10))


def _mcd_step(
    config: Config,
    networks: Networks,
    sgds: list[SGD],
    update: Update,
    batch: Batch,
    progress: float,
) -> None:
    """Train in the three steps of MCD (Saito et al., 2018), harmonized in step C.

    * A: G and the heads on the source.
    * B: the heads on cross entropy minus discrepancy; G rests.
    * C, ``config.inner_steps`` times: G on the pair (discrepancy, cross entropy); the
      heads rest.

    MCD's own step C, and that of the code published with the GH paper, lowers the
    discrepancy alone, so that the two tasks never meet in one update of G: they take
    turns. Here cross entropy joins step C, for the plain sum as well, because
    a conflict can only be harmonized where two gradients are added. (The published
    code harmonizes the *heads'* update of step B with weights measured on G, where
    the discrepancy has the opposite sign; G is never harmonized. The GH paper's
    sections 4.2 and 5.6 do not say which step they mean.)
    """
    _source_step(networks, sgds, batch, progress)
    descend(mcd_heads_loss(networks, batch, config.trade_off), sgds[1])
    losses = partial(mcd_losses, networks, batch, config.trade_off)
    generator_step(networks, update, losses, config.inner_steps)


def _dwl_step(
    config: Config,
    networks: Networks,
    rest_sgd: SGD,
    update: Update,
    balance: Balance,
    batch: Batch,
    _progress: float,
) -> None:
    """Train in two steps: heads and discriminator, then G ``config.inner_steps`` times.

    The published code has a step A as MCD's before them; cross entropy trains G in the
    last step here.
    """
    descend(dwl_rest_loss(networks, batch), rest_sgd)
    losses = partial(dwl_losses, networks, batch, balance, config.trade_off)
    generator_step(networks, update, losses, config.inner_steps)
