"""From TorchJD: `mtl_backward` and `jac_to_grad` become one call, with the same result.

Run it with `python -m examples.from_torchjd`.

For whom: a loop that calls `torchjd.autojac.mtl_backward` and `jac_to_grad`, or
`torchjd.autojac.backward` and `jac_to_grad`.

What changes: the optimizer is wrapped, and `backward` replaces both calls. Pass the
*weighting*, `UPGradWeighting()`, where TorchJD takes the aggregator, `UPGrad()`. An aggregator
is refused, with the name of its weighting in the error. `shared_params` are the parameters
before `features`. Where you called `torchjd.autojac.backward`, leave `shared_params` out.

What you get: the same parameters as before, to the last digits, without `.jac` fields, and
accumulation over micro-batches, DDP and FSDP2, loss scaling, a record of the conflicts. Should
you go on to `gh`: UPGrad gives the *mean* of the tasks, `gh` their *sum*. Divide,
`lambda gramian: gh(gramian) / 2`, or lower the rate.

Limits: `ConFIG`, `GradDrop`, `NashMTL`, `TrimmedMean` and `ExcessMTL` are no functions of the
Gramian and stay in TorchJD, and so do Jacobians of vectors. `MoDoWeighting` and
`SDMGradWeighting` need the gradients of two batches, and ghopt gives those of one.

Versions: torchjd 0.18.0, in each run of our tests.
"""

from torch import Tensor
from torch.optim import SGD
from torchjd.aggregation import UPGrad, UPGradWeighting
from torchjd.autojac import jac_to_grad, mtl_backward

from examples.problem import TwoHeads, difference, make_data, task_losses
from ghopt import HarmonizedOptimizer


def train_before(model: TwoHeads, inputs: Tensor, targets: Tensor, steps: int) -> None:
    """Train as users of TorchJD do."""
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    aggregator = UPGrad()
    for _ in range(steps):
        features = model.trunk(inputs)
        outputs = model.up(features)[:, 0], model.down(features)[:, 0]
        losses = task_losses(outputs, targets)
        optimizer.zero_grad()
        mtl_backward([*losses.values()], features=features)
        jac_to_grad(model.trunk.parameters(), aggregator)
        optimizer.step()


def train_after(model: TwoHeads, inputs: Tensor, targets: Tensor, steps: int) -> int:
    """Train the same with ghopt; count the steps in which the tasks were in conflict."""
    optimizer = HarmonizedOptimizer(
        SGD(model.parameters(), lr=0.02, momentum=0.9),
        UPGradWeighting(),
        shared_params=model.trunk.parameters(),
    )
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
