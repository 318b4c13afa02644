"""The step that opposes no task, beside the same done one projection after the other."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from pytorch_optimizer import AccSGD, ScheduleFreeAdamW
from torch import Tensor, nn, optim
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from ghopt import Change, HarmonizedOptimizer, gh, plain_sum
from ghopt.stepping import is_zero
from tests import models
from tests.bases import SAM
from tests.literal import (
    literal_gradients,
    literal_projected_step,
    literal_projection,
    literal_update,
    weights_of,
)
from tests.memory import allocated
from tests.models import Tasks

STEPS, ROWS = 40, 4
"""Of few rows the gradients differ much, so that momentum soon opposes a task."""

Base = Callable[[Iterable[nn.Parameter]], Optimizer]


class MuonAndAdam(Optimizer):
    """Muon for the matrices beside AdamW for the rest, as it is used."""

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        if not hasattr(optim, "Muon"):
            pytest.skip("torch 2.8 has no Muon")
        given = list(params)
        super().__init__(given, {})
        self.parts = [
            optim.Muon([p for p in given if p.dim() == 2], lr=0.02),
            optim.AdamW([p for p in given if p.dim() != 2], lr=0.01),
        ]
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # as used
        """Step both."""
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        for part in self.parts:
            part.state = self.state


BASES: dict[str, Base] = {
    "SGD, momentum and decay": partial(
        SGD, lr=0.03, momentum=0.95, nesterov=True, weight_decay=0.01
    ),
    "AdamW, decay": partial(optim.AdamW, lr=0.02, weight_decay=0.1),
    "AdamW, fused": partial(optim.AdamW, lr=0.02, weight_decay=0.1, fused=True),
    "Adam, foreach": partial(optim.Adam, lr=0.02, foreach=True),
    "RMSprop, momentum": partial(optim.RMSprop, lr=0.005, momentum=0.9),
    "Muon and AdamW": MuonAndAdam,
    "Adafactor": partial(optim.Adafactor, lr=0.02),
    "schedule-free": partial(ScheduleFreeAdamW, lr=0.05),
}
every_base = pytest.mark.parametrize("base", BASES.values(), ids=[*BASES])


def plain(jacobian: Tensor) -> Tensor:
    return jacobian.sum(0)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).clone() for t in tensors])


def opposed(jacobian: Tensor, change: Tensor, scale: float) -> Tensor:
    """How far a change goes against each task, in lengths of both."""
    lengths: Tensor = jacobian.norm(dim=1).clamp(min=1e-300) * max(scale, 1e-300)
    return jacobian @ change / lengths


def follow(
    base: Base, optimizer: HarmonizedOptimizer, model: Tasks, tasks: int, **how: Any
) -> int:
    """Train, and beside it, from each step's start, literally.

    Returns:
        In how many steps the base alone would have opposed a protected task.
    """
    twin = copy.deepcopy(model)
    literal = base(twin.parameters())
    protected = how.get("protected", range(tasks))
    worse = 0
    for step in range(STEPS):
        inputs, targets = models.batch(tasks, step, ROWS)
        twin.load_state_dict(model.state_dict())
        literal.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        free = copy.deepcopy(twin)
        unbound = base(free.parameters())
        unbound.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = flat(trained(model))
        jacobian = literal_gradients(model(inputs, targets), trained(model))
        literal_projected_step(
            twin(inputs, targets),
            list(twin.parameters()),
            literal,
            [*protected],
            how.get("update", literal_update),
        )
        optimizer.zero_grad()
        optimizer.backward(model(inputs, targets))
        for p, q in zip(free.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        optimizer.step()
        unbound.step()
        assert_close(weights_of(model), weights_of(twin), rtol=1e-8, atol=1e-9)
        own = flat(trained(free)) - before
        change = flat(trained(model)) - before
        cone = jacobian[[*protected]]
        size = float(own.norm())
        assert opposed(cone, change, size).max() <= 1e-6
        worse += bool(opposed(cone, own, size).max() > 1e-3)
    return worse


@pytest.mark.parametrize(
    "weighting", ["gh", pytest.param("sum", marks=pytest.mark.slow)]
)
@every_base
def test_no_step_opposes_a_task_with_any_base(base: Base, weighting: str) -> None:
    tasks = 3
    model = models.make(models.heads_on_a_trunk, tasks)
    rule, update = {"gh": (gh, literal_update), "sum": (plain_sum, plain)}[weighting]
    optimizer = HarmonizedOptimizer(base(model.parameters()), rule, project_step=True)
    worse = follow(base, optimizer, model, tasks, update=update)
    assert worse >= 3  # left to itself the base opposes tasks


@pytest.mark.parametrize(
    ("rule", "protected"), [(gh, [1]), (gh, [2, 0]), (plain_sum, [1])]
)
def test_a_protected_task_is_not_opposed_whatever_the_others_want(
    rule: Callable[[Tensor], Tensor], protected: list[int]
) -> None:
    tasks = 4

    def update(jacobian: Tensor) -> Tensor:
        if rule is plain_sum:
            return jacobian.sum(0)
        rows = [literal_projection(row, jacobian[protected]) for row in jacobian]
        # A protected gradient opposes none but other protected ones.
        return torch.stack(rows).sum(0)

    model = models.make(models.heads_on_a_trunk, tasks)
    base = BASES["AdamW, decay"]
    optimizer = HarmonizedOptimizer(
        base(model.parameters()), rule, project_step=True, protect=protected
    )
    assert follow(base, optimizer, model, tasks, update=update, protected=protected)


def adam_on_trunk(**options: Any) -> tuple[Tasks, HarmonizedOptimizer]:
    model = models.make(models.heads_on_a_trunk, 3)
    base = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    return model, HarmonizedOptimizer(base, project_step=True, **options)


def test_of_shared_parameters_alone_the_others_move_as_the_base_moves_them() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    shared = [*model.trunk.parameters()]
    base = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = HarmonizedOptimizer(base, project_step=True, shared_params=shared)
    twin = copy.deepcopy(model)
    free = optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    seen = 0
    for step in range(40):
        twin.load_state_dict(model.state_dict())
        free.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        losses = model(*models.batch(3, step))
        jacobian = literal_gradients(losses, shared)
        before = flat(shared)
        optimizer.zero_grad()
        optimizer.backward(losses)
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        optimizer.step()
        free.step()
        own = flat(twin.trunk.parameters()) - before
        change = flat(shared) - before
        size = float(own.norm())
        assert opposed(jacobian, change, size).max() <= 1e-6
        seen += bool(opposed(jacobian, own, size).max() > 1e-3)
        # The heads: bit for bit.
        heads = zip(model.heads.parameters(), twin.heads.parameters(), strict=True)
        assert all(mine.equal(theirs) for mine, theirs in heads)
    assert seen > 5


def states(optimizer: Optimizer) -> list[Tensor]:
    kept = optimizer.state_dict()["state"].values()
    return [v for of_one in kept for v in of_one.values() if isinstance(v, Tensor)]


@every_base
def test_where_nothing_is_opposed_no_bit_changes(base: Base) -> None:
    plain_model = models.make(models.one_head_for_all, 2)
    # A zero with a sign: adding a zero to it would take it away.
    with torch.no_grad():
        plain_model.trunk[0].bias[0] = -0.0  # type: ignore[index]  # Sequential
    model = copy.deepcopy(plain_model)
    bare = HarmonizedOptimizer(base(plain_model.parameters()))
    optimizer = HarmonizedOptimizer(base(model.parameters()), project_step=True)
    inputs, targets = models.batch(1, 0)
    for which, one in ((plain_model, bare), (model, optimizer)):
        # Small enough steps down one loss: momentum and step agree with it.
        for group in one.param_groups:
            group["lr"] = 1e-5
        for _ in range(3):
            one.zero_grad()
            loss = which(inputs, targets.expand(2, -1))[0]
            one.backward([loss, 2 * loss])
            one.step()
    pairs = zip(plain_model.parameters(), model.parameters(), strict=True)
    for mine, theirs in pairs:
        assert mine.detach().numpy().tobytes() == theirs.detach().numpy().tobytes()
    for expected, found in zip(states(bare), states(optimizer), strict=True):
        assert expected.equal(found)


# What comes between backward and step


def steps_of(
    train: Callable[[Tasks, HarmonizedOptimizer, int], object], steps: int = 12
) -> list[Tensor]:
    """Train with a base whose steps oppose tasks, and give the parameters."""
    model, optimizer = adam_on_trunk()
    for step in range(steps):
        train(model, optimizer, step)
    return [p.detach().clone() for p in model.parameters()]


def usual(model: Tasks, optimizer: HarmonizedOptimizer, step: int) -> None:
    optimizer.zero_grad()
    optimizer.backward(model(*models.batch(3, step)))
    optimizer.step()


def in_micro_batches(model: Tasks, optimizer: HarmonizedOptimizer, step: int) -> None:
    inputs, targets = models.batch(3, step)
    optimizer.zero_grad()
    for micro in range(4):
        losses = model(inputs[micro::4], targets[:, micro::4])
        optimizer.backward([x / 4 for x in losses], accumulate_only=micro < 3)
    optimizer.step()


def finished_late(model: Tasks, optimizer: HarmonizedOptimizer, step: int) -> None:
    optimizer.zero_grad()
    optimizer.backward(model(*models.batch(3, step)), accumulate_only=True)
    optimizer.step()


def in_a_closure(model: Tasks, optimizer: HarmonizedOptimizer, step: int) -> None:
    optimizer.step(lambda: model(*models.batch(3, step)))


def in_one_line(model: Tasks, optimizer: HarmonizedOptimizer, step: int) -> None:
    optimizer.step(losses=model(*models.batch(3, step)))


def scaled(model: Tasks, optimizer: HarmonizedOptimizer, step: int) -> None:
    optimizer.zero_grad()
    optimizer.backward([1024 * loss for loss in model(*models.batch(3, step))])
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= 1024
    optimizer.step()


@pytest.mark.parametrize(
    "train", [in_micro_batches, finished_late, in_a_closure, in_one_line, scaled]
)
def test_the_way_to_the_step_does_not_matter(
    train: Callable[[Tasks, HarmonizedOptimizer, int], object],
) -> None:
    assert_close(steps_of(train), steps_of(usual), rtol=1e-9, atol=1e-11)


def test_gradients_of_several_calls_add_up_by_task() -> None:
    model, optimizer = adam_on_trunk(weighting=plain_sum)
    parameters = [*model.parameters()]
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    for step in range(10):
        first = model(*models.batch(3, step))
        second = model(*models.batch(3, 50 + step))
        jacobian = literal_gradients(first, parameters)
        jacobian[[0, 2]] += literal_gradients([second[0], second[2]], parameters)
        before = flat(parameters)
        optimizer.zero_grad()
        optimizer.backward({"a": first[0], "b": first[1], "c": first[2]})
        optimizer.backward({"c": second[2], "a": second[0]})
        optimizer.step()
        change = flat(parameters) - before
        assert opposed(jacobian, change, float(change.norm())).max() <= 1e-6
        assert seen[-1].names == ("a", "b", "c")
        rows = torch.cat([jacobian, change[None]])
        assert_close(seen[-1].gramian, rows @ rows.T, rtol=1e-9, atol=1e-12)
        assert_close(seen[-1].slopes, jacobian @ change, rtol=1e-9, atol=1e-12)


def test_gradients_that_were_cleared_do_not_touch_the_momentum() -> None:
    model, optimizer = adam_on_trunk(weighting=plain_sum)
    for step in range(6):
        usual(model, optimizer, step)
    optimizer.backward(model(*models.batch(3, 9)))
    before = [value.clone() for value in states(optimizer)]
    model.zero_grad()
    optimizer.step()
    for old, new in zip(before, states(optimizer), strict=True):
        assert old.equal(new)


def test_of_several_evaluations_the_first_counts_even_if_each_measures() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    parameters = [*model.parameters()]
    base = optim.LBFGS(parameters, lr=0.1, max_iter=4)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)

    def closure() -> float:
        optimizer.zero_grad()
        first, second, third = model(*models.batch(3, 0))
        optimizer.backward({"a": first, "b": second}, retain_graph=True)
        optimizer.backward({"c": third})  # other tasks: each call measures anew
        value: float = first.item()
        return value

    jacobian = literal_gradients(model(*models.batch(3, 0)), parameters)
    optimizer.step(closure)
    expected = jacobian @ jacobian.T
    assert_close(seen[0].gramian[:3, :3], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "clear", ["zero_grad", "zero_grad to zeros", "zero_grad of the model", "step"]
)
def test_gradients_of_an_earlier_step_play_no_part(clear: str) -> None:
    model, optimizer = adam_on_trunk()
    names = []
    optimizer.register_change_hook(lambda change: names.append(change.names))
    losses = model(*models.batch(3, 0))
    optimizer.backward({"old": losses[0]})
    match clear:
        case "zero_grad":
            optimizer.zero_grad()
        case "zero_grad to zeros":
            optimizer.zero_grad(set_to_none=False)
        case "zero_grad of the model":
            model.zero_grad()
        case "step":
            optimizer.step()
            optimizer.zero_grad()
    optimizer.backward(model(*models.batch(3, 1)))
    optimizer.step()
    assert names[-1] == ("0", "1", "2")


def test_clipping_does_not_change_what_is_opposed() -> None:
    model, optimizer = adam_on_trunk()
    parameters = [*model.parameters()]
    for step in range(20):
        losses = model(*models.batch(3, step))
        jacobian = literal_gradients(losses, parameters)
        before = flat(parameters)
        optimizer.zero_grad()
        optimizer.backward(losses)
        nn.utils.clip_grad_norm_(parameters, 1e-3)
        optimizer.step()
        change = flat(parameters) - before
        assert opposed(jacobian, change, float(change.norm())).max() <= 1e-6


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips_changes_nothing(fused: bool) -> None:
    """A fused optimizer is called to skip; then gradients are not finite."""
    layer = nn.Linear(3, 2)
    base = optim.Adam(layer.parameters(), lr=0.1, fused=fused)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for bad in (False, True, False):
        before = [p.detach().clone() for p in layer.parameters()]
        optimizer.zero_grad()
        out = layer(torch.ones(4, 3))
        losses = [out.square().mean(), (out - 1).abs().mean()]
        factor = torch.inf if bad else 1.0
        optimizer.backward([scaler.scale(loss) * factor for loss in losses])
        scaler.step(optimizer)
        scaler.update()
        for old, new in zip(before, layer.parameters(), strict=True):
            assert old.equal(new) == bad
            assert new.isfinite().all()
        assert all(value.isfinite().all() for value in states(base))


def test_gradients_that_are_not_finite_leave_the_step_to_the_base() -> None:
    model, optimizer = adam_on_trunk()
    usual(model, optimizer, 0)
    twin = copy.deepcopy(model)
    base = optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    base.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses = model(*models.batch(3, 1))
    optimizer.zero_grad()
    optimizer.backward([torch.nan * losses[0], *losses[1:]])
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        assert q.grad is not None
        q.grad.nan_to_num_(0.1)  # as careful people do
        p.grad = q.grad.clone()
    optimizer.step()
    base.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.isfinite().all()
        assert p.equal(q)


# Closures, other kinds of parameters


@pytest.mark.parametrize("name", ["L-BFGS", "SAM", "Adam"])
def test_a_closure_is_bound_by_the_gradients_of_its_first_evaluation(name: str) -> None:
    bases: dict[str, Base] = {
        "L-BFGS": partial(optim.LBFGS, lr=1.0, max_iter=6),
        "SAM": lambda p: SAM(p, partial(SGD, lr=0.1, momentum=0.9)),
        "Adam": partial(optim.Adam, lr=0.05),
    }
    model = models.make(models.heads_on_a_trunk, 3)
    parameters = [*model.parameters()]
    optimizer = HarmonizedOptimizer(bases[name](parameters), project_step=True)
    changes: list[Change] = []
    optimizer.register_change_hook(changes.append)
    evaluations = []
    for step in range(8):
        inputs, targets = models.batch(3, step)

        def closure() -> list[Tensor]:
            evaluations.append(step)  # noqa: B023  # called in this turn
            losses: list[Tensor] = model(inputs, targets)  # noqa: B023  # likewise
            return losses

        jacobian = literal_gradients(model(inputs, targets), parameters)
        before = flat(parameters)
        if name == "SAM":
            optimizer.zero_grad()
            optimizer.backward(closure())
        optimizer.step(closure)
        change = flat(parameters) - before
        assert float(change.norm()) > 0
        # Of the base's own change little may be left.
        scale = max(float(change.norm()), 1e-3)
        assert opposed(jacobian, change, scale).max() <= 1e-6
        assert len(changes) == step + 1
        assert_close(changes[-1].slopes, jacobian @ change, rtol=1e-6, atol=1e-9)
    assert len(evaluations) > 8 or name == "Adam"


def test_a_closure_may_reach_more_than_the_backward_before_it() -> None:
    first = nn.Parameter(torch.ones(3, dtype=torch.float64))
    second = nn.Parameter(torch.ones(3, dtype=torch.float64))
    base = SGD([first, second], lr=0.1, momentum=0.9)
    for parameter, value in ((first, -1.0), (second, -5.0)):
        base.state[parameter]["momentum_buffer"] = torch.full_like(parameter, value)
    optimizer = HarmonizedOptimizer(base, plain_sum, project_step=True)
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    before = torch.cat([first.detach().clone(), second.detach().clone()])
    optimizer.backward({"a": first.sum()})
    optimizer.step(lambda: {"a": first.sum(), "b": second.sum() + 0.1 * first.sum()})
    change = torch.cat([first.detach(), second.detach()]) - before
    jacobian = torch.tensor([[1.0] * 3 + [0.0] * 3, [0.1] * 3 + [1.0] * 3]).double()
    assert (jacobian @ change <= 1e-9).all()
    # Not added to the gradient of the call before.
    assert_close(seen[0].gramian[:2, :2], jacobian @ jacobian.T)
    assert_close(seen[0].slopes, jacobian @ change, rtol=1e-7, atol=1e-9)


def test_a_checkpoint_drops_the_gradients_of_before() -> None:
    model, optimizer = adam_on_trunk()
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    optimizer.backward({"old": model(*models.batch(3, 0))[0]})
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.backward({"new": model(*models.batch(3, 1))[0]})
    optimizer.step()
    assert seen[0].names == ("new",)


@pytest.mark.parametrize(
    "base", [partial(SGD, lr=0.5), partial(optim.SparseAdam, lr=0.1)]
)
def test_sparse_gradients_are_projected_on_too(base: Base) -> None:
    table = nn.Embedding(6, 4, sparse=True).double()
    optimizer = HarmonizedOptimizer(
        base(table.parameters()), plain_sum, project_step=True
    )
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(12):
        rows = torch.randint(6, (5,), generator=generator)
        goals = 3 * torch.randn(5, 4, dtype=torch.float64, generator=generator)

        out = table(rows)
        losses = [(out - goals).square().sum(), 3 * (out + goals).square().sum()]
        dense = [
            torch.autograd.grad(loss, table.weight, retain_graph=True)[0].to_dense()
            for loss in losses
        ]
        jacobian = torch.stack([row.reshape(-1) for row in dense])
        before = flat([table.weight])
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        change = flat([table.weight]) - before
        assert opposed(jacobian, change, float(change.norm()) + 1e-9).max() <= 1e-6
        seen += bool((jacobian @ jacobian.sum(0) < 0).any())
    assert seen


@pytest.mark.parametrize(
    ("dtype", "digits"),
    [(torch.float32, 1e-7), (torch.bfloat16, 4e-3), (torch.complex128, 1e-16)],
)
def test_what_the_rounding_of_the_parameters_leaves(
    dtype: torch.dtype, digits: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = nn.Parameter(torch.randn(4, 8, generator=generator).to(dtype))
    goals = [torch.randn(4, 8, generator=generator).to(dtype) for _ in range(3)]
    optimizer = HarmonizedOptimizer(
        SGD([weight], lr=0.3, momentum=0.9), plain_sum, project_step=True
    )
    real = torch.view_as_real if dtype.is_complex else (lambda x: x)
    opposes = 0
    for step in range(30):
        sizes = [1.0, 1.0 + step % 3, 2.0]

        def losses() -> list[Tensor]:
            terms = zip(goals, sizes, strict=True)  # noqa: B023  # called in this turn
            return [size * (weight - goal).abs().square().sum() for goal, size in terms]

        grads = [torch.autograd.grad(loss, weight)[0] for loss in losses()]
        jacobian = torch.stack([real(g).double().reshape(-1) for g in grads])
        before = real(weight.detach()).double().reshape(-1).clone()
        optimizer.zero_grad()
        optimizer.backward(losses())
        optimizer.step()
        after = real(weight.detach()).double().reshape(-1)
        change = after - before
        left = jacobian @ change - 1e-6 * jacobian.norm(dim=1) * change.norm()
        # Half a unit in the last place of each coordinate.
        allowed = digits * (jacobian.abs() @ torch.maximum(after.abs(), before.abs()))
        assert (left <= allowed + 1e-12).all()
        opposes += bool((jacobian @ jacobian.sum(0) < 0).any())
    assert weight.isfinite().all()


def test_momentum_in_another_dtype_is_projected_in_its_own() -> None:
    weight = nn.Parameter(torch.ones(6, dtype=torch.float64))
    base = SGD([weight], lr=0.1, momentum=0.9)
    base.state[weight]["momentum_buffer"] = -torch.ones(6, dtype=torch.float32)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    optimizer.backward([weight.sum(), weight.square().sum()])
    optimizer.step()
    buffer = base.state[weight]["momentum_buffer"]
    assert buffer.dtype is torch.float32
    assert (buffer >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_momentum_wider_than_the_gradients_is_projected_with_all_its_digits(
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(400, generator=generator).to(dtype))
    base = SGD([weight], lr=0.1, momentum=0.9)
    optimizer = HarmonizedOptimizer(base, plain_sum, project_step=True)
    goals = [torch.randn(400, generator=generator).to(dtype) for _ in range(2)]
    optimizer.backward([(weight * goal).sum() for goal in goals])
    # Of unscaled gradients: float16 has no such numbers.
    momentum = -1e-9 * torch.randn(400, generator=generator)
    base.state[weight]["momentum_buffer"] = momentum
    weight.grad = torch.zeros_like(weight)  # what the base adds
    rows = torch.stack(goals).double()
    assert (rows @ momentum.double()).min() < 0
    optimizer.step()
    after = base.state[weight]["momentum_buffer"].double() / 0.9
    assert (rows @ after / rows.norm(dim=1) / after.norm()).min() > -1e-6


def test_a_base_that_keeps_something_else_under_the_name_keeps_it() -> None:
    """AccSGD has parameters there: as an average of gradients these oppose both tasks."""
    ends = []
    for project in (False, True):
        weight = nn.Parameter(torch.ones(4))
        base = AccSGD([weight], lr=0.01)
        optimizer = HarmonizedOptimizer(base, project_step=project)
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.backward([-weight.sum(), -2 * weight.square().sum()])
            optimizer.step()
        ends.append([weight.detach(), base.state[weight]["momentum_buffer"]])
    for free, projected in zip(*ends, strict=True):
        assert projected.equal(free)


def test_parameters_of_any_form_are_projected() -> None:
    """Empty, without a dimension, and spread in memory."""
    memory = torch.ones(6, 4, dtype=torch.float64)
    weights = [
        nn.Parameter(torch.ones(0, 3, dtype=torch.float64)),
        nn.Parameter(torch.tensor(2.0, dtype=torch.float64)),
        nn.Parameter(memory[::2, ::2]),
    ]
    optimizer = HarmonizedOptimizer(SGD(weights, lr=0.1), plain_sum, project_step=True)
    empty, number, spread = weights
    before = flat(weights)
    losses = [
        number + spread.sum() + empty.sum(),
        -3 * number - 2 * spread.sum() + spread[0, 0],
    ]
    jacobian = literal_gradients(losses, weights)
    optimizer.backward(losses)
    optimizer.step()
    change = flat(weights) - before
    assert change.norm() > 0
    assert opposed(jacobian, change, float(change.norm())).max() <= 1e-6
    assert memory[1::2].eq(1).all()  # what lies between belongs to others


def test_a_rate_on_a_device_is_not_read() -> None:
    assert not is_zero(torch.zeros((), device="meta"))
    assert is_zero(torch.zeros(()))
    assert is_zero(0)
    assert not is_zero(1e-9)


def test_a_closure_may_reach_nothing_that_moves() -> None:
    still, moved = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [{"params": [still], "lr": 0.0}, {"params": [moved]}]
    optimizer = HarmonizedOptimizer(SGD(groups, lr=0.1), project_step=True)
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    optimizer.step(lambda: [still.sum(), -still.square().sum()])
    assert still.eq(1).all()
    assert not seen


@pytest.mark.parametrize("how", ["a rate of 0", "no gradient", "frozen"])
def test_what_the_base_leaves_alone_stays(how: str) -> None:
    still, moved = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    rate = 0.0 if how == "a rate of 0" else 0.1
    groups: list[dict[str, Any]] = [
        {"params": [still], "lr": rate},
        {"params": [moved]},
    ]
    base = SGD(groups, lr=0.1)
    optimizer = HarmonizedOptimizer(base, plain_sum, project_step=True)
    optimizer.backward(
        [(still + moved).sum(), -3 * (still + moved).sum() + still[0] - moved[0]]
    )
    if how == "no gradient":
        still.grad = None
    elif how == "frozen":
        still.grad = None
        still.requires_grad_(False)
    optimizer.step()
    assert still.eq(1).all()
    # And the rest is projected by itself: the first task is not set back.
    assert (moved.detach() - 1).sum() <= 1e-6


def test_momentum_in_packed_integers_is_left_alone() -> None:
    weight = nn.Parameter(torch.ones(6))
    base = SGD([weight], lr=0.1)
    packed = torch.full((6,), -100, dtype=torch.int8)
    base.state[weight]["exp_avg"] = packed
    optimizer = HarmonizedOptimizer(base, project_step=True)
    optimizer.backward([weight.sum(), weight.square().sum()])
    optimizer.step()
    assert (packed == -100).all()


def test_parameters_that_no_task_reaches_move_as_the_base_moves_them() -> None:
    model = models.make(models.frozen_and_unused, 3)
    base = optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    frozen = model.trunk[0].bias.clone()  # type: ignore[index]  # Sequential
    for step in range(5):
        usual(model, optimizer, step)
    assert model.trunk[0].bias.equal(frozen)  # type: ignore[index]  # Sequential
    assert model.get_parameter("unused").eq(1).all()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_with_a_graph_do_not_keep_it() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1), project_step=True)

    def passes(loss: Tensor, retain_graph: bool) -> None:  # noqa: ARG001  # given
        loss.backward(create_graph=True)  # type: ignore[no-untyped-call]  # torch's

    optimizer.backward([weight.square().sum(), weight.pow(3).sum()], backward_fn=passes)
    assert weight.grad is not None
    again = weight.grad
    optimizer.backward([weight.square().sum(), weight.pow(3).sum()])
    (second,) = torch.autograd.grad(again.sum(), weight)
    assert_close(second, 2 + 6 * torch.ones(3, dtype=torch.float64))
    optimizer.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_what_is_kept_does_not_hold_a_graph() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = HarmonizedOptimizer(SGD([weight], lr=0.1), project_step=True)

    def one() -> weakref.ref[Tensor]:
        hidden = 2 * weight
        optimizer.backward(
            [hidden.square().sum(), hidden.pow(3).sum()],
            backward_fn=lambda loss, **_: loss.backward(create_graph=True),
        )
        weight.grad = None
        return weakref.ref(hidden)

    hidden = one()
    gc.collect()
    assert hidden() is None


def test_no_layer_is_deferred() -> None:
    layer = nn.Linear(512, 512)
    optimizer = HarmonizedOptimizer(SGD(layer.parameters(), lr=0.1), project_step=True)
    parameters = [*layer.parameters()]
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    out = layer(torch.ones(4, 512))
    losses = [out.square().mean(), (out - 1).abs().mean()]
    jacobian = literal_gradients(losses, parameters).double()
    optimizer.backward(losses)
    optimizer.step()
    # The weight, which would be deferred, is among the gradients that are looked at.
    expected = jacobian @ jacobian.T
    assert_close(seen[0].gramian[:2, :2], expected, rtol=1e-6, atol=0)


# Cost, and what is refused


def test_it_takes_a_copy_for_each_task_and_one_of_the_parameters() -> None:
    tasks, size = 3, 400
    layer = nn.Linear(size, size)
    optimizer = HarmonizedOptimizer(SGD(layer.parameters(), lr=0.1), project_step=True)
    copied = 4 * (size * size + size)

    def backward() -> None:
        out = layer(torch.randn(8, size))
        losses = [out[:, task::tasks].square().mean() for task in range(tasks)]
        optimizer.backward(losses)

    def step() -> None:
        backward()
        optimizer.step()

    held, _ = allocated(backward)
    assert held == pytest.approx((tasks + 1) * copied, rel=0.02)
    optimizer.zero_grad()
    held, peak = allocated(step)
    assert held == pytest.approx(copied, rel=0.02)
    # The parameters before, and the scratch of the products.
    assert peak <= (tasks + 2) * copied + 8 * (tasks + 2) * 2**15


def test_the_order_in_memory_takes_no_more() -> None:
    layer = nn.Conv2d(64, 64, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's
    optimizer = HarmonizedOptimizer(
        SGD(layer.parameters(), lr=0.1), plain_sum, project_step=True
    )
    out = layer(torch.randn(2, 64, 6, 6))
    optimizer.backward([out.square().mean(), -(out - 1).abs().mean()])
    _, peak = allocated(optimizer.step)
    assert peak <= 4 * layer.weight.numel() + 8 * 4 * 2**15


def test_when_off_nothing_is_kept() -> None:
    layer = nn.Linear(400, 400)
    base = SGD(layer.parameters(), lr=0.1)
    optimizer = HarmonizedOptimizer(base, passes="separate")
    out = layer(torch.randn(8, 400))
    losses = [out.square().mean(), (out - 1).abs().mean()]
    held, _ = allocated(lambda: optimizer.backward(losses))
    assert held == pytest.approx(4 * 400 * 401, rel=0.02)


def test_no_value_is_read() -> None:
    with torch.device("meta"):
        model = models.heads_on_a_trunk(3)
        inputs, targets = torch.ones(4, 6), torch.ones(3, 4)
    base = optim.Adam(model.parameters(), foreach=False)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    changes: list[Change] = []
    optimizer.register_change_hook(changes.append)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model(inputs, targets))
        optimizer.step()
    assert changes[-1].cosines.is_meta


def test_checkpoints_hold_nothing_new_and_copies_keep_the_setting() -> None:
    model, optimizer = adam_on_trunk(protect=["0", 2])
    usual(model, optimizer, 0)
    base = optimizer.base_optimizer
    assert optimizer.state_dict().keys() == base.state_dict().keys()
    kinds = {key for of_one in base.state.values() for key in of_one}
    assert kinds == {"step", "exp_avg", "exp_avg_sq"}
    again = pickle.loads(pickle.dumps(optimizer))
    assert again.project_step
    old = optimizer.__getstate__()
    del old["project_step"], old["protect"]  # as in a pickle of version 0.1
    again.__setstate__(old)
    assert again.protect == ("0", "2")
    assert copy.deepcopy(optimizer).protect == ("0", "2")


def test_a_hook_ends_with_its_handle() -> None:
    model, optimizer = adam_on_trunk()
    seen: list[Change] = []
    handle = optimizer.register_change_hook(seen.append)
    usual(model, optimizer, 0)
    handle.remove()
    usual(model, optimizer, 1)
    assert len(seen) == 1


def test_a_hook_sees_the_step_of_a_base_that_is_not_projected() -> None:
    model = models.make(models.heads_on_a_trunk, 3)
    parameters = [*model.parameters()]
    optimizer = HarmonizedOptimizer(optim.AdamW(parameters, lr=0.05))
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    for step in range(10):
        losses = model(*models.batch(3, step))
        jacobian, before = literal_gradients(losses, parameters), flat(parameters)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        change = flat(parameters) - before
        cosines = jacobian @ change / jacobian.norm(dim=1) / change.norm()
        assert_close(seen[-1].cosines, cosines, rtol=1e-9, atol=1e-12)
    assert any((one.slopes > 0).any() for one in seen)


def test_a_step_without_measured_gradients_shows_nothing() -> None:
    model, optimizer = adam_on_trunk()
    seen: list[Change] = []
    optimizer.register_change_hook(seen.append)
    torch.stack(model(*models.batch(3, 0))).sum().backward()  # type: ignore[no-untyped-call]  # torch's
    with pytest.warns(UserWarning, match="backward\\(\\) of this optimizer was never"):
        optimizer.step()
    assert not seen


def test_a_protected_task_that_is_absent_protects_nothing() -> None:
    model, optimizer = adam_on_trunk(weighting=gh, protect=["main"])
    losses = model(*models.batch(3, 0))
    optimizer.backward({"main": losses[0], "side": losses[1]})
    optimizer.step()
    optimizer.zero_grad()
    losses = model(*models.batch(3, 1))
    optimizer.backward({"side": losses[1], "other": losses[2]})
    assert optimizer.last is not None
    assert optimizer.last.weights.tolist() == [1, 1]
    optimizer.step()


@pytest.mark.parametrize("in_closure", [False, True])
def test_a_name_that_is_never_seen_is_an_error_by_the_first_step(
    in_closure: bool,
) -> None:
    model, optimizer = adam_on_trunk(protect=["2", "mian"])
    before = weights_of(model)
    message = r"protect must name tasks, got \['mian'\]: backward\(\) has seen"
    if in_closure:
        with pytest.raises(ValueError, match=message):
            optimizer.step(lambda: model(*models.batch(3, 0)))
    else:
        optimizer.backward(model(*models.batch(3, 0)))
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert_close(weights_of(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"protect": "main"}, TypeError, r"got 'main': pass \('main',\)"),
        ({"protect": 1}, TypeError, r"got 1: pass \(1,\)"),
        (
            {"protect": b"ab"},
            TypeError,
            "protect must be an iterable of names, got b'ab'",
        ),
        ({"protect": [1.0]}, TypeError, "protect must hold names or numbers, got 1.0"),
        ({"protect": [True]}, TypeError, "must hold names or numbers, got True"),
        ({"protect": []}, ValueError, "protect must name a task, got none"),
        (
            {"protect": ["a"], "weighting": plain_sum},
            ValueError,
            "protect must come with weighting=gh or project_step=True",
        ),
        (
            {"project_step": True, "measure_every": 2},
            ValueError,
            "measure_every must be 1 with project_step, got 2",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        HarmonizedOptimizer(SGD(nn.Linear(2, 2).parameters()), **options)


def test_a_step_up_is_refused_before_it_is_made() -> None:
    layer = nn.Linear(2, 1)
    base = SGD(layer.parameters(), lr=0.1, maximize=True, momentum=0.9)
    for p in layer.parameters():
        base.state[p]["momentum_buffer"] = torch.full_like(p, -1)
    optimizer = HarmonizedOptimizer(base, project_step=True)
    out = layer(torch.ones(3, 2))
    optimizer.backward([out.square().mean(), out.abs().mean()])
    before = weights_of(layer)
    with pytest.raises(ValueError, match="maximize must be False with project_step"):
        optimizer.step()
    assert all((value == -1).all() for value in states(base))
    assert_close(weights_of(layer), before, rtol=0, atol=0)
