"""Mixed precision: loss scaling, autocast, and parameters of several dtypes."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, gh, ghpp, ghpp_balanced, ghpp_printed
from ghopt.geometry import Weighting
from ghopt.losses import Losses
from tests import models
from tests.bases import BASES, LBFGS, Base, SparseAdam, every_base
from tests.literal import grads, literal_gradients, literal_update, weights_of
from tests.models import Tasks

Scale = Callable[[GradScaler, list[Tensor]], Any]

SCALED: dict[str, Scale] = {
    "list": lambda scaler, losses: scaler.scale(losses),
    "tuple": lambda scaler, losses: scaler.scale(tuple(losses)),
    "1-D tensor": lambda scaler, losses: scaler.scale(torch.stack(losses)),
    "iterator": lambda scaler, losses: scaler.scale(iter(losses)),
    "mapping": lambda scaler, losses: {
        f"task {index}": scaler.scale(loss) for index, loss in enumerate(losses)
    },
}
NOT_FINITE = [float("inf"), float("-inf"), float("nan")]


def new_scaler(growth_interval: int = 2) -> GradScaler:
    return GradScaler("cpu", init_scale=2.0**12, growth_interval=growth_interval)


def network(tasks: int = 3) -> Tasks:
    return models.make(models.heads_on_a_trunk, tasks)


def scaled_step(
    optimizer: HarmonizedOptimizer,
    scaler: GradScaler,
    losses: Any,
    clip: float | None = None,
    *,
    unscale: bool = True,
) -> None:
    """Run one iteration as the documentation of torch has it."""
    optimizer.zero_grad()
    optimizer.backward(losses)
    if unscale:
        scaler.unscale_(optimizer)
    if clip is not None:
        clip_grad_norm_(parameters_of(optimizer), clip)
    scaler.step(optimizer)
    scaler.update()


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def plain_step(
    optimizer: HarmonizedOptimizer, losses: Losses, clip: float | None = None
) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses)
    if clip is not None:
        clip_grad_norm_(parameters_of(optimizer), clip)
    optimizer.step()


# Loss scaling

# The scale is a power of two, so scaling and unscaling round nothing: every comparison
# with the unscaled run can be exact.


@every_base
@pytest.mark.parametrize("form", [*SCALED])
def test_clipped_training_on_scaled_losses_equals_unscaled_training(
    base: Base, form: str
) -> None:
    expected, actual = network(), network()
    plain = HarmonizedOptimizer(base(expected.parameters()))
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    scaler = new_scaler()
    for seed in range(3):
        data = models.batch(3, seed)
        unscaled = expected(*data)
        # As one tensor: its graph leads to all tasks, and rounds otherwise.
        plain_step(
            plain, torch.stack(unscaled) if form == "1-D tensor" else unscaled, clip=0.5
        )
        losses = SCALED[form](scaler, actual(*data))
        scaled_step(optimizer, scaler, losses, clip=0.5)
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)
    assert scaler.get_scale() == 2.0**13  # it grew once


@every_base
def test_step_unscales_by_itself_where_nobody_did(base: Base) -> None:
    expected, actual = network(), network()
    plain = HarmonizedOptimizer(base(expected.parameters()))
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    scaler = new_scaler()
    for seed in range(3):
        data = models.batch(3, seed)
        plain_step(plain, expected(*data))
        losses = scaler.scale(actual(*data))
        scaled_step(optimizer, scaler, losses, unscale=False)
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def test_a_disabled_scaler_changes_nothing() -> None:
    expected, actual = network(), network()
    plain_step(wrap(expected), expected(*models.batch(3)))
    scaler = GradScaler("cpu", enabled=False)
    scaled_step(wrap(actual), scaler, scaler.scale(actual(*models.batch(3))))
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def wrap(model: nn.Module, **kwargs: Any) -> HarmonizedOptimizer:
    return HarmonizedOptimizer(SGD(model.parameters(), lr=0.1, fused=True), **kwargs)


def test_a_fused_base_does_not_show_that_it_can_unscale() -> None:
    optimizer = wrap(network())
    assert optimizer.base_optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]  # torch's
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_sparse_gradients_are_unscaled() -> None:
    tables = [nn.Embedding(8, 4, sparse=True).double() for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    expected, actual = (
        HarmonizedOptimizer(SparseAdam(table.parameters())) for table in tables
    )
    scaler = new_scaler()
    for _ in range(3):
        first, second = (table(torch.tensor([0, 1, 1, 5])) for table in tables)
        plain_step(expected, [first.sum(), -first[:2].square().sum()])
        losses = scaler.scale([second.sum(), -second[:2].square().sum()])
        scaled_step(actual, scaler, losses)
    assert_close(tables[1].weight, tables[0].weight, rtol=0, atol=0)


def test_the_scaled_micro_batches_equal_the_unscaled_batch() -> None:
    expected, actual = network(), network()
    data = models.batch(3)
    plain_step(wrap(expected), expected(*data))
    optimizer, scaler = wrap(actual), new_scaler()
    parts = zip(torch.split(data[0], 4), torch.split(data[1], 4, dim=1), strict=True)
    for index, part in enumerate(parts):
        losses = scaler.scale([loss / 4 for loss in actual(*part)])
        optimizer.backward(losses, accumulate_only=index < 3)
    scaler.step(optimizer)
    scaler.update()
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-12, atol=1e-12)


# Overflow


@every_base
@pytest.mark.parametrize("bad", NOT_FINITE, ids=str)
def test_an_overflow_in_one_task_skips_the_step_and_the_next_is_clean(
    base: Base, bad: float
) -> None:
    expected, actual = network(), network()
    plain = HarmonizedOptimizer(base(expected.parameters()))
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    scaler = new_scaler(growth_interval=100)
    for seed in range(5):
        losses = actual(*models.batch(3, seed))
        before = weights_of(actual)
        if 0 < seed < 4:  # each task in turn
            losses[seed - 1] = losses[seed - 1] * bad
        else:
            plain_step(plain, expected(*models.batch(3, seed)))
        scaled_step(optimizer, scaler, scaler.scale(losses))
        if 0 < seed < 4:
            assert_close(weights_of(actual), before, rtol=0, atol=0)
            assert scaler.get_scale() == 2.0 ** (12 - seed)
    assert scaler.get_scale() == 2.0**9
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


@pytest.mark.parametrize("bad", NOT_FINITE, ids=str)
@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize("weighting", [gh, ghpp, ghpp_balanced, ghpp_printed])
@pytest.mark.parametrize("entry", [0, 1])
def test_one_bad_entry_of_one_gradient_stays_visible(
    bad: float, task: int, weighting: Weighting, entry: int
) -> None:
    tasks = 3 if weighting in (gh, ghpp) else 2
    a, b = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    rows = torch.tensor([[1.0, 2, 3], [-3, 1, -2], [1, 0, -4]], dtype=torch.float64)
    rows = rows[:tasks]
    rows[task % tasks, entry] = bad
    optimizer = HarmonizedOptimizer(SGD([a, b], lr=0.1), weighting)
    optimizer.backward([row @ a + b.sum() for row in rows])
    assert a.grad is not None
    assert not a.grad[entry].isfinite()
    assert optimizer.last is not None
    assert not optimizer.last.weights.isfinite().all()


@pytest.mark.parametrize("where", ["trunk", "head", "outside"])
def test_a_bad_gradient_stays_visible_with_shared_params_and_outside(
    where: str,
) -> None:
    model = network(2)
    within = model.trunk if where == "outside" else model
    optimizer = HarmonizedOptimizer(
        SGD(within.parameters(), lr=0.1), shared_params=model.trunk.parameters()
    )
    part = model.trunk if where == "trunk" else model.heads[1]
    bias = [*part.parameters()][-1]
    bias.register_hook(lambda grad: grad * float("inf"))  # type: ignore[no-untyped-call]  # torch's
    optimizer.backward(model(*models.batch(2)))
    assert bias.grad is not None
    assert not bias.grad.isfinite().any()
    healthy = [p for p in model.heads[0].parameters() if p.grad is not None]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in healthy)
    assert healthy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_that_overflows_stays_visible(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = HarmonizedOptimizer(SGD([p], lr=0.1))
    largest = torch.tensor([torch.finfo(dtype).max, 1.0], dtype=dtype)
    optimizer.backward([(p * largest).sum(), (p * largest).sum()])
    assert p.grad is not None
    assert p.grad.tolist() == [float("inf"), 2.0]


def test_an_overflow_in_a_micro_batch_skips_the_whole_step_and_no_more() -> None:
    expected, actual = network(), network()
    plain_step(wrap(expected), expected(*models.batch(3)))
    optimizer, scaler = wrap(actual), new_scaler()
    before = weights_of(actual)
    for bad in (1.0, float("inf"), 1.0):
        losses = scaler.scale([actual(*models.batch(3))[0] * bad] * 3)
        optimizer.backward(losses, accumulate_only=True)
    optimizer.backward(scaler.scale(actual(*models.batch(3))))
    scaler.step(optimizer)
    scaler.update()
    assert_close(weights_of(actual), before, rtol=0, atol=0)
    actual.zero_grad()  # some loops never call that of the optimizer
    optimizer.backward(scaler.scale(actual(*models.batch(3))))
    scaler.step(optimizer)
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def test_of_two_optimizers_only_the_one_that_overflowed_is_skipped() -> None:
    model = network(2)
    trunk = HarmonizedOptimizer(SGD(model.trunk.parameters(), lr=0.1, fused=True))
    heads = HarmonizedOptimizer(SGD(model.heads.parameters(), lr=0.1, fused=True))
    model.heads[1].bias.register_hook(lambda grad: grad * float("inf"))  # type: ignore[operator]  # Linear
    scaler, before = new_scaler(), weights_of(model)
    trunk.backward(scaler.scale(model(*models.batch(2))))
    for optimizer in trunk, heads:
        scaler.step(optimizer)
    scaler.update()
    moved = {k for k, value in weights_of(model).items() if not value.equal(before[k])}
    assert moved == {"trunk.0.weight", "trunk.0.bias"}
    assert scaler.get_scale() == 2.0**11


# The scaler knows one object


def test_unscaling_twice_is_an_error_as_for_the_base() -> None:
    model = network()
    optimizer, scaler = wrap(model), new_scaler()
    optimizer.backward(scaler.scale(model(*models.batch(3))))
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)


def test_unscaling_the_base_and_stepping_the_wrapper_unscales_twice() -> None:
    """The limit that the docstring names; GradScaler goes by the identity."""
    model = network()
    optimizer, scaler = wrap(model), new_scaler()
    optimizer.backward(scaler.scale(model(*models.batch(3))))
    scaler.unscale_(optimizer.base_optimizer)
    once = [grad.clone() for grad in grads(model) if grad is not None]
    scaler.step(optimizer)
    assert_close(grads(model), [grad / 2**12 for grad in once], rtol=0, atol=0)
    assert "not the base, for ``GradScaler.unscale_``" in " ".join(
        str(HarmonizedOptimizer.__doc__).split()
    )


def test_the_shorthand_step_with_losses_is_refused_by_the_scaler() -> None:
    model = network()
    scaler = new_scaler()
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(wrap(model), losses=scaler.scale(model(*models.batch(3))))


@pytest.mark.parametrize("wrapped", [False, True])
def test_closures_under_a_scaler_fail_as_with_the_base(wrapped: bool) -> None:
    model = network()
    base = LBFGS(model.parameters())
    scaler = new_scaler()
    optimizer = HarmonizedOptimizer(base) if wrapped else base
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: 0.0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_precision_parameters_under_a_scaler_fail_as_with_the_base(
    wrapped: bool,
) -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    base = SGD([p], lr=0.1)
    scaler = new_scaler()
    losses = scaler.scale([p.float().sum()])
    if wrapped:
        HarmonizedOptimizer(base).backward(losses)
    else:
        losses[0].backward()  # type: ignore[no-untyped-call]  # torch's
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(HarmonizedOptimizer(base) if wrapped else base)


# Autocast


def float32_batch(seed: int) -> tuple[Tensor, Tensor]:
    inputs, targets = models.batch(3, seed)
    return inputs.float(), targets.float()


def autocast_losses(
    model: Tasks, data: tuple[Tensor, Tensor], dtype: torch.dtype
) -> list[Tensor]:
    with torch.autocast("cpu", dtype=dtype):
        losses: list[Tensor] = model(*data)
    return losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_under_autocast_the_gradient_is_the_update_of_the_paper(
    dtype: torch.dtype, inside: bool, scaled: bool
) -> None:
    model, data = network().float(), float32_batch(1)
    optimizer, scaler = wrap(model), GradScaler("cpu", init_scale=64.0, enabled=scaled)
    losses = scaler.scale(autocast_losses(model, data, dtype))
    jacobian = literal_gradients(losses, parameters_of(optimizer))
    expected = literal_update(jacobian.double() / scaler.get_scale())
    with torch.autocast("cpu", dtype=dtype, enabled=inside):
        optimizer.backward(losses)
    scaler.unscale_(optimizer)
    actual = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    assert {grad.dtype for grad in actual} == {torch.float32}
    flat = torch.cat([grad.reshape(-1) for grad in actual])
    # Both from the same graph: what remains is float32.
    assert_close(flat.double(), expected, rtol=1e-5, atol=1e-6)
    assert (jacobian @ jacobian.T < 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_training_follows_float32_training(dtype: torch.dtype) -> None:
    exact, cast = network().float(), network().float()
    plain, optimizer, scaler = wrap(exact), wrap(cast), GradScaler("cpu", 256.0)
    for seed in range(10):
        data = float32_batch(seed)
        plain.step(losses=exact(*data))
        losses = scaler.scale(autocast_losses(cast, data, dtype))
        scaled_step(optimizer, scaler, losses)
    assert scaler.get_scale() == 256
    # Weights are about 1, and so are their moves: a few roundings of the dtype.
    atol = 4 * torch.finfo(dtype).eps
    assert_close(weights_of(cast), weights_of(exact), rtol=0, atol=atol)


# Parameters of several dtypes

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
Opt = Callable[[Iterable[nn.Parameter]], Optimizer]


def mixed_parameters(dtypes: list[torch.dtype]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=d)) for d in dtypes]


def mixed_losses(parameters: list[nn.Parameter], tasks: int = 3) -> list[Tensor]:
    """Give losses whose gradients are small integers, so exact in every dtype."""
    rows = torch.tensor([[1.0, 2.0, -3.0], [-3.0, 1.0, 2.0], [2.0, -4.0, 1.0]])
    return [
        torch.stack(
            [
                (p * (row * (1 + at)).to(p)).sum().double()
                for at, p in enumerate(parameters)
            ]
        ).sum()
        for row in rows[:tasks]
    ]


@pytest.mark.parametrize(
    "dtypes",
    [DTYPES, DTYPES[::-1], DTYPES[2:3] * 2, DTYPES[3:] * 2],
    ids=["mixed", "mixed backwards", "bfloat16", "float16"],
)
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_gradients_of_parameters_of_any_dtype_are_rounded_once(
    dtypes: list[torch.dtype], tasks: int
) -> None:
    parameters = mixed_parameters(dtypes)
    losses = mixed_losses(parameters, tasks)
    jacobian = literal_gradients(losses, parameters).double()
    expected = literal_update(jacobian).view(-1, 3)
    optimizer = HarmonizedOptimizer(SGD(parameters, lr=0.1))
    optimizer.backward(losses)
    assert optimizer.last is not None
    terms = (optimizer.last.weights @ jacobian.abs()).view(-1, 3)
    for p, part, size in zip(parameters, expected, terms, strict=True):
        assert p.grad is not None
        assert p.grad.dtype is p.dtype
        # Summed in float32 or better, whatever the terms cancel, then rounded once.
        unit = torch.finfo(torch.promote_types(p.dtype, torch.float32)).eps
        rtol, atol = 0.5 * torch.finfo(p.dtype).eps, 2 * unit * float(size.max())
        assert_close(p.grad.double(), part, rtol=rtol, atol=atol)


@pytest.mark.parametrize("base", BASES.values(), ids=[*BASES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_task_trains_as_the_base_does_in_low_precision(
    base: Base, dtype: torch.dtype
) -> None:
    expected, actual = network(1).to(dtype), network(1).to(dtype)
    plain = base(expected.parameters())
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    for seed in range(3):
        inputs, targets = models.batch(1, seed)
        plain.zero_grad()
        expected(inputs.to(dtype), targets.to(dtype))[0].backward()
        plain.step()
        optimizer.step(losses=actual(inputs.to(dtype), targets.to(dtype)))
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


@pytest.mark.parametrize(
    "base",
    [
        lambda params: SGD(params, lr=0.1, momentum=0.9),
        lambda params: SGD(params, lr=0.1, foreach=True),
        lambda params: AdamW(params, lr=0.1),
        lambda params: AdamW(params, lr=0.1, foreach=True),
    ],
    ids=["SGD", "SGD foreach", "AdamW", "AdamW foreach"],
)
def test_mixed_dtypes_step_on_the_same_gradients_as_the_base(base: Opt) -> None:
    expected, actual = mixed_parameters(DTYPES), mixed_parameters(DTYPES)
    plain, optimizer = base(expected), HarmonizedOptimizer(base(actual))
    for _ in range(3):
        optimizer.step(losses=mixed_losses(actual))
        for p, q in zip(expected, actual, strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone()
        plain.step()
    assert_close(actual, expected, rtol=0, atol=0)


def test_losses_of_several_dtypes_are_of_one_step() -> None:
    expected, actual = network(), network()
    plain_step(wrap(expected), expected(*models.batch(3)))
    losses = actual(*models.batch(3))
    # A cast of the value leaves the gradient, 1, as it is.
    cast = [losses[0].float(), losses[1].bfloat16(), losses[2]]
    plain_step(wrap(actual), cast)
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


# Micro-batches that were only accumulated


def test_a_late_step_after_unscaling_is_refused_and_loses_nothing() -> None:
    """What is pending is scaled still: the scaler has no part in it."""
    model, expected = models.make(models.one_head_for_all, 2), None
    optimizer, scaler = wrap(model), new_scaler()
    optimizer.backward(scaler.scale(model(*models.batch(2, 0))))
    losses = [*scaler.scale(model(*models.batch(2, 1)))]
    optimizer.backward(losses, retain_graph=True, accumulate_only=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scaler.unscale_(optimizer)
    for step in (optimizer.step, partial(scaler.step, optimizer)):
        with pytest.raises(
            RuntimeError, match=r"before unscale_\(\) and step\(\) of the"
        ):
            step()
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    # The micro-batch is there still, for the call that the error asks for.
    model.zero_grad()
    optimizer.backward(losses)
    twice = [p.grad for p in model.parameters()]
    expected = models.make(models.one_head_for_all, 2)
    literal = wrap(expected)
    literal.backward([2 * loss for loss in scaler.scale(expected(*models.batch(2, 1)))])
    assert_close(twice, [p.grad for p in expected.parameters()])


def test_a_scaler_may_step_on_nothing_but_accumulated_micro_batches() -> None:
    """A framework decided late; the scaler asks before it unscales."""
    made = []
    for late in (False, True):
        model = models.make(models.one_head_for_all, 2)
        optimizer, scaler = wrap(model), new_scaler()
        for seed in range(2):
            losses = scaler.scale(model(*models.batch(2, seed)))
            optimizer.backward(losses, accumulate_only=late or seed == 0)
        scaler.step(optimizer)
        scaler.update()
        made.append(dict(model.state_dict()))
    assert_close(made[1], made[0], rtol=0, atol=0)


def test_a_scaler_of_an_optimizer_that_is_no_more_is_passed_by() -> None:
    """Scalers know optimizers by their address, and addresses are used again."""
    model = models.make(models.one_head_for_all, 2)
    optimizer, other = wrap(model), new_scaler()
    # What a scaler keeps of an earlier optimizer, were this one at its address.
    other._per_optimizer_states[id(optimizer)]["stage"] = OptState.UNSCALED
    # It waits to be collected, as after an error, where it cannot disturb.
    other.itself = other  # type: ignore[attr-defined]  # a cycle
    del other
    for seed in range(2):  # the second time with gradients
        optimizer.backward(model(*models.batch(2, seed)), accumulate_only=seed == 1)
    optimizer.step()
    assert optimizer.last is not None
    # A scaler that steps knows itself, whatever others are alive.
    optimizer, other, scaler = wrap(model), new_scaler(), new_scaler()
    other._per_optimizer_states[id(optimizer)]["stage"] = OptState.UNSCALED
    optimizer.backward(scaler.scale(model(*models.batch(2, 0))), accumulate_only=True)
    scaler.step(optimizer)
    assert optimizer.last is not None


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_that_comes_late_is_seen(enabled: bool) -> None:
    model = models.make(models.one_head_for_all, 2)
    optimizer = wrap(model)
    for seed in range(3):
        optimizer.zero_grad()
        optimizer.backward(model(*models.batch(2, seed)), accumulate_only=True)
        optimizer.step()
    scaler = GradScaler("cpu", enabled=enabled)
    optimizer.backward(scaler.scale(model(*models.batch(2, 3))))
    optimizer.backward(scaler.scale(model(*models.batch(2, 4))), accumulate_only=True)
    scaler.unscale_(optimizer)
    if enabled:
        with pytest.raises(RuntimeError, match="has unscaled the gradients already"):
            optimizer.step()
    else:
        scaler.step(optimizer)


def test_a_late_step_before_unscaling_is_all_right() -> None:
    model = models.make(models.one_head_for_all, 2)
    optimizer, scaler = wrap(model), new_scaler()
    optimizer.backward(scaler.scale(model(*models.batch(2, 0))))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    optimizer.backward(model(*models.batch(2, 1)), accumulate_only=True)
    optimizer.step()
    assert optimizer.last is not None
