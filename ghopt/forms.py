"""What a gradient may be beside a plain tensor on the CPU.

Complex, conjugated, a shard (DTensor), or on a device without float64.
"""

import sys
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Say whether a tensor is a DTensor."""
    if type(tensor) is Tensor:
        return False
    # A DTensor can exist only if its module is imported; to import it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def placed_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Give a DTensor the placements of its parameter; in other tensors, nothing to do.

    A gradient may be partial, to be summed over the mesh before it can be used.
    """
    if not (is_dtensor(gradient) and is_dtensor(parameter)):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


def local(tensor: Tensor) -> Tensor:
    """Give the shard of this rank; of other tensors, all."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def writable(tensor: Tensor) -> Tensor:
    """Resolve a lazily conjugated or negated tensor, which cannot be written."""
    return tensor.resolve_conj().resolve_neg()


def as_real(tensor: Tensor) -> Tensor:
    """Give a complex tensor as pairs of reals, in the same memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def shard_groups(tensor: Tensor) -> "tuple[ProcessGroup, ...]":
    """List the groups over which the shards of a tensor are spread, one per mesh axis.

    The inner product of two tensors is the sum of those of the shards over all of them.
    """
    if not is_dtensor(tensor):
        return ()
    return tuple(
        tensor.device_mesh.get_group(axis)
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate()
    )


# Known without asking.
_WITH_FLOAT64 = ("cpu", "cuda", "meta")


def has_float64(device: torch.device) -> bool:
    """Say whether a device has float64: Apple's MPS has not, nor have some XPUs."""
    return device.type in _WITH_FLOAT64 or _can_add_float64(device.type)


@cache
def _can_add_float64(kind: str) -> bool:
    """Try float64 on a kind of device."""
    try:
        torch.zeros(1, dtype=torch.float64, device=kind).add_(1)
    except (TypeError, RuntimeError):  # of MPS, and of an XPU
        return False
    return True


def home_of_numbers(device: torch.device) -> torch.device:
    """Say where the Gramian of gradients is: beside them, or, without float64, the CPU."""
    return device if has_float64(device) else torch.device("cpu")
