"""Gramian and weighted row of a matrix, against sums of single products in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ghopt.gradients.matrix import gramian_of, multiply_small, weighted_row

WIDTHS = [0, 1, 7, 2**14, 2**14 + 1, 40_000]
DTYPES = [torch.float32, torch.float64]


def draw(tasks: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tasks + width)
    return torch.randn(tasks, width, dtype=torch.float64, generator=generator).to(dtype)


def exact(one: Tensor, other: Tensor) -> float:
    """Take an inner product with a single rounding at its end."""
    pairs = zip(one.double().tolist(), other.double().tolist(), strict=True)
    return math.fsum(a * b for a, b in pairs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_the_gramian_has_the_digits_of_float64(
    tasks: int, width: int, dtype: torch.dtype
) -> None:
    matrix = draw(tasks, width, dtype)
    found = gramian_of([matrix], tasks)
    expected = [[exact(one, other) for other in matrix] for one in matrix]
    assert found.dtype is torch.float64
    wanted = torch.tensor(expected, dtype=torch.float64)
    # In whatever order a processor adds up, each term is rounded once at most.
    bound = (1 + width) * 2**-53 * (1 + max(map(max, expected)))
    assert_close(found, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("tasks", [2, 5, 8])
def test_the_gramian_is_symmetric_to_the_last_bit(tasks: int) -> None:
    found = gramian_of([draw(tasks, 40_000, torch.float32)], tasks)
    assert found.equal(found.T)


@pytest.mark.parametrize(
    "widths", [(3, 1), (40_000, 2, 5_000, 7), (0,), (2**11, 2**11 + 1)]
)
def test_the_gramian_of_several_matrices_is_that_of_their_columns_side_by_side(
    widths: tuple[int, ...],
) -> None:
    matrices = [
        (place + 1) * draw(3, width, torch.float32)
        for place, width in enumerate(widths)
    ]
    found = gramian_of(matrices, 3)
    expected = gramian_of([torch.cat(matrices, dim=1)], 3)
    assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_the_gramian_of_no_matrix_is_zero() -> None:
    found = gramian_of([], 2)
    assert found.equal(torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("wide", [False, True])
def test_the_row_is_the_weighted_sum(
    wide: bool, width: int, dtype: torch.dtype
) -> None:
    matrix, weights = (
        draw(3, width, dtype),
        torch.tensor([1.5, -2.0, 0.1], dtype=torch.float64),
    )
    found = weighted_row(matrix, weights, wide=wide)
    expected = sum(w * row.double() for w, row in zip(weights, matrix, strict=True))
    assert found.dtype is dtype
    eps = torch.finfo(dtype).eps
    assert_close(found.double(), expected, rtol=0, atol=40 * eps)


def test_a_wide_sum_of_rows_that_cancel_is_rounded_once() -> None:
    first = draw(1, 40_000, torch.float32)
    matrix = torch.cat([first, first * (1 + 2**-20)])
    weights = torch.tensor([1.0, -1.0 / (1 + 2**-19)], dtype=torch.float64)
    expected = weights[0] * matrix[0].double() + weights[1] * matrix[1].double()
    assert weighted_row(matrix, weights, wide=True).equal(expected.float())
    assert not weighted_row(matrix, weights, wide=False).equal(expected.float())


@pytest.mark.parametrize("wide", [False, True])
def test_the_row_has_memory_of_its_own(wide: bool) -> None:
    matrix = draw(1, 7, torch.float32)
    row = weighted_row(matrix, torch.ones(1, dtype=torch.float64), wide=wide)
    assert row.equal(matrix[0])
    row.zero_()
    assert matrix.abs().min() > 0


# Which tasks reach each of some parameters, and how many elements it has: several packs.
REACHED = [
    ((0, 1, 2), 9_000),
    ((0, 1, 2), 9_000),
    ((1,), 5),
    ((0, 2), 16_384),
    ((0, 2), 3),
    ((2,), 1),
    ((0, 1), 7),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_small_gradients_that_not_all_tasks_reach_count_as_zero_there(
    last: bool, dtype: torch.dtype
) -> None:
    rows = torch.zeros(3, 40_000, dtype=torch.float64)
    parameters, end = [], 0
    for tasks, size in REACHED:
        drawn = draw(3, size, dtype)
        parameters.append({task: drawn[task].view(1, -1) for task in tasks})
        for task in tasks:
            rows[task, end : end + size] = drawn[task].double()
        end += size
    found = multiply_small(parameters, 3, last=last)
    expected = rows @ rows.T
    if last:
        found, expected = found[:, -1], expected[:, -1]
    assert_close(found, expected, rtol=0, atol=1e-9)


def test_small_gradients_of_two_dtypes_are_multiplied_apart() -> None:
    other = {task: torch.ones(2) for task in (0, 1)}
    pair = {task: torch.full((2,), 1 + 2**-40, dtype=torch.float64) for task in (0, 1)}
    found = multiply_small([other, pair], 2, last=False)
    assert found[0, 1] == 2 + 2 * (1 + 2**-40) ** 2
