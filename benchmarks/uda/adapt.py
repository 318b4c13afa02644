"""Train on images of Office-31, Office-Home, VisDA or DomainNet; go on where it stopped.

The weights of the backbone and the images are read from folders; what is missing is
named, with the place where it can be had. Each finished run is a line of a file, with its
settings and a hash of them, of the images' names and of the weights; a run that is there
is not trained again. In the end a table like that of the digits is printed.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from benchmarks.common.extra import need
from benchmarks.common.options import positive, whole
from benchmarks.common.store import append_run, hash_of, read_runs
from benchmarks.uda.data import Batch
from benchmarks.uda.data.image_lists import DATA_SETS, Domain, Task, load_task
from benchmarks.uda.data.images import CROP, batches, normalize, ordered_batches
from benchmarks.uda.methods.backbones import (
    BACKBONES,
    build_networks,
    digest_of,
    load_backbone,
)
from benchmarks.uda.methods.gramians import Row, angles, to_rows
from benchmarks.uda.methods.networks import Networks
from benchmarks.uda.methods.rules import ALL_RULES
from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY, Config, make_step
from benchmarks.uda.methods.updates import harmonized
from benchmarks.uda.runs.configs import make_configs
from benchmarks.uda.runs.options import add_device, add_trade_offs
from benchmarks.uda.runs.records import Run
from benchmarks.uda.views.paper_table import format_angles, format_table
from ghopt import Recorder
from ghopt.extras import from_extra

# Those of CDAN (Long et al., 2018), whose backbone has a rate of 0.001, and whose code takes
# 50 004 steps.
STEPS, BATCH, RATE, DECAY = 10000, 36, 0.01, 1e-3

# SSRT reaches for the tokens between the blocks of a transformer of its own.
METHODS = tuple(method for method in ALL_METHODS if method != "SSRT")


@dataclass(frozen=True, kw_only=True)
class ImageRun(Run):
    """What is kept of one run: of images, what they and the trained weights were, too.

    Attributes:
        data: the data set; of its domains their lists or folders, the number of images
            and a hash of their names and labels.
        backbone: its name, where its weights are from, a hash of them, and how many it
            has.
        versions: of packages, and the device.
        evaluations: (steps done, share of the target's test images that are right,
            mean of that share over the classes), in percent.
        class_accuracy: the latter after the last step; what is usual for VisDA.
    """

    data: dict[str, object]
    backbone: dict[str, object]
    versions: dict[str, str]
    evaluations: list[tuple[int, float, float]]
    class_accuracy: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command: train what the store lacks, print what it has."""
    parser = _parser()
    options = parser.parse_args(arguments)
    like = Config(
        task=f"{options.dataset}: {options.source}-{options.target}",
        method=SOURCE_ONLY,
        rule="sum",
        seed=0,
        steps=options.steps,
        batch_size=options.batch,
        lr=RATE,
        weight_decay=DECAY,
        evaluations=options.evaluations,
        size=CROP,
    )
    configs = make_configs(
        like, options.methods, options.rules, options.seeds, options.trade_offs
    )
    try:
        need("images", "PIL", "tqdm", "transformers")
        task = load_task(options.dataset, options.source, options.target, options.data)
        _check_batch(task, options.batch)
        backbone = _describe_backbone(options.backbone, options.weights)
        options.store.parent.mkdir(parents=True, exist_ok=True)
        options.store.touch()
        known = read_runs(options.store, ImageRun)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    data = describe_data(task)
    keys = [key_of(config, data, backbone) for config in configs]
    for key, config in zip(keys, configs, strict=True):
        if key not in known:
            run = _run(key, config, task, data, backbone, options)
            append_run(options.store, run)
            known[key] = run
    runs = [known[key] for key in keys]
    print(f"\n{task.name}, {options.backbone}, {options.steps} steps\n")
    print(f"{format_table(runs)}\n\n{format_angles(runs)}\n\nKept in {options.store}")


def key_of(
    config: Config, data: Mapping[str, object], backbone: Mapping[str, object]
) -> str:
    """Hash what a run is of: the configuration, the images and the weights.

    Neither where these are, nor the code: see ``records.key_of``.
    """
    return hash_of(
        config.settings(), data["digests"], backbone["name"], backbone["digest"]
    )


def train(
    config: Config,
    task: Task,
    networks: Networks,
    backbone: nn.Module,
    device: torch.device,
    workers: int = 0,
) -> tuple[list[tuple[int, float, float]], list[Row]]:
    """Train networks in place, their backbone at a tenth of the learning rate.

    Runs that differ only in their rule see the same batches.

    Args:
        config: of the run.
        task: the images.
        networks: on the device.
        backbone: the part of their generator that has trained weights.
        device: where to compute.
        workers: how many processes read images of a domain; 0 for none.

    Returns:
        The evaluations, see :class:`ImageRun`, and the Gramians of the two gradients over
        the generator, one per harmonized update.
    """
    with from_extra("images"):
        from tqdm import tqdm

    recorder = Recorder(config.steps * config.inner_steps)
    make_update = partial(harmonized, rule=config.rule, recorder=recorder)
    step = make_step(config, networks, make_update, backbone.parameters(), task.classes)
    evaluations = []
    stream = batches(task, config.batch_size, config.steps, config.seed, workers)
    for done, batch in enumerate(tqdm(stream, total=config.steps), start=1):
        step(_to_input(batch, device), (done - 1) / config.steps)
        if config.is_evaluated(done):
            found = evaluate(networks, task.test, config.batch_size, device, workers)
            evaluations.append((done, *found))
    return evaluations, to_rows(recorder.flush().gramians)


@torch.no_grad()
def evaluate(
    networks: Networks,
    domain: Domain,
    size: int,
    device: torch.device,
    workers: int = 0,
) -> tuple[float, float]:
    """Classify a domain's images, ``size`` at a time; leave training mode as it was.

    Returns:
        The share of images that are right, and the mean of that share over the classes
        that the domain has, in percent.
    """
    training = networks.training
    networks.eval()
    count = max(domain.labels) + 1
    right, every = torch.zeros(count), torch.zeros(count)
    for images, labels in ordered_batches(domain, size, workers):
        predicted = networks(normalize(images.to(device))).argmax(1).cpu()
        every += labels.bincount(minlength=count)
        right += labels[predicted == labels].bincount(minlength=count)
    networks.train(training)
    shares = (right / every)[every > 0]
    return 100 * float(right.sum() / every.sum()), 100 * float(shares.mean())


def _to_input(batch: Batch, device: torch.device) -> Batch:
    # Sent as bytes, a quarter of what floats would be.
    source, labels, target = (one.to(device) for one in batch)
    return Batch(normalize(source), labels, normalize(target))


def _check_batch(task: Task, size: int) -> None:
    """Find out now what else the first step would, after minutes of loading."""
    for domain in (task.source, task.target):
        if size > len(domain.paths):
            raise ValueError(
                f"Invalid batch value: {size} ({domain.origin} has "
                f"{len(domain.paths)} images)"
            )


def _run(
    key: str,
    config: Config,
    task: Task,
    data: dict[str, object],
    backbone: dict[str, object],
    options: argparse.Namespace,
) -> ImageRun:
    """Train once, and say what came of it."""
    networks, trained = build_networks(
        config.method, task.classes, config.seed, options.backbone, options.weights
    )
    evaluations, rows = train(
        config,
        task,
        networks.to(options.device),
        trained,
        options.device,
        options.workers,
    )
    accuracy, class_accuracy = evaluations[-1][1:]
    weight = "" if config.trade_off == 1 else f" x {config.trade_off:g}"
    print(
        f"{config.method}, {config.rule}{weight}, seed {config.seed}: {accuracy:.1f} % "
        f"of the target's images, {class_accuracy:.1f} % in the mean of the classes"
    )
    return ImageRun(
        key=key,
        config=config.settings(),
        torch=torch.__version__,
        accuracy=accuracy,
        errors=[(done, 100 - right) for done, right, _ in evaluations],
        **angles(rows)._asdict(),
        device=str(options.device),
        data=data,
        backbone=backbone,
        versions={
            **{name: version(name) for name in ("transformers", "pillow")},
            "device": str(options.device),
        },
        evaluations=evaluations,
        class_accuracy=class_accuracy,
    )


def describe_data(task: Task) -> dict[str, object]:
    """Say what is kept of a task: see :class:`ImageRun`."""
    domains = {"source": task.source, "target": task.target, "test": task.test}
    return {
        "classes": task.classes,
        "origins": {role: str(one.origin) for role, one in domains.items()},
        "images": {role: len(one.paths) for role, one in domains.items()},
        # With the folder of the class, without those above it.
        "digests": {
            role: hash_of([Path(path).parts[-2:] for path in one.paths], one.labels)
            for role, one in domains.items()
        },
    }


def _describe_backbone(name: str, weights: str | None) -> dict[str, object]:
    backbone, _ = load_backbone(name, weights)
    return {
        "name": name,
        "weights": weights or BACKBONES[name].hub,
        "digest": digest_of(backbone),
        "parameters": sum(one.numel() for one in backbone.parameters()),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.uda.adapt", description=__doc__
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the data set: its lists, or the folders of its domains",
    )
    parser.add_argument("--dataset", choices=list(DATA_SETS), required=True)
    parser.add_argument("--source", required=True, metavar="DOMAIN")
    parser.add_argument("--target", required=True, metavar="DOMAIN")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=["CDAN+E"],
        help="(default: CDAN+E)",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        choices=list(ALL_RULES),
        default=["sum", "gh"],
        help="(default: sum gh)",
    )
    add_trade_offs(parser, [1.0], "1")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="(default: 1)"
    )
    parser.add_argument(
        "--backbone",
        choices=list(BACKBONES),
        default="resnet-50",
        help="(default: resnet-50)",
    )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="folder of the backbone's weights (default: those in the hub's cache)",
    )
    for name, default, text in (
        ("steps", STEPS, "training steps"),
        ("batch", BATCH, "images of each domain in a step"),
        ("evaluations", 10, "how often the target's test images are read"),
    ):
        parser.add_argument(
            f"--{name}",
            type=positive,
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--workers",
        type=whole,
        default=2,
        metavar="N",
        help="processes that read images, for each domain; 0 for none (default: 2)",
    )
    add_device(parser)
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("adapt.jsonl"),
        metavar="FILE",
        help="where the runs are kept (default: adapt.jsonl)",
    )
    return parser


if __name__ == "__main__":
    main()
