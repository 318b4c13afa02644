"""The dual cone of some tasks: what protecting them means, and projecting one vector.

Each test is named after a sentence of the design or a promise of a docstring.
"""

from collections.abc import Callable

import numpy as np
import pytest
import quadprog
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from ghopt import dual_cone, gh, gh_coefficients, plain_sum
from tests import reference
from tests.networks import flat, network_gradients, seeds, widths
from tests.reference import combine, dot, error, gramian, harmonized, vectors
from tests.strategies import fewer_examples, independent, jacobians, many_tasks
from tests.versions import needs

pytestmark = pytest.mark.usefixtures("place")

EPS = torch.finfo(torch.float64).eps


@st.composite
def chosen(draw: st.DrawFn, count: int) -> tuple[list[int], list[int]]:
    """Draw which vectors are projected, and on which."""
    numbers = list(range(count))
    rows = draw(st.permutations(numbers))[: draw(st.integers(1, count))]
    protected = draw(st.permutations(numbers))[: draw(st.integers(0, count))]
    return rows, protected


@given(jacobians(), st.data())
def test_each_row_is_the_nearest_vector_that_opposes_no_protected_one(
    jacobian: Tensor, data: st.DataObject
) -> None:
    rows, protected = data.draw(chosen(len(jacobian)))
    actual = harmonized(dual_cone(gramian(jacobian), rows, protected), jacobian)
    expected = reference.cone_projections(jacobian, rows, protected)
    tolerance = 8 * len(jacobian) * EPS / reference.span(jacobian)
    for number, found, wanted in zip(rows, actual, expected, strict=True):
        gradient = vectors(jacobian)[number]
        if any(gradient):
            assert error(found, wanted, gradient) <= tolerance
        else:
            assert not any(found)


@given(independent(1, 5), st.data())
def test_the_conditions_of_karush_kuhn_and_tucker_hold(
    jacobian: Tensor, data: st.DataObject
) -> None:
    rows, protected = data.draw(chosen(len(jacobian)))
    coefficients = dual_cone(gramian(jacobian), rows, protected)
    exact = vectors(jacobian)
    tolerance = 64 * len(jacobian) * EPS / reference.span(jacobian)
    for number, row in zip(rows, coefficients.tolist(), strict=True):
        others = {j: value for j, value in enumerate(row) if j != number}
        assert row[number] == 1
        # Dual feasible, and nothing is added but protected gradients.
        assert all(value >= 0 for value in others.values())
        assert all(not value or j in protected for j, value in others.items())
        projection = combine(row, exact)
        for j in protected:
            scale = reference.norm(exact[number]) * reference.norm(exact[j])
            slope = dot(projection, exact[j])
            assert slope >= -tolerance * scale  # primal feasible
            if j != number and row[j] > 0:
                assert abs(slope) <= tolerance * scale  # complementary


@given(jacobians() | many_tasks(12, 14))
@fewer_examples
def test_all_rows_on_all_tasks_are_gh(jacobian: Tensor) -> None:
    products = gramian(jacobian)
    every = list(range(len(jacobian)))
    assert dual_cone(products).equal(gh_coefficients(products))
    assert_close(dual_cone(products, every, every), gh_coefficients(products))
    assert dual_cone(products).sum(0).equal(gh(products))


def gem(gradient: np.ndarray, memories: np.ndarray) -> np.ndarray:
    """Project as GEM does: its dual problem (eq. 11), by a solver of its own."""
    products = memories @ memories.T
    ridge = 1e-12 * np.trace(products) * np.eye(len(products))
    linear = memories @ gradient
    unit, zeros = np.eye(len(products)), np.zeros(len(products))
    solved = quadprog.solve_qp(products + ridge, -linear, unit, zeros)
    return memories.T @ solved[0] + gradient  # type: ignore[no-any-return]  # numpy's


@given(st.integers(1, 5), st.integers(0, 2**31))
def test_one_row_is_gem(tasks: int, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(tasks + 1, 8, dtype=torch.float64, generator=drawn)
    memories = list(range(tasks))
    (row,) = dual_cone(gramian(jacobian), [tasks], memories)
    expected = gem(jacobian[tasks].numpy(), jacobian[:tasks].numpy())
    assert_close(row @ jacobian, torch.from_numpy(expected), rtol=1e-7, atol=1e-7)


@given(jacobians())
def test_one_row_on_one_task_is_a_gem(jacobian: Tensor) -> None:
    if len(jacobian) < 2:
        return
    (row,) = harmonized(dual_cone(gramian(jacobian), [1], [0]), jacobian)
    memory, gradient = vectors(jacobian)[:2]
    slope, square = dot(gradient, memory), dot(memory, memory)
    factor = slope / square if slope < 0 else 0
    expected = [g - factor * m for g, m in zip(gradient, memory, strict=True)]
    if any(gradient):
        assert error(row, expected, gradient) <= 1e-12


@given(jacobians(), st.data())
@fewer_examples
def test_protected_tasks_are_bent_by_one_another_only(
    jacobian: Tensor, data: st.DataObject
) -> None:
    count = len(jacobian)
    protected = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    coefficients = gh_coefficients(gramian(jacobian), protected)
    among = coefficients[protected][:, protected]
    assert_close(among, gh_coefficients(gramian(jacobian[protected])))
    others = [number for number in range(count) if number not in protected]
    unit = torch.eye(count, dtype=torch.float64)
    assert coefficients[:, others].equal(unit[:, others])


@given(st.integers(1, 6), widths, seeds, st.data())
@fewer_examples
def test_the_update_opposes_no_protected_task(
    tasks: int, width: int, seed: int, data: st.DataObject
) -> None:
    """With gradients as float32 networks make them, equal or opposite but for rounding."""
    rows = flat(network_gradients(tasks, width, seed))
    protected = sorted(data.draw(st.sets(st.integers(0, tasks - 1), min_size=1)))
    weights = gh(rows @ rows.T, protected)
    assert weights.isfinite().all()
    slopes = rows[protected] @ (weights @ rows)
    # Each row opposes a task by at most 3.6e-5 of its length: see gh_coefficients.
    allowed = 3.6e-5 * rows.norm(dim=1).sum() * rows[protected].norm(dim=1)
    assert (slopes >= -allowed).all()


def test_nothing_protected_is_the_plain_sum() -> None:
    products = torch.tensor([[1.0, -1.0], [-1.0, 4.0]])
    assert gh(products, []).equal(plain_sum(products))
    assert plain_sum(products).equal(torch.ones(2))
    assert plain_sum(products.double()).dtype is torch.float64


@given(st.integers(0, 2**31), st.sampled_from([1e-12, 1e-3, 1e6]))
def test_the_length_of_what_is_projected_does_not_matter(
    seed: int, length: float
) -> None:
    """A step is a thousandth of a gradient, and momentum may be a hundred."""
    drawn = torch.Generator().manual_seed(seed)
    rows = torch.randn(4, 6, dtype=torch.float64, generator=drawn)
    (plain,) = dual_cone(rows @ rows.T, [3], [0, 1, 2])
    rows[3] *= length
    (scaled,) = dual_cone(rows @ rows.T, [3], [0, 1, 2])
    assert_close(scaled[:3], plain[:3] * length, rtol=1e-9, atol=1e-12 * length)


@pytest.mark.parametrize("protected", [[0], [0, 2], [2, 0, 1]])
def test_a_gramian_that_is_not_finite_is_never_hidden(protected: list[int]) -> None:
    products = torch.eye(3)
    products[1, 1] = torch.inf
    assert dual_cone(products, [0], protected).isnan().all()
    assert gh(products, protected).isnan().all()


@pytest.mark.parametrize("count", [1, 2, 3, 9, 12])
def test_no_value_is_read(count: int) -> None:
    products = torch.empty(count, count, device="meta")
    found = dual_cone(products, [count - 1], range(count - 1))
    assert found.shape == (1, count)
    assert found.is_meta
    assert gh(products, [0]).shape == (count,)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts the operations that run."""

    count = 0

    def __torch_dispatch__(
        self,
        operation: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        self.count += 1
        return operation(*args, **(kwargs or {}))


# Views count. With more than eight tasks the number of steps grows with the tasks.
@needs.few_operations
@pytest.mark.parametrize(("tasks", "most"), [(2, 13), (3, 204), (8, 204), (9, 2749)])
def test_a_device_runs_no_more_operations_than_these(tasks: int, most: int) -> None:
    with Operations() as operations:  # type: ignore[no-untyped-call]  # torch's
        gh(torch.empty(tasks, tasks, device="meta"))
    assert operations.count <= most


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_gramian(dtype: torch.dtype) -> None:
    products = torch.tensor([[1, -1, 0], [-1, 4, 1], [0, 1, 1]], dtype=dtype)
    assert dual_cone(products, [1], [0]).tolist() == [[1, 1, 0]]
    assert dual_cone(products, [1], [0]).dtype is dtype


@pytest.mark.parametrize(
    ("numbers", "kind", "message"),
    [
        ("0", TypeError, "must be numbers of tasks, got '0'"),
        (0, TypeError, "must be numbers of tasks, got 0"),
        ([True], TypeError, "must hold whole numbers, got True"),
        ([1.0], TypeError, "must hold whole numbers, got 1.0"),
        ([2], ValueError, "must be from 0 to 1, got 2 for 2 tasks"),
        ([-1], ValueError, "must be from 0 to 1, got -1 for 2 tasks"),
        ([1, 1], ValueError, r"must hold each number once, got \[1, 1\]"),
    ],
)
def test_numbers_of_no_task_are_refused(
    numbers: list[int], kind: type[Exception], message: str
) -> None:
    products = torch.eye(2)
    with pytest.raises(kind, match=f"rows {message}"):
        dual_cone(products, numbers)
    with pytest.raises(kind, match=f"protected {message}"):
        dual_cone(products, protected=numbers)
    with pytest.raises(kind, match=f"protected {message}"):
        gh(products, numbers)


@pytest.mark.parametrize("rule", [dual_cone, plain_sum])
def test_what_is_no_gramian_is_refused(rule: object) -> None:
    assert callable(rule)
    with pytest.raises(ValueError, match="gramian must have shape"):
        rule(torch.ones(2, 3))
