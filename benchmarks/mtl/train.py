"""One run of one problem under one rule, and what a rule costs."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.common.clock import WARM_UPS, cpu_seconds, time_rounds
from benchmarks.mtl.problem import Batch, Problem, Training
from benchmarks.mtl.rules import RULES
from ghopt import HarmonizedOptimizer, Recorder, Recording

# Cosines nearer to 0 than this are no conflict: rounding of float32 gradients, and of
# TorchJD's solvers.
ORTHOGONAL = 1e-6

ROUNDS = 15


@dataclass(frozen=True)
class Conflict:
    """What the gradients of a run were like, over all steps, on the shared parameters.

    Attributes:
        obtuse: share of the pairs of tasks at an obtuse angle, in percent.
        cosine: mean over pairs and steps.
        opposed: share of the tasks that the update opposed, in percent.
        set_back: share of the tasks that the step of the optimizer opposed, in percent.
    """

    obtuse: float
    cosine: float
    opposed: float
    set_back: float


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        problem: its name.
        rule: its name.
        seed: of weights, batches and whatever else is drawn.
        steps: number of training steps.
        metrics: after the last step, by name.
        conflict: before harmonization, but for what the update opposed.
        parameters: SHA-256 of all parameters after the last step.
    """

    problem: str
    rule: str
    seed: int
    steps: int
    metrics: dict[str, float]
    conflict: Conflict
    parameters: str


def run(problem: Problem, rule: str, seed: int, steps: int) -> Result:
    """Train once. Runs that differ only in their rule start alike and see the same."""
    training = problem.start(seed)
    optimizer = harmonized(problem, training, rule)
    # Down to 0, so that the last batches do not decide the figures.
    decay = LambdaLR(optimizer, lambda done: 1 - done / steps)
    recorder = Recorder(steps)
    recorder.attach(optimizer, step=True)
    for batch in islice(training.batches, steps):
        optimizer.zero_grad()
        optimizer.backward(training.losses(batch))
        optimizer.step()
        decay.step()
    return Result(
        problem.name,
        rule,
        seed,
        steps,
        training.evaluate(),
        conflict(recorder.flush()),
        digest(training.model),
    )


def harmonized(problem: Problem, training: Training, rule: str) -> HarmonizedOptimizer:
    """Wrap the optimizer of a training."""
    chosen = RULES[rule]
    return HarmonizedOptimizer(
        training.optimizer,
        chosen.make(),
        shared_params=training.shared,
        project_step=chosen.projects,
        protect=[problem.main] if problem.main and chosen.protects else None,
    )


def conflict(recording: Recording) -> Conflict:
    """Summarise the steps of a run, of two tasks or more."""
    first, second = torch.tensor(recording.pairs).unbind(1)
    cosines = recording.cosines[:, first, second]
    updates = recording.update_cosines(recording.weights)
    return Conflict(
        100 * float((cosines < -ORTHOGONAL).double().mean()),
        float(cosines.mean()),
        100 * float((updates < -ORTHOGONAL).double().mean()),
        100 * float(recording.step_opposed.double().mean()),
    )


def digest(model: nn.Module) -> str:
    """SHA-256 of the bits of all parameters."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def time_ratio(problem: Problem, rule: str, rounds: int = ROUNDS) -> float:
    """CPU time of a whole step under a rule over that of the plain sum.

    The plain sum is what one writes without ``ghopt``: ``sum(losses).backward()`` and
    the bare optimizer, on a network of its own. Both take the same batches, and the
    ratios of neighbours have their median taken.
    """
    trainings = problem.start(0), problem.start(0)
    steps = plain_step(trainings[0]), _harmonized_step(problem, trainings[1], rule)
    calls = (
        [partial(step, batch) for step in steps]
        for batch in islice(trainings[0].batches, WARM_UPS + rounds)
    )
    return median(own / plain for plain, own in time_rounds(calls, cpu_seconds))


def plain_step(training: Training) -> Callable[[Batch], None]:
    """Make the step that everybody writes: the sum, one backward pass."""

    def step(batch: Batch) -> None:
        training.optimizer.zero_grad()
        torch.autograd.backward(torch.stack([*training.losses(batch).values()]).sum())
        training.optimizer.step()

    return step


def _harmonized_step(
    problem: Problem, training: Training, rule: str
) -> Callable[[Batch], None]:
    optimizer = harmonized(problem, training, rule)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        optimizer.backward(training.losses(batch))
        optimizer.step()

    return step
