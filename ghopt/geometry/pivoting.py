"""Projections on a cone for many tasks, all rows at once: for the CPU.

Block principal pivoting (Kim and Park, SIAM J. Sci. Comput. 33, 2011). How many systems
it solves depends on the values, and hardly on how many tasks there are.
"""

import torch
from torch import Tensor

STEPS = 25
"""Of pivoting, at most: some five are usual, up to 17 with a few dependent gradients.

Where many tasks lie in half as many dimensions, exchanges of many at once lead nowhere.
"""

PATIENCE = 3
"""How often a step may do no good: as Kim and Park have it."""

_SLIM = 40  # with more tasks, only the active ones are worth a factorization
_EPS = torch.finfo(torch.float64).eps


class Solver:
    """Solves the systems of the active tasks of each row, factored once."""

    def __init__(self, system: Tensor, active: Tensor) -> None:
        self._places = None
        if len(system) > _SLIM:
            # Each row takes along as many tasks as the longest one, its active ones first.
            most = int(active.sum(1).max())
            self._places = active.byte().argsort(1, descending=True)[:, :most]
            active = active.gather(1, self._places)
            system = system[self._places[:, :, None], self._places[:, None]]
        self._active = active.to(system)
        inside = system * (self._active[:, :, None] * self._active[:, None])
        inside.diagonal(dim1=1, dim2=2).add_(1 - self._active)
        self._factors, _ = torch.linalg.cholesky_ex(inside)

    def __call__(self, right: Tensor) -> Tensor:
        """Solve for the multipliers of the active tasks, ``[R, P]``; 0 for all others."""
        if self._places is None:
            return self._solved(right)
        solved = self._solved(right.gather(1, self._places))
        return torch.zeros_like(right).scatter_(1, self._places, solved)

    def _solved(self, right: Tensor) -> Tensor:
        inside = (right * self._active)[:, :, None]
        return torch.cholesky_solve(inside, self._factors)[:, :, 0]


def pivoted(
    system: Tensor, products: Tensor, own: Tensor, ridge: Tensor, rounds: int
) -> Tensor | None:
    """Multipliers ``[R, P]``, as :func:`ghopt.geometry.cone.cone_multipliers` gives them.

    Args:
        system: inner products of the protected gradients and the ridge, ``[P, P]``,
            positive definite.
        products: of the projected with the protected, ``[R, P]``.
        own: where the two are one and the same, bool ``[R, P]``.
        ridge: on the diagonal of the system, ``[P]``.
        rounds: that take its effect away again, at most.

    Returns:
        None if pivoting did not settle: rounding may be in the way.
    """
    right, others = -products, ~own
    active = (right > 0) & others
    solver, rows = None, torch.zeros_like(products)
    for _ in range(rounds):
        before = rows
        found = _settled(system, right, others, active, solver)
        if found is None:
            return None
        active, solver, rows = found
        # Once rows change by rounding, no round changes more.
        if rounds == 1 or ((rows - before).abs_() <= _EPS * rows).all():
            break
        right = torch.addcmul(-products, rows, ridge)
    return rows


def _settled(
    system: Tensor, right: Tensor, others: Tensor, active: Tensor, solver: Solver | None
) -> tuple[Tensor, Solver, Tensor] | None:
    """Find the active sets, as :mod:`ghopt.geometry.host` does for one row."""
    fewest, patience = [others.shape[1] + 1] * len(others), [PATIENCE] * len(others)
    for _ in range(STEPS):
        solver = solver or Solver(system, active)
        rows = solver(right)
        misplaced = _misplaced(system, right, active, others, rows)
        counts = misplaced.sum(1).tolist()
        if not any(counts):
            return active, solver, rows
        for row, count in enumerate(counts):
            if count < fewest[row]:
                fewest[row], patience[row] = count, PATIENCE
            elif patience[row]:
                patience[row] -= 1
            elif count:
                last = misplaced[row].nonzero()[-1]
                misplaced[row] = False
                misplaced[row, last] = True
        active = active ^ misplaced
        solver = None
    return None


def _misplaced(
    system: Tensor, right: Tensor, active: Tensor, others: Tensor, rows: Tensor
) -> Tensor:
    """Say which tasks are on the wrong side of the active set of a row, ``[R, P]``."""
    slopes = torch.addmm(right, rows, system, alpha=-1)
    noise = rows.sum(1, keepdim=True).add_(1).mul_(4 * _EPS)
    return torch.where(active, rows < 0, slopes > noise) & others
