"""What ``gh`` promises of the update itself, on gradients as float32 networks make them.

Not of weights in exact arithmetic: of the tensors that ``combine`` leaves, against the
gradients in float64.
"""

from itertools import cycle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from ghopt import HarmonizedOptimizer, gh
from tests.networks import Gradients, flat, network_gradients, seeds, widths
from tests.rows import combine, gramian
from tests.strategies import fewer_examples

# Opposition as a cosine, and the effect of another order of the tasks in lengths of the
# longest gradient. bfloat16 itself rounds an update by 2**-8.
BOUNDS = {
    torch.float64: (1e-3, 1e-3),
    torch.float32: (1e-3, 1e-3),
    torch.bfloat16: (2**-6, 2**-6),
}
# Updates shorter than this, in lengths of the longest gradient, count as none.
NOTHING = 1e-4

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
tasks_of_each_kind = pytest.mark.parametrize("tasks", [3, 4, 5, 8, 12])


def update_of(gradients: Gradients, order: list[int]) -> tuple[Tensor, Tensor]:
    """Give the update as float64, and the weights in lengths, in the original order."""
    shuffled = [[g if g is None else g.clone() for g in gradients[k]] for k in order]
    products = gramian(shuffled)
    weights = gh(products)
    norms = products.diagonal().sqrt()
    lengths = torch.empty_like(weights)
    lengths[order] = weights * norms / norms.max()
    (update,) = flat([combine(shuffled, weights, products)])
    return update, lengths


def check(gradients: Gradients, dtype: torch.dtype, order: list[int]) -> None:
    opposition, disorder = BOUNDS[dtype]
    jacobian = flat(gradients)
    norms = jacobian.norm(dim=1)
    longest = norms.max()
    if longest == 0:
        return
    update, lengths = update_of(gradients, [*range(len(norms))])
    if update.norm() > NOTHING * longest:
        reach = (norms * update.norm()).clamp(min=1e-300)
        assert (jacobian @ update / reach).min() >= -opposition
    shuffled, _ = update_of(gradients, order)
    assert (shuffled - update).norm() <= disorder * longest
    # sqrt(8 / 1e-8) for each of the tasks.
    assert lengths.max() <= 3e4 * len(norms)


@tasks_of_each_kind
@given(width=widths, seed=seeds, data=st.data())
def test_no_task_is_opposed_whatever_float32_left_of_the_angle(
    tasks: int, width: int, seed: int, data: st.DataObject
) -> None:
    gradients = network_gradients(tasks, width, seed)
    check(gradients, torch.float32, data.draw(st.permutations(range(tasks))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@tasks_of_each_kind
@fewer_examples
@given(width=widths, seed=seeds, data=st.data())
def test_no_task_is_opposed_in_other_dtypes(
    tasks: int, dtype: torch.dtype, width: int, seed: int, data: st.DataObject
) -> None:
    gradients = network_gradients(tasks, width, seed, dtype)
    check(gradients, dtype, data.draw(st.permutations(range(tasks))))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@tasks_of_each_kind
def test_no_task_is_opposed_in_300_networks(tasks: int, dtype: torch.dtype) -> None:
    for seed, width in zip(range(300), cycle([4, 16, 64, 250, 1000]), strict=False):
        gradients = network_gradients(tasks, width, seed, dtype)
        check(gradients, dtype, [*reversed(range(tasks))])


@both_dtypes
@pytest.mark.parametrize("width", [4, 16, 1000])
def test_two_losses_on_one_scalar_beside_a_third(
    width: int, dtype: torch.dtype
) -> None:
    """The report that found weights of 4e7: opposite gradients, but for rounding."""
    for seed in range(30):
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Linear(8, width), nn.Tanh()).to(dtype)
        a, b = (nn.Linear(width, 1).to(dtype) for _ in range(2))
        hidden = trunk(torch.randn(1, 8).to(dtype))
        y, z = a(hidden).squeeze(), b(hidden).squeeze()
        losses = [(y - 1) ** 2, (y + 1).abs(), (z - 1) ** 2]
        params = [*trunk.parameters()]
        gradients = [torch.autograd.grad(x, params, retain_graph=True) for x in losses]
        optimizer = HarmonizedOptimizer(SGD(params, 0.1))
        optimizer.backward(losses)
        jacobian = flat([list(task) for task in gradients])
        (update,) = flat([[p.grad for p in params]])
        norms = jacobian.norm(dim=1)
        assert update.norm() <= 3 * norms.sum()
        if update.norm() > NOTHING * norms.max():
            assert (jacobian @ update / norms / update.norm()).min() >= -1e-3


@pytest.mark.parametrize("exponent", range(-12, -1))
@fewer_examples
@given(tasks=st.sampled_from([3, 4, 5, 8, 12]), seed=seeds)
def test_no_task_is_opposed_between_resolved_and_dropped(
    exponent: int, tasks: int, seed: int
) -> None:
    """Integers in few dimensions, and parts of any size beside them: all angles there are.

    Some of the rows have nothing but the small part, which then decides a direction.
    """
    generator = torch.Generator().manual_seed(seed)
    dims = int(torch.randint(1, tasks, (), generator=generator))

    def integers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    def some(share: float) -> Tensor:
        return torch.rand(tasks, 1, generator=generator) < share

    large = integers(tasks, dims).where(some(0.7), 0)
    small = integers(tasks, 2) * torch.where(some(0.6), 10.0**exponent, 1.0).double()
    rows = torch.cat([large, small], dim=1)
    check([[row.clone()] for row in rows], torch.float64, [*reversed(range(tasks))])


def test_a_task_is_opposed_by_no_more_than_the_docstring_says() -> None:
    """Two gradients t from opposite, and one against what they have in common."""
    for exponent in torch.linspace(-9, -1, 81).tolist():
        t = 10**exponent
        rows = torch.tensor([[1, 0], [-1, t], [0, -1]], dtype=torch.float64)
        rows = rows / rows.norm(dim=1, keepdim=True)
        opposed = (rows @ (gh(rows @ rows.T) @ rows)).min()
        assert opposed >= -3 * 3.6e-5
        # Resolved from s = t^2 / 2 = 1e-7 on: the only update that opposes nobody is 0.
        if t**2 / 2 >= 1e-7:
            assert opposed >= -3 * 1e-8


@pytest.mark.parametrize("known", [True, False])
def test_float32_gradients_that_cancel_are_summed_in_float64(known: bool) -> None:
    big = torch.tensor([1.0, 2.0, 3.0])
    tasks: Gradients = [[big.clone()], [-big + torch.tensor([2**-20, 0, 0])]]
    weights = torch.tensor([3.0, 3.0000001], dtype=torch.float64)
    expected = weights @ flat(tasks)
    products = gramian(tasks) if known else None
    (update,) = combine(tasks, weights, products)
    assert update is not None
    assert update.equal(expected.float())
