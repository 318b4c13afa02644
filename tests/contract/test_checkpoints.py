"""Checkpoints: training that is resumed from one is bit-identical to uninterrupted."""

import copy
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer
from tests import models
from tests.bases import (
    BASES,
    CASES,
    Base,
    Case,
    bare,
    every_base,
    every_case,
    train,
    wrapped,
)
from tests.models import Tasks
from tests.ranks import needs_signals

assert_equal = partial(assert_close, rtol=0, atol=0)
Pair: TypeAlias = tuple[Tasks, Optimizer]


@pytest.fixture(autouse=True)
def _scalars_in_float64() -> Iterator[None]:
    """Let bases keep scalars in the dtype of the parameters.

    torch keeps some in the default dtype (NAdam: mu_product) but loads them in that of
    the parameters, so that no training in another dtype is resumed exactly.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def through_a_file(value: Any) -> Any:
    """Save, and load with nothing allowed but tensors and plain types."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(pair: Pair, fresh: Pair) -> Pair:
    """Load what one pair of model and optimizer saves into another."""
    saved = through_a_file([part.state_dict() for part in pair])
    fresh[0].load_state_dict(saved[0])
    fresh[1].load_state_dict(saved[1])
    return fresh


def assert_alike(actual: Pair, expected: Pair) -> None:
    assert_equal(actual[0].state_dict(), expected[0].state_dict())
    assert_equal(actual[1].state_dict(), expected[1].state_dict())


# Within a process


@every_case
def test_training_resumed_from_a_checkpoint_is_bit_identical(case: Case) -> None:
    whole = wrapped(case, tasks=2)
    train(*whole, range(3), tasks=2)
    resumed = resume(whole, wrapped(case, tasks=2))
    assert_alike(resumed, whole)
    train(*whole, range(3, 6), tasks=2)
    train(*resumed, range(3, 6), tasks=2)
    assert_alike(resumed, whole)


@every_case
def test_a_checkpoint_moves_from_the_base_to_the_wrapper_and_back(case: Case) -> None:
    whole = bare(case)
    train(*whole, range(6))
    first = bare(case)
    train(*first, range(2))
    second = resume(first, wrapped(case))
    train(*second, range(2, 4))
    third = resume(second, bare(case))
    train(*third, range(4, 6))
    assert_alike(third, whole)


@every_case
def test_loading_does_not_modify_its_argument(case: Case) -> None:
    model, optimizer = wrapped(case, tasks=2)
    train(model, optimizer, range(2), tasks=2)
    state = copy.deepcopy(optimizer.state_dict())
    state["note"] = torch.ones(2)
    groups, expected = state["param_groups"], copy.deepcopy(state)
    fresh = wrapped(case, tasks=2)[1]

    def forget(_: Optimizer, given: dict[str, Any]) -> None:
        del given["note"]

    fresh.register_load_state_dict_pre_hook(forget)
    fresh.load_state_dict(state)
    fresh.param_groups[0]["lr"] = 7.0
    assert state["param_groups"] is groups
    assert_equal(state, expected)


@every_base
def test_saving_in_the_middle_of_an_accumulation_disturbs_nothing(base: Base) -> None:
    case = base, models.heads_on_a_trunk
    pairs = [wrapped(case, tasks=2) for _ in range(2)]
    for saves, (model, optimizer) in enumerate(pairs):
        optimizer.backward(model(*models.batch(2, 0)), accumulate_only=True)
        if saves:
            through_a_file(optimizer.state_dict())
        optimizer.backward(model(*models.batch(2, 1)))
        optimizer.step()
    assert_alike(*pairs)


def test_a_state_that_does_not_fit_is_refused_as_by_the_base_and_loses_nothing() -> (
    None
):
    other = torch.nn.Linear(2, 1)
    wrong = AdamW(other.parameters()).state_dict()
    with pytest.raises(ValueError, match="doesn't match the size") as expected:
        bare(CASES["AdamW"])[1].load_state_dict(wrong)
    whole, pair = (wrapped(CASES["AdamW"], tasks=2) for _ in range(2))
    for model, optimizer in (whole, pair):
        train(model, optimizer, range(2), tasks=2)
        optimizer.zero_grad()
        optimizer.backward(model(*models.batch(2, 2)), accumulate_only=True)
    with pytest.raises(ValueError, match="doesn't match the size") as actual:
        pair[1].load_state_dict(wrong)
    assert str(actual.value) == str(expected.value)
    for model, optimizer in (whole, pair):
        optimizer.backward(model(*models.batch(2, 3)))
        optimizer.step()
    assert_alike(pair, whole)


def test_a_group_added_before_saving_is_needed_before_loading() -> None:
    def grown() -> Pair:
        model = models.make(models.heads_on_a_trunk, 2)
        optimizer = HarmonizedOptimizer(BASES["AdamW"](model.trunk.parameters()))
        optimizer.add_param_group({"params": model.heads.parameters(), "lr": 0.02})
        return model, optimizer

    whole = grown()
    train(*whole, range(3), tasks=2)
    resumed = resume(whole, grown())
    train(*whole, range(3, 5), tasks=2)
    train(*resumed, range(3, 5), tasks=2)
    assert_alike(resumed, whole)


# torch.distributed.checkpoint, in one process

OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full, on the CPU": {"full_state_dict": True, "cpu_offload": True},
    "flat, on the CPU": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
    "on the CPU": {"cpu_offload": True},
    "without frozen ones": {"ignore_frozen_params": True},
    "not strict": {"strict": False},
}

every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=[*OPTIONS])


def resume_with_dcp(
    pair: Pair, fresh: Pair, options: StateDictOptions
) -> dict[str, Any]:
    """Do what :func:`resume` does; also give the state of the optimizer."""
    state = copy.deepcopy(get_optimizer_state_dict(*pair, options=options))
    fresh[0].load_state_dict(pair[0].state_dict())
    set_optimizer_state_dict(*fresh, copy.deepcopy(state), options=options)
    return state


@pytest.mark.parametrize(
    ("base", "options"),
    [
        pytest.param(base, options, id=f"{name}-{option}")
        for name, base in BASES.items()
        for option, options in OPTIONS.items()
        # There torch fails without any tensor in the state: see below.
        if not (name == "SGD" and "full_state_dict" in options)
    ],
)
def test_dcp_resumes_bit_identically_and_from_the_state_of_the_bare_base(
    base: Base, options: dict[str, Any]
) -> None:
    case, chosen = (base, models.heads_on_a_trunk), StateDictOptions(**options)
    plain, expected = bare(case), bare(case)
    whole, resumed = wrapped(case), wrapped(case)
    train(*plain, range(3))
    train(*whole, range(3))
    state = resume_with_dcp(whole, resumed, chosen)
    assert_same_state(state, resume_with_dcp(plain, expected, chosen))
    pairs: list[Pair] = [whole, expected, resumed]
    for pair in pairs:
        train(*pair, range(3, 6))
    assert_equal(resumed[0].state_dict(), whole[0].state_dict())
    assert_alike(resumed, expected)


def assert_same_state(actual: Any, expected: Any) -> None:
    """Compare what may hold names, too."""
    if isinstance(expected, Tensor):
        assert_equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_state(actual[key], value)
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for entry, other in zip(actual, expected, strict=True):
            assert_same_state(entry, other)
    else:
        assert actual == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LBFGS", {}),
        ("SAM", {}),
        ("SparseAdam", {}),
        ("SGD", {"full_state_dict": True}),
        ("AdamW", {"full_state_dict": True, "flatten_optimizer_state_dict": True}),
    ],
)
def test_what_dcp_cannot_do_with_a_bare_base_fails_with_the_wrapper_alike(
    name: str, options: dict[str, Any]
) -> None:
    raised = []
    for make in (bare, wrapped):
        pair = make(CASES[name])
        train(*pair, range(2))
        with pytest.raises(
            (TypeError, RuntimeError, AssertionError, KeyError)
        ) as error:
            resume_with_dcp(pair, make(CASES[name]), StateDictOptions(**options))
        raised.append(error.type)
    assert raised[0] is raised[1]


@every_option
@every_base
def test_dcp_gives_a_fresh_wrapper_a_state_and_leaves_its_weights(
    base: Base, options: dict[str, Any]
) -> None:
    chosen = StateDictOptions(**{**options, "full_state_dict": False})
    case = base, models.heads_on_a_trunk
    plain, (model, optimizer) = bare(case), wrapped(case)
    before = copy.deepcopy(model.state_dict())
    state = get_optimizer_state_dict(model, optimizer, options=chosen)
    assert_same_state(state, get_optimizer_state_dict(*plain, options=chosen))
    assert_equal(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.last is None


def frozen(tasks: int) -> Tasks:
    model = models.heads_on_a_trunk(tasks)
    model.heads[0].requires_grad_(False)
    return model


@every_option
@pytest.mark.parametrize("network", [frozen, models.tied_weights])
def test_dcp_resumes_model_and_optimizer_together(
    network: Callable[[int], Tasks], options: dict[str, Any]
) -> None:
    case, chosen = (BASES["AdamW"], network), StateDictOptions(**options)
    whole, resumed = wrapped(case, tasks=2), wrapped(case, tasks=2)
    train(*whole, range(3), tasks=2)
    saved = get_state_dict(*whole, options=chosen)
    weights, state = through_a_file(saved)
    # The frozen weight is not in the checkpoint, where that is asked for.
    strict = not chosen.ignore_frozen_params
    chosen = StateDictOptions(**{**options, "strict": strict and chosen.strict})
    set_state_dict(
        *resumed, model_state_dict=weights, optim_state_dict=state, options=chosen
    )
    train(*whole, range(3, 6), tasks=2)
    train(*resumed, range(3, 6), tasks=2)
    assert_equal(resumed[0].state_dict(), whole[0].state_dict())


# torch announces the end of submodules=, which has been announced since 2.5.
@pytest.mark.filterwarnings("ignore:Getting submodules only:FutureWarning")
@pytest.mark.parametrize("keep", [True, False])
def test_dcp_gives_the_state_of_a_submodule(keep: bool) -> None:
    options = StateDictOptions(keep_submodule_prefixes=keep)
    states = []
    for model, optimizer in (bare(CASES["AdamW"]), wrapped(CASES["AdamW"])):
        train(model, optimizer, range(2))
        states.append(
            get_optimizer_state_dict(
                model, optimizer, submodules={model.trunk}, options=options
            )
        )
    assert_same_state(states[1], states[0])


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Be the only process of a group."""
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.10's own
def test_dcp_resumes_from_files_and_from_what_rank_0_sends(tmp_path: Path) -> None:
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    whole, resumed, received = (wrapped(CASES["AdamW"], tasks=2) for _ in range(3))
    train(*whole, range(3), tasks=2)
    save(named_states(whole), checkpoint_id=tmp_path / "dcp")
    loaded = named_states(resumed)
    load(loaded, checkpoint_id=tmp_path / "dcp")
    set_state_dict(
        *resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    weights, state = copy.deepcopy(get_state_dict(*whole, options=sent))
    set_state_dict(
        *received, model_state_dict=weights, optim_state_dict=state, options=sent
    )
    for pair in (whole, resumed, received):
        train(*pair, range(3, 6), tasks=2)
    assert_alike(resumed, whole)
    assert_alike(received, whole)


def named_states(pair: Pair) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(*pair), strict=True))


# After a process was killed


class Training:
    """One that goes on from where it was saved: all of a step depends on its number."""

    STEPS = 8

    def __init__(self) -> None:
        self.model = models.make(models.batch_norm, 3)
        self.optimizer = HarmonizedOptimizer(
            AdamW(self.model.parameters(), lr=0.01),
            shared_params=self.model.trunk.parameters(),
        )
        self.scheduler = OneCycleLR(self.optimizer, 0.05, total_steps=self.STEPS)
        self.parts: list[Any] = [self.model, self.optimizer, self.scheduler]
        self.done = 0

    def step(self) -> None:
        """Step once, on two micro-batches."""
        self.optimizer.zero_grad()
        for micro in range(2):
            losses = self.model(*models.batch(3, seed=2 * self.done + micro))
            self.optimizer.backward(losses, accumulate_only=micro == 0)
        self.optimizer.step()
        self.scheduler.step()
        self.done += 1

    def save(self, path: Path, file_type: type[io.FileIO]) -> None:
        """Save so that there is a whole checkpoint at any time."""
        states = [part.state_dict() for part in self.parts]
        with file_type(path.with_suffix(".new"), "w") as file:
            torch.save([self.done, *states], file)
            os.fsync(file.fileno())
        path.with_suffix(".new").replace(path)

    def load(self, path: Path) -> None:
        self.done, *states = torch.load(path, weights_only=True)
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


class Fatal(io.FileIO):
    """A file in the middle of which the process that writes it is killed."""

    limit = 7_000  # of about 14 kB

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.limit:
            super().write(bytes(data)[: self.limit - self.tell()])
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data)


def train_until_killed(path: Path, when: str, threads: int) -> None:
    """Save every second step. Runs in a process of its own."""
    torch.set_num_threads(threads)  # of which the last bits depend
    torch.set_default_dtype(torch.float64)
    training = Training()
    while training.done < Training.STEPS:
        training.step()
        if training.done == 5 and when == "between two steps":
            os.kill(os.getpid(), signal.SIGKILL)
        if training.done % 2 == 0:
            training.save(path, Fatal if training.done == 6 else io.FileIO)


@needs_signals
@pytest.mark.parametrize("when", ["between two steps", "while it saves"])
def test_training_goes_on_bit_identically_after_its_process_is_killed(
    tmp_path: Path, when: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    threads = torch.get_num_threads()
    call = f"train_until_killed(Path({str(path)!r}), {when!r}, {threads})"
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import *; {call}"],
        cwd=Path(__file__).parents[2],
        check=False,
        timeout=600,
    )
    assert child.returncode == -signal.SIGKILL
    half = path.with_suffix(".new")
    assert half.exists() == (when == "while it saves")
    if half.exists():
        assert half.stat().st_size == Fatal.limit
        with pytest.raises((RuntimeError, OSError)):  # as the half of it ends
            torch.load(half, weights_only=True)
    whole, resumed = Training(), Training()
    resumed.load(path)
    assert resumed.done == 4
    for training in (whole, resumed):
        while training.done < Training.STEPS:
            training.step()
    assert_alike((resumed.model, resumed.optimizer), (whole.model, whole.optimizer))
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
