"""DWL: its weight, its losses and who is trained in which step."""

import math
from collections.abc import Iterable
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.uda.data import Batch
from benchmarks.uda.methods import Losses, discrepancy
from benchmarks.uda.methods.dwl import (
    CONFUSION,
    Balance,
    dwl_losses,
    dwl_rest_loss,
    share_of,
)
from benchmarks.uda.methods.networks import Networks, build_networks
from benchmarks.uda.methods.steps import Config, make_step
from benchmarks.uda.methods.updates import Update, harmonized, plain_update
from ghopt import Recorder
from tests.benchmarks.modules import gradients


@pytest.fixture
def networks() -> Networks:
    return build_networks("DWL", seed=0).eval()  # no dropout: one loss


def clouds(distance: float, spread: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two classes at +-1 on one axis, in two domains so far apart on another."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    rows = spread * torch.randn(2, 40, 3, generator=generator)
    rows[:, :, 0] += 2.0 * labels - 1
    rows[1, :, 1] += distance
    return rows[0], labels, rows[1], labels


def test_who_is_behind_gets_the_weight() -> None:
    assert share_of(1, 1) == 1  # far apart, classes clear: align
    assert share_of(0, 0) == 0  # aligned, classes blurred
    assert share_of(0, 1) == 0.5  # nothing to do
    assert share_of(0.5, 0.5) == 0.5
    assert share_of(0.5, 0.9) > share_of(0.5, 0.1)


def test_the_share_is_half_until_something_has_changed() -> None:
    balance = Balance(2, every=2)
    for _ in range(4):
        balance.see(*clouds(1.0, 0.1))
        assert balance.share == 0.5


def test_domains_that_drift_apart_raise_the_share_and_blurred_classes_lower_it() -> (
    None
):
    drifting = Balance(2, every=1)
    drifting.see(*clouds(0.0, 0.1))
    drifting.see(*clouds(5.0, 0.1))
    blurred = Balance(2, every=1)
    blurred.see(*clouds(0.0, 0.1))
    blurred.see(*clouds(0.0, 3.0))
    assert drifting.share > 0.5
    # The distance of the noisy means grew, too: to the most so far, as the need did.
    assert blurred.share == 0.5
    blurred.see(*clouds(0.0, 2.9))
    assert blurred.share < drifting.share


def test_the_weaker_domain_decides_about_the_classes() -> None:
    clear, labels, target, _ = clouds(0.0, 0.1)
    chance = (torch.arange(40) // 2) % 2
    balance = Balance(2, every=1)
    balance.see(clear, labels, target, labels)
    balance.see(clear, labels, target + 1, labels)  # to the greatest distance
    before = balance.share
    balance.see(clear, labels, target + 1, chance)  # target predictions by chance
    assert balance.share == pytest.approx(0.5)  # 1 / (1 + 1)
    assert before > balance.share


def test_it_measures_every_so_often_on_the_batches_since_then() -> None:
    balance = Balance(2, every=2)
    shares = []
    for distance in (0.0, 9.0, 0.0, 0.0, 1.0, 9.0):
        balance.see(*clouds(distance, 0.1))
        shares.append(balance.share)
    assert shares[:3] == [0.5] * 3
    # The second time at 0, the least so far; the third at 5, the most: not at 9.
    assert shares[3] == shares[4] != 0.5
    assert shares[5] > shares[3]


def test_the_pair_is_weighed_by_the_share(networks: Networks, batch: Batch) -> None:
    balance = Balance(10)
    balance.share = 0.25
    losses = dwl_losses(networks, batch, balance, trade_off=3.0)
    source, target = (networks.generator(one) for one in (batch.source, batch.target))
    d = networks.discriminator(torch.cat([source, target])).flatten().sigmoid()
    domain = -(d[:8].log().sum() + (1 - d[8:]).log().sum()) / 16
    torch.testing.assert_close(losses.alignment, -3 * CONFUSION * 0.25 * domain)
    entropy = torch.tensor(0.0)
    for head in networks.heads:
        p = head(source).softmax(1)
        entropy = entropy - p[torch.arange(8), batch.labels].log().mean()
    expected = entropy + 0.75 * discrepancy(networks, target)
    torch.testing.assert_close(losses.classification, expected)


def test_every_two_of_three_heads_are_compared(
    networks: Networks, batch: Batch
) -> None:
    features = networks.generator(batch.target)
    assert len(networks.heads) == 3
    expected = sum(
        (a(features).softmax(1) - b(features).softmax(1)).abs().sum().item() / 80
        for a, b in combinations(networks.heads, 2)
    )
    assert discrepancy(networks, features).item() == pytest.approx(expected)


def test_the_generator_lowers_what_the_others_raise(
    networks: Networks, batch: Batch
) -> None:
    rest = dwl_rest_loss(networks, batch)
    assert not any(one.any() for one in gradients(rest, networks.generator))
    losses = dwl_losses(networks, batch, Balance(10), 1.0)
    ours = gradients(losses.alignment, networks.discriminator)
    theirs = gradients(rest, networks.discriminator)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, -0.5 * CONFUSION * b)


def test_the_heads_raise_the_discrepancy_while_the_generator_rests(
    networks: Networks, batch: Batch
) -> None:
    def now() -> float:
        return discrepancy(networks, networks.generator(batch.target)).item()

    before = now()
    sgd = SGD(networks.heads.parameters(), lr=0.01)
    for _ in range(50):
        sgd.zero_grad()
        torch.autograd.backward(dwl_rest_loss(networks, batch))
        sgd.step()
    assert now() > before


def test_heads_and_discriminator_get_no_gradient_of_the_generator_s_pair(
    networks: Networks, batch: Batch
) -> None:
    rest = [*networks.heads.parameters(), *networks.discriminator.parameters()]
    expected = torch.autograd.grad(dwl_rest_loss(networks, batch), rest)
    config = Config("t", "DWL", "sum", 0, 10, lr=0.0)
    step = make_step(config, networks, plain_update)
    for _ in range(2):
        step(batch, 0.0)
    for parameter, gradient in zip(rest, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_what_is_remembered_holds_no_graph(networks: Networks, batch: Batch) -> None:
    balance = Balance(10)
    dwl_losses(networks, batch, balance, 1.0)
    (kept,) = balance._batches
    assert not any(one.requires_grad for one in kept)


def test_the_generator_rests_and_then_the_others_do(batch: Batch) -> None:
    networks = build_networks("DWL", seed=0)
    moved: list[tuple[bool, bool]] = []
    start = [p.detach().clone() for p in networks.parameters()]
    shared = {id(p) for p in networks.generator.parameters()}

    def make_update(sgd: SGD, params: Iterable[nn.Parameter]) -> Update:
        inner = plain_update(sgd, params)

        def update(losses: Losses) -> None:
            changed = {
                id(p) in shared
                for p, before in zip(networks.parameters(), start, strict=True)
                if not p.equal(before)
            }
            moved.append((True in changed, False in changed))
            rest = [p.detach().clone() for p in networks.heads.parameters()]
            inner(losses)
            assert all(
                a.equal(b)
                for a, b in zip(rest, networks.heads.parameters(), strict=True)
            )

        return update

    config = Config("t", "DWL", "sum", 0, 10, inner_steps=2)
    make_step(config, networks, make_update)(batch, 0.0)
    # Before the first update of G only the others have moved; before the second, all.
    assert moved == [(False, True), (True, True)]
    assert all(p.requires_grad for p in networks.parameters())


def test_a_run_of_dwl_is_harmonized_on_the_generator(batch: Batch) -> None:
    networks = build_networks("DWL", seed=0)
    recorder = Recorder()
    make_update = partial(harmonized, rule="gh", recorder=recorder)
    step = make_step(Config("t", "DWL", "gh", 0, 10), networks, make_update)
    step(batch, 0.0)
    (gramian,) = recorder.flush().gramians
    assert math.isfinite(gramian.sum())
    assert gramian.diagonal().min() > 0
