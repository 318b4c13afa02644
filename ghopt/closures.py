"""What a closure returned, and whether it ran a backward pass."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor

Closure: TypeAlias = Callable[[], Any]
"""Evaluates the model; returns a number, a scalar tensor or the losses of the tasks."""

Versions: TypeAlias = dict[int, tuple[weakref.ref[Tensor], int]]
"""Gradients by identity, as they were at a moment."""


def versions(grads: Iterable[Tensor]) -> Versions:
    """Note gradients as they are now."""
    # Weakly: what the closure clears must not live on through its passes.
    return {id(grad): (weakref.ref(grad), grad._version) for grad in grads}


def has_new(grads: Iterable[Tensor], before: Versions) -> bool:
    """Say whether gradients were made or changed since they were noted."""
    for grad in grads:
        old, version = before.get(id(grad), (None, 0))
        if old is None or old() is not grad or version != grad._version:
            return True
    return False


def are_losses(result: Any) -> bool:
    """Say whether a closure returned losses, and not one number in whatever form."""
    if isinstance(result, Tensor):
        return result.dim() == 1 and (result.numel() != 1 or result.requires_grad)
    # An array of no dimension calls itself iterable.
    is_number = getattr(result, "ndim", None) == 0
    return isinstance(result, Iterable) and not (
        is_number or isinstance(result, str | bytes)
    )


def is_single(result: Any) -> bool:
    """Say whether a result is a tensor of one element."""
    return isinstance(result, Tensor) and result.numel() == 1
