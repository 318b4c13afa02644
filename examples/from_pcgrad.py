"""From Pytorch-PCGrad: `pc_backward` becomes `backward`, with the same result for two tasks.

Run it with `python -m examples.from_pcgrad`.

For whom: a loop that calls `pc_backward` of https://github.com/WeiChengTseng/Pytorch-PCGrad, of
one of its many copies, or of `PCGrad` in `pytorch_optimizer`.

What changes: `HarmonizedOptimizer` in place of `PCGrad`, and `backward` in place of
`pc_backward`. PCGrad takes the mean of the projected gradients, `gh` their sum: so
`lambda gramian: gh(gramian) / 2` (`halved` below) gives the same parameters to the last digits.
If you passed `reduction="sum"`: `gh` alone is what you meant. Pytorch-PCGrad takes the mean
there, too, by a slip; `pytorch_optimizer` has mended it.

Mind four differences:

* Heads. Where the optimizer holds parameters that only one task reaches, PCGrad halves the
  others alone, and takes the lengths of the gradients over all parameters, heads included.
  The same with ghopt is `gh`, with half the rate for the shared parameters (`Adam` needs no
  half). We advise `shared_params=trunk.parameters()` instead: the conflict is measured where
  the tasks meet, and heads receive the gradients of their own tasks. That is another algorithm.
* Three or more tasks. PCGrad projects in a random order, and its update may oppose a task.
  `gh` projects on all at once. The results differ.
* `pc_backward` replaces `.grad`, `backward` adds to it: call `zero_grad` first.
* A parameter that no task reaches keeps `.grad = None`. Pytorch-PCGrad gives it zeros, so that
  weight decay and momentum move it.

What you get: no copies of the flat gradients, and one pass per task as before: on the networks
of `benchmarks/speed` a step takes half to a sixth of Pytorch-PCGrad's time, two thirds on the
smallest. Micro-batches, DDP and FSDP2, a record of the conflicts.

Versions: pytorch_optimizer 4.1.0, in each run of our tests. Pytorch-PCGrad is no package: its
commit e987ac6 was compared by hand on 2026-11-29, and 40 steps in float64 ended equal to 4e-16.
"""

from pytorch_optimizer import PCGrad
from torch import Tensor
from torch.optim import SGD

from examples.problem import TwoHeads, difference, make_data, task_losses
from ghopt import HarmonizedOptimizer, gh


def halved(gramian: Tensor) -> Tensor:
    """Weigh by GH, as PCGrad does with its mean of two tasks."""
    return gh(gramian) / 2


def train_before(model: TwoHeads, inputs: Tensor, targets: Tensor, steps: int) -> None:
    """Train the trunk as users of PCGrad do; the heads stay as they are."""
    optimizer = PCGrad(SGD(model.trunk.parameters(), lr=0.02, momentum=0.9))
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [*task_losses(model(inputs), targets).values()]
        optimizer.pc_backward(losses)  # type: ignore[arg-type]  # its types are wrong
        optimizer.step()


def train_after(model: TwoHeads, inputs: Tensor, targets: Tensor, steps: int) -> int:
    """Train the same with ghopt; count the steps in which the tasks were in conflict."""
    base = SGD(model.trunk.parameters(), lr=0.02, momentum=0.9)
    optimizer = HarmonizedOptimizer(base, halved)
    conflicts = 0
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.backward(task_losses(model(inputs), targets))
        optimizer.step()
        last = optimizer.last
        assert last is not None  # backward has just run
        conflicts += bool(last.cosines[0, 1] < 0)
    return conflicts


def main() -> None:
    """Train both, and print how far apart they end."""
    before, after = TwoHeads(), TwoHeads()
    train_before(before, *make_data(), steps=40)
    conflicts = train_after(after, *make_data(), steps=40)
    print(f"{conflicts} of 40 steps in conflict")
    print(f"largest difference of a parameter: {difference(before, after):.1e}")


if __name__ == "__main__":
    main()
