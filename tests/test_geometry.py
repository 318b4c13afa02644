"""Each test is named after a sentence of the paper or a promise of a docstring.

Two tasks here, and what holds for every rule; test_geometry_tasks.py has more tasks.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from ghopt import geometry
from tests import reference
from tests.reference import angle, dot, error, gramian, harmonized, mp, norm, vectors
from tests.strategies import (
    agreeing,
    conflicting,
    exact_pairs,
    fewer_examples,
    lams,
    mirrored,
    nearly_opposite,
    norms,
    opposite,
    pairs,
    too_close,
)

pytestmark = pytest.mark.usefixtures("place")

Rule = Callable[[Tensor], Tensor]

EPS = torch.finfo(torch.float64).eps
# What the specification grants at gaps of at least 1e-3.
EXACT = 1e-12
# GH is a sum of two terms no longer than the gradient: some roundings of that length.
ROUNDINGS = 8 * EPS
# Swapping numbers rounds nothing, but 1 - lam does: an angle of eps, before the division
# by the sine, in the coefficients of unit gradients.
SHARES = 4 * EPS

COEFFICIENTS: dict[str, Rule] = {
    "gh": geometry.gh_coefficients,
    "ghpp": geometry.ghpp_coefficients,
    "ghpp_balanced": geometry.ghpp_balanced_coefficients,
    "ghpp_printed": geometry.ghpp_printed_coefficients,
}
WEIGHTS: dict[str, Rule] = {
    "gh": geometry.gh,
    "ghpp": geometry.ghpp,
    "ghpp_balanced": geometry.ghpp_balanced,
    "ghpp_printed": geometry.ghpp_printed,
}
every_name = pytest.mark.parametrize("name", list(COEFFICIENTS))
every_rule = pytest.mark.parametrize(
    "rule", COEFFICIENTS.values(), ids=COEFFICIENTS.keys()
)
FUNCTIONS = [*WEIGHTS.values(), *COEFFICIENTS.values()]
PAIRS_ONLY = {
    geometry.ghpp_balanced,
    geometry.ghpp_balanced_coefficients,
    geometry.ghpp_printed,
    geometry.ghpp_printed_coefficients,
}
every_function = pytest.mark.parametrize("rule", FUNCTIONS)
symmetric_rule = pytest.mark.parametrize("name", ["gh", "ghpp", "ghpp_balanced"])
with_lam = pytest.mark.parametrize(
    "rule",
    [
        geometry.ghpp,
        geometry.ghpp_coefficients,
        geometry.ghpp_printed,
        geometry.ghpp_printed_coefficients,
    ],
)


def every_function_of(*sizes: int) -> pytest.MarkDecorator:
    cases = [
        pytest.param(rule, tasks, id=f"{tasks}-{rule.__name__}")
        for rule in FUNCTIONS
        for tasks in sizes
        if tasks <= 2 or rule not in PAIRS_ONLY
    ]
    return pytest.mark.parametrize(("rule", "tasks"), cases)


conflicting_pairs = pairs(conflicting)
any_pairs = pairs(conflicting | agreeing | too_close | opposite)


def gap(jacobian: Tensor) -> float:
    return float(mp.pi - angle(*vectors(jacobian)))


def rounding(jacobian: Tensor) -> float:
    """Error that GH++ owes to the Gramian, whose entries are off by eps / 2 each.

    Its sine, sqrt(1 - cos^2), is off by (3/2) eps / sine at worst, relative 3/2 eps /
    sine^2, and stands under both coefficients, whose vectors nearly cancel to 1/sqrt 2
    of the norm at least; twice that leaves room for nothing but further roundings.
    """
    return EXACT + 3 * EPS / math.sin(gap(jacobian)) ** 2


def assert_same_direction(actual: reference.Vector, expected: reference.Vector) -> None:
    # 1e-12 of either length, at most, is an angle of 1e-12.
    assert angle(actual, expected) <= EXACT


def assert_same_in_unit_gradients(
    actual: Tensor, expected: Tensor, products: Tensor, tolerance: float
) -> None:
    """Compare the coefficients that unit gradients would have, with their largest."""
    norms = products.diagonal().sqrt()
    difference = (actual - expected) * norms / norms[:, None]
    largest = (expected * norms / norms[:, None]).abs().max()
    assert difference.abs().max() <= tolerance * largest


# Every rule


@every_name
@fewer_examples
@given(any_pairs)
def test_weights_are_the_column_sums_of_the_coefficients(
    name: str, jacobian: Tensor
) -> None:
    products = gramian(jacobian)
    sums = COEFFICIENTS[name](products).sum(0)
    # Two terms of one sign: the order of a sum cannot matter beyond one rounding.
    assert_close(WEIGHTS[name](products), sums, rtol=2 * EPS, atol=0)


@every_rule
@fewer_examples
@given(pairs(agreeing))
def test_without_conflict_there_is_no_action(rule: Rule, jacobian: Tensor) -> None:
    assert rule(gramian(jacobian)).equal(torch.eye(2, dtype=torch.float64))


@every_rule
def test_a_right_angle_is_no_conflict(rule: Rule) -> None:
    products = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert rule(products).equal(torch.eye(2))


@every_rule
def test_a_single_task_is_left_alone(rule: Rule) -> None:
    assert rule(torch.tensor([[4.0]])).tolist() == [[1.0]]
    assert rule(torch.tensor([[0.0]])).tolist() == [[1.0]]


@every_rule
@fewer_examples
@given(sizes=st.tuples(st.floats(0, 1e18), st.just(0.0)), swapped=st.booleans())
def test_a_zero_gradient_conflicts_with_nothing(
    rule: Rule, sizes: tuple[float, float], swapped: bool
) -> None:
    diagonal = torch.tensor(sizes[::-1] if swapped else sizes, dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64)
    assert rule(diagonal.square().diag()).equal(identity)
    # -0.0 is what minus nothing leaves.
    assert rule(diagonal.square().diag() - 0.0 * (1 - identity)).equal(identity)


@symmetric_rule
@given(any_pairs)
def test_the_order_of_the_tasks_does_not_matter(name: str, jacobian: Tensor) -> None:
    products = gramian(jacobian)
    swapped = COEFFICIENTS[name](products.flip(0, 1))
    assert_same_in_unit_gradients(
        swapped.flip(0, 1), COEFFICIENTS[name](products), products, SHARES
    )


@given(any_pairs, lams)
def test_swapping_tasks_swaps_the_shares(jacobian: Tensor, lam: float) -> None:
    products = gramian(jacobian)
    swapped = geometry.ghpp_coefficients(products.flip(0, 1), 1 - lam)
    expected = geometry.ghpp_coefficients(products, lam)
    assert_same_in_unit_gradients(swapped.flip(0, 1), expected, products, SHARES)


@every_rule
@given(any_pairs, st.tuples(st.integers(-15, 15), st.integers(-15, 15)))
def test_a_task_of_another_size_is_harmonized_alike_at_that_size(
    rule: Rule, jacobian: Tensor, exponents: tuple[int, int]
) -> None:
    if rule is geometry.ghpp_balanced_coefficients:  # which looks at the sizes
        exponents = (exponents[0], exponents[0])
    sizes = torch.tensor([2.0**exponent for exponent in exponents]).double()
    products = gramian(jacobian)
    scaled = rule(sizes.outer(sizes) * products)
    # Powers of two round nothing: row i of C J is task i's, times its own size.
    expected = sizes[:, None] * rule(products) / sizes
    assert_close(scaled, expected, rtol=4 * EPS, atol=0)


@every_rule
@fewer_examples
@given(pairs(conflicting), st.integers(-40, 40))
def test_a_common_scale_does_not_matter(
    rule: Rule, jacobian: Tensor, exponent: int
) -> None:
    unit = jacobian / 2.0 ** round(math.log2(float(jacobian.abs().max())))
    scaled = rule(gramian(unit * 2.0**exponent))
    assert_close(scaled, rule(gramian(unit)), rtol=4 * EPS, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e18])
@every_rule
def test_the_ends_of_the_scale_are_as_good_as_its_middle(
    rule: Rule, scale: float
) -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    scaled = rule(gramian(jacobian * scale))
    # 1e-25 is no power of two: its roundings, at an angle without any danger.
    assert_close(scaled, rule(gramian(jacobian)), rtol=1e-14, atol=0)


@every_rule
@fewer_examples
@given(mirrored(exact_pairs()))
def test_the_choice_of_axes_in_parameter_space_does_not_matter(
    rule: Rule, both: tuple[Tensor, Tensor]
) -> None:
    before, after = both
    # The coefficients tell it all: C (J Q) = (C J) Q. They are up to 1e3 times larger
    # than what they harmonize, and that much more exact.
    coefficients = rule(gramian(after)), rule(gramian(before))
    assert_close(*coefficients, rtol=EXACT, atol=0)


@every_function_of(1, 2, 3, 9)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_entry_makes_the_weights_non_finite(
    rule: Rule, tasks: int, value: float
) -> None:
    for position in itertools.product({0, tasks - 1}, repeat=2):
        products = torch.eye(tasks)
        products[position] = value
        # Of coefficients the column sums are the weights; weights are their own.
        weights = rule(products).reshape(-1, tasks).sum(0)
        assert not weights.isfinite().any(), position


@every_function_of(1, 2, 3, 5, 8, 12)
def test_no_value_is_read_back_to_the_host(rule: Rule, tasks: int) -> None:
    result = rule(torch.empty(tasks, tasks, device="meta"))
    assert result.device.type == "meta"
    is_weights = rule in WEIGHTS.values()
    assert result.shape == ((tasks,) if is_weights else (tasks, tasks))


@every_function_of(1, 2, 3, 9)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_results_have_the_dtype_of_the_gramian_and_its_accuracy(
    rule: Rule, tasks: int, dtype: torch.dtype
) -> None:
    products = torch.full((tasks, tasks), -0.0625).fill_diagonal_(1.0)
    result = rule(products.to(dtype))
    assert result.dtype == dtype
    # The entries are exact in every dtype, so only the result is rounded, once.
    assert result.equal(rule(products.double()).to(dtype))


@every_function
def test_the_gramian_is_left_as_it_was(rule: Rule) -> None:
    products = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    kept = products.clone()
    result = rule(products)
    assert products.equal(kept)
    assert not result.requires_grad
    with torch.inference_mode():
        assert rule(products).equal(result)


@every_function
@pytest.mark.parametrize(
    "shape", [(), (4,), (2, 3), (3, 2), (0, 0), (1, 2, 2)], ids=str
)
def test_a_gramian_that_is_not_square_is_refused_with_its_shape(
    rule: Rule, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="gramian") as refusal:
        rule(torch.ones(shape))
    assert str(list(shape)) in str(refusal.value) or str(shape) in str(refusal.value)


@every_function
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_gramian_that_is_not_floating_is_refused_with_its_dtype(
    rule: Rule, dtype: torch.dtype
) -> None:
    with pytest.raises(ValueError, match=rf"gramian.*{dtype}"):
        rule(torch.ones(2, 2).to(dtype))


@with_lam
@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("lam", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_lam_outside_the_unit_interval_is_refused_with_its_value(
    rule: Callable[..., Tensor], lam: float, tasks: int
) -> None:
    with pytest.raises(ValueError, match=rf"lam.*{lam}"):
        rule(torch.eye(tasks), lam)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rule", [geometry.ghpp, geometry.ghpp_coefficients])
def test_shares_are_for_two_tasks_only(rule: Callable[..., Tensor], lam: float) -> None:
    with pytest.raises(ValueError, match=rf"lam.*{lam}"):
        rule(torch.eye(3), lam)


@pytest.mark.parametrize("rule", [rule for rule in FUNCTIONS if rule in PAIRS_ONLY])
def test_balanced_and_printed_are_for_two_tasks_only(rule: Rule) -> None:
    with pytest.raises(ValueError, match=r"gramian.* 3"):
        rule(torch.eye(3))


@every_rule
@fewer_examples
@given(norms, st.floats(0.1, math.pi / 2))
def test_float32_is_as_accurate_as_its_gramian(
    rule: Rule, norms: tuple[float, float], gap: float
) -> None:
    first, second = norms
    rows = [[first, 0.0], [-second * math.cos(gap), second * math.sin(gap)]]
    products = gramian(torch.tensor(rows))
    single = rule(products.float())
    # The cosine is off by 2^-23 at most, which a gap of 0.1 multiplies by 1 / 0.1^2.
    assert_same_in_unit_gradients(single.double(), rule(products), products, 1.5e-5)


# GH


@given(conflicting_pairs)
def test_gh_is_theorem_1(jacobian: Tensor) -> None:
    actual = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
    for result, expected in zip(actual, reference.theorem_1(jacobian), strict=True):
        assert error(result, expected, expected) <= EXACT


@given(pairs(too_close | opposite))
def test_gh_is_theorem_1_to_rounding_up_to_opposite_gradients(jacobian: Tensor) -> None:
    actual = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
    expected = reference.theorem_1(jacobian)
    for i, gradient in enumerate(vectors(jacobian)):
        assert error(actual[i], expected[i], gradient) <= ROUNDINGS


@given(conflicting_pairs)
def test_gh_weights_are_eq_42(jacobian: Tensor) -> None:
    g1, g2 = vectors(jacobian)
    tau = [1 - dot(g1, g2) / dot(g1, g1), 1 - dot(g1, g2) / dot(g2, g2)]
    weights = geometry.gh(gramian(jacobian)).tolist()
    assert weights == pytest.approx([float(t) for t in tau], rel=ROUNDINGS)


@given(conflicting_pairs)
def test_each_gh_gradient_is_orthogonal_to_the_other_task(jacobian: Tensor) -> None:
    first, second = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
    g1, g2 = vectors(jacobian)
    assert abs(angle(first, g2) - mp.pi / 2) <= EXACT
    assert abs(angle(second, g1) - mp.pi / 2) <= EXACT


@given(conflicting_pairs)
def test_the_angle_between_gh_gradients_is_pi_minus_theta(jacobian: Tensor) -> None:
    after = harmonized(geometry.gh_coefficients(gramian(jacobian)), jacobian)
    # Two directions, each exact.
    assert abs(angle(*after) - gap(jacobian)) <= 2 * EXACT


@given(any_pairs)
def test_the_gh_sum_conflicts_with_neither_task(jacobian: Tensor) -> None:
    (update,) = harmonized(geometry.gh(gramian(jacobian))[None], jacobian)
    rows = vectors(jacobian)
    reach = norm(rows[0]) + norm(rows[1])
    for gradient in rows:
        assert dot(update, gradient) >= -ROUNDINGS * reach * norm(gradient)


@given(pairs(nearly_opposite | too_close | opposite))
def test_the_gh_update_vanishes_as_gradients_become_opposite(jacobian: Tensor) -> None:
    (update,) = harmonized(geometry.gh(gramian(jacobian))[None], jacobian)
    g1, g2 = vectors(jacobian)
    reach = norm(g1) + norm(g2)
    assert norm(update) <= reach * (math.sin(gap(jacobian)) + ROUNDINGS)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@fewer_examples
@given(any_pairs)
def test_gh_is_pcgrad_of_two_tasks(order: list[int], jacobian: Tensor) -> None:
    (update,) = harmonized(geometry.gh(gramian(jacobian))[None], jacobian)
    expected = reference.pcgrad(jacobian[order])
    longer = max(vectors(jacobian), key=norm)
    assert error(update, expected, longer) <= 2 * ROUNDINGS


# GH++


@given(exact_pairs(), lams)
def test_ghpp_is_a_rotation_in_the_plane(jacobian: Tensor, lam: float) -> None:
    actual = harmonized(geometry.ghpp_coefficients(gramian(jacobian), lam), jacobian)
    for result, expected in zip(
        actual, reference.rotations(jacobian, lam), strict=True
    ):
        assert error(result, expected, expected) <= EXACT


@given(pairs(conflicting | too_close), lams)
def test_ghpp_is_a_rotation_to_the_rounding_of_its_gramian(
    jacobian: Tensor, lam: float
) -> None:
    actual = harmonized(geometry.ghpp_coefficients(gramian(jacobian), lam), jacobian)
    for result, expected in zip(
        actual, reference.rotations(jacobian, lam), strict=True
    ):
        assert error(result, expected, expected) <= rounding(jacobian)


@given(exact_pairs(), lams)
def test_ghpp_gradients_are_orthogonal_and_keep_their_norms(
    jacobian: Tensor, lam: float
) -> None:
    after = harmonized(geometry.ghpp_coefficients(gramian(jacobian), lam), jacobian)
    assert abs(angle(*after) - mp.pi / 2) <= 2 * EXACT
    for before, now in zip(vectors(jacobian), after, strict=True):
        assert abs(norm(now) / norm(before) - 1) <= EXACT


@given(exact_pairs(), lams)
def test_ghpp_deviates_by_the_shares_of_phi(jacobian: Tensor, lam: float) -> None:
    after = harmonized(geometry.ghpp_coefficients(gramian(jacobian), lam), jacobian)
    g1, g2 = vectors(jacobian)
    phi = reference.excess(jacobian)
    assert abs(angle(g1, after[0]) - lam * phi) <= EXACT
    assert abs(angle(g2, after[1]) - (1 - lam) * phi) <= EXACT


@given(exact_pairs(), lams)
def test_ghpp_deviates_half_as_much_as_gh(jacobian: Tensor, lam: float) -> None:
    products = gramian(jacobian)
    deviations = [
        sum(map(angle, vectors(jacobian), harmonized(coefficients, jacobian)))
        for coefficients in (
            geometry.ghpp_coefficients(products, lam),
            geometry.gh_coefficients(products),
        )
    ]
    assert abs(deviations[0] - deviations[1] / 2) <= 4 * EXACT


@given(exact_pairs())
def test_half_each_is_the_default(jacobian: Tensor) -> None:
    products = gramian(jacobian)
    for rule in (geometry.ghpp_coefficients, geometry.ghpp_printed_coefficients):
        assert rule(products).equal(rule(products, 0.5))
    for weights in (geometry.ghpp, geometry.ghpp_printed):
        assert weights(products).equal(weights(products, lam=0.5))


@pytest.mark.parametrize("alone", [0, 1])
@given(jacobian=exact_pairs())
def test_lam_0_leaves_task_1_alone_and_lam_1_task_2(
    alone: int, jacobian: Tensor
) -> None:
    products = gramian(jacobian)
    after = harmonized(geometry.ghpp_coefficients(products, float(alone)), jacobian)
    projected = harmonized(geometry.gh_coefficients(products), jacobian)
    rows = vectors(jacobian)
    assert error(after[alone], rows[alone], rows[alone]) <= EXACT
    # The other one turns until it is orthogonal, as under GH, but keeps its norm.
    turned = 1 - alone
    assert_same_direction(after[turned], projected[turned])
    assert abs(norm(after[turned]) / norm(rows[turned]) - 1) <= EXACT


@given(pairs(opposite), lams)
def test_ghpp_of_opposite_gradients_keeps_their_parts_in_line(
    jacobian: Tensor, lam: float
) -> None:
    shares = [lam * math.pi / 2, (1 - lam) * math.pi / 2]
    expected = torch.tensor(list(map(math.cos, shares)), dtype=torch.float64).diag()
    actual = geometry.ghpp_coefficients(gramian(jacobian), lam)
    # cos near pi / 2 has an absolute error, that of the angle.
    assert_close(actual, expected, rtol=0, atol=2 * EPS)


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [(torch.float64, 0.9e-6, 1.1e-6), (torch.float32, 6.5e-4, 7.5e-4)],
    ids=str,
)
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gradients_are_opposite_up_to_the_documented_gap(
    dtype: torch.dtype, inside: float, outside: float, lam: float
) -> None:
    for gap, spans_a_plane in ((inside, False), (outside, True)):
        # (1, 0) and (-1, gap), nearly; every entry is within a rounding.
        products = torch.tensor([[1, -1], [-1, 1 + gap**2]], dtype=dtype)
        coefficients = geometry.ghpp_coefficients(products, lam)
        off_diagonal = coefficients[0, 1] + coefficients[1, 0]
        assert (off_diagonal > 1).item() is spans_a_plane


@given(pairs(conflicting | too_close | opposite), lams)
def test_ghpp_norms_never_exceed_the_originals(jacobian: Tensor, lam: float) -> None:
    actual = harmonized(geometry.ghpp_coefficients(gramian(jacobian), lam), jacobian)
    # At a gap of 1e-6, where the plane is given up, the Gramian's rounding has grown
    # to 3 eps / gap^2 = 7e-4.
    allowance = min(rounding(jacobian), 7e-4) if gap(jacobian) else EXACT
    for before, now in zip(vectors(jacobian), actual, strict=True):
        assert norm(now) <= norm(before) * (1 + allowance)


@given(exact_pairs(), lams)
def test_the_ghpp_sum_is_safe_for_a_task_iff_the_other_is_not_too_long(
    jacobian: Tensor, lam: float
) -> None:
    n1, n2 = map(norm, vectors(jacobian))
    phi = reference.excess(jacobian)
    beta1, beta2 = lam * phi, (1 - mp.mpf(lam)) * phi
    margins = [n1 * mp.cos(beta1) - n2 * mp.sin(beta1)]
    margins += [n2 * mp.cos(beta2) - n1 * mp.sin(beta2)]
    (update,) = harmonized(geometry.ghpp(gramian(jacobian), lam)[None], jacobian)
    for gradient, margin in zip(vectors(jacobian), margins, strict=True):
        # tan beta1 <= n1 / n2, without the division; on the fence either is right.
        if abs(margin) > EXACT * (n1 + n2):
            assert (dot(update, gradient) >= 0) == (margin >= 0)


def test_the_ghpp_sum_may_still_conflict() -> None:
    """A known limit, not a promise: if it ever fails, correct the docstring."""
    products = torch.tensor([[1.0, -9.0], [-9.0, 100.0]])
    assert (products @ geometry.ghpp(products))[0] < 0


# Balanced


@given(exact_pairs())
def test_balanced_shares_follow_the_norms(jacobian: Tensor) -> None:
    products = gramian(jacobian)
    n1, n2 = map(norm, vectors(jacobian))
    lam = 2 / mp.pi * mp.atan2(n1, n2)
    actual = harmonized(geometry.ghpp_balanced_coefficients(products), jacobian)
    for result, expected in zip(
        actual, reference.rotations(jacobian, lam), strict=True
    ):
        assert error(result, expected, expected) <= EXACT


@given(pairs(conflicting | too_close | opposite))
def test_the_balanced_sum_conflicts_with_neither_task(jacobian: Tensor) -> None:
    (update,) = harmonized(geometry.ghpp_balanced(gramian(jacobian))[None], jacobian)
    rows = vectors(jacobian)
    allowance = min(rounding(jacobian), 7e-4) if gap(jacobian) else EXACT
    reach = norm(rows[0]) + norm(rows[1])
    for gradient in rows:
        assert dot(update, gradient) >= -allowance * reach * norm(gradient)


@given(norms)
def test_balanced_shares_leave_nothing_of_opposite_gradients(
    norms: tuple[float, float],
) -> None:
    first, second = norms
    jacobian = torch.tensor([[first], [-second]], dtype=torch.float64)
    (update,) = harmonized(geometry.ghpp_balanced(gramian(jacobian))[None], jacobian)
    assert abs(update[0]) <= ROUNDINGS * max(norms)


# As printed


@given(any_pairs, lams)
def test_printed_weights_are_eq_43(jacobian: Tensor, lam: float) -> None:
    weights = geometry.ghpp_printed(gramian(jacobian), lam).tolist()
    # The angle may count as pi from a gap of 1e-6 on: half of it at most, doubled.
    allowance = 1e-6 if gap(jacobian) <= 1.01e-6 else rounding(jacobian)
    expected = reference.eq_43(jacobian, lam)
    assert weights == pytest.approx(expected, rel=0, abs=allowance)


@given(exact_pairs(), lams)
def test_the_printed_form_leaves_the_angle(jacobian: Tensor, lam: float) -> None:
    """A known limit, not a promise: the paper's text and figure say otherwise."""
    products = gramian(jacobian)
    coefficients = geometry.ghpp_printed_coefficients(products, lam)
    weights = geometry.ghpp_printed(products, lam)
    assert coefficients.equal(weights.diag())
    assume((weights > 1e-6).all())
    after = harmonized(coefficients, jacobian)
    assert abs(angle(*after) - angle(*vectors(jacobian))) <= EXACT
    assert angle(*after) > mp.pi / 2
