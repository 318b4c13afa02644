"""How the cone is found on the CPU: in floats for few tasks, by pivoting for many.

Both are judged as on a device in the other files on geometry, too. Here: that all ways
give the same for any number of tasks, and what happens where pivoting has no way out.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import pytest
import torch
import torch._inductor.config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.testing import assert_close

from ghopt import Weighting, geometry
from ghopt.geometry import cone, host, pivoting
from ghopt.geometry.cone import RESOLVED, _bound_of_lowest
from ghopt.geometry.matrices import rescaled
from tests import reference
from tests.networks import flat, network_gradients, seeds, widths
from tests.pretended import nothing_read
from tests.reference import gramian, harmonized
from tests.strategies import fewer_examples, jacobians, many_tasks, scales

EPS = torch.finfo(torch.float64).eps


@contextmanager
def in_floats() -> Iterator[None]:
    with patch.object(geometry, "_MOST_READ", 100):
        yield


@contextmanager
def by_pivoting() -> Iterator[None]:
    with patch.object(geometry, "_MOST_READ", 0):
        yield


@contextmanager
def by_pivoting_of_the_active_only() -> Iterator[None]:
    with by_pivoting(), patch.object(pivoting, "_SLIM", 0):
        yield


Way = Callable[[], AbstractContextManager[None]]
WAYS = [in_floats, by_pivoting, by_pivoting_of_the_active_only]
every_way = pytest.mark.parametrize("way", WAYS)


# Full exchanges alone run in a circle for one of these gradients, for ever.
CIRCLE = torch.tensor(
    [[-1, -3, 3, 1], [-1, 1, -2, -2], [-3, 1, 3, 1], [-2, 1, -2, -3]],
    dtype=torch.float64,
)


def largest_difference(found: Tensor, expected: Tensor, rows: Tensor) -> float:
    """Of harmonized gradients, relative to the gradients."""
    norms = rows.norm(dim=1, keepdim=True)
    differences = (found - expected) @ rows / norms.where(norms > 0, 1)
    return float(differences.norm(dim=1).max())


@every_way
@given(jacobian=jacobians())
def test_each_way_projects_on_the_cone(way: Way, jacobian: Tensor) -> None:
    with way():
        coefficients = geometry.gh_coefficients(gramian(jacobian))
    expected = reference.dual_cone_projections(jacobian)
    tolerance = 8 * len(jacobian) * EPS / reference.span(jacobian)
    for row, found, wanted in zip(
        reference.vectors(jacobian),
        harmonized(coefficients, jacobian),
        expected,
        strict=True,
    ):
        if any(row):
            assert reference.error(found, wanted, row) <= tolerance


@every_way
@given(tasks=st.integers(3, 14), width=widths, seed=seeds)
@fewer_examples
def test_each_way_does_as_a_device_does(
    way: Way, tasks: int, width: int, seed: int
) -> None:
    """With gradients as float32 networks make them, equal or opposite but for rounding."""
    rows = flat(network_gradients(tasks, width, seed))
    products = rows @ rows.T
    with way():
        found = geometry.gh_coefficients(products)
    with nothing_read():
        expected = geometry.gh_coefficients(products)
    assert largest_difference(found, expected, rows) <= 1e-8


@every_way
@pytest.mark.parametrize("patience", [pivoting.PATIENCE, 10**9])
def test_a_circle_of_exchanges_is_left(way: Way, patience: int) -> None:
    """By exchanges of one task, or by another method where these are not made."""
    settled = []

    def noted(method: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            result = method(*given)
            settled.append(result is not None)
            return result

        return call

    with (
        way(),
        patch.object(host, "PATIENCE", patience),
        patch.object(pivoting, "PATIENCE", patience),
        patch.object(host, "cone_coefficients", noted(host.cone_coefficients)),
        patch.object(pivoting, "pivoted", noted(pivoting.pivoted)),
    ):
        found = geometry.gh_coefficients(gramian(CIRCLE))
    assert settled[0] == (patience == pivoting.PATIENCE)
    expected = reference.dual_cone_projections(CIRCLE)
    for one, other in zip(harmonized(found, CIRCLE), expected, strict=True):
        assert reference.error(one, other, other) <= 1e-13


@every_way
@pytest.mark.parametrize("tasks", [3, 12])
def test_what_is_no_gramian_but_for_rounding_is_served_as_on_a_device(
    way: Way, tasks: int
) -> None:
    """Opposite gradients whose cosine a user's float32 left a little below -1."""
    products = torch.eye(tasks, dtype=torch.float64)
    products[0, 1] = products[1, 0] = -1 - 1e-6
    products[2, 0] = products[0, 2] = -0.5
    products[2, 1] = products[1, 2] = 0.5
    with way():
        found = geometry.gh_coefficients(products)
    with nothing_read():
        expected = geometry.gh_coefficients(products)
    assert found.isfinite().all()
    assert_close(found, expected)


@pytest.mark.parametrize("tasks", [3, 12])
def test_where_pivoting_does_not_settle_a_device_s_method_does(tasks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tasks, 2 * tasks, generator=generator, dtype=torch.float64)
    expected = geometry.gh_coefficients(rows @ rows.T)
    with patch.object(host, "STEPS", 0), patch.object(pivoting, "STEPS", 0):
        found = geometry.gh_coefficients(rows @ rows.T)
    assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_well_conditioned_gramian_takes_one_system_of_each_row() -> None:
    """Nothing would be left for further rounds to take away."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 48, generator=generator, dtype=torch.float64)
    for dependent, rounds in ((False, 1), (True, cone.ROUNDS)):
        if dependent:
            rows[1] = rows[0]
        method = patch.object(pivoting, "pivoted", wraps=pivoting.pivoted)
        with by_pivoting(), method as spy:
            geometry.gh(rows @ rows.T)
        assert spy.call_args.args[-1] == rounds


@given(jacobians() | many_tasks(11, 14), scales)
@fewer_examples
def test_a_gramian_is_scaled_alike_whether_values_are_read(
    jacobian: Tensor, scale: float
) -> None:
    scaled = gramian(jacobian * scale)
    matrix, factors = rescaled(scaled)
    with nothing_read():
        expected, expected_factors = rescaled(scaled)
    assert matrix.equal(expected)
    assert factors.equal(expected_factors)
    diagonal = matrix.diagonal()
    assert ((diagonal >= 0.5) & (diagonal < 2)).all()


@given(jacobians(2) | many_tasks(11, 14))
@fewer_examples
def test_the_bound_of_the_lowest_eigenvalue_is_one(jacobian: Tensor) -> None:
    system, _ = rescaled(gramian(jacobian))
    lowest = float(torch.linalg.eigvalsh(system)[0])
    # Above what rounding leaves of an eigenvalue that is zero.
    assert _bound_of_lowest(system) <= max(lowest, 0) + 1e-14 * len(system)


def test_the_bound_is_of_use_for_gradients_that_are_no_more_than_random() -> None:
    rows = torch.randn(12, 48, generator=torch.Generator().manual_seed(0))
    system, _ = rescaled(gramian(rows))
    assert _bound_of_lowest(system) > RESOLVED


@pytest.mark.parametrize("square", [0.5, 1.99])
def test_the_bound_of_a_thousand_tasks_is_a_number(square: float) -> None:
    system = square * torch.eye(1100, dtype=torch.float64)
    assert _bound_of_lowest(system) == pytest.approx(square / math.e, rel=0.01)


# What is read, and what looks on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(st.integers(3, 10), st.integers(0, 7), seeds)
@fewer_examples
def test_values_that_are_read_change_no_rule(
    dtype: torch.dtype, tasks: int, more: int, seed: int
) -> None:
    """In fewer dimensions than tasks the Gramian is singular but for its rounding."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, max(2, tasks - 3) + more, generator=generator)
    rounded = gramian(rows).to(dtype)
    found = geometry._ghpp(rounded, 0.5)
    with nothing_read():
        expected = geometry._ghpp(rounded, 0.5)
    assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_what_rounding_to_sixteen_bits_leaves_of_dependence_is_dropped() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    exact = geometry.ghpp(gramian(rows))
    rounded = geometry.ghpp(gramian(rows).bfloat16())
    assert_close(rounded.double(), exact, rtol=0, atol=0.05)


RULES: dict[Weighting, tuple[int, ...]] = {
    geometry.gh: (1, 2, 3, 8, 9, 12),
    geometry.ghpp: (1, 2, 3, 8, 9, 12),
    geometry.ghpp_balanced: (1, 2),
    geometry.ghpp_printed: (1, 2),
}
every_rule = pytest.mark.parametrize(
    ("rule", "tasks"), [(rule, tasks) for rule in RULES for tasks in RULES[rule]]
)


def in_conflict(tasks: int, seed: int) -> Tensor:
    rows = torch.randn(tasks, 4 * tasks, generator=torch.Generator().manual_seed(seed))
    rows[-1] -= 0.5 * rows[0]
    return gramian(rows)


def steepness(rule: Weighting, products: Tensor) -> Tensor:
    """Give the derivatives of all weights, ``[K, K, K]``, along symmetric changes."""
    tasks = len(products)
    found = products.new_zeros(tasks, tasks, tasks)
    for i in range(tasks):
        for j in range(tasks):
            shift = torch.zeros_like(products)
            shift[i, j] += 1e-6
            shift[j, i] += 1e-6
            found[:, i, j] = (rule(products + shift) - rule(products - shift)) / 2e-6
    return found


@every_rule
def test_rules_map_over_gramians(rule: Weighting, tasks: int) -> None:
    several = torch.stack([in_conflict(tasks, seed) for seed in range(4)])
    expected = torch.stack([rule(one) for one in several])
    assert_close(torch.vmap(rule)(several), expected)


@every_rule
def test_rules_have_their_derivatives(rule: Weighting, tasks: int) -> None:
    products = in_conflict(tasks, 0)
    expected = steepness(rule, products)
    jacobian = torch.func.jacrev(rule)(products)
    assert_close(jacobian + jacobian.mT, expected, rtol=1e-5, atol=1e-6)
    assert tasks == 1 or expected.abs().max() > 0.01
    watched = products.clone().requires_grad_()
    (found,) = torch.autograd.grad(rule(watched).sum(), watched)
    # Each way takes of two equal entries what it needs: their sum is the derivative.
    assert_close(found + found.mT, expected.sum(0), rtol=1e-5, atol=1e-6)


# torch's own, of what it takes for derivatives forward.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@every_rule
def test_rules_have_their_derivatives_forward(rule: Weighting, tasks: int) -> None:
    products = in_conflict(tasks, 0)
    direction = products.flip(0) + products.flip(0).mT
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(products, direction)  # type: ignore[no-untyped-call]  # torch's
        _, along = forward_ad.unpack_dual(rule(dual))  # type: ignore[no-untyped-call]  # torch's
    expected = (steepness(rule, products) * direction).sum((1, 2)) / 2
    assert_close(along, expected, rtol=1e-5, atol=1e-6)


@every_rule
def test_a_gramian_without_values_has_weights_without_values(
    rule: Weighting, tasks: int
) -> None:
    with FakeTensorMode():
        weights = rule(torch.eye(tasks, dtype=torch.float64))
    assert weights.shape == (tasks,)


def test_what_a_gradient_follows_is_pivoting_too() -> None:
    """The method of a device takes many steps, and autograd would keep them all."""
    watched = in_conflict(12, 0).requires_grad_()
    with patch.object(pivoting, "pivoted", wraps=pivoting.pivoted) as spy:
        geometry.gh(watched)
    assert spy.called


def test_projections_of_some_on_some_have_their_derivatives() -> None:
    def weights(products: Tensor) -> Tensor:
        return geometry.dual_cone(products, rows=[0, 3], protected=[4, 1, 2]).sum(0)

    products = in_conflict(5, 0)
    jacobian = torch.func.jacrev(weights)(products)
    expected = steepness(weights, products)
    assert expected.abs().max() > 0.01
    assert_close(jacobian + jacobian.mT, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", [(0, 0), (1, 2), (-1, -2)])
@pytest.mark.parametrize("rule", [*RULES])
def test_no_derivative_of_two_gradients_in_line_is_nan(
    rule: Weighting, second: tuple[float, float]
) -> None:
    rows = torch.tensor([(1, 2), second], dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(rule(rows @ rows.mT).sum(), rows)
    assert slope.tolist() == [[0, 0], [0, 0]]


def test_a_zero_gradient_spoils_no_derivative_of_others() -> None:
    products = torch.zeros(4, 4, dtype=torch.float64)
    products[:3, :3] = in_conflict(3, 0)
    expected = torch.zeros(4, 4, 4, dtype=torch.float64)
    expected[:3, :3, :3] = torch.func.jacrev(geometry.gh)(products[:3, :3])
    assert_close(torch.func.jacrev(geometry.gh)(products), expected)


@every_rule
def test_rules_compile_to_the_same_graphs_for_all_values(
    rule: Weighting, tasks: int
) -> None:
    """As one graph, but for GH of more than eight tasks: its steps run as they are."""
    torch._dynamo.reset()
    sizes = []

    def run_as_it_is(module: torch.fx.GraphModule, _: list[Tensor]) -> Weighting:
        sizes.append(len(module.graph.nodes))
        return module.forward

    whole = rule is not geometry.gh or tasks <= 8
    compiled = torch.compile(rule, fullgraph=whole, backend=run_as_it_is)
    assert_close(compiled(in_conflict(tasks, 0)), rule(in_conflict(tasks, 0)))
    assert sum(sizes) < 300
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            products = in_conflict(tasks, seed)
            assert_close(compiled(products), rule(products))


@pytest.mark.slow
def test_gh_of_many_tasks_is_exported() -> None:
    class Weights(nn.Module):
        def forward(self, products: Tensor) -> Tensor:
            return geometry.gh(products)

    exported = torch.export.export(Weights(), (in_conflict(9, 0),), strict=False)
    products = in_conflict(9, 1)
    assert_close(exported.module()(products), geometry.gh(products))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("rule", [geometry.gh, geometry.ghpp])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor_compiles_rules(rule: Weighting, tasks: int) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(rule, fullgraph=True)
    # Not what another process has compiled, maybe for other instructions.
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert_close(compiled(in_conflict(tasks, 0)), rule(in_conflict(tasks, 0)))


@pytest.mark.parametrize("rule", [geometry.gh, geometry.ghpp, geometry.ghpp_printed])
def test_a_gramian_that_requires_grad_is_taken_without_a_warning(
    rule: Weighting,
) -> None:
    tasks = 2 if rule is geometry.ghpp_printed else 12
    products = torch.eye(tasks, dtype=torch.float64)
    products[0, 1] = products[1, 0] = -0.5
    assert_close(rule(products.clone().requires_grad_()).detach(), rule(products))


@pytest.mark.parametrize("tasks", [3, 12])
def test_a_gramian_of_eight_bits_is_taken(tasks: int) -> None:
    products = torch.eye(tasks)
    products[0, 1] = products[1, 0] = -0.5
    found = geometry.gh(products.to(torch.float8_e4m3fn))
    assert found.dtype == torch.float8_e4m3fn
    assert_close(found.float(), geometry.gh(products), rtol=0.1, atol=0)
