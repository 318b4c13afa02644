"""Backbones and the command: tiny networks with random weights, from folders."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import SGD
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.common.store import read_runs
from benchmarks.uda import adapt
from benchmarks.uda.adapt import (
    METHODS,
    ImageRun,
    describe_data,
    evaluate,
    key_of,
    main,
    train,
)
from benchmarks.uda.data import Batch
from benchmarks.uda.data.image_lists import Domain, Task, load_task
from benchmarks.uda.data.images import normalize
from benchmarks.uda.methods import backbones, dann_losses
from benchmarks.uda.methods.backbones import (
    BACKBONES,
    build_networks,
    digest_of,
    load_backbone,
)
from benchmarks.uda.methods.dwl import Balance
from benchmarks.uda.methods.networks import Networks
from benchmarks.uda.methods.rules import RULES
from benchmarks.uda.methods.steps import Config, make_step
from benchmarks.uda.methods.updates import Update, harmonized
from tests.benchmarks.modules import same, values

# All but one test: the tiny networks have fewer layers than those of the names.
pytestmark = pytest.mark.filterwarnings("ignore:.* layers, but .* has")

CONFIG = Config("visda-2017: train-validation", "DANN", "gh", seed=0, steps=2)
CPU = torch.device("cpu")
NAMES = [f"class_{label:02}" for label in range(12)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as on the hub: those of whole classifiers."""
    torch.manual_seed(0)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("resnet", "vit")}
    resnet = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"
    )
    vit = ViTConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        patch_size=56,
    )
    ResNetForImageClassification(resnet).save_pretrained(folders["resnet"])
    ViTForImageClassification(vit).save_pretrained(folders["vit"])
    return folders


@pytest.fixture
def resnet(weights: dict[str, Path]) -> str:
    return str(weights["resnet"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VisDA's folders, with PNG in one domain and JPEG in the other, of 2 and 1 each."""
    root = tmp_path_factory.mktemp("visda")
    for domain, suffix, count in (("train", "png", 2), ("validation", "jpg", 1)):
        for label, name in enumerate(NAMES):
            (root / domain / name).mkdir(parents=True)
            for number in range(count):
                image = Image.effect_noise((40, 30), 20 + 10 * label)
                image.save(root / domain / name / f"{number}.{suffix}")
    return root


@pytest.fixture
def task(data: Path) -> Task:
    return load_task("visda-2017", "train", "validation", data)


def noise(count: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 224, 224, generator=generator)


# Backbones.


def test_the_features_of_a_resnet_are_those_before_its_classifier(resnet: str) -> None:
    backbone, features = load_backbone("resnet-50", resnet)
    whole = ResNetForImageClassification.from_pretrained(resnet)
    found = backbone.eval()(noise())
    assert found.shape == (4, features)
    torch.testing.assert_close(whole.classifier(found), whole(noise()).logits)


def test_the_features_of_a_vit_are_those_before_its_classifier(
    weights: dict[str, Path],
) -> None:
    folder = str(weights["vit"])
    whole = ViTForImageClassification.from_pretrained(folder)
    for name in ("vit-b16-in21k", "vit-b16-in1k"):
        backbone, features = load_backbone(name, folder)
        found = backbone.eval()(noise())
        assert found.shape == (4, features)
        torch.testing.assert_close(whole.classifier(found), whole(noise()).logits)


@pytest.mark.parametrize("name", BACKBONES)
def test_weights_that_are_absent_are_named_and_how_to_fetch_them(
    tmp_path: Path, name: str
) -> None:
    for where in (tmp_path, tmp_path / "none", "ghopt/no-such-weights"):
        with pytest.raises(FileNotFoundError) as error:
            load_backbone(name, str(where))
        message = str(error.value)
        assert f"no weights in {where}: fetch those of {name}" in message
        assert f"`hf download {BACKBONES[name].hub} --local-dir DIR`" in message
        assert message.endswith("pass --weights DIR")


def test_without_a_folder_the_weights_are_those_of_the_hub_s_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = BACKBONES["resnet-50"]
    absent = known._replace(hub="ghopt/no-such-weights")
    monkeypatch.setitem(backbones.BACKBONES, "resnet-50", absent)
    with pytest.raises(FileNotFoundError, match="no weights in ghopt/no-such-weights"):
        load_backbone("resnet-50")


def test_weights_of_another_kind_are_refused_and_not_drawn_at_random(
    weights: dict[str, Path],
) -> None:
    message = f"the weights in {weights['vit']} are not of a ResNetModel.*hf download"
    with pytest.raises(ValueError, match=message):
        load_backbone("resnet-50", str(weights["vit"]))


@pytest.mark.filterwarnings("error")
def test_weights_of_another_depth_are_told(weights: dict[str, Path]) -> None:
    with pytest.warns(
        UserWarning, match=r"resnet.* has \(1, 1\) layers, but resnet-10"
    ):
        load_backbone("resnet-101", str(weights["resnet"]))
    with pytest.warns(UserWarning, match=r"vit.* has \(2,\) layers, but vit-b16-in1k"):
        load_backbone("vit-b16-in1k", str(weights["vit"]))


def test_the_networks_of_the_names_have_the_layers_of_the_names() -> None:
    assert BACKBONES["resnet-50"].layers == tuple(ResNetConfig().depths or ())
    assert BACKBONES["vit-b16-in1k"].layers == (ViTConfig().num_hidden_layers,)
    # A stem, a classifier, and three convolutions for each layer.
    assert 3 * sum(BACKBONES["resnet-101"].layers) + 2 == 101


def test_weights_in_half_precision_become_float32(resnet: str, tmp_path: Path) -> None:
    ResNetForImageClassification.from_pretrained(
        resnet, dtype=torch.bfloat16
    ).save_pretrained(tmp_path)
    backbone, _ = load_backbone("resnet-50", str(tmp_path))
    assert {one.dtype for one in backbone.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_its_networks_upon_256_features(
    resnet: str, method: str
) -> None:
    networks, backbone = build_networks(method, 12, 0, "resnet-50", resnet)
    assert next(networks.generator.children()) is backbone
    assert networks.generator(noise()).shape == (4, 256)
    assert networks(noise()).shape == (4, 12)


def test_networks_of_a_seed_are_the_same_and_of_another_differ_in_all_but_the_backbone(
    resnet: str,
) -> None:
    one, backbone = build_networks("CDAN+E", 12, 3, "resnet-50", resnet)
    two, _ = build_networks("CDAN+E", 12, 3, "resnet-50", resnet)
    other, third = build_networks("CDAN+E", 12, 4, "resnet-50", resnet)
    assert same(values(one), values(two))
    assert same(values(backbone), values(third))
    for a, b in zip(one.heads.parameters(), other.heads.parameters(), strict=True):
        assert not a.equal(b)


def test_source_and_target_are_normalized_apart_and_counted_together(
    resnet: str,
) -> None:
    networks, _ = build_networks("DANN", 12, 0, "resnet-50", resnet)
    assert all(module.training for module in networks.modules())
    norms = [one for one in networks.modules() if isinstance(one, nn.BatchNorm2d)]
    labels = torch.arange(4)
    source, target = noise(seed=1), 3 + noise(seed=2)
    alone = dann_losses(networks, Batch(source, labels, source), 1.0, 1.0)
    assert {int(norm.state_dict()["num_batches_tracked"]) for norm in norms} == {2}
    means = [norm.state_dict()["running_mean"].clone() for norm in norms]
    both = dann_losses(networks, Batch(source, labels, target), 1.0, 1.0)
    assert both.classification.equal(alone.classification)
    assert not both.alignment.equal(alone.alignment)
    for norm, mean in zip(norms, means, strict=True):
        assert not norm.state_dict()["running_mean"].equal(mean)


# Steps.


def rates_of(method: str, networks: Networks, slow: nn.Module) -> dict[int, float]:
    """The rates of all parameters at a progress of 0.5, by identity."""
    config = Config("none", method, "sum", seed=0, steps=10, lr=0.01)
    found: list[SGD] = []

    def make_update(sgd: SGD, _shared: Iterable[nn.Parameter]) -> Update:
        found.append(sgd)
        return lambda _losses: None

    step = make_step(config, networks, make_update, slow.parameters(), 12)
    step(Batch(noise(), torch.arange(4), noise()), 0.5)
    return {
        id(one): group["lr"]
        for sgd in found
        for group in sgd.param_groups
        for one in group["params"]
    }


@pytest.mark.parametrize("method", ["CDAN+E", "MCD", "DWL"])
def test_the_backbone_learns_at_a_tenth_of_the_rate_and_all_else_at_the_whole(
    resnet: str, method: str
) -> None:
    networks, backbone = build_networks(method, 12, 0, "resnet-50", resnet)
    rates = rates_of(method, networks, backbone)
    slow = {id(one) for one in backbone.parameters()}
    trained = networks if method == "CDAN+E" else networks.generator
    assert rates.keys() == {id(one) for one in trained.parameters()}
    for parameter, rate in rates.items():
        whole = 0.01 * 6**-0.75
        assert rate == pytest.approx(0.1 * whole if parameter in slow else whole)


def test_both_losses_are_harmonized_over_the_backbone_and_the_bottleneck(
    resnet: str, task: Task
) -> None:
    config = Config(task.name, "DANN", "gh", seed=0, steps=1, batch_size=4)
    networks, backbone = build_networks("DANN", 12, 0, "resnet-50", resnet)
    shared: list[nn.Parameter] = []

    def make_update(sgd: SGD, own: Iterable[nn.Parameter]) -> Update:
        shared.extend(own)
        return harmonized(sgd, shared, rule="gh")

    step = make_step(config, networks, make_update, backbone.parameters(), 12)
    step(Batch(noise(), torch.arange(4), noise()), 0.5)
    bottleneck = list(networks.generator.children())[1]
    expected = [*backbone.parameters(), *bottleneck.parameters()]
    assert [id(one) for one in shared] == [id(one) for one in expected]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_all_of_its_networks(
    resnet: str, task: Task, method: str
) -> None:
    config = Config(
        task.name, method, "sum", seed=0, steps=2, batch_size=4, lr=0.1, evaluations=2
    )
    networks, backbone = build_networks(method, 12, 0, "resnet-50", resnet)
    before = values(networks)
    evaluations, rows = train(config, task, networks, backbone, CPU)
    assert [done for done, *_ in evaluations] == [1, 2]
    assert bool(rows) == (method != "source-only")
    assert all(module.training for module in networks.modules())
    moved = [
        name
        for (name, now), then in zip(networks.named_parameters(), before, strict=True)
        if not now.equal(then)
    ]
    parts = {name.partition(".")[0] for name in moved}
    alone = isinstance(networks.discriminator, nn.Identity) or method == "source-only"
    assert parts == {"generator", "heads"} | (set() if alone else {"discriminator"})
    assert any("embedder" in name for name in moved)


def test_training_moves_the_backbone_a_tenth_as_far(resnet: str, task: Task) -> None:
    config = Config(task.name, "source-only", "sum", 0, 1, batch_size=4, evaluations=1)
    moves = []
    for trained in (True, False):
        networks, backbone = build_networks("source-only", 12, 0, "resnet-50", resnet)
        before = values(networks)
        train(config, task, networks, backbone if trained else nn.Identity(), CPU)
        moves.append(
            {
                name: now.detach() - then
                for (name, now), then in zip(
                    networks.named_parameters(), before, strict=True
                )
            }
        )
    for name, move in moves[0].items():
        share = 0.1 if name.startswith("generator.0") else 1.0
        torch.testing.assert_close(move, share * moves[1][name], atol=2e-6, rtol=1e-3)


def test_the_target_is_read_at_intervals_and_after_the_last_step(
    resnet: str, task: Task
) -> None:
    config = Config(task.name, "source-only", "sum", 0, 5, batch_size=5, evaluations=2)
    networks, backbone = build_networks("source-only", 12, 0, "resnet-50", resnet)
    read: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor]) -> None:
        if not backbone.training:
            read.append(len(inputs[0]))

    backbone.register_forward_pre_hook(note)
    evaluations, _ = train(config, task, networks, backbone, CPU)
    assert [done for done, *_ in evaluations] == [2, 4, 5]
    # The target has 12 images, the source has 24.
    assert read == 3 * [5, 5, 2]


def test_the_rule_decides_what_is_made_of_the_losses(resnet: str, task: Task) -> None:
    trained = []
    for rule in ("sum", "minus_alignment"):
        config = Config(task.name, "DANN", rule, 0, 2, batch_size=4, evaluations=1)
        networks, backbone = build_networks("DANN", 12, 0, "resnet-50", resnet)
        train(config, task, networks, backbone, CPU)
        trained.append(values(networks.generator))
    assert not same(*trained)


def test_the_batches_are_those_of_the_seed(resnet: str, task: Task) -> None:
    trained = []
    for seed in (0, 1):
        config = Config(
            task.name, "source-only", "sum", seed, 1, batch_size=4, evaluations=1
        )
        networks, backbone = build_networks("source-only", 12, 0, "resnet-50", resnet)
        train(config, task, networks, backbone, CPU)
        trained.append(values(networks))
    assert not same(*trained)


def test_dwl_balances_as_many_classes_as_the_data_set_has(
    resnet: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    class Telling(Balance):
        def __init__(self, classes: int) -> None:
            told.append(classes)
            super().__init__(classes)

    monkeypatch.setattr("benchmarks.uda.methods.steps.Balance", Telling)
    config = Config(task.name, "DWL", "sum", 0, 1, batch_size=4, evaluations=1)
    networks, backbone = build_networks("DWL", 12, 0, "resnet-50", resnet)
    train(config, task, networks, backbone, CPU)
    assert told == [12]


@pytest.mark.slow
def test_training_is_the_same_again_and_with_workers(resnet: str, task: Task) -> None:
    trained = []
    for workers in (0, 0, 1):
        config = Config(task.name, "CDAN+E", "gh", 0, 3, batch_size=4, evaluations=1)
        networks, backbone = build_networks("CDAN+E", 12, 0, "resnet-50", resnet)
        train(config, task, networks, backbone, CPU, workers)
        trained.append(values(networks))
    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])


# Evaluation.


class ByGrey(nn.Module):
    """Says class 0 of what is dark, class 1 of what is bright."""

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean((1, 2, 3))
        return torch.stack([-grey, grey], dim=1)


def test_the_evaluation_counts_images_and_classes(tmp_path: Path) -> None:
    """Four of class 0, three of them right; one of class 2, none of class 1, wrong."""
    paths = []
    for number, grey in enumerate((0, 10, 20, 255, 250)):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("L", (3, 3), color=grey).save(paths[-1])
    domain = Domain(tmp_path, paths, [0, 0, 0, 0, 2], {})
    networks = Networks(ByGrey(), [nn.Identity()], nn.Identity())
    for size in (1, 2, 5, 9):
        images, classes = evaluate(networks, domain, size, CPU)
        assert images == pytest.approx(60)
        assert classes == pytest.approx(37.5)
        assert networks.training
    evaluate(networks.eval(), domain, 2, CPU)
    assert not networks.training


def test_the_evaluation_uses_the_running_means(resnet: str, task: Task) -> None:
    networks, _ = build_networks("DANN", 12, 0, "resnet-50", resnet)
    norms = [one for one in networks.modules() if isinstance(one, nn.BatchNorm2d)]
    assert evaluate(networks, task.test, 4, CPU) == evaluate(
        networks, task.test, 6, CPU
    )
    assert {int(norm.state_dict()["num_batches_tracked"]) for norm in norms} == {0}


def test_what_the_networks_see_is_normalized(
    resnet: str, task: Task, tmp_path: Path
) -> None:
    """Of black images, in training as in the evaluation."""
    Image.new("L", (9, 9), color=0).save(tmp_path / "black.png")
    dark = Domain(tmp_path, [str(tmp_path / "black.png")] * 4, [0, 1, 2, 3], {})
    night = task._replace(source=dark, target=dark, test=dark)
    networks, backbone = build_networks("DANN", 12, 0, "resnet-50", resnet)
    seen: list[Tensor] = []
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    config = Config(task.name, "DANN", "sum", seed=0, steps=1, batch_size=4)
    train(config, night, networks, backbone, CPU)
    expected = normalize(torch.zeros(4, 3, 224, 224, dtype=torch.uint8))
    assert len(seen) == 3
    assert all(one.equal(expected) for one in seen)


# The command.


def arguments(data: Path, folder: Path, store: Path) -> list[str]:
    return [
        *("--data", str(data), "--dataset", "visda-2017"),
        *("--source", "train", "--target", "validation", "--weights", str(folder)),
        *("--steps", "2", "--batch", "4", "--evaluations", "1", "--workers", "0"),
        *("--store", str(store)),
    ]


def test_the_command_trains_and_keeps_a_line_with_its_settings(
    data: Path,
    weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "runs" / "new" / "adapt.jsonl"
    for backbone, kind, rule in (
        ("resnet-50", "resnet", "gh"),
        ("vit-b16-in21k", "vit", "sum"),
    ):
        asked = arguments(data, weights[kind], store)
        main([*asked, "--backbone", backbone, "--rules", rule, "--seeds", "1"])
        shown = capsys.readouterr().out
        assert f"CDAN+E, {rule}, seed 0: " in shown
        assert f"visda-2017: train-validation, {backbone}, 2 steps" in shown
    runs = [*read_runs(store, ImageRun).values()]
    assert len(runs) == len(store.read_text(encoding="utf-8").splitlines()) == 2
    assert [run.backbone["name"] for run in runs] == ["resnet-50", "vit-b16-in21k"]
    assert runs[0].backbone["weights"] == str(weights["resnet"])
    small, _ = load_backbone("resnet-50", str(weights["resnet"]))
    assert runs[0].backbone["parameters"] == sum(p.numel() for p in small.parameters())
    for run, rule in zip(runs, ("gh", "sum"), strict=True):
        expected = {
            "task": "visda-2017: train-validation",
            "method": "CDAN+E",
            "rule": rule,
            "seed": 0,
            "steps": 2,
            "batch_size": 4,
            "lr": 0.01,
            "momentum": 0.9,
            "weight_decay": 0.001,
            "trade_off": 1.0,
            "size": 224,
        }
        assert expected.items() <= run.config.items()
        assert run.data["classes"] == 12
        origins = {"source": "train", "target": "validation", "test": "validation"}
        assert run.data["origins"] == {
            role: str(data / name) for role, name in origins.items()
        }
        assert run.data["images"] == {"source": 24, "target": 12, "test": 12}
        assert run.torch == torch.__version__
        assert run.device == run.versions["device"] == "cpu"
        assert [(*one,) for one in run.errors] == [(2, 100 - run.accuracy)]
        assert list(run.evaluations[-1]) == [2, run.accuracy, run.class_accuracy]
        assert run.obtuse in (0, 50, 100)
        assert None not in (run.cosine, run.ratio)


def test_a_run_s_accuracies_are_those_after_the_last_step(
    data: Path,
    weights: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluations = [(1, 10.0, 20.0), (2, 30.0, 40.0)]
    monkeypatch.setattr(adapt, "train", lambda *_: (evaluations, []))
    store = tmp_path / "adapt.jsonl"
    main([*arguments(data, weights["resnet"], store), "--rules", "gh", "--seeds", "1"])
    (kept,) = read_runs(store, ImageRun).values()
    assert (kept.accuracy, kept.class_accuracy) == (30, 40)
    assert [(*one,) for one in kept.evaluations] == evaluations


def test_only_what_the_store_lacks_is_trained_and_all_of_it_is_in_the_table(
    data: Path,
    weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "adapt.jsonl"
    asked = [*arguments(data, weights["resnet"], store), "--steps", "1"]
    asked += ["--methods", "source-only", "DANN", "--rules", "sum", "gh"]

    def trained(*others: str) -> tuple[list[str], list[str]]:
        main([*asked, *others])
        lines = capsys.readouterr().out.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("---")) + 1
        rows = lines[start : lines.index("", start)]  # the second table is of angles
        begun = [line.split(":")[0] for line in lines if ", seed " in line]
        return begun, [" ".join(line.split()[:2]) for line in rows]

    first = ["source-only, sum, seed 0", "DANN, sum, seed 0", "DANN, gh, seed 0"]
    assert trained() == (first, ["source-only -", "DANN sum", "DANN gh"])
    store.write_text(
        store.read_text(encoding="utf-8")[:-20], encoding="utf-8"
    )  # killed while it wrote
    assert trained()[0] == first[-1:]
    assert trained()[0] == []
    begun, table = trained("--trade-offs", "1", "0.5")
    assert begun == ["DANN, sum x 0.5, seed 0", "DANN, gh x 0.5, seed 0"]
    assert table == ["source-only -", *2 * ["DANN sum"], *2 * ["DANN gh"]]
    assert trained("--seeds", "2")[0] == [one[:-1] + "1" for one in first]
    # Other settings are other runs, and are not in the table of these.
    begun, table = trained("--rules", "gh", "--methods", "DANN", "--batch", "3")
    assert (begun, table) == (first[-1:], ["DANN gh"])
    assert len(store.read_text(encoding="utf-8").splitlines()) == 9


def test_other_images_labels_and_weights_are_other_runs_and_other_places_are_not(
    task: Task,
) -> None:
    def key(task: Task, **other: object) -> str:
        backbone = {"name": "resnet-50", "weights": "here", "digest": "1", **other}
        return key_of(CONFIG, describe_data(task), backbone)

    def changed(**domains: Domain) -> Task:
        return Task(**{**task._asdict(), **domains})

    def moved(domain: Domain) -> Domain:
        paths = [f"/elsewhere{path}" for path in domain.paths]
        return domain._replace(origin=Path("/elsewhere"), paths=paths)

    same = key(task)
    places = {role: moved(getattr(task, role)) for role in ("source", "target", "test")}
    assert key(changed(**places)) == same
    assert key(task, weights="there") == same
    assert key(task, digest="2") != same
    assert key(task, name="resnet-101") != same
    for role in ("source", "target", "test"):
        domain: Domain = getattr(task, role)
        labels = [*domain.labels[1:], domain.labels[0]]
        for other in (
            domain._replace(labels=labels),
            domain._replace(paths=domain.paths[1:], labels=domain.labels[1:]),
            domain._replace(paths=domain.paths[::-1], labels=domain.labels),
        ):
            assert key(changed(**{role: other})) != same
    weights = {"name": "resnet-50", "digest": "1"}
    data = describe_data(task)
    one, two = (key_of(replace(CONFIG, seed=seed), data, weights) for seed in (0, 1))
    assert one != two


def test_the_hash_of_weights_is_that_of_their_names_and_values() -> None:
    def digest(change: Callable[[nn.Module], object]) -> str:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        with torch.no_grad():
            change(module)
        return digest_of(module)

    changes: list[Callable[[Any], object]] = [
        lambda _: None,
        lambda module: module[0].weight[1, 2].add_(1e-3),
        lambda module: module[1].running_mean.add_(1),  # a buffer
        lambda module: module.append(nn.Linear(1, 1, bias=False)),
        lambda module: module.register_module("2", module._modules.pop("1")),
    ]
    assert len({digest(change) for change in changes}) == len(changes)
    assert digest(lambda _: None) == digest(lambda _: None)


def test_the_command_reads_office_31_and_trains_on_the_source_alone(
    weights: dict[str, Path], tmp_path: Path
) -> None:
    for domain in ("amazon", "webcam"):
        for label in range(31):
            folder = tmp_path / domain / "images" / f"class_{label:02}"
            folder.mkdir(parents=True)
            Image.new("RGB", (5, 4), (8 * label, 0, 0)).save(folder / "frame.jpg")
    store = tmp_path / "runs.jsonl"
    asked = arguments(tmp_path, weights["resnet"], store)
    asked[3:8:2] = ["office-31", "amazon", "webcam"]
    main([*asked, "--methods", "source-only", "--rules", "gh"])
    kept = json.loads(store.read_text(encoding="utf-8"))
    assert kept["config"]["rule"] == "sum"  # of one loss, all rules are the sum
    assert kept["obtuse"] is None
    assert kept["data"]["classes"] == 31
    # One image of each class: the two shares are the same.
    assert kept["accuracy"] == pytest.approx(kept["class_accuracy"])


def test_what_is_missing_is_named_before_anything_is_trained(
    data: Path,
    weights: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "adapt.jsonl"
    good = arguments(data, weights["resnet"], store)
    for others, message in (
        (["--data", str(tmp_path)], "visda-2017 can be had from https://ai.bu.edu"),
        (["--weights", str(tmp_path)], "fetch those of resnet-50 with `hf download"),
        (["--source", "amazon"], "Invalid source value: amazon"),
        (["--batch", "13"], "Invalid batch value: 13"),
        (["--device", "toaster"], "invalid value: toaster"),
        (["--steps", "0"], "must be at least 1"),
        (["--workers", "-1"], "must be at least 0"),
        (["--methods", "SSRT"], "invalid choice: 'SSRT'"),
        (["--store", __file__], "store must hold runs"),
    ):
        with pytest.raises(SystemExit):
            main([*good, *others])
        assert message in capsys.readouterr().err
    assert not store.exists() or not store.read_text(encoding="utf-8")


def test_the_rules_of_a_seed_differ_only_by_the_rule(
    data: Path, weights: dict[str, Path], tmp_path: Path
) -> None:
    """Where nothing is opposed, all rules end alike: same weights, same images."""
    store = tmp_path / "adapt.jsonl"
    asked = arguments(data, weights["resnet"], store)
    main([*asked, "--rules", *RULES, "--methods", "DANN", "--steps", "1"])
    runs = read_runs(store, ImageRun).values()
    assert len(runs) == len(RULES)
    # In the first step the reversal's coefficient is 0, and so is the first gradient.
    assert {run.cosine for run in runs} == {0}
    assert len({tuple(map(tuple, run.evaluations)) for run in runs}) == 1
