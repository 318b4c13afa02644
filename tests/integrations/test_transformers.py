"""Hugging Face Trainer: a model with a dict of losses, against a literal loop."""

import copy
import importlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    Trainer,
    TrainingArguments,
)

from examples.hf_trainer import LossModel, Rows
from examples.problem import TwoHeads, make_data, task_losses
from ghopt import HarmonizedOptimizer, plain_sum
from ghopt.integrations.transformers import HarmonizedTrainer
from tests.examples import oracle
from tests.examples.oracle import sgd, steps_of, weights, wide
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.usefixtures("fresh_state")

exact = partial(assert_close, rtol=1e-12, atol=1e-12)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "label_names": ["targets"],
    }
    return TrainingArguments(str(folder), **(defaults | options))


def make(
    folder: Path,
    model: nn.Module,
    data: oracle.Batch,
    kind: type[HarmonizedTrainer] = HarmonizedTrainer,
    **options: Any,
) -> HarmonizedTrainer:
    inner = LossModel(model) if isinstance(model, TwoHeads) else model
    return kind(
        inner,
        arguments(folder, **options),
        train_dataset=Rows(*data),
        optimizers=(sgd(model), None),
    )


def heads(seed: int = 0) -> TwoHeads:
    return TwoHeads(seed).double()


@pytest.mark.parametrize(("accumulate", "clip"), [(1, None), (2, 0.5), (4, None)])
def test_conflicting_tasks_train_as_in_a_literal_loop(
    accumulate: int, clip: float | None, tmp_path: Path
) -> None:
    data, model, expected = wide(make_data()), heads(), heads()
    trainer = make(
        tmp_path,
        model,
        data,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip or 0,
    )
    trainer.train()
    steps = steps_of(data, accumulate=accumulate, epochs=3)
    assert oracle.train(expected, steps, clip=clip) > 4
    exact(weights(model), weights(expected))


def test_a_last_step_of_fewer_micro_batches_divides_by_their_number(
    tmp_path: Path,
) -> None:
    data, model, expected = wide(make_data(size=56)), heads(), heads()
    make(tmp_path, model, data, gradient_accumulation_steps=2).train()
    steps = steps_of(data, accumulate=2, epochs=3)
    assert [len(step) for step in steps[:4]] == [2, 2, 2, 1]
    assert oracle.train(expected, steps) > 4
    exact(weights(model), weights(expected))


def test_tasks_that_agree_train_as_on_their_sum(tmp_path: Path) -> None:
    data, model, expected = wide(make_data(conflict=False)), heads(), heads()
    make(
        tmp_path, model, data, gradient_accumulation_steps=2, max_grad_norm=0.5
    ).train()
    steps = steps_of(data, accumulate=2, epochs=3)
    assert oracle.train(expected, steps, harmonize=False, clip=0.5) == 0
    exact(weights(model), weights(expected))


@pytest.mark.parametrize("scale", [None, 1024.0], ids=["bf16", "fp16"])
def test_mixed_precision_trains_as_a_literal_loop_under_autocast(
    scale: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model, expected = make_data(), TwoHeads(), TwoHeads()
    trainer = make(
        tmp_path,
        model,
        data,
        bf16=scale is None,
        fp16=scale is not None,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
    )
    if scale is not None:
        # As in test_accelerated: what is set on a GPU.
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        monkeypatch.setattr(trainer.accelerator, "native_amp", True)
        monkeypatch.setattr(trainer.accelerator, "scaler", scaler)
    trainer.train()
    conflicts = oracle.train(
        expected,
        steps_of(data, accumulate=2, epochs=3),
        clip=0.5,
        autocast=torch.bfloat16 if scale is None else torch.float16,
        scale=scale or 1,
    )
    assert conflicts > 4
    # A rounding of a weight to half precision may fall the other way.
    assert_close(weights(model), weights(expected), rtol=0, atol=1e-5)


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(
    tmp_path: Path,
) -> None:
    data, whole, resumed = wide(make_data()), heads(), heads(seed=1)
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": 5,
    }
    make(tmp_path, whole, data, **options).train()
    checkpoint = tmp_path / "checkpoint-5"
    trainer = make(tmp_path / "other", resumed, data, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 12
    assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_a_second_training_goes_on_with_the_same_optimizer(tmp_path: Path) -> None:
    data, model, expected = wide(make_data()), heads(), heads()
    trainer = make(tmp_path, model, data, num_train_epochs=1)
    trainer.train()
    first = trainer.optimizer
    trainer.train()
    assert trainer.optimizer is first
    assert oracle.train(expected, steps_of(data, epochs=2)) > 4
    exact(weights(model), weights(expected))


def test_the_optimizer_of_the_arguments_is_wrapped_with_the_options_given(
    tmp_path: Path,
) -> None:
    model = LossModel(heads())
    wrap = partial(HarmonizedOptimizer, weighting=plain_sum, project_step=True)
    trainer = HarmonizedTrainer(model, arguments(tmp_path), harmonize=wrap)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, HarmonizedOptimizer)
    assert isinstance(optimizer.base_optimizer, torch.optim.AdamW)
    assert optimizer.weighting is plain_sum
    assert optimizer.project_step
    assert trainer.create_optimizer() is optimizer is trainer.optimizer


class Weighted(nn.Module):
    """Weighs its losses, and returns more than losses in ``loss_dict``.

    Like models for detection: those of earlier layers, what is there for the log, and
    what some models return, the sum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = heads()

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
        outputs = self.heads(inputs)
        up, down = task_losses(outputs, targets).values()
        error = outputs[0] - targets[:, 0]
        losses = {
            "up": up,
            "down": down,
            "up_0": error.abs().mean(),
            "up_aux_1": error.square().square().mean(),
        }
        loss = 0.5 * up + 2 * down + 0.1 * losses["up_0"] + 0.2 * losses["up_aux_1"]
        log = {"error": error.detach().abs().max(), "total": loss}
        return {"loss": loss, "loss_dict": losses | log}


def weighted(model: nn.Module, batch: oracle.MicroBatch) -> list[Tensor]:
    inputs, targets = batch
    up, down = oracle.of_both_heads(model, batch)
    error = model(inputs)[0] - targets[:, 0]
    return [0.5 * up + (0.1 * error.abs() + 0.2 * error**4).mean(), 2 * down]


def test_losses_have_the_weights_of_the_model_and_earlier_layers_are_no_tasks(
    tmp_path: Path,
) -> None:
    data, model, expected = wide(make_data()), Weighted(), heads()
    trainer = make(tmp_path, model, data, gradient_accumulation_steps=2)
    trainer.train()
    steps = steps_of(data, accumulate=2, epochs=3)
    assert oracle.train(expected, steps, losses_of=weighted) > 3
    exact(weights(model.heads), weights(expected))
    optimizer: Any = trainer.optimizer
    assert optimizer.optimizer.last.names == ("up", "down")


def test_only_numbered_losses_belong_to_the_shortest_name_that_they_begin_with(
    tmp_path: Path,
) -> None:
    names = ["a", "a_b", "a_1", "a_1_2", "a_b_1", "ab_1"]
    losses = {name: torch.ones((), requires_grad=True) for name in names}
    trainer = make(tmp_path, heads(), make_data())
    found = trainer.losses({"loss_dict": losses}, {})
    tasks = {name: len(part) for name, part in found.items()}
    assert tasks == {"a": 4, "a_b": 1, "ab_1": 1}


def test_a_loss_dict_without_a_loss_is_summed(tmp_path: Path) -> None:
    class Bare(LossModel):
        def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Any]:
            return {"loss_dict": super().forward(inputs, targets)["loss_dict"]}

    data, model, expected = wide(make_data()), heads(), heads()
    trainer = make(tmp_path, Bare(model), data)
    trainer.train()
    assert oracle.train(expected, steps_of(data, epochs=3)) > 4
    exact(weights(model), weights(expected))
    assert trainer.evaluate(Rows(*data))["eval_loss"] == pytest.approx(
        sum(loss.item() for loss in task_losses(model(data[0]), data[1]).values())
    )


def detection() -> tuple[nn.Module, list[dict[str, Any]]]:
    """Give a small DETR with auxiliary losses, and six images."""
    backbone: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "layer_type": "basic",
        "out_features": ["stage2"],
    }
    without_timm: dict[str, Any] = {
        "use_timm_backbone": False,
        "backbone_config": ResNetConfig(**backbone),
    }
    config = DetrConfig(
        **without_timm,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=4,
        auxiliary_loss=True,
        dropout=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DetrForObjectDetection(config)
        images = torch.randn(6, 3, 32, 32)
        boxes = torch.rand(6, 1, 4) / 2
    labels = [{"class_labels": torch.tensor([1]), "boxes": box} for box in boxes]
    pairs = zip(images, labels, strict=True)
    return model, [{"pixel_values": image, "labels": label} for image, label in pairs]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    images = torch.stack([row["pixel_values"] for row in rows])
    return {"pixel_values": images, "labels": [row["labels"] for row in rows]}


@pytest.fixture
def _wide_by_default() -> Iterator[None]:
    """DETR makes tensors of the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_wide_by_default")
def test_detr_has_three_tasks_and_on_their_sum_trains_as_with_the_plain_trainer(
    tmp_path: Path,
) -> None:
    model, rows = detection()
    plain = copy.deepcopy(model)
    options = arguments(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    given: dict[str, Any] = {"train_dataset": rows, "data_collator": collate}
    wrap = partial(HarmonizedOptimizer, weighting=plain_sum)
    trainer = HarmonizedTrainer(model, options, harmonize=wrap, **given)
    result = trainer.train()
    expected = Trainer(plain, options, **given).train()
    assert trainer.model_accepts_loss_kwargs
    exact(weights(model), weights(plain))
    assert result.training_loss == pytest.approx(expected.training_loss)
    optimizer: Any = trainer.optimizer
    assert optimizer.optimizer.last.names == ("loss_ce", "loss_bbox", "loss_giou")


class Outputs(nn.Module):
    """Returns outputs, and takes whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = heads()

    def forward(
        self, inputs: Tensor, labels: Tensor, **more: Any
    ) -> tuple[Tensor, ...]:
        assert not more  # nor is it told the number of items
        del labels
        up, down = self.heads(inputs)
        return up, down


class Labelled(Rows):
    """The targets are called labels, which the Trainer counts."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.targets[index]}


class OfOutputs(HarmonizedTrainer):
    """Makes the losses of outputs and inputs."""

    def losses(
        self, outputs: Any, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor | list[Tensor]]:
        up, down = task_losses(outputs, inputs["labels"]).values()
        return {"up": [0.25 * up, 0.75 * up], "down": down}


def test_losses_of_outputs_are_divided_once_whatever_the_model_takes(
    tmp_path: Path,
) -> None:
    data, model, expected = wide(make_data()), Outputs(), heads()
    trainer = OfOutputs(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2, label_names=["labels"]),
        train_dataset=Labelled(*data),
        optimizers=(sgd(model), None),
    )
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    steps = steps_of(data, accumulate=2, epochs=3)
    assert oracle.train(expected, steps) > 4
    exact(weights(model.heads), weights(expected))
    losses = task_losses(model.heads(data[0]), data[1])
    assert trainer.evaluate(Labelled(*data))["eval_loss"] == pytest.approx(
        sum(loss.item() for loss in losses.values())
    )


class Tokens(nn.Module):
    """Two losses on the labels that are not -100, divided by the number it is told."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head = nn.Linear(6, 3).double()

    def forward(
        self, inputs: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None
    ) -> dict[str, Any]:
        assert num_items_in_batch is not None
        first, second = tokens(self, (inputs, labels, num_items_in_batch))
        return {"loss": first + second, "loss_dict": {"a": first, "b": second}}

    accepts_loss_kwargs = True


def tokens(model: nn.Module, batch: oracle.MicroBatch) -> list[Tensor]:
    inputs, labels, items = batch
    logits = model.get_submodule("head")(inputs)
    opposed = torch.where(labels == -100, labels, 2 - labels)
    return [
        cross_entropy(logits, targets, reduction="sum") / items
        for targets in (labels, opposed)
    ]


class Scaled(HarmonizedTrainer):
    """Its losses are divided by ``num_items_in_batch``."""

    loss_is_scaled_for_ga = True


def token_data() -> oracle.Batch:
    inputs, _ = make_data()
    labels = (inputs[:, 0] > 0).long() * 2
    labels[3:20] = -100
    return inputs.double(), labels


def token_steps(size: int) -> oracle.Steps:
    """Give the micro-batches twice the number of items that halves them again."""
    steps = []
    for step in steps_of(token_data(), size, accumulate=2, epochs=3):
        items = sum((labels != -100).sum() for _, labels in step) / len(step)
        steps.append([(*batch, torch.as_tensor(items)) for batch in step])
    return steps


def test_losses_that_the_model_divides_are_divided_by_no_one_else(
    tmp_path: Path,
) -> None:
    model, expected = Tokens(), Tokens()
    trainer = Scaled(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2, label_names=["labels"]),
        train_dataset=Labelled(*token_data()),
        optimizers=(sgd(model), None),
    )
    trainer.train()
    assert oracle.train(expected, token_steps(8), losses_of=tokens) > 4
    exact(weights(model), weights(expected))


def test_evaluation_takes_the_loss_of_the_model(tmp_path: Path) -> None:
    data, model = wide(make_data()), Weighted()
    trainer = make(tmp_path, model, data)
    found = trainer.evaluate(Rows(*data))["eval_loss"]
    # The mean over batches of one size.
    losses = [
        loss.item()
        for (batch,) in steps_of(data)
        for loss in weighted(model.heads, batch)
    ]
    assert found == pytest.approx(2 * sum(losses) / len(losses))


class Returning(nn.Module):
    """Returns what it is told to."""

    outputs: Any

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, inputs: Tensor, targets: Tensor) -> Any:
        del inputs, targets
        return type(self).outputs(self.weight)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda w: {"loss": w.sum()}, r"a loss_dict, got \['loss'\]"),
        (lambda w: (w.sum(),), "a loss_dict, got <class 'tuple'>"),
        (lambda _: {"loss_dict": {}}, r"a loss_dict, got \['loss_dict'\]"),
        (
            lambda w: {"loss": w.sum(), "loss_dict": {"a": w[0] * 1}},
            "must be made of outputs.*return the losses with the weights",
        ),
    ],
)
def test_outputs_without_losses_of_tasks_are_refused(
    outputs: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Returning, "outputs", outputs, raising=False)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, Returning(), make_data()).train()


def test_losses_that_are_no_mapping_are_refused(tmp_path: Path) -> None:
    class Listed(HarmonizedTrainer):
        def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Any:
            return [*super().losses(outputs, inputs).values()]

    with pytest.raises(TypeError, match=r"must return a dict.*list"):
        make(tmp_path, heads(), wide(make_data()), Listed).train()


def test_an_optimizer_that_is_not_wrapped_is_refused(tmp_path: Path) -> None:
    class Own(HarmonizedTrainer):
        def create_optimizer(self, *_: Any, **__: Any) -> Any:
            return self.optimizer

    trainer = make(tmp_path, heads(), wide(make_data()), Own)
    with pytest.raises(TypeError, match="must give a HarmonizedOptimizer, got SGD"):
        trainer.train()
    assert "backward" not in vars(trainer.accelerator)


def test_arguments_that_make_one_loss_of_the_outputs_are_refused(
    tmp_path: Path,
) -> None:
    model = LossModel(heads())
    with pytest.raises(ValueError, match=r"compute_loss_func must be None, got <built"):
        HarmonizedTrainer(model, arguments(tmp_path), compute_loss_func=sum)
    model.config = SimpleNamespace(problem_type=None)  # type: ignore[assignment]
    smooth = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0\.1"):
        HarmonizedTrainer(model, smooth)


def test_processes_that_do_not_run_ddp_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path, heads(), wide(make_data()))
    state = trainer.accelerator.state
    monkeypatch.setitem(state.__dict__, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="must run DDP, got FSDP"):
        trainer._refuse()
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(ValueError, match="n_gpu must be 1, got 2: start a process"):
        trainer._refuse()


def test_without_transformers_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "ghopt.integrations.transformers")
    with pytest.raises(ImportError, match=r'pip install "ghopt\[transformers\]"'):
        importlib.import_module("ghopt.integrations.transformers")


def train_on_a_rank(folder: Path) -> list[list[list[float]]]:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "ddp_backend": "gloo",
    }
    fitted = []
    # What the Trainer takes for models of transformers, and for others.
    for find in (True, False):
        model = heads()
        trainer = make(
            folder,
            model,
            wide(make_data()),
            ddp_find_unused_parameters=find,
            **options,
        )
        assert trainer.accelerator.num_processes == 2
        trainer.train()
        fitted.append(weights(model))
    told = Tokens()
    Scaled(
        told,
        arguments(folder, **(options | {"max_grad_norm": 0})),
        train_dataset=Labelled(*token_data()),
        optimizers=(sgd(told), None),
    ).train()
    return [[w.flatten().tolist() for w in ws] for ws in (*fitted, weights(told))]


@pytest.mark.slow
def test_two_ranks_train_as_one_process_on_all_data(tmp_path: Path) -> None:
    ranks = run_on_ranks(2, train_on_a_rank, tmp_path, timeout=None)
    # Batches go to the ranks in turn, so each step is on 16 rows in a row.
    expected, told = heads(), Tokens()
    steps = steps_of(wide(make_data()), 16, accumulate=2, epochs=3)
    assert oracle.train(expected, steps, clip=0.5) > 2
    assert oracle.train(told, token_steps(16), losses_of=tokens) > 2
    for fitted in ranks:
        for found, model in zip(fitted, [expected, expected, told], strict=True):
            flat = [weight.flatten().tolist() for weight in weights(model)]
            exact(found, flat)
