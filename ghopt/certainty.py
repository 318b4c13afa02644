"""How sure a share of steps is: neighbouring steps are alike, and trainings change."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959964
"""Of the normal distribution, for intervals of 95 %."""


@dataclass(frozen=True)
class Share:
    """In which share of the steps a value is below a line, and how sure that is.

    Attributes:
        share: of the steps.
        low: 95 % sure, the share in longer recordings of the same is at least this.
        high: and at most this.
        independent: as many independent steps would say as much.
        first: the share in the first half of the steps.
        last: the share in the second half.
        far: were the values to change on as from the first half to the second, they would
            stay above the line.
    """

    share: float
    low: float
    high: float
    independent: float
    first: float
    last: float
    far: bool


def share_below(values: Tensor, line: float = 0.0) -> Share:
    """Count in which share of the steps a value is below a line.

    The interval is Wilson's, of as many steps as are independent. It allows for what the
    recording shows of how alike steps are, not for what no recording shows: a training
    that changes after its end.

    Args:
        values: of each step, ``[n]``; NaN where there is none.
        line: below which a value counts.
    """
    known = values[~values.isnan()]
    if not len(known):
        return Share(0.0, 0.0, 1.0, 0.0, 0.0, 0.0, False)
    share = _mean(known < line)
    independent = independent_steps(known)
    one, two = known.tensor_split([(len(known) + 1) // 2])
    two = two if len(two) else one
    ahead = 2 * two.mean() - one.mean() - 2 * two.std(unbiased=False)
    return Share(
        share,
        *_wilson(share, independent),
        independent,
        _mean(one < line),
        _mean(two < line),
        bool(ahead > line),
    )


def independent_steps(values: Tensor) -> float:
    """Count how many independent values would tell the mean as well as these, from 1.

    The number of values over their autocorrelation time, by Geyer's initial positive
    sequence (1992): autocorrelations are summed in pairs until a sum is not positive.
    A trend makes all steps alike: of one, about four are left. Values that are all the
    same count as independent: nothing says that they are not.

    Args:
        values: in the order of the steps, ``[n]``, finite.
    """
    count = len(values)
    centered = values - values.mean()
    # Padded, or the end would be correlated with the start.
    spectrum = torch.fft.rfft(centered, n=2 * count)
    products = torch.fft.irfft(spectrum * spectrum.conj(), n=2 * count)[:count]
    scale = float(values.abs().max()) * torch.finfo(values.dtype).eps
    if float(products[0]) <= count * scale**2 * 16 or count < 4:
        return float(count)
    pairs = (products / products[0])[: count - count % 2].view(-1, 2).sum(1)
    time = 2 * float(pairs[(pairs > 0).long().cumprod(0).bool()].sum()) - 1
    return count / max(time, 1.0)


def _wilson(share: float, count: float) -> tuple[float, float]:
    """Take the interval of a share of so many independent steps (Wilson, 1927)."""
    shrunk = 1 + Z**2 / count
    middle = (share + Z**2 / (2 * count)) / shrunk
    reach = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2) / shrunk
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _mean(flags: Tensor) -> float:
    return float(flags.double().mean())
