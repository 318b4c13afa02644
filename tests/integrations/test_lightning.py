"""Lightning: a module that returns its losses, against a literal loop."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from examples.lightning_module import TwoHeadsModule
from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer
from ghopt.integrations.lightning import HarmonizedModule
from tests.examples import oracle
from tests.examples.oracle import decay, sgd, steps_of, weights, wide
from tests.ranks import run_on_ranks

pytestmark = [
    # Lightning 2.6 asks for a class of torch that 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # On a machine with many cores Lightning wants more of them for 64 rows.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

exact = partial(assert_close, rtol=1e-12, atol=1e-12)


def make(**options: Any) -> lightning.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(**(defaults | options))


def train(
    module: lightning.LightningModule,
    data: oracle.Batch,
    path: Path | None = None,
    **options: Any,
) -> lightning.Trainer:
    trainer = make(**options)
    trainer.fit(module, load(data), ckpt_path=path, weights_only=True)
    return trainer


def load(data: oracle.Batch) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*data), batch_size=8)


def heads() -> TwoHeads:
    return TwoHeads().double()


class Plain(lightning.LightningModule):
    """A module of another package, with an optimizer of its own."""

    def __init__(
        self,
        model: TwoHeads | None = None,
        wrap: Callable[[Optimizer], Optimizer] = HarmonizedOptimizer,
    ) -> None:
        super().__init__()
        self.model = heads() if model is None else model
        self.wrap = wrap

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        del batch_idx
        inputs, targets = batch
        return task_losses(self.model(inputs), targets)

    def configure_optimizers(self) -> Optimizer:
        return self.wrap(sgd(self.model))


class Mixed(HarmonizedModule, Plain):
    """The same, harmonized."""


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_conflicting_tasks_train_as_in_a_literal_loop(
    accumulate: int, clip: float | None
) -> None:
    data, expected = wide(make_data()), heads()
    module = TwoHeadsModule(heads())
    train(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    steps = steps_of(data, accumulate=accumulate, epochs=3)
    assert oracle.train(expected, steps, clip=clip, make_scheduler=decay) > 4
    exact(weights(module.model), weights(expected))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_tasks_that_agree_train_as_on_their_sum(accumulate: int) -> None:
    data, expected = wide(make_data(conflict=False)), heads()
    module = TwoHeadsModule(heads())
    train(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    steps = steps_of(data, accumulate=accumulate, epochs=3)
    conflicts = oracle.train(
        expected, steps, harmonize=False, clip=0.5, make_scheduler=decay
    )
    assert conflicts == 0
    exact(weights(module.model), weights(expected))


def times(factor: float) -> Callable[[nn.Module, oracle.MicroBatch], list[Tensor]]:
    def losses_of(model: nn.Module, batch: oracle.MicroBatch) -> list[Tensor]:
        return [factor * loss for loss in oracle.of_both_heads(model, batch)]

    return losses_of


def test_a_last_step_of_fewer_micro_batches_divides_as_lightning_does() -> None:
    data, expected = wide(make_data(size=24)), heads()
    module = Mixed()
    train(module, data, accumulate_grad_batches=2, max_epochs=1)
    first, last = steps_of(data, accumulate=2)
    optimizer = sgd(expected)
    oracle.train(expected, [first], optimizer=optimizer)
    oracle.train(expected, [last], losses_of=times(0.5), optimizer=optimizer)
    exact(weights(module.model), weights(expected))


class Skipping(Mixed):
    """Has no losses in every second batch."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


def test_where_the_last_batch_is_skipped_the_others_are_harmonized_and_clipped() -> (
    None
):
    data, expected, module = wide(make_data()), heads(), Skipping()
    with pytest.warns(UserWarning, match="returned `None`"):
        train(module, data, accumulate_grad_batches=2, gradient_clip_val=0.5)
    steps = [step[:1] for step in steps_of(data, accumulate=2, epochs=3)]
    assert oracle.train(expected, steps, clip=0.5, losses_of=times(0.5)) > 4
    exact(weights(module.model), weights(expected))


class OwnStep(Mixed):
    """Steps by itself, as Lightning's documentation shows it."""

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        del epoch, batch_idx
        optimizer.step(closure=optimizer_closure)


def test_a_step_of_ones_own_is_harmonized_late_and_clipped() -> None:
    data, expected, module = wide(make_data()), heads(), OwnStep()
    train(module, data, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert oracle.train(expected, steps_of(data, accumulate=2, epochs=3), clip=0.5) > 4
    exact(weights(module.model), weights(expected))


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["bf16", "fp16"])
def test_mixed_precision_trains_as_a_literal_loop_under_autocast(
    scale: float | None,
) -> None:
    data, expected = make_data(), TwoHeads()
    # A Trainer on the CPU replaces "16-mixed" by bfloat16, unless it is given the plugin.
    if scale is None:
        plugin = MixedPrecision("bf16-mixed", "cpu")
    else:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = TwoHeadsModule(TwoHeads())
    train(
        module,
        data,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        plugins=[plugin],
    )
    conflicts = oracle.train(
        expected,
        steps_of(data, accumulate=2, epochs=3),
        clip=0.5,
        make_scheduler=decay,
        autocast=torch.bfloat16 if scale is None else torch.float16,
        scale=scale or 1,
    )
    assert conflicts > 4
    # A rounding of a weight to half precision may fall the other way.
    assert_close(weights(module.model), weights(expected), rtol=0, atol=1e-5)


def test_a_loss_scale_that_overflows_is_halved_until_training_goes_on() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = TwoHeadsModule(TwoHeads())
    before = weights(module.model)
    # Lightning steps the scheduler all the same.
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        train(module, make_data(), accumulate_grad_batches=2, plugins=[plugin])
    assert scaler.get_scale() < 2.0**22
    after = weights(module.model)
    assert all(weight.isfinite().all() for weight in after)
    assert not any(a.equal(b) for a, b in zip(before, after, strict=True))


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path,
) -> None:
    data, path = wide(make_data()), tmp_path / "last.ckpt"
    whole, first, second = (TwoHeadsModule(heads()) for _ in range(3))
    train(whole, data, accumulate_grad_batches=2)
    trainer = train(first, data, accumulate_grad_batches=2, max_epochs=1)
    trainer.save_checkpoint(path)
    trainer = train(second, data, path, accumulate_grad_batches=2)
    assert trainer.global_step == 12
    assert_close(weights(second.model), weights(whole.model), rtol=0, atol=0)


def closure_of(model: nn.Module, batch: oracle.MicroBatch) -> Callable[[], Any]:
    return lambda: oracle.of_both_heads(model, batch)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda base: HarmonizedOptimizer(base, project_step=True),
        lambda base: HarmonizedOptimizer(base, measure_every=3),
        lambda base: HarmonizedOptimizer(
            LBFGS(base.param_groups[0]["params"], lr=0.1, max_iter=4)
        ),
    ],
    ids=["project_step", "measure_every", "L-BFGS"],
)
def test_options_and_bases_do_what_they_do_in_a_plain_loop(
    wrap: Callable[[Optimizer], HarmonizedOptimizer],
) -> None:
    data, expected, module = wide(make_data()), heads(), Mixed(wrap=wrap)
    train(module, data, max_epochs=2)
    optimizer = wrap(sgd(expected))
    for (batch,) in steps_of(data, epochs=2):
        optimizer.step(closure_of(expected, batch))
    exact(weights(module.model), weights(expected))


class Groups(Mixed):
    """Has a third task in every second batch, of two scalars."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        losses = {**super().training_step(batch, batch_idx)}
        if batch_idx % 2:
            losses["size"] = [p.square().sum() for p in self.model.trunk.parameters()]
        return losses


def test_tasks_of_several_scalars_may_come_and_go_and_are_shown_to_callbacks() -> None:
    shown = []

    class Show(lightning.Callback):
        def on_train_batch_end(self, *args: Any, **_: Any) -> None:
            outputs = args[2]
            assert not any(output.requires_grad for output in outputs.values())
            shown.append(outputs)

    data, expected, module = wide(make_data(size=32)), heads(), Groups()
    train(module, data, accumulate_grad_batches=2, max_epochs=1, callbacks=[Show()])
    optimizer = HarmonizedOptimizer(sgd(expected))
    for number, ((inputs, targets),) in enumerate(steps_of(data)):
        losses = task_losses(expected(inputs), targets)
        if number % 2:
            weight, bias = expected.trunk.parameters()
            losses["size"] = weight.square().sum() + bias.square().sum()
        total = torch.stack([*losses.values()]).sum() / 2
        exact(shown[number], {"loss": total.detach(), **losses}, check_layout=False)
        halves = {name: loss / 2 for name, loss in losses.items()}
        optimizer.backward(halves, accumulate_only=number % 2 == 0)
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    exact(weights(module.model), weights(expected))


class Three(HarmonizedModule):
    """In the first step one pair of three is opposed, in the second none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        del batch
        x, y = self.weight
        rest = {0: {"b": y, "c": -2 * y}, 1: {"b": y}, 2: {}}
        return {"a": x, **rest[batch_idx]}

    def configure_optimizers(self) -> Optimizer:
        return HarmonizedOptimizer(SGD(self.parameters(), lr=0.1))


class Lines(Logger):
    """Keeps what is logged, by step."""

    name, version = "lines", 0

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int | None, float] = {}

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None
    ) -> None:
        self.found[step] = metrics["conflict"]

    def log_hyperparams(self, *_: Any) -> None:
        pass


def test_the_share_of_opposed_pairs_is_logged() -> None:
    lines = Lines()
    data = make_data(size=24)
    train(Three(), data, max_epochs=1, logger=lines, log_every_n_steps=1)
    # A single task has no pairs; Lightning logs the last value again.
    assert lines.found == pytest.approx({0: 1 / 3, 1: 0, 2: 0})


def test_what_a_step_found_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(Mixed, "log_conflict", lambda _, found: told.append(found))
    module = Mixed(wrap=lambda base: HarmonizedOptimizer(base, measure_every=2))
    train(module, wide(make_data()), max_epochs=1, accumulate_grad_batches=2)
    assert [found.names for found in told] == [("up", "down")] * 2
    assert told[0] is not told[1]


class Further(Mixed):
    """Adds to what the class above it returns."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        losses = super().training_step(batch, batch_idx)
        assert losses.keys() == {"up", "down"}
        assert all(loss.requires_grad for loss in losses.values())
        return losses


class Reversed(Plain, HarmonizedModule):
    """Mixed in from the right."""


class Inherited(Mixed):
    """Defines nothing."""


@pytest.mark.parametrize("kind", [Mixed, Reversed, Further, Inherited])
def test_modules_of_others_are_harmonized_whatever_the_order_of_the_classes(
    kind: Callable[[], Plain],
) -> None:
    data, expected, module = wide(make_data()), heads(), kind()
    train(module, data, accumulate_grad_batches=2)
    assert oracle.train(expected, steps_of(data, accumulate=2, epochs=3)) > 4
    exact(weights(module.model), weights(expected))


def test_a_validation_step_may_call_the_training_step() -> None:
    seen = []

    class Validated(Mixed):
        def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
            seen.append(self.training_step(batch, 0))

    data, expected, module = wide(make_data()), heads(), Validated()
    make(max_epochs=2).fit(module, load(data), load(data))
    assert {"up", "down"} == seen[-1].keys()
    oracle.train(expected, steps_of(data, epochs=2))
    exact(weights(module.model), weights(expected))


class OneArgument(TwoHeadsModule):
    """Asks for the batch alone, as Lightning allows."""

    def training_step(  # type: ignore[override]  # it is what Lightning allows
        self, batch: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        return super().training_step(batch, 0)


def test_a_compiled_module_trains_as_it_does_by_itself() -> None:
    data, expected, module = wide(make_data()), heads(), OneArgument(heads())
    compiled = torch.compile(module, backend="aot_eager")
    train(cast(OneArgument, compiled), data, accumulate_grad_batches=2, max_epochs=1)
    steps = steps_of(data, accumulate=2)
    assert oracle.train(expected, steps, make_scheduler=decay) > 2
    exact(weights(module.model), weights(expected))


class Returning(Mixed):
    """Returns what it is told to."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return self.change(super().training_step(batch, batch_idx))

    def change(self, losses: Mapping[str, Tensor]) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda losses: sum(losses.values()), TypeError, "a dict of losses.*Tensor"),
        (lambda losses: [*losses.values()], TypeError, "a dict of losses.*list"),
        (lambda losses: {"loss": losses["up"]}, ValueError, r"'loss', got \['loss'\]"),
        (lambda _: {"up": 1.0}, TypeError, r"losses\['up'\] must be a tensor"),
        (lambda _: {}, ValueError, "losses must hold at least one"),
    ],
)
def test_what_are_no_losses_of_tasks_is_refused(
    change: Callable[[Any], Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Returning, "change", lambda _, losses: change(losses))
    module = Returning()
    before = weights(module.model)
    with pytest.raises(error, match=message):
        train(module, wide(make_data()))
    assert_close(weights(module.model), before, rtol=0, atol=0)


def test_an_optimizer_that_is_not_wrapped_is_refused() -> None:
    module = Mixed(wrap=lambda base: base)
    with pytest.raises(TypeError, match="must return one HarmonizedOptimizer, got SGD"):
        train(module, wide(make_data()))


def test_a_strategy_that_wraps_the_module_in_anything_but_ddp_is_refused() -> None:
    module = Mixed()
    strategy = type("FSDPStrategy", (), {})()
    module._trainer = cast(Any, SimpleNamespace(model=nn.Identity(), strategy=strategy))
    with pytest.raises(TypeError, match="'ddp', got FSDPStrategy"):
        module._replica()


class Manual(Plain):
    """Optimizes by hand, without a class of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = cast(HarmonizedOptimizer, self.optimizers())
        losses = super().training_step(batch, batch_idx)
        optimizer.backward(losses, backward_fn=self.manual_backward)
        optimizer.step()
        optimizer.zero_grad()


class ManualMixed(HarmonizedModule, Manual):
    """Needs no class of ours, and has one."""


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["float64", "fp16"])
def test_manual_optimization_takes_three_lines(scale: float | None) -> None:
    data, module, expected = make_data(), Manual(), TwoHeads()
    options: dict[str, Any] = {}
    atol = 1e-5
    if scale is None:
        data, expected, atol = wide(data), expected.double(), 1e-12
    else:
        module.model = TwoHeads()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    train(module, data, **options)
    autocast = None if scale is None else torch.float16
    steps = steps_of(data, epochs=3)
    assert oracle.train(expected, steps, autocast=autocast, scale=scale or 1) > 4
    assert_close(weights(module.model), weights(expected), rtol=0, atol=atol)


def test_manual_optimization_of_a_harmonized_module_is_refused() -> None:
    with pytest.raises(RuntimeError, match="automatic_optimization must be True"):
        train(ManualMixed(), wide(make_data()))


def test_ghopt_itself_imports_no_framework() -> None:
    code = (
        "import sys, ghopt, ghopt.integrations; "
        "print({'lightning', 'transformers', 'accelerate'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout.strip() == b"set()"


def test_without_lightning_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "ghopt.integrations.lightning")
    with pytest.raises(ImportError, match=r'pip install "ghopt\[lightning\]"'):
        importlib.import_module("ghopt.integrations.lightning")


def fit_on_a_rank() -> list[list[list[float]]]:
    data = TensorDataset(*wide(make_data()))
    rank = int(os.environ["RANK"])
    sampler: DistributedSampler[tuple[Tensor, ...]]
    sampler = DistributedSampler(data, 2, rank, shuffle=False)

    def fit(kind: type[Plain], *, find: bool, **options: Any) -> list[list[float]]:
        module = kind()
        ddp = DDPStrategy(find_unused_parameters=find, process_group_backend="gloo")
        # The sampler that Lightning would take shuffles.
        trainer = make(
            devices=2, strategy=ddp, use_distributed_sampler=False, **options
        )
        trainer.fit(module, DataLoader(data, batch_size=8, sampler=sampler))
        return [weight.flatten().tolist() for weight in weights(module.model)]

    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    fitted = [fit(Mixed, find=find, **options) for find in (False, True)]
    with pytest.raises(RuntimeError, match="no_sync"):
        fit(OwnStep, find=False, **options)
    return [*fitted, fit(Manual, find=True)]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_on_all_data() -> None:
    ranks = run_on_ranks(2, fit_on_a_rank, timeout=None)
    # The ranks deal the rows out in turn, so each step is on 16 rows in a row.
    data, expected, manual = wide(make_data()), heads(), heads()
    steps = steps_of(data, 16, accumulate=2, epochs=3)
    assert oracle.train(expected, steps, clip=0.5) > 2
    assert oracle.train(manual, steps_of(data, 16, epochs=3)) > 2
    for fitted in ranks:
        for found, model in zip(fitted, [expected, expected, manual], strict=True):
            flat = [weight.flatten().tolist() for weight in weights(model)]
            exact(found, flat)
