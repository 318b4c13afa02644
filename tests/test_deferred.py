"""Deferred weight gradients, against the passes that make all of them."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.utils import parametrizations
from torch.optim import SGD
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ghopt import HarmonizedOptimizer
from ghopt.gradients.choice import choose
from ghopt.gradients.graph import HOOKS
from ghopt.harmonize import Passes
from tests.memory import allocated
from tests.versions import needs

pytestmark = needs.faster_passes

Losses: TypeAlias = list[Tensor]

# Large enough to be deferred, with three rows, and each of another shape.
FIRST, SECOND, HEAD = "0.weight", "2.weight", "4.weight"


def network(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Sequential:
    """Build three layers. The last one is too small to be deferred."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(260, 300, bias=bias),
        nn.Tanh(),
        nn.Linear(300, 270, bias=bias),
        nn.Tanh(),
        nn.Linear(270, 4, bias=bias),
    ).to(dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (3, 260)), dtype=dtype, generator=generator)


def losses(out: Tensor, tasks: int = 2) -> Losses:
    """Take mean squares of the distances to targets that oppose each other."""
    return [
        (out - (-1) ** task * (3 + out.new_tensor(range(out.shape[-1])) - task)).square()
        .mean() for task in range(tasks)
    ]  # fmt: skip


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Count the matrix products by the shape of what they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.shapes[tuple(out.shape)] += 1
        return out


class Step(NamedTuple):
    """What a call of ``backward`` did: gradients by name, Gramian, products."""

    grads: dict[str, Tensor | None]
    gramian: Tensor | None
    shapes: Counter[tuple[int, ...]]


def wrapped(base: SGD, deferred: bool = True, **options: Any) -> HarmonizedOptimizer:
    passes: Passes = "auto" if deferred else "separate"
    return HarmonizedOptimizer(base, passes=passes, **options)


Case: TypeAlias = Callable[[], tuple[nn.Module, Losses]]


def step(case: Case, *, deferred: bool, **options: Any) -> Step:
    HOOKS.note()  # as at the end of the step before
    model, tasks = case()
    optimizer = wrapped(SGD(model.parameters(), lr=0.1), deferred=deferred)
    with Products() as products:
        optimizer.backward(tasks, **options)
    return finished(model, optimizer, products)


def finished(
    model: nn.Module, optimizer: HarmonizedOptimizer, products: Products
) -> Step:
    grads = {name: p.grad for name, p in model.named_parameters()}
    gramian = None if optimizer.last is None else optimizer.last.gramian
    return Step(grads, gramian, products.shapes)


def same(
    actual: Step, expected: Step, tolerance: float = 1e-12, absolute: float = 0
) -> None:
    for name, grad in expected.grads.items():
        other = actual.grads[name]
        assert (other is None) == (grad is None), name
        if grad is not None and other is not None:
            assert not other.requires_grad
            assert other.dtype is grad.dtype
            assert other.stride() == grad.stride()
            difference = (other.double() - grad.double()).norm()
            assert difference <= absolute + tolerance * grad.double().norm(), name
    if expected.gramian is None or actual.gramian is None:
        assert expected.gramian is actual.gramian
    else:
        scale = float(expected.gramian.diagonal().max())
        assert_close(actual.gramian, expected.gramian, rtol=0, atol=tolerance * scale)


def check(case: Case, deferred: set[str], **options: Any) -> None:
    """See that both ways give the same, and which weights are made once for all."""
    ordinary = step(case, deferred=False, **options)
    other = step(case, deferred=True, **options)
    same(other, ordinary)
    assert once(other, ordinary) == deferred


def once(other: Step, ordinary: Step) -> set[str]:
    """List the weights that took fewer products than in the ordinary passes."""
    shapes = {name: tuple(grad.shape) for name, grad in ordinary.grads.items()
              if grad is not None}  # fmt: skip
    return {n for n, s in shapes.items() if other.shapes[s] < ordinary.shapes[s]}


def plain(tasks: int = 2, **options: Any) -> tuple[nn.Module, Losses]:
    model = network(**options)
    return model, losses(model(inputs()), tasks)


def changed(change: Callable[[nn.Sequential], object]) -> Case:
    """Give a case in which something is done to the model before the forward pass."""

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        change(model)
        return model, losses(model(inputs()))

    return case


def hook(tensor: Tensor, function: Callable[[Tensor], object]) -> Any:
    return tensor.register_hook(function)  # type: ignore[no-untyped-call]  # torch's


def layer(model: nn.Module, index: int) -> nn.Linear:
    found = model[index]  # type: ignore[index]  # a Sequential
    assert isinstance(found, nn.Linear)
    return found


# --- the same result -----------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_large_layers_with_few_rows_are_made_once_and_come_out_the_same(
    tasks: int, bias: bool
) -> None:
    check(partial(plain, tasks, bias=bias), {FIRST, SECOND})


def noisy(dtype: torch.dtype, *, opposed: float) -> tuple[nn.Module, Losses]:
    """Give two tasks with random targets, or in conflict as far as they are opposed."""
    model = network(dtype)
    targets = inputs(2, 3, 4, dtype=torch.float32)
    targets[1] -= opposed * targets[0]
    out = model(inputs(dtype=torch.float32).to(dtype))
    return model, [(out - target).square().mean() for target in targets.to(dtype)]


def dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad.double().flatten()


def test_in_float32_they_differ_by_its_rounding() -> None:
    case = partial(noisy, torch.float32, opposed=0)
    ordinary, other = step(case, deferred=False), step(case, deferred=True)
    assert once(other, ordinary) == {FIRST, SECOND}
    same(other, ordinary, tolerance=1e-7)


def test_gradients_that_cancel_each_other_come_out_as_exact_as_ever() -> None:
    exact = step(partial(noisy, torch.float64, opposed=9), deferred=False)
    case = partial(noisy, torch.float32, opposed=9)
    ordinary, other = step(case, deferred=False), step(case, deferred=True)
    assert exact.gramian is not None
    norms = exact.gramian.diagonal().sqrt()
    assert exact.gramian[0, 1] < -0.9 * norms[0] * norms[1]
    truth, one, two = (
        torch.cat([dense(found.grads[name]) for name in (FIRST, SECOND)])
        for found in (exact, ordinary, other)
    )
    assert (two - truth).norm() < 1.2 * (one - truth).norm()


@pytest.mark.parametrize("tilt", [1e-2, 1e-4])
def test_gradients_that_cancel_over_the_rows_keep_their_digits(tilt: float) -> None:
    # The rows cancel each other to this share: a float32 Gramian would lose its square.
    def case(dtype: torch.dtype) -> tuple[nn.Module, Losses]:
        torch.manual_seed(0)
        model = nn.Linear(260, 300)
        row, nudge = torch.randn(2, 260)
        rows = torch.stack([row, -row + tilt * nudge])
        model, rows = model.to(dtype), rows.to(dtype)
        out = model(rows)
        slopes = torch.randn(2, 300).to(dtype)
        return model, [(out @ slope).sum() for slope in slopes]

    exact = step(partial(case, torch.float64), deferred=False).gramian
    other = step(partial(case, torch.float32), deferred=True)
    assert other.shapes[300, 260] == 1
    assert exact is not None
    # A Gramian of float32 gradients has their own rounding errors, too.
    allowed = 3e-7 * float(exact.diagonal().max())
    assert_close(other.gramian, exact, rtol=0, atol=allowed)


@pytest.mark.parametrize("shape", [(260,), (3, 260), (1, 3, 260), (3, 1, 260)])
def test_inputs_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, losses(model(inputs(*shape)))

    check(case, {FIRST, SECOND})


def test_inputs_may_be_strided() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, losses(model(inputs(2, 260, 2).transpose(1, 2)))

    check(case, {FIRST, SECOND})


@st.composite
def programs(draw: st.DrawFn) -> Case:
    """Draw small networks; which outputs a task sees; rows; uses of each layer."""
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    tasks = draw(st.integers(2, 4))
    biases = [draw(st.booleans()) for _ in widths]
    uses = [draw(st.integers(1, 2)) for _ in widths]
    rows = draw(st.integers(0, 4))
    depths = [draw(st.integers(0, len(widths) - 1)) for _ in range(tasks)]
    needs_grad = draw(st.booleans())
    seed = draw(st.integers(0, 99))

    def case() -> tuple[nn.Module, Losses]:
        torch.manual_seed(seed)
        layers = [nn.Linear(p, q, bias=b) for p, q, b in
                  zip(widths, widths[1:], biases, strict=False)]  # fmt: skip
        model = nn.ModuleList([*layers, nn.Linear(1, 1)]).double()
        x = torch.randn(rows, widths[0], dtype=torch.float64, requires_grad=needs_grad)
        outs = [x * model[-1].weight]  # type: ignore[operator]  # a Linear
        for found, times in zip(layers, uses, strict=False):
            x = sum((found(x + i).tanh() for i in range(times)), start=torch.zeros(()))
            outs.append(x)
        return model, [(outs[d] * torch.randn(())).square().sum() for d in depths]

    return case


@given(programs())
def test_any_network_comes_out_the_same_when_all_that_can_be_is_deferred(
    case: Case,
) -> None:
    ordinary = step(case, deferred=False)
    with (
        patch("ghopt.gradients.deferred._pays", lambda rows, *_: rows > 0),
        patch("ghopt.gradients.together.may_pay", return_value=False),
    ):
        other = step(case, deferred=True)
    # A gradient may be what remains where much larger ones cancel each other.
    lengths = (
        0 if ordinary.gramian is None else ordinary.gramian.diagonal().sum().sqrt()
    )
    same(other, ordinary, absolute=1e-13 * float(lengths))


def test_a_value_that_is_not_finite_stays_visible() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, [loss * torch.nan for loss in losses(model(inputs()))]

    grad = step(case, deferred=True).grads[FIRST]
    assert grad is not None
    assert grad.isnan().all()


def test_it_works_inside_no_grad() -> None:
    ordinary = step(plain, deferred=False)
    model, tasks = plain()
    optimizer = wrapped(SGD(model.parameters()))
    with Products() as products, torch.no_grad():
        optimizer.backward(tasks)
    other = finished(model, optimizer, products)
    same(other, ordinary)
    assert once(other, ordinary) == {FIRST, SECOND}


def test_nothing_is_read_on_the_host() -> None:
    # On meta any host read raises.
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(260, 300), nn.Tanh(), nn.Linear(300, 270))
        optimizer = wrapped(SGD(model.parameters()))
        with Products() as products:
            optimizer.backward(losses(model(torch.zeros(3, 260))))
    assert products.shapes[300, 260] == products.shapes[270, 300] == 1
    optimizer.step()


# --- where it pays -------------------------------------------------------------------


def test_layers_with_many_rows_go_the_ordinary_way() -> None:
    def case(rows: int) -> tuple[nn.Module, Losses]:
        model = network()
        return model, losses(model(inputs(rows, 260)))

    check(partial(case, 40), {FIRST, SECOND})
    check(partial(case, 50), set())  # 260 * 300 / 2 / (260 + 2 * 300) = 45.3


def test_positions_count_as_rows() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, losses(model(inputs(2, 25, 260)))

    check(case, set())


def test_small_layers_go_the_ordinary_way() -> None:
    def case(width: int) -> tuple[nn.Module, Losses]:
        torch.manual_seed(0)
        model = nn.Linear(256, width).double()
        return model, losses(model(inputs(2, 256)))

    check(partial(case, 255), set())
    check(partial(case, 256), {"weight"})


def test_a_layer_that_one_task_reaches_goes_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        features = model[:2](inputs())
        return model, [features.square().mean(), *losses(model[2:](features), 1)]

    check(case, {FIRST})
    # The products of rows with rows: of the first layer alone.
    assert step(case, deferred=True).shapes[3, 3] == 1


def test_one_task_alone_goes_the_ordinary_way() -> None:
    check(partial(plain, 1), set())

    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain(1)
        return model, [*tasks, torch.ones(())]

    check(case, set())


def test_no_gradient_of_a_task_is_ever_in_memory() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000)
    tasks = losses(model(torch.randn(8, 1000)), 4)
    optimizer = wrapped(SGD(model.parameters()))
    _, peak = allocated(lambda: optimizer.backward(tasks))
    assert 4 * 1000 * 1000 <= peak < 1.2 * 4 * 1000 * 1000


# --- weights that serve for several products -------------------------------------------


def test_a_module_called_twice_counts_the_rows_of_both_calls() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        first = model(inputs())
        return model, losses(first + model(inputs() * 2))

    check(case, {FIRST, SECOND})


def test_each_task_may_have_a_forward_pass_of_its_own() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        one, two = losses(model(inputs()))[0], losses(model(inputs() * 2))[1]
        return model, [one, two]

    check(case, {FIRST, SECOND})


def test_weights_may_be_tied() -> None:
    def case() -> tuple[nn.Module, Losses]:
        torch.manual_seed(0)
        one, two = nn.Linear(260, 260), nn.Linear(260, 260)
        two.weight = one.weight
        model = nn.Sequential(one, nn.Tanh(), two).double()
        return model, losses(model(inputs()))

    check(case, {"0.weight"})


def test_a_product_by_hand_is_a_product() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        by_hand = inputs() @ layer(model, 0).weight.t()
        hidden = model[1](model[0](inputs()) + by_hand)
        again = F.linear(hidden, layer(model, 2).weight)
        return model, losses(model[2:](hidden) + again[:, :4])

    check(case, {FIRST, SECOND})


# --- what else a weight may serve for --------------------------------------------------


def test_a_weight_used_by_hand_goes_the_ordinary_way() -> None:
    uses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, w: F.linear(x, w * 1),
        lambda x, w: x @ w.transpose(0, 1),
        lambda x, w: torch.einsum("np,qp->nq", x, w),
        lambda x, w: torch.addmm(x.new_zeros(300), x, w.t(), alpha=2),
        lambda x, w: (w @ x.T).T,
        lambda x, w: F.linear(w[:3], w) + x.sum(),
    ]
    for use in uses:

        def case(use: Callable[[Tensor, Tensor], Tensor] = use) -> Any:
            model = network()
            hidden = model[:1](inputs()) + use(inputs(), layer(model, 0).weight)
            return model, losses(model[1:](hidden))

        check(case, {SECOND})


@pytest.mark.parametrize(
    "use",
    [lambda out, w: out @ (w * 2), lambda out, w: (w.t() @ out.T).T],
    ids=["scaled", "from the left"],
)
def test_a_weight_in_another_product_goes_the_ordinary_way(
    use: Callable[[Tensor, Tensor], Tensor],
) -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:2](inputs())
        back = use(model[2](hidden), layer(model, 2).weight)
        return model, losses(model[2:](hidden + back))

    check(case, {FIRST})
    ordinary = step(case, deferred=False)
    # Not because of the many rows.
    with patch("ghopt.gradients.deferred._pays", lambda rows, *_: rows > 0):
        same(step(case, deferred=True), ordinary)


def test_a_penalty_on_a_weight_sends_it_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, (one, two) = plain()
        return model, [one + layer(model, 2).weight.square().sum(), two]

    check(case, {FIRST})


def test_a_gradient_penalty_sends_its_weights_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        x = inputs().requires_grad_()
        out = model(x)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return model, [*losses(out), slope.square().sum()]

    check(case, set())


def test_a_weight_that_is_also_an_embedding_goes_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        rows = F.embedding(torch.tensor([1, 2, 1]), layer(model, 0).weight)
        return model, losses(model(inputs() + rows))

    check(case, {SECOND})


@pytest.mark.parametrize(
    "change",
    [parametrizations.weight_norm, parametrizations.spectral_norm],
)
def test_a_parametrized_layer_goes_the_ordinary_way(
    change: Callable[[nn.Module], object],
) -> None:
    def parametrize(model: nn.Sequential) -> None:
        change(model[2])
        HOOKS.note()  # it registers one for checkpoints

    check(changed(parametrize), {FIRST})


class Opaque(torch.autograd.Function):
    """A layer whose backward pass runs one of its own, which no edge shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: list[Tensor]) -> Tensor:
        ctx.x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.out = F.linear(ctx.x, hidden[0])
        out: Tensor = ctx.out.detach().clone()
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.x.grad = None
        ctx.out.backward(grads[0], retain_graph=True)
        return ctx.x.grad, None


@pytest.mark.parametrize("seen_by", [[0], [1], [0, 1]])
def test_a_weight_with_a_hidden_use_is_made_for_each_task_after_all(
    seen_by: list[int],
) -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:2](inputs())
        more: Tensor = Opaque.apply(hidden, [layer(model, 2).weight])  # type: ignore[no-untyped-call]  # torch's
        tasks = losses(model[2:](hidden))
        for task in seen_by:
            tasks[task] = tasks[task] + more.square().mean()
        return model, tasks

    check(case, {FIRST})


def test_a_weight_with_a_hidden_use_only_in_another_task_is_made_too() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:2](inputs())
        more: Tensor = Opaque.apply(hidden, [layer(model, 2).weight])  # type: ignore[no-untyped-call]  # torch's
        return model, [*losses(model[2:](hidden)), more.square().mean()]

    check(case, {FIRST})


def test_all_deferred_weights_may_have_a_hidden_use() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        layer(model, 0).weight.requires_grad_(False)
        hidden = model[:2](inputs())
        more: Tensor = Opaque.apply(hidden, [layer(model, 2).weight])  # type: ignore[no-untyped-call]  # torch's
        one, two = losses(model[2:](hidden))
        return model, [one + more.square().mean(), two]

    check(case, set())


class Stop(torch.autograd.Function):
    """Pass nothing back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # torch's signature
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004  # likewise
        return None


def test_a_task_whose_gradient_ends_before_a_layer_does_not_reach_it() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:3](inputs())
        stopped: Tensor = Stop.apply(hidden)  # type: ignore[no-untyped-call]  # torch's
        return model, [*losses(model[3:](hidden)), stopped.sum()]

    check(case, {FIRST, SECOND})


# --- who else looks at the gradients ---------------------------------------------------
# Where a hook is new, the first layer cannot be told from one that is hooked in secret.


def double(grad: Tensor) -> Tensor:
    return 2 * grad


def test_a_hook_on_a_weight_sends_it_the_ordinary_way() -> None:
    check(changed(lambda model: hook(layer(model, 2).weight, double)), set())


def test_a_hook_after_accumulation_sees_the_gradient_of_each_task() -> None:
    seen: list[tuple[int, ...]] = []

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        for parameter in layer(model, 2).parameters():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # torch's
                lambda p: seen.append(tuple(p.grad.shape))
            )
        return model, losses(model(inputs()))

    check(case, set())
    assert sorted(seen) == [(270,)] * 4 + [(270, 300)] * 4


def test_hooks_on_a_bias_are_called_and_obeyed_while_the_weight_is_deferred() -> None:
    calls: list[Tensor] = []

    def change(model: nn.Sequential) -> None:
        hook(layer(model, 2).bias, double)
        hook(layer(model, 2).bias, calls.append)

    check(changed(change), {SECOND})
    assert len(calls) == 4


def test_a_hook_that_was_removed_does_not_count() -> None:
    def change(model: nn.Sequential) -> None:
        hook(layer(model, 2).weight, double).remove()

    check(changed(change), {SECOND})


@pytest.mark.parametrize("register", ["register_hook", "register_prehook"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_hook_on_a_node_of_the_product_sends_the_weight_the_ordinary_way(
    depth: int, register: str
) -> None:
    calls: list[object] = []
    nodes: list[Any] = []  # or the hooks of a leaf would go with the last that holds it

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:3](inputs())
        node: Any = hidden.grad_fn
        for _ in range(depth):
            node = node.next_functions[-1][0]
        nodes.append(node)
        getattr(node, register)(lambda *grads: calls.append(grads))
        return model, losses(model[3:](hidden))

    check(case, set())
    assert len(calls) == 4


def test_a_hook_on_a_transposed_weight_sends_it_the_ordinary_way() -> None:
    for register, others in (("register_hook", set()), ("retain_grad", {FIRST})):

        def case(register: str = register) -> tuple[nn.Module, Losses]:
            model = network()
            transposed = layer(model, 2).weight.t()
            getattr(transposed, register)(*[double] * (register == "register_hook"))
            hidden = torch.addmm(layer(model, 2).bias, model[:2](inputs()), transposed)
            return model, losses(model[3:](hidden))

        check(case, others)


def by_hand(listen: Callable[[Tensor], object]) -> Case:
    """Give a case in which the first weight is transposed by hand, and listened to."""

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        transposed = layer(model, 0).weight.t()
        listen(transposed)
        hidden = torch.addmm(layer(model, 0).bias, inputs(), transposed)
        return model, losses(model[1:](hidden))

    return case


def test_a_hook_that_does_not_show_sends_a_weight_the_ordinary_way() -> None:
    check(by_hand(lambda transposed: hook(transposed, double)), {SECOND})


def test_so_it_does_where_the_graph_is_older_than_the_last_step() -> None:
    grads = []
    for deferred in (True, False):
        model, tasks = by_hand(lambda transposed: hook(transposed, double))()
        HOOKS.note()  # a step of another model, say
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        optimizer.backward(tasks)
        grads.append(layer(model, 0).weight.grad)
    assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_a_gradient_that_is_retained_in_secret_stays_none() -> None:
    # A known limit: see the docstring of the module.
    kept: list[Tensor] = []

    def listen(transposed: Tensor) -> None:
        transposed.retain_grad()
        kept.append(transposed)

    check(by_hand(listen), {FIRST, SECOND})
    separate, auto = kept
    assert separate.grad is not None
    assert auto.grad is None


def test_a_torch_that_does_not_show_who_unpacks_takes_the_ordinary_way() -> None:
    with patch("ghopt.gradients.choice.is_supported", return_value=False):
        check(plain, set())


ON_MODULES: dict[str, Callable[[nn.Linear], object]] = {
    "forward pre": lambda m: m.register_forward_pre_hook(lambda _, args: (-args[0],)),
    "forward": lambda m: m.register_forward_hook(lambda _, __, out: -out),
    "backward pre": lambda m: m.register_full_backward_pre_hook(
        lambda _, grads: (-grads[0],)  # type: ignore[index]  # a tuple or a tensor
    ),
    "backward": lambda m: m.register_full_backward_hook(
        lambda _, grads, __: (-grads[0],)  # type: ignore[index]  # likewise
    ),
}


@pytest.mark.parametrize("register", ON_MODULES.values(), ids=[*ON_MODULES])
def test_hooks_on_a_module_are_called_and_obeyed(
    register: Callable[[nn.Linear], object],
) -> None:
    case = changed(lambda model: register(layer(model, 2)))
    check(case, {SECOND})
    with pytest.raises(AssertionError, match="weight"):
        same(step(case, deferred=True), step(plain, deferred=False))


def test_hooks_on_activations_are_called_and_obeyed() -> None:
    calls: list[Tensor] = []

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = model[:3](inputs())
        hook(hidden, double)
        hook(hidden, calls.append)
        return model, losses(model[3:](hidden))

    check(case, {SECOND})
    assert len(calls) == 4


def test_activations_may_retain_their_gradients() -> None:
    kept: list[Tensor | None] = []
    for deferred in (False, True):
        model = network()
        hidden = model[:3](inputs())
        hidden.retain_grad()
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        optimizer.backward(losses(model[3:](hidden)))
        kept.append(hidden.grad)
    assert kept[0] is not None
    assert_close(kept[1], kept[0])


# --- what changes the graph ------------------------------------------------------------


def test_under_autocast_the_ordinary_way_is_taken() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(inputs(dtype=torch.float32))
        return model, losses(out.float())

    check(case, set())


def test_a_backward_call_under_autocast_takes_the_ordinary_way() -> None:
    # There autograd, too, computes in bfloat16.
    case = partial(noisy, torch.float32, opposed=0)
    steps = []
    for deferred in (False, True):
        model, tasks = case()
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        with Products() as products, torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.backward(tasks)
        steps.append(finished(model, optimizer, products))
    same(steps[1], steps[0], tolerance=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_go_the_ordinary_way(dtype: torch.dtype) -> None:
    def case() -> tuple[nn.Module, Losses]:
        torch.manual_seed(0)
        model = nn.Linear(260, 300).to(dtype)
        return model, losses(model(inputs().to(dtype)).double())

    check(case, set())


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_weights_go_the_ordinary_way() -> None:
    torch.manual_seed(0)
    model = nn.Linear(260, 300).to(torch.complex128)
    tasks = losses(model(inputs().to(torch.complex128)).abs())
    named = dict(zip("abc", tasks, strict=False))
    weights = [*model.parameters()]
    assert choose(named, weights, weights) is None


def test_sparse_inputs_send_a_layer_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        return model, losses(model(inputs().relu().to_sparse()))

    ordinary, other = step(case, deferred=False), step(case, deferred=True)
    same(other, ordinary)
    assert other.shapes[3, 3] == 1  # of the second layer


def test_a_weight_with_other_strides_goes_the_ordinary_way() -> None:
    def change(model: nn.Sequential) -> None:
        found = layer(model, 2)
        found.weight = nn.Parameter(found.weight.detach().T.contiguous().T)

    check(changed(change), {FIRST})


def test_a_weight_of_a_subclass_goes_the_ordinary_way() -> None:
    class Weight(nn.Parameter):
        pass

    def change(model: nn.Sequential) -> None:
        found = layer(model, 2)
        found.weight = Weight(found.weight.detach())

    check(changed(change), {FIRST})


def test_losses_of_a_subclass_go_the_ordinary_way() -> None:
    class Loss(Tensor):
        pass

    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        return model, [task.as_subclass(Loss) for task in tasks]

    check(case, set())


def test_a_checkpoint_sends_its_layers_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = checkpoint(model[1:4], model[:1](inputs()), use_reentrant=False)
        return model, losses(model[4:](hidden))

    check(case, {FIRST})


def test_a_reentrant_checkpoint_sends_all_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden = checkpoint(model[1:4], model[:1](inputs()), use_reentrant=True)
        return model, losses(model[4:](hidden))

    check(case, set())


class Checkpoint(torch.autograd.Function):
    """What others have written in place of torch's checkpoint."""

    @staticmethod
    def forward(ctx: Any, model: nn.Module, x: Tensor) -> Tensor:
        ctx.model, ctx.x = model, x
        with torch.no_grad():
            out: Tensor = model(x)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]  # torch's
            raise RuntimeError("checkpoints do not go with inputs=")
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.model(x).backward(grads[0])
        return None, x.grad


def test_a_reentrant_checkpoint_by_others_sends_all_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden: Tensor = Checkpoint.apply(model[1:4], model[:1](inputs()))  # type: ignore[no-untyped-call]  # torch's
        return model, losses(model[4:](hidden))

    check(case, set())


def test_activations_that_are_saved_elsewhere_send_a_layer_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        with torch.autograd.graph.save_on_cpu():
            hidden = model[:2](inputs())
        return model, losses(model[2:](hidden))

    check(case, {SECOND})


def test_a_function_of_ones_own_in_the_graph_does_no_harm() -> None:
    class Reversal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004  # torch's signature
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004  # likewise
            return -grads[0]

    def case() -> tuple[nn.Module, Losses]:
        model = network()
        hidden: Tensor = Reversal.apply(model[:2](inputs()))  # type: ignore[no-untyped-call]  # torch's
        return model, losses(model[2:](hidden))

    check(case, {FIRST, SECOND})


# dynamo asks whether activations have a gradient, of which torch warns.
asks_for_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@asks_for_grad
def test_a_compiled_part_goes_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        compiled = torch.compile(layer(model, 2), backend="aot_eager")
        return model, losses(model[3:](compiled(model[:2](inputs()))))

    check(case, {FIRST})


@asks_for_grad
def test_under_compiled_autograd_the_ordinary_way_is_taken() -> None:
    compiler = torch.compile(backend="eager", dynamic=False)
    ordinary = step(plain, deferred=False)
    model, tasks = plain()
    optimizer = wrapped(SGD(model.parameters()))
    with (
        compiled_autograd._enable(compiler),
        patch(
            "ghopt.gradients.deferred.Deferral", side_effect=AssertionError("deferred")
        ),
    ):
        optimizer.backward(tasks)
    same(finished(model, optimizer, Products()), ordinary)


@pytest.mark.parametrize("options", [{}, {"sync_group": True}])
def test_where_there_is_a_process_group_the_ordinary_way_is_taken(
    options: dict[str, Any], tmp_path: Path
) -> None:
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        check(plain, set(), **options)
    finally:
        dist.destroy_process_group()


# --- what is served --------------------------------------------------------------------


def test_frozen_weights_stay_without_gradient() -> None:
    check(changed(lambda model: layer(model, 0).requires_grad_(False)), {SECOND})


def test_a_layer_with_nothing_but_its_weight_to_train_is_deferred() -> None:
    def change(model: nn.Sequential) -> None:
        layer(model, 0).bias.requires_grad_(False)

    check(changed(change), {FIRST, SECOND})


def test_a_weight_frozen_after_the_forward_pass_stays_without_gradient() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        model[2].requires_grad_(False)  # type: ignore[index]  # a Sequential
        return model, tasks

    check(case, {FIRST})


def served(chosen: Callable[[nn.Module], dict[str, Any]], deferred: bool) -> Step:
    model, tasks = plain()
    base = SGD(chosen(model)["params"])
    shared = chosen(model).get("shared_params")
    optimizer = wrapped(base, shared_params=shared, deferred=deferred)
    with Products() as products:
        optimizer.backward(tasks)
    return finished(model, optimizer, products)


def test_layers_outside_the_optimizer_receive_the_plain_sum() -> None:
    def chosen(model: nn.Module) -> dict[str, Any]:
        return {"params": layer(model, 0).parameters()}

    ordinary, other = served(chosen, False), served(chosen, True)
    same(other, ordinary)
    assert other.grads[SECOND] is not None
    assert once(other, ordinary) == {FIRST}


def test_a_weight_may_be_all_that_the_optimizer_has() -> None:
    def chosen(model: nn.Module) -> dict[str, Any]:
        return {"params": [layer(model, 2).weight]}

    ordinary, other = served(chosen, False), served(chosen, True)
    same(other, ordinary)
    assert once(other, ordinary) == {SECOND}


def test_layers_outside_the_shared_ones_receive_the_plain_sum() -> None:
    def chosen(model: nn.Module) -> dict[str, Any]:
        shared = layer(model, 2).parameters()
        return {"params": model.parameters(), "shared_params": shared}

    ordinary, other = served(chosen, False), served(chosen, True)
    same(other, ordinary)
    assert once(other, ordinary) == {SECOND}


def test_a_layer_that_no_task_reaches_keeps_none() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        model.append(nn.Linear(300, 300))  # type: ignore[operator]  # a Sequential
        return model, tasks

    check(case, {FIRST, SECOND})


def test_tasks_may_reach_different_layers() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        features = model[:2](inputs())
        return model, [features.mean(), torch.ones(()), *losses(model[2:](features))]

    check(case, {FIRST, SECOND})


def test_an_empty_batch_goes_the_ordinary_way() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model = network()
        out = model(inputs(0, 260))
        return model, [out.sum(), 2 * out.sum()]

    check(case, set())


def test_gradients_add_to_what_is_there() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return model, tasks

    check(case, {FIRST, SECOND})


def test_an_accumulation_goes_the_ordinary_way() -> None:
    steps = []
    for deferred in (False, True):
        model = network()
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        with Products() as products:
            optimizer.backward(losses(model(inputs())), accumulate_only=True)
            optimizer.backward(losses(model(2 * inputs())))
        steps.append(finished(model, optimizer, products))
    same(steps[1], steps[0])
    assert not once(steps[1], steps[0])


def test_a_pass_of_ones_own_goes_the_ordinary_way() -> None:
    def run(loss: Tensor, retain_graph: bool) -> None:
        (2 * loss).backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's

    check(plain, set(), backward_fn=run)


def test_losses_may_be_scaled_by_a_total() -> None:
    steps = []
    for deferred in (False, True):
        model, tasks = plain()
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        with Products() as products:
            optimizer.backward(tasks, total=torch.stack(tasks).sum() / 4)
        steps.append(finished(model, optimizer, products))
    same(steps[1], steps[0])
    assert once(steps[1], steps[0]) == {FIRST, SECOND}


# --- nothing is left behind ------------------------------------------------------------


def test_other_forward_passes_in_between_change_nothing() -> None:
    def case() -> tuple[nn.Module, Losses]:
        model, tasks = plain()
        model.eval()
        with torch.no_grad():
            model(inputs(9, 260))
        model.train()
        model(inputs(7, 260)).sum()  # with a graph that nobody uses
        return model, tasks

    check(case, {FIRST, SECOND})


def test_a_loss_that_is_not_among_the_losses_keeps_its_own_backward_pass() -> None:
    grads = []
    for deferred in (False, True):
        model = network()
        out = model(inputs())
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        optimizer.backward(losses(out), retain_graph=True)
        optimizer.zero_grad()
        out.sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_close(grads[1], grads[0], rtol=0, atol=0)


def failing(error: type[BaseException]) -> tuple[nn.Sequential, Tensor, list[int]]:
    """Give a network whose second backward pass fails in the first layer, and a count."""
    model = network()
    hidden, passes = model[:1](inputs()), [0]

    def fail(_: Tensor) -> None:
        passes[0] += 1
        if passes[0] == 2:
            raise error("here")

    hook(hidden, fail)
    return model, model[1:](hidden), passes


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_everything_as_it_was(
    error: type[BaseException],
) -> None:
    model, out, _ = failing(error)
    before = torch.ones_like(layer(model, 0).weight)
    layer(model, 0).weight.grad = before
    optimizer = wrapped(SGD(model.parameters()))
    tasks = losses(out, 3)
    with pytest.raises(error, match="here"):
        optimizer.backward(tasks, retain_graph=True)
    assert layer(model, 0).weight.grad is before
    assert before.eq(1).all()
    assert all(p.grad is None for p in [*model.parameters()][1:])
    optimizer.zero_grad()
    with Products() as products:
        optimizer.backward(tasks)
    other = finished(model, optimizer, products)
    ordinary = step(partial(plain, 3), deferred=False)
    same(other, ordinary)
    assert once(other, ordinary) == {SECOND}


def test_an_input_modified_in_place_is_an_error_as_ever() -> None:
    messages = []
    for deferred in (False, True):
        model = network()
        hidden = model[:2](inputs()).clone()
        tasks = losses(model[2:](hidden))
        with torch.no_grad():
            hidden.mul_(2)
        optimizer = wrapped(SGD(model.parameters()), deferred=deferred)
        with pytest.raises(RuntimeError, match="modified by an inplace") as error:
            optimizer.backward(tasks)
        assert all(p.grad is None for p in model.parameters())
        messages.append(str(error.value).split(";")[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("what", ["input", "output gradient"])
def test_what_is_modified_in_place_during_the_last_pass_is_an_error(what: str) -> None:
    model = network()
    features = model[:1](inputs())
    hidden = features.tanh()
    out = model[2](hidden)
    grads: list[Tensor] = []
    hook(out, grads.append)

    def spoil(_: Tensor) -> None:
        if len(grads) == 2:  # else the next pass meets it
            (hidden.detach() if what == "input" else grads[-1]).mul_(2)

    hook(features, spoil)
    optimizer = wrapped(SGD(model.parameters()))
    tasks = losses(model[3:](out))
    with pytest.raises(RuntimeError, match="modified in place: use passes="):
        optimizer.backward(tasks)
    assert all(p.grad is None for p in model.parameters())


def test_a_graph_that_was_freed_is_an_error_that_ends_an_accumulation_as_ever() -> None:
    model, tasks = plain()
    optimizer = wrapped(SGD(model.parameters()))
    optimizer.backward(tasks, accumulate_only=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        optimizer.backward(tasks)
    assert all(p.grad is None for p in model.parameters())
    # With what was accumulated, tasks of other names would be an error.
    optimizer.backward(dict(zip("ab", losses(model(inputs())), strict=True)))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]
)
def test_copies_of_model_and_optimizer_go_on(duplicate: Callable[[Any], Any]) -> None:
    model, tasks = plain()
    optimizer = wrapped(SGD(model.parameters(), lr=0.1))
    optimizer.backward(tasks)
    optimizer.step()
    optimizer.zero_grad()
    steps = []
    for part, stepper in [(model, optimizer), duplicate((model, optimizer))]:
        with Products() as products:
            stepper.backward(losses(part(inputs())))
        steps.append(finished(part, stepper, products))
    same(steps[1], steps[0])
    assert steps[1].shapes == steps[0].shapes
    assert steps[1].shapes[300, 260] == 1
    assert model[0].weight.grad is not steps[1].grads[FIRST]  # type: ignore[index]  # a Sequential
