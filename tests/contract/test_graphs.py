"""Losses of every kind, on graphs of every kind, with parameters of every kind."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ghopt import HarmonizedOptimizer
from tests import models
from tests.bases import BASES, Base, SparseAdam, every_base
from tests.literal import (
    grads,
    literal_gradients,
    literal_step,
    literal_update,
    weights_of,
)
from tests.models import Tasks

Rows = list[list[float]]

# Of three tasks, of which the first two are in conflict, and the last two.
ROWS: Rows = [[1.0, 2.0, -1.0], [-2.0, 1.0, 1.5], [1.0, 0.5, -3.0]]

few_bases = pytest.mark.parametrize(
    "base", [BASES["SGD momentum"], BASES["AdamW"]], ids=["SGD momentum", "AdamW"]
)

pytestmark = pytest.mark.usefixtures("passes")


def bases_but(*names: str) -> pytest.MarkDecorator:
    chosen = {name: base for name, base in BASES.items() if name not in names}
    return pytest.mark.parametrize("base", chosen.values(), ids=[*chosen])


def network(tasks: int = 3, seed: int = 0) -> Tasks:
    return models.make(models.heads_on_a_trunk, tasks, seed)


def wrap(model: nn.Module, **kwargs: Any) -> HarmonizedOptimizer:
    return HarmonizedOptimizer(SGD(model.parameters(), lr=0.1), **kwargs)


def vector(values: list[float], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def linear_losses(p: Tensor, rows: Rows = ROWS) -> list[Tensor]:
    """Give losses whose gradients with respect to ``p`` are the rows."""
    return [(p * torch.tensor(row).to(p)).sum() for row in rows]


def update_of(rows: Rows) -> Tensor:
    return literal_update(torch.tensor(rows, dtype=torch.float64))


def plain_backward(loss: Tensor, **kwargs: Any) -> None:
    loss.backward(**kwargs)  # type: ignore[no-untyped-call]  # torch's


def flat_grads(parameters: list[nn.Parameter]) -> Tensor:
    found = [p.grad for p in parameters if p.grad is not None]
    assert len(found) == len(parameters)
    return torch.cat([grad.reshape(-1) for grad in found])


def harmonized_grads(losses: list[Tensor], model: nn.Module) -> list[Tensor | None]:
    wrap(model).backward(losses)
    return grads(model)


# Losses


@few_bases
def test_the_number_of_tasks_may_change_from_step_to_step(base: Base) -> None:
    expected, actual = network(5), network(5)
    parameters = list(expected.parameters())
    literal, optimizer = base(parameters), HarmonizedOptimizer(
        base(actual.parameters())
    )  # fmt: skip
    for seed, tasks in enumerate([1, 3, 2, 5, 1, 4, 2]):
        data = models.batch(5, seed)
        literal_step(expected(*data)[:tasks], parameters, literal)
        optimizer.step(losses=actual(*data)[:tasks])
        assert optimizer.last is not None
        assert len(optimizer.last.names) == tasks
    # AdamW magnifies the rounding of a tiny gradient.
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-9, atol=1e-9)


def test_graphs_may_have_nothing_in_common_but_the_parameters() -> None:
    model = network(2)
    batches = [models.batch(2, seed) for seed in range(2)]
    losses = [model(*data)[task] for task, data in enumerate(batches)]
    parameters = list(model.parameters())
    expected = literal_update(literal_gradients(losses, parameters))
    wrap(model).backward(losses)
    assert_close(flat_grads(parameters), expected, rtol=1e-12, atol=1e-12)


def test_tasks_may_have_no_parameter_in_common() -> None:
    a, b = vector([1.0, 2.0]), vector([3.0, 4.0])
    optimizer = HarmonizedOptimizer(SGD([a, b], lr=0.1))
    optimizer.backward([(a * a).sum(), -(b * b).sum()])
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.tolist() == [2.0, 4.0]
    assert b.grad.tolist() == [-6.0, -8.0]


@pytest.mark.parametrize("times", [2, 3, 5])
@pytest.mark.parametrize("shared_graph", [True, False])
def test_the_same_loss_given_again_counts_again(times: int, shared_graph: bool) -> None:
    model = network(1)
    data = models.batch(1)
    loss = model(*data)[0]
    wrap(model).backward(
        [loss if shared_graph else model(*data)[0] for _ in range(times)]
    )
    expected = network(1)
    plain_backward(times * expected(*data)[0])
    assert_close(grads(model), grads(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("kind", ["zero", "constant", "elsewhere"])
def test_a_task_that_asks_for_nothing_changes_nothing(where: int, kind: str) -> None:
    expected, actual = vector([0.0] * 3), vector([0.0] * 3)
    elsewhere = vector([1.0])
    nothing = {
        "zero": (actual * 0).sum(),
        "constant": torch.ones((), dtype=torch.float64),
        "elsewhere": elsewhere.sum() * 2,
    }
    HarmonizedOptimizer(SGD([expected])).backward(linear_losses(expected, ROWS[:2]))
    optimizer = HarmonizedOptimizer(SGD([actual]))
    losses = linear_losses(actual, ROWS[:2])
    optimizer.backward([*losses[:where], nothing[kind], *losses[where:]])
    assert_close(actual.grad, expected.grad, rtol=1e-14, atol=1e-15)
    assert_close(expected.grad, update_of(ROWS[:2]))
    if kind == "elsewhere":
        assert elsewhere.grad is not None
        assert elsewhere.grad.tolist() == [2.0]


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_loss_without_grad_in_any_position_lets_the_graph_be_freed(
    where: int,
) -> None:
    model = network(2)
    losses = model(*models.batch(2))
    constant = torch.ones((), dtype=torch.float64)
    wrap(model).backward([*losses[:where], constant, *losses[where:]])
    for loss in losses:
        with pytest.raises(RuntimeError, match="a second time"):
            plain_backward(loss)


def test_a_state_that_is_carried_over_steps_without_detach_is_named_with_its_cure() -> (
    None
):
    torch.manual_seed(0)
    cell = nn.RNNCell(3, 4).double()
    optimizer, inputs = wrap(cell), torch.randn(2, 3, dtype=torch.float64)
    state = cell(inputs)
    optimizer.backward([state.sum(), state.square().sum()])
    later = cell(inputs, state)
    with pytest.raises(RuntimeError, match=r"state of an RNN: detach\(\) it"):
        optimizer.backward([later.sum(), later.square().sum()])
    later = cell(inputs, state.detach())
    optimizer.backward([later.sum(), later.square().sum()])


def test_all_tasks_with_zero_gradients_give_zeros_not_nan() -> None:
    p = vector([1.0, 2.0])
    HarmonizedOptimizer(SGD([p])).backward([(p * 0).sum(), (0 * p * p).sum()])
    assert p.grad is not None
    assert p.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1.0, 1e10, 1e15])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_a_common_scale_of_the_losses_scales_the_gradient(
    scale: float, tasks: int
) -> None:
    model = network(tasks).float()
    inputs, targets = models.batch(tasks, 1)
    losses = model(inputs.float(), targets.float())
    parameters = list(model.parameters())
    expected = literal_update(literal_gradients(losses, parameters).double())
    wrap(model).backward([scale * loss for loss in losses])
    # float32, and a cancellation or two.
    atol = 1e-5 * float(expected.abs().max())
    actual = flat_grads(parameters).double() / scale
    assert_close(actual, expected, rtol=1e-5, atol=atol)


@few_bases
def test_training_inside_no_grad_is_the_same(base: Base) -> None:
    expected, actual = network(), network()
    for model, outside in ((expected, torch.enable_grad), (actual, torch.no_grad)):
        optimizer = HarmonizedOptimizer(base(model.parameters()))
        for seed in range(3):
            losses = model(*models.batch(3, seed))
            more = model(*models.batch(3, seed + 9))
            with outside():
                optimizer.zero_grad()
                optimizer.backward(more, accumulate_only=True)
                optimizer.backward(losses)
                optimizer.step()
        assert not any(grad is None or grad.requires_grad for grad in grads(model))
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


# Hooks


def test_tensor_hooks_run_once_a_task_and_their_edits_count() -> None:
    a, b = vector([0.0] * 3), vector([0.0] * 3)
    optimizer = HarmonizedOptimizer(SGD([a, b]))
    seen: list[list[float]] = []

    def halve(grad: Tensor) -> Tensor:
        seen.append(grad.tolist())
        return grad / 2

    a.register_hook(halve)  # type: ignore[no-untyped-call]  # torch's
    pairs = zip(linear_losses(a), linear_losses(b, ROWS[::-1]), strict=True)
    optimizer.backward([first + second for first, second in pairs])
    assert seen == ROWS
    rows = torch.tensor(ROWS, dtype=torch.float64)
    jacobian = torch.cat([rows / 2, rows.flipud()], dim=1)
    assert_close(flat_grads([a, b]), literal_update(jacobian), rtol=1e-12, atol=1e-12)


def test_gradients_that_a_tensor_hook_kept_stay_those_of_the_tasks() -> None:
    p = vector([0.0] * 3)
    kept: list[Tensor] = []
    p.register_hook(kept.append)  # type: ignore[no-untyped-call]  # torch's
    HarmonizedOptimizer(SGD([p])).backward(linear_losses(p))
    assert torch.stack(kept).tolist() == ROWS


def test_post_accumulate_hooks_see_the_gradient_of_each_task() -> None:
    p = vector([0.0] * 3)
    p.grad = torch.ones(3, dtype=torch.float64)
    seen = []

    def double(param: Tensor) -> None:
        assert param.grad is not None
        seen.append(param.grad.tolist())
        param.grad *= 2

    p.register_post_accumulate_grad_hook(double)  # type: ignore[no-untyped-call]  # torch's
    HarmonizedOptimizer(SGD([p])).backward(linear_losses(p))
    assert seen == ROWS
    assert_close(p.grad, 1 + 2 * update_of(ROWS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("keeps", [True, False])
def test_an_optimizer_that_steps_inside_backward_is_refused(
    layers: int, keeps: bool
) -> None:
    """The passes of the later tasks would meet other parameters."""
    model = network(2)
    if layers == 2:  # then autograd itself sees that a weight has changed
        model.trunk.append(nn.Linear(8, 8).double())  # type: ignore[operator]  # Sequential
    optimizer = wrap(model)

    def step(parameter: Tensor, each: Optimizer) -> None:
        each.step()
        if not keeps:
            parameter.grad = None

    for p in model.parameters():
        each = partial(step, each=SGD([p], lr=0.1))
        p.register_post_accumulate_grad_hook(each)  # type: ignore[no-untyped-call]  # torch's
    with pytest.raises(RuntimeError, match="optimizer that steps inside backward"):
        optimizer.backward(model(*models.batch(2)))
    assert all(grad is None for grad in grads(model))


def test_a_hook_that_takes_a_gradient_away_is_refused() -> None:
    model = network(2)
    optimizer = wrap(model)
    taken: list[Tensor | None] = []

    def take(parameter: Tensor) -> None:
        taken.append(parameter.grad)
        parameter.grad = None

    bias = model.trunk[0].bias  # type: ignore[index]  # Sequential
    handle = bias.register_post_accumulate_grad_hook(take)
    with pytest.raises(
        RuntimeError, match=r"number 1 of shape \[8\], was changed or lost"
    ):
        optimizer.backward(model(*models.batch(2)))
    assert taken
    handle.remove()
    optimizer.backward(model(*models.batch(2)))


def test_a_parameter_that_changes_by_itself_is_no_optimizer_in_backward() -> None:
    """An embedding renormalizes where a checkpoint computes it anew."""
    table = nn.Embedding(10, 4, max_norm=1.0).double()
    head = nn.Linear(4, 2).double()
    optimizer = HarmonizedOptimizer(SGD([*table.parameters(), *head.parameters()], 0.1))
    hidden = checkpoint(lambda i: table(i).tanh(), torch.arange(5), use_reentrant=False)
    out = head(hidden)
    optimizer.backward([out[:, 0].mean(), out[:, 1].square().mean()])
    assert optimizer.last is not None


def with_graph(loss: Tensor, **_: bool) -> None:
    loss.backward(create_graph=True)  # type: ignore[no-untyped-call]  # torch's


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("before", [None, 1.0])
def test_products_with_the_hessian_are_those_of_the_weighted_sum(
    before: float | None, micro_batches: int
) -> None:
    model, _ = network(2), None
    optimizer = wrap(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = None if before is None else torch.full_like(p, before)
    data = [models.batch(2, seed) for seed in range(micro_batches)]
    for seed, batch in enumerate(data, start=1):
        optimizer.backward(
            model(*batch), backward_fn=with_graph, accumulate_only=seed < len(data)
        )
    assert optimizer.last is not None
    assert (optimizer.last.weights != 1).any()
    vectors = [torch.randn_like(p) for p in parameters]

    def product(grads: list[Tensor]) -> list[Tensor]:
        inner = sum((g * v).sum() for g, v in zip(grads, vectors, strict=True))
        assert isinstance(inner, Tensor)
        return list(torch.autograd.grad(inner, parameters))

    weighted = torch.stack(
        [torch.stack(model(*batch)) @ optimizer.last.weights for batch in data]
    ).sum()
    expected = product([*torch.autograd.grad(weighted, parameters, create_graph=True)])
    made = [p.grad for p in parameters if p.grad is not None]
    actual = product(made)
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    plain = [grad - (before or 0) for grad in made]
    assert_close(
        plain,
        [
            *torch.autograd.grad(
                torch.stack(
                    [
                        torch.stack(model(*batch)) @ optimizer.last.weights
                        for batch in data
                    ]
                ).sum(),
                parameters,
            )
        ],
        rtol=1e-10,
        atol=1e-10,
    )


def test_module_backward_hooks_run_once_a_task_and_their_edits_count() -> None:
    model = models.make(models.one_head_for_all, 3)
    parameters = list(model.parameters())
    calls = []

    def halve(_: nn.Module, inputs: Any, __: Any) -> Any:
        calls.append(1)
        return tuple(grad / 2 for grad in inputs)

    data = models.batch(3)
    unhooked = literal_gradients(model(*data), parameters)
    model.trunk[1].register_full_backward_hook(halve)  # type: ignore[index]  # Sequential
    wrap(model).backward(model(*data))
    assert len(calls) == 3
    before_the_hook = unhooked[:, :56] / 2  # the first layer of the trunk
    jacobian = torch.cat([before_the_hook, unhooked[:, 56:]], dim=1)
    expected = literal_update(jacobian)
    assert_close(flat_grads(parameters), expected, rtol=1e-12, atol=1e-12)


# Checkpointing


class Checkpointed(nn.Module):
    """Recompute a module in each backward pass."""

    def __init__(self, module: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.module = module
        self.reentrant = reentrant
        self.runs = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.requires_grad:  # else the reentrant kind has no graph
            inputs = inputs.clone().requires_grad_()
        outputs: Tensor = checkpoint(self._run, inputs, use_reentrant=self.reentrant)
        return outputs

    def _run(self, inputs: Tensor) -> Tensor:
        self.runs += 1
        outputs: Tensor = self.module(inputs)
        return outputs


def deep(tasks: int) -> Tasks:
    dropout = nn.Dropout(0.3)
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), dropout, nn.Linear(8, 8))
    trunk = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 8))
    return Tasks(trunk, [nn.Linear(8, 1) for _ in range(tasks)])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("trunk_alone", [True, False])
def test_checkpointing_trains_as_without_and_recomputes_once_a_task(
    reentrant: bool, tasks: int, trunk_alone: bool
) -> None:
    expected, actual = models.make(deep, tasks), models.make(deep, tasks)
    part = Checkpointed(actual.trunk[0], reentrant=reentrant)  # type: ignore[index]  # Sequential
    actual.trunk[0] = part  # type: ignore[operator]  # Sequential
    for model in expected, actual:
        shared = model.trunk.parameters() if trunk_alone else None
        optimizer = wrap(model, shared_params=shared)
        torch.manual_seed(1)  # of the dropout
        for seed in range(3):
            optimizer.step(losses=model(*models.batch(tasks, seed)))
    assert part.runs == 3 * (1 + tasks)
    assert_close(
        list(actual.parameters()), list(expected.parameters()), rtol=1e-14, atol=1e-14
    )


# Batch norm


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_batch_norm_counts_a_batch_once(tasks: int) -> None:
    expected, actual = (models.make(models.batch_norm, tasks) for _ in range(2))
    data = models.batch(tasks)
    expected(*data)
    wrap(actual).backward(actual(*data))
    statistics = [dict(model.named_buffers()) for model in (expected, actual)]
    assert_close(statistics[1], statistics[0], rtol=0, atol=0)
    assert statistics[1]["trunk.1.num_batches_tracked"] == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_batch_norm_counts_a_batch_once_more_for_every_pass(
    reentrant: bool,
) -> None:
    """Of checkpointing, not of the wrapper: plain checkpointing counts twice."""
    model = models.make(models.batch_norm, 3)
    model.trunk = Checkpointed(model.trunk, reentrant=reentrant)
    wrap(model).backward(model(*models.batch(3)))
    counts = [value for value in model.buffers() if value.dim() == 0]
    assert counts == [1 + 3]


# Parameters


class Tied(nn.Module):
    """An embedding whose table is also the weight of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.middle = nn.Linear(4, 4)
        self.out = nn.Linear(4, 10)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> list[Tensor]:
        logits = self.out(self.middle(self.table(tokens)).tanh())
        return [nn.functional.cross_entropy(logits, tokens), logits.square().mean(),
                -logits[:, 1].mean()]  # fmt: skip


@few_bases
def test_a_tied_parameter_has_one_gradient(base: Base) -> None:
    torch.manual_seed(0)
    expected, actual = Tied().double(), Tied().double()
    actual.load_state_dict(expected.state_dict())
    parameters = list(expected.parameters())
    literal, optimizer = base(parameters), HarmonizedOptimizer(
        base(actual.parameters())
    )  # fmt: skip
    conflicts = 0
    for seed in range(5):
        tokens = torch.arange(6) + seed % 4
        conflicts += literal_step(expected(tokens), parameters, literal)
        optimizer.step(losses=actual(tokens))
    assert actual.out.weight is actual.table.weight
    assert conflicts
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-9, atol=1e-9)


def convolutions(memory_format: torch.memory_format) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2))
    return model.double().to(memory_format=memory_format)  # type: ignore[call-overload,no-any-return]  # torch's stub lacks it alone


def image_losses(model: nn.Module, tasks: int) -> list[Tensor]:
    images = torch.linspace(-1, 1, 2 * 3 * 36, dtype=torch.float64).view(2, 3, 6, 6)
    out = model(images)
    return [out[:, 0].square().mean(), -out.sin().mean(), (out - 1).pow(2).mean()][:tasks]  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_channels_last_weights_have_gradients_with_their_strides(
    tasks: int, parts: int
) -> None:
    expected = convolutions(torch.contiguous_format)
    actual = convolutions(torch.channels_last)
    weight = actual[0].weight
    assert isinstance(weight, Tensor)
    assert weight.stride() != expected[0].weight.stride()  # type: ignore[operator]  # Conv2d
    for model in expected, actual:
        optimizer = wrap(model)
        for part in range(parts):
            losses = image_losses(model, tasks)
            optimizer.backward(losses, accumulate_only=part < parts - 1)
    for p, q in zip(expected.parameters(), actual.parameters(), strict=True):
        assert q.grad is not None
        assert q.grad.stride() == q.stride()
        assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-12)


class Odd(nn.Module):
    """Parameters of no dimension, and of no element."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.shift = vector([0.5, -1.0])
        self.empty = nn.Parameter(torch.empty(0, 3, dtype=torch.float64))

    def forward(self) -> list[Tensor]:
        gap = self.shift - self.scale
        return [
            (self.scale * self.shift).sum() + self.empty.sum(),
            gap.square().sum() - 3 * self.empty.sum(),
        ]


@few_bases
def test_parameters_of_no_dimension_and_of_no_element_train(base: Base) -> None:
    expected, actual = Odd(), Odd()
    parameters = list(expected.parameters())
    literal = base(parameters)
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    for _ in range(3):
        literal_step(expected(), parameters, literal)
        optimizer.step(losses=actual())
    shapes = [None if grad is None else grad.shape for grad in grads(actual)]
    assert shapes == [(), (2,), (0, 3)]
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-9, atol=1e-9)


# Sparse and complex


class Tables(nn.Module):
    """Two embeddings, of which tasks use rows, and a dense layer."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(12, 3, sparse=sparse) for _ in range(2)
        )
        self.dense = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        a, b = self.tables[0](tokens), self.tables[1](tokens[:3])
        out = self.dense(a)
        return [
            out[:, 0].square().mean() + b.square().mean(),
            (out[:, 0] + 1).square().mean() - b[1:].sum(),
            (a + 1).square().mean(),  # of one table alone
            self.dense.weight.square().sum(),  # of none
        ]


def tables(*, sparse: bool) -> Tables:
    torch.manual_seed(0)
    return Tables(sparse=sparse).double()


TOKENS = [[0, 1, 1, 4, 7], [4, 2, 4, 1, 0], [9, 9, 2, 3, 9]]


@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_sparse_tables_train_as_dense_ones_and_stay_sparse(
    tasks: int, parts: int
) -> None:
    expected, actual = tables(sparse=False), tables(sparse=True)
    for model in expected, actual:
        optimizer = wrap(model)
        for tokens in TOKENS:
            optimizer.zero_grad()
            for part in range(parts):
                losses = model(torch.tensor(tokens[part:]))[:tasks]
                optimizer.backward(losses, accumulate_only=part < parts - 1)
            optimizer.step()
    for grad in grads(actual.tables):
        assert grad is not None
        assert grad.is_sparse
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-10, atol=1e-12)


def sparse(rows: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(
        rows[None], values[rows], values.shape, is_coalesced=True, check_invariants=True
    )


def test_sparse_adam_moves_the_rows_that_a_task_used_and_no_others() -> None:
    dense, actual = tables(sparse=False), tables(sparse=True)
    literal = SparseAdam(dense.tables.parameters())
    optimizer = HarmonizedOptimizer(SparseAdam(actual.tables.parameters()))
    before = weights_of(actual)
    for tokens in map(torch.tensor, TOKENS[:2]):
        parameters = list(dense.tables.parameters())
        update = literal_update(literal_gradients(dense(tokens)[:3], parameters))
        used = torch.unique(tokens), torch.unique(tokens[:3])
        for p, part, rows in zip(parameters, update.view(2, 12, 3), used, strict=True):
            p.grad = sparse(rows, part)
        literal.step()
        optimizer.step(losses=actual(tokens)[:3])
    # Adam magnifies the rounding of a tiny gradient.
    assert_close(weights_of(actual), weights_of(dense), rtol=1e-9, atol=1e-9)
    moved = weights_of(actual)["tables.0.weight"] != before["tables.0.weight"]
    assert moved.any(1).nonzero()[:, 0].tolist() == [0, 1, 2, 4, 7]


@pytest.mark.parametrize("backwards", [False, True])
def test_one_table_may_have_sparse_and_dense_gradients(backwards: bool) -> None:
    table = nn.Embedding(4, 2, sparse=True).double()
    losses = [
        table(torch.tensor([1, 1])).sum(),
        -table.weight.sum() - table.weight[3, 0],
    ]
    wrap(table).backward(losses[::-1] if backwards else losses)
    rows = [[0.0, 0, 2, 2, 0, 0, 0, 0], [-1.0, -1, -1, -1, -1, -1, -2, -1]]
    assert table.weight.grad is not None
    assert_close(table.weight.grad.to_dense().reshape(-1), update_of(rows))


class Complex(nn.Module):
    """A complex weight, kept as such or as pairs of real numbers."""

    def __init__(self, *, pairs: bool) -> None:
        super().__init__()
        weight = torch.tensor([1 + 2j, -0.5j, 3 - 1j], dtype=torch.complex128)
        self.pairs = pairs
        self.weight = nn.Parameter(torch.view_as_real(weight) if pairs else weight)
        self.real = vector([1.0, -2.0, 0.5])

    def forward(self, real: float, imag: float) -> list[Tensor]:
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        turned = weight * complex(real, imag) * self.real
        return [
            turned.abs().square().sum(),
            (turned + 4).abs().sum(),
            turned.imag.sum() - turned.real.sum(),
        ]


# Complex parameters are refused by these, bare or not.
REAL_ONLY = ["SGD fused", "AdamW fused", "Adafactor"]


@bases_but(*REAL_ONLY)
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_complex_parameter_trains_as_pairs_of_real_numbers(
    base: Base, tasks: int
) -> None:
    expected, actual = Complex(pairs=True), Complex(pairs=False)
    for model in expected, actual:
        optimizer = HarmonizedOptimizer(base(model.parameters()))
        for step in range(3):
            optimizer.step(losses=model(1 + step, 2 - step)[:tasks])
    assert actual.weight.grad is not None
    assert actual.weight.grad.is_complex()
    assert_close(torch.view_as_real(actual.weight), expected.weight.data)
    assert_close(actual.real, expected.real)


# Parameters that change


def replace_in_list(optimizer: Optimizer, index: int, new: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"][index] = new


def replace_the_list(optimizer: Optimizer, index: int, new: nn.Parameter) -> None:
    group = optimizer.param_groups[0]
    group["params"] = [*group["params"][:index], new, *group["params"][index + 1 :]]


@pytest.mark.parametrize("replace", [replace_in_list, replace_the_list])
@pytest.mark.parametrize("trunk_alone", [False, True], ids=["all", "trunk"])
@pytest.mark.parametrize("least", [0, 1], ids=["every one", "all but the first"])
def test_a_parameter_that_takes_the_place_of_another_is_trained_like_it(
    replace: Callable[[Optimizer, int, nn.Parameter], None],
    trunk_alone: bool,
    least: int,
) -> None:
    kept, swapped = network(2), network(2)
    for model in kept, swapped:
        shared = model.trunk.parameters() if trunk_alone else None
        optimizer = wrap(model, shared_params=shared)
        optimizer.step(losses=model(*models.batch(2)))
        named = [*enumerate(model.named_parameters())] if model is swapped else []
        for index, (name, p) in named[least:]:  # as Accelerate does for FSDP2
            module, _, last = name.rpartition(".")
            new = nn.Parameter(p.detach().clone())
            setattr(model.get_submodule(module), last, new)
            replace(optimizer, index, new)
        optimizer.step(losses=model(*models.batch(2, 1)))
    assert_close(weights_of(swapped), weights_of(kept), rtol=0, atol=0)


@pytest.mark.parametrize("way", ["in place", "data", "swap_tensors"])
@pytest.mark.parametrize("trunk_alone", [False, True], ids=["all", "trunk"])
def test_the_contents_of_a_parameter_may_be_replaced(
    way: str, trunk_alone: bool
) -> None:
    kept, swapped, other = network(2), network(2), network(2, seed=1)
    for model in kept, swapped:
        shared = model.trunk.parameters() if trunk_alone else None
        optimizer = wrap(model, shared_params=shared)
        optimizer.step(losses=model(*models.batch(2)))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            if model is swapped and way == "swap_tensors":
                torch.utils.swap_tensors(p, nn.Parameter(q.detach().clone()))  # type: ignore[no-untyped-call]  # torch's
            elif model is swapped and way == "data":
                p.data = q.detach().clone()
            else:
                p.data.copy_(q)
        optimizer.step(losses=model(*models.batch(2, 1)))
    assert_close(weights_of(swapped), weights_of(kept), rtol=0, atol=0)


@every_base
def test_freezing_and_unfreezing_in_mid_training_is_as_in_the_literal_loop(
    base: Base,
) -> None:
    expected, actual = network(), network()
    parameters = list(expected.parameters())
    literal = base(parameters)
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    for seed, prefix in enumerate(["-", "trunk", "heads.1", "heads", "-", "trunk.0.b"]):
        for model in expected, actual:
            for name, p in model.named_parameters():
                p.requires_grad_(not name.startswith(prefix))
        literal.zero_grad()
        literal_step(expected(*models.batch(3, seed)), parameters, literal)
        before = weights_of(actual)
        optimizer.step(losses=actual(*models.batch(3, seed)))
        for name, value in weights_of(actual).items():
            assert value.equal(before[name]) or not name.startswith(prefix)
    # Adam magnifies the rounding of a tiny gradient.
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-9, atol=1e-9)


# The fused SGD cannot start the momentum of one parameter after that of others.
@bases_but("SGD fused")
def test_an_unused_parameter_is_left_alone_until_a_task_reaches_it(base: Base) -> None:
    expected, actual = network(), network()
    parameters = list(expected.parameters())
    literal = base(parameters)
    optimizer = HarmonizedOptimizer(base(actual.parameters()))
    for seed, tasks in enumerate([1, 1, 3, 2, 3]):
        literal.zero_grad()
        literal_step(expected(*models.batch(3, seed))[:tasks], parameters, literal)
        before = weights_of(actual.heads)
        optimizer.step(losses=actual(*models.batch(3, seed))[:tasks])
        assert all(grads(head) == [None, None] for head in actual.heads[tasks:])
        for name, value in weights_of(actual.heads).items():
            assert value.equal(before[name]) or int(name[0]) < tasks
    # Adam magnifies the rounding of a tiny gradient.
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-9, atol=1e-9)


# Gradients that autograd shares

SHARING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum of each": lambda a, b: a.sum() + 2 * b.sum(),
    "sum of the sum": lambda a, b: (a + b).sum(),
    "one gradient": lambda a, b: ((a + b) * torch.arange(12).view(3, 4)).sum(),
    "views": lambda a, b: a.view(-1)[2:].sum() + b.t().sum(),
    "expanded": lambda a, b: a[:, :1].expand(3, 5).sum() + b[0].expand(7, 4).sum(),
    "joined": lambda a, b: torch.cat([a, b]).square().sum(),
    "custom": lambda a, b: SharedGradient.apply(a, b).sum(),  # type: ignore[no-untyped-call]  # torch's
}


class SharedGradient(torch.autograd.Function):
    """A sum that gives one tensor as the gradient of both terms."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:  # noqa: ARG004  # torch's signature
        return a + b

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ARG004  # torch's signature
        both = grads[0].clone()
        return both, both


@pytest.mark.parametrize("kind", [*SHARING])
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_grad_has_memory_and_strides_of_its_own(
    kind: str, tasks: int, parts: int
) -> None:
    a, b = (nn.Parameter(torch.full((3, 4), 0.5).double()) for _ in range(2))
    optimizer = HarmonizedOptimizer(SGD([a, b]))
    losses = [factor * SHARING[kind](a, b) for factor in (1, -2, 3)][:tasks]
    # Of parallel gradients those in conflict cancel to zero.
    expected = literal_update(literal_gradients(losses, [a, b])) * parts
    for part in range(parts):
        last = part == parts - 1
        optimizer.backward(losses, retain_graph=not last, accumulate_only=not last)
    assert_close(flat_grads([a, b]), expected, rtol=1e-12, atol=1e-12)
    found = [p.grad for p in (a, b) if p.grad is not None]
    assert [grad.stride() for grad in found] == [(4, 1), (4, 1)]
    clip_grad_norm_([a, b], 1.0)
    for one, other in (found, found[::-1]):
        before = other.clone()
        one.fill_(7)
        assert other.equal(before)


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_that_overlap_in_memory_come_apart(
    order: tuple[int, ...], tasks: int, parts: int
) -> None:
    """They do in torch: a second plain ``backward`` of this loss adds up to 3 times."""
    c = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    three = [vector([1.0] * 3), vector([1.0] * 3), c]
    parameters = [three[index] for index in order]
    out = torch.cat([three[0], three[1]]) + c.view(6)
    rows = [[*row, 2.0, *row[:2]] for row in ROWS[:tasks]]
    losses = linear_losses(out, rows)
    expected = parts * literal_update(literal_gradients(losses, parameters))
    optimizer = HarmonizedOptimizer(SGD(parameters))
    for part in range(parts):
        last = part == parts - 1
        optimizer.backward(losses, retain_graph=not last, accumulate_only=not last)
    assert_close(flat_grads(parameters), expected, rtol=1e-12, atol=1e-12)
    for p in parameters:
        assert p.grad is not None
        p.grad += 1
    assert_close(flat_grads(parameters), expected + 1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_plain_sum_of_gradients_that_overlap_in_memory_is_right(tasks: int) -> None:
    """As by one plain ``backward`` of the sum, after which nothing is added."""
    c = nn.Parameter(torch.ones(2, 3, dtype=torch.float64))
    a, b, shared = vector([1.0] * 3), vector([1.0] * 3), vector([1.0])
    rows = torch.tensor([[*row, 2.0, *row[:2]] for row in ROWS[:tasks]]).double()
    losses = linear_losses(torch.cat([a, b]) + c.view(6), rows.tolist())
    optimizer = HarmonizedOptimizer(SGD([shared, a, b, c]), shared_params=[shared])
    optimizer.backward([loss + shared.sum() for loss in losses])
    expected = torch.cat([rows.sum(0)] * 2)
    assert_close(flat_grads([a, b, c]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_gradients_that_a_user_kept_are_not_overwritten(tasks: int) -> None:
    model = network(tasks)
    optimizer = wrap(model)
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in range(4):
        optimizer.zero_grad()
        optimizer.backward(model(*models.batch(tasks, seed)))
        optimizer.step()
        kept += [(grad, grad.clone()) for grad in grads(model) if grad is not None]
    assert len(kept) == 4 * len(list(model.parameters()))
    assert all(grad.equal(then) for grad, then in kept)


# Parameters outside, and two optimizers


@pytest.mark.parametrize("second", ["plain", "harmonized"])
@pytest.mark.parametrize("tasks", [2, 3])
def test_heads_in_a_second_optimizer_train_on_the_plain_sum(
    second: str, tasks: int
) -> None:
    expected, actual = network(tasks), network(tasks)
    shared = list(expected.trunk.parameters())
    literal = SGD(shared, lr=0.1), SGD(expected.heads.parameters(), lr=0.2)
    trunk = HarmonizedOptimizer(SGD(actual.trunk.parameters(), lr=0.1))
    heads: Optimizer = SGD(actual.heads.parameters(), lr=0.2)
    heads = HarmonizedOptimizer(heads) if second == "harmonized" else heads
    for seed in range(5):
        losses = expected(*models.batch(tasks, seed))
        update = literal_update(literal_gradients(losses, shared))
        literal[1].zero_grad()
        plain_backward(torch.stack(losses).sum())
        for p, part in zip(shared, torch.split(update, [48, 8]), strict=True):
            p.grad = part.view_as(p)
        trunk.zero_grad()
        heads.zero_grad()
        trunk.backward(actual(*models.batch(tasks, seed)))
        for optimizer in (*literal, trunk):
            optimizer.step()
        # Once: this one's backward is never called, and so nothing is harmonized.
        warns = second == "harmonized" and not seed
        with pytest.warns(match="never called") if warns else nullcontext():
            heads.step()
    assert_close(weights_of(actual), weights_of(expected), rtol=1e-10, atol=1e-10)


def own_passes(optimizer: Optimizer) -> Callable[..., None]:
    """Run passes that lead to the parameters of this optimizer only."""
    inputs = [p for group in optimizer.param_groups for p in group["params"]]
    return partial(plain_backward, inputs=inputs)


@pytest.mark.parametrize("restricted", [True, False])
def test_two_optimizers_on_one_graph_harmonize_each_its_own(restricted: bool) -> None:
    """If their passes reach those of the other, they would add the plain sum to them."""
    model = models.make(models.one_head_for_all, 2)
    parts = [list(model.trunk.parameters()), list(model.heads[0].parameters())]
    optimizers = [HarmonizedOptimizer(SGD(part, lr=0.1)) for part in parts]
    losses = model(*models.batch(2, seed=4))
    jacobians = [literal_gradients(losses, part) for part in parts]
    assert all(jacobian[0] @ jacobian[1] < 0 for jacobian in jacobians)
    for optimizer in optimizers:
        run = own_passes(optimizer) if restricted else None
        if restricted or optimizer is optimizers[0]:
            optimizer.backward(losses, backward_fn=run, retain_graph=True)
        else:
            with pytest.raises(
                ValueError, match=r"Call ghopt.backward\(losses, params\) on"
            ):
                optimizer.backward(losses)
            return
    for part, jacobian in zip(parts, jacobians, strict=True):
        assert_close(flat_grads(part), literal_update(jacobian))


# Exceptions


class Failure(Exception):
    """Raised in a pass."""


def failing(
    error: type[BaseException], task: int, where: str, model: Tasks
) -> Callable[..., None]:
    """Run passes; that of one task fails, at its start or with half its gradients."""
    passes: Iterator[int] = iter(range(3))

    def run(loss: Tensor, retain_graph: bool) -> None:
        failed = next(passes) == task
        if failed and where == "in the middle":
            inputs = [*model.heads[task].parameters()]
            plain_backward(loss, retain_graph=True, inputs=inputs)
        if failed:
            raise error
        plain_backward(loss, retain_graph=retain_graph)

    return run


@pytest.mark.parametrize("error", [Failure, KeyboardInterrupt])
@pytest.mark.parametrize("task", [0, 1, 2])
@pytest.mark.parametrize("where", ["at the start", "in the middle"])
@pytest.mark.parametrize("trunk_alone", [False, True], ids=["all", "trunk"])
def test_after_an_exception_in_any_pass_training_goes_on_as_if_it_had_not_been(
    error: type[BaseException], task: int, where: str, trunk_alone: bool
) -> None:
    expected, actual = network(), network()
    for model in expected, actual:
        shared = model.trunk.parameters() if trunk_alone else None
        base = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = HarmonizedOptimizer(base, shared_params=shared)
        optimizer.step(losses=model(*models.batch(3)))
        before, last = grads(model), optimizer.last
        if model is actual:
            run = failing(error, task, where, model)
            with pytest.raises(error):
                optimizer.backward(model(*models.batch(3, 1)), backward_fn=run)
        assert all(a is b for a, b in zip(grads(model), before, strict=True))
        assert optimizer.last is last
        optimizer.backward(model(*models.batch(3, 2)))  # adds to what was there
        optimizer.step()
    assert_close(weights_of(actual), weights_of(expected), rtol=0, atol=0)


def fail(_: Tensor) -> Any:
    raise Failure


def test_after_an_exception_in_the_weighting_all_is_as_before() -> None:
    model = network()
    optimizer = wrap(model)
    optimizer.backward(model(*models.batch(3)))
    before, last = grads(model), optimizer.last
    values = [grad.clone() for grad in before if grad is not None]
    optimizer.weighting = fail
    with pytest.raises(Failure):
        optimizer.backward(model(*models.batch(3, 1)))
    assert optimizer.last is last
    assert all(a is b for a, b in zip(grads(model), before, strict=True))
    assert_close(before, values, rtol=0, atol=0)


@pytest.mark.parametrize("task", [0, 1, 2])
def test_after_an_exception_parameters_outside_keep_the_passes_that_finished(
    task: int,
) -> None:
    model = network()
    optimizer = wrap(model.trunk)
    losses = model(*models.batch(3))
    losses[task].register_hook(fail)
    with pytest.raises(Failure):
        optimizer.backward(losses)
    assert grads(model.trunk) == [None, None]
    finished = [grads(head)[0] is not None for head in model.heads]
    assert finished == [number < task for number in range(3)]
