"""Rotations of two gradients, and of a frame of any number: the turn behind GH++."""

import math

import torch
from torch import Tensor

from ghopt.geometry import host
from ghopt.geometry.cone import RESOLVED
from ghopt.geometry.matrices import determinant, identity, nobody_watches


def rotation(
    matrix: Tensor, scale: Tensor, lam: float | None, resolution: float
) -> Tensor:
    """Coefficients ``[2, 2]`` of GH++ for two tasks; without a ``lam`` the balanced one."""
    norms = matrix.diagonal().sqrt()
    across = across_of(matrix)  # n0 n1 sin(theta); along is -n0 n1 cos(theta)
    along = matrix[0, 1].neg().clamp(min=0)
    opposite = (along > 0) & (across <= resolution * norms.prod())
    # atan2, since acos loses half of the digits near opposite and right angles.
    excess = torch.atan2(along, across.where(~opposite, 0))  # theta - pi/2 (eq. 36)
    share = balanced(norms / scale) if lam is None else lam
    first, second = share * excess, (1 - share) * excess
    sine = (across / norms.prod()).where((along > 0) & ~opposite, 1)
    ratio = norms[0] / norms[1] * (scale[1] / scale[0])
    upper = [second.cos(), ratio * first.sin()]
    lower = [second.sin() / ratio, first.cos()]
    turned = torch.stack(upper + lower).view(2, 2) / sine
    in_line = torch.stack([first.cos(), second.cos()]).diag()
    return in_line.where(opposite, turned)


def balanced(norms: Tensor) -> Tensor:
    """Share of the turn that spares both tasks: the longer gradient turns more."""
    return torch.atan2(norms[0], norms[1]) * (2 / math.pi)


def across_of(matrix: Tensor) -> Tensor:
    """Area that two gradients span, ``n0 n1 sin(theta)``."""
    ((square, product), (_, other)) = matrix
    # Not zero: there the root has no derivative.
    least = torch.finfo(matrix.dtype).tiny
    area: Tensor = determinant(square, product, other).clamp(min=least).sqrt()
    return area


def frame(matrix: Tensor, scale: Tensor, resolution: float) -> Tensor:
    """Coefficients ``[K, K]`` of GH++ for any K: the nearest frame without conflict.

    With C the cosines and P the allowed ones, ``T = C^-1/2 (C^1/2 P C^1/2)^1/2 C^-1/2``
    is the optimal transport between N(0, C) and N(0, P) (Olkin and Pukelsheim 1982):
    ``T C T = P``, and ``T`` moves the unit gradients least. At K = 2 it is the rotation
    with ``lam = 0.5``.
    """
    norms = matrix.diagonal().sqrt()
    unit = identity(matrix)
    cosines = (matrix / norms / norms[:, None]).where(unit == 0, 1)
    moved = _moved_by_roots(cosines, resolution)
    moved = moved * (norms[:, None] / norms) * (scale / scale[:, None])
    # Exactly the identity for a task that no other meets, and where no two conflict.
    meets = (cosines != unit).any(1)
    moves = (meets & meets[:, None]) & (cosines < 0).any()
    return moved.where(moves, unit)


def frame_of_few(gramian: host.Rows, resolution: float) -> Tensor:
    """Do the same as :func:`frame`, from values: a third of the calls of torch.

    Args:
        gramian: of K vectors, as it is.
        resolution: sine below which two count as opposite.
    """
    count = len(gramian)
    unit = torch.eye(count, dtype=torch.float64, device="cpu")
    if not host.is_finite(gramian):
        return unit * math.nan
    matrix, scale = host.rescaled(gramian)
    norms = [math.sqrt(row[task]) for task, row in enumerate(matrix)]
    cosines = [
        [value / here / there for value, there in zip(row, norms, strict=True)]
        for row, here in zip(matrix, norms, strict=True)
    ]
    for task, row in enumerate(cosines):
        row[task] = 1.0
    least = min(map(min, cosines))
    if least >= 0:
        return unit
    allowed = [[max(value, 0.0) for value in row] for row in cosines]
    both = torch.tensor([cosines, allowed], dtype=torch.float64, device="cpu")
    low = max(RESOLVED, _least_spanned(count, resolution))
    # No eigenvalue is higher than what the most opposite two leave.
    moved = _moved_by_factors(both, low) if 1 + least > low else None
    if moved is None:
        moved = _moved_by_roots(both[0], resolution)
    lengths = [norm / factor for norm, factor in zip(norms, scale, strict=True)]
    ratios = [[here / there for there in lengths] for here in lengths]
    moved = moved * torch.tensor(ratios, dtype=torch.float64, device="cpu")
    alone = [task for task, row in enumerate(cosines) if row.count(0) == count - 1]
    if alone:
        moved[alone] = unit[alone]
        moved[:, alone] = unit[:, alone]
    return moved


def _moved_by_factors(both: Tensor, low: float) -> Tensor | None:
    """Transport of :func:`frame` by Cholesky factors: where values may be read.

    With ``C = L L^T``, ``P = R R^T`` and the polar factor W of ``L^T R`` the transport is
    ``R W^T L^-1``.

    Args:
        both: C and P, ``[2, K, K]``.
        low: what no eigenvalue may be below.

    Returns:
        None if one of C or P may be.
    """
    factors, stopped = torch.linalg.cholesky_ex(both)
    roots = factors.diagonal(dim1=1, dim2=2).prod(1)
    # The least of K eigenvalues, with a sum of K, is at least the determinant over e.
    if any(stopped.tolist()) or min(roots.tolist()) ** 2 < math.e * low:
        return None
    own, aimed = factors
    left, _, right = torch.linalg.svd(own.mT @ aimed)
    moved: Tensor = torch.linalg.solve_triangular(
        own, aimed @ (left @ right).mT, upper=False, left=False
    )
    return moved


def _moved_by_roots(cosines: Tensor, resolution: float) -> Tensor:
    """Transport of :func:`frame` by symmetric roots, which may be those of singular ones."""
    eps = len(cosines) * torch.finfo(cosines.dtype).eps
    least = _least_spanned(len(cosines), resolution)
    # Both at once: a device is waited for only once.
    values, vectors = torch.linalg.eigh(torch.stack([cosines, cosines.clamp(min=0)]))
    if nobody_watches(values):
        roots = values.new_tensor(_roots_read(*values.tolist(), least=least, eps=eps))
    else:
        roots = _roots(values[0], values[1], least, eps)
    own, aimed = vectors
    bases = torch.stack([own, own, own, aimed])
    span, root, inverse_root, allowed_root = (bases * roots[:, None]) @ bases.mT
    # With the polar factor W of C^1/2 P^1/2 the transport is P^1/2 W^T C^-1/2, and loses
    # half as many digits to dependent gradients as with the root of C^1/2 P C^1/2.
    left, stretch, right = torch.linalg.svd(root @ allowed_root)
    polar = left * (stretch > eps) @ right
    moved: Tensor = span @ allowed_root @ polar.mT @ inverse_root
    return moved


def _least_spanned(count: int, resolution: float) -> float:
    """Eigenvalue of the cosines of so many gradients that counts as zero.

    sin(theta)**2 / 2 is the lowest of two nearly opposite unit gradients.
    """
    return resolution**2 * count / 4


def _roots(own: Tensor, aimed: Tensor, least: float, eps: float) -> Tensor:
    """Roots ``[4, K]``: which eigenvalues of C count, their roots and inverse ones, P's."""
    spanned = own > least
    lowest = aimed[0].clamp(max=0)
    shrink = lowest / (lowest - 1)  # makes the lowest eigenvalue zero, if negative
    aimed = aimed + shrink * (1 - aimed)
    # A root of the rounding of an eigenvalue that is zero would be 1e8 times as large.
    aimed = aimed.where(aimed > eps, 0)
    spread = own.where(spanned, torch.inf)
    own = own.where(spanned, 0)
    return torch.stack([spanned.to(own), own.sqrt(), spread.rsqrt(), aimed.sqrt()])


def _roots_read(
    own: list[float], aimed: list[float], *, least: float, eps: float
) -> list[list[float]]:
    """Do the same as :func:`_roots`, from values."""
    lowest = min(aimed[0], 0.0)
    shrink = lowest / (lowest - 1)
    aimed = [value + shrink * (1 - value) for value in aimed]
    roots = [math.sqrt(value) if value > least else 0.0 for value in own]
    return [
        [float(root > 0) for root in roots],
        roots,
        [1 / root if root else 0.0 for root in roots],
        [math.sqrt(value) if value > eps else 0.0 for value in aimed],
    ]


def resolution_of(dtype: torch.dtype) -> float:
    """Sine below which two gradients count as opposite: see :func:`ghpp_coefficients`.

    An entry rounded to ``dtype`` leaves the sine uncertain by sqrt(eps). A float64
    Gramian would allow 3e-8, but gradients are float32 at best as a rule, and their own
    rounding tilts opposite ones by about 1e-7.
    """
    return max(1e-6, 2 * math.sqrt(torch.finfo(dtype).eps))
