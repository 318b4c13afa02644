"""Rules for few tasks in plain floats: for the CPU, where a value is read for free.

A call of torch takes some microseconds, as long as fifty multiplications here.
"""

import math
import sys
from collections.abc import Sequence
from operator import mul, sub
from typing import TypeAlias

from ghopt.geometry.cone import RESOLVED, RIDGE, ROUNDS
from ghopt.geometry.matrices import determinant
from ghopt.geometry.pivoting import PATIENCE, STEPS

Rows: TypeAlias = list[list[float]]
"""A small matrix."""

_EPS = math.ulp(1.0)


def cone_coefficients(
    gramian: Rows, moved: Sequence[int], kept: Sequence[int]
) -> Rows | None:
    """Coefficients ``[R, K]`` of the projections of some vectors on the cone of others.

    As :func:`ghopt.geometry.cone.cone_multipliers` says, by block principal pivoting
    (Kim and Park, SIAM J. Sci. Comput. 33, 2011), row by row.

    Args:
        gramian: of K vectors.
        moved: numbers of the R vectors.
        kept: numbers of those that must not be opposed.

    Returns:
        None where pivoting does not settle, in ``STEPS``: another method must do it then.
    """
    if not is_finite(gramian):
        return [[math.nan] * len(gramian) for _ in moved]
    if min(map(min, gramian)) >= 0:
        return [[float(i == j) for j in range(len(gramian))] for i in moved]
    matrix, scale = rescaled(gramian)
    inside = [[matrix[j][k] for k in kept] for j in kept]
    rounds = 1 if not kept or _is_well_conditioned(inside) else ROUNDS
    ridge = [RIDGE * matrix[j][j] if rounds > 1 else 0.0 for j in range(len(matrix))]
    system = [row.copy() for row in matrix]
    for j, value in enumerate(ridge):
        system[j][j] += value
    coefficients = []
    for i in moved:
        # A task is never in its own set: its projection has a positive product with it.
        others = [j for j in kept if j != i]
        multipliers = _multipliers(system, ridge, matrix[i], others, rounds)
        if multipliers is None:
            return None
        here = scale[i]
        row = [
            value * there / here
            for value, there in zip(multipliers, scale, strict=True)
        ]
        row[i] = 1.0
        coefficients.append(row)
    return coefficients


def gh_of_few(gramian: Rows) -> Rows:
    """Coefficients of GH for at most two tasks: eq. 29 as it stands."""
    if not is_finite(gramian):
        return [[math.nan] * len(gramian) for _ in gramian]
    # At least this, to spare 0 / 0.
    squares = [max(row[task], sys.float_info.min) for task, row in enumerate(gramian)]
    return [
        [
            1.0 if i == j else max(0.0, -product) / squares[j]
            for j, product in enumerate(row)
        ]
        for i, row in enumerate(gramian)
    ]


def rescaled(gramian: Rows) -> tuple[Rows, list[float]]:
    """Do the same as :func:`ghopt.geometry.matrices.rescaled`, but for what is not finite."""
    scale = []
    for j, row in enumerate(gramian):
        exponent = math.frexp(row[j])[1]
        scale.append(2.0 ** -(exponent // 2))
    matrix = [
        [value * here * there for value, there in zip(row, scale, strict=True)]
        for row, here in zip(gramian, scale, strict=True)
    ]
    for j in range(len(matrix)):
        if not matrix[j][j] > 0:
            for i in range(len(matrix)):
                matrix[i][j] = matrix[j][i] = float(i == j)
            scale[j] = 1.0
    return matrix, scale


def rotation(gramian: Rows, lam: float | None, resolution: float) -> Rows:
    """Do the same as :func:`ghopt.geometry.frames.rotation`, from the Gramian as it is.

    Args:
        gramian: of two vectors.
        lam: share of the turn that the first takes; None: the balanced one.
        resolution: sine below which the two count as opposite.
    """
    if not is_finite(gramian):
        return [[math.nan] * 2] * 2
    ((square, product), (_, other)), scale = rescaled(gramian)
    if product >= 0:
        return [[1.0, 0.0], [0.0, 1.0]]
    norms = math.sqrt(square), math.sqrt(other)
    ratio = norms[0] / norms[1] * (scale[1] / scale[0])
    if lam is None:
        lam = math.atan2(norms[0] / scale[0], norms[1] / scale[1]) * (2 / math.pi)
    across = math.sqrt(max(0.0, determinant(square, product, other)))
    sine = across / (norms[0] * norms[1])
    is_opposite = sine <= resolution
    excess = math.atan2(-product, 0.0 if is_opposite else across)
    first, second = lam * excess, (1 - lam) * excess
    if is_opposite:
        return [[math.cos(first), 0.0], [0.0, math.cos(second)]]
    return [
        [math.cos(second) / sine, ratio * math.sin(first) / sine],
        [math.sin(second) / ratio / sine, math.cos(first) / sine],
    ]


def is_finite(gramian: Rows) -> bool:
    """Say whether no entry is infinite or NaN, and neither is their sum."""
    return math.isfinite(sum(map(sum, gramian)))


def _is_well_conditioned(matrix: Rows) -> bool:
    """Say whether all eigenvalues are surely above what the rounds resolve."""
    factor = _factored(matrix, list(range(len(matrix))))
    if factor is None:
        return False
    rest = len(matrix) - 1
    trace = sum(row[j] for j, row in enumerate(matrix))
    # All but the least have a mean below trace / rest, and so has their product.
    lowest = math.prod(row[-1] ** -2 for row in factor) * (rest / trace) ** rest
    return lowest > RESOLVED


def _multipliers(
    system: Rows,
    ridge: list[float],
    products: list[float],
    others: list[int],
    rounds: int,
) -> list[float] | None:
    """Multipliers ``[K]`` of one projection."""
    right = [-value for value in products]
    active = [j for j in others if right[j] > 0]
    if not active:
        return [0.0] * len(right)
    factor, row = None, [0.0] * len(right)
    for _ in range(rounds):
        before = row
        found = _pivoted(system, right, active, others, factor)
        if found is None:
            return None
        active, factor, row = found
        # Once a row changes by rounding, no round changes more.
        moves = map(sub, row, before)
        if all(abs(move) <= _EPS * new for move, new in zip(moves, row, strict=True)):
            break
        for j in others:
            right[j] = ridge[j] * row[j] - products[j]
    return row


def _pivoted(
    system: Rows,
    right: list[float],
    active: list[int],
    others: list[int],
    factor: Rows | None,
) -> tuple[list[int], Rows, list[float]] | None:
    """Find the active set: multipliers there are positive, slopes elsewhere lead up.

    All tasks that are on the wrong side change it together. Where that has not left fewer
    of them than ever before, four times in a row, the last alone does, until it has:
    this ends in any case (Murty 1974), if not always in ``STEPS``: None then.

    Args:
        system: of all tasks.
        right: side of it.
        active: set to begin with.
        others: tasks that may be in it.
        factor: of the system of ``active``, if known.
    """
    fewest, patience = len(others) + 1, PATIENCE
    for _ in range(STEPS):
        factor = factor or _factored(system, active)
        if factor is None:
            break
        row = _solved(factor, active, right)
        misplaced = _misplaced(system, right, active, others, row)
        if not misplaced:
            return active, factor, row
        if len(misplaced) < fewest:
            fewest, patience = len(misplaced), PATIENCE
        elif patience:
            patience -= 1
        else:
            misplaced = misplaced[-1:]
        active = [j for j in others if (j in active) != (j in misplaced)]
        factor = None
    return None


def _misplaced(
    system: Rows,
    right: list[float],
    active: list[int],
    others: list[int],
    row: list[float],
) -> list[int]:
    """List the tasks that are on the wrong side of an active set."""
    noise = 4 * _EPS * (1 + sum(row))  # grows with the multipliers
    return [
        j
        for j in others
        if (
            row[j] < 0
            if j in active
            else right[j] - sum(map(mul, system[j], row)) > noise
        )
    ]


def _factored(system: Rows, active: list[int]) -> Rows | None:
    """Factor the system of some tasks (Cholesky), each diagonal entry inverted."""
    factor: Rows = []
    for j in active:
        line = system[j]
        row: list[float] = []
        rest = line[j]
        for k, above in zip(active, factor, strict=False):
            value = (line[k] - sum(map(mul, row, above))) * above[-1]
            row.append(value)
            rest -= value * value
        if not rest > 0:
            return None
        row.append(1 / math.sqrt(rest))
        factor.append(row)
    return factor


def _solved(factor: Rows, active: list[int], right: list[float]) -> list[float]:
    """Solve for the multipliers of the active tasks, ``[K]``; 0 for all others."""
    solved: list[float] = []
    for j, line in zip(active, factor, strict=True):
        solved.append((right[j] - sum(map(mul, solved, line))) * line[-1])
    row = [0.0] * len(right)
    for k in reversed(range(len(active))):
        line = factor[k]
        row[active[k]] = value = solved[k] * line[-1]
        for j in range(k):
            solved[j] -= line[j] * value
    return row
