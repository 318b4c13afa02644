"""How far updates and Gramians are from what they should be."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.bandwidth import stored
from benchmarks.speed.methods import Method
from benchmarks.speed.problems import Problem, make, make_pair
from benchmarks.speed.results import Figure, attempt
from ghopt import Weighting, gh

RATIOS = (1, 10, 100, 1000)
_BLOCK = 2**20


def update_errors(methods: Sequence[Method], network: str) -> list[Figure]:
    """Compare what each method steps on with the same sum of the gradients in float64.

    The gradients of the two tasks are those of float32 passes, and their weights those
    that the method's own rule gives for their Gramian in float64. What is left is the
    arithmetic of the method: Gramian, weights and sum. (A method that runs other passes
    than one per task shows their rounding as well.)
    """
    truth = gradients(make(network, 2))

    def error(method: Method, rule: Weighting) -> float:
        expected = rule(truth @ truth.T) @ truth
        update = _update(method, make(network, 2))
        return float((update - expected).norm() / expected.norm())

    found = []
    for method in methods:
        if method.rule is not None:
            value, why = attempt(partial(error, method, method.rule))
            found.append(Figure("accuracy", 2, method.name, network, value, error=why))
    return found


def direction_errors(methods: Sequence[Method]) -> list[Figure]:
    """Compare updates with the paper's formula (eq. 42), up to a common factor.

    On two gradients with a cosine of -0.5 and norms of several ratios. Methods that
    follow another rule on purpose are left out by the caller.
    """

    def error(method: Method, ratio: float) -> float:
        truth = gradients(make_pair(ratio))
        expected = gh(truth @ truth.T) @ truth
        update = _update(method, make_pair(ratio))
        return float((update / update.norm() - expected / expected.norm()).norm())

    found = []
    for method in methods:
        for ratio in RATIOS:
            value, why = attempt(partial(error, method, ratio))
            case = str(ratio)
            found.append(Figure("exactness", 2, method.name, case, value, error=why))
    return found


def gramian_errors(sizes: Sequence[int]) -> list[Figure]:
    """Compare Gramians of two float32 gradients with products taken in float64."""
    found = []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(2, size, generator=generator)
        rows[1] -= 0.5 * rows[0]
        expected = _gramian(rows)
        norms = expected.diagonal().sqrt()
        for name, multiply in _GRAMIANS.items():
            errors = (multiply(rows).double() - expected) / norms / norms[:, None]
            value = float(errors.abs().max())
            found.append(Figure("gramian", 2, name, f"{size:.0e}", value))
    return found


def gradients(problem: Problem) -> Tensor:
    """Take the gradients of all tasks, ``[K, N]``, float64, from float32 passes."""
    rows = [
        torch.autograd.grad(loss, problem.parameters, retain_graph=True)
        for loss in problem.losses()
    ]
    return torch.stack([_flat(row) for row in rows])


def _update(method: Method, problem: Problem) -> Tensor:
    """Take one step and see what it stepped on, ``[N]``, float64."""
    torch.manual_seed(0)  # some draw the order of the tasks
    method.start(problem)()
    return _flat([p.grad for p in problem.parameters if p.grad is not None])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors])


def _gramian(rows: Tensor) -> Tensor:
    blocks = torch.split(rows, _BLOCK, dim=1)
    products = [block.double() @ block.double().T for block in blocks]
    return torch.stack(products).sum(0)


def _dots(rows: Tensor) -> Tensor:
    return torch.stack([torch.stack([a.dot(b) for b in rows]) for a in rows])


_GRAMIANS: dict[str, Callable[[Tensor], Tensor]] = {
    "ghopt": lambda rows: stored([[row] for row in rows]).gramian(),
    "torch.dot": _dots,
    "matrix product": lambda rows: rows @ rows.T,
}
