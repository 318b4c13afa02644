"""The Gramian and the weighted sum, against the same in float64 on dense vectors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ghopt.gradients.sums import _add_alike
from tests.rows import combine, gramian

Gradients = list[list[Tensor | None]]

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (0,), (1,), (7,), (3, 4), (2, 3, 2, 2), (130, 130), (70_000,)]


def dense(gradient: Tensor) -> Tensor:
    """Spell a gradient out as one float64 vector."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    return gradient.double().reshape(-1)


def jacobian(gradients: Gradients) -> Tensor:
    """Spell the gradients out as a matrix, zeros where one is missing."""
    columns = []
    for entries in zip(*gradients, strict=True):
        like = next((dense(entry) for entry in entries if entry is not None), None)
        if like is not None:
            rows = [torch.zeros_like(like) if e is None else dense(e) for e in entries]
            columns.append(torch.stack(rows))
    return torch.cat(columns, dim=1)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest error of an entry in products of the norms; 0 / 0 is none."""
    norms = expected.diagonal().sqrt()
    relative = (actual - expected).abs() / norms / norms[:, None]
    return float(relative.nan_to_num(0).max())


def draw_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, dtype=torch.complex128, generator=generator)
    return (drawn if dtype.is_complex else drawn.real).to(dtype)


@st.composite
def gradients_of_tasks(draw: st.DrawFn) -> Gradients:
    """Up to 4 tasks and 6 parameters of any dtype and shape, some missing or strided."""
    tasks = draw(st.integers(1, 4))
    kinds = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
    columns = []
    for shape, dtype in draw(st.lists(kinds, min_size=1, max_size=6)):
        present = draw(st.lists(st.booleans(), min_size=tasks, max_size=tasks))
        turned = draw(st.booleans())
        column: list[Tensor | None] = []
        for there in present:
            tensor = draw_tensor(shape, dtype, draw(st.integers(0, 99)))
            column.append((tensor.mT if turned and len(shape) > 1 else tensor) if there
                          else None)  # fmt: skip
        columns.append(column)
    columns.append([draw_tensor((3,), torch.float32, task) for task in range(tasks)])
    return [list(row) for row in zip(*columns, strict=True)]


# Hundredths: a product of denormal numbers has no relative accuracy to test.
weights = st.integers(-300, 900).map(lambda hundredths: hundredths / 100)


def unit(gradients: Gradients) -> float:
    """Relative error that the narrowest dtype allows the sum of its gradients."""
    dtypes = {g.dtype for task in gradients for g in task if g is not None}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@pytest.mark.filterwarnings("ignore:Casting complex values")
@given(gradients_of_tasks())
def test_the_gramian_is_that_of_the_dense_float64_vectors(gradients: Gradients) -> None:
    rows = jacobian(gradients)
    assert error(gramian(gradients), rows @ rows.T) < 1e-7


@pytest.mark.filterwarnings("ignore:Casting complex values")
@given(gradients_of_tasks(), st.lists(weights, min_size=4, max_size=4))
def test_the_sum_is_that_of_the_dense_float64_vectors(
    gradients: Gradients, weights: list[float]
) -> None:
    weights = weights[: len(gradients)]
    rows = jacobian(gradients)
    lengths = [abs(w) * row.abs().max() for w, row in zip(weights, rows, strict=True)]
    expected = torch.tensor(weights, dtype=torch.float64) @ rows
    allowed = 3 * unit(gradients) * float(sum(lengths))
    sums = combine(gradients, torch.tensor(weights, dtype=torch.float64))
    assert_close(jacobian([sums])[0], expected, rtol=0, atol=allowed)
    assert [s is None for s in sums] == [
        all(entry is None for entry in entries)
        for entries in zip(*gradients, strict=True)
    ]


def test_the_sum_takes_the_memory_of_the_first_task_that_has_an_entry() -> None:
    a, b, c = (torch.ones(200, 200) for _ in range(3))
    first, second, none = combine(
        [[a, None, None], [b, c, None]], torch.tensor([2.0, 3.0])
    )
    assert first is a
    assert second is c
    assert none is None
    assert a.eq(5).all()
    assert b.eq(1).all()
    assert c.eq(3).all()


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (70, 90, 4, 4)])
def test_strides_in_channels_last_are_kept(shape: tuple[int, ...]) -> None:
    a, b = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(2))
    expected = 2 * a.double() + 3 * b.double()
    (total,) = combine([[a], [b]], torch.tensor([2.0, 3.0]))
    assert total is not None
    assert total.is_contiguous(memory_format=torch.channels_last)
    assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)


def test_tasks_may_have_different_strides() -> None:
    a, b = torch.randn(40, 500), torch.randn(500, 40).T
    rows = torch.stack([a.reshape(-1), b.reshape(-1)]).double()
    assert error(gramian([[a], [b]]), rows @ rows.T) < 1e-7
    (total,) = combine([[a], [b]], torch.tensor([1.0, 1.0]))
    assert total is not None
    assert_close(total.reshape(-1).double(), rows.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_gradients_are_summed_in_float32_and_rounded_once(
    dtype: torch.dtype,
) -> None:
    a, b, c = (
        draw_tensor((50_000,), torch.float32, seed).to(dtype) for seed in range(3)
    )
    exact = 1.37 * a.double() - 0.61 * b.double() + 2.9 * c.double()
    (total,) = combine([[a], [b], [c]], torch.tensor([1.37, -0.61, 2.9]))
    assert total is not None
    assert total.dtype is dtype
    # Half an ulp from the one rounding, and what float32 adds to it.
    assert_close(total.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


def test_products_of_half_gradients_do_not_overflow() -> None:
    gradients = [[torch.full((100_000,), 10.0, dtype=torch.float16)] for _ in range(2)]
    assert gramian(gradients).eq(1e7).all()


# A long gradient, and many small ones that make as much.
PARTS = pytest.mark.parametrize("part", [600_000, 9_999])


@PARTS
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0, 1e18])
def test_the_gramian_keeps_its_accuracy_at_every_scale(scale: float, part: int) -> None:
    tasks = [draw_tensor((600_000,), torch.float32, seed) * scale for seed in range(3)]
    rows = torch.stack(tasks).double()
    found = gramian([[*torch.split(task, part)] for task in tasks])
    assert error(found, rows @ rows.T) < 1e-7


@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("size", [2**14, 50_000, 200_000])
@pytest.mark.parametrize("power", [1, 2])
def test_small_float32_gradients_are_multiplied_in_float64(
    power: int, size: int, tasks: int
) -> None:
    drawn = [
        draw_tensor((size,), torch.float32, seed).abs() ** power
        for seed in range(tasks)
    ]
    rows = torch.stack(drawn).double()
    found = gramian([[*torch.split(task, 999)] for task in drawn])
    assert error(found, rows @ rows.T) < 1e-13


@pytest.mark.parametrize("tasks", [2, 3, 4, 6])
def test_long_float32_gradients_lose_no_digits(tasks: int) -> None:
    # One torch.dot over so many is 3e-5 off: torch sums in float32 as it goes.
    size = 3_000_000
    drawn = [draw_tensor((size,), torch.float32, seed).abs() for seed in range(tasks)]
    rows = torch.stack(drawn).double()
    assert error(gramian([[task] for task in drawn]), rows @ rows.T) < 3e-8


@pytest.mark.parametrize("tasks", [2, 4])
def test_few_large_elements_lose_no_digits_either(tasks: int) -> None:
    # Of these a sum of torch.dot over 16K each is 2e-7 off.
    size = 3_000_000
    drawn = [
        draw_tensor((size,), torch.float32, seed).square() for seed in range(tasks)
    ]
    rows = torch.stack(drawn).double()
    assert error(gramian([[task] for task in drawn]), rows @ rows.T) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [600_001, 2**21 + 2**16 + 1])
@pytest.mark.parametrize("present", [[0, 2], [1, 2, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_long_gradients_count_where_they_are(
    present: list[int], size: int, dtype: torch.dtype
) -> None:
    drawn = [draw_tensor((size,), dtype, seed) for seed in range(6)]
    gradients: Gradients = [
        [grad if task in present else None, grad[:3]] for task, grad in enumerate(drawn)
    ]
    rows = jacobian(gradients)
    assert error(gramian(gradients), rows @ rows.T) < 1e-7


@PARTS
@pytest.mark.parametrize("tilt", [1e-1, 1e-3, 1e-5])
def test_products_are_float64_where_the_angle_needs_it(tilt: float, part: int) -> None:
    a = draw_tensor((600_000,), torch.float32, 1)
    b = -a + tilt * draw_tensor((600_000,), torch.float32, 2)
    rows = torch.stack([a, b]).double()
    found = gramian([[*torch.split(task, part)] for task in (a, b)])
    # What a float64 sum of so many squares is off by, here or in the expected value.
    assert error(found, rows @ rows.T) < 1e-12


@PARTS
def test_products_are_float64_where_several_cosines_add_up_to_dependence(
    part: int,
) -> None:
    # No two of these are nearly opposite, but each of the three is, to the sum of others.
    a, b, tilt = (draw_tensor((600_000,), torch.float32, seed) for seed in range(3))
    tasks = [a, b, -a - b + 1e-2 * tilt]
    rows = torch.stack(tasks).double()
    found = gramian([[*torch.split(task, part)] for task in tasks])
    assert error(found, rows @ rows.T) < 1e-12


def test_one_zero_task_among_others_counts_as_zero() -> None:
    a, zero = draw_tensor((9,), torch.float32, 1), torch.zeros(9)
    products = gramian([[a], [zero], [None]])
    assert_close(products[0, 0], a.double().square().sum())
    assert products[1:].eq(0).all()
    assert products[:, 1:].eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_stays_visible(value: float) -> None:
    a, b = torch.ones(5), torch.ones(5)
    b[2] = value
    products = gramian([[a], [b]])
    assert not products.isfinite().all()
    (total,) = combine([[a], [b]], torch.tensor([1.0, 1.0]))
    assert total is not None
    assert not total.isfinite().all()


def embedding_gradient(rows: list[int], seed: int) -> Tensor:
    values = draw_tensor((len(rows), 3), torch.float32, seed)
    size = (6, 3)
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, size, check_invariants=True
    )


def test_sparse_gradients_stay_sparse_and_count_in_full() -> None:
    def tasks() -> Gradients:
        # Rows twice in one gradient, rows of one task only, a dense task beside.
        return [
            [embedding_gradient([0, 2, 2], 1), embedding_gradient([1], 2)],
            [
                embedding_gradient([2, 5, 0, 0], 3),
                draw_tensor((6, 3), torch.float32, 4),
            ],
            [embedding_gradient([4], 5), None],
        ]

    rows = jacobian(tasks())
    assert error(gramian(tasks()), rows @ rows.T) < 1e-7
    weights = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    sums = combine(tasks(), weights)
    assert [s is not None and s.is_sparse for s in sums] == [True, False]
    assert_close(jacobian([sums])[0], weights @ rows, rtol=1e-6, atol=1e-6)


def test_a_conjugate_view_is_resolved() -> None:
    a = draw_tensor((4,), torch.complex64, 1)
    rows = jacobian([[a.conj()], [a]])
    assert error(gramian([[a.conj()], [a]]), rows @ rows.T) < 1e-7
    (total,) = combine([[a.conj()], [a.clone()]], torch.tensor([1.0, 1.0]))
    assert total is not None
    assert_close(total, 2 * a.real + 0j)


def test_of_no_gradient_at_all_the_products_are_zero() -> None:
    rows: Gradients = [[None, None], [None, None]]
    assert gramian(rows).equal(torch.zeros(2, 2, dtype=torch.float64))
    assert combine(rows, torch.ones(2, dtype=torch.float64)) == [None, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_is_read_back_to_the_host(dtype: torch.dtype) -> None:
    def task(*shapes: tuple[int, ...]) -> list[Tensor | None]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]

    gradients = [task((3, 3), (5_000_000,)), [*task((3, 3)), None]]
    products = gramian(gradients)
    assert products.shape == (2, 2)
    assert products.dtype is torch.float64
    sums = combine(gradients, products[0])
    assert [s is not None and s.dtype for s in sums] == [dtype, dtype]


def test_weights_on_a_device_leave_all_but_the_first_gradients_as_they_are() -> None:
    """Where they are not read: tensors in place of numbers, as on a GPU without triton."""
    first = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    second = [torch.tensor([-1.0, 0.5]), torch.tensor([[4.0]])]
    kind = [{0: a.clone(), 2: b} for a, b in zip(first, second, strict=True)]
    kept = [tensor.clone() for tensor in second]
    factors = [torch.tensor(value, dtype=torch.float64) for value in (2.0, 9.0, -3.0)]
    _add_alike(kind, factors)
    for entries, a, b in zip(kind, first, kept, strict=True):
        assert_close(entries[0], 2 * a - 3 * b)
        assert entries[2].equal(b)
