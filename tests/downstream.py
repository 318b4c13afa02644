"""A user's program, which `.ci/run` type-checks and runs beside the installed package."""

from functools import partial
from typing import TYPE_CHECKING, Any, assert_type

import torch
from torch import Tensor, nn

import ghopt
from ghopt import (
    Change,
    Harmonization,
    HarmonizedFromParams,
    HarmonizedOptimizer,
    Recorder,
    Recording,
    Weighting,
    gh,
    ghpp,
    measure,
    plain_sum,
)
from ghopt.report import Verdict, judge

if TYPE_CHECKING:  # not every program has these packages
    from transformers import TrainingArguments

    from ghopt.integrations.lightning import HarmonizedModule
    from ghopt.integrations.transformers import HarmonizedTrainer

    class Module(HarmonizedModule):
        """Trains on two losses."""

        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            """Give the losses by task."""
            return {"first": batch.mean(), "second": batch[batch_idx]}

    def fine_tune(model: nn.Module) -> None:
        """Train a model of Hugging Face."""
        HarmonizedTrainer(model, TrainingArguments("out")).train()

    # What is wrong must be seen to be.
    HarmonizedOptimizer("SGD")  # type: ignore[arg-type]
    Recorder().record("a step")  # type: ignore[arg-type]


def last_rules(gramian: Tensor) -> Tensor:
    """Weigh the tasks: a rule of one's own."""
    weights = torch.zeros_like(gramian[0])
    weights[-1] = 1
    return weights


def train(weighting: Weighting) -> Recording:
    """Train a small network on two tasks."""
    model = nn.Linear(3, 2)
    recorder = Recorder()
    optimizer = HarmonizedOptimizer(
        torch.optim.AdamW(model.parameters()), weighting, project_step=True
    )
    recorder.attach(optimizer, layers=model, step=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    changes: list[Change] = []
    optimizer.register_change_hook(changes.append)
    for _ in range(3):
        first, second = model(torch.ones(4, 3)).square().mean(0)
        optimizer.zero_grad()
        optimizer.backward({"first": first, "second": second})
        optimizer.step()
        schedule.step()
    last = assert_type(optimizer.last, Harmonization | None)
    if last:
        assert_type(last.names, tuple[str, ...])
        assert_type(last.weights, Tensor)
    assert_type(optimizer.state_dict(), dict[str, Any])
    return recorder.flush()


def main() -> None:
    """Train under several rules, and look at it."""
    rules: list[Weighting] = [gh, partial(ghpp, lam=0.5), plain_sum, last_rules]
    for rule in rules:
        verdict = assert_type(judge(train(rule)), Verdict)
        print(ghopt.__version__, verdict)
    model = nn.Linear(3, 2)
    losses = [*model(torch.ones(4, 3)).square().mean(0)]
    print(assert_type(measure(losses, model.parameters()), Harmonization).cosines)
    HarmonizedFromParams(model.parameters(), base_class=torch.optim.SGD, lr=0.1)


if __name__ == "__main__":
    main()
