"""The geometry of gradient harmonization, as pure functions of the Gramian.

Row ``i`` of the Jacobian ``J``, shape ``[K, N]``, is the flattened gradient of task
``i``. Nothing here needs ``J`` itself, only three small tensors:

* ``gramian``, shape ``[K, K]``: ``J @ J.T``, the inner products of the gradients.
* ``coefficients``, shape ``[K, K]``: row ``i`` of ``coefficients @ J`` is the harmonized
  gradient of task ``i``; the harmonized gradients have the Gramian
  ``coefficients @ gramian @ coefficients.T``.
* ``weights``, shape ``[K]``: ``weights @ J`` is the sum of the harmonized gradients, so
  ``weights = coefficients.sum(0)`` (eq. 41, where they are called tau).

What every rule here promises, for any ``K >= 1``:

* Where no two gradients conflict (no negative entry) the coefficients are exactly the
  identity; a zero gradient conflicts with nothing.
* A common scale of the gradients, 1e-25 to 1e18, changes nothing.
* A non-finite entry makes every weight NaN: it is never hidden.
* The arithmetic is float64, the result has the dtype and device of the Gramian.
* On a device no value of the Gramian decides which operations run, so nothing asks for
  one on the host, and all rules run on the ``meta`` device. One operation asks by
  itself on CUDA: :func:`torch.linalg.eigh`, in GH++ with more than two tasks. On the CPU
  values are read: the same results to rounding, several times as fast. A Gramian
  that requires grad, transforms of ``torch.func`` and :func:`torch.compile` are given tensor
  operations instead. So rules have derivatives and can be mapped; they compile to one graph,
  but for GH with more than eight protected tasks, which breaks it. The derivative of GH++
  with more than two tasks loses the digits in which two eigenvalues of the cosines agree,
  and is NaN where they are equal.
* ``ValueError`` for a Gramian that is not square, is empty or not floating point.

Equation numbers refer to Huang, Song and Zhang, "Gradient Harmonization in
Unsupervised Domain Adaptation", TPAMI 2024, https://arxiv.org/abs/2408.00288.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ghopt.geometry import host
from ghopt.geometry.cone import cone_multipliers
from ghopt.geometry.frames import (
    across_of,
    frame,
    frame_of_few,
    resolution_of,
    rotation,
)
from ghopt.geometry.matrices import (
    identity,
    nobody_watches,
    rescaled,
)

_MOST_READ = 10  # with more tasks, calls of torch are faster than floats one by one

Weighting: TypeAlias = Callable[[Tensor], Tensor]
"""Any map from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``."""


def cosines(gramian: Tensor) -> Tensor:
    """Cosines of the angles between task gradients.

    Args:
        gramian: their inner products, shape ``[..., K, K]``.

    Returns:
        Shape ``[..., K, K]``; 0 with a gradient that is zero.
    """
    norms = gramian.diagonal(dim1=-2, dim2=-1).sqrt()
    zero = norms == 0
    ratios = gramian / norms.unsqueeze(-1) / norms.unsqueeze(-2)
    return ratios.masked_fill(zero.unsqueeze(-1) | zero.unsqueeze(-2), 0)


def plain_sum(gramian: Tensor) -> Tensor:
    """Weights of the plain sum, shape ``[K]``: all 1, whatever the gradients.

    What everybody trains on. As a weighting it serves to compare, or to project the step
    of the plain sum (``project_step`` of :class:`ghopt.HarmonizedOptimizer`).

    Raises:
        ValueError: if ``gramian`` is not square, is empty or not floating point.
    """
    _check(gramian)
    return torch.ones_like(gramian[0])


def gh(gramian: Tensor, protected: Sequence[int] | None = None) -> Tensor:
    """Weigh the tasks so that the update opposes none of them (GH, eq. 42).

    Each gradient ``g_k`` is replaced by the vector nearest to it that opposes no task, and
    these are summed. Of two gradients in conflict, ``g_0 . g_1 < 0``, the weights are::

        1 - g_0 . g_1 / |g_0|**2  and  1 - g_0 . g_1 / |g_1|**2

    Without a conflict all weights are 1: the plain sum. With ``protected`` the update
    opposes none of these tasks. Arguments, accuracy and errors are those of
    :func:`gh_coefficients`, whose columns this sums.

    Returns:
        Weights, shape ``[K]``, all at least 1.

    >>> gh(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
    tensor([2.0000, 1.2500])
    >>> gh(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), protected=[0])
    tensor([2., 1.])
    """
    return _dual_cone(gramian, None, protected).sum(0).to(gramian.dtype)


def gh_coefficients(gramian: Tensor, protected: Sequence[int] | None = None) -> Tensor:
    """Project every gradient on the dual cone of all gradients (lemma 1, eq. 29).

    The harmonized gradient of task ``i`` is the vector nearest to its gradient that
    conflicts with none of the original gradients. Hence the sum of the harmonized
    gradients conflicts with no task either, for any ``K``, and the order of the tasks
    does not matter. The paper has ``K = 2``, where this is eq. 29: each harmonized
    gradient is orthogonal to the *other original* one. Equal, at ``K = 2`` only, to
    PCGrad with the sum.

    Accuracy: at ``K = 2`` to rounding, relative to the harmonized gradients 1e-12 and
    better at angles 1e-3 rad or more from opposite. For ``K > 2`` let ``s`` be the
    smallest eigenvalue, other than zero, of the cosines of any of the tasks: gradients
    that are an angle ``t`` from opposite, equal or dependent have ``s`` near ``t**2 / 2``.

    * From ``s = 1e-7`` on (see ``_RIDGE`` in ``cone.py``) the error is about ``eps / s``, relative to the gradients.
    * Below, the direction fades, until it counts for nothing: float32 gradients that are
      dependent on paper differ by ``s`` near 1e-14, and weights that resolve this would
      be 1e7. So no multiplier exceeds ``3e4`` times the ratio of the lengths. Each
      harmonized gradient then opposes a task by at most 3.6e-5 of its length before.

    With ``protected`` the cone is that of these tasks alone (this project's, not the
    paper's). The other gradients are bent so that they oppose none of them, and the
    protected ones among themselves; nothing is done for the others. So the update opposes
    no protected task, and a main task is never bent by an auxiliary one.

    Args:
        gramian: inner products of the gradients, shape ``[K, K]``.
        protected: numbers of the tasks that no gradient may oppose; None: all.

    Returns:
        Coefficients, shape ``[K, K]``. The diagonal is 1 and nothing is negative.

    Raises:
        TypeError: if ``protected`` holds anything but whole numbers.
        ValueError: if ``protected`` names no task of these, or one twice, or ``gramian``
            is not square, is empty or not floating point.
    """
    return dual_cone(gramian, protected=protected)


def dual_cone(
    gramian: Tensor,
    rows: Sequence[int] | None = None,
    protected: Sequence[int] | None = None,
) -> Tensor:
    """Project some vectors on the cone of those that oppose none of others.

    The vector nearest to ``g_i`` among all ``d`` with ``d . g_j >= 0`` for every protected
    ``j``. :func:`gh_coefficients` is all rows on all tasks. One row on the gradients of
    earlier tasks is GEM (Lopez-Paz and Ranzato, NeurIPS 2017, eq. 11), on one of them
    A-GEM (Chaudhry et al., ICLR 2019, eq. 11). Accuracy as told there.

    >>> dual_cone(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]), rows=[1], protected=[0])
    tensor([[1., 1.]])

    Args:
        gramian: inner products of the vectors, shape ``[K, K]``.
        rows: numbers of those that are projected, R in all; None: all.
        protected: numbers of those that must not be opposed; None: all.

    Returns:
        Coefficients, shape ``[R, K]``: row ``r`` of ``coefficients @ J`` is the projection
        of vector ``rows[r]``. Its own coefficient is 1, and nothing is negative.

    Raises:
        TypeError: if ``rows`` or ``protected`` hold anything but whole numbers.
        ValueError: if they name no vector of these, or one twice, or ``gramian`` is not
            square, is empty or not floating point.
    """
    return _dual_cone(gramian, rows, protected).to(gramian.dtype)


def ghpp(gramian: Tensor, lam: float = 0.5) -> Tensor:
    """Weigh two tasks so that their gradients turn until orthogonal (GH++, fig. 7b).

    With two gradients at an angle ``theta > pi/2``, ``phi = theta - pi/2``,
    ``b0 = lam * phi``, ``b1 = (1 - lam) * phi`` and the ratio of lengths
    ``r = |g_0| / |g_1|`` the weights are::

        (cos b1 + sin b1 / r) / cos phi  and  (cos b0 + sin b0 * r) / cos phi

    Lengths are kept, and the turn is half of GH's. Not promised: that the *sum* opposes no
    task. Without a conflict all weights are 1: the plain sum. More than two tasks,
    arguments, accuracy and errors are those of :func:`ghpp_coefficients`, whose columns
    this sums.

    Returns:
        Weights, shape ``[K]``.

    >>> ghpp(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]))
    tensor([2.0719, 1.6892])
    """
    return _ghpp(gramian, lam).sum(0).to(gramian.dtype)


def ghpp_coefficients(gramian: Tensor, lam: float = 0.5) -> Tensor:
    """Rotate conflicting gradients, norms kept, until orthogonal (section 3.5, fig. 7b).

    With two tasks at an angle ``theta > pi/2``, task 0 turns toward task 1 by
    ``lam * (theta - pi/2)`` and task 1 toward task 0 by the rest: in total half of the
    deviation of GH. This is the rotation that section 3.5 describes and draws; its
    eq. 39 only rescales the gradients, see :func:`ghpp_printed_coefficients`.

    With more tasks (this project's generalisation, ``lam = 0.5`` only) the unit
    gradients move as little as possible, in the sum of squares, to the frame in which
    the negative cosines are zero and the others as they were; where no such frame
    exists all cosines first shrink by the smallest common factor.

    Not promised: that the *sum* of the harmonized gradients conflicts with no task.
    With two tasks it spares task 0 iff ``tan(b0) <= n0 / n1`` and task 1 iff
    ``tan(b1) <= n1 / n0``, where ``n`` are the norms and ``b`` the angles turned by.
    :func:`ghpp_balanced` and :func:`gh` do promise it. Nor, of dependent gradients among
    more than two, that norms are kept (one may grow, by sqrt(K) at most) or no two conflict.

    Opposite gradients span no plane to turn in. Where the sine of the angle is at most
    1e-6 (7e-4 for a float32 Gramian) the part off their common line is dropped,
    ``diag(cos b0, cos b1)``; linearly dependent gradients among more than two lose the
    same part. A rule that took that part from rounding noise would return noise as
    large as the gradients.

    Accuracy: at ``K = 2``, relative to the harmonized gradients, 1e-12 and better at
    angles 1e-3 rad or more from opposite for the Gramian *as given*. One rounding of its
    entries already moves the result by up to ``eps / sin(theta)**2``. For ``K > 2`` the
    error is about ``eps / s + min(sqrt(eps), eps / sqrt(p))``, with ``s`` as in
    :func:`gh_coefficients` and ``p`` the smallest eigenvalue, other than zero, of the
    cosines that are aimed at. The second part, 2e-8 at most, is that of the root of a
    matrix whose entries are rounded.

    Args:
        gramian: inner products of the gradients, shape ``[K, K]``.
        lam: share of the turn that task 0 takes, in ``[0, 1]`` (lambda of eq. 36).

    Returns:
        Coefficients, shape ``[K, K]``.

    Raises:
        ValueError: if ``lam`` is outside ``[0, 1]``, or is not 0.5 with more than two
            tasks, or ``gramian`` is not square, is empty or not floating point.
    """
    return _ghpp(gramian, lam).to(gramian.dtype)


def ghpp_balanced(gramian: Tensor) -> Tensor:
    """Weigh two tasks as GH++ does, the longer gradient turning more.

    :func:`ghpp` with ``lam = 2/pi * atan2(|g_0|, |g_1|)``: the sum opposes neither task.
    This project's choice, not the paper's. The sums of the columns of
    :func:`ghpp_balanced_coefficients`.

    Returns:
        Weights, shape ``[K]``, of one or two tasks.
    """
    return _ghpp_balanced(gramian).sum(0).to(gramian.dtype)


def ghpp_balanced_coefficients(gramian: Tensor) -> Tensor:
    """GH++ with ``lam = 2/pi * atan2(n0, n1)``: the longer gradient turns more.

    This project's choice of ``lam``, not the paper's: with it the sum of the harmonized
    gradients conflicts with neither task.

    Args:
        gramian: inner products of at most two gradients, shape ``[K, K]``.

    Returns:
        Coefficients, shape ``[K, K]``; as :func:`ghpp_coefficients` in all else.

    Raises:
        ValueError: if ``gramian`` has more than two tasks, is not square, is empty or
            not floating point.
    """
    return _ghpp_balanced(gramian).to(gramian.dtype)


def ghpp_printed(gramian: Tensor, lam: float = 0.5) -> Tensor:
    """Weigh two tasks as the paper prints GH++ (eq. 43): the conflict stays.

    With two gradients at an angle ``theta > pi/2`` and ``phi = theta - pi/2`` the weights
    are::

        1 + 2 * sin(lam * phi / 2)  and  1 - 2 * sin((1 - lam) * phi / 2)

    To repeat published numbers. The diagonal of :func:`ghpp_printed_coefficients`.

    Returns:
        Weights, shape ``[K]``, of one or two tasks.
    """
    return _ghpp_printed(gramian, lam).sum(0).to(gramian.dtype)


def ghpp_printed_coefficients(gramian: Tensor, lam: float = 0.5) -> Tensor:
    """Rescale two conflicting gradients as eq. 39, 40 and 43 print GH++.

    Here to reproduce published numbers: the authors' code does this too. It lengthens
    gradient 0 and shortens gradient 1 but turns neither, so contrary to the text and
    the figure of the paper the angle, and the conflict, stay. With ``lam`` below 1/3 and
    ``(1 - lam) * (theta - pi/2)`` above pi/3 it even reverses gradient 1.

    Args:
        gramian: inner products of at most two gradients, shape ``[K, K]``.
        lam: share of task 0, in ``[0, 1]`` (lambda of eq. 36).

    Returns:
        Diagonal coefficients, shape ``[K, K]``.

    Raises:
        ValueError: if ``lam`` is outside ``[0, 1]``, or ``gramian`` has more than two
            tasks, is not square, is empty or not floating point.
    """
    return _ghpp_printed(gramian, lam).to(gramian.dtype)


def _dual_cone(
    gramian: Tensor, rows: Sequence[int] | None, protected: Sequence[int] | None
) -> Tensor:
    """Coefficients of :func:`dual_cone` in float64."""
    _check(gramian)
    count = len(gramian)
    if rows is None and protected is None and count <= 2:
        return _gh_of_two(gramian)
    moved = _checked("rows", rows, count)
    kept = _checked("protected", protected, count)
    values = _read(gramian)
    found = values and host.cone_coefficients(values, moved, kept)
    if found:
        return torch.tensor(found, dtype=torch.float64, device=gramian.device)
    if _is_without_conflict(gramian):
        unit = _picked(identity(gramian.double()), moved)
        return _poisoned(unit, gramian)
    matrix, scale = rescaled(gramian)
    multipliers = _multipliers(matrix, moved, kept) * _picked(scale, kept)
    multipliers = multipliers / _picked(scale, moved)[:, None]
    unit = _picked(identity(matrix), moved)
    return _poisoned(unit + _spread(multipliers, kept, count), gramian)


def _gh_of_two(gramian: Tensor) -> Tensor:
    """Coefficients of GH for at most two tasks, in float64: eq. 29 as it stands."""
    values = _read(gramian)
    if values:
        found = host.gh_of_few(values)
        return torch.tensor(found, dtype=torch.float64, device=gramian.device)
    # relu is the indicator of eq. 5 and, since the diagonal is never negative, clears the
    # diagonal; its derivative at zero is zero. The clamp spares 0 / 0.
    gramian = gramian.double()
    squares = gramian.diagonal().clamp(min=torch.finfo(gramian.dtype).tiny)
    coefficients = gramian.neg().relu().div(squares)
    coefficients.diagonal().fill_(1)
    return _poisoned(coefficients, gramian)


def _multipliers(matrix: Tensor, moved: list[int], kept: list[int]) -> Tensor:
    """Multipliers ``[R, P]`` of the projections, from a rescaled Gramian."""
    products = _picked(_picked(matrix, moved).mT, kept).mT
    if not kept:
        return products
    if len(kept) == 1:
        # Eq. 29 with one constraint: exact, and without a solver.
        square = matrix.diagonal()[kept[0]]
        return products.neg().clamp(min=0) / square
    system = _picked(_picked(matrix, kept).mT, kept).mT
    own = _picked(_picked(identity(matrix), moved).mT, kept).mT > 0
    return cone_multipliers(system, products, own)


def _picked(tensor: Tensor, numbers: list[int]) -> Tensor:
    """Take some rows, without a copy where these are all."""
    if numbers == list(range(len(tensor))):
        return tensor
    if not numbers:
        return tensor[:0]
    return torch.stack([tensor[number] for number in numbers])


def _spread(columns: Tensor, numbers: list[int], count: int) -> Tensor:
    """Put columns where they belong among ``count``, the others of which are zero."""
    if numbers == list(range(count)):
        return columns
    # Column by column: to index with a list would copy it to the device, which waits.
    column = {j: columns[:, place] for place, j in enumerate(numbers)}
    nothing = columns.new_zeros(len(columns))
    return torch.stack([column.get(j, nothing) for j in range(count)], 1)


def _read(gramian: Tensor) -> host.Rows | None:
    """Read a small Gramian where that is free."""
    if len(gramian) > _MOST_READ or not nobody_watches(gramian):
        return None
    values: host.Rows = gramian.tolist()
    return values


def _is_without_conflict(gramian: Tensor) -> bool:
    """Say whether no two conflict, where that is free to ask; else no."""
    return nobody_watches(gramian) and not bool((gramian.double() < 0).any())


def _checked(name: str, numbers: Sequence[int] | None, count: int) -> list[int]:
    """List the numbers of some of ``count`` vectors; all of them if None."""
    if numbers is None:
        return list(range(count))
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise TypeError(f"{name} must be numbers of tasks, got {numbers!r}")
    found = list(numbers)
    for number in found:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must hold whole numbers, got {number!r}")
        if not 0 <= number < count:
            raise ValueError(
                f"{name} must be from 0 to {count - 1}, got {number} for {count} tasks"
            )
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must hold each number once, got {found}")
    return found


def _ghpp(gramian: Tensor, lam: float) -> Tensor:
    """Coefficients of GH++ in float64."""
    _check(gramian)
    _check_lam(lam)
    if len(gramian) > 2 and lam != 0.5:
        raise ValueError(
            f"lam must be 0.5 for more than 2 tasks, got {lam} for {len(gramian)} tasks"
        )
    if len(gramian) == 2:
        return _rotation(gramian, lam)
    resolution = resolution_of(gramian.dtype)
    values = _read(gramian)
    if values:
        return frame_of_few(values, resolution)
    if _is_without_conflict(gramian):
        return _poisoned(identity(gramian.double()), gramian)
    matrix, scale = rescaled(gramian)
    return _poisoned(frame(matrix, scale, resolution), gramian)


def _ghpp_balanced(gramian: Tensor) -> Tensor:
    """Coefficients of balanced GH++ in float64."""
    _check(gramian)
    _check_at_most_two(gramian)
    if len(gramian) == 1:
        return _poisoned(identity(gramian.double()), gramian)
    return _rotation(gramian, None)


def _rotation(gramian: Tensor, lam: float | None) -> Tensor:
    """Turn two gradients; without a ``lam`` by balanced shares."""
    resolution = resolution_of(gramian.dtype)
    values = _read(gramian)
    if values:
        turned = host.rotation(values, lam, resolution)
        return torch.tensor(turned, dtype=torch.float64, device=gramian.device)
    return _poisoned(rotation(*rescaled(gramian), lam, resolution), gramian)


def _ghpp_printed(gramian: Tensor, lam: float) -> Tensor:
    """Coefficients of GH++ as printed in float64."""
    _check(gramian)
    _check_lam(lam)
    _check_at_most_two(gramian)
    matrix, _ = rescaled(gramian)
    if len(matrix) == 1:
        return _poisoned(identity(matrix), gramian)
    excess = torch.atan2(matrix[0, 1].neg().clamp(min=0), across_of(matrix))
    tau = [1 + 2 * (lam * excess / 2).sin(), 1 - 2 * ((1 - lam) * excess / 2).sin()]
    return _poisoned(torch.stack(tau).diag(), gramian)


def _poisoned(coefficients: Tensor, gramian: Tensor) -> Tensor:
    """Make coefficients NaN if any entry of the Gramian is not finite."""
    # Zero times the sum: 0, or NaN if the sum is not finite.
    return torch.add(coefficients, gramian.sum(dtype=torch.float64), alpha=0)


def _check(gramian: Tensor) -> None:
    if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or not len(gramian):
        shape = list(gramian.shape)
        raise ValueError(f"gramian must have shape [K, K] with K >= 1, got {shape}")
    if not gramian.is_floating_point():
        raise ValueError(f"gramian must be floating point, got {gramian.dtype}")


def _check_lam(lam: float) -> None:
    if not 0 <= lam <= 1:  # also true of NaN
        raise ValueError(f"lam must be in [0, 1], got {lam}")


def _check_at_most_two(gramian: Tensor) -> None:
    if len(gramian) > 2:
        raise ValueError(
            f"gramian must be of at most 2 tasks for this rule, got {len(gramian)}"
        )
