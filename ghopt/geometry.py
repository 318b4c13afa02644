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
* No value of the Gramian decides which operations run (but on the CPU, when an active
  set method is done), so all rules run on the ``meta`` device and nothing asks for a
  value on the host. One operation does so by itself on CUDA: :func:`torch.linalg.eigh`,
  in GH++ with more than two tasks.
* ``ValueError`` for a Gramian that is not square, is empty or not floating point.

Equation numbers refer to Huang, Song and Zhang, "Gradient Harmonization in
Unsupervised Domain Adaptation", TPAMI 2024, https://arxiv.org/abs/2408.00288.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Weighting: TypeAlias = Callable[[Tensor], Tensor]
"""Any map from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``."""

_MOST_ENUMERATED = 8  # 2**8 systems of 8 x 8 take under a millisecond

# Of the cosines: the ridge under systems of nearly dependent gradients, and how often
# its effect is taken away again. See _multipliers.
_RIDGE = 1e-8
_ROUNDS = 8


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


def gh(gramian: Tensor) -> Tensor:
    """Weights of GH (eq. 42), shape ``[K]``: see :func:`gh_coefficients`.

    >>> gh(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
    tensor([2.0000, 1.2500])
    """
    return _gh(gramian).sum(0).to(gramian.dtype)


def gh_coefficients(gramian: Tensor) -> Tensor:
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

    * From ``s = 1e-7`` on the error is about ``eps / s``, relative to the gradients.
    * Below, the direction fades, until it counts for nothing: float32 gradients that are
      dependent on paper differ by ``s`` near 1e-14, and weights that resolve this would
      be 1e7. So no multiplier exceeds ``3e4`` times the ratio of the lengths. Each
      harmonized gradient then opposes a task by at most 3.6e-5 of its length before.

    Args:
        gramian: inner products of the gradients, shape ``[K, K]``.

    Returns:
        Coefficients, shape ``[K, K]``. The diagonal is 1 and nothing is negative.

    Raises:
        ValueError: if ``gramian`` is not square, is empty or not floating point.
    """
    return _gh(gramian).to(gramian.dtype)


def ghpp(gramian: Tensor, lam: float = 0.5) -> Tensor:
    """Weights of GH++, shape ``[K]``: see :func:`ghpp_coefficients`.

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
    """Weights of GH++ with a balanced turn: see :func:`ghpp_balanced_coefficients`."""
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
    """Weights of GH++ as printed: see :func:`ghpp_printed_coefficients`."""
    return _ghpp_printed(gramian, lam).sum(0).to(gramian.dtype)


def ghpp_printed_coefficients(gramian: Tensor, lam: float = 0.5) -> Tensor:
    """Rescale two conflicting gradients as eq. 39, 40 and 43 print GH++.

    Here to reproduce published numbers: the authors' code does this too. It lengthens
    gradient 0 and shortens gradient 1 but turns neither, so contrary to the text and
    the figure of the paper the angle, and the conflict, stay.

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


def _gh(gramian: Tensor) -> Tensor:
    """Coefficients of GH in float64."""
    _check(gramian)
    if len(gramian) <= 2:
        # Eq. 29 as it stands. The first clamp is the indicator of eq. 5 and, since the
        # diagonal is never negative, clears the diagonal; the second spares 0 / 0.
        gramian = gramian.double()
        squares = gramian.diagonal().clamp(min=torch.finfo(gramian.dtype).tiny)
        coefficients = gramian.neg().clamp_(min=0).div_(squares).fill_diagonal_(1)
        return _poisoned(coefficients, gramian)
    matrix, scale = _rescaled(gramian)
    rows = _multipliers(matrix)
    coefficients = _identity(matrix) + rows * (scale / scale[:, None])
    return _poisoned(coefficients, gramian)


def _ghpp(gramian: Tensor, lam: float) -> Tensor:
    """Coefficients of GH++ in float64."""
    _check(gramian)
    _check_lam(lam)
    matrix, scale = _rescaled(gramian)
    if len(matrix) > 2 and lam != 0.5:
        raise ValueError(
            f"lam must be 0.5 for more than 2 tasks, got {lam} for {len(matrix)} tasks"
        )
    if len(matrix) == 2:
        rotation = _rotation(matrix, scale, lam, _resolution(gramian.dtype))
    else:
        rotation = _frame(matrix, scale, _resolution(gramian.dtype))
    return _poisoned(rotation, gramian)


def _ghpp_balanced(gramian: Tensor) -> Tensor:
    """Coefficients of balanced GH++ in float64."""
    _check(gramian)
    _check_at_most_two(gramian)
    matrix, scale = _rescaled(gramian)
    if len(matrix) == 1:
        return _poisoned(_identity(matrix), gramian)
    norms = matrix.diagonal().sqrt() / scale
    lam = torch.atan2(norms[0], norms[1]) * (2 / math.pi)
    rotation = _rotation(matrix, scale, lam, _resolution(gramian.dtype))
    return _poisoned(rotation, gramian)


def _ghpp_printed(gramian: Tensor, lam: float) -> Tensor:
    """Coefficients of GH++ as printed in float64."""
    _check(gramian)
    _check_lam(lam)
    _check_at_most_two(gramian)
    matrix, _ = _rescaled(gramian)
    if len(matrix) == 1:
        return _poisoned(_identity(matrix), gramian)
    excess = torch.atan2(matrix[0, 1].neg().clamp(min=0), _determinant(matrix).sqrt())
    tau = [1 + 2 * (lam * excess / 2).sin(), 1 - 2 * ((1 - lam) * excess / 2).sin()]
    return _poisoned(torch.stack(tau).diag(), gramian)


def _rescaled(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Give a float64 Gramian with diagonal in [1/2, 2), and the scale of each task.

    The scales are powers of two, so no entry is rounded, and no product of entries
    overflows. A zero gradient becomes one orthogonal to all others, which no rule
    touches. A Gramian with a non-finite entry becomes the identity: eigh would refuse
    it. The caller calls :func:`_poisoned`.
    """
    gramian = gramian.double()
    exponent = torch.frexp(gramian.diagonal()).exponent
    half = torch.div(exponent, 2, rounding_mode="floor")
    scale = torch.exp2(-half.double())
    # Two factors one after the other: their product alone could overflow.
    matrix = gramian * scale[:, None] * scale
    some = matrix.diagonal() > 0
    usable = some & some[:, None] & gramian.isfinite().all()
    return matrix.where(usable, _identity(matrix)), scale.where(some, 1)


def _multipliers(matrix: Tensor) -> Tensor:
    """Multipliers ``[K, K]`` of the projections on the dual cone.

    Row ``i`` minimises ``|g_i + row @ J|`` over rows that are nowhere negative. Where
    gradients are nearly dependent that has huge solutions, or many. So each round
    minimises ``|g_i + row @ J|^2 + _RIDGE |row - last|^2`` instead, for unit gradients,
    with the row of the round before, from zero (proximal point method, Rockafellar
    1976). This has one solution, which no order of the tasks changes. What the rounds
    leave of a direction with eigenvalue ``s`` is ``(1 + s / _RIDGE) ** -_ROUNDS``: less
    than rounding from s = 1e-7 on, and nearly all where rounding made the direction.

    The bounds: the squared moves of a row add up to at most ``1 / _RIDGE`` and get no
    longer, so the last is at most ``1 / sqrt(_RIDGE _ROUNDS)`` and all together
    ``sqrt(_ROUNDS / _RIDGE)``; and the row opposes a task by ``_RIDGE`` times its last
    move.
    """
    ridge = _RIDGE * matrix.diagonal()
    system = matrix + ridge.diag()
    solve = _enumerated(system) if len(matrix) <= _MOST_ENUMERATED else _pivoted(system)
    rows = torch.zeros_like(matrix)
    for _ in range(_ROUNDS):
        before, rows = rows, solve(rows * ridge - matrix)
        # To ask is free on the CPU. Where the rows move by rounding all is said.
        if matrix.device.type == "cpu" and _is_close(before, rows):
            break
    return rows


def _is_close(before: Tensor, after: Tensor) -> bool:
    eps = torch.finfo(after.dtype).eps
    return bool(((after - before).abs() <= eps * after).all())


def _enumerated(system: Tensor) -> Callable[[Tensor], Tensor]:
    """Minimise ``row @ system @ row / 2 - right @ row`` over rows without a negative.

    By trying all active sets, for few tasks. Each of the 2**K sets gives one candidate,
    which solves the problem iff it is not negative and no slope outside of the set leads
    down. The least violation wins, so that rounding cannot leave a task without a winner.

    Args:
        system: shape ``[K, K]``, positive definite.

    Returns:
        From the right sides of all rows, ``[K, K]``, to the rows.
    """
    tasks = torch.arange(len(system), dtype=torch.int64, device=system.device)
    subsets = torch.arange(2 ** len(system), dtype=torch.int64, device=system.device)
    active = (subsets[:, None] >> tasks & 1).bool()  # [2**K, K], the empty set first
    factors = _factors(system, active)

    def solve(right: Tensor) -> Tensor:
        inside = right.mT.where(active[:, :, None], 0)
        rows: Tensor = torch.linalg.lu_solve(*factors, inside).mT  # [2**K, K, K]
        slopes = rows @ system - right
        slopes = slopes.abs().where(active[:, None], -slopes)
        violation = torch.maximum(slopes, -rows).amax(2).clamp(min=0)
        # A task is never in its own set: its projection has a positive product with it.
        # The first of equals wins, so the empty set where nothing conflicts.
        best = violation.where(~active, torch.inf).argmin(0)
        return rows[best, tasks].clamp(min=0)

    return solve


def _pivoted(system: Tensor) -> Callable[[Tensor], Tensor]:
    """Do the same as :func:`_enumerated` by Lawson and Hanson's method, rows at once.

    Each step solves for the multipliers of every row's active set. Where some are not
    positive, the row goes toward the solution until the first reaches zero and releases
    that task; elsewhere it takes the solution and adds the task that it conflicts with
    most. "Solving Least Squares Problems" (1974), chapter 23. The next call starts where
    the last one ended, so that few steps do.
    """
    info = torch.finfo(system.dtype)
    own = _identity(system) > 0
    rows = torch.zeros_like(system)
    active = torch.zeros_like(own)
    steps = 3 * len(system)  # as many as SciPy's NNLS takes

    def solve(right: Tensor) -> Tensor:
        nonlocal rows, active, steps
        for _ in range(steps):
            target = torch.linalg.lu_solve(
                *_factors(system, active), right.where(active, 0)[:, :, None]
            )[:, :, 0]
            blocked = active & (target <= 0)
            free = ~blocked.any(1, keepdim=True)
            reach = rows / (rows - target).clamp(min=info.tiny)
            reach = reach.where(blocked, torch.inf)
            step = reach.amin(1, keepdim=True)
            rows = target.where(free, rows + step * (target - rows))
            conflicts = (right - rows @ system).masked_fill(active | own, -torch.inf)
            conflict, task = conflicts.max(1, keepdim=True)
            # Less than this is noise, which grows with the multipliers.
            noise = 4 * info.eps * (1 + rows.sum(1, keepdim=True))
            entered = active.scatter(
                1, task, (conflict > noise) | active.gather(1, task)
            )
            before, active = active, entered.where(free, active & (reach > step))
            rows = rows.where(active, 0)
            # Where to ask is free: all further steps would repeat this one.
            if system.device.type == "cpu" and torch.equal(before, active):
                break
        steps = 4 + len(system) // 4
        return rows

    return solve


def _factors(system: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Factor the systems ``[B, K, K]`` of the active tasks of each row of ``[B, K]``."""
    inside = active[:, :, None] & active[:, None]
    outside = torch.diag_embed((~active).to(system))
    # The _ex functions do not wait for the device to report singular systems.
    factors, pivots, _ = torch.linalg.lu_factor_ex(system.where(inside, 0) + outside)
    return factors, pivots


def _rotation(
    matrix: Tensor, scale: Tensor, lam: float | Tensor, resolution: float
) -> Tensor:
    """Coefficients ``[2, 2]`` of GH++ for two tasks."""
    norms = matrix.diagonal().sqrt()
    across = _determinant(matrix).sqrt()  # n0 n1 sin(theta); along is -n0 n1 cos(theta)
    along = matrix[0, 1].neg().clamp(min=0)
    opposite = (along > 0) & (across <= resolution * norms.prod())
    # atan2, since acos loses half of the digits near opposite and right angles.
    excess = torch.atan2(along, across.where(~opposite, 0))  # theta - pi/2 (eq. 36)
    first, second = lam * excess, (1 - lam) * excess
    sine = (across / norms.prod()).where((along > 0) & ~opposite, 1)
    ratio = norms[0] / norms[1] * (scale[1] / scale[0])
    upper = [second.cos(), ratio * first.sin()]
    lower = [second.sin() / ratio, first.cos()]
    rotation = torch.stack(upper + lower).view(2, 2) / sine
    in_line = torch.stack([first.cos(), second.cos()]).diag()
    return in_line.where(opposite, rotation)


def _determinant(matrix: Tensor) -> Tensor:
    """Determinant of a ``[2, 2]`` Gramian to rounding, 0 where rounding made it less.

    Near opposite gradients its two products agree in all but the last digits; their
    rounding errors, which decide then, are taken along (Dekker 1971).
    """
    product, error = _exact_product(matrix[0, 0], matrix[1, 1])
    square, square_error = _exact_product(matrix[0, 1], matrix[0, 1])
    return ((product - square) + (error - square_error)).clamp(min=0)


def _exact_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 product and its rounding error: their exact sum is ``a * b``."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    error = (
        (a_high * b_high - product) + a_high * b_low + a_low * b_high
    ) + a_low * b_low
    return product, error


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    """Split the 53 bits of a float64 so that products of halves are exact (Veltkamp)."""
    large = a * (2.0**27 + 1)
    high = large - (large - a)
    return high, a - high


def _frame(matrix: Tensor, scale: Tensor, resolution: float) -> Tensor:
    """Coefficients ``[K, K]`` of GH++ for any K: the nearest frame without conflict.

    With C the cosines and P the allowed ones, ``T = C^-1/2 (C^1/2 P C^1/2)^1/2 C^-1/2``
    is the optimal transport between N(0, C) and N(0, P) (Olkin and Pukelsheim 1982):
    ``T C T = P``, and ``T`` moves the unit gradients least. At K = 2 it is the rotation
    with ``lam = 0.5``.
    """
    norms = matrix.diagonal().sqrt()
    identity = _identity(matrix)
    cosines = (matrix / norms / norms[:, None]).where(identity == 0, 1)
    values, vectors = torch.linalg.eigh(cosines.clamp(min=0))
    lowest = values[0].clamp(max=0)
    shrink = lowest / (lowest - 1)  # makes the lowest eigenvalue zero, if negative
    values = values + shrink * (1 - values)
    # A root of the rounding of an eigenvalue that is zero would be 1e8 times as large.
    values = values.where(values > len(matrix) * torch.finfo(matrix.dtype).eps, 0)
    allowed_root = (vectors * values.sqrt()) @ vectors.mT
    values, vectors = torch.linalg.eigh(cosines)
    # sin(theta)**2 / 2 is the lowest eigenvalue of two nearly opposite unit gradients.
    spanned = values > resolution**2 * len(matrix) / 4
    root = (vectors * values.where(spanned, 0).sqrt()) @ vectors.mT
    inverse_root = (vectors * values.where(spanned, torch.inf).rsqrt()) @ vectors.mT
    # With the polar factor W of C^1/2 P^1/2 the transport is P^1/2 W^T C^-1/2, and loses
    # half as many digits to dependent gradients as with the root of C^1/2 P C^1/2.
    left, stretch, right = torch.linalg.svd(root @ allowed_root)
    met = stretch > len(matrix) * torch.finfo(matrix.dtype).eps
    polar = left * met @ right
    span = (vectors * spanned) @ vectors.mT
    frame: Tensor = span @ allowed_root @ polar.mT @ inverse_root
    frame = frame * (norms[:, None] / norms) * (scale / scale[:, None])
    # Exactly the identity for a task that no other meets, and where no two conflict.
    meets = (cosines != identity).any(1)
    moves = (meets & meets[:, None]) & (cosines < 0).any()
    return frame.where(moves, identity)


def _resolution(dtype: torch.dtype) -> float:
    """Sine below which two gradients count as opposite: see :func:`ghpp_coefficients`.

    An entry rounded to ``dtype`` leaves the sine uncertain by sqrt(eps). A float64
    Gramian would allow 3e-8, but gradients are float32 at best as a rule, and their own
    rounding tilts opposite ones by about 1e-7.
    """
    return max(1e-6, 2 * math.sqrt(torch.finfo(dtype).eps))


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


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
