"""`HarmonizedFromParams`: as APIs use it that take a class of optimizers."""

import copy
import io
import pickle
from collections.abc import Iterable
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.testing import assert_close

from ghopt import HarmonizedFromParams, HarmonizedOptimizer, ghpp
from tests import models
from tests.models import Tasks

OPTIONS: dict[str, Any] = {"base_class": SGD, "momentum": 0.9}


class HarmonizedAdamW(HarmonizedFromParams):
    """As a user writes it for an API that passes no options."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        super().__init__(params, base_class=AdamW, **options)


def trained(
    model: Tasks, optimizer: HarmonizedOptimizer, count: int = 5
) -> list[Tensor]:
    batch = models.batch(3)
    for _ in range(count):
        optimizer.step(losses=model(*batch))
    return [parameter.detach().clone() for parameter in model.parameters()]


def made_and_wrapped() -> list[Tensor]:
    model = models.make(models.NETWORKS[0], 3)
    base = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return trained(model, HarmonizedOptimizer(base))


def test_it_steps_as_a_wrapped_base_does() -> None:
    model = models.make(models.NETWORKS[0], 3)
    optimizer = HarmonizedFromParams(model.parameters(), lr=0.05, **OPTIONS)
    assert type(optimizer.base_optimizer) is SGD
    assert_close(trained(model, optimizer), made_and_wrapped(), rtol=0, atol=0)


def test_a_rate_may_be_given_by_position() -> None:
    optimizer = HarmonizedFromParams(nn.Linear(2, 1).parameters(), 0.3, **OPTIONS)
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_groups_and_named_parameters_are_taken_as_the_base_takes_them() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    groups: list[dict[str, Any]] = [
        {"params": first.parameters()},
        {"params": second.parameters(), "lr": 0.7},
    ]
    optimizer = HarmonizedFromParams(groups, lr=0.3, **OPTIONS)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.7]
    named = HarmonizedFromParams(first.named_parameters(), lr=0.3, **OPTIONS)
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


def test_options_of_the_wrapper_reach_it() -> None:
    layer = nn.Linear(2, 1)
    optimizer = HarmonizedFromParams(
        layer.parameters(),
        base_class=Adam,
        weighting=ghpp,
        passes="separate",
        project_step=True,
        protect=("main", 1),
    )
    assert optimizer.weighting is ghpp
    assert optimizer.passes == "separate"
    assert optimizer.project_step
    assert optimizer.protect == ("main", "1")
    seldom = HarmonizedFromParams(layer.parameters(), base_class=Adam, measure_every=4)
    assert seldom.measure_every == 4


def test_shared_parameters_alone_are_harmonized() -> None:
    trunk, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = HarmonizedFromParams(
        [trunk, head], base_class=SGD, lr=0.1, shared_params=[trunk]
    )
    optimizer.backward([(trunk + head)[0], -2 * (trunk + head)[0] + trunk[1]])
    assert_close(head.grad, torch.tensor([-1.0, 0]))
    assert_close(trunk.grad, torch.tensor([0.2, 1.4]))


@pytest.mark.parametrize(
    "pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"]
)
def test_class_and_options_are_equal_after_pickling(pickler: Any) -> None:
    given = {"optimizer_class": HarmonizedFromParams, "optimizer_kwargs": OPTIONS}
    assert pickle.loads(pickler.dumps(given)) == given


def test_it_is_pickled_by_name_not_by_value() -> None:
    data = cloudpickle.dumps(HarmonizedFromParams)
    assert b"ghopt.from_params" in data
    assert len(data) < 100


@pytest.mark.parametrize("optimizer_class", [HarmonizedFromParams, HarmonizedAdamW])
def test_copies_go_on_as_the_original_does(
    optimizer_class: type[HarmonizedFromParams],
) -> None:
    model = models.make(models.NETWORKS[0], 3)
    options = OPTIONS if optimizer_class is HarmonizedFromParams else {}
    pair = model, optimizer_class(model.parameters(), lr=0.05, **options)
    trained(*pair)
    copies = [copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))]
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    expected = trained(*pair)
    for copied in copies:
        assert type(copied[1]) is optimizer_class
        assert_close(trained(*copied), expected, rtol=0, atol=0)


def test_apis_see_a_class_of_optimizers() -> None:
    assert issubclass(HarmonizedFromParams, Optimizer)
    assert isinstance(HarmonizedFromParams, type)


def test_an_api_without_options_takes_it_partially_applied() -> None:
    model = models.make(models.NETWORKS[0], 3)
    make = partial(HarmonizedFromParams, **OPTIONS)
    optimizer = pickle.loads(pickle.dumps(make))(model.parameters(), lr=0.05)
    assert_close(trained(model, optimizer), made_and_wrapped(), rtol=0, atol=0)


@pytest.mark.parametrize("given", ["AdamW", None, SGD(nn.Linear(2, 1).parameters())])
def test_a_base_that_is_no_class_is_refused(given: Any) -> None:
    params = nn.Linear(2, 1).parameters()
    with pytest.raises(
        TypeError, match="base_class must be a class of optimizers, got"
    ):
        HarmonizedFromParams(params, base_class=given)


def test_without_a_base_class_the_error_names_it() -> None:
    with pytest.raises(TypeError, match="base_class"):
        HarmonizedFromParams(nn.Linear(2, 1).parameters(), lr=0.1)  # type: ignore[call-arg]  # what is refused


def test_an_option_that_nobody_knows_is_refused_by_the_base() -> None:
    with pytest.raises(TypeError, match="wieghting"):
        HarmonizedFromParams(nn.Linear(2, 1).parameters(), **OPTIONS, wieghting=ghpp)


def test_a_harmonized_base_is_refused() -> None:
    base_class = partial(HarmonizedFromParams, base_class=SGD)
    with pytest.raises(TypeError, match="must not be harmonized already"):
        HarmonizedFromParams(nn.Linear(2, 1).parameters(), base_class=base_class)
