"""GVB: bridges that take away what the domains do not share, and vanish.

Cui et al., "Gradually Vanishing Bridge for Adversarial Domain Adaptation", CVPR 2020: the
variant with a bridge on generator and discriminator (GVB-GD), as in the GH paper. Formulas
are those of its published code (cuishuhao/GVB), but that a trade-off weighs the bridges,
too, of which code that trade-off is always 1. The networks are smaller.
"""

import torch
import torch.nn.functional as F

from benchmarks.uda.data import Batch
from benchmarks.uda.methods import Losses, domain_loss, entropy_weights
from benchmarks.uda.methods.networks import Bridged, Networks, reverse_gradient


def gvb_losses(
    networks: Networks, batch: Batch, coefficient: float, trade_off: float
) -> Losses:
    """Adversarial loss on bridged predictions, and the size of both bridges.

    The discriminator sees probabilities, certain ones more: their weights are
    exp(-entropy), as in GVB's code, where CDAN+E adds 1. The alignment
    loss is ``trade_off`` times the sum of three: its cross entropy, the mean absolute
    output of the generator's bridge and that of the discriminator's. The last is taken
    behind the reversal: the discriminator shrinks it, and G is led to raise it. (The code
    published with the GH paper harmonizes the two bridges as a pair of their own; they
    are no task of the model, but what keeps alignment honest.)
    """
    head, discriminator = networks.heads[0], networks.discriminator
    assert isinstance(head, Bridged)  # networks.assemble made them
    assert isinstance(discriminator, Bridged)
    features = torch.cat(
        [networks.generator(batch.source), networks.generator(batch.target)]
    )
    logits, bridge = head.split(features)
    probabilities = reverse_gradient(logits.softmax(1), coefficient)
    domain_logits, domain_bridge = discriminator.split(probabilities)
    domain = domain_loss(domain_logits, entropy_weights(probabilities, least=0))
    bridges = bridge.abs().mean() + domain_bridge.abs().mean()
    source_logits = logits[: len(batch.source)]
    return Losses(
        trade_off * (domain + bridges), F.cross_entropy(source_logits, batch.labels)
    )
