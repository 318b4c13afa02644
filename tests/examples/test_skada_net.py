"""skada: the recipe against a literal loop."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from skada.deep import DeepCoral
from sklearn.base import clone
from skorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.testing import assert_close

from examples.skada_net import Classifier, HarmonizedNet, make_domains, make_net
from ghopt import HarmonizedOptimizer
from tests.examples import oracle
from tests.examples.oracle import MicroBatch, weights


class Batches(Callback):  # type: ignore[misc]  # skorch has no types
    """Keeps what the sampler of skada draws."""

    def __init__(self) -> None:
        self.drawn: list[MicroBatch] = []

    def on_batch_begin(
        self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any
    ) -> None:
        del net, training, kwargs
        inputs, labels = batch
        self.drawn.append((inputs["X"], labels, inputs["sample_domain"]))


def fit(net: Any) -> list[Tensor]:
    inputs, labels, domains = make_domains()
    torch.manual_seed(0)  # of skada's sampler
    net.fit(inputs.double(), labels, sample_domain=domains)
    return weights(net.module_.base_module_)


def make(**options: Any) -> HarmonizedNet:
    return make_net(module__base_module=Classifier().double(), verbose=0, **options)


def both_losses(reg: float) -> Any:
    """Give a function of model and batch: the label loss, and ``reg`` times DeepCORAL."""

    def losses_of(model: nn.Module, batch: MicroBatch) -> list[Tensor]:
        inputs, labels, domains = batch
        assert isinstance(model, Classifier)
        features = model.features(inputs)
        source, target = features[domains >= 0], features[domains < 0]
        difference = torch.cov(source.T) - torch.cov(target.T)
        alignment = difference.square().sum() / (4 * features.shape[1] ** 2)
        known = domains >= 0
        return [cross_entropy(model(inputs)[known], labels[known]), reg * alignment]

    return losses_of


@pytest.mark.parametrize("reg", [1.0, 20.0])
def test_conflicting_losses_train_as_in_a_literal_loop(reg: float) -> None:
    batches = Batches()
    trained = fit(make(criterion__reg=reg, callbacks=[batches]))
    expected = Classifier().double()
    steps = [[batch] for batch in batches.drawn]
    assert oracle.train(expected, steps, losses_of=both_losses(reg)) > 9
    assert_close(trained, weights(expected), rtol=1e-12, atol=1e-12)


def without_harmony(params: Iterable[Tensor], **options: Any) -> HarmonizedOptimizer:
    return HarmonizedOptimizer(SGD(params, **options), lambda g: torch.ones(len(g)))


@pytest.mark.parametrize("reg", [1.0, 20.0])
def test_weights_of_one_train_as_skada_does_by_itself(reg: float) -> None:
    trained = fit(make(criterion__reg=reg, optimizer=without_harmony))
    plain = DeepCoral(
        Classifier().double(),
        "features",
        reg,
        optimizer=SGD,
        optimizer__momentum=0.9,
        lr=0.02,
        batch_size=16,
        train_split=None,
        verbose=0,
    )
    assert_close(trained, fit(plain), rtol=1e-12, atol=1e-12)


def test_a_fitted_net_predicts_and_can_be_cloned() -> None:
    net = make()
    trained = fit(net)
    inputs, _, domains = make_domains()
    assert set(net.predict(inputs.double(), sample_domain=domains)) == {0, 1}
    fresh = clone(net).set_params(module__base_module=Classifier().double())
    assert_close(fit(fresh), trained, rtol=0, atol=0)
