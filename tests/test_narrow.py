"""Devices without float64: the same results, and no float64 tensor there. Emulated."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import ghopt
from ghopt import HarmonizedOptimizer, Recorder, forms, geometry
from ghopt.gradients.narrow import quick_products
from tests.pretended import moved, pretended_device
from tests.rows import combine, gramian

RULES = [geometry.gh, geometry.ghpp]
OF_TWO = [geometry.ghpp_balanced, geometry.ghpp_printed]


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended_device() as where:
        yield where


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh())


def losses_of(model: nn.Module, inputs: Tensor, tasks: int) -> list[Tensor]:
    outputs = model(inputs)
    return [
        (outputs[:, k % 3] * (-1) ** k - k / tasks).square().mean() * (1 + k)
        for k in range(tasks)
    ]


Train = Callable[[nn.Module, Tensor], HarmonizedOptimizer]


def here_and_there(train: Train) -> tuple[HarmonizedOptimizer, HarmonizedOptimizer]:
    """Train on the CPU and on the pretended device, and compare the parameters."""
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    model = network()
    mine = train(model, inputs)
    with pretended_device() as device:
        other = moved(network())
        theirs = train(other, inputs.to(device))
        found = [parameter.cpu() for parameter in other.parameters()]
    for parameter, there in zip(model.parameters(), found, strict=True):
        assert_close(there, parameter.detach(), rtol=2e-6, atol=2e-7)
    return mine, theirs


def plain_training(
    model: nn.Module, inputs: Tensor, tasks: int = 3, **options: Any
) -> HarmonizedOptimizer:
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = HarmonizedOptimizer(base, **options)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, inputs, tasks))
        optimizer.step()
    return optimizer


class TestThePretendedDevice:
    """It refuses what a real one does: a test on it can fail."""

    def test_no_float64_is_made_there(self, device: torch.device) -> None:
        numbers = torch.ones(3).to(device)
        for make in (
            numbers.double,
            lambda: torch.zeros(2, dtype=torch.float64, device=device),
            lambda: numbers.new_zeros(2, dtype=torch.float64),
            lambda: numbers.sum(dtype=torch.float64),
            lambda: torch.ones(2, dtype=torch.float64).to(device),
            lambda: numbers.to("cpu", torch.float64),
        ):
            with pytest.raises(TypeError, match="no float64"):
                make()

    def test_tensors_of_two_places_do_not_mix(self, device: torch.device) -> None:
        with pytest.raises(RuntimeError, match="on the CPU and on"):
            torch.ones(3).to(device) + torch.ones(3)

    def test_it_is_found_out(
        self, device: torch.device, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        forms._can_add_float64.cache_clear()
        assert not forms.has_float64(device)
        assert forms.home_of_numbers(device) == torch.device("cpu")
        forms._can_add_float64.cache_clear()
        monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))
        assert forms.has_float64(torch.device("xpu"))
        forms._can_add_float64.cache_clear()


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("weighting", RULES)
def test_a_training_is_that_of_the_cpu(weighting: Any, tasks: int) -> None:
    train = partial(plain_training, tasks=tasks, weighting=weighting)
    mine, theirs = here_and_there(train)
    assert mine.last is not None
    assert theirs.last is not None
    assert theirs.last.gramian.device == torch.device("cpu")
    assert_close(theirs.last.weights, mine.last.weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighting", OF_TWO)
def test_so_is_one_with_a_rule_of_two_tasks(weighting: Any) -> None:
    here_and_there(partial(plain_training, tasks=2, weighting=weighting))


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_so_is_one_whose_step_is_projected(tasks: int) -> None:
    here_and_there(partial(plain_training, tasks=tasks, project_step=True))


@pytest.mark.parametrize(
    "options",
    [{"measure_every": 2}, {"weighting": partial(geometry.gh, protected=[1])}],
    ids=["measured every second step", "one task protected"],
)
def test_so_is_one_with_options(options: dict[str, Any]) -> None:
    here_and_there(partial(plain_training, **options))


def test_so_is_one_with_a_shared_trunk_and_micro_batches() -> None:
    def train(model: nn.Module, inputs: Tensor) -> HarmonizedOptimizer:
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        shared = [*model.parameters()][:2]
        optimizer = HarmonizedOptimizer(base, shared_params=shared)
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, inputs[:3], 3), accumulate_only=True)
            optimizer.backward(losses_of(model, inputs[3:], 3))
            optimizer.step()
        return optimizer

    here_and_there(train)


def test_so_is_one_with_a_closure() -> None:
    def train(model: nn.Module, inputs: Tensor) -> HarmonizedOptimizer:
        optimizer = HarmonizedOptimizer(torch.optim.LBFGS(model.parameters(), 0.1, 3))
        for _ in range(2):
            optimizer.step(lambda: losses_of(model, inputs, 2))
        return optimizer

    here_and_there(train)


def test_frozen_parameters_are_left_alone() -> None:
    def train(model: nn.Module, inputs: Tensor) -> HarmonizedOptimizer:
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = HarmonizedOptimizer(base)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        outside = torch.ones(()).to(inputs.device).requires_grad_()
        optimizer.backward([outside * 2, outside * 3])
        assert outside.grad is not None
        assert outside.grad.item() == 5
        optimizer.step()
        return optimizer

    here_and_there(train)


def test_what_is_recorded_is_that_of_the_cpu(device: torch.device) -> None:
    def recorded(model: nn.Module, inputs: Tensor) -> Any:
        rate = torch.tensor(0.1).to(inputs.device)
        base = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        optimizer = HarmonizedOptimizer(base)
        recorder = Recorder()
        recorder.attach(optimizer, layers=model, step=True)
        for _ in range(3):
            optimizer.step(losses=losses_of(model, inputs, 3))
        return recorder.flush()

    inputs = torch.randn(6, 4)
    mine = recorded(network(), inputs)
    theirs = recorded(moved(network()), inputs.to(device))
    assert theirs.steps.tolist() == mine.steps.tolist()
    assert_close(theirs.gramians, mine.gramians, rtol=1e-5, atol=1e-6)
    assert_close(theirs.rates, mine.rates)
    assert_close(theirs.step_slopes, mine.step_slopes, rtol=1e-4, atol=1e-6)


def test_functions_without_an_optimizer_work_too(device: torch.device) -> None:
    inputs = torch.randn(6, 4)
    here, there = network(), moved(network())
    mine = ghopt.harmonized_loss(losses_of(here, inputs, 3), here.parameters())
    given = losses_of(there, inputs.to(device), 3)
    assert_close(
        ghopt.harmonized_loss(given, there.parameters()).detach().cpu(), mine.detach()
    )
    found = ghopt.backward(given, there.parameters())
    assert found is not None
    assert_close(found.cosines, found.cosines.T)
    sum_of_losses = losses_of(there, inputs.to(device), 3)
    seen = ghopt.measure(sum_of_losses, there.parameters())
    assert seen.gramian.device == torch.device("cpu")


def draw_rows(draw: st.DrawFn) -> Tensor:
    """Draw float32 gradients, half of them nearly dependent, of any size."""
    seed = draw(st.integers(0, 2**16))
    tasks, size = draw(st.integers(1, 4)), draw(st.sampled_from([1, 700, 20_000]))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, size, generator=generator, dtype=torch.float64)
    if tasks > 1 and draw(st.booleans()):
        tilt = 10.0 ** -draw(st.integers(1, 7))
        rows[-1] = -rows[0] + tilt * rows[-1]
    exponents = draw(st.lists(st.integers(-12, 9), min_size=tasks, max_size=tasks))
    powers = torch.tensor([10.0**exponent for exponent in exponents])
    return (rows * powers[:, None]).float()


def literal(rows: Tensor) -> Tensor:
    """Inner products in float64: products of float32 numbers are exact there."""
    return rows.double() @ rows.double().T


def relative(found: Tensor, rows: Tensor) -> float:
    """Give the largest error of an upper triangle, in products of the norms."""
    expected = literal(rows)
    norms = expected.diagonal().sqrt().clamp(min=1e-300)
    return float(
        ((found.triu() - expected.triu()) / norms / norms[:, None]).abs().max()
    )


@pytest.mark.parametrize("size", [20_000, 70_001, 10**6])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_float32_products_over_short_blocks_are_within_1e_7(
    size: int, draw: Callable[..., Tensor]
) -> None:
    rows = draw(3, size, generator=torch.Generator().manual_seed(size))
    found = quick_products([dict(enumerate(rows))], len(rows))
    assert relative(found, rows) < 5e-8


@given(st.composite(draw_rows)())
def test_the_gramian_of_the_device_is_that_of_float64_where_in_doubt(
    rows: Tensor,
) -> None:
    with pretended_device() as device:
        found = gramian([[row.to(device)] for row in rows])
    assert relative(found, rows) < 1e-7
    cosines = geometry.cosines(literal(rows))
    if torch.linalg.eigvalsh(cosines)[0] < 0.09 and cosines.min() < -0.01:
        assert relative(found, rows) < 1e-14


@given(st.composite(draw_rows)())
def test_gradients_that_cancel_are_summed_in_float64(rows: Tensor) -> None:
    weights = torch.linspace(1, 2, len(rows), dtype=torch.float64)
    with pretended_device() as device:
        (update,) = combine([[row.clone().to(device)] for row in rows], weights)
        assert update is not None
        found = update.cpu()
    # Half a unit in the last place.
    assert_close(found.double(), weights @ rows.double(), rtol=2**-24, atol=1e-45)


@pytest.mark.parametrize("last", [False, True])
def test_only_products_with_the_last_task_are_taken_if_those_are_wanted(
    last: bool,
) -> None:
    rows = torch.randn(3, 1000)
    found = quick_products([dict(enumerate(rows))], 3, last=last)
    assert bool(found[0, 1] == 0) is last
    assert_close(found[:, -1], literal(rows)[:, -1], rtol=1e-6, atol=1e-4)


def test_a_task_without_a_gradient_counts_as_zero(device: torch.device) -> None:
    one, two = torch.randn(5), torch.randn(700)
    found = gramian([[one.to(device), None], [None, two.to(device)]])
    assert_close(found, torch.tensor([one @ one, two @ two]).double().diag())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_other_dtypes_work(dtype: torch.dtype, device: torch.device) -> None:
    rows = [torch.randn(40, dtype=torch.complex64) for _ in range(2)]
    here = [[row.to(dtype) if dtype.is_complex else row.real.to(dtype)] for row in rows]
    there = [[row[0].clone().to(device)] for row in here]
    weights = torch.tensor([2.0, -0.5], dtype=torch.float64)
    assert_close(gramian(there), gramian(here), rtol=1e-6, atol=1e-5)
    (found,), (expected,) = combine(there, weights), combine(here, weights)
    assert found is not None
    assert expected is not None
    assert_close(found.cpu(), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_not_hidden(
    value: float, device: torch.device
) -> None:
    rows = torch.randn(2, 9)
    rows[0, 3] = value
    found = gramian([[row.to(device)] for row in rows])
    assert not found[0].isfinite().any()
    assert not geometry.gh(found).isfinite().any()


def test_sparse_gradients_are_multiplied_on_the_cpu() -> None:
    # The pretended device has no sparse tensors: here the CPU stands in for it.
    dense = torch.randn(2, 6, 3)
    dense[:, ::2] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "_WITH_FLOAT64", ())
        patch.setattr(forms, "_can_add_float64", lambda _: False)
        found = gramian([[row.to_sparse(1)] for row in dense])
    assert_close(found, literal(dense.flatten(1)))


@pytest.mark.slow
@pytest.mark.parametrize("tilt", [1.0, 1e-2, 1e-3])
def test_ten_million_elements_near_opposite(tilt: float) -> None:
    """Within 1e-6 of float64, at 1e7 elements, near-opposite pairs included."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 10**7, generator=generator)
    rows = torch.stack([one, tilt * other - one])
    expected = literal(rows)
    with pretended_device() as device:
        found = gramian([[row.to(device)] for row in rows])
        weights = geometry.gh(found)
        (update,) = combine([[row.clone().to(device)] for row in rows], weights)
        assert update is not None
        update = update.cpu()
    assert relative(found, rows) < 1e-7
    assert_close(weights, geometry.gh(expected), rtol=1e-6, atol=0)
    sure = geometry.gh(expected) @ rows.double()
    assert float((update.double() - sure).norm() / sure.norm()) < 1e-6
