"""The methods' losses: pairs (alignment, classification) of one batch.

Alignment is task 1 and classification is task 2, as in section 3.3 of the paper
(Huang, Song and Zhang, arXiv 2408.00288): GH++ treats the two differently unless
lambda is 1/2. A trade-off is part of the alignment loss, so that what is harmonized is
what is optimized. Nothing is detached that the methods' papers do not detach.
"""

import math
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.uda.data import Batch
from benchmarks.uda.methods.networks import Networks, reverse_gradient


class Losses(NamedTuple):
    """The losses of both tasks, scalars: L1 and L2 of section 3.3."""

    alignment: Tensor
    classification: Tensor


def warm_up(progress: float) -> float:
    """Return the reversal's coefficient at ``progress`` in [0, 1]: 0, rising to 1.

    It is 2 / (1 + exp(-10 progress)) - 1, of DANN (Ganin et al., 2016, section 5.2).
    """
    return 2 / (1 + math.exp(-10 * progress)) - 1


def classification_loss(networks: Networks, features: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy (eq. 2) of source features ``[B, f]``, summed over the heads."""
    losses = [F.cross_entropy(head(features), labels) for head in networks.heads]
    return torch.stack(losses).sum()


def dann_losses(
    networks: Networks, batch: Batch, coefficient: float, trade_off: float
) -> Losses:
    """DANN (Ganin et al., 2016): a discriminator tells the domains' features apart.

    The alignment loss is ``trade_off`` times the discriminator's cross entropy. Its
    gradient for D is that of the cross entropy, and for G it is reversed and
    multiplied by ``coefficient``: both descend in the minimax of eq. 3.
    """
    source = networks.generator(batch.source)
    target = networks.generator(batch.target)
    features = reverse_gradient(torch.cat([source, target]), coefficient)
    domain = domain_loss(networks.discriminator(features))
    return Losses(
        trade_off * domain, classification_loss(networks, source, batch.labels)
    )


def cdan_losses(
    networks: Networks, batch: Batch, coefficient: float, trade_off: float
) -> Losses:
    """CDAN+E (Long et al., 2018): D sees features times predictions, certain ones more.

    As in that paper, neither the predictions in the outer product nor the entropy
    weights are detached: the reversed gradient reaches G and the head through both.
    """
    source = networks.generator(batch.source)
    target = networks.generator(batch.target)
    source_logits = networks.heads[0](source)
    logits = torch.cat([source_logits, networks.heads[0](target)])
    features = reverse_gradient(torch.cat([source, target]), coefficient)
    probabilities = reverse_gradient(logits.softmax(1), coefficient)
    domain_logits = networks.discriminator(outer_product(features, probabilities))
    domain = domain_loss(domain_logits, entropy_weights(probabilities))
    return Losses(trade_off * domain, F.cross_entropy(source_logits, batch.labels))


def mcd_losses(networks: Networks, batch: Batch, trade_off: float) -> Losses:
    """MCD (Saito et al., 2018), as its generator sees it: the pair of step C.

    The alignment loss is ``trade_off`` times the discrepancy of the two heads on the
    target, which G *lowers*. The heads raise it, in another step: see
    :func:`mcd_heads_loss`.
    """
    source = networks.generator(batch.source)
    target = networks.generator(batch.target)
    return Losses(
        trade_off * discrepancy(networks, target),
        classification_loss(networks, source, batch.labels),
    )


def mcd_heads_loss(networks: Networks, batch: Batch, trade_off: float) -> Tensor:
    """MCD's step B, a scalar: heads that classify the source and differ on the target.

    G gets no gradient from it.
    """
    with torch.no_grad():
        source = networks.generator(batch.source)
        target = networks.generator(batch.target)
    classification = classification_loss(networks, source, batch.labels)
    return classification - trade_off * discrepancy(networks, target)


def domain_loss(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The discriminator's cross entropy, a scalar: eq. 1 with its sign changed.

    Args:
        logits: ``[2 B, 1]``, the source domain in the first half.
        weights: ``[2 B]``, of the examples; all 1 if absent.
    """
    labels = torch.zeros_like(logits)
    labels[: len(logits) // 2] = 1
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    # Not as torch's argument ``weight``, which has no derivative.
    return (losses if weights is None else losses * weights[:, None]).mean()


def outer_product(features: Tensor, probabilities: Tensor) -> Tensor:
    """Flatten the rows' outer products, ``[n, f]`` and ``[n, c]`` to ``[n, c f]``."""
    return (probabilities[:, :, None] * features[:, None, :]).flatten(1)


def entropy_weights(probabilities: Tensor, least: float = 1) -> Tensor:
    """Weights ``least`` + exp(-entropy), scaled to a mean of 1 within each domain.

    Args:
        probabilities: ``[2 B, c]``, the source domain in the first half.
        least: 1 in CDAN+E, 0 in GVB.

    Returns:
        Weights, ``[2 B]``. They depend on the probabilities differentiably, but for the
        scale: it keeps the domains in balance and is no part of CDAN's objective, so
        it is a constant.
    """
    # xlogy would give NaN in backward where a probability underflows to 0.
    tiny = torch.finfo(probabilities.dtype).tiny
    entropy = -(probabilities * probabilities.clamp(min=tiny).log()).sum(1)
    return certainty_weights(entropy, least)


def certainty_weights(entropy: Tensor, least: float = 1) -> Tensor:
    """Turn entropies ``[2 B]`` into the weights of :func:`entropy_weights`."""
    weights = (least + (-entropy).exp()).view(2, -1)
    return (weights / weights.detach().mean(1, keepdim=True)).flatten()


def probabilities_of(networks: Networks, features: Tensor) -> Tensor:
    """Classify features ``[B, f]`` with each head, ``[heads, B, c]``."""
    return torch.stack([head(features).softmax(1) for head in networks.heads])


def discrepancy(networks: Networks, features: Tensor) -> Tensor:
    """Mean absolute difference of the heads' probabilities, summed over their pairs.

    A scalar, in [0, 2 / c] for each pair.
    """
    pairs = combinations(probabilities_of(networks, features), 2)
    return torch.stack([F.l1_loss(one, other) for one, other in pairs]).sum()
