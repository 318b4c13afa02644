"""What ``features=`` keeps of the promise, counted step by step."""

from itertools import islice

import pytest
import torch

from benchmarks.mtl.features import main, opposed
from benchmarks.mtl.problems import PROBLEMS, cells
from ghopt import gh
from tests.literal import literal_gradients, literal_update


def test_it_counts_what_opposes_whom_in_each_step_of_the_training() -> None:
    steps, seed = 120, 3
    found = opposed(cells.PROBLEM, seed, steps)
    training = cells.start(seed)
    trunk = training.model.get_submodule("trunk")
    counts = [0, 0, 0, 0]
    for inputs, targets in islice(training.batches, steps):
        z = trunk(inputs)
        heads = training.model.get_submodule("heads")
        outputs = {task: head(z)[:, 0] for task, head in heads.named_children()}
        losses = list(cells.task_losses(outputs, targets).values())
        at_z = torch.stack(
            [torch.autograd.grad(x, z, retain_graph=True)[0].flatten() for x in losses]
        )
        tau = gh(at_z.double() @ at_z.double().T).float()
        rows = literal_gradients(losses, training.shared).double()
        pulled = torch.autograd.grad(
            z, training.shared, (tau @ at_z).view_as(z), retain_graph=True
        )
        update = torch.cat([g.flatten() for g in pulled]).double()
        for row in rows:
            by_sum, by_features, by_gh = (
                bool(row @ v / (row.norm() * v.norm()) < -1e-6)
                for v in (rows.sum(0), update, literal_update(rows))
            )
            here = [by_sum, by_sum and by_features, by_features, by_gh]
            counts = [a + b for a, b in zip(counts, here, strict=True)]
        training.optimizer.zero_grad()
        torch.autograd.backward(torch.stack(losses).sum(), retain_graph=True)
        for parameter, gradient in zip(training.shared, pulled, strict=True):
            parameter.grad = gradient
        training.optimizer.step()
    assert counts[0] >= counts[1] > counts[3] == 0
    expected = [count / (steps * len(cells.TASKS)) for count in counts]
    assert found == pytest.approx(tuple(expected))


def test_the_command_prints_a_row_for_each_problem(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--problems", "cells", "--seeds", "1", "--steps", "2"])
    title, head, _, row = capsys.readouterr().out.splitlines()
    assert title == "tasks and steps opposed, in percent; 1 seeds"
    assert head.split()[:2] == ["problem", "sum"]
    by_sum = 100 * opposed(PROBLEMS["cells"], 0, 2).by_sum
    assert row.split()[:2] == ["cells", f"{by_sum:.1f}"]
