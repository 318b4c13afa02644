"""One whole run of a published method, which goes on where it was stopped."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.uda.data import Task, batches
from benchmarks.uda.data.published import MARGINS, draw
from benchmarks.uda.methods.gramians import angles
from benchmarks.uda.methods.published import CDAN, Training
from benchmarks.uda.methods.published_cdan import CdanTraining
from benchmarks.uda.methods.steps import Config
from benchmarks.uda.runs.records import Run, key_of
from benchmarks.uda.runs.train import test_error


@dataclass(frozen=True, kw_only=True)
class PublishedRun(Run):
    """The numbers of a run.

    Attributes:
        seconds: CPU time of its training and evaluations.
    """

    seconds: float


def key_of_published(config: Config) -> str:
    """Hash what a run is of: the configuration, the data and how these are cut."""
    if config.method == CDAN:
        return key_of(config)
    margins = [f"{name} {margin}" for name, margin in sorted(MARGINS.items())]
    return key_of(config, foreign=margins)


def checkpoint_of(config: Config, folder: Path) -> Path:
    """Name the file of a run that is not finished."""
    return folder / f"{key_of_published(config)}.pt"


def run(config: Config, task: Task, folder: Path) -> PublishedRun:
    """Train once; leave a checkpoint in ``folder`` at each evaluation, go on from it.

    Runs that differ only in their rule start from the same weights, see the same batches
    and drop the same units. Sets the global random state. What is gone on with is the same
    to the bit as what never stopped. The checkpoint stays: it is the caller's to remove it
    when the run is kept.
    """
    path = checkpoint_of(config, folder)
    training: Training | CdanTraining
    if config.method == CDAN:
        training = CdanTraining(config)
    else:
        task, training = draw(task, config.seed), Training(config)
    seen: dict[str, Any] = {"done": 0, "seconds": 0.0, "errors": [], "validation": []}
    if path.exists():
        # Of our own making: it holds plain tuples beside tensors.
        state = torch.load(path, weights_only=False)
        seen = state["seen"]
        training.load(state["training"])
    start = time.process_time() - seen["seconds"]
    stream = batches(task, config.batch_size, config.steps, config.seed)
    for done, batch in enumerate(islice(stream, seen["done"], None), seen["done"] + 1):
        training.step(batch)
        if config.is_evaluated(done):
            seen["done"] = done
            seen["errors"].append((done, test_error(training.networks, task.test)))
            if task.validation is not None:
                error = test_error(training.networks, task.validation)
                seen["validation"].append((done, error))
            seen["seconds"] = time.process_time() - start
            _save({"seen": seen, "training": training.state()}, path)
    return _summarize(config, seen, training)


def _save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def _summarize(
    config: Config, seen: Mapping[str, Any], training: Training | CdanTraining
) -> PublishedRun:
    errors, validation = seen["errors"], seen["validation"]
    accuracies = {done: 100 - error for done, error in errors}
    chosen = min(((error, -done) for done, error in validation), default=None)
    selected = {} if chosen is None else {"selected": accuracies[-chosen[1]]}
    return PublishedRun(
        key=key_of_published(config),
        config=config.settings(),
        torch=torch.__version__,
        accuracy=accuracies[config.steps],
        errors=errors,
        validation=validation,
        **selected,
        **angles(training.rows)._asdict(),
        seconds=round(seen["seconds"]),
    )
