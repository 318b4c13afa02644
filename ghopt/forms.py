"""What a gradient may be beside a plain tensor: complex, conjugated, a shard (DTensor)."""

import sys
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
