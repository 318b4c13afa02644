"""Gramians of the two tasks' gradients as rows of numbers, and their angles."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Row: TypeAlias = tuple[float, float, float]
"""A Gramian of two tasks: g1.g1, g1.g2 and g2.g2."""

# Cosines nearer to 0 than this are 0: GH++ makes orthogonal gradients, up to rounding.
ORTHOGONAL = 1e-9


class Angles(NamedTuple):
    """How two gradients lay to each other over a run; all None with one loss.

    Attributes:
        obtuse: share of obtuse angles, in percent.
        cosine: mean.
        ratio: median of the norms' ratio.
    """

    obtuse: float | None = None
    cosine: float | None = None
    ratio: float | None = None


def to_rows(gramians: Iterable[Tensor]) -> list[Row]:
    """Turn Gramians, ``[2, 2]`` each, into what is stored of them."""
    return [to_row(one[0, 0], one[0, 1], one[1, 1]) for one in gramians]


def to_row(first: Tensor, product: Tensor, second: Tensor) -> Row:
    """Round to 8 digits what is stored of a Gramian: g1.g1, g1.g2 and g2.g2."""
    a, b, c = (float(f"{float(number):.8g}") for number in (first, product, second))
    return a, b, c


def cosines(rows: Sequence[Row]) -> Tensor:
    """Cosines of pairs of gradients, float64 ``[n]``; 0 where a gradient is zero."""
    gramians = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    norms = gramians[:, 0].sqrt() * gramians[:, 2].sqrt()
    return torch.where(norms == 0, 0, gramians[:, 1] / norms.where(norms != 0, 1))


def norm_ratios(rows: Sequence[Row]) -> Tensor:
    """Norm of g1 divided by that of g2, float64 ``[n]``."""
    gramians = torch.tensor(rows, dtype=torch.float64).view(-1, 3)
    return gramians[:, 0].sqrt() / gramians[:, 2].sqrt()


def obtuse_share(rows: Sequence[Row]) -> float:
    """Share of pairs at an obtuse angle, in [0, 1]; NaN without pairs.

    NaN, too, if a gradient is not finite: such a pair has no angle.
    """
    found = cosines(rows)
    return float(
        (found < -ORTHOGONAL).double().where(found.isfinite(), math.nan).mean()
    )


def angles(rows: Sequence[Row]) -> Angles:
    """Sum up a run's Gramians; nothing without any."""
    if not rows:
        return Angles()
    return Angles(
        100 * obtuse_share(rows),
        float(cosines(rows).mean()),
        float(norm_ratios(rows).quantile(0.5)),
    )
