"""Migration from Pytorch-PCGrad: both loops end at the same parameters."""

from pytorch_optimizer import PCGrad
from torch.optim import SGD

from examples.from_pcgrad import halved, train_after, train_before
from examples.problem import TwoHeads, difference, make_data, task_losses
from ghopt import HarmonizedOptimizer, gh
from tests.examples.oracle import wide

STEPS = 40


def heads_of(model: TwoHeads) -> list[dict[str, object]]:
    return [{"params": [*model.up.parameters(), *model.down.parameters()]}]


def with_pcgrad_on_all() -> TwoHeads:
    model = TwoHeads().double()
    inputs, targets = wide(make_data())
    optimizer = PCGrad(SGD(model.parameters(), lr=0.02))
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [*task_losses(model(inputs), targets).values()]
        optimizer.pc_backward(losses)  # type: ignore[arg-type]  # its types are wrong
        optimizer.step()
    return model


def test_a_user_of_pcgrad_ends_at_the_parameters_of_before() -> None:
    data = wide(make_data())
    before, after = TwoHeads().double(), TwoHeads().double()
    train_before(before, *data, STEPS)
    assert train_after(after, *data, STEPS) > 4
    assert difference(before, after) < 1e-12
    assert difference(after, TwoHeads().double()) > 0.1


def test_with_heads_the_same_is_gh_and_half_the_rate_for_what_is_shared() -> None:
    model = TwoHeads().double()
    inputs, targets = wide(make_data())
    trunk = {"params": [*model.trunk.parameters()], "lr": 0.01}
    optimizer = HarmonizedOptimizer(SGD([trunk, *heads_of(model)], lr=0.02), gh)
    for _ in range(STEPS):
        optimizer.step(losses=task_losses(model(inputs), targets))
    assert difference(model, with_pcgrad_on_all()) < 1e-12


def test_with_shared_params_it_is_another_algorithm() -> None:
    model = TwoHeads().double()
    inputs, targets = wide(make_data())
    base = SGD(model.parameters(), lr=0.02)
    shared = model.trunk.parameters()
    optimizer = HarmonizedOptimizer(base, halved, shared_params=shared)
    for _ in range(STEPS):
        optimizer.step(losses=task_losses(model(inputs), targets))
    assert difference(model, with_pcgrad_on_all()) > 1e-3
