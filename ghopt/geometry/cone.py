"""Projections on the dual cone: the solver behind GH with more than two tasks."""

from collections.abc import Callable

import torch
from torch import Tensor

from ghopt.geometry.matrices import identity

_MOST_ENUMERATED = 8  # 2**8 systems of 8 x 8 take under a millisecond

# Of the cosines: the ridge under systems of nearly dependent gradients, and how often
# its effect is taken away again. See cone_multipliers.
_RIDGE = 1e-8
_ROUNDS = 8


def cone_multipliers(matrix: Tensor) -> Tensor:
    """Multipliers ``[K, K]`` of the projections on the dual cone.

    Row ``i`` minimises ``|g_i + row @ J|`` over rows that are nowhere negative. Where
    gradients are nearly dependent that has huge solutions, or many. So each round
    minimises ``|g_i + row @ J|^2 + _RIDGE |row - last|^2`` instead, for unit gradients,
    with the row of the round before, from zero (proximal point method, Rockafellar
    1976). This has one solution, which no order of the tasks changes. What the rounds
    leave of a direction with eigenvalue ``s`` is ``(1 + s / _RIDGE) ** -_ROUNDS``: less
    than eps / s, about, from s = 1e-7 on, and nearly all where rounding made the direction.

    The bounds: the squared moves of a row add up to at most ``1 / _RIDGE`` and get no
    longer, so the last is at most ``1 / sqrt(_RIDGE _ROUNDS)`` and all together
    ``sqrt(_ROUNDS / _RIDGE)``; and the row opposes a task by ``_RIDGE`` times its last
    move.
    """
    ridge = _RIDGE * matrix.diagonal()
    system = matrix + ridge.diag()
    solve = (
        _enumerated(system)
        if len(matrix) <= _MOST_ENUMERATED
        else _lawson_hanson(system)
    )
    rows = torch.zeros_like(matrix)
    for _ in range(_ROUNDS):
        before, rows = rows, solve(rows * ridge - matrix)
        # On the CPU to ask is free. Once rows change by rounding, no round changes more.
        if matrix.device.type == "cpu" and _is_close(before, rows):
            break
    return rows


def _is_close(before: Tensor, after: Tensor) -> bool:
    eps = torch.finfo(after.dtype).eps
    return bool(((after - before).abs() <= eps * after).all())


def _enumerated(system: Tensor) -> Callable[[Tensor], Tensor]:
    """Minimise ``row @ system @ row / 2 - right @ row`` over rows without a negative.

    By trying all active sets, for few tasks. Each of the 2**K sets gives one candidate,
    which solves the problem iff it is not negative and no slope outside of the set leads
    down. The least violation wins, so that rounding cannot leave a task without a winner.

    Args:
        system: shape ``[K, K]``, positive definite.

    Returns:
        From the right sides of all rows, ``[K, K]``, to the rows.
    """
    tasks = torch.arange(len(system), dtype=torch.int64, device=system.device)
    subsets = torch.arange(2 ** len(system), dtype=torch.int64, device=system.device)
    active = (subsets[:, None] >> tasks & 1).bool()  # [2**K, K], the empty set first
    factors = _factors(system, active)

    def solve(right: Tensor) -> Tensor:
        inside = right.mT.where(active[:, :, None], 0)
        rows: Tensor = torch.linalg.lu_solve(*factors, inside).mT  # [2**K, K, K]
        slopes = rows @ system - right
        slopes = slopes.abs().where(active[:, None], -slopes)
        violation = torch.maximum(slopes, -rows).amax(2).clamp(min=0)
        # A task is never in its own set: its projection has a positive product with it.
        # The first of equals wins, so the empty set where nothing conflicts.
        best = violation.where(~active, torch.inf).argmin(0)
        return rows[best, tasks].clamp(min=0)

    return solve


def _lawson_hanson(system: Tensor) -> Callable[[Tensor], Tensor]:
    """Do the same as :func:`_enumerated` by Lawson and Hanson's method, rows at once.

    Each step solves for the multipliers of every row's active set. Where some are not
    positive, the row goes toward the solution until the first reaches zero and releases
    that task; elsewhere it takes the solution and adds the task that it conflicts with
    most. "Solving Least Squares Problems" (1974), chapter 23. The next call starts where
    the last one ended, so that few steps do.
    """
    info = torch.finfo(system.dtype)
    own = identity(system) > 0
    rows = torch.zeros_like(system)
    active = torch.zeros_like(own)
    steps = 3 * len(system)  # as many as SciPy's NNLS takes

    def solve(right: Tensor) -> Tensor:
        nonlocal rows, active, steps
        for _ in range(steps):
            target = torch.linalg.lu_solve(
                *_factors(system, active), right.where(active, 0)[:, :, None]
            )[:, :, 0]
            blocked = active & (target <= 0)
            free = ~blocked.any(1, keepdim=True)
            reach = rows / (rows - target).clamp(min=info.tiny)
            reach = reach.where(blocked, torch.inf)
            step = reach.amin(1, keepdim=True)
            rows = target.where(free, rows + step * (target - rows))
            conflicts = (right - rows @ system).masked_fill(active | own, -torch.inf)
            conflict, task = conflicts.max(1, keepdim=True)
            # Less than this is noise, which grows with the multipliers.
            noise = 4 * info.eps * (1 + rows.sum(1, keepdim=True))
            entered = active.scatter(
                1, task, (conflict > noise) | active.gather(1, task)
            )
            before, active = active, entered.where(free, active & (reach > step))
            rows = rows.where(active, 0)
            # Where to ask is free: all further steps would repeat this one.
            if system.device.type == "cpu" and torch.equal(before, active):
                break
        steps = 4 + len(system) // 4
        return rows

    return solve


def _factors(system: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Factor the systems ``[B, K, K]`` of the active tasks of each row of ``[B, K]``."""
    inside = active[:, :, None] & active[:, None]
    outside = torch.diag_embed((~active).to(system))
    # The _ex functions do not wait for the device to report singular systems.
    factors, pivots, _ = torch.linalg.lu_factor_ex(system.where(inside, 0) + outside)
    return factors, pivots
