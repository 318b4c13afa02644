"""The gradients of K tasks as one dense matrix, ``[K, n]``, on the CPU."""

import torch
from torch import Tensor

from ghopt.gradients.entries import BLOCK


@torch.no_grad()
def gramian_of(matrix: Tensor) -> Tensor:
    """Take the inner products of rows, in float64.

    Args:
        matrix: shape ``[K, n]``, of any real floating-point dtype.

    Returns:
        Shape ``[K, K]``, float64, symmetric to the last bit.
    """
    total = matrix.new_zeros(len(matrix), len(matrix), dtype=torch.float64)
    # By blocks, so that what is made float64 takes little memory and stays in the cache.
    for block in torch.split(matrix, BLOCK, dim=1):
        wide = block.double()
        total.addmm_(wide, wide.T)
    return total.triu() + total.triu(1).T


@torch.no_grad()
def weighted_row(matrix: Tensor, weights: Tensor, *, wide: bool) -> Tensor:
    """Sum rows with weights.

    Args:
        matrix: shape ``[K, n]``, float32 or float64.
        weights: shape ``[K]``, float64.
        wide: sum in float64 and round once, as rows that cancel need it.

    Returns:
        Shape ``[n]``, in the dtype of the matrix and memory of its own.
    """
    if not wide:
        return weights.to(matrix.dtype) @ matrix
    row = matrix.new_empty(matrix.shape[1])
    parts = zip(torch.split(matrix, BLOCK, dim=1), torch.split(row, BLOCK), strict=True)
    for block, part in parts:
        part.copy_(weights @ block.double())
    return row
