"""What a recorder keeps, against gradients taken one by one, and what it costs."""

import csv
import gc
import io
import json
import math
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.testing import assert_close
from torchjd.aggregation import PCGradWeighting

from benchmarks.common.watch import watch
from ghopt import (
    HarmonizedOptimizer,
    Recorder,
    Recording,
    gh,
    ghpp,
    measure,
    plain_sum,
)
from ghopt.geometry import cosines
from ghopt.measuring import GramianOf, Harmonization
from ghopt.recorder import by_layer
from tests import models
from tests.memory import allocated
from tests.models import Tasks

NAMES = ("up", "down", "aside")
RATE = 0.05

networks = pytest.mark.parametrize("network", models.NETWORKS)


def losses_of(model: Tasks, seed: int = 0) -> dict[str, Tensor]:
    batch = models.batch(len(model.heads), seed)
    return dict(zip(NAMES, model(*batch), strict=False))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def literal_rows(losses: dict[str, Tensor], parameters: list[Tensor]) -> Tensor:
    """Take the gradients one by one, zeros where a task does not reach a parameter."""
    rows = []
    for loss in losses.values():
        grads = torch.autograd.grad(
            loss,
            parameters,
            retain_graph=True,
            materialize_grads=True,
            allow_unused=True,
        )
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(rows)


def found(*rows: list[float], names: tuple[str, ...] = NAMES) -> Harmonization:
    """Make what a step finds whose gradients are these rows."""
    jacobian = torch.tensor(rows, dtype=torch.float64)
    products = jacobian @ jacobian.T
    return Harmonization(names[: len(rows)], products, gh(products))


def recorded(*steps: Harmonization, rate: float = RATE) -> Recording:
    recorder = Recorder()
    for step in steps:
        recorder.record(step, rate=rate)
    return recorder.flush()


def train(optimizer: HarmonizedOptimizer, model: Tasks, steps: int) -> None:
    for step in range(steps):
        optimizer.step(losses=losses_of(model, step))


# What is recorded.


@networks
@pytest.mark.parametrize("weighting", [gh, ghpp])
def test_a_recording_holds_the_gradients_geometry_at_each_step(
    network: Callable[[int], Tasks], weighting: Callable[[Tensor], Tensor]
) -> None:
    model = models.make(network, 3)
    base = SGD(model.parameters(), RATE)
    optimizer = HarmonizedOptimizer(base, weighting)
    scheduler = ExponentialLR(optimizer, 0.5)
    recorder = Recorder()
    recorder.attach(optimizer)
    rows = []
    for step in range(4):
        rows.append(literal_rows(losses_of(model, step), [*trained(model).values()]))
        optimizer.step(losses=losses_of(model, step))
        scheduler.step()
    recording = recorder.flush()
    assert recording.names == NAMES
    assert recording.steps.tolist() == [0, 1, 2, 3]
    assert_close(recording.rates, RATE * 0.5 ** torch.arange(4, dtype=torch.float64))
    for step, jacobian in enumerate(rows):
        norms = jacobian.norm(dim=1)
        units = jacobian / norms[:, None]
        tau = weighting(jacobian @ jacobian.T)
        assert_close(recording.gramians[step], jacobian @ jacobian.T)
        assert_close(recording.norms[step], norms)
        assert_close(recording.cosines[step], units @ units.T)
        assert recording.conflicts[step].equal(jacobian @ jacobian.T < 0)
        assert_close(recording.weights[step], tau)
        assert_close(recording.slopes[step], jacobian @ (tau @ jacobian))
        assert_close(recording.plain_slopes[step], jacobian @ jacobian.sum(0))
        change = -RATE * 0.5**step * jacobian @ (tau @ jacobian)
        assert_close(recording.sgd_effects[step], change)


def test_the_effect_is_what_a_small_step_of_sgd_changes_in_each_loss() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), 1e-6))
    recorder = Recorder()
    recorder.attach(optimizer)
    before = losses_of(model)
    optimizer.step(losses=losses_of(model))
    after = losses_of(model)
    changes = torch.stack([after[name] - before[name] for name in NAMES]).detach()
    assert_close(recorder.flush().sgd_effects[0], changes, rtol=1e-4, atol=1e-12)


@networks
@pytest.mark.usefixtures("passes")
def test_each_layer_has_the_inner_products_of_its_own_parameters(
    network: Callable[[int], Tasks],
) -> None:
    model = models.make(network, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    recorder.attach(optimizer, layers=model)
    losses = losses_of(model)
    expected = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own:
            rows = literal_rows(losses, own)
            expected[name] = rows @ rows.T
    optimizer.backward(losses)
    recording = recorder.flush()
    assert recording.layers.keys() == expected.keys()
    for name, products in expected.items():
        assert_close(recording.layers[name][0], products, rtol=1e-9, atol=1e-12)


def test_layers_may_be_any_groups_and_ones_without_gradients_have_zeros() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    groups = {"trunk": model.trunk.parameters(), "none": [], "alien": [nn.Parameter()]}
    recorder.attach(optimizer, layers={name: [*ps] for name, ps in groups.items()})
    losses = losses_of(model)
    rows = literal_rows(losses, [*model.trunk.parameters()])
    optimizer.backward(losses)
    layers = recorder.flush().layers
    assert_close(layers["trunk"][0], rows @ rows.T)
    assert layers["none"].eq(0).all()
    assert layers["alien"].eq(0).all()
    assert layers["none"].shape == (1, 2, 2)


def test_a_module_s_layers_are_its_modules_with_parameters_of_their_own() -> None:
    model = models.make(models.frozen_and_unused, 2)
    layers = by_layer(model)
    assert [*layers] == ["", "trunk.0", "heads.0", "heads.1"]
    assert layers["trunk.0"] == [*model.trunk.parameters()]


def test_shared_parameters_are_those_that_are_recorded() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    trunk = [*model.trunk.parameters()]
    base = SGD(model.parameters(), RATE)
    optimizer = HarmonizedOptimizer(base, shared_params=trunk)
    recorder = Recorder()
    recorder.attach(optimizer, layers=model)
    losses = losses_of(model)
    rows = literal_rows(losses, trunk)  # type: ignore[arg-type]  # of parameters
    optimizer.backward(losses)
    recording = recorder.flush()
    assert_close(recording.gramians[0], rows @ rows.T)
    assert recording.layers["heads.0"].eq(0).all()


def test_steps_that_do_not_measure_are_not_recorded() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE), measure_every=3)
    recorder = Recorder()
    recorder.attach(optimizer)
    train(optimizer, model, 7)
    assert len(recorder.flush()) == 3


def test_an_accumulation_is_one_step() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    recorder.attach(optimizer)
    optimizer.backward(losses_of(model, 0), accumulate_only=True)
    optimizer.backward(losses_of(model, 1))
    recording = recorder.flush()
    assert len(recording) == 1
    rows = sum(
        literal_rows(losses_of(model, seed), [*model.parameters()]) for seed in (0, 1)
    )
    assert isinstance(rows, Tensor)
    assert_close(recording.gramians[0], rows @ rows.T)


def test_a_learning_rate_in_a_tensor_is_that_of_the_step() -> None:
    rate = torch.tensor(0.5)
    model = models.make(models.heads_on_a_trunk, 2)
    base = SGD(model.parameters(), rate)
    optimizer = HarmonizedOptimizer(base)
    recorder = Recorder()
    recorder.attach(optimizer)
    for value in (0.5, 0.25):
        rate.fill_(value)
        optimizer.backward(losses_of(model))
    assert recorder.flush().rates.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("rate", [0.05, torch.tensor([0.05], dtype=torch.float64)])
def test_a_learning_rate_keeps_its_digits_and_is_one_number(
    rate: float | Tensor,
) -> None:
    recorder = Recorder()
    recorder.record(found([1.0], [2.0]), rate=rate)
    assert recorder.flush().rates.tolist() == [0.05]


def test_a_base_without_a_learning_rate_has_effects_that_are_not_known() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    base = SGD(model.parameters(), RATE)
    del base.param_groups[0]["lr"]
    optimizer = HarmonizedOptimizer(base)
    recorder = Recorder()
    recorder.attach(optimizer)
    optimizer.backward(losses_of(model))
    recording = recorder.flush()
    assert recording.sgd_effects.isnan().all()
    assert recording.slopes.isfinite().all()


def test_a_task_that_has_no_part_in_a_step_is_nan_there_and_adds_nothing() -> None:
    recording = recorded(
        found([3.0, 0.0], [-1.0, 1.0]),
        found([1.0, 1.0], [2.0, -3.0], names=("down", "new")),
    )
    nan = math.nan
    assert recording.names == ("up", "down", "new")
    assert_close(
        recording.gramians[1],
        torch.tensor(
            [[nan, nan, nan], [nan, 2, -1], [nan, -1, 13]], dtype=torch.float64
        ),
        equal_nan=True,
    )
    assert_close(
        recording.plain_slopes,
        torch.tensor([[6, -1, nan], [nan, 1, 12]], dtype=torch.float64),
        equal_nan=True,
    )
    assert recording.weights[1, 0].isnan()
    assert not recording.conflicts[0, 2].any()
    assert recording.cosines[0, 0, 2].isnan()


def test_a_layer_that_is_recorded_in_some_steps_only_is_nan_in_the_others() -> None:
    recorder = Recorder()
    step = found([3.0, 0.0], [-1.0, 1.0])
    for layers in ({"one": step.gramian}, {"other": step.gramian}, {}):
        recorder.record(step, layers=layers)
    layers = recorder.flush().layers
    assert layers["one"].isnan().flatten(1).all(1).tolist() == [False, True, True]
    assert layers["other"].isnan().flatten(1).all(1).tolist() == [True, False, True]
    assert_close(layers["other"][1], step.gramian)


def test_a_right_angle_is_no_conflict() -> None:
    assert not recorded(found([1.0, 0.0], [0.0, 1.0], [0.0, 0.0])).conflicts.any()


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_stays_visible(value: float, tmp_path: Path) -> None:
    recording = recorded(found([value, 0.0], [1.0, 1.0]), found([1.0, 0.0], [1.0, 1.0]))
    recording.to_jsonl(tmp_path / "run.jsonl")
    for one in (recording, Recording.from_jsonl(tmp_path / "run.jsonl")):
        assert one.finite.tolist() == [False, True]
        assert one.present.all()
        assert not one.plain_slopes[0].isfinite().any()
        assert not one.norms[0, 0].isfinite()
    (kept,) = recording.where(recording.finite).steps.tolist()
    assert kept == 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6))
def test_cosines_are_those_of_the_rows_and_zero_with_a_zero_row(
    values: list[float],
) -> None:
    rows = torch.tensor(values, dtype=torch.float64).view(3, 2)
    rows[rows.abs() < 1e-100] = 0  # whose squares underflow
    batch = torch.stack([rows @ rows.T, torch.zeros(3, 3, dtype=torch.float64)])
    expected = [
        [
            math.cos(math.atan2(*a) - math.atan2(*b)) if any(a) and any(b) else 0
            for b in rows.tolist()
        ]
        for a in rows.tolist()
    ]
    assert_close(
        cosines(batch)[0],
        torch.tensor(expected, dtype=torch.float64),
        rtol=0,
        atol=1e-9,
    )
    assert cosines(batch)[1].eq(0).all()


# Recorders.


def test_a_full_recorder_loses_the_oldest_steps_and_counts_them() -> None:
    recorder = Recorder(size=3)
    for step in range(5):
        recorder.record(found([1.0 + step]))
    assert (recorder.count, recorder.lost) == (5, 2)
    recording = recorder.flush()
    assert recording.steps.tolist() == [2, 3, 4]
    assert recording.norms[:, 0].tolist() == [3, 4, 5]


def test_a_flushed_recorder_is_empty_and_goes_on_counting() -> None:
    recorder = Recorder()
    recorder.record(found([1.0]))
    recorder.flush()
    recorder.record(found([2.0]))
    recording = recorder.flush()
    assert recording.steps.tolist() == [1]
    assert recorder.lost == 0


def test_an_empty_recording_has_all_that_others_have() -> None:
    recording = Recorder().flush()
    assert (len(recording), recording.names, recording.pairs) == (0, (), [])
    assert recording.norms.shape == recording.sgd_effects.shape == (0, 0)
    assert recording.cosines.shape == (0, 0, 0)
    assert [*recording.rows()] == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_recorder_without_room_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"size must be at least 1, got {size}"):
        Recorder(size)


def test_layers_from_iterators_serve_at_every_step() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    recorder.attach(optimizer, layers={"all": model.parameters()})
    train(optimizer, model, 3)
    recording = recorder.flush()
    assert_close(recording.layers["all"], recording.gramians)
    with pytest.raises(
        TypeError, match=r"layers\['w'\] must be an iterable of tensors"
    ):
        recorder.attach(optimizer, layers={"w": next(model.parameters())})


def test_a_recorder_is_not_attached_twice() -> None:
    """Cells of a notebook are run again."""
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer, other = (
        HarmonizedOptimizer(SGD(model.parameters(), RATE)) for _ in range(2)
    )
    recorder = Recorder()
    handle = recorder.attach(optimizer)
    with pytest.raises(
        ValueError, match=r"attached twice, .* on the handle of the first"
    ):
        recorder.attach(optimizer, layers=model)
    recorder.attach(other)
    Recorder().attach(optimizer)
    handle.remove()
    recorder.attach(optimizer)
    copy = pickle.loads(pickle.dumps(recorder))
    copy.attach(optimizer)


def test_mixed_up_arguments_are_told_apart() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    with pytest.raises(TypeError, match=r"make a Recorder\(\), then recorder.attach"):
        Recorder(optimizer)  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match=r"size must be an int, got 2\.5"):
        Recorder(2.5)  # type: ignore[arg-type]  # the point
    for wrong in (model, optimizer.base_optimizer):
        with pytest.raises(TypeError, match="optimizer must be a HarmonizedOptimizer"):
            Recorder().attach(wrong)  # type: ignore[arg-type]  # the point


def test_a_recorder_keeps_no_optimizer_alive() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    recorder.attach(optimizer)
    train(optimizer, model, 1)
    alive = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    assert len(recorder.flush()) == 1


def test_steps_that_do_not_fit_together_are_not_lost() -> None:
    recorder = Recorder(2)
    step = found([1.0, 0.0], [0.0, 1.0])
    recorder.record(step, layers={"x": step.gramian})
    recorder.record(step, layers={"x": step.gramian[:1]})
    with pytest.raises(RuntimeError):
        recorder.flush()
    # Both are there: for one more there is no room.
    assert recorder.lost == 0
    recorder.record(step)
    assert recorder.lost == 1


def test_a_hook_may_remove_itself() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    first = optimizer.register_harmonize_hook(lambda *_: first.remove())
    recorder = Recorder()
    recorder.attach(optimizer)
    train(optimizer, model, 2)
    assert recorder.count == 2


def test_a_removed_handle_ends_the_recording() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder, other = Recorder(), Recorder()
    handle = recorder.attach(optimizer)
    other.attach(optimizer)
    train(optimizer, model, 1)
    handle.remove()
    train(optimizer, model, 1)
    assert (recorder.count, other.count) == (1, 2)


def test_a_recorder_survives_pickling_and_goes_on_where_it_was() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder(size=3)
    recorder.attach(optimizer, layers=model)
    train(optimizer, model, 2)
    copy: Recorder = pickle.loads(pickle.dumps(recorder))
    resumed, twin = pickle.loads(pickle.dumps((optimizer, model)))
    train(resumed, twin, 1)  # whose hooks stayed behind
    assert (copy.count, recorder.count) == (2, 2)
    copy.attach(optimizer, layers=model)
    train(optimizer, model, 2)
    one, other = recorder.flush(), copy.flush()
    assert other.steps.tolist() == [1, 2, 3]
    assert copy.lost == 1
    assert_close(one.gramians, other.gramians)
    assert_close(one.layers, other.layers)


def test_recording_adds_no_operation_to_a_step() -> None:
    def step_with(recorder: Recorder | None) -> Callable[[], None]:
        model = models.make(models.heads_on_a_trunk, 2)
        optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
        if recorder:
            recorder.attach(optimizer)
        return lambda: train(optimizer, model, 1)

    recorder = Recorder()
    bare = watch(step_with(None)).operations
    assert watch(step_with(recorder)).operations == bare
    assert recorder.count == 2


def test_recording_reads_nothing_on_the_host() -> None:
    model = models.make(models.heads_on_a_trunk, 2).to("meta")
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    recorder.attach(optimizer, layers=model)
    batch = [tensor.to("meta") for tensor in models.batch(2)]
    optimizer.step(losses=model(*batch))
    assert recorder.count == 1


def test_an_error_in_a_hook_leaves_the_gradients_as_they_were() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    optimizer.backward(losses_of(model))
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    last = optimizer.last

    def fail(*_: Harmonization | GramianOf) -> None:
        raise RuntimeError("the logger is gone")

    optimizer.register_harmonize_hook(fail)
    with pytest.raises(RuntimeError, match="the logger is gone"):
        optimizer.backward(losses_of(model, 1))
    assert_close([p.grad for p in model.parameters()], before, rtol=0, atol=0)
    assert optimizer.last is last


# Measuring alone.


@networks
def test_measuring_finds_what_the_optimizer_would(
    network: Callable[[int], Tasks],
) -> None:
    model = models.make(network, 3)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE), ghpp)
    recorder, expected = Recorder(), Recorder()
    expected.attach(optimizer, layers=model)
    losses = losses_of(model)
    seen = measure(losses, model.parameters(), ghpp, recorder=recorder, layers=model)
    assert all(p.grad is None for p in model.parameters())
    optimizer.backward(losses)  # the graph is still there
    assert optimizer.last is not None
    assert seen.names == optimizer.last.names
    assert_close(seen.gramian, optimizer.last.gramian)
    assert_close(seen.weights, optimizer.last.weights)
    one, other = recorder.flush(), expected.flush()
    assert_close(one.layers, other.layers)
    assert_close(one.gramians, other.gramians)
    assert one.rates.isnan().all()


def test_measuring_twice_the_same_parameter_counts_it_once() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    losses = losses_of(model)
    once = measure(losses, model.parameters()).gramian
    assert_close(measure(losses, [*model.parameters()] * 2).gramian, once)


def test_measuring_over_nothing_that_a_loss_reaches_is_refused() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    with pytest.raises(ValueError, match="params must hold one that a loss reaches"):
        measure(losses_of(model), [nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="losses must hold at least one"):
        measure([], model.parameters())


def test_its_repr_says_what_is_in_it() -> None:
    recorder = Recorder()
    recorder.record(found([1.0, 0.0], [0.0, 1.0]), layers={"0": torch.eye(2)})
    recording = recorder.flush()
    names = recording.names
    assert repr(recording) == f"Recording(names={names}, steps=1, layers=['0'])"
    empty = Recorder().flush()
    assert repr(empty) == "Recording(names=(), steps=0)"
    assert empty._repr_html_() == "<p>0 steps of 0 tasks</p>"


def test_a_measured_loop_is_recorded_with_its_layers_and_no_rule() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    recorder = Recorder()
    for layers in (model, by_layer(model)):
        out = model(torch.ones(2, 3))
        losses = {"up": out.mean(), "down": -2 * out.mean()}
        found = measure(losses, model.parameters(), recorder=recorder, layers=layers)
        sum(losses.values()).backward()
        assert found.rule == "gh"
    recording = recorder.flush()
    assert recording.rules == ("", "")
    assert_close(recording.weights, torch.stack([found.weights, found.weights]))
    assert list(recording.layers) == ["0", "1"]
    total = torch.stack([*recording.layers.values()]).sum(0)
    assert_close(total, recording.gramians, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("weighting", "name"),
    [
        (gh, "gh"),
        (partial(ghpp, lam=0.3), "ghpp"),
        (PCGradWeighting(), "PCGradWeighting"),
    ],
)
def test_it_keeps_the_name_of_the_rule(
    weighting: Callable[[Tensor], Tensor], name: str, tmp_path: Path
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE), weighting)
    recorder = Recorder()
    recorder.attach(optimizer)
    train(optimizer, model, 2)
    recorder.record(found([1.0, 0.0], [0.0, 1.0]))  # by hand, of no rule
    recording = recorder.flush()
    assert recording.rules == (name, name, "")
    assert recording.where(torch.tensor([False, True, True])).rules == (name, "")
    recording.to_jsonl(tmp_path / "run.jsonl")
    assert Recording.from_jsonl(tmp_path / "run.jsonl").rules == recording.rules


# The step taken.


def adam(model: Tasks, **options: Any) -> HarmonizedOptimizer:
    """Steps of Adam, with its momentum and scales, oppose tasks now and then."""
    return HarmonizedOptimizer(AdamW(model.parameters(), lr=0.05), **options)


def flat(model: Tasks) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


@pytest.mark.parametrize("project", [False, True])
def test_it_keeps_what_each_step_did_to_each_task(project: bool) -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    optimizer = adam(model, project_step=project)
    recorder = Recorder()
    recorder.attach(optimizer, step=True)
    slopes, angles = [], []
    for step in range(12):
        losses = losses_of(model, step)
        jacobian = literal_rows(losses, [*model.parameters()])
        before = flat(model)
        optimizer.step(losses=losses)
        change = flat(model) - before
        slopes.append(jacobian @ change)
        angles.append(slopes[-1] / jacobian.norm(dim=1) / change.norm())
    recording = recorder.flush()
    assert recording.has_steps.all()
    assert_close(recording.step_slopes, torch.stack(slopes), rtol=1e-9, atol=1e-12)
    assert_close(recording.step_cosines, torch.stack(angles), rtol=1e-9, atol=1e-12)
    assert recording.step_opposed.equal(torch.stack(angles) > 1e-6)
    assert bool(recording.step_opposed.any()) != project
    row = [*recording.rows()][4]
    assert row["step_slope/up"] == recording.step_slopes[4, 0]
    assert row["step_cosine/aside"] == recording.step_cosines[4, 2]


def test_steps_are_not_looked_at_unless_asked_for() -> None:
    recording = some_recording()
    assert not recording.has_steps.any()
    assert recording.step_slopes.shape == recording.weights.shape
    assert not any(name.startswith("step_") for name in next(recording.rows()))


def test_a_handle_ends_the_look_at_the_step_too() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = adam(model)
    recorder = Recorder()
    handle = recorder.attach(optimizer, step=True)
    train(optimizer, model, 1)
    handle.remove()
    optimizer.zero_grad()
    losses = losses_of(model)
    held, _ = allocated(lambda: optimizer.backward(losses))
    # The sum alone, and not the gradients until the step.
    assert held <= 1.2 * sum(p.nbytes for p in model.parameters())
    assert len(recorder.flush()) == 1


def test_a_step_belongs_to_the_last_backward_before_it() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    optimizer = adam(model)
    recorder = Recorder()
    recorder.attach(optimizer, step=True)
    parameters: list[Tensor] = [*model.parameters()]
    first, second = losses_of(model, 0), losses_of(model, 1)
    together = {"aside": second["aside"], "up": second["up"] + first["up"]}
    jacobian = literal_rows(together, parameters)
    before = flat(model)
    optimizer.backward({"up": first["up"], "down": first["down"]})
    optimizer.backward({"aside": second["aside"], "up": second["up"]})
    optimizer.step()
    recording = recorder.flush()
    assert recording.has_steps.tolist() == [False, True]
    aside, up = jacobian @ (flat(model) - before)
    assert recording.names == ("up", "down", "aside")
    found = recording.step_slopes[1]
    assert_close(found[[0, 2]], torch.stack([up, aside]), rtol=1e-9, atol=1e-12)
    assert found[1].isnan()


def test_a_task_whose_gradients_were_dropped_has_no_step() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = adam(model)
    recorder = Recorder()
    recorder.attach(optimizer, step=True)
    losses = losses_of(model)
    optimizer.backward({"up": losses["up"]}, retain_graph=True)

    def fail(*_: object) -> None:
        raise RuntimeError("no")

    handle = optimizer.register_harmonize_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.backward({"down": losses["down"]})
    handle.remove()
    optimizer.step()
    recording = recorder.flush()
    assert recording.names == ("up", "down")
    assert not recording.has_steps.any()


def test_what_rounding_did_is_not_called_opposed() -> None:
    """A projected step lies on the edge of the cone; float32 rounds it to both sides."""
    model = models.make(models.heads_on_a_trunk, 2).float()
    base = AdamW(model.parameters(), lr=1e-5)
    optimizer = HarmonizedOptimizer(base, plain_sum, project_step=True)
    free = Recorder()
    free.attach(optimizer, step=True)
    for step in range(60):
        inputs, targets = models.batch(2, step)
        losses = model(inputs.float(), targets.float())
        optimizer.step(losses=dict(zip(NAMES, losses, strict=False)))
    recording = free.flush()
    assert (recording.step_cosines > 1e-6).any()  # so it would be
    assert not recording.step_opposed.any()
    assert (recording.step_limits < 0.1).all()


def test_steps_of_two_optimizers_find_their_own_lines() -> None:
    made = [models.make(models.heads_on_a_trunk, 2, seed) for seed in range(2)]
    recorder = Recorder()
    optimizers = [adam(model) for model in made]
    for optimizer in optimizers:
        recorder.attach(optimizer, step=True)
    slopes = []
    for model, optimizer in zip(made, optimizers, strict=True):
        optimizer.backward(losses_of(model))
    for model, optimizer in zip(made, optimizers, strict=True):
        jacobian = literal_rows(losses_of(model), [*model.parameters()])
        before = flat(model)
        optimizer.step()
        slopes.append(jacobian @ (flat(model) - before))
    found = recorder.flush().step_slopes
    assert_close(found, torch.stack(slopes), rtol=1e-9, atol=1e-12)


def test_a_flush_before_the_step_leaves_it_out() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = adam(model)
    recorder = Recorder()
    recorder.attach(optimizer, step=True)
    optimizer.backward(losses_of(model))
    assert not recorder.flush().has_steps.any()
    optimizer.step()
    assert len(recorder.flush()) == 0


def test_steps_come_back_from_files_old_and_new(tmp_path: Path) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = adam(model)
    recorder = Recorder()
    path = tmp_path / "run.jsonl"
    handle = recorder.attach(optimizer)
    train(optimizer, model, 2)  # lines as they were before steps were kept
    handle.remove()
    recorder.attach(optimizer, step=True)
    train(optimizer, model, 3)
    recording = recorder.flush()
    assert recording.has_steps.tolist() == [False, False, True, True, True]
    assert len(recording.where(recording.has_steps)) == 3
    recording.to_jsonl(path)
    assert_same(Recording.from_jsonl(path), recording)
    assert '"change"' not in path.read_text(encoding="utf-8").splitlines()[1]
    model.trunk[0].weight.data.fill_(math.nan)  # type: ignore[index]  # Sequential
    train(optimizer, model, 1)
    broken = recorder.flush()
    broken.to_jsonl(path)
    assert not broken.step_opposed.any()
    assert len(Recording.from_jsonl(path)) == 6


# Where recordings go.


def some_recording() -> Recording:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), RATE))
    recorder = Recorder()
    recorder.attach(optimizer, layers=model)
    train(optimizer, model, 3)
    return recorder.flush()


def assert_same(one: Recording, other: Recording) -> None:
    assert one.names == other.names
    assert one.steps.equal(other.steps)
    fields = ["gramians", "weights", "rates", "layers"]
    fields += ["step_slopes", "step_cosines", "step_limits"]
    for name in fields:
        exact: dict[str, Any] = {"rtol": 0, "atol": 0, "equal_nan": True}
        assert_close(getattr(one, name), getattr(other, name), **exact)


def test_a_recording_comes_back_from_a_file_to_the_last_digit(tmp_path: Path) -> None:
    recording = some_recording()
    recording.to_jsonl(tmp_path / "run.jsonl")
    assert_same(Recording.from_jsonl(tmp_path / "run.jsonl"), recording)


def test_parts_of_a_recording_with_other_tasks_join_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    recorder = Recorder()
    steps = [
        found([3.0, 0.0], [-1.0, 1.0]),
        found([1.0, 1.0], [2.0, -3.0], names=("down", "new")),
        found([math.nan, 1.0], [2.0, 2.0]),
        Harmonization(("up",), torch.tensor([[math.inf]]), torch.tensor([math.nan])),
    ]
    for step in steps:
        recorder.record(step, rate=RATE, layers={step.names[-1]: step.gramian})
        recorder.flush().to_jsonl(path)
    together = Recorder()
    for step in steps:
        together.record(step, rate=RATE, layers={step.names[-1]: step.gramian})
    expected = together.flush()
    for values in (expected.gramians, expected.layers["up"]):
        values.masked_fill_(values.isinf(), math.nan)
    assert_same(Recording.from_jsonl(path), expected)
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON


def test_a_killed_and_resumed_training_replaces_what_it_does_again(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.jsonl"
    recorder = Recorder()
    for step in range(4):
        recorder.record(found([1.0 + step]))
    copy: Recorder = pickle.loads(pickle.dumps(recorder))
    recorder.flush().to_jsonl(path)
    path.write_text(
        path.read_text(encoding="utf-8")[:-9], encoding="utf-8"
    )  # killed while it wrote
    assert Recording.from_jsonl(path).steps.tolist() == [0, 1, 2]
    copy.record(found([5.0]))
    copy.flush().where(torch.tensor([False, False, True, True, True])).to_jsonl(path)
    assert Recording.from_jsonl(path).steps.tolist() == [0, 1, 2, 3, 4]


def test_a_bar_in_a_name_mixes_no_pairs() -> None:
    names = ("a", "b|c", "a|b", "c")
    rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    (row,) = recorded(found(*rows, names=names)).rows()
    assert sum(name.startswith("product/") for name in row) == 6


def test_an_empty_file_is_an_empty_recording(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    Recorder().flush().to_jsonl(path)
    assert len(Recording.from_jsonl(path)) == 0


def line_of(**other: object) -> str:
    line = {"step": 0, "names": ["a"], "gramian": [[1]], "weights": [1], "lr": 1}
    return json.dumps({**line, "layers": {}, **other})


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        line_of(gramian=[[1, 2]]),
        line_of(layers=[]),
        line_of(weights=[1, 2]),
        line_of(names=1),
    ],
)
def test_a_file_of_something_else_is_refused_by_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    some_recording().to_jsonl(path)
    path.write_text(f"{path.read_text(encoding='utf-8')}{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"got .*run\.jsonl with .* in its line 4"):
        Recording.from_jsonl(path)


def test_rows_name_every_number() -> None:
    recorder = Recorder()
    step = found([3.0, 0.0], [-1.0, 1.0])
    recorder.record(
        step, rate=0.5, layers={"trunk.0": torch.tensor([[1, -2], [-2, 4]])}
    )
    (row,) = recorder.flush().rows()
    tau = gh(step.gramian).tolist()
    slopes = [9 * tau[0] - 3 * tau[1], -3 * tau[0] + 2 * tau[1]]
    assert row == pytest.approx(
        {
            "step": 0,
            "lr": 0.5,
            "norm/up": 3,
            "norm/down": 2**0.5,
            "weight/up": tau[0],
            "weight/down": tau[1],
            "slope/up": slopes[0],
            "slope/down": slopes[1],
            "sgd_effect/up": -0.5 * slopes[0],
            "sgd_effect/down": -0.5 * slopes[1],
            "product/up|down": -3,
            "conflict/up|down": 1,
            "cosine/up|down": -(0.5**0.5),
            "layer/trunk.0/cosine/up|down": -1,
        }
    )


def test_a_table_of_comma_separated_values_has_a_line_per_step(tmp_path: Path) -> None:
    recording = some_recording()
    for _ in range(2):  # in place of what is there
        recording.to_csv(tmp_path / "run.csv")
    read = csv.DictReader(
        io.StringIO((tmp_path / "run.csv").read_text(encoding="utf-8"))
    )
    lines = [{name: float(value) for name, value in row.items()} for row in read]
    assert lines == [*recording.rows()]


def test_an_empty_recording_is_an_empty_table(tmp_path: Path) -> None:
    Recorder().flush().to_csv(tmp_path / "run.csv")
    assert (tmp_path / "run.csv").read_text(encoding="utf-8").strip() == ""


def test_a_logger_is_given_each_step() -> None:
    class Run:
        def __init__(self) -> None:
            self.logged: list[dict[str, float]] = []

        def log(self, data: dict[str, float]) -> None:
            self.logged.append(data)

    run, recording = Run(), some_recording()
    recording.log(run)
    assert run.logged == [*recording.rows()]


def test_tensorboard_shows_each_number_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    recording = some_recording()
    with SummaryWriter(str(tmp_path)) as writer:
        recording.to_tensorboard(writer)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = events.Scalars("ghopt/cosine/up|down")
    assert [event.step for event in shown] == [0, 1, 2]
    expected = recording.cosines[:, 0, 1].tolist()
    assert [event.value for event in shown] == pytest.approx(expected)
    names = {name for row in recording.rows() for name in row} - {"step"}
    assert {*events.Tags()["scalars"]} == {f"ghopt/{name}" for name in names}


def test_rounding_of_a_slope_of_zero_opposes_nobody() -> None:
    products = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    recorder = Recorder()
    for first in (0.5, 0.5 - 2e-9, 0.49):
        weights = torch.tensor([first, 1.0], dtype=torch.float64)
        recorder.record(Harmonization(("a", "b"), products, weights))
    recording = recorder.flush()
    opposed = recording.opposed(recording.weights)
    assert opposed.tolist() == [[False, False], [False, False], [True, False]]
