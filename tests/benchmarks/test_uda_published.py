"""The published protocols: against slow transcriptions of them, stopped and gone on with."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from benchmarks.common.digits import Split
from benchmarks.common.store import append_run, hash_of, read_runs
from benchmarks.uda import published as command
from benchmarks.uda.data import Batch, Task, batches
from benchmarks.uda.data import published as data
from benchmarks.uda.data.published import draw, load_published
from benchmarks.uda.methods import mcd_losses, published_cdan
from benchmarks.uda.methods import published as methods
from benchmarks.uda.methods.networks import Networks
from benchmarks.uda.methods.published import (
    REFERENCES,
    PublishedBalance,
    Training,
    Voting,
    build_published,
    pseudo_label_loss,
)
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import Config
from benchmarks.uda.published import STORE, main, make_configs
from benchmarks.uda.runs import published as runs
from benchmarks.uda.runs.published import (
    PublishedRun,
    checkpoint_of,
    key_of_published,
    run,
)
from benchmarks.uda.runs.train import test_error as error_on
from benchmarks.uda.views.published_table import format_table
from tests.benchmarks.modules import without_dropout

Train: TypeAlias = Callable[[Config, Task], object]


@pytest.fixture
def task(large_task: Task) -> Task:
    return large_task


@pytest.fixture
def exact_batch(task: Task) -> Batch:
    source, labels, target = next(batches(task, 8, 1, seed=0))
    return Batch(source.double(), labels, target.double())


def config_of(method: str, rule: str = "sum", seed: int = 0, steps: int = 4) -> Config:
    (config,) = make_configs("usps-mnist", ["MCD"], ["sum"], 1, steps)
    return replace(
        config, method=method, rule=rule, seed=seed, batch_size=8, inner_steps=2
    )


def exact(config: Config) -> Training:
    """In float64 and without dropout: what is left to differ is what is computed."""
    training = Training(config)
    without_dropout(training.networks.double())
    return training


class Literal:
    """Networks and optimizers as the published code has them, one of each.

    All losses are computed on whole graphs, and G rectifies before it pools.
    """

    def __init__(self, method: str) -> None:
        networks = build_published(method, 0).double()
        without_dropout(networks)
        self.networks = networks
        self.g = networks.generator
        self.heads = list(networks.heads)
        self.d = networks.discriminator
        self.adams = {
            id(one): Adam(one.parameters(), lr=2e-4, weight_decay=5e-4)
            for one in (self.g, *self.heads, self.d)
            if list(one.parameters())
        }

    def features(self, images: Tensor) -> Tensor:
        _, c1, b1, _, _, c2, b2, *_ = self.g.children()
        x = F.max_pool2d(b1(c1(images)).relu(), 2)
        return F.max_pool2d(b2(c2(x)).relu(), 2).flatten(1)

    def descend(self, loss: Tensor, *modules: nn.Module) -> None:
        torch.autograd.backward(loss)
        for module in modules:
            self.adams[id(module)].step()
        for adam in self.adams.values():
            adam.zero_grad()

    def differ(self, target: Tensor, *pairs: tuple[int, int]) -> Tensor:
        said = [head(target).softmax(1) for head in self.heads]
        return torch.stack([(said[a] - said[b]).abs().mean() for a, b in pairs]).sum()

    def classify(self, source: Tensor, labels: Tensor) -> Tensor:
        losses = [F.cross_entropy(head(source), labels) for head in self.heads]
        return torch.stack(losses).sum()


def mcd_literally(batch: Batch, times: int) -> Networks:
    its = Literal("MCD")
    its.descend(
        its.classify(its.features(batch.source), batch.labels), its.g, *its.heads
    )
    loss = its.classify(its.features(batch.source), batch.labels)
    its.descend(loss - its.differ(its.features(batch.target), (0, 1)), *its.heads)
    for _ in range(times):
        its.descend(its.differ(its.features(batch.target), (0, 1)), its.g)
    return its.networks


def dwl_literally(batch: Batch, times: int, share: float) -> Networks:
    its = Literal("DWL")
    first = its.heads[0]

    def domain_loss(source: Tensor, target: Tensor) -> Tensor:
        labels = its.d(target).sigmoid().detach()
        return F.binary_cross_entropy(its.d(source).sigmoid(), labels)

    for _ in range(times):
        logits = first(its.features(batch.source))
        its.descend(F.cross_entropy(logits, batch.labels), its.g, first)
    source, target = its.features(batch.source), its.features(batch.target)
    its.descend(0.1 * domain_loss(source, target), its.d)
    source, target = its.features(batch.source), its.features(batch.target)
    loss = its.classify(source, batch.labels) - its.differ(target, (1, 2))
    its.descend(loss, *its.heads)
    for _ in range(times):
        source, target = its.features(batch.source), its.features(batch.target)
        alignment = -0.2 * domain_loss(source, target)
        target = its.features(batch.target)
        pairs = its.differ(target, (1, 2), (0, 1), (0, 2))
        its.descend(share * alignment + (1 - share) * pairs, its.g)
    logits = first(its.features(batch.target))
    its.descend(pseudo_label_loss(logits), its.g, first)
    for images in (batch.source, batch.target):
        its.features(images)
    first(its.features(batch.target))
    return its.networks


def assert_same(ours: Networks, theirs: Networks) -> None:
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, right[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["MCD", "MCD-heads"])
def test_a_step_of_mcd_is_the_published_one(method: str, exact_batch: Batch) -> None:
    training = exact(config_of(method))
    training.step(exact_batch)
    assert_same(training.networks, mcd_literally(exact_batch, 2))


@pytest.mark.parametrize("method", ["DWL", "DWL-unweighted"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_step_of_dwl_is_the_published_one(
    method: str, share: float, exact_batch: Batch
) -> None:
    training = exact(config_of(method))
    training._balance.share = share
    training.step(exact_batch)
    assert_same(training.networks, dwl_literally(exact_batch, 2, share))


def test_the_rules_are_those_of_the_library_where_the_losses_meet(
    exact_batch: Batch,
) -> None:
    for method in ("MCD-joint", "DWL"):
        trainings = {rule: exact(config_of(method, rule)) for rule in RULES}
        for training in trainings.values():
            training.step(exact_batch)
            training.state()
        # Two updates of G a step; all rules find the same pair in the first.
        first = [training.rows[0] for training in trainings.values()]
        assert len(trainings["sum"].rows) == 2
        assert all(row == first[0] for row in first)


@pytest.mark.parametrize("method", ["MCD-heads", "DWL-unweighted"])
@pytest.mark.parametrize("rule", ["gh", "ghpp_printed"])
def test_the_authors_weights_change_the_step_where_gradients_conflict(
    method: str, rule: str, exact_batch: Batch
) -> None:
    # Of noise MCD's pair agrees; at a weight below 0 it is in conflict.
    weight = -1.0 if method.startswith("MCD") else 1.0
    training, plain = (
        exact(replace(config_of(method, one), trade_off=weight))
        for one in (rule, "sum")
    )
    for _ in range(3):
        training.step(exact_batch)
        plain.step(exact_batch)
    training.state()
    conflict = any(product < 0 for _, product, _ in training.rows)
    rest = [list(one.networks.heads.parameters()) for one in (training, plain)]
    shared = [list(one.networks.generator.parameters()) for one in (training, plain)]
    moved = shared if method.startswith("DWL") else rest
    assert conflict
    assert not all(a.equal(b) for a, b in zip(*moved, strict=True))


def test_mcd_s_weights_are_of_minus_the_discrepancy_and_move_the_heads_alone(
    exact_batch: Batch,
) -> None:
    heads = exact(config_of("MCD-heads", "gh"))
    before = [one.detach().clone() for one in heads.networks.generator.parameters()]
    heads._weighed_heads_step(exact_batch)
    after = heads.networks.generator.parameters()
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    assert all(one.grad is None for one in heads.networks.generator.parameters())
    joint = exact(config_of("MCD-joint"))
    pair = mcd_losses(joint.networks, exact_batch, 1.0)
    gradients = [
        torch.autograd.grad(loss, [*joint.networks.generator.parameters()])
        for loss in (pair.classification, pair.alignment)
    ]
    one, other = (torch.cat([g.flatten() for g in own]) for own in gradients)
    heads.state()
    assert heads.rows[0] == pytest.approx(
        (float(one @ one), -float(one @ other), float(other @ other)), rel=1e-6
    )


def test_pseudo_labels_count_as_much_as_the_batch_is_sure() -> None:
    sure = torch.tensor([[30.0] + [0.0] * 9] * 4)
    assert float(pseudo_label_loss(sure)) == pytest.approx(0, abs=1e-6)
    unsure = torch.zeros(4, 10)
    mu = (math.exp(-math.log(10) / 10) - 0.1) / 0.9
    assert float(pseudo_label_loss(unsure)) == pytest.approx(2 * mu * math.log(10))


def test_t_follows_the_need_for_alignment_from_epoch_to_epoch() -> None:
    balance = PublishedBalance()
    assert balance.share == 0.5
    balance._measure(4.0, 2.0, 3.0)  # J = (2 - 1) / (3 - 1), M = 1
    assert balance.share == pytest.approx(1 / (1 + 0.5), rel=1e-5)
    balance._measure(1.0, 2.0, 5.0)  # J = (2 - 2) / (5 - 2), M = 1 / 4
    assert balance.share == pytest.approx(0.25 / 1.25, rel=1e-5)


def test_t_is_measured_on_the_batches_of_an_epoch() -> None:
    balance = PublishedBalance()
    generator = torch.Generator().manual_seed(0)
    for number in range(methods.EPOCH):
        assert balance.share == 0.5, number
        rows = torch.randn(2, 128, 12, generator=generator)
        labels = torch.arange(128) % 10
        balance.see(rows[0], labels, rows[1] + 1, labels)
    assert balance.share != 0.5
    assert not balance._batches


def test_heads_vote_by_their_logits(task: Task) -> None:
    images = task.test.images
    for method, voters in (("MCD", 2), ("DWL", 1)):
        networks = build_published(method, 0).eval()
        features = networks.generator(images)
        assert features.shape == (16, methods.FEATURES)
        expected = sum(head(features) for head in networks.heads[:voters])
        torch.testing.assert_close(networks(images), expected)


def test_usps_is_cut_anew_and_has_a_margin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read(
        name: str, _: Path, size: int, exact: bool
    ) -> tuple[Split, Split, tuple[()]]:
        assert exact
        counts = (40, 10) if name == "usps" else (30, 20)
        start = {"usps": 0, "mnist": 100}[name]
        numbers = torch.arange(start, start + sum(counts))
        images = numbers[:, None, None, None].float().expand(-1, 1, size, size)
        train, test = torch.split(images, [*counts]), torch.split(numbers, [*counts])
        return Split(train[0], test[0]), Split(train[1], test[1]), ()

    monkeypatch.setattr(data, "read_domain", read)
    monkeypatch.setattr(data, "USPS_TEST", 12)
    task = load_published("mnist-usps", tmp_path)
    margin = data.MARGINS["usps"]
    assert task.source.labels.tolist() == list(range(100, 130))
    assert task.validation is not None
    assert task.validation.labels.tolist() == list(range(130, 150))
    assert len(task.test.labels) == 12
    assert task.target.shape == (38, 1, 28, 28)
    assert (task.target[:, :, :margin] == -1).all()
    inside = task.target[:, 0, margin, margin].tolist() + task.test.labels.tolist()
    assert sorted(inside) == list(range(50))
    assert task.test.images[:, 0, 14, 14].equal(task.test.labels.float())
    again = load_published("usps-mnist", tmp_path)
    assert again.validation is not None
    assert again.validation.labels.equal(task.test.labels)
    with pytest.raises(ValueError, match="Invalid task value: svhn-mnist"):
        load_published("svhn-mnist", tmp_path)


def test_each_run_draws_its_own_training_images(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "COUNTS", {"mnist": 10, "usps": 20})
    state = torch.get_rng_state()
    one, same, other = (draw(task, seed) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(state)
    assert one.source.images.equal(same.source.images)
    assert not one.source.images.equal(other.source.images)
    assert one.source.images.shape == (20, 1, 28, 28)
    assert one.target.shape == (10, 1, 28, 28)
    assert one.test is task.test
    whole = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(*task.source, strict=True)
    }
    for image, label in zip(*one.source, strict=True):
        assert whole[image.numpy().tobytes()] == label


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("MCD", "sum"),
        ("MCD-joint", "gh"),
        ("DWL", "ghpp"),
        ("DWL-unweighted", "gh"),
        ("CDAN+E", "gh"),
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    method: str,
    rule: str,
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(methods, "EPOCH", 3)
    monkeypatch.setattr(published_cdan, "EPOCH", 1)
    config = replace(config_of(method, rule), evaluations=4)
    whole = run(config, task, tmp_path / "whole")
    calls = iter(range(5))

    def stop(networks: Voting, test: Split) -> float:
        if next(calls) == 4:  # in the third evaluation: two are in the checkpoint
            raise KeyboardInterrupt
        return error_on(networks, test)

    monkeypatch.setattr(runs, "test_error", stop)
    with pytest.raises(KeyboardInterrupt):
        run(config, task, tmp_path)
    monkeypatch.setattr(runs, "test_error", error_on)
    path = checkpoint_of(config, tmp_path)
    assert path.exists()
    torch.manual_seed(7)
    resumed = run(config, task, tmp_path)
    assert replace(resumed, seconds=0) == replace(whole, seconds=0)
    assert [done for done, _ in resumed.errors] == [1, 2, 3, 4]
    weights = [
        torch.load(one, weights_only=False)["training"]["networks"]
        for one in (path, checkpoint_of(config, tmp_path / "whole"))
    ]
    assert all(a.equal(b) for a, b in zip(*(w.values() for w in weights), strict=True))


def test_a_run_says_what_the_table_needs(task: Task, tmp_path: Path) -> None:
    config = replace(config_of("MCD-joint"), evaluations=2)
    found = run(config, task, tmp_path)
    assert found.accuracy == 100 - found.errors[-1][1]
    assert found.best == 100 - min(error for _, error in found.errors)
    best = min(error for _, error in found.validation)
    last = max(done for done, error in found.validation if error == best)
    assert found.selected == 100 - dict(found.errors)[last]
    assert found.obtuse is not None
    bare = run(config, replace(task, validation=None), tmp_path / "other")
    assert math.isnan(bare.selected)


def test_the_runs_are_those_that_differ() -> None:
    configs = make_configs("usps-mnist", list(REFERENCES), list(RULES), 2)
    listed = [(one.method, one.rule) for one in configs if one.seed == 1]
    assert ("MCD", "sum") in listed
    assert ("MCD", "gh") not in listed
    assert ("MCD-heads", "sum") not in listed
    assert ("DWL-unweighted", "sum") not in listed
    assert len(listed) == 1 + 1 + 3 + 4 + 4 + 3 + 4
    assert {one.steps for one in configs} == {2800, 50 * 937}
    assert {one.batch_size for one in configs if one.method == "CDAN+E"} == {64}
    assert {one.inner_steps for one in configs if one.method == "MCD-joint"} == {4}


def kept(rule: str, seed: int, accuracy: float, method: str = "DWL") -> PublishedRun:
    config = config_of(method, rule, seed)
    return PublishedRun(
        key=hash_of(config.settings()),
        config=config.settings(),
        torch="2",
        accuracy=accuracy,
        errors=[(1, 99 - accuracy), (2, 100 - accuracy)],
        obtuse=50.0,
        cosine=-0.1,
        ratio=2.0,
        seconds=1,
    )


def test_a_method_with_the_authors_weights_is_compared_with_the_published_sum() -> None:
    runs_ = [kept("sum", seed, 90.0 + seed) for seed in range(3)]
    runs_ += [kept("gh", seed, 92.0 + seed, "DWL-unweighted") for seed in range(3)]
    _, _, *rows = format_table(runs_).splitlines()
    assert "+2.0 [+2.0, +2.0]" in rows[1]
    assert rows[1].split()[-1] == "98.5"
    assert "92.0 +- 1.0" in rows[0]  # the best step
    assert len(max(rows, key=len)) <= 100
    angles = [line.split() for line in format_table(runs_).splitlines()[-2:]]
    assert angles[1] == ["DWL-unweighted", "gh", "50", "-0.100", "2.000"]


def test_the_command_trains_what_is_missing_and_forgets_its_checkpoints(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = replace(command.MCD_LIKE, batch_size=8)
    monkeypatch.setattr(command, "MCD_LIKE", small)
    monkeypatch.setattr(command, "load_published", lambda *_: task)
    trained: list[Config] = []

    def finished(
        _: object, configs: Iterable[Config], train: Train
    ) -> Iterator[object]:
        for config in configs:
            trained.append(config)
            yield train(config, task)

    monkeypatch.setattr(command, "finished", finished)
    monkeypatch.setattr(command, "start_pool", lambda *_: nullcontext())
    store, scratch = tmp_path / "new" / "runs.jsonl", tmp_path / "scratch"
    asked = ["--tasks", "usps-mnist", "--methods", "MCD", "--steps", "2"]
    asked += ["--seeds", "1", "--store", str(store), "--scratch", str(scratch)]
    for _ in range(2):
        main([*asked, "--data", str(tmp_path)])
    assert len(trained) == 1
    assert len(read_runs(store, PublishedRun)) == 1
    assert not list(scratch.iterdir())
    main([*asked, "--seeds", "2", "--show"])
    assert len(trained) == 1
    shown = capsys.readouterr().out
    assert "usps-mnist, 28x28, 2 steps" in shown
    with pytest.raises(SystemExit):
        main([*asked, "--seeds", "2"])
    assert "--data DIR" in capsys.readouterr().err


def test_the_committed_runs_are_what_the_code_would_train_today() -> None:
    stored = read_runs(STORE, PublishedRun)
    assert stored
    names = {field.name for field in fields(Config)}
    for key, one in stored.items():
        given = {name: value for name, value in one.config.items() if name in names}
        config = Config(**given)  # type: ignore[arg-type]  # by name
        assert one.config == config.settings()
        assert key == key_of_published(config)
        (wanted,) = make_configs(
            config.task, [config.method], [config.rule], config.seed + 1
        )[-1:]
        assert config == wanted


def test_the_page_shows_the_committed_runs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--show"])
    page = Path(command.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert f"```text\n{capsys.readouterr().out.strip()}\n```" in page


def test_a_stored_run_is_read_as_it_was(tmp_path: Path) -> None:
    append_run(tmp_path / "s", kept("gh", 0, 90.0))
    (found,) = read_runs(tmp_path / "s", PublishedRun).values()
    assert (found.best, found.accuracy) == (91.0, 90.0)


def test_runs_on_images_cut_otherwise_are_other_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config("usps-mnist", "MCD", "sum", 0, 3)
    before = key_of_published(config)
    monkeypatch.setitem(data.MARGINS, "usps", 2)
    assert key_of_published(config) != before
