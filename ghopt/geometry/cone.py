"""Projections on the dual cone of several gradients: the solver behind GH."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ghopt.geometry import pivoting
from ghopt.geometry.matrices import identity, nobody_watches

_MOST_ENUMERATED = 8  # 2**8 systems of 8 x 8 take under a millisecond

# Of the cosines: the ridge under systems of nearly dependent gradients, and how often
# its effect is taken away again. See cone_multipliers.
RIDGE = 1e-8
ROUNDS = 8

# Nothing is left, after all rounds, of directions with eigenvalues above this: where it
# is known that there are no others, one round without a ridge gives the same.
RESOLVED = 1e-6


def cone_multipliers(system: Tensor, products: Tensor, own: Tensor) -> Tensor:
    """Multipliers ``[R, P]`` of the projections of R gradients on the cone of P others.

    Row ``i`` minimises ``|g_i + row @ J|`` over rows that are nowhere negative. Where
    gradients are nearly dependent that has huge solutions, or many. So each round
    minimises ``|g_i + row @ J|^2 + RIDGE |row - last|^2`` instead, for unit gradients,
    with the row of the round before, from zero (proximal point method, Rockafellar
    1976). This has one solution, which no order of the tasks changes. What the rounds
    leave of a direction with eigenvalue ``s`` is ``(1 + s / RIDGE) ** -ROUNDS``: less
    than eps / s, about, from s = 1e-7 on, and nearly all where rounding made the direction.

    The bounds: the squared moves of a row add up to at most ``1 / RIDGE`` and get no
    longer, so the last is at most ``1 / sqrt(RIDGE ROUNDS)`` and all together
    ``sqrt(ROUNDS / RIDGE)``; and the row opposes a task by ``RIDGE`` times its last
    move.

    Args:
        system: inner products of the protected gradients, ``[P, P]``.
        products: of the projected with the protected, ``[R, P]``.
        own: where the two are one and the same, bool ``[R, P]``.
    """
    ridge = RIDGE * system.diagonal()
    if _may_read(system):
        found = _by_pivoting(system, products, own, ridge)
        if found is not None:
            return found
    few = len(system) <= _MOST_ENUMERATED
    # No tracer of branches sees what dynamo follows by itself.
    if torch.compiler.is_dynamo_compiling() and not few:  # pragma: no branch
        # A graph of all steps would take minutes to compile.
        eager: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compiler.disable(
            cone_multipliers
        )  # type: ignore[no-untyped-call]  # torch's
        return eager(system, products, own)
    system = system + ridge.diag()
    solve = (_enumerated if few else _lawson_hanson)(system, own)
    right = -products
    rows = solve(right)
    for _ in range(ROUNDS - 1):
        rows = solve(torch.addcmul(right, rows, ridge))
    return rows


def _may_read(system: Tensor) -> bool:
    """Say whether values may decide what runs; a gradient follows the tensors that do."""
    return nobody_watches(system.detach())


def _by_pivoting(
    system: Tensor, products: Tensor, own: Tensor, ridge: Tensor
) -> Tensor | None:
    """Do so on the CPU; None where exchanges of many tasks at once lead nowhere."""
    lowest = _bound_of_lowest(system)
    if lowest <= RESOLVED:
        lowest = torch.linalg.eigvalsh(system)[0].item()
    if lowest > RESOLVED:
        return pivoting.pivoted(system, products, own, torch.zeros_like(ridge), 1)
    if lowest > -RIDGE / 4:  # the ridge is twice that at least
        return pivoting.pivoted(system + ridge.diag(), products, own, ridge, ROUNDS)
    return None


def _bound_of_lowest(system: Tensor) -> float:
    """Bound the lowest eigenvalue from below, in less time than it takes to find it.

    All others have a mean below ``trace / rest``, and so has their product.
    """
    factor, stopped = torch.linalg.cholesky_ex(system)
    if stopped:
        return 0.0
    rest, trace = len(system) - 1, system.trace().item()
    # As a sum: a product of a thousand could overflow.
    logs = 2 * sum(map(math.log, factor.diagonal().tolist()))
    return math.exp(logs + rest * math.log(rest / trace))


def _enumerated(system: Tensor, own: Tensor) -> Callable[[Tensor], Tensor]:
    """Minimise ``row @ system @ row / 2 - right @ row`` over rows without a negative.

    By trying all active sets, for few tasks. Each of the 2**P sets gives one candidate,
    which solves the problem iff it is not negative and no slope outside of the set leads
    down. The least violation wins, so that rounding cannot leave a task without a winner.

    What tries fewer sets asks for values, or is not exact: any order of exchanges has
    Gramians that take it through nearly all of them (Murty 1978), so that a fixed number
    of exchanges would need this as its way out all the same. A row need not try the half
    of the sets that hold its own task, but that is another half for each row, and the
    systems are shared. To invert them, once for all rounds, would leave residuals as large
    as the violations that decide, where gradients are nearly dependent.

    Args:
        system: shape ``[P, P]``, positive definite.
        own: where a row is the gradient of a task, bool ``[R, P]``.

    Returns:
        From the right sides of all rows, ``[R, P]``, to the rows.
    """
    count, tasks = own.shape
    numbers = torch.arange(tasks, dtype=torch.int64, device=system.device)
    subsets = torch.arange(2**tasks, dtype=torch.int64, device=system.device)
    active = (subsets[:, None] >> numbers & 1).bool()  # [2**P, P], the empty set first
    # A task is never in its own set: its projection has a positive product with it.
    barred = (active[:, None] & own).any(2)  # [2**P, R]
    wall = torch.zeros_like(barred, dtype=system.dtype).masked_fill_(barred, torch.inf)
    places = torch.arange(count, dtype=torch.int64, device=system.device)
    factors = _factors(system, active)
    # With multipliers turned round, all that is negative here is wrong when positive.
    turned = active.to(system).neg_()  # [2**P, P]
    every = system.expand(len(subsets), tasks, tasks)

    def solve(right: Tensor) -> Tensor:
        inside = right.mT * turned[:, :, None]
        rows: Tensor = torch.linalg.lu_solve(*factors, inside).mT  # [2**P, R, P]
        falls = torch.baddbmm(right, rows, every)  # the slopes, downward
        wrong = torch.maximum(falls, rows)
        # In the set no slope may be left, up or down.
        violation = torch.maximum(wrong, falls * turned[:, None]).amax(2)
        # The first of equals wins, so the empty set where nothing conflicts.
        best = (violation + wall).argmin(0)
        return rows[best, places].neg().clamp(min=0)

    return solve


def _lawson_hanson(system: Tensor, own: Tensor) -> Callable[[Tensor], Tensor]:
    """Do the same as :func:`_enumerated` by Lawson and Hanson's method, rows at once.

    Each step solves for the multipliers of every row's active set. Where some are
    negative, the row goes toward the solution until the first reaches zero and releases
    that task; elsewhere it takes the solution and adds the task that it conflicts with
    most. "Solving Least Squares Problems" (1974), chapter 23. The next call starts where
    the last one ended, so that few steps do.
    """
    eps = torch.finfo(system.dtype).eps
    may_read = _may_read(system)
    solver = _solver_for(system, may_read)
    rows = system.new_zeros(own.shape)
    active = torch.zeros_like(own)
    steps = 3 * len(system)  # as many as SciPy's NNLS takes

    def solve(right: Tensor) -> Tensor:
        nonlocal rows, active, steps
        for _ in range(steps):
            target = solver(active)(right)
            good = target >= 0  # outside of the set it is zero
            free = good.all(1, keepdim=True)
            # Where all is good any finite number above 1 will do: of infinity the
            # derivative, multiplied by zero, would be NaN.
            reach = rows.masked_fill(good, 2) / (rows - target).masked_fill(good, 1)
            step = reach.amin(1, keepdim=True)
            rows = target.where(free, rows + step * (target - rows))
            conflicts = (right - rows @ system).masked_fill(active | own, -torch.inf)
            conflict, task = conflicts.max(1, keepdim=True)
            # Less than this is noise, which grows with the multipliers.
            noise = 4 * eps * (1 + rows.sum(1, keepdim=True))
            entered = active.scatter(
                1, task, (conflict > noise) | active.gather(1, task)
            )
            before, active = active, entered.where(free, active & (reach > step))
            rows = rows.where(active, 0)
            # Where to ask is free: all further steps would repeat this one.
            if may_read and before.equal(active):
                break
        steps = 4 + len(system) // 4
        return rows

    return solve


def _solver_for(
    system: Tensor, may_read: bool
) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    """Give what makes, of active sets ``[R, P]``, what solves for their multipliers."""
    if may_read and not torch.linalg.cholesky_ex(system).info:
        return partial(pivoting.Solver, system)

    def make(active: Tensor) -> Callable[[Tensor], Tensor]:
        factors = _factors(system, active)
        return lambda right: torch.linalg.lu_solve(
            *factors, right.where(active, 0)[:, :, None]
        )[:, :, 0]

    return make


def _factors(system: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Factor the systems ``[B, K, K]`` of the active tasks of each row of ``[B, K]``."""
    inside = active[:, :, None] & active[:, None]
    # The _ex functions do not wait for the device to report singular systems.
    systems = system.where(inside, identity(system))
    factors, pivots, _ = torch.linalg.lu_factor_ex(systems)
    return factors, pivots
