"""The paper's formulas on the gradient vectors: slow, literal, and no fast path's kin.

A Jacobian here is a float64 tensor, shape ``[K, N]``, row ``i`` the gradient of task
``i``; its entries are taken as exact numbers. Results come from exact fractions, or
from 50 digits where a root or an angle is needed, so that the oracle is never the weak
side of a comparison; only :func:`nnls_projections` is content with float64. Nothing but
:func:`gramian` knows what a Gramian is.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any, TypeAlias

import mpmath
import numpy
import scipy.optimize
import torch
from torch import Tensor

Real: TypeAlias = Any  # an mpmath number: mpmath has no types
Vector: TypeAlias = list[Real]
Exact: TypeAlias = list[Fraction]

mp = mpmath.mp.clone()
mp.dps = 50
NOTHING = mp.mpf(10) ** -25  # below it, what 50 digits leave of an exact zero


# Vectors


def vectors(jacobian: Tensor) -> list[Vector]:
    """Return the rows, entry by entry exact."""
    rows: list[list[float]] = jacobian.double().tolist()
    return [[mp.mpf(entry) for entry in row] for row in rows]


def fractions(jacobian: Tensor) -> list[Exact]:
    """Return the rows as exact fractions."""
    rows: list[list[float]] = jacobian.double().tolist()
    return [[Fraction(entry) for entry in row] for row in rows]


def dot(a: Sequence[Any], b: Sequence[Any]) -> Any:
    """Return the inner product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> Real:
    """Return the length."""
    return mp.sqrt(dot(a, a))


def combine(weights: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the weighted sum of the rows."""
    return [dot(weights, column) for column in zip(*rows, strict=True)]


def angle(a: Vector, b: Vector) -> Real:
    """Return the angle between two vectors in radians (50 digits: acos will do)."""
    cosine = dot(a, b) / (norm(a) * norm(b))
    return mp.acos(max(-1, min(1, cosine)))


def gramian(jacobian: Tensor) -> Tensor:
    """Return the inner products of the rows, each correctly rounded, float64."""
    rows = fractions(jacobian)
    products = [[float(dot(a, b)) for b in rows] for a in rows]
    return torch.tensor(products, dtype=torch.float64)


def harmonized(coefficients: Tensor, jacobian: Tensor) -> list[Vector]:
    """Return ``coefficients @ jacobian`` with no rounding of its own."""
    rows = vectors(jacobian)
    return [combine(row, rows) for row in vectors(coefficients)]


def error(actual: Vector, expected: Vector, scale: Vector) -> float:
    """Return the length of the difference, in lengths of ``scale``."""
    difference = norm([a - b for a, b in zip(actual, expected, strict=True)])
    return float(difference / norm(scale)) if difference else 0.0


# Gradient Harmonization


def theorem_1(jacobian: Tensor) -> list[Vector]:
    """Return the two harmonized gradients of lemmas 1 and 2."""
    g1, g2 = vectors(jacobian)
    if dot(g1, g2) >= 0:
        return [g1, g2]
    first = [a - dot(g1, g2) / dot(g2, g2) * b for a, b in zip(g1, g2, strict=True)]
    second = [b - dot(g1, g2) / dot(g1, g1) * a for a, b in zip(g1, g2, strict=True)]
    return [first, second]


def dual_cone_projections(jacobian: Tensor) -> list[Vector]:
    """Return each gradient's nearest point that opposes no gradient, exactly.

    The nearest point is the gradient plus a combination, with weights of no negative
    sign, of linearly independent gradients to which it is orthogonal. Try them all.
    """
    rows = fractions(jacobian)
    nearest = [_projection(gradient, rows) for gradient in rows]
    return [[mp.mpf(x.numerator) / x.denominator for x in row] for row in nearest]


def cone_projections(
    jacobian: Tensor, rows: Sequence[int], protected: Sequence[int]
) -> list[Vector]:
    """Return the nearest point of each of the rows that opposes none of the protected."""
    every = fractions(jacobian)
    cone = [every[number] for number in protected]
    nearest = [_projection(every[number], cone) for number in rows]
    return [[mp.mpf(x.numerator) / x.denominator for x in row] for row in nearest]


def nnls_projections(jacobian: Tensor) -> list[Vector]:
    """Return the same as SciPy finds it, in float64, for more tasks than can be tried.

    A projection is the gradient plus the non-negative combination of all gradients
    that comes nearest to its opposite.
    """
    rows = jacobian.double().numpy()
    lengths = numpy.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / numpy.where(lengths > 0, lengths, 1)
    weights = numpy.stack([scipy.optimize.nnls(unit.T, -row)[0] for row in unit])
    return vectors(torch.from_numpy(lengths * (unit + weights @ unit)))


def _projection(gradient: Exact, rows: list[Exact]) -> Exact:
    for candidate in _candidates(gradient, rows):
        if all(dot(candidate, row) >= 0 for row in rows):
            return candidate
    raise AssertionError("a projection on a convex cone exists")


def _candidates(gradient: Exact, rows: list[Exact]) -> Iterator[Exact]:
    for size in range(len(rows) + 1):
        for active in combinations(rows, size):
            products = [[dot(a, b) for b in active] for a in active]
            weights = _solve(products, [-dot(a, gradient) for a in active])
            if weights is not None and all(weight >= 0 for weight in weights):
                yield combine([1, *weights], [gradient, *active])


def _solve(matrix: list[Exact], right: Exact) -> Exact | None:
    """Solve by Gauss and Jordan; None if the matrix is singular."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next((r for r in range(i, len(rows)) if rows[r][i]), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(len(rows)):
            if r != i and rows[r][i]:
                factor = rows[r][i]
                rows[r] = [
                    x - factor * y for x, y in zip(rows[r], rows[i], strict=True)
                ]
    return [row[-1] for row in rows]


def pcgrad(jacobian: Tensor, *, sequential: bool = True) -> Vector:
    """Return the sum of the gradients after PCGrad (Yu et al., 2020, algorithm 1).

    Tasks are visited in the order of the rows. Not ``sequential``: every projection
    starts from the original gradient (lemma 1 pair by pair), and its parts add up.
    """
    rows = vectors(jacobian)
    total = [mp.mpf(0)] * len(rows[0])
    for i, gradient in enumerate(rows):
        changed = gradient
        for other in rows[:i] + rows[i + 1 :]:
            measured = changed if sequential else gradient
            weight = min(0, dot(measured, other)) / dot(other, other)
            changed = combine([1, -weight], [changed, other])
        total = combine([1, 1], [total, changed])
    return total


# GH++


def excess(jacobian: Tensor) -> Real:
    """Return the angle beyond the right one, phi."""
    g1, g2 = vectors(jacobian)
    return max(mp.mpf(0), angle(g1, g2) - mp.pi / 2)


def rotations(jacobian: Tensor, lam: float) -> list[Vector]:
    """Return both gradients turned toward each other in their plane (fig. 7b)."""
    g1, g2 = vectors(jacobian)
    phi = excess(jacobian)
    return [_turned(g1, g2, lam * phi), _turned(g2, g1, (1 - mp.mpf(lam)) * phi)]


def _turned(gradient: Vector, toward: Vector, radians: Real) -> Vector:
    along = dot(toward, gradient) / dot(gradient, gradient)
    across = combine([1, -along], [toward, gradient])
    sideways = mp.sin(radians) * norm(gradient) / norm(across)
    return combine([mp.cos(radians), sideways], [gradient, across])


def eq_43(jacobian: Tensor, lam: float) -> list[float]:
    """Return tau as it is printed (the second line is tau 2: a misprint)."""
    phi = excess(jacobian)
    tau1 = 1 + 2 * mp.sin(lam * phi / 2)
    tau2 = 1 + 2 * mp.sin((mp.mpf(lam) - 1) * phi / 2)
    return [float(tau1), float(tau2)]


def clipped_cosines(jacobian: Tensor) -> Real:
    """Return the cosines that GH++ aims at for any number of tasks, shape [K, K]."""
    frame = _frame(jacobian)
    clipped = (frame.T * frame).apply(lambda cosine: max(cosine, mp.mpf(0)))
    smallest = min(mp.mpf(0), *mp.eigsy(clipped, eigvals_only=True))
    shift = -smallest / (1 - smallest)
    return (1 - shift) * clipped + shift * mp.eye(len(jacobian))


def moved_frame(jacobian: Tensor) -> list[Vector]:
    """Return the gradients turned as one frame to their clipped cosines.

    In parameter space, not task space: of all maps that give the frame U the inner
    products P, the one that moves it least is (U P U^T)^(1/2) (U U^T)^+.
    """
    frame = _frame(jacobian)
    root = _function(frame * clipped_cosines(jacobian) * frame.T, mp.sqrt)
    inverse = _function(frame * frame.T, lambda value: 1 / value)
    moved = root * inverse * frame
    rows = vectors(jacobian)
    return [
        [norm(row) * moved[n, task] for n in range(len(row))]
        for task, row in enumerate(rows)
    ]


def least_movement(jacobian: Tensor) -> float:
    """Return the least sum of squares by which a frame gets its clipped cosines.

    Procrustes: |U - Q P^(1/2)|^2 over all orthogonal Q, where |U|^2 and |P| are K each.
    """
    root = _function(clipped_cosines(jacobian), mp.sqrt)
    overlap = mp.svd_r(_frame(jacobian) * root, compute_uv=False)
    return float(2 * (len(jacobian) - sum(overlap)))


def span(jacobian: Tensor) -> float:
    """Return the smallest eigenvalue, not zero, of the cosines of any of the tasks.

    A measure of difficulty, not a result, so float64 will do: zero is below 4e-15.
    """
    rows = [row for row in jacobian.double().numpy() if row.any()]
    unit = numpy.array([row / numpy.linalg.norm(row) for row in rows])
    least = 1.0
    for size in range(2, len(rows) + 1):
        some = unit[list(combinations(range(len(rows)), size))]
        values = numpy.linalg.eigvalsh(some @ some.swapaxes(1, 2))
        least = min(least, float(values.min(initial=1.0, where=values > 4e-15)))
    return least


def aimed_span(jacobian: Tensor) -> float:
    """Return the smallest eigenvalue, not zero, of the cosines that GH++ aims at."""
    values = mp.eigsy(clipped_cosines(jacobian), eigvals_only=True)
    return float(min(value for value in values if value > NOTHING))


def _frame(jacobian: Tensor) -> Real:
    """Return the unit gradients as columns; a zero one gets a dimension of its own."""
    rows = vectors(jacobian)
    own = [[mp.mpf(i == j and not any(row)) for j in range(len(rows))]
           for i, row in enumerate(rows)]  # fmt: skip
    lengthened = [[*row, *extra] for row, extra in zip(rows, own, strict=True)]
    return mp.matrix([[x / norm(row) for x in row] for row in lengthened]).T


def _function(matrix: Real, function: Any) -> Real:
    """Apply a function to the eigenvalues of a symmetric matrix that are not zero."""
    values, basis = mp.eigsy(matrix)
    image = [function(value) if value > NOTHING else mp.mpf(0) for value in values]
    return basis * mp.diag(image) * basis.T
