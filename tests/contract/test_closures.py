"""Closures: handed to the base, or their losses harmonized."""

import statistics
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.testing import assert_close

from benchmarks.mtl.problem import Training
from benchmarks.mtl.problems import pinn
from ghopt import HarmonizedOptimizer
from tests import bases, models
from tests.bases import BASES, SAM, Base
from tests.literal import grads, literal_gradients, literal_update, weights_of
from tests.models import Tasks

EVALUATING: dict[str, Base] = {
    "LBFGS": bases.LBFGS,
    "LBFGS strong_wolfe": partial(LBFGS, line_search_fn="strong_wolfe", max_iter=5),
    "SAM": bases.sam,
}
ALL = {**BASES, **EVALUATING}
all_bases = pytest.mark.parametrize("base", ALL.values(), ids=[*ALL])


class Pair(NamedTuple):
    """Two losses."""

    align: Tensor
    classify: Tensor


FORMS: dict[str, Callable[[list[Tensor]], Any]] = {
    "list": list,
    "tuple": tuple,
    "named tuple": lambda losses: Pair(*losses),
    "1-D tensor": torch.stack,
    "mapping": lambda losses: {"align": losses[0], "classify": losses[1]},
    "ordered mapping": lambda losses: OrderedDict(zip("ab", losses, strict=True)),
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=[*FORMS])


def network(tasks: int = 2) -> Tasks:
    return models.make(models.heads_on_a_trunk, tasks)


def wrap(model: nn.Module) -> HarmonizedOptimizer:
    return HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))


def total(losses: list[Tensor]) -> Tensor:
    return torch.stack(losses).sum()


def plain_closure(
    model: Tasks, optimizer: Optimizer, data: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """Give the closure of the documentation of torch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total(model(*data))
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return loss.detach()  # LBFGS makes it a number: a warning, if it needs grad

    return closure


def explicit_closure(
    model: Tasks, optimizer: HarmonizedOptimizer, data: tuple[Tensor, Tensor]
) -> Callable[[], Tensor]:
    """Give a closure that harmonizes by itself."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = model(*data)
        optimizer.backward(losses)
        return total(losses).detach()

    return closure


def needs_gradients(optimizer: HarmonizedOptimizer) -> bool:
    """Say whether ``step`` expects gradients in ``.grad`` before the closure."""
    return isinstance(optimizer.base_optimizer, SAM)


# Passed through


@all_bases
def test_a_closure_of_one_task_steps_as_the_base_does(base: Base) -> None:
    expected, actual = network(1), network(1)
    plain = base(expected.parameters())
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    for seed in range(4):
        closure = plain_closure(expected, plain, models.batch(1, seed))
        ours = explicit_closure(actual, optimizer, models.batch(1, seed))
        if needs_gradients(optimizer):
            closure()
            ours()
        assert_close(optimizer.step(ours), plain.step(closure), rtol=0, atol=0)  # type: ignore[arg-type]  # tensors may stand for numbers
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


SCALARS = [torch.tensor(2.0), torch.tensor(2.0, requires_grad=True)]
VALUES = [0.5, 3, *SCALARS, torch.ones(1, 1), None, "text"]


@pytest.mark.parametrize("base", BASES.values(), ids=[*BASES])
def test_the_value_of_a_closure_comes_back_untouched(base: Base) -> None:
    optimizer = HarmonizedOptimizer(base(network().parameters()))
    for value in VALUES:
        assert optimizer.step(partial(give, value)) is value
        assert optimizer.step(closure=partial(give, value)) is value
    assert optimizer.last is None


def give(value: Any) -> Any:
    return value


@pytest.mark.parametrize("base", BASES.values(), ids=[*BASES])
def test_step_without_a_closure_returns_none(base: Base) -> None:
    optimizer = HarmonizedOptimizer(base(network().parameters()))
    assert optimizer.step() is None
    assert optimizer.step(None) is None
    assert optimizer.step(closure=None) is None


@all_bases
def test_a_closure_is_called_as_often_as_by_the_base(base: Base) -> None:
    counts = []
    for wrapped in (False, True):
        model, calls = network(1), [0]
        plain = base(model.parameters())
        optimizer = HarmonizedOptimizer(plain) if wrapped else plain
        closure = (
            explicit_closure(model, optimizer, models.batch(1))
            if isinstance(optimizer, HarmonizedOptimizer)
            else plain_closure(model, optimizer, models.batch(1))
        )

        def counted(
            closure: Callable[[], Tensor] = closure, calls: list[int] = calls
        ) -> Tensor:
            calls[0] += 1
            return closure()

        closure()
        for _ in range(3):
            optimizer.step(counted)  # type: ignore[arg-type]  # a tensor for a number
        counts.append(calls[0])
    assert counts[0] == counts[1] >= 3


@all_bases
def test_a_closure_runs_with_grad_inside_no_grad(base: Base) -> None:
    expected, actual = network(), network()
    for model, outside in ((expected, torch.enable_grad), (actual, torch.no_grad)):
        optimizer = HarmonizedOptimizer(base(model.parameters()))
        closure = explicit_closure(model, optimizer, models.batch(2))
        closure()
        with outside():
            optimizer.step(closure)
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


class LeavesGradOff(SGD):
    """An optimizer whose step is without grad, and so are its closures."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        super().step()
        return loss


@pytest.mark.parametrize("returns", ["losses", "total"])
def test_a_closure_runs_with_grad_in_a_base_that_does_not_see_to_it(
    returns: str,
) -> None:
    expected, actual = network(), network()
    wrap(expected).step(losses=expected(*models.batch(2)))
    optimizer = HarmonizedOptimizer(LeavesGradOff(actual.parameters(), lr=0.1))
    if returns == "losses":
        optimizer.step(lambda: actual(*models.batch(2)))
    else:
        optimizer.step(explicit_closure(actual, optimizer, models.batch(2)))
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


class Failure(Exception):
    """Raised in a closure."""


@all_bases
def test_an_exception_in_a_closure_comes_out_and_changes_nothing(base: Base) -> None:
    model = network()
    optimizer = HarmonizedOptimizer(base(model.parameters()))
    if not needs_gradients(optimizer):  # SAM, bare or not, stays uphill
        before = weights_of(model)

    def closure() -> float:
        raise Failure

    with pytest.raises(Failure):
        optimizer.step(closure)
    if not needs_gradients(optimizer):
        assert_close(weights_of(model), before, rtol=0, atol=0)


# A closure that returns the losses


@all_bases
@pytest.mark.parametrize("form", [FORMS["list"], FORMS["mapping"]])
def test_a_closure_that_returns_the_losses_is_harmonized(
    base: Base, form: Callable[[list[Tensor]], Any]
) -> None:
    expected, actual = network(), network()
    literal, optimizer = (
        HarmonizedOptimizer(base(model.parameters())) for model in (expected, actual)
    )
    for seed in range(3):
        data = models.batch(2, seed)
        explicit = explicit_closure(expected, literal, data)
        if needs_gradients(optimizer):
            explicit()
            optimizer.zero_grad()
            optimizer.backward(form(actual(*data)))
        value = literal.step(explicit)
        result: Any = optimizer.step(lambda data=data: form(actual(*data)))  # type: ignore[misc]  # inferred
        assert isinstance(result, Tensor) or type(result) is type(value)
        assert float(result) == float(value)  # type: ignore[arg-type]  # a number
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)
    assert optimizer.last is not None
    assert len(optimizer.last.names) == 2


@forms
def test_the_gradient_of_returned_losses_is_the_update_of_the_paper(
    form: Callable[[list[Tensor]], Any],
) -> None:
    model = network()
    optimizer = wrap(model)
    losses = model(*models.batch(2))
    jacobian = literal_gradients(losses, list(model.parameters()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # stale: the wrapper clears it
    optimizer.backward(losses, retain_graph=True, accumulate_only=True)  # likewise
    optimizer.step(lambda: form(losses))
    actual = [grad.reshape(-1) for grad in grads(model) if grad is not None]
    assert_close(torch.cat(actual), literal_update(jacobian))
    assert jacobian[0] @ jacobian[1] < 0


@forms
def test_the_base_is_given_the_weighted_sum_of_the_losses(
    form: Callable[[list[Tensor]], Any],
) -> None:
    model = network()
    optimizer = wrap(model)
    losses = model(*models.batch(2))
    value: Any = optimizer.step(lambda: form(losses))
    assert value.shape == ()
    assert not value.requires_grad
    assert optimizer.last is not None
    weighted = optimizer.last.weights @ torch.stack(losses)
    assert_close(value, weighted.detach(), rtol=1e-15, atol=0)
    assert value != total(losses)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_value_of_a_closure_that_harmonizes_is_weighted_too(
    micro_batches: int,
) -> None:
    model = network()
    optimizer = wrap(model)
    data = [models.batch(2, seed) for seed in range(micro_batches)]

    def closure() -> float:
        optimizer.zero_grad()
        for left, batch in enumerate(reversed(data)):
            last = left == micro_batches - 1
            optimizer.backward(model(*batch), accumulate_only=not last)
        return -1.0

    losses = sum(torch.stack(model(*batch)).detach() for batch in data)
    value: Any = optimizer.step(closure)
    assert optimizer.last is not None
    assert_close(value, optimizer.last.weights @ losses, rtol=1e-14, atol=0)


def test_the_values_of_several_calls_in_one_evaluation_add_up() -> None:
    model = network(4)
    optimizer = wrap(model)
    weights: dict[str, Tensor] = {}
    optimizer.register_harmonize_hook(
        lambda found, _: weights.update(zip(found.names, found.weights, strict=True))
    )
    data = models.batch(4)

    def closure() -> float:
        optimizer.zero_grad()
        a, b, c, d = model(*data)
        optimizer.backward({"a": a, "b": b}, retain_graph=True)
        optimizer.backward({"c": c, "d": d})
        return -1.0

    losses = dict(zip("abcd", model(*data), strict=True))
    value: Any = optimizer.step(closure)
    expected = torch.stack([weights[name] * losses[name] for name in "abcd"]).sum()
    assert_close(value, expected.detach(), rtol=1e-14, atol=0)


def test_the_values_of_micro_batches_are_told_apart_by_name() -> None:
    model = network()
    optimizer = wrap(model)
    data = models.batch(2)

    def closure() -> float:
        optimizer.zero_grad()
        a, b = model(*data)
        optimizer.backward({"a": a, "b": b}, retain_graph=True, accumulate_only=True)
        optimizer.backward({"b": b, "a": a})
        return -1.0

    a, b = (loss.detach() for loss in model(*data))
    value: Any = optimizer.step(closure)
    assert optimizer.last is not None
    assert optimizer.last.names == ("a", "b")
    assert_close(value, 2 * (optimizer.last.weights @ torch.stack([a, b])))


def test_an_accumulation_of_tasks_is_ended_as_one_though_weights_are_held() -> None:
    """The weights of a backward before it serve evaluations, not half a batch."""
    made = []
    for late in (False, True):
        model = network()
        optimizer = wrap(model)
        optimizer.backward(model(*models.batch(2, 7)))
        model.zero_grad()
        optimizer.backward(model(*models.batch(2, 0)), accumulate_only=True)
        if late:
            optimizer.step(explicit(model, optimizer))
        else:
            optimizer.backward(model(*models.batch(2, 1)))
            optimizer.step()
        made.append(weights_of(model))
    assert_close(made[1], made[0], rtol=0, atol=0)


def explicit(model: Tasks, optimizer: HarmonizedOptimizer) -> Callable[[], float]:
    def closure() -> float:
        optimizer.backward(model(*models.batch(2, 1)))
        return 0.0

    return closure


def test_a_closure_may_only_accumulate() -> None:
    made = []
    for late in (False, True):
        model = network()
        optimizer = wrap(model)

        def closure(
            late: bool = late,
            model: Tasks = model,
            optimizer: HarmonizedOptimizer = optimizer,
        ) -> Any:
            optimizer.zero_grad()
            losses = model(*models.batch(2))
            optimizer.backward(losses, accumulate_only=late)
            return losses

        made.append((optimizer.step(closure), weights_of(model)))
    assert_close(made[1], made[0], rtol=0, atol=0)


# Weights are held to the end of the step


class Evaluating(SGD):
    """Evaluates three times, moving in between, and notes what it is given."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.seen: list[tuple[dict[str, Tensor], Tensor, Tensor]] = []
        self.model: Tasks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        assert closure is not None
        for _ in range(3):
            with torch.enable_grad():
                value = closure()
            gradient = torch.cat(
                [g.reshape(-1).clone() for g in grads(self.model) if g is not None]
            )
            self.seen.append((weights_of(self.model), torch.as_tensor(value), gradient))
            super().step()
        return value


def evaluating() -> tuple[Tasks, HarmonizedOptimizer, Evaluating]:
    model = network()
    base = Evaluating(model.parameters())
    base.model = model
    return model, HarmonizedOptimizer(base), base


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("returns", ["losses", "total"])
def test_all_evaluations_of_a_step_are_of_one_function(
    returns: str, before: bool
) -> None:
    model, optimizer, base = evaluating()
    measured: list[Tensor] = []
    optimizer.register_harmonize_hook(lambda found, _: measured.append(found.weights))
    for step in range(2):
        data = models.batch(2, step)
        base.seen.clear()
        if before:
            optimizer.zero_grad()
            optimizer.backward(model(*models.batch(2, 7 + step)))
        if returns == "losses":
            optimizer.step(lambda data=data: model(*data))  # type: ignore[misc]  # inferred
        else:
            optimizer.step(explicit_closure(model, optimizer, data))
        assert len(measured) == step + 1
        weights = measured[-1]
        assert (weights != 1).any()
        other = network()
        for state, value, gradient in base.seen:
            other.load_state_dict(state)
            function = weights @ torch.stack(other(*data))
            expected = torch.autograd.grad(function, [*other.parameters()])
            assert_close(value, function.detach(), rtol=1e-12, atol=0)
            flat = torch.cat([g.reshape(-1) for g in expected])
            assert_close(gradient, flat, rtol=1e-10, atol=1e-12)
    assert not torch.equal(measured[0], measured[1])


def test_evaluations_of_one_step_count_as_one() -> None:
    model, _, base = evaluating()
    optimizer = HarmonizedOptimizer(base, measure_every=2)
    measured = []
    optimizer.register_harmonize_hook(lambda found, _: measured.append(found))
    for step in range(4):
        optimizer.step(lambda step=step: model(*models.batch(2, step)))  # type: ignore[misc]  # inferred
    assert len(measured) == 2


def test_other_tasks_in_a_later_evaluation_are_measured_anew() -> None:
    model, optimizer, _ = evaluating()
    measured: list[tuple[str, ...]] = []
    optimizer.register_harmonize_hook(lambda found, _: measured.append(found.names))
    names = iter(["ab", "ab", "cd"])
    optimizer.step(lambda: dict(zip(next(names), model(*models.batch(2)), strict=True)))
    assert measured == [("a", "b"), ("c", "d")]


def test_clearing_the_gradients_before_a_step_forgets_the_weights() -> None:
    model, optimizer, base = evaluating()
    optimizer.backward(model(*models.batch(2, 7)))
    first = optimizer.last
    optimizer.zero_grad()
    optimizer.step(lambda: model(*models.batch(2)))
    assert optimizer.last is not first
    assert len(base.seen) == 3


def test_with_shared_parameters_there_is_no_function_to_evaluate_twice() -> None:
    model = network()
    base = Evaluating(model.parameters())
    base.model = model
    optimizer = HarmonizedOptimizer(base, shared_params=model.trunk.parameters())
    with pytest.raises(RuntimeError, match=r"must harmonize once.*Leave them out"):
        optimizer.step(lambda: model(*models.batch(2)))
    before = weights_of(model)
    lbfgs = HarmonizedOptimizer(
        LBFGS(model.parameters()), shared_params=model.trunk.parameters()
    )
    with pytest.raises(ValueError, match="closure must be None for L-BFGS"):
        lbfgs.step(lambda: model(*models.batch(2)))
    assert_close(weights_of(model), before, rtol=0, atol=0)
    # Once is all that most bases ask for.
    once = HarmonizedOptimizer(
        SGD(model.parameters(), lr=0.1), shared_params=model.trunk.parameters()
    )
    once.step(lambda: model(*models.batch(2)))
    assert once.last is not None


# Any iterable of losses


@pytest.mark.parametrize(
    "form",
    [
        lambda losses: dict(enumerate(losses)).values(),
        lambda losses: (loss for loss in losses),
        lambda losses: map(torch.squeeze, losses),
        lambda losses: {"a": losses[0], "b": losses[1]}.values(),
        iter,
    ],
    ids=["values", "generator", "map", "values by name", "iterator"],
)
def test_a_closure_may_return_any_iterable_of_losses(
    form: Callable[[list[Tensor]], Any],
) -> None:
    expected, actual = network(), network()
    wrap(expected).step(losses=expected(*models.batch(2)))
    wrap(actual).step(lambda: form(actual(*models.batch(2))))
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def test_one_loss_of_one_element_is_harmonized_if_nobody_has_run_its_pass() -> None:
    expected, actual = network(1), network(1)
    literal, optimizer = wrap(expected), wrap(actual)
    for seed in range(3):  # also on top of the gradients of the step before
        literal.step(losses=expected(*models.batch(1, seed)))
        optimizer.step(lambda seed=seed: actual(*models.batch(1, seed))[0].view(1))  # type: ignore[misc]  # inferred
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def test_one_loss_of_one_element_is_harmonized_where_the_closure_clears() -> None:
    """Gradients that are gone are no sign of a backward pass."""
    model = network(1)
    optimizer = wrap(model)

    def closure() -> Any:
        optimizer.zero_grad()
        return model(*models.batch(1))[0].view(1)

    for _ in range(3):
        before = weights_of(model)
        optimizer.step(closure)
        assert any(not before[name].equal(p) for name, p in weights_of(model).items())


def test_an_array_of_no_dimension_is_a_number() -> None:
    value: Any = np.array(1.5)
    assert wrap(network()).step(lambda: value) is value


def test_a_cleared_gradient_is_no_part_of_the_value() -> None:
    """A probe before the pass that counts."""
    model = network()
    optimizer = wrap(model)

    def closure() -> float:
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward(model(*models.batch(2)))
        return 0.0

    losses = torch.stack(model(*models.batch(2))).detach()
    value: Any = optimizer.step(closure)
    assert optimizer.last is not None
    assert_close(value, optimizer.last.weights @ losses)


def test_what_a_closure_clears_does_not_live_on() -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.step(losses=model(*models.batch(2)))
    old = [weakref.ref(grad) for grad in grads(model) if grad is not None]

    def closure() -> Any:
        optimizer.zero_grad()
        assert all(reference() is None for reference in old)
        return model(*models.batch(2))

    optimizer.step(closure)


def test_weights_that_were_not_finite_are_not_held() -> None:
    model, optimizer, base = evaluating()
    a, b = model(*models.batch(2))
    optimizer.backward([torch.nan * a, b])
    model.zero_grad()  # a step that is skipped
    optimizer.step(lambda: model(*models.batch(2)))
    assert optimizer.last is not None
    assert optimizer.last.weights.isfinite().all()
    assert len(base.seen) == 3


@pytest.mark.parametrize("evaluates", ["once", "often"])
def test_all_parameters_may_be_shared(evaluates: str) -> None:
    """Then there is a function: all of them receive the weighted sum."""
    model = network()
    base = Evaluating(model.parameters())
    base.model = model
    lbfgs = LBFGS(model.parameters())
    optimizer = HarmonizedOptimizer(
        base if evaluates == "often" else lbfgs, shared_params=model.parameters()
    )
    optimizer.step(lambda: model(*models.batch(2)))
    assert optimizer.last is not None


@pytest.mark.parametrize("clears", [True, False])
def test_one_element_after_a_backward_pass_is_a_number(clears: bool) -> None:
    model = network(1)
    optimizer = wrap(model)
    optimizer.backward(model(*models.batch(1)))  # or step would warn

    def closure() -> Any:
        if clears:
            model.zero_grad()
        (loss,) = model(*models.batch(1))
        loss.backward()
        return loss.view(1)

    value: Any = optimizer.step(closure)
    assert value.shape == (1,)
    number: Any = torch.ones(1)
    assert optimizer.step(lambda: number) is number


def test_losses_of_one_element_several_dtypes_and_without_grad_add_up() -> None:
    model = network()
    a, b = model(*models.batch(2))
    optimizer = wrap(model)
    value: Any = optimizer.step(lambda: [a.view(1, 1), b.float(), torch.ones(1)])
    assert value.shape == ()
    assert optimizer.last is not None
    one, two, _ = optimizer.last.weights
    assert_close(value.double(), (one * a + two * b + 1).detach(), rtol=1e-6, atol=0)
    assert len(optimizer.last.names) == 3


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ([], ValueError, "losses must hold at least one loss"),
        ({}, ValueError, "losses must hold at least one loss"),
        ([1.0, 2.0], TypeError, "losses.*'0'.* must be a tensor, got .*float"),
        ((torch.ones(2),), ValueError, r"losses.*'0'.* must be a real scalar"),
        ([torch.ones(())], ValueError, "losses must require grad"),
        (torch.ones(2), ValueError, "losses must require grad"),
        (iter([]), ValueError, "losses must hold at least one loss"),
    ],
)
def test_bad_losses_of_a_closure_are_named_and_change_nothing(
    returned: Any, error: type[Exception], message: str
) -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.backward(model(*models.batch(2)))
    before = (
        weights_of(model),
        [grad.clone() for grad in grads(model) if grad is not None],
    )
    with pytest.raises(error, match=message):
        optimizer.step(lambda: returned)
    assert_close((weights_of(model), grads(model)), before, rtol=0, atol=0)


def test_losses_that_were_used_already_are_refused_by_autograd() -> None:
    model = network()
    optimizer = wrap(model)
    losses = model(*models.batch(2))

    def closure() -> Any:
        optimizer.backward(losses)
        return losses

    # The closure has harmonized: what it returns is left alone.
    assert isinstance(optimizer.step(closure), Tensor)
    used = "graph of these losses is gone|modified by an inplace operation"
    with pytest.raises(RuntimeError, match=used):
        optimizer.step(closure)


def test_a_step_hook_sees_the_closure_that_was_given() -> None:
    model = network()
    optimizer = wrap(model)
    seen: list[object] = []
    optimizer.register_step_pre_hook(lambda _, args, __: seen.extend(args[1:]))

    def closure() -> Any:
        return model(*models.batch(2))

    optimizer.step(closure)
    assert seen == [closure]


# LBFGS


def least_squares(seed: int = 0) -> Callable[[nn.Linear], list[Tensor]]:
    """Give a linear problem of two tasks that ask for different outputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(32, 4, dtype=torch.float64, generator=generator)
    targets = torch.randn(2, 32, dtype=torch.float64, generator=generator)

    def losses(model: nn.Linear) -> list[Tensor]:
        outputs = model(inputs)[:, 0]
        return [(outputs - target).square().mean() for target in targets]

    return losses


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("returns", ["losses", "total"])
def test_lbfgs_brings_the_sum_as_low_as_plain_lbfgs(
    line_search_fn: str | None, returns: str
) -> None:
    reached = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model, losses = nn.Linear(4, 1).double(), least_squares()
        base = LBFGS(
            model.parameters(), lr=0.5, max_iter=4, line_search_fn=line_search_fn
        )
        optimizer = HarmonizedOptimizer(base) if wrapped else base
        start = total(losses(model)).item()

        def closure(
            model: nn.Linear = model,
            losses: Callable[[nn.Linear], list[Tensor]] = losses,
            optimizer: Optimizer = optimizer,
        ) -> Any:
            optimizer.zero_grad()
            parts = losses(model)
            if not isinstance(optimizer, HarmonizedOptimizer):
                total(parts).backward()  # type: ignore[no-untyped-call]  # torch's
            elif returns == "losses":
                return parts
            else:
                optimizer.backward(parts)
            return total(parts).detach()

        for _ in range(6):
            optimizer.step(closure)
        reached.append(total(losses(model)).item())
    # Opposite gradients stop it, which is all along the Pareto front and not only at the
    # minimum of the sum: so nearly as low.
    assert start - reached[1] > 0.95 * (start - reached[0]) > 0.1


def train_pinn(
    start: Callable[[int], Training], seed: int, steps: int, harmonized: bool
) -> float:
    """Train a physics-informed network with L-BFGS; give the plain sum of its losses."""
    torch.set_default_dtype(torch.float64)
    try:
        training = start(seed)
    finally:
        torch.set_default_dtype(torch.float32)
    batch = tuple(points.double() for points in next(training.batches))
    base = LBFGS(training.model.parameters(), line_search_fn="strong_wolfe")
    optimizer = HarmonizedOptimizer(base)
    conflicts: list[bool] = []
    optimizer.register_harmonize_hook(
        lambda found, _: conflicts.append(bool((found.gramian < 0).any()))
    )

    def closure() -> Any:
        base.zero_grad()
        loss = total([*training.losses(batch).values()])
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        return loss.detach()

    for _ in range(steps):
        if harmonized:
            optimizer.step(lambda: training.losses(batch))
        else:
            base.step(closure)  # type: ignore[no-untyped-call]  # torch's
    assert any(conflicts) == harmonized
    return total([*training.losses(batch).values()]).item()


@pytest.mark.parametrize(
    ("start", "steps"),
    [
        (pinn.start_poisson, 10),
        pytest.param(pinn.start_heat, 20, marks=pytest.mark.slow),
    ],
)
def test_lbfgs_with_a_line_search_gets_as_far_on_pinns_in_conflict(
    start: Callable[[int], Training], steps: int
) -> None:
    """Where weights change between steps its history is kept: to drop it costs tenfold."""
    plain, ours = (
        statistics.median(
            train_pinn(start, seed, steps, harmonized) for seed in range(3)
        )
        for harmonized in (False, True)
    )
    assert ours <= 3 * plain


# SAM


def literal_sam(tasks: int, steps: int, *, held: bool) -> dict[str, Tensor]:
    """Train with SAM around SGD on the update of the paper.

    Args:
        tasks: number of tasks.
        steps: number of steps.
        held: take the weights of the first gradient for the second one, too.
    """
    model = network(tasks)
    parameters = list(model.parameters())

    def jacobian(seed: int) -> Tensor:
        losses = model(*models.batch(tasks, seed))
        return literal_gradients(losses, parameters)

    def move(by: Tensor) -> None:
        parts = torch.split(by, [p.numel() for p in parameters])
        with torch.no_grad():
            for p, part in zip(parameters, parts, strict=True):
                p.add_(part.view_as(p))

    momentum = torch.zeros(())
    for seed in range(steps):
        weights = literal_weights(jacobian(seed))
        gradient = weights @ jacobian(seed)
        uphill = 0.05 * gradient / gradient.norm()
        move(uphill)
        weights = weights if held else literal_weights(jacobian(seed))
        momentum = 0.9 * momentum + weights @ jacobian(seed)
        move(-uphill - 0.05 * momentum)
    return weights_of(model)


def literal_weights(jacobian: Tensor) -> Tensor:
    """Give the weights of the update of the paper."""
    rows = jacobian.numpy()
    multipliers = [nnls(rows.T, -row)[0] for row in rows]
    return torch.from_numpy(1 + np.sum(multipliers, axis=0))


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("returns", ["losses", "total"])
def test_sam_in_the_wrapper_holds_the_weights_of_its_first_gradient(
    tasks: int, returns: str
) -> None:
    model = network(tasks)
    optimizer = HarmonizedOptimizer(bases.sam(model.parameters()))
    for seed in range(5):
        data = models.batch(tasks, seed)
        optimizer.zero_grad()
        optimizer.backward(model(*data))
        if returns == "losses":
            optimizer.step(lambda data=data: model(*data))  # type: ignore[misc]  # inferred
        else:
            optimizer.step(explicit_closure(model, optimizer, data))
    assert_close(
        weights_of(model), literal_sam(tasks, 5, held=True), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("tasks", [2, 3])
def test_sam_around_the_wrapper_takes_two_calls(tasks: int) -> None:
    model = network(tasks)

    def harmonized(groups: list[dict[str, Any]]) -> HarmonizedOptimizer:
        return HarmonizedOptimizer(SGD(groups, lr=0.05, momentum=0.9))

    sam = SAM(model.parameters(), harmonized)
    optimizer = sam.base_optimizer
    assert isinstance(optimizer, HarmonizedOptimizer)
    for seed in range(5):
        data = models.batch(tasks, seed)
        optimizer.zero_grad()
        optimizer.backward(model(*data))
        sam.first_step()
        optimizer.backward(model(*data))
        sam.second_step()
    assert_close(
        weights_of(model), literal_sam(tasks, 5, held=False), rtol=1e-10, atol=1e-10
    )


def test_sam_around_the_wrapper_takes_a_closure_that_harmonizes() -> None:
    model = network()
    sam = SAM(
        model.parameters(),
        lambda groups: HarmonizedOptimizer(SGD(groups, lr=0.05, momentum=0.9)),
    )
    optimizer = sam.base_optimizer
    assert isinstance(optimizer, HarmonizedOptimizer)
    for seed in range(5):
        closure = explicit_closure(model, optimizer, models.batch(2, seed))
        closure()
        sam.step(closure)  # type: ignore[arg-type]  # a tensor for a number
    assert_close(
        weights_of(model), literal_sam(2, 5, held=False), rtol=1e-10, atol=1e-10
    )
