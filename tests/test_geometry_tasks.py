"""More than two tasks: the dual cone of GH and the frame of GH++.

Each test is named after a sentence of the design or a promise of a docstring.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ghopt import geometry
from tests import reference
from tests.reference import Vector, dot, error, gramian, harmonized, norm, vectors
from tests.strategies import (
    agreeing_tasks,
    exact_pairs,
    fewer_examples,
    independent,
    jacobians,
    many_tasks,
    mirrored,
    nearly_dependent,
    permutations,
)

pytestmark = pytest.mark.usefixtures("place")

Rule = Callable[[Tensor], Tensor]

EPS = torch.finfo(torch.float64).eps
COEFFICIENTS: dict[str, Rule] = {
    "gh": geometry.gh_coefficients,
    "ghpp": geometry.ghpp_coefficients,
}
WEIGHTS: dict[str, Rule] = {"gh": geometry.gh, "ghpp": geometry.ghpp}
both_names = pytest.mark.parametrize("name", ["gh", "ghpp"])
both_rules = pytest.mark.parametrize("rule", COEFFICIENTS.values(), ids=["gh", "ghpp"])

# Each conflicts with each.
REPELLING = torch.tensor([[-1, 0, 2], [1, 1, 0], [0, -1, -1]], dtype=torch.float64)
# Without its negative cosines this frame has no place in any space.
SHRINKING = torch.tensor(
    [[1, 0, 1, -2], [2, -2, 1, -1], [-1, -3, 0, 3], [1, -3, 1, 1]], dtype=torch.float64
)
# Task 3 is 2^-7 off the plane of tasks 1 and 2, with which it does not conflict: a root
# of a product of roots that squares this small number loses it.
NEARLY_DEPENDENT = torch.tensor(
    [[3, 0, 0, 0], [2, 3, 0, 0], [3, 2, 2**-7, 0], [-3, 3, 0, 2]], dtype=torch.float64
)

# The cosines aimed at have an eigenvalue of exactly zero, of which rounding may leave
# 1e-17. Its root, 3e-9, cost half of the digits.
SINGULAR_AIM = torch.tensor(
    [[1, 0, 0, 0], [0, 1, 0, 0], [3, -2, 3, 0], [3, 2, 0, 1 / 16]], dtype=torch.float64
)


def rounding(jacobian: Tensor) -> float:
    """Error that a rounding of the cosines causes: eps over how much they span.

    The span is the smallest eigenvalue, other than zero, of the cosines of any of the
    tasks, since any may decide a projection. Times the number of tasks, whose roundings
    add up, and 8 for the roundings of each.
    """
    return 8 * len(jacobian) * EPS / reference.span(jacobian)


def frame_rounding(jacobian: Tensor) -> float:
    """The same for GH++, with the root of the cosines that it aims at.

    An error eps of a matrix with the eigenvalue p is eps / sqrt(p) in its root, and
    sqrt(eps) where p is itself no more than that.
    """
    noise = len(jacobian) * EPS
    least = reference.aimed_span(jacobian)
    return rounding(jacobian) + min(math.sqrt(noise), noise / math.sqrt(least))


LAWS: dict[Rule, Callable[[Tensor], float]] = {
    geometry.gh_coefficients: rounding,
    geometry.ghpp_coefficients: frame_rounding,
}


def assert_close_in_lengths(
    actual: list[Vector], expected: list[Vector], jacobian: Tensor, tolerance: float
) -> None:
    """Compare relative to the lengths of the original gradients."""
    for result, value, row in zip(actual, expected, vectors(jacobian), strict=True):
        if any(row):
            assert error(result, value, row) <= tolerance
        else:
            assert not any(result)


# Both rules


@both_names
@given(jacobians(3, 9))
def test_weights_are_the_column_sums_of_the_coefficients(
    name: str, jacobian: Tensor
) -> None:
    products = gramian(jacobian)
    coefficients = COEFFICIENTS[name](products)
    # A sum of K numbers, in any order.
    allowance = len(jacobian) * EPS * coefficients.abs().sum(0)
    difference = WEIGHTS[name](products) - coefficients.sum(0)
    assert (difference.abs() <= allowance).all()


@both_names
@given(agreeing_tasks())
def test_without_conflict_there_is_no_action(name: str, jacobian: Tensor) -> None:
    products = gramian(jacobian)
    identity = torch.eye(len(products), dtype=torch.float64)
    assert COEFFICIENTS[name](products).equal(identity)
    assert WEIGHTS[name](products).equal(identity.sum(0))


@both_rules
@pytest.mark.parametrize("tasks", [3, 5, 9])
@fewer_examples
@given(data=st.data())
def test_a_zero_gradient_conflicts_with_nothing(
    rule: Rule, tasks: int, data: st.DataObject
) -> None:
    others = data.draw(jacobians(tasks - 1, tasks - 1))
    zero = data.draw(st.integers(0, tasks - 1))
    rest = [task for task in range(tasks) if task != zero]
    jacobian = others.new_zeros(tasks, others.shape[1])
    jacobian[rest] = others
    coefficients = rule(gramian(jacobian))
    alone = torch.eye(tasks, dtype=torch.float64)[zero]
    assert coefficients[zero].equal(alone)
    assert coefficients[:, zero].equal(alone)
    with_it = harmonized(coefficients[rest][:, rest], others)
    without = harmonized(rule(gramian(others)), others)
    assert_close_in_lengths(with_it, without, others, 2 * LAWS[rule](others))


@both_rules
@given(jacobians(2, 5), permutations(5))
def test_the_order_of_the_tasks_does_not_matter(
    rule: Rule, jacobian: Tensor, order: list[int]
) -> None:
    order = [task for task in order if task < len(jacobian)]
    straight = harmonized(rule(gramian(jacobian)), jacobian)
    shuffled = harmonized(rule(gramian(jacobian[order])), jacobian[order])
    expected = [straight[task] for task in order]
    assert_close_in_lengths(
        shuffled, expected, jacobian[order], 2 * LAWS[rule](jacobian)
    )


@both_rules
@pytest.mark.parametrize("tasks", [3, 8, 12])
@fewer_examples
@given(data=st.data())
def test_permuting_the_tasks_permutes_the_coefficients(
    rule: Rule, tasks: int, data: st.DataObject
) -> None:
    jacobian = data.draw(many_tasks(tasks, tasks + 2))
    order = data.draw(permutations(tasks))
    products = gramian(jacobian)
    expected = rule(products)[order][:, order]
    # Gradients at random in two dimensions to spare span enough for 1e-9.
    assert_close(rule(products[order][:, order]), expected, rtol=1e-9, atol=1e-9)


@both_rules
@given(mirrored(jacobians(2, 4)))
def test_the_choice_of_axes_in_parameter_space_does_not_matter(
    rule: Rule, both: tuple[Tensor, Tensor]
) -> None:
    jacobian, image = both
    before, after = rule(gramian(jacobian)), rule(gramian(image))
    # The coefficients tell it all, C (J Q) = (C J) Q, except where they are not unique.
    expected, actual = harmonized(before, jacobian), harmonized(after, jacobian)
    assert_close_in_lengths(actual, expected, jacobian, 2 * LAWS[rule](jacobian))


@both_rules
@pytest.mark.parametrize("tasks", [3, 9])
@fewer_examples
@given(data=st.data())
def test_a_task_of_another_size_is_harmonized_alike_at_that_size(
    rule: Rule, tasks: int, data: st.DataObject
) -> None:
    products = gramian(data.draw(many_tasks(tasks, tasks)))
    exponents = st.lists(st.integers(-20, 20), min_size=tasks, max_size=tasks)
    common = data.draw(st.sampled_from([0, -60, 40]))
    sizes = torch.tensor([2.0**e for e in data.draw(exponents)]).double() * 2.0**common
    scaled = rule(sizes.outer(sizes) * products)
    # Powers of two round nothing: row i of C J is task i's, times its own size.
    expected = sizes[:, None] * rule(products) / sizes
    assert_close(scaled, expected, rtol=4 * EPS, atol=0)


@both_rules
@given(jacobians(2, 4), st.integers(0, 3))
def test_duplicates_are_harmonized_alike(
    rule: Rule, jacobian: Tensor, task: int
) -> None:
    task %= len(jacobian)
    doubled = torch.cat([jacobian, jacobian[task : task + 1]])
    after = harmonized(rule(gramian(doubled)), doubled)
    tolerance = 2 * LAWS[rule](doubled)
    assert_close_in_lengths([after[task]], [after[-1]], doubled[task:][:1], tolerance)


@pytest.mark.parametrize("extra", [1, 3, 7])
@both_rules
@fewer_examples
@given(pair=exact_pairs(), at=st.sampled_from([(0, 1), (2, 1), (0, 2)]))
def test_a_pair_beside_orthogonal_tasks_is_harmonized_as_a_pair(
    rule: Rule, pair: Tensor, extra: int, at: tuple[int, int]
) -> None:
    dims = pair.shape[1]
    jacobian = torch.zeros(2 + extra, dims + extra, dtype=torch.float64)
    jacobian[at, :dims] = pair
    others = [task for task in range(2 + extra) if task not in at]
    jacobian[others, dims:] = torch.eye(extra, dtype=torch.float64)
    block = rule(gramian(jacobian))[at, :][:, at]
    s = reference.span(pair)
    assert_close_in_lengths(
        harmonized(block, pair),
        harmonized(rule(gramian(pair)), pair),
        pair,
        1e-12 + (8 * len(jacobian) * EPS / s if rule is COEFFICIENTS["ghpp"] else 0),
    )


# GH: the dual cone


# Zero gradients conflict with nothing, but nine tasks are too many to try all sets of.
@pytest.mark.parametrize("at_least", [1, 9])
@given(jacobian=jacobians(1, 4))
def test_gh_projects_on_the_dual_cone(jacobian: Tensor, at_least: int) -> None:
    zeros = jacobian.new_zeros(max(0, at_least - len(jacobian)), jacobian.shape[1])
    coefficients = geometry.gh_coefficients(gramian(torch.cat([jacobian, zeros])))
    block = coefficients[: len(jacobian), : len(jacobian)]
    expected = reference.dual_cone_projections(jacobian)
    actual = harmonized(block, jacobian)
    assert_close_in_lengths(actual, expected, jacobian, rounding(jacobian))


def test_gh_of_eight_tasks_survives_exactly_opposite_ones() -> None:
    """A singular set may solve to 1e17 times both, where no conflict is left to see."""
    rows = [[3, 0, 0, 0], [-3, 1, -1, 0], [-2, 3, 0, 1], [0, 0, 1, 2]]
    jacobian = torch.tensor([*rows, [512, -768, 0, -256]], dtype=torch.float64)
    products = torch.zeros(8, 8, dtype=torch.float64)
    products[:5, :5] = gramian(jacobian)
    actual = harmonized(geometry.gh_coefficients(products)[:5, :5], jacobian)
    expected = reference.dual_cone_projections(jacobian)
    assert_close_in_lengths(actual, expected, jacobian, rounding(jacobian))


def test_gh_of_nine_tasks_survives_a_duplicate_beside_nearly_opposite_ones() -> None:
    """The duplicate's conflict is noise of large multipliers, not a conflict."""
    jacobian = torch.zeros(9, 2, dtype=torch.float64)
    rows = [[0, 1], [0, -2], [-2, -1], [0, 1], [2**-8, -1 - 2**-8]]
    jacobian[:5] = torch.tensor(rows)
    assert geometry.gh(gramian(jacobian)).isfinite().all()


@pytest.mark.parametrize("tasks", range(2, 9))
@fewer_examples
@given(data=st.data())
def test_gh_is_the_solution_of_a_non_negative_least_squares_problem(
    tasks: int, data: st.DataObject
) -> None:
    jacobian = data.draw(many_tasks(tasks, tasks))
    actual = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
    expected = reference.nnls_projections(jacobian)
    assert_close_in_lengths(actual, expected, jacobian, 1e-9)


@pytest.mark.parametrize("tasks", [9, 10, 16, 32])
@pytest.mark.parametrize("dims", [0.5, 1, 2])
def test_gh_of_many_tasks_has_the_documented_accuracy(tasks: int, dims: float) -> None:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        shape = (tasks, int(tasks * dims))
        jacobian = torch.randn(shape, generator=generator, dtype=torch.float64)
        # Two singular ends: a duplicate, and two nearly opposite gradients. Closer yet
        # the cosines of some sets have an eigenvalue below 1e-7.
        jacobian[1] = jacobian[0]
        jacobian[-1] = 2.0**-6 * jacobian[-1] - jacobian[0]
        actual = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
        expected = reference.nnls_projections(jacobian)
        assert_close_in_lengths(actual, expected, jacobian, 1e-9)


@given(jacobians(1, 5))
def test_the_gh_sum_conflicts_with_no_task(jacobian: Tensor) -> None:
    (update,) = harmonized(geometry.gh(gramian(jacobian))[None], jacobian)
    rows = vectors(jacobian)
    allowance = rounding(jacobian) * sum(map(norm, rows))
    assert all(dot(update, row) >= -allowance * norm(row) for row in rows)


@pytest.mark.parametrize("tasks", [3, 4, 9])
@fewer_examples
@given(data=st.data())
def test_the_gh_sum_conflicts_with_no_task_however_dependent(
    tasks: int, data: st.DataObject
) -> None:
    jacobian = data.draw(nearly_dependent(tasks))
    (update,) = harmonized(geometry.gh(gramian(jacobian))[None], jacobian)
    rows = vectors(jacobian)
    reach = sum(map(norm, rows))
    # A Gramian cannot tell gradients from dependent ones at sqrt(eps) = 1.5e-8.
    assert all(dot(update, row) >= -1e-7 * reach * norm(row) for row in rows)


# Pivoting meets systems that the enumeration avoids: noise of the longest gradients.
@pytest.mark.parametrize(("tasks", "noise"), [(3, 0.0), (4, 0.0), (9, 1e-7)])
@fewer_examples
@given(data=st.data())
def test_gh_never_lengthens_a_gradient_however_dependent(
    tasks: int, noise: float, data: st.DataObject
) -> None:
    jacobian = data.draw(nearly_dependent(tasks))
    after = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
    before = vectors(jacobian)
    reach = sum(map(norm, before))
    for gradient, now in zip(before, after, strict=True):
        assert norm(now) <= norm(gradient) * (1 + 1e-7) + noise * reach


@pytest.mark.parametrize("tasks", [3, 8, 9])
@fewer_examples
@given(data=st.data())
def test_the_gh_diagonal_is_1_and_nothing_is_negative(
    tasks: int, data: st.DataObject
) -> None:
    products = gramian(data.draw(jacobians(tasks, tasks)))
    coefficients = geometry.gh_coefficients(products)
    assert (coefficients >= 0).all()
    assert (coefficients.diagonal() == 1).all()


def test_rounding_leaves_no_coefficient_below_zero() -> None:
    rows = [[-1, -2, -1], [3, 1, -2], [1, 3, -2], [-2, 0, 2]]
    jacobian = torch.tensor(rows, dtype=torch.float64)
    assert (geometry.gh_coefficients(gramian(jacobian)) >= 0).all()


def test_gh_adds_no_multiple_of_a_gradient_to_itself() -> None:
    """Where nothing remains, a multiple of the whole combination would do as well."""
    jacobian = torch.zeros(8, 4, dtype=torch.float64)
    rows = [[1, -2, 2, 2], [-1, 2, -3, 0], [1, -1, 2, -1], [-3, 2, -3, 0]]
    jacobian[4:] = torch.tensor(rows)
    assert (geometry.gh_coefficients(gramian(jacobian)).diagonal() == 1).all()


@given(jacobians(2, 5))
def test_gh_leaves_alone_whom_nobody_opposes(jacobian: Tensor) -> None:
    products = gramian(jacobian)
    unopposed = (products >= 0).all(1)
    identity = torch.eye(len(products), dtype=torch.float64)
    assert geometry.gh_coefficients(products)[unopposed].equal(identity[unopposed])


@pytest.mark.parametrize("sequential", [True, False])
def test_gh_is_not_pcgrad_of_three_tasks(sequential: bool) -> None:
    rows = vectors(REPELLING)
    (update,) = harmonized(geometry.gh(gramian(REPELLING))[None], REPELLING)
    assert all(dot(update, row) >= -8 * EPS for row in rows)
    for order in itertools.permutations(range(3)):
        other = reference.pcgrad(REPELLING[list(order)], sequential=sequential)
        assert any(dot(other, row) < -0.05 for row in rows)


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]],
        [[2.0, 0.0], [-1.0, 3.0], [-1.0, -3.0]],
        [[1.0], [-3.0], [2.0]],
    ],
    ids=["axes", "star", "line"],
)
def test_nothing_remains_where_every_direction_opposes_a_task(
    rows: list[list[float]],
) -> None:
    jacobian = torch.tensor(rows, dtype=torch.float64)
    update = geometry.gh(gramian(jacobian)) @ jacobian
    assert_close(update, torch.zeros_like(update), rtol=0, atol=32 * EPS)


# GH++: the frame


@given(jacobians(3, 4) | independent(3, 4))
@example(NEARLY_DEPENDENT)
def test_ghpp_turns_the_frame_of_unit_gradients(jacobian: Tensor) -> None:
    actual = harmonized(geometry.ghpp_coefficients(gramian(jacobian)), jacobian)
    expected = reference.moved_frame(jacobian)
    assert_close_in_lengths(actual, expected, jacobian, frame_rounding(jacobian))


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))], ids=str)
@pytest.mark.parametrize("size", [1, 3, 0.7])
def test_ghpp_takes_no_root_of_rounding(order: tuple[int, ...], size: float) -> None:
    jacobian = size * SINGULAR_AIM[list(order)]
    actual = harmonized(geometry.ghpp_coefficients(gramian(jacobian)), jacobian)
    expected = reference.moved_frame(jacobian)
    assert_close_in_lengths(actual, expected, jacobian, rounding(jacobian) / 100)


@given(independent(3, 5))
def test_ghpp_norms_are_kept_and_no_two_gradients_conflict(jacobian: Tensor) -> None:
    after = harmonized(geometry.ghpp_coefficients(gramian(jacobian)), jacobian)
    tolerance = 2 * frame_rounding(jacobian)
    for before, now in zip(vectors(jacobian), after, strict=True):
        assert abs(norm(now) / norm(before) - 1) <= tolerance
    for first, second in itertools.combinations(after, 2):
        assert dot(first, second) >= -tolerance * norm(first) * norm(second)


@pytest.mark.parametrize("jacobian", [REPELLING, SHRINKING], ids=["exact", "shrinking"])
def test_ghpp_reaches_the_cosines_it_aims_at(jacobian: Tensor) -> None:
    after = harmonized(geometry.ghpp_coefficients(gramian(jacobian)), jacobian)
    aim = reference.clipped_cosines(jacobian)
    for (i, first), (j, second) in itertools.product(enumerate(after), repeat=2):
        cosine = dot(first, second) / (norm(first) * norm(second))
        assert abs(cosine - aim[i, j]) <= 2 * frame_rounding(jacobian)


@given(independent(3, 4))
def test_ghpp_moves_the_frame_as_little_as_possible(jacobian: Tensor) -> None:
    after = harmonized(geometry.ghpp_coefficients(gramian(jacobian)), jacobian)
    before = vectors(jacobian)
    moves = map(error, after, before, before)
    least = reference.least_movement(jacobian)
    # Errors change the sum of squares in proportion to the moves, 2 at most each.
    allowance = 4 * len(jacobian) * frame_rounding(jacobian)
    assert sum(move**2 for move in moves) == pytest.approx(least, rel=0, abs=allowance)


@pytest.mark.parametrize("tasks", [3, 4, 9])
@fewer_examples
@given(data=st.data())
def test_ghpp_never_blows_up_a_gradient_however_dependent(
    tasks: int, data: st.DataObject
) -> None:
    jacobian = data.draw(nearly_dependent(tasks))
    after = harmonized(geometry.ghpp_coefficients(gramian(jacobian)), jacobian)
    for before, now in zip(vectors(jacobian), after, strict=True):
        # The square is at most the largest eigenvalue of K clipped cosines. Where the
        # plane is given up the Gramian's rounding has grown to 3 eps / 1e-12.
        assert norm(now) <= norm(before) * (math.sqrt(tasks) + 7e-4 * tasks)


def test_ghpp_may_lengthen_a_dependent_gradient() -> None:
    """A known limit, not a promise: if it ever fails, correct the docstring."""
    jacobian = torch.tensor([[1, 0], [0, 1], [-1, 1]], dtype=torch.float64)
    first = geometry.ghpp_coefficients(gramian(jacobian))[1] @ jacobian
    assert first.norm() > 1.06


def test_ghpp_of_opposite_gradients_keeps_their_parts_in_line() -> None:
    jacobian = torch.tensor([[3.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    after = geometry.ghpp_coefficients(gramian(jacobian)) @ jacobian
    jacobian[:2] *= math.sqrt(0.5)
    assert_close(after, jacobian, rtol=0, atol=32 * EPS)


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [(torch.float64, 0.9e-6, 1.5e-6), (torch.float32, 6e-4, 1e-3)],
    ids=str,
)
def test_gradients_are_opposite_up_to_the_documented_gap(
    dtype: torch.dtype, inside: float, outside: float
) -> None:
    for gap, lost in ((inside, True), (outside, False)):
        products = torch.eye(3, dtype=dtype)
        products[:2, :2] = torch.tensor([[1, -1], [-1, 1 + gap**2]], dtype=dtype)
        # Sideways parts need coefficients of one over the gap.
        assert (geometry.ghpp(products)[0] < 2) == lost
