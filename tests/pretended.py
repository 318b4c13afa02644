"""A pretended device without float64: its tensors live on the CPU, and cannot be wide.

Emulated: a tensor subclass that says it is elsewhere, and a mode that runs every operation
on the CPU. It refuses, as Apple's MPS does, to make a float64 tensor there, also on the way
to the CPU in one call, and to mix tensors of both places. What a real device does else,
the emulation cannot tell.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ghopt import geometry
from ghopt.geometry import cone, frames, matrices

DEVICE = torch.device("mps", 0)
_READ_IN = (geometry, cone, frames, matrices)
_WIDE = (torch.float64, torch.complex128)


@contextmanager
def nothing_read() -> Iterator[None]:
    """Let the rules read no value of a Gramian, as on any device."""
    with ExitStack() as stack:
        for module in _READ_IN:
            stack.enter_context(
                patch.object(module, "nobody_watches", return_value=False)
            )
        yield


class _Pretended(Tensor):
    """A tensor that says it is on :data:`DEVICE`."""

    wrapped: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        """Wrap a tensor on the CPU."""
        if inner.dtype in _WIDE:
            raise TypeError(f"{DEVICE} has no float64")
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            requires_grad=inner.requires_grad,
        )
        made.wrapped = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # a fixed one
        """Say where this tensor pretends to be: torch itself knows it on the CPU."""
        return DEVICE

    # What follows torch would do by itself, if it did not know better where we are.

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        """Copy to the CPU."""
        return self.wrapped.detach().clone()

    def tolist(self) -> Any:
        """Read all values."""
        return self.wrapped.tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Change dtype or device; to be wide, where it gets to the CPU first."""
        if isinstance(args[0], Tensor):
            device, dtype = args[0].device, args[0].dtype
        else:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype in _WIDE:
            raise TypeError(f"{DEVICE} has no float64")
        if device is not None and device.type == "cpu":
            return self.cpu().to(dtype or self.dtype)
        return super().to(dtype or self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own has too few
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the CPU."""
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    mine = [t for t in tensors if isinstance(t, _Pretended)]
    wanted = kwargs.get("device")
    kind = None if wanted is None else torch.device(wanted).type
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if (
        mine
        and not moves
        and any(t.dim() and not isinstance(t, _Pretended) for t in tensors)
    ):
        raise RuntimeError(f"{func}: tensors on the CPU and on {DEVICE}")
    if (
        mine
        and func is torch.ops.aten._to_copy.default
        and kwargs.get("dtype") in _WIDE
    ):
        raise TypeError(f"{DEVICE} has no float64")
    here = kind == DEVICE.type if kind else bool(mine)
    if kind == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    given: dict[int, Tensor] = {id(t.wrapped): t for t in mine}
    inner_args, inner_kwargs = tree_map(
        lambda t: t.wrapped if isinstance(t, _Pretended) else t, (args, kwargs)
    )
    found = func(*inner_args, **inner_kwargs)
    if func is torch.ops.aten.copy_.default:
        return args[0]
    if not here:
        return found

    def wrapped(out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        return given.get(id(out)) if id(out) in given else _Pretended(out)

    return tree_map(wrapped, found)


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Make the pretended device usable."""
    with _Mode():  # type: ignore[no-untyped-call]  # torch's
        yield DEVICE


def moved(model: nn.Module) -> nn.Module:
    """Put the parameters of a model on the pretended device, inside the context."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            inner = parameter.detach().to(DEVICE)
            setattr(module, name, nn.Parameter(inner, parameter.requires_grad))
    return model
