"""One whole run: train, evaluate, remember."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.uda.data import Split, Task, batches
from benchmarks.uda.methods.networks import Networks, build_networks
from benchmarks.uda.methods.rules import harmonized_gramian
from benchmarks.uda.methods.steps import Config, make_step
from benchmarks.uda.methods.updates import Harmonized, Record, to_row
from benchmarks.uda.results import Result, Row

Observe: TypeAlias = Callable[[int, Networks], None]
"""Look at the networks at an evaluation, after so many steps."""


def run(config: Config, task: Task, observe: Observe | None = None) -> Result:
    """Train once and return what is reported.

    Runs that differ only in their rule start from the same weights, see the same
    batches and drop the same units. Sets the global random state. Computes where the
    task's images are.

    ``observe`` is called at each evaluation; it must leave the networks and the global
    random state as they are.
    """
    networks = build_networks(config.method, config.seed, config.size)
    networks.to(task.target.device)
    record = Record()
    make_update = partial(
        Harmonized,
        rule=config.rule,
        record=record,
        null_every=10 if config.rule == "sum" else None,
        seed=config.seed,
    )
    step = make_step(config, networks, make_update)
    errors, validation = [], []

    def evaluate(done: int) -> None:
        errors.append((done, test_error(networks, task.test)))
        if task.validation is not None:
            validation.append((done, test_error(networks, task.validation)))
        if observe is not None:
            observe(done, networks)

    evaluate(0)
    stream = batches(task, config.batch_size, config.steps, config.seed)
    for done, batch in enumerate(stream, start=1):
        step(batch, (done - 1) / config.steps)
        if config.is_evaluated(done):
            evaluate(done)
    after = [harmonized_gramian(config.rule, gramian) for gramian in record.gramians]
    return Result(
        config=config.settings(),
        errors=errors,
        before=[_row(gramian) for gramian in record.gramians],
        after=[_row(gramian) for gramian in after],
        null=record.null,
        validation=validation,
    )


@torch.no_grad()
def test_error(networks: Networks, test: Split) -> float:
    """Share of a test set that is misclassified, in percent."""
    networks.eval()
    wrong = sum(
        int((networks(images).argmax(1) != labels).sum())
        for images, labels in zip(
            torch.split(test.images, 1000), torch.split(test.labels, 1000), strict=True
        )
    )
    networks.train()
    return 100 * wrong / len(test.labels)


def _row(gramian: Tensor) -> Row:
    return to_row(gramian[0, 0], gramian[0, 1], gramian[1, 1])
