"""CDAN+E as published: against a slow transcription of it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.uda import published as command
from benchmarks.uda.data import Batch, Task, batches
from benchmarks.uda.data.published import load_whole
from benchmarks.uda.methods import published_cdan as methods
from benchmarks.uda.methods.networks import Networks
from benchmarks.uda.methods.published_cdan import CdanTraining, build_cdan, cdan_pair
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import Config
from benchmarks.uda.runs import published as runs
from benchmarks.uda.runs.published import key_of_published, run
from tests.benchmarks.modules import values, without_dropout

STEPS = 20
RISE = 100
"""In place of the published 10 000, so that the reversals matter within so few steps."""


@pytest.fixture
def task(large_task: Task) -> Task:
    return large_task


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (methods.RISE, methods.HIDDEN) == (10_000, 500)
    monkeypatch.setattr(methods, "EPOCH", 2)
    monkeypatch.setattr(methods, "HIDDEN", 16)  # fast
    monkeypatch.setattr(methods, "RISE", RISE)


def config_of(rule: str = "sum", task: str = "usps-mnist") -> Config:
    (config,) = command.make_configs(task, ["CDAN+E"], [rule], 1, STEPS)
    return replace(config, batch_size=8)


def exact(config: Config) -> CdanTraining:
    training = CdanTraining(config)
    without_dropout(training.networks.double())
    return training


def reversed_by(coefficient: float) -> Callable[[Tensor], Tensor]:
    return lambda gradient: -coefficient * gradient


def rising(count: int) -> float:
    return 2 / (1 + math.exp(-10 * count / RISE)) - 1


def alignment_literally(
    networks: Networks, features: Tensor, said: Tensor, calls: int, steps: int
) -> Tensor:
    """The published loss, whose gradients are reversed by hooks."""
    outer = torch.bmm(said.detach().unsqueeze(2), features.unsqueeze(1))
    seen = outer.view(len(said), -1) * 1.0
    seen.register_hook(reversed_by(rising(calls)))  # type: ignore[no-untyped-call]  # torch's
    domain = networks.discriminator(seen).sigmoid()
    truth = torch.tensor([[1.0]] * 8 + [[0.0]] * 8, dtype=torch.float64)
    entropy = (-said * torch.log(said + 1e-5)).sum(1)
    entropy.register_hook(reversed_by(rising(steps)))  # type: ignore[no-untyped-call]  # torch's
    certainty = 1 + torch.exp(-entropy)
    source, target = certainty.clone(), certainty.clone()
    source[8:] = 0
    target[:8] = 0
    weight = source / source.sum().item() + target / target.sum().item()
    loss = F.binary_cross_entropy(domain, truth, reduction="none")
    return (weight.view(-1, 1) * loss).sum() / weight.sum().item()


def cdan_literally(stream: list[Batch], decay_epoch: int) -> Networks:
    networks = build_cdan(0).double()
    without_dropout(networks)
    model = [*networks.generator.parameters(), *networks.heads.parameters()]
    settings = {"lr": 0.01, "weight_decay": 5e-4, "momentum": 0.9}
    sgd, adversary = (
        SGD(parameters, **settings)  # type: ignore[arg-type]  # floats by name
        for parameters in (model, [*networks.discriminator.parameters()])
    )
    calls = 0
    for epoch in range(1, len(stream) // 2 + 1):
        if epoch % decay_epoch == 0:
            sgd.param_groups[0]["lr"] *= 0.5
        for number in range(2):
            batch = stream[2 * (epoch - 1) + number]
            sgd.zero_grad()
            adversary.zero_grad()
            features = networks.generator(torch.cat([batch.source, batch.target]))
            logits = networks.heads[0](features)
            loss = F.cross_entropy(logits[:8], batch.labels)
            if epoch > 1:
                calls += 1
                steps = 2 * (epoch - 1) + number
                said = logits.softmax(1)
                loss = loss + alignment_literally(
                    networks, features, said, calls, steps
                )
            torch.autograd.backward(loss)
            sgd.step()
            if epoch > 1:
                adversary.step()
    return networks


@pytest.mark.parametrize(("name", "every"), [("usps-mnist", 6), ("mnist-usps", 5)])
def test_the_steps_of_ten_epochs_are_the_published_ones(
    name: str, every: int, task: Task
) -> None:
    stream = [
        Batch(one.source.double(), one.labels, one.target.double())
        for one in batches(task, 8, STEPS, seed=0)
    ]
    training = exact(config_of(task=name))
    for batch in stream:
        training.step(batch)
    ours = training.networks.state_dict()
    theirs = cdan_literally(stream, every).state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-9, atol=1e-12)


def test_the_networks_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "HIDDEN", 500)
    networks = build_cdan(0)
    leaves = [one for one in networks.generator.modules() if not [*one.children()]]
    assert [str(one).split(", stride")[0] for one in leaves[1:]] == [
        "Conv2d(1, 20, kernel_size=(5, 5)",
        "MaxPool2d(kernel_size=2",
        "ReLU()",
        "Conv2d(20, 50, kernel_size=(5, 5)",
        "Dropout2d(p=0.5, inplace=False)",
        "MaxPool2d(kernel_size=2",
        "ReLU()",
        "Flatten(start_dim=1, end_dim=-1)",
        "Linear(in_features=800, out_features=500, bias=True)",
        "ReLU()",
        "Dropout(p=0.5, inplace=False)",
    ]
    assert (
        str(networks.heads[0]) == "Linear(in_features=500, out_features=10, bias=True)"
    )
    layers = [type(one).__name__ for one in networks.discriminator.children()]
    hidden = ["Linear", "ReLU", "Dropout"]
    assert layers == [*hidden, *hidden, "Linear"]
    for linear in networks.discriminator.children():
        if isinstance(linear, nn.Linear):
            # Xavier's, normal: a uniform one of the same variance would end at 1.7.
            scale = math.sqrt(2 / (linear.in_features + linear.out_features))
            assert float(linear.weight.detach().std()) == pytest.approx(scale, rel=0.1)
            assert float(linear.weight.detach().abs().max()) > 2 * scale
            assert not linear.bias.any()
    counts = [
        sum(one.numel() for one in part.parameters())
        for part in (networks.generator, networks.heads, networks.discriminator)
    ]
    assert counts == [426_070, 5010, 2_751_501]


def test_g_takes_the_step_of_gh_and_all_else_that_of_the_sum(task: Task) -> None:
    config = replace(config_of("gh"), momentum=0.0, weight_decay=0.0)
    training = exact(config)
    networks = training.networks
    conflicts = 0
    for done, one in enumerate(batches(task, 8, STEPS, seed=0)):
        batch = Batch(one.source.double(), one.labels, one.target.double())
        before = values(networks)
        pair = cdan_pair(networks, batch, done)
        gradients = [
            torch.autograd.grad(
                loss, list(networks.parameters()), retain_graph=True, allow_unused=True
            )
            for loss in pair
        ]
        training.step(batch)
        if done < 2:  # the first epoch has one loss
            continue
        count = len(list(networks.generator.parameters()))
        flat = [torch.cat([g.flatten() for g in own[:count]]) for own in gradients]
        product = float(flat[0] @ flat[1])
        weights = [1 + max(0.0, -product) / float(own @ own) for own in flat]
        conflicts += product < 0
        for place, parameter in enumerate(networks.parameters()):
            factors = weights if place < count else [1.0, 1.0]
            step = torch.zeros_like(parameter)
            for factor, own in zip(factors, gradients, strict=True):
                found = own[place]
                step = step if found is None else step + factor * found
            rate = 0.01 / 2 ** ((1 + done // 2) // 6 if place < count + 2 else 0)
            torch.testing.assert_close(before[place] - parameter, rate * step)
    assert conflicts


def test_alignment_comes_first(task: Task) -> None:
    networks = exact(config_of()).networks
    one = next(batches(task, 8, 1, seed=0))
    batch = Batch(one.source.double(), one.labels, one.target.double())
    features = networks.generator(torch.cat([batch.source, batch.target]))
    logits = networks.heads[0](features)
    alignment = alignment_literally(networks, features, logits.softmax(1), 5, 6)
    pair = cdan_pair(networks, batch, 6)
    torch.testing.assert_close(pair.alignment, alignment)
    expected = F.cross_entropy(logits[:8], batch.labels)
    torch.testing.assert_close(pair.classification, expected)


def test_each_epoch_is_evaluated() -> None:
    (config,) = command.make_configs("usps-mnist", ["CDAN+E"], ["sum"], 1)
    evaluated = [
        done for done in range(1, config.steps + 1) if config.is_evaluated(done)
    ]
    assert evaluated == [937 * epoch for epoch in range(1, 51)]


def test_the_rules_find_the_same_first_pair(task: Task) -> None:
    stream = [*batches(task, 8, 6, seed=0)]
    trainings = {rule: CdanTraining(config_of(rule)) for rule in RULES}
    for rule, training in trainings.items():
        build_cdan(7)  # the same drops
        for batch in stream:
            training.step(batch)
        training.state()
        # The first epoch has one loss.
        assert len(training.rows) == 4, rule
    first = [training.rows[0] for training in trainings.values()]
    assert all(row == first[0] for row in first)


def test_it_trains_on_all_images_cut_as_usual(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, task: Task
) -> None:
    asked: list[object] = []

    def load(*given: object, exact: bool) -> Task:
        asked.extend([*given, exact])
        return task

    monkeypatch.setattr("benchmarks.uda.data.published.load_task", load)
    assert load_whole("usps-mnist", tmp_path) is task
    assert asked == ["usps-mnist", tmp_path, 28, True]
    monkeypatch.setattr("benchmarks.uda.data.published.COUNTS", {})  # nothing is drawn
    run(replace(config_of(), steps=1), task, tmp_path)


def test_the_cut_of_other_methods_is_no_part_of_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = key_of_published(config_of())
    monkeypatch.setattr(runs, "MARGINS", {})
    assert key_of_published(config_of()) == before


def test_the_command_loads_the_images_of_each_protocol(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loaded: list[str] = []

    def loader(name: str) -> Callable[[str, Path], Task]:
        def load(*_: object) -> Task:
            loaded.append(name)
            return task

        return load

    monkeypatch.setattr(command, "load_published", loader("few"))
    monkeypatch.setattr(command, "load_whole", loader("all"))
    trained: list[tuple[str, int]] = []

    def train(_: Task, configs: list[Config], *__: object) -> None:
        trained.extend((one.method, one.steps) for one in configs)

    monkeypatch.setattr(command, "train", train)
    asked = ["--tasks", "usps-mnist", "--methods", "MCD", "CDAN+E", "--seeds", "1"]
    store = ["--store", str(tmp_path / "runs.jsonl"), "--data", str(tmp_path)]
    command.main([*asked, *store, "--rules", "sum"])
    assert loaded == ["few", "all"]
    assert trained == [("MCD", 2800), ("CDAN+E", 46850)]
    assert "usps-mnist, 28x28\n" in capsys.readouterr().out
