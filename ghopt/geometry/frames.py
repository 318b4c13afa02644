"""Rotations of two gradients, and of a frame of any number: the turn behind GH++."""

import math

import torch
from torch import Tensor

from ghopt.geometry.matrices import determinant, identity


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
    area: Tensor = determinant(square, product, other).clamp(min=0).sqrt()
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
    moved: Tensor = span @ allowed_root @ polar.mT @ inverse_root
    moved = moved * (norms[:, None] / norms) * (scale / scale[:, None])
    # Exactly the identity for a task that no other meets, and where no two conflict.
    meets = (cosines != unit).any(1)
    moves = (meets & meets[:, None]) & (cosines < 0).any()
    return moved.where(moves, unit)


def resolution_of(dtype: torch.dtype) -> float:
    """Sine below which two gradients count as opposite: see :func:`ghpp_coefficients`.

    An entry rounded to ``dtype`` leaves the sine uncertain by sqrt(eps). A float64
    Gramian would allow 3e-8, but gradients are float32 at best as a rule, and their own
    rounding tilts opposite ones by about 1e-7.
    """
    return max(1e-6, 2 * math.sqrt(torch.finfo(dtype).eps))
