"""One vmapped pass for all tasks, against gradients taken one by one."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, save_on_cpu
from torch.optim import SGD
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import ghopt
from ghopt import HarmonizedOptimizer
from ghopt.gradients import graph, together
from ghopt.gradients.graph import HOOKS, edges_of
from ghopt.gradients.together import KINDS, Together, TogetherGradients
from tests.literal import literal_gradients, literal_update
from tests.versions import needs

pytestmark = needs.faster_passes

Losses: TypeAlias = list[Tensor]
Case: TypeAlias = Callable[[], tuple[nn.Module, Losses]]
WIDTH, ROWS, TASKS = 6, 6, 6


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Build a trunk of five layers: enough nodes for six tasks to gain."""
    torch.manual_seed(0)
    layers = [[nn.Linear(WIDTH, WIDTH), nn.Tanh()] for _ in range(5)]
    return nn.Sequential(*[part for pair in layers for part in pair]).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, dtype=dtype, generator=generator)


def losses(out: Tensor, tasks: int = TASKS) -> Losses:
    """Take distances to targets that oppose each other."""
    generator = torch.Generator().manual_seed(2)
    targets = torch.randn(tasks, *out.shape, generator=generator).to(out)
    return [F.mse_loss(out, (-1) ** k * (1 + t)) for k, t in enumerate(targets)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the steps in which all tasks shared a pass."""
    count, run = [0], Together.run

    def counting(self: Together, *args: Any, **options: Any) -> Any:
        found = run(self, *args, **options)
        count[0] += 1
        return found

    with patch.object(Together, "run", counting):
        yield count


def check(case: Case, shared: bool, **options: Any) -> None:
    """See that a step gives the literal update, and whether the tasks shared a pass."""
    model, tasks = case()
    parameters = [*model.parameters()]
    jacobian = literal_gradients(tasks, parameters)
    expected = torch.split(literal_update(jacobian), [p.numel() for p in parameters])
    HOOKS.note()  # as at the end of the step before
    model, tasks = case()
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    with counted() as count:
        optimizer.backward(tasks, **options)
    assert optimizer.last is not None
    assert_close(optimizer.last.gramian, jacobian @ jacobian.T, rtol=1e-12, atol=1e-13)
    for parameter, part in zip(model.parameters(), expected, strict=True):
        if parameter.grad is None:
            assert not part.any()
        else:
            assert_close(parameter.grad.reshape(-1), part, rtol=1e-9, atol=1e-12)
            assert parameter.grad.stride() == parameter.stride()
    assert count == [int(shared)]


def plain(tasks: int = TASKS) -> tuple[nn.Module, Losses]:
    model = network()
    return model, losses(model(inputs()), tasks)


def hook(tensor: Tensor, function: Callable[[Tensor], object]) -> Any:
    return tensor.register_hook(function)  # type: ignore[no-untyped-call]  # torch's


def double(grad: Tensor) -> Tensor:
    return 2 * grad


# --- the same result -----------------------------------------------------------------


@pytest.mark.parametrize("tasks", [6, 7, 8])
def test_tasks_with_a_trunk_in_common_share_a_pass(tasks: int) -> None:
    check(partial(plain, tasks), shared=True)


def test_five_tasks_share_a_pass_through_a_longer_trunk() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = nn.Sequential(network(), network())
        return model, losses(model(inputs()), 5)

    check(case, shared=True)


def test_in_float32_the_result_differs_by_its_rounding() -> None:
    grads = []
    for passes in ("auto", "separate"):
        HOOKS.note()
        model = network(torch.float32)
        out = model(inputs(torch.float32))
        with counted() as count:
            ghopt.backward(losses(out), model.parameters(), passes=passes)
        assert count == [int(passes == "auto")]
        found = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(grad.dtype is torch.float32 for grad in found)
        grads.append(torch.cat([grad.flatten() for grad in found]))
    assert (grads[0] - grads[1]).norm() < 1e-6 * grads[1].norm()


class Heads(nn.Module):
    """A trunk and a head for each task, of two layers, and a layer that nobody uses."""

    trunk: nn.Sequential
    heads: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self.trunk = network()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, 1))
            for _ in range(TASKS)
        )
        self.unused = nn.Linear(2, 2)
        self.double()

    def forward(self, x: Tensor) -> Losses:
        features = self.trunk(x)
        return [head(features).exp().mean() for head in self.heads]


def with_heads() -> tuple[Heads, Losses]:
    torch.manual_seed(0)
    model = Heads()
    return model, model(inputs())


def test_heads_of_their_own_receive_what_their_task_alone_gives() -> None:
    check(with_heads, shared=True)


def test_tasks_may_leave_the_trunk_at_two_places() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:8](inputs())
        return model, [*losses(model[8:](hidden), 4), *losses(hidden, 3)]

    check(case, shared=True)


def test_a_head_may_look_up_some_rows() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        out = model(inputs())
        some = out[torch.tensor([0, 2]), 1:].square().sum()
        return model, [*losses(out, TASKS - 1), some]

    check(case, shared=True)


def count_of_nonzero(x: Tensor) -> Tensor:
    """Take the norm of order 0: autograd hands nothing back."""
    count: Tensor = torch.linalg.vector_norm(x, 0)
    return count


def test_a_task_may_hand_nothing_back() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        out = model(inputs())
        return model, [count_of_nonzero(out), *losses(out)]

    check(case, shared=True)


def test_a_head_may_receive_nothing() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        idle = nn.Linear(WIDTH, 1).double()
        out = model(inputs())
        return nn.Sequential(model, idle), [count_of_nonzero(idle(out)), *losses(out)]

    check(case, shared=True)


def test_tasks_that_all_hand_nothing_back_are_an_error_as_ever() -> None:
    HOOKS.note()
    model = network()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    out = model(inputs())
    with counted() as count, pytest.raises(ValueError, match="losses must reach"):
        optimizer.backward([count_of_nonzero(out + k) for k in range(TASKS)])
    assert count == [1]
    assert all(p.grad is None for p in model.parameters())


def test_losses_may_be_parts_of_one_vector() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, list(model(inputs()).square().sum(0)[:TASKS].unbind())

    check(case, shared=True)


def test_a_loss_may_serve_two_tasks() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain(6)
        return model, [*tasks, tasks[0]]

    check(case, shared=True)


def test_a_task_without_grad_counts_as_zero() -> None:
    HOOKS.note()
    grads = []
    for extra in ([], [torch.ones((), dtype=torch.float64)]):
        model, tasks = plain()
        optimizer = HarmonizedOptimizer(SGD(model.parameters()))
        with counted() as count:
            optimizer.backward([*extra, *tasks])
        assert count == [1]
        grads.append([p.grad for p in model.parameters()])
    assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-15)
    assert optimizer.last is not None
    assert optimizer.last.gramian[0].eq(0).all()
    assert optimizer.last.gramian[1:, 1:].diagonal().gt(0).all()


def test_a_slope_that_is_infinite_for_one_task_does_not_show_in_another() -> None:
    # In a pass of all rows through all heads, zero times infinity would.
    HOOKS.note()
    model = network()
    out = model(inputs())
    tasks = [*losses(out, TASKS - 1), (out - out.detach()).abs().sum().sqrt()]
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with counted() as count:
        optimizer.backward(tasks)
    assert count == [1]
    assert optimizer.last is not None
    assert optimizer.last.gramian[:-1, :-1].isfinite().all()
    assert optimizer.last.gramian[-1].isnan().all()
    assert all(p.grad.isnan().all() for p in model.parameters() if p.grad is not None)


EXPRESSIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "signs": lambda x, a, b: -(x * a).abs() + (x - b).neg() - a * 2,
    "numbers": lambda x, a, b: 3 - (x + 1) * a / 2 - b + 0.5,
    "quotients": lambda x, a, b: x / (a * a + 2) + a / (b.exp() + x.square()),
    "powers": lambda x, a, b: ((x * a) ** 3 + b**2 + 4).sqrt().log() + (a**2 + 1) ** -1,
    "waves": lambda x, a, b: (x * a).sin() + (x * b).cos(),
    "squashed": lambda x, a, b: (x @ a).sigmoid() + (x @ b).tanh() + F.softplus(x @ a),
    "rectified": lambda x, a, b: (x @ a).relu() + F.leaky_relu(x @ b) + F.elu(x @ a),
    "smooth": lambda x, a, b: F.gelu(x @ a) * F.silu(x @ b) + F.logsigmoid(x @ a),
    "clamped": lambda x, a, b: (x @ a).clamp(-1, 1) + (x @ b).clamp(min=0),
    "shares": lambda x, a, b: (x @ a).softmax(1) + (x @ b).log_softmax(0),
    "batches": lambda x, a, b: torch.bmm((x @ a)[None], b[None])[0],
    "vectors": lambda x, a, b: (x @ (a @ b.sum(0)))[:, None] * a,
    "layer": lambda x, a, b: F.linear(x, a, b[0]),
    "norm": lambda x, a, b: F.layer_norm(x @ a, [WIDTH], b[0], b[1]),
    "joined": lambda x, a, b: torch.cat([x @ a, x @ b], 1)[:, 3:9].clone(),
    "stacked": lambda x, a, b: torch.stack([x @ a, x @ b]).sum(0) + a[0].expand(6, 6),
    "split": lambda x, a, b: torch.cat([*torch.functional.split(x @ a @ b, 3, 1)][::-1], 1),
    "unbound": lambda x, a, b: torch.stack((x * a[0]).unbind(1), 1) * b.select(0, 1),
    "shaped": lambda x, a, b: (
        (x @ a).view(6, 2, 3).permute(2, 0, 1).transpose(0, 1).reshape(6, 6) @ b.t()
    ),
    "squeezed": lambda x, a, b: (x @ a)[:, None].squeeze(1) + b[:1, :1].squeeze() * x,
    "means": lambda x, a, b: (x @ a).mean(0) + (x * b.mean()) + (x @ b).sum(1, True),
    "distance": lambda x, a, b: x * F.mse_loss(x @ a, x @ b) + (a * b).sum() + a,
    "whole": lambda x, a, b: (
        (torch.ones(6, 2, 6).double() * x[:, None]).matmul(a).sum(1) * b.sum()
    ),
}  # fmt: skip


def expressed(name: str) -> tuple[nn.Module, Losses]:
    torch.manual_seed(0)
    model = nn.Module()
    for part in "ab":
        weight = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
        model.register_parameter(part, weight)
    found = EXPRESSIONS[name](inputs(), *model.parameters())
    return model, losses(found * 1.0)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_kind_of_node_comes_out_the_same_and_without_a_warning(name: str) -> None:
    # Warnings are errors here: torch gives one where it takes the rows one by one.
    with patch.object(together, "_pays", return_value=True):
        check(partial(expressed, name), shared=True)


def test_no_kind_of_node_is_left_out() -> None:
    nodes = (node for name in EXPRESSIONS for node in edges_of(expressed(name)[1]))
    assert not KINDS - {node.name() for node in nodes}


@st.composite
def programs(draw: st.DrawFn) -> Case:
    """Draw small networks; which outputs a task sees; parameters that are shared."""
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    tasks = draw(st.integers(4, 6))
    acts = [draw(st.sampled_from(["tanh", "sigmoid", "sin"])) for _ in widths]
    deep = st.sampled_from([len(widths) - 1, len(widths) // 2])
    depths = [draw(st.lists(deep, min_size=1, max_size=2)) for _ in range(tasks)]
    frozen = draw(st.integers(1, len(widths)))
    has_heads = [draw(st.booleans()) for _ in range(tasks)]
    seed = draw(st.integers(0, 99))

    def case() -> tuple[nn.Module, Losses]:
        torch.manual_seed(seed)
        layers = [nn.Linear(*pair) for pair in pairwise(widths)]
        heads = nn.ParameterList([torch.randn(1) for _ in range(tasks)])
        model = nn.ModuleList([*layers, heads]).double()
        if frozen < len(layers):
            layers[frozen].requires_grad_(False)
        x = torch.randn(3, widths[0], dtype=torch.float64)
        outs = [x]
        for found, act in zip(layers, acts, strict=False):
            outs.append(getattr(found(outs[-1]), act)())
        scalars = [
            torch.stack(
                [(outs[d] * torch.randn(())).square().sum() for d in of_task]
            ).sum()
            for of_task in depths
        ]
        pairs = zip(scalars, heads, has_heads, strict=True)
        return model, [
            (s * h).sum() if used else s
            for s, h, used in pairs
            if s.requires_grad or used
        ]

    return case


@given(programs())
def test_any_network_comes_out_the_same(case: Case) -> None:
    grads, gramians = [], []
    for passes in ("auto", "separate"):
        HOOKS.note()
        model, tasks = case()
        optimizer = HarmonizedOptimizer(SGD(model.parameters()), passes=passes)
        with patch.object(together, "_pays", return_value=True):
            optimizer.backward(tasks)
        grads.append([p.grad for p in model.parameters()])
        assert optimizer.last is not None
        gramians.append(optimizer.last.gramian)
    scale = float(gramians[1].diagonal().max())
    assert_close(gramians[0], gramians[1], rtol=0, atol=1e-12 * scale)
    for one, two in zip(*grads, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert_close(one, two, rtol=1e-6, atol=1e-9 * scale**0.5)


# --- what else is as ever --------------------------------------------------------------


def test_all_that_is_no_parameter_of_the_optimizer_receives_the_plain_sum() -> None:
    grads = []
    for passes in ("auto", "separate"):
        HOOKS.note()
        torch.manual_seed(0)
        model = Heads()
        x = inputs().requires_grad_()
        x.grad = torch.ones_like(x)
        tasks = model(x)
        base = SGD([*model.trunk.parameters(), *model.heads[0].parameters()])
        optimizer = HarmonizedOptimizer(
            base,
            shared_params=[*model.trunk.parameters()][2:],
            passes=passes,
        )
        with counted() as count:
            optimizer.backward(tasks)
        assert count == [int(passes == "auto")]
        grads.append([x.grad, *[p.grad for p in model.parameters()]])
    assert grads[0][-1] is None
    assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-14)


def test_a_gradient_that_autograd_gives_to_two_parameters_is_two_tensors() -> None:
    model, found = plain()
    one, other = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))
    found[0] = found[0] + (one + other)  # one gradient for both, which one task reaches
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), lr=0.1))
    with counted() as steps:
        optimizer.backward(found)
    assert steps == [1]
    assert one.grad is not None
    assert other.grad is not None
    one.grad += 1
    assert float(other.grad) == 1


def test_sums_of_gradients_that_cancel_are_rounded_once() -> None:
    first = torch.linspace(-1, 1, 40_000)
    rows = torch.stack([first, first * (1 + 2**-20)])
    parameter = nn.Parameter(torch.zeros(200, 200))
    gradients = TogetherGradients({parameter: rows}, 2)
    gramian = gradients.gramian()
    weights = torch.tensor([1.0, -1.0 / (1 + 2**-19)], dtype=torch.float64)
    expected = (weights @ rows.double()).float().view(200, 200)
    assert gradients.combine(weights, gramian)[parameter].equal(expected)
    assert gradients.combine(weights)[parameter].equal(expected)
    ones = torch.ones(2, dtype=torch.float64)  # where nothing cancels float32 will do
    found = gradients.combine(ones, gramian)[parameter]
    assert_close(found, rows.sum(0).view(200, 200))


def test_gradients_add_to_what_is_there_and_nothing_is_made_for_others() -> None:
    def step(before: bool) -> list[Tensor | None]:
        HOOKS.note()
        model, tasks = with_heads()
        kept = {p: torch.ones_like(p) for p in model.parameters() if before}
        for parameter, grad in kept.items():
            parameter.grad = grad
        with counted() as count:
            HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
        assert count == [1]
        assert all(p.grad is grad for p, grad in kept.items())
        return [p.grad for p in model.parameters()]

    one, two = step(before=False), step(before=True)
    assert one[-2:] == [None, None]
    for grad, other in zip(one, two, strict=True):
        assert other is not None
        assert_close(other, torch.ones_like(other) if grad is None else grad + 1)


def test_a_layer_frozen_after_the_forward_pass_stays_without_gradient() -> None:
    HOOKS.note()
    model, tasks = with_heads()
    for layer in (model.trunk[2], model.heads[1]):
        layer.requires_grad_(False)
    with counted() as count:
        HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
    assert count == [1]
    assert all((p.grad is None) != p.requires_grad for p in [*model.parameters()][:-2])


def test_the_graph_is_freed_unless_it_is_to_be_kept() -> None:
    HOOKS.note()
    model, tasks = plain()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with counted() as count:
        optimizer.backward(tasks, retain_graph=True)
        first = [p.grad for p in model.parameters()]
        optimizer.zero_grad()
        optimizer.backward(tasks)
    assert count == [2]
    assert_close([p.grad for p in model.parameters()], first)
    with pytest.raises(RuntimeError, match="graph of these losses is gone"):
        optimizer.backward(tasks)
    with pytest.raises(RuntimeError, match="second time"):
        tasks[-1].backward()  # type: ignore[no-untyped-call]  # torch's


def test_an_activation_modified_in_place_is_an_error_as_ever() -> None:
    HOOKS.note()
    model = network()
    hidden = model[:4](inputs())
    tasks = losses(model[4:](hidden))
    first, _, third, *_ = model.parameters()
    before = torch.ones_like(first)
    first.grad = before
    with torch.no_grad():
        hidden.mul_(2)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        optimizer.backward(tasks)
    assert first.grad is before
    assert before.eq(1).all()
    assert third.grad is None


def test_hooks_are_given_the_inner_products_over_some_parameters() -> None:
    HOOKS.note()
    seen: list[Tensor] = []
    model, tasks = with_heads()
    wanted = [*model.trunk[0].parameters(), *model.heads[1].parameters()]
    jacobian = literal_gradients(tasks, wanted)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    optimizer.register_harmonize_hook(
        lambda _, gramian_of: seen.extend([gramian_of(wanted), gramian_of([])])
    )
    model, tasks = with_heads()
    wanted[:] = [*model.trunk[0].parameters(), *model.heads[1].parameters()]
    optimizer.base_optimizer.param_groups[0]["params"] = [*model.parameters()]
    with counted() as count:
        optimizer.backward(tasks)
    assert count == [1]
    assert_close(seen[0], jacobian @ jacobian.T, rtol=1e-12, atol=1e-14)
    assert seen[1].eq(0).all()


def test_a_weight_that_the_dtype_cannot_hold_is_an_error_as_ever() -> None:
    HOOKS.note()
    model = network(torch.float32)
    optimizer = HarmonizedOptimizer(
        SGD(model.parameters()), lambda gramian: 1e200 * gramian.new_ones(TASKS)
    )
    tasks = losses(model(inputs(torch.float32)))
    with counted() as count, pytest.raises(ValueError, match="float32"):
        optimizer.backward(tasks)
    assert count == [1]


# --- where separate passes are taken ---------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_few_tasks_take_separate_passes_and_pay_for_no_look(tasks: int) -> None:
    with patch("ghopt.gradients.choice.edges_of", side_effect=AssertionError("walked")):
        check(partial(plain, tasks), shared=False)


def test_large_networks_without_large_layers_pay_for_no_look() -> None:
    model = nn.Sequential(*[nn.Conv2d(64, 64, 3) for _ in range(4)]).double()
    out = model(torch.randn(1, 64, 9, 9, dtype=torch.float64))
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with patch("ghopt.gradients.choice.edges_of", side_effect=AssertionError("walked")):
        optimizer.backward(losses(out))


def test_tasks_with_little_in_common_take_separate_passes() -> None:
    def short() -> tuple[nn.Module, Losses]:
        model = network()[:2]
        return model, losses(model(inputs()))

    def apart() -> tuple[nn.Module, Losses]:
        model = network()  # as collocation and boundary points
        return model, [losses(model(inputs() + k))[k] for k in range(TASKS)]

    def at_several_places() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:8](inputs())
        out = model[8:](hidden)
        return model, [*losses(out, 3), (out * hidden).sum()]

    def with_penalty() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        return model, [tasks[0] + model[0].weight.square().sum(), *tasks[1:]]  # type: ignore[index]  # a Sequential

    def pairs() -> tuple[nn.Module, Losses]:
        model = nn.ModuleList(network() for _ in range(4)).double()
        return model, [loss for part in model for loss in losses(part(inputs()), 2)]

    for case in (short, apart, pairs, at_several_places, with_penalty):
        check(case, shared=False)


def test_nested_graphs_take_separate_passes() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        x = inputs().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return model, [*losses(out), slope.square().sum()]

    model, tasks = case()
    with counted() as count:
        HOOKS.note()
        model, tasks = case()
        HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
    assert count == [0]


class Scaled(torch.autograd.Function):
    """A function of one's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # torch's signature
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004  # likewise
        return grads[0] * 2


def on_tensor(out: Tensor) -> None:
    hook(out, double)


def on_node(out: Tensor) -> None:
    node: Any = out.grad_fn
    node.register_prehook(lambda grads: (2 * grads[0],))


def retained(out: Tensor) -> None:
    out.retain_grad()


@pytest.mark.parametrize("listen", [on_tensor, on_node, retained])
@pytest.mark.parametrize("depth", [4, 10])
def test_where_someone_listens_inside_separate_passes_are_taken(
    listen: Callable[[Tensor], None], depth: int
) -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:depth](inputs())
        listen(hidden)
        return model, losses(model[depth:](hidden))

    # The oracle is torch's own passes, which obey hooks.
    check(case, shared=False)


def test_a_hook_between_a_layer_and_its_activation_is_called_for_each_task() -> None:
    calls: list[Tensor] = []

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:5](inputs())
        hook(hidden, lambda grad: calls.append(grad) or 2 * grad)  # type: ignore[func-returns-value]  # None
        return model, losses(model[5:](hidden))

    check(case, shared=False)
    assert len(calls) >= 2 * TASKS


def test_a_hook_of_an_earlier_step_is_seen_in_a_graph_that_was_kept() -> None:
    model = network()
    hidden = model[:5](inputs())
    hook(hidden, double)
    tasks = losses(model[5:](hidden))
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with counted() as count:
        for _ in range(2):
            optimizer.backward(tasks, retain_graph=True)
    assert count == [0]


def test_after_hooks_on_modules_the_next_step_shares_a_pass_again() -> None:
    HOOKS.note()
    model = network()
    model.register_forward_hook(lambda *_: None)
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    model.register_forward_hook(lambda *_: None)
    counts = []
    for _ in range(3):
        optimizer.zero_grad()
        with counted() as count:
            optimizer.backward(losses(model(inputs())))
        counts += count
    assert counts == [0, 1, 1]


def on_parameter(model: nn.Module) -> object:
    return hook(next(model.parameters()), double)


def after_accumulation(model: nn.Module) -> object:
    parameter = next(model.parameters())
    return parameter.register_post_accumulate_grad_hook(lambda _: None)  # type: ignore[no-untyped-call]  # torch's


def on_leaf(model: nn.Module) -> object:
    node: Any = get_gradient_edge(next(model.parameters())).node
    node.register_hook(lambda *_: None)
    return node  # or the hook would go with it


@pytest.mark.parametrize("listen", [on_parameter, after_accumulation, on_leaf])
def test_where_someone_listens_to_a_parameter_separate_passes_are_taken(
    listen: Callable[[nn.Module], object],
) -> None:
    model = network()
    held = listen(model)
    HOOKS.note()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with counted() as count:
        for _ in range(2):
            optimizer.backward(losses(model(inputs())))
    assert count == [0]
    assert held is not None


def test_a_hook_on_a_leaf_counts_also_after_a_step_without_it() -> None:
    HOOKS.note()
    model = network()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    counts = []
    held = []
    for number in range(3):
        with counted() as count:
            optimizer.backward(losses(model(inputs())))
        counts += count
        if number == 0:
            held.append(on_leaf(model))
    assert counts == [1, 0, 0]


def test_leaves_without_hooks_are_remembered_up_to_a_number() -> None:
    # Inputs that require grad are new leaves at each step; one that died would make room
    # for the next at the same address.
    HOOKS.note()
    model = network()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    leaves = [inputs().requires_grad_() for _ in range(16)]
    with patch.object(graph, "_MOST_LEAVES", 15), counted() as count:
        for leaf in leaves:
            optimizer.backward(losses(model(leaf)))
    assert count == [16]
    assert 0 < len(HOOKS._clean) <= 15


def weights_of_a_subclass(model: nn.Sequential) -> None:
    class Weight(nn.Parameter):
        pass

    layer: Any = model[0]
    layer.weight = Weight(layer.weight.detach())


def weights_with_other_strides(model: nn.Sequential) -> None:
    layer: Any = model[0]
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)


@pytest.mark.parametrize("change", [weights_of_a_subclass, weights_with_other_strides])
def test_where_a_weight_is_not_plain_separate_passes_are_taken(
    change: Callable[[nn.Module], object],
) -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        change(model)
        return model, losses(model(inputs()))

    check(case, shared=False)


def split_at(inner: Callable[[nn.Module, Tensor], Tensor]) -> Case:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, losses(model[4:](inner(model[:4], inputs())))

    return case


def saved_elsewhere(part: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        out: Tensor = part(x)
    return out


PARTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a function": lambda part, x: Scaled.apply(part(x)),  # type: ignore[no-untyped-call]  # torch's
    "no rule": lambda part, x: part(x).cumsum(1),
    "saved elsewhere": saved_elsewhere,
    "reentrant": lambda part, x: checkpoint(
        part, x.requires_grad_(), use_reentrant=True
    ),
    "not reentrant": lambda part, x: checkpoint(part, x, use_reentrant=False),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_was_not_tried_takes_separate_passes(name: str) -> None:
    model, tasks = split_at(PARTS[name])()
    grads = []
    for passes in ("auto", "separate"):
        HOOKS.note()
        model, tasks = split_at(PARTS[name])()
        optimizer = HarmonizedOptimizer(SGD(model.parameters()), passes=passes)
        with counted() as count:
            optimizer.backward(tasks)
        assert count == [0]
        grads.append([p.grad for p in model.parameters()])
    assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_a_function_in_a_head_takes_separate_passes() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        tasks[1] = Scaled.apply(tasks[1])  # type: ignore[no-untyped-call]  # torch's
        return model, tasks

    check(case, shared=False)


def test_sparse_gradients_take_separate_passes() -> None:
    HOOKS.note()
    model = nn.ModuleList([network(), nn.Embedding(7, WIDTH, sparse=True).double()])
    out = model[0](inputs())
    tasks = losses(out)
    tasks[0] = tasks[0] + (model[1](torch.arange(ROWS)) * out).sum()
    with counted() as count:
        HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
    assert count == [0]
    assert model[1].weight.grad.is_sparse  # type: ignore[union-attr]  # a tensor


def test_parameters_of_two_dtypes_take_separate_passes() -> None:
    HOOKS.note()
    model = network()
    model[:2].float()
    out = model[2:](model[:2](inputs(torch.float32)).double())
    with counted() as count:
        HarmonizedOptimizer(SGD(model.parameters())).backward(losses(out))
    assert count == [0]


def test_losses_of_a_subclass_take_separate_passes() -> None:
    class Loss(Tensor):
        pass

    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        return model, [task.as_subclass(Loss) for task in tasks]

    HOOKS.note()
    model, tasks = case()
    with counted() as count:
        HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
    assert count == [0]


def run(loss: Tensor, retain_graph: bool) -> None:
    loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's


def test_a_pass_of_ones_own_is_run_for_each_task() -> None:
    check(plain, shared=False, backward_fn=run)


def test_micro_batches_take_separate_passes() -> None:
    HOOKS.note()
    model = network()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    with counted() as count:
        optimizer.backward(losses(model(inputs())), accumulate_only=True)
        optimizer.backward(losses(model(inputs())))
    assert count == [0]


def test_a_projected_step_takes_separate_passes() -> None:
    HOOKS.note()
    model = network()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()), project_step=True)
    with counted() as count:
        optimizer.step(losses=losses(model(inputs())))
    assert count == [0]


@pytest.mark.parametrize(
    "around",
    [
        torch.autograd.set_detect_anomaly(False),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=False),
    ],
    ids=["anomaly", "autocast"],
)
def test_a_mode_that_is_switched_off_changes_nothing(around: Any) -> None:
    HOOKS.note()
    model, tasks = plain()
    with counted() as count, around:
        HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
    assert count == [1]


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(
    "mode",
    [
        partial(torch.autograd.set_detect_anomaly, True),
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ],
    ids=["anomaly", "autocast"],
)
def test_under_a_mode_of_torch_separate_passes_are_taken(
    mode: Callable[[], Any],
) -> None:
    HOOKS.note()
    model, tasks = plain()
    with counted() as count, mode():
        HarmonizedOptimizer(SGD(model.parameters())).backward(tasks)
    assert count == [0]


def test_where_there_is_a_process_group_separate_passes_are_taken(
    tmp_path: Path,
) -> None:
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        check(plain, shared=False)
    finally:
        dist.destroy_process_group()


def test_a_torch_that_does_not_show_who_unpacks_takes_separate_passes() -> None:
    with patch("ghopt.gradients.choice.is_supported", return_value=False):
        check(plain, shared=False)


# --- the option ------------------------------------------------------------------------


def test_separate_passes_can_be_asked_for() -> None:
    HOOKS.note()
    model, tasks = plain()
    with counted() as count:
        HarmonizedOptimizer(SGD(model.parameters()), passes="separate").backward(tasks)
    assert count == [0]


def test_another_word_is_refused_before_anything_is_touched() -> None:
    model, tasks = plain()
    message = 'passes must be "auto" or "separate", got \'vmapped\''
    with pytest.raises(ValueError, match=message):
        HarmonizedOptimizer(SGD(model.parameters()), passes="vmapped")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match=message):
        ghopt.backward(tasks, model.parameters(), passes="vmapped")  # type: ignore[arg-type]  # the point
    assert all(p.grad is None for p in model.parameters())


def test_a_pickle_that_is_older_than_the_option_can_be_loaded() -> None:
    model, _ = plain()
    optimizer = HarmonizedOptimizer(SGD(model.parameters()))
    state = optimizer.__getstate__()
    del state["passes"]
    state["deferred"] = True
    with patch.object(HarmonizedOptimizer, "__getstate__", return_value=state):
        data = pickle.dumps(optimizer)
    assert pickle.loads(data).passes == "auto"
