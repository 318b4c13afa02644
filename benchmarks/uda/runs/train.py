"""One whole run: train, evaluate, remember."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch

from benchmarks.common.digits import Split
from benchmarks.uda.data import Task, batches
from benchmarks.uda.methods.gramians import Row, to_rows
from benchmarks.uda.methods.networks import Networks, build_networks
from benchmarks.uda.methods.rules import harmonized_gramian
from benchmarks.uda.methods.steps import Config, make_step
from benchmarks.uda.methods.updates import (
    MakeUpdate,
    harmonized,
    looking_at_unrelated,
)
from benchmarks.uda.runs.records import Result, key_of
from ghopt import Recorder

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
    recorder = Recorder(config.steps * config.inner_steps)
    null: list[Row] = []
    make_update: MakeUpdate = partial(harmonized, rule=config.rule, recorder=recorder)
    if config.rule == "sum":
        make_update = partial(
            looking_at_unrelated,
            make_update=make_update,
            null=null,
            every=10,
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
    gramians = recorder.flush().gramians
    return Result(
        config=config.settings(),
        errors=errors,
        before=to_rows(gramians),
        after=to_rows([harmonized_gramian(config.rule, one) for one in gramians]),
        null=null,
        validation=validation,
        key=key_of(config, task.target.device, task.foreign),
        torch=torch.__version__,
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
