"""The Triton kernels: on a GPU where there is one, else under triton's interpreter.

The interpreter forgives what a compiler does not, so they are also compiled for an H200,
which needs no GPU.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton", reason="the kernels need the extra [triton]")

import triton
import triton.language as tl

from ghopt.gradients import entries as sorting
from ghopt.gradients import kernels
from tests import rows as arithmetic
from tests.versions import needs

Parameters = list[dict[int, Tensor]]
"""The gradients of each parameter by task."""

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Share by which rounding to a dtype may be off. To bfloat16 the interpreter cuts off.
ROUNDING = {
    torch.float64: 2**-53,
    torch.float32: 2**-24,
    torch.bfloat16: 2**-7 if INTERPRETED else 2**-8,
    torch.float16: 2**-11,
}
GUARD = 77.0

pytestmark = [
    needs.interpreter,
    # As the interpreter of triton 3.7 and before does.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim"),
]
# numpy warns of what the interpreter computes with infinity and NaN.
non_finite = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    """Interpret the kernels if there is no GPU, though triton may long be imported."""
    if not INTERPRETED:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # The one function of triton that the kernels call and that is a kernel itself.
        patch.setattr(tl, "sum", triton.jit(tl.sum.fn))
        importlib.reload(kernels)
        yield
    importlib.reload(kernels)


def guarded(values: Tensor, offset: int = 0) -> Tensor:
    """Put a tensor on the device, so many elements into a buffer that shows misuse."""
    guard = torch.full((offset + 8,), GUARD, dtype=values.dtype)
    buffer = torch.cat([guard[:offset], values, guard[offset:]]).to(DEVICE)
    return buffer.narrow(0, offset, len(values))


def around(tensor: Tensor) -> Tensor:
    """Return what lies before and behind a guarded tensor."""
    storage = tensor.untyped_storage()
    everything = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    everything.set_(storage)
    begin, end = tensor.storage_offset(), tensor.storage_offset() + len(tensor)
    return torch.cat([everything[:begin], everything[end:]])


def draw_tensor(size: int, dtype: torch.dtype, seed: int, norm: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    return (values * norm / math.sqrt(max(size, 1))).to(dtype)


@st.composite
def gradients(draw: st.DrawFn, large: int = 2500) -> tuple[Parameters, int, int]:
    """Gradients of up to 3 parameters, the number of tasks and a chunk size."""
    tasks, dtype = draw(st.integers(1, 8)), draw(st.sampled_from(DTYPES))
    # Larger ones, times the largest weights, are infinite in float16.
    norms = st.floats(*((-2, 0.5) if dtype is torch.float16 else (-6, 6)))
    parameters = []
    small = st.sampled_from([0, 1, 3, 127, 512])
    for sizes in (st.integers(0, large), small, small)[: draw(st.integers(1, 3))]:
        size, seed = draw(sizes), draw(st.integers(0, 10**6))
        present = draw(st.sets(st.integers(0, tasks - 1), min_size=1))
        aligned = draw(st.booleans())
        parameters.append(
            {
                task: guarded(
                    draw_tensor(size, dtype, seed + task, 10 ** draw(norms)),
                    0 if aligned else draw(st.integers(0, 9)),
                )
                for task in present
            }
        )
    return parameters, tasks, draw(st.sampled_from([2048, 1024, 1000, 999]))


def jacobian(parameters: Parameters, tasks: int) -> Tensor:
    """Spell the gradients out as float64, shape ``[K, N]``, zeros where one misses."""
    rows = []
    for task in range(tasks):
        parts = []
        for entries in parameters:
            like = next(iter(entries.values()))
            entry = entries.get(task, torch.zeros_like(like))
            parts.append(entry.double().cpu().reshape(-1))
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def exact_gramian(parameters: Parameters, tasks: int) -> Tensor:
    """Inner products one element after the other, without a rounding in the sums."""
    rows = jacobian(parameters, tasks).tolist()
    return torch.tensor(
        [
            [math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in rows]
            for x in rows
        ],
        dtype=torch.float64,
    )


def measured(parameters: Parameters, tasks: int, chunk: int = 1024) -> Tensor:
    return kernels.gramian(kernels.tabulate(parameters, tasks, chunk)).cpu()


def combined(
    parameters: Parameters, weights: list[float], chunk: int = 1024
) -> list[Tensor]:
    """Combine in place; return what is then in the first tensor of each parameter."""
    table = kernels.tabulate(parameters, len(weights), chunk)
    on_device = torch.tensor(weights, dtype=torch.float64, device=DEVICE)
    kernels.combine(table, on_device)
    return [entries[min(entries)].cpu() for entries in parameters]


# Gramian


@given(gradients())
@settings(max_examples=25)
def test_the_gramian_is_exact_to_float64(drawn: tuple[Parameters, int, int]) -> None:
    parameters, tasks, chunk = drawn
    expected = exact_gramian(parameters, tasks)
    norms = expected.diagonal().sqrt()
    error = (measured(parameters, tasks, chunk) - expected).abs()
    assert (error <= 1e-14 * norms * norms[:, None]).all()


def test_the_sum_over_chunks_takes_more_of_them_than_it_can_load_at_once() -> None:
    # By itself: the interpreter would need a minute for so many chunks of gradients.
    partial = torch.arange(3 * 2500, dtype=torch.float64, device=DEVICE).view(2500, 3)
    result = torch.empty(2, 2, dtype=torch.float64, device=DEVICE)
    kernels._sum_chunks[(2, 2)](
        partial, result, 2500, K=2, WIDTH=1024, enable_fp_fusion=True
    )
    first, cross, second = partial.sum(0).tolist()
    assert result.tolist() == [[first, cross], [cross, second]]


def test_the_gramian_is_symmetric_and_repeats_itself_bit_for_bit() -> None:
    parameters = [
        {task: draw_tensor(3000, torch.float32, task).to(DEVICE) for task in range(3)}
    ]
    first, again = measured(parameters, 3), measured(parameters, 3)
    assert torch.equal(first, first.T)
    assert torch.equal(first, again)


def test_products_of_large_gradients_do_not_overflow() -> None:
    entry = torch.full((5,), 1e30, device=DEVICE)
    assert measured([{0: entry}], 1).item() == pytest.approx(5e60)


@non_finite
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1023, 1500])
def test_what_is_not_finite_comes_through_to_the_products_of_its_task(
    bad: float, place: int, dtype: torch.dtype
) -> None:
    values = [draw_tensor(1501, dtype, task) for task in range(3)]
    values[1][place] = bad
    result = measured([{k: v.to(DEVICE) for k, v in enumerate(values)}], 3, chunk=1500)
    finite = [[i != 1 and j != 1 for j in range(3)] for i in range(3)]
    assert result.isfinite().tolist() == finite
    assert result[1, 1].isnan() == math.isnan(bad)


@non_finite
def test_a_missing_gradient_counts_as_zeros_also_beside_infinity() -> None:
    entry = torch.tensor([math.inf, 1.0], device=DEVICE)
    result = measured([{1: entry}], 2)
    assert result.isnan().tolist() == [[False, True], [True, False]]
    assert result.diagonal().tolist() == [0, math.inf]


def test_empty_gradients_have_products_of_zero() -> None:
    nothing = torch.empty(0, device=DEVICE)
    assert measured([{0: nothing, 1: nothing.clone()}], 2).tolist() == [[0, 0], [0, 0]]


# Combine


@given(gradients(large=5000), st.data())
@settings(max_examples=50)
def test_the_weighted_sum_is_rounded_once(
    drawn: tuple[Parameters, int, int], data: st.DataObject
) -> None:
    parameters, tasks, chunk = drawn
    factors = st.floats(1e-3, 100) | st.floats(-100, -1e-3) | st.just(0.0)
    weights = data.draw(st.lists(factors, min_size=tasks, max_size=tasks))
    before = [{k: v.cpu().double().clone() for k, v in e.items()} for e in parameters]
    results = combined(parameters, weights, chunk)
    for entries, values, result in zip(parameters, before, results, strict=True):
        terms = torch.stack([weights[task] * value for task, value in values.items()])
        expected, size = terms.sum(0), terms.abs().sum(0)
        summed = 2**-53 if result.dtype.itemsize >= 4 else 2**-24
        bound = (tasks + 2) * summed * size + ROUNDING[result.dtype] * expected.abs()
        tiny = torch.finfo(result.dtype).smallest_normal * ROUNDING[result.dtype]
        assert ((result.double() - expected).abs() <= 1.001 * bound + tiny).all()
        for task, entry in entries.items():
            assert (around(entry) == GUARD).all()
            assert task == min(entries) or torch.equal(
                entry.double().cpu(), values[task]
            )


def test_a_weighted_sum_in_half_precision_does_not_overflow_on_the_way() -> None:
    entries = {
        task: torch.full((5,), 6e4, dtype=torch.float16, device=DEVICE)
        for task in (0, 1)
    }
    (result,) = combined([entries], [2.0, -1.5])
    assert result.tolist() == pytest.approx([3e4] * 5, rel=1e-3)


@pytest.mark.parametrize("present", [{0}, {1}, {2}, {0, 2}, {1, 2}])
def test_a_missing_gradient_adds_nothing_even_if_its_weight_is_nan(
    present: set[int],
) -> None:
    entries = {task: torch.full((1200,), 2.0, device=DEVICE) for task in present}
    weights = [3.0 if task in present else math.nan for task in range(3)]
    (result,) = combined([entries], weights)
    assert (result == 6.0 * len(present)).all()


@non_finite
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_comes_through(bad: float) -> None:
    entries = {task: torch.full((1200,), 2.0, device=DEVICE) for task in range(2)}
    other = {0: torch.ones(3, device=DEVICE)}
    touched, untouched = combined([entries, other], [1.0, bad])
    assert not touched.isfinite().any()
    assert untouched.tolist() == [1, 1, 1]


@non_finite
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_element_that_is_not_finite_comes_through_alone(
    bad: float, dtype: torch.dtype
) -> None:
    values = [torch.ones(1201, dtype=dtype) for _ in range(2)]
    values[1][1200] = bad
    entries = {task: value.to(DEVICE) for task, value in enumerate(values)}
    (result,) = combined([entries], [1.0, 2.0])
    assert result.isfinite().tolist() == [True] * 1200 + [False]
    assert result[-1].isnan() == math.isnan(bad)


def test_gradients_in_channels_last_are_taken_as_they_lie() -> None:
    shape, order = (4, 8, 9, 9), torch.channels_last
    values = [draw_tensor(math.prod(shape), torch.float32, k) for k in range(2)]
    images = [value.reshape(shape) for value in values]
    entries = {k: v.to(DEVICE, memory_format=order) for k, v in enumerate(images)}
    expected = exact_gramian([dict(enumerate(values))], 2)
    assert measured([entries], 2).allclose(expected, rtol=1e-14, atol=0)
    (result,) = combined([entries], [0.5, 2.0])
    assert result.allclose(0.5 * images[0] + 2 * images[1], rtol=1e-6, atol=1e-7)


def test_combining_nothing_but_empty_gradients_leaves_them_empty() -> None:
    (result,) = combined([{0: torch.empty(0, 3, device=DEVICE)}], [2.0])
    assert result.shape == (0, 3)


# Table


@given(gradients(large=20_000))
def test_the_table_cuts_all_gradients_into_chunks(
    drawn: tuple[Parameters, int, int],
) -> None:
    parameters, tasks, chunk = drawn
    expected = []
    for entries in parameters:
        first = next(iter(entries.values()))
        for start in range(0, len(first), chunk):
            skipped = start * first.element_size()
            places = [
                entries[task].data_ptr() + skipped if task in entries else 0
                for task in range(tasks)
            ]
            expected.append([min(chunk, len(first) - start), *places])
    rows: list[list[int]] = kernels.tabulate(parameters, tasks, chunk).rows.tolist()
    assert [[row[0], *row[2:]] for row in rows] == expected


@given(gradients(large=20_000))
def test_loads_of_16_bytes_are_promised_wherever_they_are_possible_and_nowhere_else(
    drawn: tuple[Parameters, int, int],
) -> None:
    parameters, tasks, chunk = drawn
    itemsize = next(iter(parameters[0].values())).element_size()
    for length, full, *places in kernels.tabulate(
        parameters, tasks, chunk
    ).rows.tolist():
        if any(place % 16 for place in places):
            assert full == 0
        else:
            # What is left is less than one step of 128 threads with 64 bytes for each.
            assert full <= length < full + 128 * 64 // itemsize
            assert full * itemsize % (128 * 8) == 0


def test_the_table_is_built_on_the_host_whatever_the_default_device() -> None:
    parameters = [{0: torch.ones(3, device=DEVICE)}]
    with torch.device("meta"):
        table = kernels.tabulate(parameters, 1)
    assert table.rows.tolist() == [[3, 0, parameters[0][0].data_ptr()]]


@pytest.mark.skipif(INTERPRETED, reason="only a GPU can wait")
def test_nothing_waits_for_the_device() -> None:
    parameters = [{k: torch.ones(3000, device=DEVICE) for k in range(2)}]
    weights = torch.ones(2, dtype=torch.float64, device=DEVICE)
    combined(parameters, [1.0, 1.0])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        table = kernels.tabulate(parameters, 2)
        kernels.gramian(table)
        kernels.combine(table, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What is refused


def plain(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


MISFITS = {
    "nothing": {},
    "integers": {0: plain(4, dtype=torch.int64)},
    "complex numbers": {0: plain(4, dtype=torch.complex64)},
    "two dtypes": {0: plain(4), 1: plain(4, dtype=torch.float64)},
    "two shapes": {0: plain(4), 1: plain(2, 2)},
    "two devices": {0: plain(4), 1: torch.ones(4, device="meta")},
    "gaps": {0: plain(8)[::2]},
    "expanded": {0: plain(1).expand(4)},
    "two orders": {0: plain(2, 3), 1: plain(3, 2).T},
    "two memory formats": {
        0: plain(2, 3, 4, 4),
        1: plain(2, 3, 4, 4).to(memory_format=torch.channels_last),
    },
    "sparse": {0: torch.eye(3, device=DEVICE).to_sparse()},
    "sparse later": {0: plain(3, 3), 1: torch.eye(3, device=DEVICE).to_sparse()},
}


@pytest.mark.parametrize("entries", MISFITS.values(), ids=MISFITS)
def test_what_the_kernels_cannot_take_does_not_fit(entries: dict[int, Tensor]) -> None:
    assert not kernels.fits(entries)
    with pytest.raises(ValueError, match="parameters must fit 2 tasks"):
        kernels.tabulate([entries], 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 1, 3, 3), (2, 3, 1, 1)])
def test_contiguous_floating_point_fits(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    assert kernels.fits({task: plain(*shape, dtype=dtype) for task in (1, 3)})


@pytest.mark.parametrize("tasks", [0, 9])
def test_a_number_of_tasks_that_the_kernels_cannot_take_is_refused(tasks: int) -> None:
    with pytest.raises(ValueError, match="tasks must be from 1 to 8"):
        kernels.tabulate([{0: plain(3)}], tasks)


@pytest.mark.parametrize("task", [-1, 2])
def test_a_task_out_of_range_is_refused(task: int) -> None:
    with pytest.raises(ValueError, match="parameters must fit 2 tasks"):
        kernels.tabulate([{0: plain(3), task: plain(3)}], 2)


def test_no_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        kernels.tabulate([], 2)


def test_parameters_of_two_dtypes_are_refused() -> None:
    mixed = [{0: plain(3)}, {0: plain(3, dtype=torch.float64)}]
    with pytest.raises(ValueError, match="one dtype and device"):
        kernels.tabulate(mixed, 1)


@pytest.mark.parametrize(
    "weights",
    [
        plain(2),
        plain(3, dtype=torch.float64),
        plain(2, 1, dtype=torch.float64),
        plain(4, dtype=torch.float64)[::2],
        torch.ones(2, dtype=torch.float64, device="meta"),
    ],
    ids=["float32", "too many", "a column", "gaps", "elsewhere"],
)
def test_weights_that_are_no_float64_per_task_are_refused(weights: Tensor) -> None:
    entry = plain(3)
    table = kernels.tabulate([{0: entry}], 2)
    with pytest.raises(ValueError, match="weights must be float64"):
        kernels.combine(table, weights)
    assert entry.tolist() == [1, 1, 1]


# Compiled for an H200, by another process: this one may hold the interpreter.

COMPILED = [
    *((2, dtype) for dtype in DTYPES),
    *((1, torch.float32), (8, torch.float32), (8, torch.bfloat16)),
]


def compile_all() -> None:
    """Write what the compiler makes of every launch, as JSON, one line per kernel."""
    for tasks, dtype in COMPILED:
        for name in ["_multiply_chunk", "_sum_chunks", "_combine_chunk"]:
            kernel = getattr(kernels, name)
            label = {"name": name, "tasks": tasks, "dtype": str(dtype)}
            setattr(kernels, name, _Compiler(kernel, label))
        entries = {task: torch.ones(5000, dtype=dtype) for task in range(tasks)}
        table = kernels.tabulate([entries], tasks)
        kernels.gramian(table)
        kernels.combine(table, torch.ones(tasks, dtype=torch.float64))
        importlib.reload(kernels)


class _Compiler:
    """Stands for a kernel; compiles it with the arguments of its launch."""

    def __init__(self, kernel: Any, label: dict[str, Any]) -> None:
        self.kernel, self.label = kernel, label

    def __getitem__(self, _: tuple[int, ...]) -> "_Compiler":
        return self

    def __call__(self, *arguments: Tensor | int, **settings: Any) -> None:
        options = {
            "num_warps": settings.pop("num_warps", 4),
            "enable_fp_fusion": settings.pop("enable_fp_fusion"),
        }
        types = {torch.int64: "*i64", torch.float64: "*fp64"}
        signature = dict.fromkeys(self.kernel.arg_names, "constexpr")
        aligned = {}
        for place, argument in enumerate(arguments):
            name = self.kernel.arg_names[place]
            if isinstance(argument, Tensor):
                signature[name] = types[argument.dtype]
                aligned[place,] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32"
        source = triton.compiler.ASTSource(self.kernel, signature, settings, aligned)
        target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options=options)
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.check_output(
            [tool, "--dump-resource-usage", cubin], text=True
        )
        print(json.dumps({**self.label, "ptx": compiled.asm["ptx"], "usage": usage}))


Compiled = dict[tuple[str, int, torch.dtype], dict[str, str]]


@pytest.fixture(scope="module", name="compiled")
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    cache = str(tmp_path_factory.mktemp("triton"))
    process = subprocess.run(
        [sys.executable, "-c", "from tests import test_kernels as t; t.compile_all()"],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=False,  # the assertion shows what it wrote
    )
    assert process.returncode == 0, process.stderr
    records = [json.loads(line) for line in process.stdout.splitlines()]
    names = {str(dtype): dtype for dtype in DTYPES}
    return {(r["name"], r["tasks"], names[r["dtype"]]): r for r in records}


@pytest.mark.slow
def test_all_kernels_compile_and_nothing_spills_out_of_the_registers(
    compiled: Compiled,
) -> None:
    names = ["_multiply_chunk", "_sum_chunks", "_combine_chunk"]
    assert compiled.keys() == {(name, *kind) for name in names for kind in COMPILED}
    for record in compiled.values():
        assert re.search(r"STACK:0 .*LOCAL:0 ", record["usage"])


@pytest.mark.parametrize(("tasks", "dtype"), COMPILED, ids=str)
@pytest.mark.slow
def test_full_steps_are_loaded_and_stored_16_bytes_at_a_time(
    tasks: int, dtype: torch.dtype, compiled: Compiled
) -> None:
    width = "v2.b64" if dtype is torch.float64 else "v4.b32"
    if tasks == 8 and dtype.itemsize == 2:
        width = "v2.b32"  # 8 bytes, for want of registers
    for name in ["_multiply_chunk", "_combine_chunk"]:
        ptx = compiled[name, tasks, dtype]["ptx"]
        assert len(re.findall(rf"ld\.global\S*\.{width} ", ptx)) == max(4, tasks)
    assert len(re.findall(rf"st\.global\S*\.{width} ", ptx)) == max(4, tasks) // tasks


@pytest.mark.parametrize(("tasks", "dtype"), COMPILED, ids=str)
@pytest.mark.slow
def test_products_are_taken_in_float64_and_sums_in_float64_or_of_halves_in_float32(
    tasks: int, dtype: torch.dtype, compiled: Compiled
) -> None:
    multiplied = compiled["_multiply_chunk", tasks, dtype]["ptx"]
    assert not re.search(r"(mul|fma|add)\.(rn\.)?f32", multiplied)
    summed = compiled["_combine_chunk", tasks, dtype]["ptx"]
    other = "f32" if dtype.itemsize >= 4 else "f64"
    assert not re.search(rf"(mul|fma|add)\.(rn\.)?{other}", summed)


@pytest.mark.slow
def test_the_compiled_sum_is_rounded_to_nearest(compiled: Compiled) -> None:
    summed = compiled["_combine_chunk", 2, torch.bfloat16]["ptx"]
    assert re.search(r"cvt\.rn\.bf16", summed)
    assert not re.search(r"cvt\.rz", summed)


# In the engine


def of_many_kinds(seed: int) -> list[Tensor | None]:
    """Draw the gradients of a task: most for the kernels, some not."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide).to(DEVICE, dtype)

    return [
        drawn(3, 4),
        drawn(),
        drawn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        drawn(4, 3).T,  # neither of the memory formats
        drawn(5, dtype=torch.bfloat16),
        drawn(4, dtype=torch.complex64),
        drawn(4, dtype=torch.complex64).conj(),
        drawn(6, 2).relu().to_sparse(),
        None if seed else drawn(2, dtype=torch.float64),
        drawn(3, dtype=torch.float16) if seed else None,
    ]


@pytest.mark.parametrize("tasks", [1, 3, 9])
def test_the_engine_gives_the_same_with_and_without_kernels(
    tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.linspace(0.5, 2, tasks, dtype=torch.float64, device=DEVICE)
    used: list[str] = []
    results: dict[bool, Any] = {}
    for name in ["gramian", "combine"]:
        kernel = getattr(kernels, name)

        def noted(*args: Any, kernel: Any = kernel, name: str = name) -> Any:
            used.append(name)
            return kernel(*args)

        monkeypatch.setattr(kernels, name, noted)
    for fused in [False, True]:
        monkeypatch.setattr(sorting, "_on_gpu", lambda _, fused=fused: fused)
        rows = [of_many_kinds(task) for task in range(tasks)]
        found = arithmetic.gramian(rows)
        summed = arithmetic.combine(rows, weights)
        results[fused] = found, [g if g is None else g.to_dense() for g in summed]
    assert_close(results[True], results[False])
    # One for each dtype, complex numbers counting as pairs of floats.
    kinds = 0 if tasks == 9 else 3 if tasks == 1 else 4
    assert used == ["gramian"] * kinds + ["combine"] * kinds
