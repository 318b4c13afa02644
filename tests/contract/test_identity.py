"""The wrapper is its base optimizer, wherever PyTorch code looks at an optimizer."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, ghpp
from tests import models
from tests.bases import (
    BASES,
    CASES,
    Base,
    Case,
    bare,
    every_base,
    every_case,
    gradients,
    train,
    wants_closure,
    wrapped,
)
from tests.models import Tasks
from tests.versions import needs

assert_equal = partial(assert_close, rtol=0, atol=0)
ADAMW = CASES["AdamW"]
T = TypeVar("T")


def assert_one_with_its_base(optimizer: HarmonizedOptimizer) -> None:
    base = optimizer.base_optimizer
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults


# Groups, state and defaults


@every_case
def test_groups_state_and_defaults_stay_the_base_s_whatever_is_done(case: Case) -> None:
    model, optimizer = wrapped(case)
    base = optimizer.base_optimizer
    assert isinstance(optimizer, Optimizer)
    assert_one_with_its_base(optimizer)
    train(model, optimizer, range(2))
    assert_one_with_its_base(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_one_with_its_base(optimizer)
    base.load_state_dict(copy.deepcopy(base.state_dict()))
    assert_one_with_its_base(optimizer)
    for name in ("param_groups", "state", "defaults"):
        value = copy.copy(getattr(base, name))
        setattr(optimizer, name, value)
        assert getattr(base, name) is value
        other = copy.copy(value)
        setattr(base, name, other)
        assert getattr(optimizer, name) is other
    assert_one_with_its_base(optimizer)


@every_case
def test_one_task_is_bit_identical_to_the_base_in_weights_and_state(case: Case) -> None:
    expected, plain = bare(case)
    actual, optimizer = wrapped(case)
    train(expected, plain, range(6))
    train(actual, optimizer, range(6))
    assert_equal(actual.state_dict(), expected.state_dict())
    assert_equal(optimizer.state_dict(), plain.state_dict())


@every_case
def test_the_wrapper_adds_nothing_to_groups_defaults_and_state(case: Case) -> None:
    expected, plain = bare(case)
    actual, optimizer = wrapped(case, tasks=2)
    train(expected, plain, range(2))
    train(actual, optimizer, range(2), tasks=2)
    assert optimizer.state_dict().keys() == plain.state_dict().keys()
    assert optimizer.defaults.keys() == plain.defaults.keys()
    for group, other in zip(optimizer.param_groups, plain.param_groups, strict=True):
        assert group.keys() == other.keys()
    for state, other in zip(
        # Another number of heads, so compare the trunk.
        list(optimizer.state.values())[:2],
        list(plain.state.values())[:2],
        strict=True,
    ):
        assert state.keys() == other.keys()


# Adding groups


@every_base
def test_a_group_added_through_the_wrapper_trains_as_if_it_had_been_there(
    base: Base,
) -> None:
    needs.grow(base)
    expected, actual = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    both = [{"params": expected.trunk.parameters()}, *heads(expected)]
    whole = HarmonizedOptimizer(base(both))
    grown = HarmonizedOptimizer(base(actual.trunk.parameters()))
    for group in heads(actual):
        grown.add_param_group(group)
    train(expected, whole, range(4), tasks=2)
    train(actual, grown, range(4), tasks=2)
    assert grown.state_dict()["param_groups"][1]["lr"] == 0.02
    assert_equal(grown.state_dict(), whole.state_dict())
    assert_equal(actual.state_dict(), expected.state_dict())


def heads(model: Tasks) -> list[dict[str, Any]]:
    return [{"params": list(head.parameters()), "lr": 0.02} for head in model.heads]


@pytest.mark.parametrize(
    "group",
    [
        lambda _: [nn.Parameter(torch.ones(1))],
        lambda _: {"params": {nn.Parameter(torch.ones(1))}},
        lambda _: {"params": ["weight"]},
        lambda _: {"params": [nn.Parameter(torch.ones(1)) * 2]},
        lambda _: {"params": [("name", nn.Parameter(torch.ones(1)))]},
        lambda model: {"params": [next(model.parameters())]},
        lambda _: {"lr": 0.1},
    ],
    ids=["list", "set", "string", "no leaf", "named", "twice", "no params"],
)
def test_a_bad_group_is_refused_in_the_words_of_the_base(
    group: Callable[[nn.Module], Any],
) -> None:
    model, plain = bare(ADAMW)
    with pytest.raises((TypeError, ValueError, KeyError)) as expected:
        plain.add_param_group(group(model))
    model, optimizer = wrapped(ADAMW)
    with pytest.raises(expected.type) as actual:
        optimizer.add_param_group(group(model))
    assert str(actual.value) == str(expected.value)
    assert len(optimizer.param_groups) == 1


def test_the_same_parameter_twice_in_a_group_warns_as_the_base_does() -> None:
    _, optimizer = wrapped(ADAMW)
    parameter = nn.Parameter(torch.ones(1))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer.add_param_group({"params": [parameter, parameter]})


@every_base
def test_named_parameters_keep_their_names(base: Base) -> None:
    model, again = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    names = [name for name, _ in model.named_parameters()]
    optimizer = HarmonizedOptimizer(base(model.named_parameters()))
    train(model, optimizer, range(3), tasks=2)
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["param_names"] == names
    resumed = HarmonizedOptimizer(base(again.named_parameters()))
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["param_names"] == names
    again.load_state_dict(model.state_dict())
    train(model, optimizer, range(3, 5), tasks=2)
    train(again, resumed, range(3, 5), tasks=2)
    # Reloaded scalars of NAdam have another dtype: see the tests of checkpoints.
    assert_close(again.state_dict(), model.state_dict(), rtol=1e-7, atol=0)


# As an object


@every_case
def test_it_can_be_referred_to_weakly_hashed_and_told_apart(case: Case) -> None:
    model, optimizer = wrapped(case)
    _, other = wrapped(case)
    assert {optimizer: 1, other: 2}[optimizer] == 1
    assert optimizer == optimizer  # noqa: PLR0124  # the point
    assert optimizer != other
    train(model, optimizer, range(2))
    reference = weakref.ref(optimizer)
    assert reference() is optimizer
    del optimizer  # nothing refers back to it: no garbage collection is needed
    assert reference() is None


def saved_and_loaded(obj: T) -> T:
    file = io.BytesIO()
    torch.save(obj, file)
    file.seek(0)
    loaded: T = torch.load(file, weights_only=False)  # a whole object, not a state
    return loaded


def pickled(obj: T) -> T:
    copied: T = pickle.loads(pickle.dumps(obj))
    return copied


every_copy = pytest.mark.parametrize(
    "copied", [copy.deepcopy, pickled, saved_and_loaded]
)


@every_copy
@every_case
def test_a_copy_trains_on_bit_identically_and_apart(
    case: Case, copied: Callable[[Any], Any]
) -> None:
    model, optimizer = wrapped(case, tasks=2)
    train(model, optimizer, range(3), tasks=2)
    again, other = copied((model, optimizer))
    if case is CASES["LBFGS"]:
        # torch's own copy is unusable: it lacks what Optimizer does not know of.
        with pytest.raises(AttributeError, match="'LBFGS' object has no attribute"):
            train(again, other, range(3, 4), tasks=2)
        return
    assert_one_with_its_base(other)
    assert other.last is None
    before = copy.deepcopy(model.state_dict())
    train(again, other, range(3, 6), tasks=2)
    assert_equal(model.state_dict(), before)
    train(model, optimizer, range(3, 6), tasks=2)
    assert_equal(again.state_dict(), model.state_dict())
    assert_equal(other.state_dict(), optimizer.state_dict())


@every_copy
def test_a_copy_keeps_the_shared_parameters(copied: Callable[[Any], Any]) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(
        SGD(model.parameters(), lr=0.1), ghpp, shared_params=model.trunk.parameters()
    )
    again, other = copied((model, optimizer))
    for m, o in ((model, optimizer), (again, other)):
        gradients(m, o, 0, tasks=2)
    assert optimizer.last is not None
    assert_equal(other.last.gramian, optimizer.last.gramian)
    assert_equal(other.last.weights, optimizer.last.weights)


def test_a_shallow_copy_has_the_same_base() -> None:
    _, optimizer = wrapped(ADAMW)
    other = copy.copy(optimizer)
    assert other.base_optimizer is optimizer.base_optimizer
    assert_one_with_its_base(other)


@every_copy
def test_a_copy_leaves_hooks_and_the_schedulers_step_behind(
    copied: Callable[[Any], Any],
) -> None:
    model, optimizer = wrapped(ADAMW)
    scheduler = ExponentialLR(optimizer, 0.5)
    fired: list[Optimizer] = []
    optimizer.register_step_pre_hook(lambda own, *_: fired.append(own))
    optimizer.register_state_dict_pre_hook(fired.append)
    # Without its hooks, which are local functions that nothing can pickle.
    again, other = copied((model, optimizer))
    assert "step" in vars(optimizer)
    before = copy.deepcopy(model.state_dict())
    train(again, other, range(1))
    other.state_dict()
    assert fired == []
    assert_equal(model.state_dict(), before)
    train(model, optimizer, range(1))
    scheduler.step()
    assert_equal(model.state_dict(), again.state_dict())
    assert fired == [optimizer]
    assert other.param_groups[0]["lr"] == 2 * optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("name", ["base_optimizer", "defaults", "weighting", "train"])
def test_an_unfinished_instance_has_no_attributes_and_does_not_recurse(
    name: str,
) -> None:
    unfinished = HarmonizedOptimizer.__new__(HarmonizedOptimizer)
    with pytest.raises(AttributeError):
        getattr(unfinished, name)


@every_case
def test_repr_shows_the_repr_of_the_base(case: Case) -> None:
    _, optimizer = wrapped(case)
    base = repr(optimizer.base_optimizer)
    assert repr(optimizer) == f"HarmonizedOptimizer(weighting=gh, {base})"


# Attributes


def test_names_that_only_the_base_has_are_written_to_the_base() -> None:
    optimizer: Any = wrapped(ADAMW)[1]
    base = optimizer.base_optimizer
    base.temperature = 1.0
    optimizer.temperature = 2.0
    assert base.temperature == 2.0
    assert "temperature" not in vars(optimizer)
    optimizer.measure_every = 3
    optimizer.weighting = ghpp
    optimizer.note = "mine"
    assert not {"measure_every", "weighting", "note"} & vars(base).keys()
    base.note = "theirs"
    assert optimizer.note == "mine"
    optimizer.step = lambda: None  # as a scheduler does
    assert "step" not in vars(base)


def test_names_of_both_are_kept_apart() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    base: Any = SGD(model.parameters(), lr=0.1)
    base.weighting = base.measure_every = base.mode = "theirs"
    optimizer: Any = HarmonizedOptimizer(base, ghpp, measure_every=2)
    assert (base.weighting, base.measure_every) == ("theirs", "theirs")
    assert (optimizer.weighting, optimizer.measure_every) == (ghpp, 2)
    assert pickle.loads(pickle.dumps(optimizer)).measure_every == 2
    with mock.patch.object(optimizer, "mode", "ours"):
        assert base.mode == "ours"
    assert optimizer.mode == "theirs"
    del base.weighting
    base.mode = "theirs"
    del optimizer.mode
    assert base.mode == "theirs"  # what mock put back was the wrapper's
    del optimizer.mode
    assert not hasattr(base, "mode")
    optimizer.note = 1
    del optimizer.note
    with pytest.raises(AttributeError):
        del optimizer.note


class KeepsZeros(SGD):
    """As older optimizers: zeros unless told otherwise."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("to_none", [True, False])
def test_the_argument_of_zero_grad_reaches_the_base(to_none: bool) -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = HarmonizedOptimizer(KeepsZeros([weight], lr=0.1))
    weight.grad = torch.ones(2)
    optimizer.zero_grad(set_to_none=to_none)
    assert (weight.grad is None) == to_none


def test_a_typo_is_one_of_the_wrapper() -> None:
    _, optimizer = wrapped(ADAMW)
    with pytest.raises(AttributeError, match="'HarmonizedOptimizer' object") as caught:
        optimizer.bakward  # noqa: B018  # the point
    assert caught.value.name == "bakward"
    assert caught.value.obj is optimizer
    assert caught.value.__cause__ is caught.value.__context__ is None


def test_a_wrapper_cannot_be_wrapped() -> None:
    _, optimizer = wrapped(ADAMW)
    with pytest.raises(TypeError, match="got a HarmonizedOptimizer: wrap"):
        HarmonizedOptimizer(optimizer)


class Bare(SGD):
    """A base whose ``zero_grad`` takes nothing and whose ``step`` takes more."""

    def zero_grad(self) -> None:  # type: ignore[override]  # as some optimizers have it
        super().zero_grad()

    def step(self, closure: Any = None, hessian: Any = None) -> Any:
        self.seen = hessian
        return super().step(closure)


def test_a_base_may_clear_gradients_without_an_argument() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(Bare(model.parameters(), lr=0.1))
    optimizer.step(losses=model(*models.batch(2)))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_what_else_a_base_takes_in_its_step_is_forwarded() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(Bare(model.parameters(), lr=0.1))
    options: dict[str, Any] = {"hessian": "diagonal"}
    optimizer.step(losses=model(*models.batch(2)), **options)
    assert optimizer.seen == "diagonal"
    optimizer.step(lambda: model(*models.batch(2)), hessian=None)
    assert optimizer.seen is None
    with pytest.raises(TypeError, match="unexpected keyword argument 'loss'"):
        optimizer.step(loss=[])


# A training that does not know of backward


def plain_step(optimizer: HarmonizedOptimizer, model: Tasks, how: str) -> None:
    def run() -> Tensor:
        total = torch.stack(model(*models.batch(2))).sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch's
        return total.detach()

    if how == "step":
        run()
        optimizer.step()
    else:
        optimizer.step(run)


@pytest.mark.parametrize("how", ["step", "closure"])
def test_a_step_on_gradients_that_nobody_harmonized_warns_once(how: str) -> None:
    model, optimizer = wrapped(ADAMW, tasks=2)
    optimizer.step()  # without gradients there is nothing to be warned of
    with pytest.warns(
        UserWarning, match=r"Call optimizer.backward\(\[loss_a, loss_b\]\)"
    ):
        plain_step(optimizer, model, how)
    plain_step(optimizer, model, how)


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_a_step_at_rate_zero_makes_state_and_no_warning(rate: Any) -> None:
    model, optimizer = wrapped(ADAMW, tasks=2)
    for group in optimizer.param_groups:
        group["lr"] = rate
    plain_step(optimizer, model, "step")
    assert optimizer.state


def test_a_loop_that_calls_backward_is_never_warned() -> None:
    model, optimizer = wrapped(ADAMW, tasks=2)
    optimizer.backward(model(*models.batch(2)))
    optimizer.step()
    plain_step(optimizer, model, "step")


# Hooks


class Recorder:
    """Hooks that note their name and the optimizer that they were called with."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Optimizer]] = []

    def hook(self, name: str) -> Callable[..., None]:
        return lambda optimizer, *_: self.events.append((name, optimizer))


class Renamed(HarmonizedOptimizer):
    """A subclass with a step of its own, which torch has never seen."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


@pytest.mark.parametrize("cls", [HarmonizedOptimizer, Renamed])
@every_base
def test_each_step_hook_fires_once_and_around_those_of_the_base(
    base: Base, cls: type[HarmonizedOptimizer]
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer, noted = cls(base(model.parameters())), Recorder()
    own = optimizer.base_optimizer
    for inner in (optimizer, own):
        name = "own" if inner is own else "wrapper"
        inner.register_step_pre_hook(noted.hook(f"{name} pre"))
        inner.register_step_post_hook(noted.hook(f"{name} post"))
    gradients(model, optimizer, 0, tasks=2)
    with (
        register_optimizer_step_pre_hook(noted.hook("global pre")),
        register_optimizer_step_post_hook(noted.hook("global post")),
    ):
        optimizer.step()
    assert noted.events == [
        ("global pre", optimizer),
        ("wrapper pre", optimizer),
        ("own pre", own),
        ("own post", own),
        ("wrapper post", optimizer),
        ("global post", optimizer),
    ]


def test_a_global_hook_may_change_the_arguments_and_is_back_after_an_error() -> None:
    _, optimizer = wrapped(ADAMW)
    noted = Recorder()

    def fail() -> float:
        raise ValueError("in the closure")

    def give(*_: object) -> tuple[tuple[object, ...], dict[str, object]]:
        return (optimizer, fail), {}

    fails = pytest.raises(ValueError, match="in the closure")
    with register_optimizer_step_pre_hook(give), fails:
        optimizer.step()
    with register_optimizer_step_post_hook(noted.hook("post")):
        optimizer.step()
    assert noted.events == [("post", optimizer)]


def test_a_global_hook_may_come_and_go_within_a_step() -> None:
    _, optimizer = wrapped(ADAMW)
    other, noted = SGD([torch.ones(1, requires_grad=True)], lr=0.1), Recorder()
    handles: list[Any] = []

    def register(*_: object) -> None:
        if not handles:
            handles.append(register_optimizer_step_pre_hook(noted.hook("late")))

    with register_optimizer_step_post_hook(register):
        optimizer.step()
    other.step()
    optimizer.step()
    assert noted.events == [("late", other), ("late", optimizer)]
    handles[0].remove()
    other.step()
    assert len(noted.events) == 2


def test_a_base_that_steps_by_itself_has_global_hooks_again() -> None:
    _, optimizer = wrapped(ADAMW)
    noted, base = Recorder(), optimizer.base_optimizer
    with register_optimizer_step_pre_hook(noted.hook("pre")):
        optimizer.step()
        base.step()
    assert noted.events == [("pre", optimizer), ("pre", base)]


def test_global_hooks_go_on_for_other_optimizers_that_step_meanwhile() -> None:
    model, optimizer = wrapped(ADAMW)
    other, noted = SGD([torch.ones(1, requires_grad=True)], lr=0.1), Recorder()

    def closure() -> float:
        other.step()
        return gradients(model, optimizer, 0)

    with register_optimizer_step_pre_hook(noted.hook("pre")):
        optimizer.step(closure)
    assert noted.events == [("pre", optimizer), ("pre", other)]


def test_step_hooks_see_the_weights_before_and_after() -> None:
    model, optimizer = wrapped(ADAMW)
    weight, seen = next(model.parameters()), list[Tensor]()
    note = weight.detach().clone
    optimizer.register_step_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: seen.append(weight.detach().clone()))
    before = note()
    train(model, optimizer, range(1))
    assert_equal(seen, [before, weight.detach()])
    assert not torch.equal(*seen)


def test_removed_hooks_do_not_fire() -> None:
    model, optimizer = wrapped(ADAMW)
    noted = Recorder()
    handles = [
        register(noted.hook("hook"))
        for register in (
            optimizer.register_step_pre_hook,
            optimizer.register_step_post_hook,
            optimizer.register_state_dict_pre_hook,
            optimizer.register_state_dict_post_hook,
            optimizer.register_load_state_dict_pre_hook,
            optimizer.register_load_state_dict_post_hook,
        )
    ]
    for _ in range(2):
        train(model, optimizer, range(1))
        optimizer.load_state_dict(optimizer.state_dict())
        for handle in handles:
            handle.remove()
    assert noted.events == [("hook", optimizer)] * 6


def test_a_step_pre_hook_may_change_the_closure() -> None:
    _, optimizer = wrapped(ADAMW)
    optimizer.register_step_pre_hook(lambda own, *_: ((own, lambda: 2.0), {}))
    assert optimizer.step(lambda: 1.0) == 2.0
    assert optimizer.step(closure=lambda: 1.0) == 2.0


@pytest.mark.parametrize("changed", [5, (), ((), {}, None), [(), {}], "ab"])
def test_a_step_pre_hook_that_returns_anything_else_is_an_error_as_in_torch(
    changed: Any,
) -> None:
    for model, optimizer in (bare(ADAMW), wrapped(ADAMW)):
        optimizer.register_step_pre_hook(lambda *_: changed)
        gradients(model, optimizer, 0)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="must return None or a tuple"):
            optimizer.step()
        assert_equal(model.state_dict(), before)


@every_copy
@pytest.mark.parametrize("cls", [HarmonizedOptimizer, Renamed])
def test_a_copy_of_one_instance_breaks_no_other_and_doubles_no_hook(
    cls: type[HarmonizedOptimizer], copied: Callable[[Any], Any]
) -> None:
    step = cls.step
    pairs: list[tuple[Tasks, Optimizer]] = []
    for _ in range(2):
        model = models.make(models.heads_on_a_trunk, 2)
        pairs.append((model, cls(BASES["AdamW"](model.parameters()))))
    pairs += [copied(pairs[0]), bare(ADAMW, tasks=2)]
    noted = Recorder()
    with (
        register_optimizer_step_pre_hook(noted.hook("pre")),
        register_optimizer_step_post_hook(noted.hook("post")),
    ):
        for model, optimizer in pairs:
            train(model, optimizer, range(1), tasks=2)
    assert cls.step is step
    assert noted.events == [
        (when, optimizer) for _, optimizer in pairs for when in ("pre", "post")
    ]


def test_torch_takes_the_step_for_hooked_already() -> None:
    model, optimizer = wrapped(ADAMW)
    step, noted = HarmonizedOptimizer.step, Recorder()
    optimizer._patch_step_function()  # as torch does for every optimizer it makes
    assert HarmonizedOptimizer.step is step
    with register_optimizer_step_pre_hook(noted.hook("pre")):
        train(model, optimizer, range(1))
    assert noted.events == [("pre", optimizer)]


def test_hooks_of_state_dict_fire_once_in_order_and_around_those_of_the_base() -> None:
    _, optimizer = wrapped(ADAMW)
    base, noted = optimizer.base_optimizer, Recorder()
    for inner, name in ((base, "base"), (optimizer, "wrapper")):
        for prepend, order in ((False, 2), (True, 1)):
            hook = partial(Recorder.hook, noted)
            inner.register_state_dict_pre_hook(
                hook(f"{name} save {order}"), prepend=prepend
            )
            inner.register_state_dict_post_hook(
                hook(f"{name} saved {order}"), prepend=prepend
            )
            inner.register_load_state_dict_pre_hook(
                hook(f"{name} load {order}"), prepend=prepend
            )
            inner.register_load_state_dict_post_hook(
                hook(f"{name} loaded {order}"), prepend=prepend
            )
    state = optimizer.state_dict()
    assert noted.events == [
        *(("wrapper save 1", optimizer), ("wrapper save 2", optimizer)),
        *(("base save 1", base), ("base save 2", base)),
        *(("base saved 1", base), ("base saved 2", base)),
        *(("wrapper saved 1", optimizer), ("wrapper saved 2", optimizer)),
    ]
    noted.events.clear()
    optimizer.load_state_dict(state)
    assert noted.events == [
        *(("wrapper load 1", optimizer), ("wrapper load 2", optimizer)),
        *(("base load 1", base), ("base load 2", base)),
        *(("base loaded 1", base), ("base loaded 2", base)),
        *(("wrapper loaded 1", optimizer), ("wrapper loaded 2", optimizer)),
    ]


# Names


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10's own
@pytest.mark.parametrize("cls", [HarmonizedOptimizer, Renamed])
def test_the_profiler_shows_each_step_once(cls: type[HarmonizedOptimizer]) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = cls(BASES["AdamW"](model.parameters()))
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profiler:
        optimizer.zero_grad()
        optimizer.step()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    assert [event.name for event in events if "ptimizer." in event.name] == [
        "Optimizer.zero_grad#AdamW.zero_grad",
        f"Optimizer.step#{cls.__name__}.step",
        "Optimizer.step#AdamW.step",
    ]


def test_public_names_of_the_base_are_forwarded() -> None:
    _, optimizer = wrapped(CASES["SAM"])
    base: Any = optimizer.base_optimizer
    assert optimizer.first_step == base.first_step
    assert optimizer.second_step == base.second_step
    assert optimizer.moves is base.moves
    assert not hasattr(optimizer, "note")
    base.note = "added later"
    assert optimizer.note == "added later"


@every_case
def test_private_names_of_the_base_are_never_forwarded(case: Case) -> None:
    _, optimizer = wrapped(case)
    own = {*dir(HarmonizedOptimizer), *vars(optimizer)}
    private = {n for n in dir(optimizer.base_optimizer) if n.startswith("_")} - own
    assert "_warned_capturable_if_run_uncaptured" in private
    assert [name for name in private if hasattr(optimizer, name)] == []


@pytest.mark.parametrize("name", ["SGD fused", "AdamW fused"])
def test_grad_scaler_does_not_learn_that_the_base_could_unscale(name: str) -> None:
    _, optimizer = wrapped(CASES[name])
    assert optimizer.base_optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]  # set by the class
    assert not hasattr(optimizer, "_step_supports_amp_scaling")


# Ways to call step

every_form = pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((None,), {}), ((), {"closure": None})]
)


@every_form
@every_base
def test_step_takes_every_form_of_no_closure_with_and_without_gradients(
    base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    case = (base, models.heads_on_a_trunk)
    (expected, plain), (actual, optimizer) = bare(case), wrapped(case)
    start = copy.deepcopy(actual.state_dict())
    for model, either in ((expected, plain), (actual, optimizer)):
        assert either.step(*args, **kwargs) is None
        assert_equal(model.state_dict(), start)
        for seed in range(2):
            gradients(model, either, seed)
            either.step(*args, **kwargs)
        either.zero_grad()
        either.step(*args, **kwargs)
    assert not torch.equal(
        actual.state_dict()["trunk.0.weight"], next(iter(start.values()))
    )
    assert_equal(actual.state_dict(), expected.state_dict())
    assert_equal(optimizer.state_dict(), plain.state_dict())


@every_form
@pytest.mark.parametrize("name", ["LBFGS", "SAM"])
def test_a_base_that_needs_a_closure_says_so_as_without_the_wrapper(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    for model, optimizer in (bare(CASES[name]), wrapped(CASES[name])):
        assert wants_closure(optimizer)
        gradients(model, optimizer, 0)
        with pytest.raises(TypeError):
            optimizer.step(*args, **kwargs)


@every_case
def test_a_closure_runs_with_grad_and_its_value_comes_back(case: Case) -> None:
    model, optimizer = wrapped(case, tasks=2)
    enabled = []

    def closure() -> float:
        enabled.append(torch.is_grad_enabled())
        return gradients(model, optimizer, 0, tasks=2)

    first = closure()
    with torch.no_grad():
        value = optimizer.step(closure=closure)
    assert all(enabled[1:])
    assert len(enabled) > 1
    # SAM evaluates uphill, the others where they are; what comes back is weighted.
    assert optimizer.last is not None
    assert (value != first) == (optimizer.last.weights != 1).any()


# Frameworks that put something of theirs in our place


class Copying:
    """As Lightning's and Fabric's proxies before 2.3: our attributes, but no step."""

    def __init__(self, optimizer: HarmonizedOptimizer) -> None:
        vars(self).update({k: v for k, v in vars(optimizer).items() if k != "step"})
        self._optimizer = optimizer

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        return self._optimizer.step(closure)


class Forwarding:
    """As the proxies since: attributes that are missing are ours."""

    def __init__(self, optimizer: HarmonizedOptimizer) -> None:
        self._optimizer = optimizer

    step = Copying.step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def proxy_of(optimizer: HarmonizedOptimizer, kind: type) -> HarmonizedOptimizer:
    cls = type("Lightning" + type(optimizer).__name__, (kind, type(optimizer)), {})
    proxy: HarmonizedOptimizer = object.__new__(cls)
    kind.__init__(proxy, optimizer)  # type: ignore[misc]  # and no other __init__
    return proxy


every_proxy = pytest.mark.parametrize("kind", [Copying, Forwarding])


@every_proxy
@every_case
def test_training_through_a_proxy_is_training_without(case: Case, kind: type) -> None:
    expected, plain = wrapped(case, tasks=2)
    actual, optimizer = wrapped(case, tasks=2)
    proxy = proxy_of(optimizer, kind)
    assert isinstance(proxy, HarmonizedOptimizer)
    assert proxy.last is None
    train(expected, plain, range(2), tasks=2)
    for seed in range(2):
        closure = partial(gradients, actual, proxy, seed, 2)
        closure()
        proxy.step(closure if wants_closure(optimizer) else None)
        assert optimizer.last is proxy.last is not None
    assert_equal(actual.state_dict(), expected.state_dict())
    assert plain.last is not None
    assert optimizer.last is not None
    assert_equal(optimizer.last.gramian, plain.last.gramian)
    proxy.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert_one_with_its_base(optimizer)
    assert proxy.param_groups is optimizer.param_groups
    assert proxy.state is optimizer.state


@every_proxy
@pytest.mark.parametrize("first_through_proxy", [True, False])
def test_an_accumulation_may_go_on_through_a_proxy_or_besides_it(
    kind: type, first_through_proxy: bool
) -> None:
    expected, plain = wrapped(ADAMW, tasks=2)
    actual, optimizer = wrapped(ADAMW, tasks=2)
    proxies = [proxy_of(optimizer, kind), optimizer]
    first, second = proxies if first_through_proxy else proxies[::-1]
    plain.backward(expected(*models.batch(2)), accumulate_only=True)
    plain.backward(expected(*models.batch(2, 1)))
    first.backward(actual(*models.batch(2)), accumulate_only=True)
    second.backward(actual(*models.batch(2, 1)))
    assert_equal(grads(actual), grads(expected))
    # And what clears it does so for both.
    first.backward(actual(*models.batch(2)), accumulate_only=True)
    second.zero_grad()
    plain.zero_grad()
    plain.backward(expected(*models.batch(2)))
    first.backward(actual(*models.batch(2)))
    assert_equal(grads(actual), grads(expected))


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]


def rebuilt(value: Any) -> Any:
    """Rebuild every container through its type, as Accelerate does in ``prepare``."""
    if isinstance(value, (list, tuple)):
        return type(value)(rebuilt(item) for item in value)
    if isinstance(value, Mapping):
        return type(value)({key: rebuilt(item) for key, item in value.items()})  # type: ignore[call-arg]  # of dict
    return value.clone() if isinstance(value, Tensor) else value


@every_case
def test_accelerate_may_take_the_state_apart_and_load_it(case: Case) -> None:
    expected, plain = wrapped(case, tasks=2)
    actual, optimizer = wrapped(case, tasks=2)
    optimizer.load_state_dict(rebuilt(optimizer.state_dict()))
    train(expected, plain, range(5), tasks=2)
    train(actual, optimizer, range(2), tasks=2)
    optimizer.load_state_dict(rebuilt(optimizer.state_dict()))
    train(actual, optimizer, range(2, 5), tasks=2)
    # Reloaded scalars of NAdam have another dtype: see the tests of checkpoints.
    assert_close(actual.state_dict(), expected.state_dict(), rtol=1e-7, atol=0)


def test_accelerate_may_put_another_step_on_the_instance_for_a_while() -> None:
    model, optimizer = wrapped(ADAMW)
    original, calls = optimizer.step, []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    optimizer.step = patched  # type: ignore[method-assign]  # the point
    train(model, optimizer, range(1))
    optimizer.step = original  # type: ignore[method-assign]  # likewise
    train(model, optimizer, range(1, 2))
    assert calls == [()]
    expected, plain = bare(ADAMW)
    train(expected, plain, range(2))
    assert_equal(model.state_dict(), expected.state_dict())


def replace_items(group: dict[str, Any], params: list[nn.Parameter]) -> None:
    group["params"][:] = params


def replace_list(group: dict[str, Any], params: list[nn.Parameter]) -> None:
    group["params"] = params


@pytest.mark.parametrize("replace", [replace_items, replace_list])
@every_base
def test_parameters_swapped_in_their_group_are_those_that_train(
    base: Base, replace: Callable[[dict[str, Any], list[nn.Parameter]], None]
) -> None:
    needs.grow(base)
    case = (base, models.heads_on_a_trunk)
    old, optimizer = wrapped(case, tasks=2)
    train(old, optimizer, range(2), tasks=2)
    before = copy.deepcopy(old.state_dict())
    new = copy.deepcopy(old)
    new.zero_grad()
    replace(optimizer.param_groups[0], list(new.parameters()))
    optimizer.state.clear()
    expected, plain = wrapped(case, tasks=2)
    expected.load_state_dict(before)
    train(new, optimizer, range(2, 4), tasks=2)
    train(expected, plain, range(2, 4), tasks=2)
    assert_equal(new.state_dict(), expected.state_dict())
    assert_equal(old.state_dict(), before)


def test_shared_parameters_may_be_swapped_too() -> None:
    old, expected = (models.make(models.heads_on_a_trunk, 2) for _ in range(2))
    new = copy.deepcopy(old)
    optimizer, plain = (
        HarmonizedOptimizer(
            SGD([{"params": model.heads.parameters()}, *trunk(model)], lr=0.1),
            shared_params=model.trunk.parameters(),
        )
        for model in (old, expected)
    )
    replace_items(optimizer.param_groups[0], list(new.heads.parameters()))
    replace_list(optimizer.param_groups[1], list(new.trunk.parameters()))
    train(new, optimizer, range(2), tasks=2)
    train(expected, plain, range(2), tasks=2)
    assert_equal(new.state_dict(), expected.state_dict())
    assert plain.last is not None
    assert optimizer.last is not None
    assert_equal(optimizer.last.gramian, plain.last.gramian)


def trunk(model: Tasks) -> list[dict[str, Any]]:
    return [{"params": model.trunk.parameters()}]


@needs.swapping
@every_base
def test_torch_may_swap_parameters_and_state_in_for_a_while(base: Base) -> None:
    results = []
    for make in (bare, wrapped):
        model, optimizer = make((base, models.heads_on_a_trunk))
        train(model, optimizer, range(2))
        before = copy.deepcopy(model.state_dict())
        other = copy.deepcopy(model)
        state = copy.deepcopy(optimizer.state_dict())
        gradients(other, SGD(other.parameters()), 5)
        if not state["state"]:
            with pytest.raises(RuntimeError, match="requires initialized"):
                swap(optimizer, other, state).__enter__()
            return
        with swap(optimizer, other, state):
            optimizer.step()
        assert_equal(model.state_dict(), before)
        train(model, optimizer, range(2, 4))
        results.append((other.state_dict(), model.state_dict(), state))
    assert not torch.equal(*(r["trunk.0.weight"] for r in results[0][:2]))
    assert_equal(results[1], results[0])


def swap(optimizer: Optimizer, model: nn.Module, state: dict[str, Any]) -> Any:
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    return torch.optim.swap_in_optimizer_params_and_state(optimizer, parameters, state)
