"""Small matrices as all rules need them: scaled, and with determinants to rounding."""

import math
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

_Number = TypeVar("_Number", float, Tensor)

# Of vmap, jvp and the like; torch promises no name for it.
_is_transformed = getattr(
    getattr(torch._C, "_functorch", None),
    "is_functorch_wrapped_tensor",
    lambda _: False,
)


def nobody_watches(tensor: Tensor) -> bool:
    """Say whether the host may read values and compute with floats.

    On a device it would wait for them, and a subclass of tensors may hold none. A
    derivative, a map over Gramians or a compiled graph would miss what floats compute.
    """
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and not torch.compiler.is_compiling()
        and not _is_transformed(tensor)
        and unpack_dual(tensor).tangent is None  # type: ignore[no-untyped-call]  # torch's
    )


def rescaled(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """Give a float64 Gramian with diagonal in [1/2, 2), and the scale of each task.

    The scales are powers of two, so no entry is rounded, and no product of entries
    overflows. A zero gradient becomes one orthogonal to all others, which no rule
    touches. A Gramian with a non-finite entry becomes the identity: eigh would refuse
    it. The rules make their results NaN then.
    """
    gramian = gramian.double()
    # Of two tasks no value decides how many operations run, on the CPU either.
    if len(gramian) > 2 and nobody_watches(gramian):
        squares = gramian.diagonal().tolist()
        if min(squares) > 0 and math.isfinite(gramian.sum()):
            # As below, in a third of the calls.
            halves = [2.0 ** -(math.frexp(square)[1] // 2) for square in squares]
            scale = torch.tensor(halves, dtype=torch.float64, device="cpu")
            return gramian * scale[:, None] * scale, scale
    diagonal = gramian.detach().diagonal()
    some = diagonal > 0
    # Not by frexp: what Inductor makes of it on the CPU does not compile (torch 2.13).
    scale = (diagonal.log2() * -0.5 - 0.5).ceil().exp2().where(some, 1)
    # Two factors one after the other: their product alone could overflow.
    matrix = gramian * scale[:, None] * scale
    usable = some & some[:, None] & gramian.isfinite().all()
    return matrix.where(usable, identity(matrix)), scale


def identity(matrix: Tensor) -> Tensor:
    """Give the identity of the size, dtype and device of a matrix."""
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def determinant(square: _Number, product: _Number, other: _Number) -> _Number:
    """Determinant of the Gramian of two vectors to rounding; rounding may make it negative.

    Near opposite gradients its two products agree in all but the last digits; their
    rounding errors, which decide then, are taken along (Dekker 1971). Of floats or of
    float64 tensors.
    """
    upper, error = _exact_product(square, other)
    lower, lower_error = _exact_product(product, product)
    return (upper - lower) + (error - lower_error)


def _exact_product(a: _Number, b: _Number) -> tuple[_Number, _Number]:
    """Float64 product and its rounding error: their exact sum is ``a * b``."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    error = (
        (a_high * b_high - product) + a_high * b_low + a_low * b_high
    ) + a_low * b_low
    return product, error


def _halves(a: _Number) -> tuple[_Number, _Number]:
    """Split the 53 bits of a float64 so that products of halves are exact (Veltkamp)."""
    large = a * (2.0**27 + 1)
    high = large - (large - a)
    return high, a - high
