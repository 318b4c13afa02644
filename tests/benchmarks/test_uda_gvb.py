"""GVB's losses, judged by its formulas."""

import pytest
import torch
from torch import nn

from benchmarks.uda.data import Batch
from benchmarks.uda.methods.gvb import gvb_losses
from benchmarks.uda.methods.networks import Bridged, Networks, build_networks
from tests.benchmarks.modules import gradients


@pytest.fixture
def networks() -> Networks:
    networks = build_networks("GVB", seed=0).eval()  # no dropout: one loss
    with torch.no_grad():
        for parameter in networks.heads.parameters():
            parameter.mul_(20)  # or all predictions are as uncertain
    return networks


def bridges(networks: Networks) -> list[nn.Linear]:
    found = [one.bridge for one in networks.modules() if isinstance(one, Bridged)]
    assert len(found) == 2
    return found


def test_the_losses_are_the_literal_sums(networks: Networks, batch: Batch) -> None:
    losses = gvb_losses(networks, batch, 1.0, trade_off=2.0)
    head, discriminator = networks.heads[0], networks.discriminator
    assert isinstance(head, Bridged)
    assert isinstance(discriminator, Bridged)
    features = networks.generator(torch.cat([batch.source, batch.target]))
    gamma = head.bridge(features)
    p = (head.whole(features) - gamma).softmax(1)
    hidden = discriminator.trunk(p)
    assert hidden.min() == 0  # rectified
    sigma = discriminator.bridge(hidden)
    d = (discriminator.whole(hidden) - sigma).flatten().sigmoid()
    certain = (p * p.log()).sum(1).exp()
    domain = torch.tensor(0.0)
    for half, said in ((slice(0, 8), d), (slice(8, 16), 1 - d)):
        weights = certain[half] / certain[half].mean()
        domain = domain - (weights * said[half].log()).sum() / 16
    size = gamma.abs().sum() / (16 * 10) + sigma.abs().sum() / 16
    expected = -p[torch.arange(8), batch.labels].log().mean()
    torch.testing.assert_close(losses.alignment, 2 * (domain + size))
    torch.testing.assert_close(losses.classification, expected)


def test_predictions_are_those_without_the_bridge(
    networks: Networks, batch: Batch
) -> None:
    before = networks(batch.source)
    with torch.no_grad():
        for parameter in bridges(networks)[0].parameters():
            parameter.mul_(2)
    assert not networks(batch.source).equal(before)


def test_the_reversal_turns_what_passes_the_discriminator_alone(
    networks: Networks, batch: Batch
) -> None:
    found = {c: gvb_losses(networks, batch, c, 1.0).alignment for c in (-1.0, 0.0, 1.0)}
    assert len({loss.item() for loss in found.values()}) == 1
    plain, none, turned = (gradients(one, networks.generator) for one in found.values())
    # Without it only the generator's own bridge is left, which both sides shrink.
    for a, b, c in zip(plain, none, turned, strict=True):
        torch.testing.assert_close(a + c, 2 * b)
        assert b.abs().max() > 0
        assert not torch.allclose(a, c)
    one, other = (gradients(found[c], networks.discriminator) for c in (-1.0, 1.0))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
