"""SSRT (Sun et al., CVPR 2022): an adversary, self-refinement, and Safe Training.

Target images have to be classified alike with and without a perturbation of their
tokens, inside the transformer; Safe Training withdraws that demand, and what it did,
when the predictions lose classes. Formulas and constants are those of the published code
(tsun/SSRT), but:

* The transformer is small and starts from random weights, not from ImageNet's; there is
  no bottleneck, the classifier is one linear map, and none of them drops units. Their
  code perturbs before the blocks 0, 4 or 8 of 12; here it is 0, 1 or 2
  of 4.
* The offset leads to the image at a random distance in the batch's (random) order, there
  to that at the mirrored place.
* The reversal's coefficient rises as DANN's over the whole run, there over some thousand
  of 20 000 steps or more.
* Drops are not looked for in the first interval, and the first snapshot is taken at its
  end: their model starts with trained weights, to which one can return.
* A snapshot is a copy. Theirs is ``state_dict()`` itself, whose tensors are the weights in
  training, so that to load it changes nothing.
* An interval is a tenth of a short run, not always 1000 steps (see ``steps``), and is
  then cut fewer times, so that no part is shorter than theirs.
"""

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.uda.data import Batch
from benchmarks.uda.methods import Losses, domain_loss
from benchmarks.uda.methods.networks import Networks, reverse_gradient
from benchmarks.uda.methods.vit import VisionTransformer

LAYERS = (0, 1, 2)
"""The blocks before which tokens are perturbed, with the same probability."""

OFFSET = 0.3
"""How far tokens are moved toward those of another image: the paper's alpha."""

FROM_CLEAN = 0.5
"""Probability that the clean predictions are the teacher."""

CONFIDENT = 0.4
"""Images count whose teacher is surer than this: the paper's epsilon."""

WEIGHT = 0.2
"""Of the self-refinement beside the adversarial loss: the paper's beta."""

REVERSAL = 0.1
"""What the reversal's coefficient rises to, of a cross entropy that counts twice."""

INTERVAL, LEVELS, DROP = 1000, 4, 1.0
"""Steps between the looks of Safe Training, the paper's T; how often it halves what it
looks at, L; and by how many classes the predictions must drop."""

FAINT = 0.1
"""A refinement that is no stronger is not to blame for a drop."""

# The published code's shortest part. The mean of fewer batches falls by a class by chance:
# of intervals of 150 steps in 16 parts (with AdamW) Safe Training took back 7 of 8. The
# halves are compared in any case, so runs of some hundred steps have false alarms.
SHORTEST = INTERVAL >> LEVELS


def ssrt_losses(
    networks: Networks,
    batch: Batch,
    coefficient: float,
    trade_off: float,
    strength: float = 1.0,
) -> tuple[Losses, Tensor]:
    """The pair of losses, and the classes ``[B]`` that the target is predicted to have.

    The alignment loss is ``trade_off`` times the sum of twice the discriminator's cross
    entropy, whose gradient for G is reversed and multiplied by ``REVERSAL *
    coefficient``, and of the self-refinement, weighted by ``WEIGHT * strength``.
    ``strength`` in [0, 1] is that of :class:`SafeTraining`; it shortens the offset of the
    tokens, too.

    Draws from the global random state three times, whatever the arguments.

    Args:
        networks: with a :class:`VisionTransformer` as generator and one head.
        batch: at least two images of each domain.
        coefficient: of the reversal.
        trade_off: see above.
        strength: see above.
    """
    vit, head = networks.generator, networks.heads[0]
    assert isinstance(vit, VisionTransformer)  # by build_networks
    layer = LAYERS[int(torch.randint(len(LAYERS), ()))]
    shift = int(torch.randint(1, len(batch.target), ()))
    from_clean = bool(torch.rand(()) < FROM_CLEAN)

    source = vit(batch.source)
    tokens = vit.advance(vit.embed(batch.target), 0, layer)
    target = vit.finish(tokens, layer)
    moved = perturb(tokens, shift, OFFSET * strength)
    clean, perturbed = head(target), head(vit.finish(moved, layer))

    features = reverse_gradient(torch.cat([source, target]), REVERSAL * coefficient)
    domain = 2 * domain_loss(networks.discriminator(features))
    refinement = refinement_loss(
        *((clean, perturbed) if from_clean else (perturbed, clean))
    )
    losses = Losses(
        trade_off * (domain + WEIGHT * strength * refinement),
        F.cross_entropy(head(source), batch.labels),
    )
    return losses, clean.detach().argmax(1)


def perturb(tokens: Tensor, shift: int, offset: float) -> Tensor:
    """Move each image's tokens toward those ``shift`` places before, ``[B, T, f]``.

    Their gradient is that of the unmoved tokens.
    """
    constant = tokens.detach()
    return tokens + offset * (constant.roll(shift, 0) - constant)


def refinement_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher, a scalar.

    Args:
        teacher: logits ``[B, c]``.
        student: logits ``[B, c]``.

    Returns:
        The mean over the images with a probability of the teacher's above
        ``CONFIDENT``; 0 if there are none.
    """
    expected, found = teacher.log_softmax(1), student.log_softmax(1)
    divergences = F.kl_div(found, expected, reduction="none", log_target=True).sum(1)
    confident = expected.detach().exp().amax(1) > CONFIDENT
    return (divergences * confident).sum() / confident.sum().clamp(min=1)


def drops(diversities: Tensor, before: Tensor | None = None) -> bool:
    """Tell whether a series ``[n]`` drops suddenly, seen at any of some scales.

    It is cut into 1, 2, 4, 8 and 16 parts, and so is the series ``before``, if there is
    one, of which the last part counts. It drops if the mean of a part lies more than
    ``DROP`` below that of the part before. But for the whole and the halves, no parts
    are cut that are shorter than ``SHORTEST``.
    """
    for count in (1 << level for level in range(LEVELS + 1)):
        if count > 2 and len(diversities) // count < SHORTEST:
            return False
        parts = [*torch.tensor_split(diversities, count)]
        if before is not None:
            parts = [torch.tensor_split(before, count)[-1], *parts]
        means = torch.stack([part.mean() for part in parts])
        if bool((means[:-1] - means[1:] > DROP).any()):
            return True
    return False


class SafeTraining:
    """How strongly to refine, and the way back when the predictions lose classes.

    The strength rises from 0 to 1 within an interval of steps, as a sine. After each
    interval but the first, the numbers of different classes predicted in its batches
    are looked at, beside those of the interval before the last snapshot: if they drop, and
    the strength is not ``FAINT``, the networks return to that snapshot and the strength to
    0; if not, a snapshot is taken. A drop while the strength still rises doubles the time
    that it takes, for good.

    Attributes:
        restored: how often the networks returned.

    Args:
        networks: they return in place.
        interval: in steps, at least 2.

    Raises:
        ValueError: if the interval is too short to be cut.
    """

    def __init__(self, networks: nn.Module, interval: int = INTERVAL) -> None:
        if interval < 2:
            raise ValueError(f"Invalid interval value: {interval}")
        self.restored = 0
        self._networks = networks
        self._interval = interval
        self._snapshot: dict[str, Tensor] | None = None
        self._diversities: list[int] = []
        self._before: Tensor | None = None
        self._age = 0
        self._rise = interval

    @property
    def strength(self) -> float:
        """Of the refinement in the next step, in [0, 1]: the paper's r."""
        return math.sin(math.pi / 2 * min(1, self._age / self._rise))

    def after_step(self, predicted: Tensor) -> None:
        """Note the classes ``[B]`` predicted in a step; look back if it is time to."""
        self._diversities.append(len(set(predicted.tolist())))
        self._age += 1
        if len(self._diversities) < self._interval:
            return
        seen = torch.tensor(self._diversities, dtype=torch.float32)
        self._diversities = []
        if (
            self._snapshot is not None
            and self.strength > FAINT
            and drops(seen, self._before)
        ):
            self._networks.load_state_dict(self._snapshot)
            if self._age <= self._rise:
                self._rise *= 2
            self._age = 0
            self.restored += 1
        else:
            self._snapshot = deepcopy(self._networks.state_dict())
            self._before = seen
