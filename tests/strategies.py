"""Hypothesis strategies for the gradients of tasks.

A Jacobian is a float64 tensor, shape ``[K, N]``, whose entries the oracle takes as
exact. Half of the draws lie at the singular ends: uniform draws seldom come near them.
"""

import math
from fractions import Fraction
from operator import mul

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import reference

Jacobians = st.SearchStrategy[Tensor]

SPAN = 1e-7
"""Eigenvalue of the cosines from which on directions are resolved, and results exact."""

# For tests with many parameters or many tasks: half of the profile's examples.
fewer_examples = settings(max_examples=settings().max_examples // 2)


def powers_of_ten(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of every size between two powers of ten."""
    return st.floats(low, high).map(lambda exponent: float(10**exponent))


lams = st.sampled_from([0.5, 0.0, 1.0]) | st.floats(0, 1)
sizes = st.floats(1e-3, 1e3)
norms = (
    st.tuples(sizes, sizes)
    | st.sampled_from([(1.0, 1.0), (1.0, 1 + 1e-6), (1e-3, 1e3), (1e3, 1e-3)])
    | sizes.map(lambda size: (size, size))
)
# The norms above, times these, stay within 1e-25 .. 1e18.
scales = st.sampled_from([1.0, 1e-22, 1e15]) | powers_of_ten(-22, 15)

# Gaps are angles in radians left between a gradient and the opposite of the other one.
nearly_opposite = powers_of_ten(-3, -1)
barely_conflicting = powers_of_ten(-12, -1).map(lambda less: math.pi / 2 - less)
conflicting = nearly_opposite | barely_conflicting | st.floats(1e-3, math.pi / 2)
# Closer than 1e-3 the Gramian's own rounding begins to show in GH++ ...
too_close = powers_of_ten(-5.6, -3)
# ... and up to 1e-6 gradients count as opposite (margin for the Gramian's rounding).
opposite = st.just(0.0) | powers_of_ten(-20, -6.1)
agreeing = st.sampled_from([math.pi, 2.0]) | st.floats(math.pi / 2 + 1e-9, math.pi)


def pairs(gaps: st.SearchStrategy[float]) -> Jacobians:
    """Two gradients in a plane with a gap from ``gaps``, shape ``[2, 2]``.

    Two gradients span a plane and the Gramian ignores rotations, so gradients in the
    plane, the first along an axis, lose no generality and shrink to readable numbers.
    """
    return st.builds(_pair, norms, gaps, scales)


def _pair(norms: tuple[float, float], gap: float, scale: float) -> Tensor:
    first, second = norms
    # sin(pi) is not zero in floating point, and at a gap of 0 or pi it must be.
    sine = math.sin(gap) if gap < math.pi else 0.0
    rows = [[first, 0.0], [-second * math.cos(gap), second * sine]]
    return torch.tensor(rows, dtype=torch.float64) * scale


def exact_pairs() -> Jacobians:
    """Conflicting gradients whose Gramian float64 holds exactly, ``[2, 2 or 3]``.

    The second is a multiple of the opposite of the first plus a little, of any size;
    the gap is at least 1e-3.
    """
    return _short_pairs().filter(_conflict_with_a_gap)


def _conflict_with_a_gap(jacobian: Tensor) -> bool:
    first, second = jacobian / jacobian.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return bool(first @ second < 0 and (first + second).norm() >= 1e-3)


@st.composite
def _short_pairs(draw: st.DrawFn) -> Tensor:
    dims = draw(st.integers(2, 3))
    # Of a few digits, for a readable example; of twenty bits, whose inner products
    # float64 still holds but not the products of those, as a determinant needs them.
    few = st.integers(1, 12).flatmap(lambda bits: _integers(2**bits, dims))
    twenty = st.lists(st.integers(2**19, 2**20), min_size=dims, max_size=dims)
    first = draw(few | twenty)
    little = max(map(abs, first)) // 2 ** draw(st.integers(0, 8))
    beside = draw(_integers(max(1, little), dims))
    times = draw(st.integers(0, 4))
    second = [b - times * a for a, b in zip(first, beside, strict=True)]
    exponents = draw(st.tuples(st.integers(-10, 10), st.integers(-60, 40)))
    rows = torch.tensor([first, second], dtype=torch.float64)
    rows[1] *= 2.0 ** exponents[0]
    return rows * 2.0 ** exponents[1]


def _integers(bound: int, dims: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(-bound, bound), min_size=dims, max_size=dims)


# What becomes of row i: a times another row plus b times itself.
FLAWS = {
    "zero": (0, 0),
    "duplicate": (1, 0),
    "opposite": (-1, 0),
    "large and opposite": (-(2**8), 0),
    "nearly opposite": (-1, 2**-10),
    "nearly parallel": (1, 2**-10),
    "large": (0, 2**8),
    "small": (0, 2**-8),
}


def jacobians(least: int = 1, most: int = 5) -> Jacobians:
    """Small integers with up to two flaws, shape ``[K, N]``; N may be less than K.

    Dependent or not, but neither nearly (see ``nearly_dependent``): a small part of a
    gradient is 2^-10 of it at most.
    """
    return _flawed_integers(least, most).filter(
        lambda rows: reference.span(rows) > SPAN
    )


@st.composite
def _flawed_integers(draw: st.DrawFn, least: int, most: int) -> Tensor:
    tasks = draw(st.integers(least, most))
    dims = draw(st.integers(1, most + 1))
    rows = [draw(_integers(3, dims)) for _ in range(tasks)]
    originals = torch.tensor(rows, dtype=torch.float64)
    row = st.integers(0, tasks - 1)
    flaw = st.tuples(row, row, st.sampled_from(sorted(FLAWS)))
    jacobian = originals.clone()
    # Of the originals: nearly opposite to nearly parallel would be 2^-20 off.
    for i, other, name in draw(st.lists(flaw, max_size=2)):
        a, b = FLAWS[name]
        jacobian[i] = a * originals[other] + b * originals[i]
    return jacobian


def independent(least: int, most: int) -> Jacobians:
    """Linearly independent gradients, and not nearly dependent, shape ``[K, K]``.

    Rows of a triangular matrix lose no generality: any others are these, rotated.
    """
    return _triangular(least, most).filter(lambda rows: reference.span(rows) > SPAN)


@st.composite
def _triangular(draw: st.DrawFn, least: int, most: int) -> Tensor:
    tasks = draw(st.integers(least, most))
    own = st.sampled_from([1.0, 2.0, 3.0, 2.0**-4, 2.0**-7])
    below = [draw(_integers(3, i)) for i in range(tasks)]
    rows = [[*row, draw(own), *[0.0] * (tasks - i - 1)] for i, row in enumerate(below)]
    return torch.tensor(rows, dtype=torch.float64)


def agreeing_tasks(least: int = 1, most: int = 12) -> Jacobians:
    """Gradients of no negative entry, so that none conflict; zeros and duplicates."""
    return _flawed_integers(least, most).map(torch.abs)


@st.composite
def mirrored(draw: st.DrawFn, originals: Jacobians) -> tuple[Tensor, Tensor]:
    """A Jacobian, and the same in a mirror of parameter space and some times larger.

    Mirrors generate all orthogonal maps. That of an integer vector v, times v @ v,
    keeps integers integers: nothing is rounded, nor in the Gramian after it, which would
    be another problem where the gradients are nearly opposite.
    """
    jacobian = draw(originals)
    dims = jacobian.shape[1]
    nonzero = _integers(3, dims).filter(any)
    normal = torch.tensor(draw(nonzero), dtype=torch.float64)
    mirror = (normal @ normal) * torch.eye(dims) - 2 * torch.outer(normal, normal)
    mirrored = jacobian @ mirror
    assume(_has_an_exact_gramian(mirrored))
    return jacobian, mirrored


def _has_an_exact_gramian(jacobian: Tensor) -> bool:
    rows = [[Fraction(value) for value in row] for row in jacobian.tolist()]
    exact = [[sum(map(mul, one, other)) for other in rows] for one in rows]
    return (jacobian @ jacobian.T).tolist() == exact


def permutations(tasks: int) -> st.SearchStrategy[list[int]]:
    """Orders of so many tasks."""
    return st.permutations(range(tasks))


def many_tasks(tasks: int, dims: int) -> Jacobians:
    """Gradients at random, shape ``[tasks, dims]``; linearly independent in practice.

    Hypothesis would spend its time on hundreds of numbers one by one.
    """
    return st.integers(0, 10**6).map(lambda seed: _random(seed, tasks, dims))


def _random(seed: int, tasks: int, dims: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, dims, generator=generator, dtype=torch.float64)


@st.composite
def nearly_dependent(draw: st.DrawFn, tasks: int) -> Tensor:
    """Small integers in few dimensions, plus a little of anything, [tasks, tasks]."""
    dims = draw(st.integers(1, tasks - 1))
    rows = torch.zeros(tasks, tasks, dtype=torch.float64)
    for row in rows:
        row[:dims] = torch.tensor(draw(_integers(2, dims)), dtype=torch.float64)
    little = draw(st.sampled_from([0.0, 1e-3, 1e-6, 1e-9, 1e-12, 1e-16]))
    return rows + little * draw(many_tasks(tasks, tasks))
