"""One training step of each method: ``ghopt``, what bounds it, and its peers.

Every step clears the gradients, runs the forward pass, and leaves in ``.grad`` what it
has stepped on. The loops of people who published no package are written anew here, from
a description of what they do.
"""

import random
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor
from torch.optim import AdamW

from benchmarks.speed.problems import Problem
from ghopt import (
    HarmonizedOptimizer,
    Recorder,
    Weighting,
    gh,
    ghpp,
    ghpp_balanced,
    ghpp_printed,
)
from ghopt.extras import from_extra
from ghopt.harmonize import Passes

TASKS = (1, 2, 4, 8, 32)
PAIRS = (1, 2)

Step = Callable[[], None]


@dataclass(frozen=True)
class Method:
    """One way to step on the gradients of several tasks.

    Attributes:
        name: for the tables.
        note: what it does, and what it does differently.
        start: makes the step of a problem.
        rule: the weights of two tasks from their Gramian, in float64; None where the
            method has no such weights.
        tasks: numbers of tasks for which the method is defined.
        is_gh: of two tasks it is meant to give the paper's GH, or a multiple.
        cycle: number of steps after which it does the same again.
        needs: packages that it imports.
    """

    name: str
    note: str
    start: Callable[[Problem], Step]
    rule: Weighting | None = None
    tasks: Collection[int] = TASKS
    is_gh: bool = False
    cycle: int = 1
    needs: tuple[str, ...] = ()


def base(problem: Problem) -> AdamW:
    """Make the leanest optimizer, beside which all else looks as dear as it can.

    Its rate is so low that the problem stays what it was.
    """
    return AdamW(problem.parameters, lr=1e-6, fused=True)


def _plain(problem: Problem) -> Step:
    optimizer = base(problem)

    def step() -> None:
        optimizer.zero_grad()
        _backward(reduce(add, problem.losses()))
        optimizer.step()

    return step


def _floor(problem: Problem) -> Step:
    optimizer = base(problem)

    def step() -> None:
        optimizer.zero_grad()
        *losses, last = problem.losses()
        for loss in losses:
            _backward(loss, retain_graph=True)
        _backward(last)
        optimizer.step()

    return step


def _ghopt(
    problem: Problem,
    weighting: Weighting = gh,
    *,
    measure_every: int = 1,
    passes: Passes = "auto",
    recorded: bool = False,
    project_step: bool = False,
) -> Step:
    optimizer = HarmonizedOptimizer(
        base(problem),
        weighting,
        measure_every=measure_every,
        passes=passes,
        project_step=project_step,
    )
    if recorded:
        Recorder().attach(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(problem.losses())
        optimizer.step()

    return step


def _bare(problem: Problem) -> Step:
    optimizer, parameters = base(problem), problem.parameters

    def gradients(loss: Tensor, *, retain_graph: bool) -> list[Tensor]:
        _backward(loss, retain_graph=retain_graph)
        grads = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        return grads

    def step() -> None:
        optimizer.zero_grad()
        *losses, last = problem.losses()
        rows = [gradients(loss, retain_graph=True) for loss in losses]
        rows.append(gradients(last, retain_graph=False))
        flat = torch.cat([grad.flatten() for row in rows for grad in row])
        wide = flat.view(len(rows), -1).double()
        weight, *weights = gh(wide @ wide.T).tolist()
        total, *others = rows
        torch._foreach_mul_(total, weight)
        for row, other in zip(others, weights, strict=True):
            torch._foreach_add_(total, row, alpha=other)
        for parameter, grad in zip(parameters, total, strict=True):
            parameter.grad = grad
        optimizer.step()

    return step


def _features(problem: Problem) -> Step:
    optimizer = HarmonizedOptimizer(base(problem))

    def step() -> None:
        optimizer.zero_grad()
        losses, features = problem.with_features()
        optimizer.backward(losses, features=features)
        optimizer.step()

    return step


def _paper(problem: Problem) -> Step:
    optimizer = base(problem)

    def gradient(loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        _backward(loss, retain_graph=True)
        grads = [p.grad for p in problem.parameters if p.grad is not None]
        return torch.cat([grad.reshape(-1) for grad in grads])

    def step() -> None:
        one, other = problem.losses()
        first, second = gradient(one), gradient(other)
        product = torch.dot(first, second)
        if product < 0:
            one = (1 - product / first.norm() ** 2) * one
            other = (1 - product / second.norm() ** 2) * other
        optimizer.zero_grad()
        _backward(one + other, retain_graph=True)
        optimizer.step()

    return step


def _pcgrad(problem: Problem) -> Step:
    optimizer = base(problem)
    parameters = problem.parameters

    def gradient(loss: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        _backward(loss, retain_graph=True)
        grads, reached = [], []
        for parameter in parameters:
            grad = parameter.grad
            here = torch.zeros_like if grad is None else torch.ones_like
            reached.append(here(parameter).flatten())
            grads.append((reached[-1] if grad is None else grad.clone()).flatten())
        return torch.cat(grads), torch.cat(reached)

    def project(gradients: list[Tensor], masks: list[Tensor]) -> Tensor:
        shared = torch.stack(masks).prod(0).bool()
        projected, others = deepcopy(gradients), gradients
        for changed in projected:
            random.shuffle(others)
            for other in others:
                product = torch.dot(changed, other)
                if product < 0:
                    changed -= product * other / other.norm() ** 2
        merged = torch.zeros_like(gradients[0])
        merged[shared] = torch.stack([g[shared] for g in projected]).mean(0)
        merged[~shared] = torch.stack([g[~shared] for g in projected]).sum(0)
        return merged

    def step() -> None:
        pairs = [gradient(loss) for loss in problem.losses()]
        with torch.no_grad():
            merged = project([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        _write(parameters, merged)
        optimizer.step()

    return step


def _autojac(
    problem: Problem, rule: str, chunk: int | None = 1, *, lean: bool = True
) -> Step:
    with from_extra("peers"):
        from torchjd import aggregation
        from torchjd.autojac import backward, jac_to_grad

    optimizer, parameters = base(problem), problem.parameters
    aggregator = getattr(aggregation, rule)()

    def step() -> None:
        optimizer.zero_grad()
        backward(problem.losses(), inputs=parameters, parallel_chunk_size=chunk)
        jac_to_grad(parameters, aggregator, optimize_gramian_computation=lean)
        optimizer.step()

    return step


def _autogram(problem: Problem, rule: str) -> Step:
    with from_extra("peers"):
        from torchjd.autogram import Engine

    optimizer, weighting = base(problem), torchjd_weighting(rule)
    engine = Engine(problem.model, batch_dim=None)

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.stack(problem.losses())
        weights = weighting(engine.compute_gramian(losses))
        _backward(losses, weights)
        optimizer.step()

    return step


def torchjd_weighting(rule: str) -> Weighting:
    """Make a weighting of TorchJD's: the mean is its default."""
    with from_extra("peers"):
        from torchjd import aggregation

    weighting: Weighting = getattr(aggregation, f"{rule}Weighting")()
    return weighting


def _torchjd_rule(gramian: Tensor, rule: str) -> Tensor:
    return torchjd_weighting(rule)(gramian)


def _pytorch_optimizer(problem: Problem) -> Step:
    with from_extra("peers"):
        from pytorch_optimizer import PCGrad

    optimizer = PCGrad(base(problem), reduction="sum")

    def step() -> None:
        optimizer.zero_grad()
        optimizer.pc_backward(problem.losses())  # type: ignore[arg-type]  # says Module
        optimizer.step()

    return step


def _conflictfree(problem: Problem, operator: str) -> Step:
    with from_extra("peers"):
        from conflictfree import grad_operator
        from conflictfree.utils import apply_gradient_vector, get_gradient_vector

    optimizer = base(problem)
    combine = getattr(grad_operator, operator)()

    def step() -> None:
        gradients = []
        *losses, last = problem.losses()
        for loss in (*losses, last):
            optimizer.zero_grad()
            _backward(loss, retain_graph=loss is not last)
            gradients.append(get_gradient_vector(problem.model))
        apply_gradient_vector(problem.model, combine.calculate_gradient(gradients))
        optimizer.step()

    return step


def _backward(
    loss: Tensor, weights: Tensor | None = None, *, retain_graph: bool = False
) -> None:
    loss.backward(weights, retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's


def _write(parameters: list[torch.nn.Parameter], vector: Tensor) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, torch.split(vector, sizes), strict=True):
        parameter.grad = part.view_as(parameter).clone()


def _sum(gramian: Tensor) -> Tensor:
    return torch.ones_like(gramian[0])


def _mean_of_gh(gramian: Tensor) -> Tensor:
    return gh(gramian) / len(gramian)


UPGRAD_NEEDS = ("torchjd", "quadprog")

_UPGRAD = partial(_torchjd_rule, rule="UPGrad")
_JD_PCGRAD = partial(_torchjd_rule, rule="PCGrad")

PLAIN = Method("plain", "the losses summed, one backward pass", _plain, _sum)
FLOOR = Method(
    "floor", "K backward passes that add up in .grad, nothing on top", _floor, _sum
)
AUTO = Method(
    "ghopt gh",
    "exact projection, any K",
    _ghopt,
    gh,
    is_gh=True,
)
SEPARATE = Method(
    "ghopt gh, separate",
    'the same with passes="separate": a pass for each task, and nothing else',
    partial(_ghopt, passes="separate"),
    gh,
    is_gh=True,
)

METHODS = (
    PLAIN,
    FLOOR,
    AUTO,
    SEPARATE,
    Method(
        "bare loop, gh",
        "the arithmetic of ghopt gh in a loop for this network alone, nothing checked: "
        "what is left to gain",
        _bare,
        gh,
        is_gh=True,
    ),
    Method(
        "ghopt gh, every 4th",
        "the same with measure_every=4: the mean of a step that measures and of three "
        "with a single pass; its accuracy is that of the former",
        partial(_ghopt, measure_every=4),
        gh,
        is_gh=True,
        cycle=4,
    ),
    Method(
        "ghopt gh, features",
        "another and weaker promise: conflicts are measured and removed at the last hidden "
        "representation, in one pass; no task is opposed there, on the parameters many may "
        "be",
        _features,
    ),
    Method(
        "ghopt gh, recorded",
        "the same with a Recorder attached",
        partial(_ghopt, recorded=True),
        gh,
        is_gh=True,
    ),
    Method(
        "ghopt gh, projected",
        "the same with project_step=True: neither momentum nor step opposes a task",
        partial(_ghopt, project_step=True),
        gh,
        is_gh=True,
    ),
    Method("ghopt ghpp", "rotation, any K", partial(_ghopt, weighting=ghpp), ghpp),
    Method(
        "ghopt ghpp_balanced",
        "rotation that opposes no task; at most two tasks",
        partial(_ghopt, weighting=ghpp_balanced),
        ghpp_balanced,
        PAIRS,
    ),
    Method(
        "ghopt ghpp_printed",
        "GH++ as printed; at most two tasks",
        partial(_ghopt, weighting=ghpp_printed),
        ghpp_printed,
        PAIRS,
    ),
    Method(
        "paper, three passes",
        "the authors' GH, written anew: both gradients concatenated, float32 products, "
        "read on the host, then a third pass through the weighted sum; two tasks only",
        _paper,
        gh,
        (2,),
        is_gh=True,
    ),
    Method(
        "Pytorch-PCGrad",
        "the loop of WeiChengTseng/Pytorch-PCGrad, written anew: the MEAN of PCGrad, in "
        "random order; reads K^2 products on the host",
        _pcgrad,
        _mean_of_gh,
        is_gh=True,
    ),
    Method(
        "autojac UPGrad",
        "TorchJD, chunk size 1, Gramian summed over the parameters: a MEAN, and "
        "regularised, hence inexact where norms differ",
        partial(_autojac, rule="UPGrad"),
        _UPGRAD,
        is_gh=True,
        needs=UPGRAD_NEEDS,
    ),
    Method(
        "autojac UPGrad cat",
        "the same with the Jacobian concatenated, TorchJD's default",
        partial(_autojac, rule="UPGrad", lean=False),
        _UPGRAD,
        is_gh=True,
        needs=UPGRAD_NEEDS,
    ),
    Method(
        "autojac UPGrad vmap",
        "the same as the first, with all tasks in one vmapped pass, TorchJD's default",
        partial(_autojac, rule="UPGrad", chunk=None),
        _UPGRAD,
        is_gh=True,
        needs=UPGRAD_NEEDS,
    ),
    Method(
        "autojac PCGrad",
        "TorchJD, chunk size 1: the sum of PCGrad, in random order",
        partial(_autojac, rule="PCGrad"),
        _JD_PCGRAD,
        is_gh=True,
        needs=("torchjd",),
    ),
    Method(
        "autogram UPGrad",
        "TorchJD's Gramian engine: no gradient is kept, K + 1 passes, float32; UPGrad as "
        "above",
        partial(_autogram, rule="UPGrad"),
        _UPGRAD,
        is_gh=True,
        needs=UPGRAD_NEEDS,
    ),
    Method(
        "autogram PCGrad",
        "the same engine; the sum of PCGrad, in random order",
        partial(_autogram, rule="PCGrad"),
        _JD_PCGRAD,
        is_gh=True,
        needs=("torchjd",),
    ),
    Method(
        "pytorch_optimizer",
        "its PCGrad with the sum, in random order",
        _pytorch_optimizer,
        gh,
        is_gh=True,
        needs=("pytorch_optimizer",),
    ),
    Method(
        "conflictfree PCGrad",
        "its PCGradOperator: the sum, in the order given",
        partial(_conflictfree, operator="PCGradOperator"),
        gh,
        is_gh=True,
        needs=("conflictfree",),
    ),
    Method(
        "conflictfree ConFIG",
        "another rule: equal cosines to all tasks",
        partial(_conflictfree, operator="ConFIGOperator"),
        needs=("conflictfree",),
    ),
)
