"""Around the step: torch's global hooks, gradient scalers, and what a step takes."""

import gc
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ghopt.living import living

_stepping = threading.local()
"""In ``bases``: those that step in this thread, inside a wrapper."""


class _ButForBases:
    """A global step hook of torch that passes by the bases of wrappers.

    The hook has run for the wrapper already. This object replaces it under the same key,
    so that handles still find it. It stays there: to remove and to restore it would not
    be safe among threads.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, optimizer: Optimizer, *args: Any) -> Any:
        """Run the hook, or pass by."""
        bases = getattr(_stepping, "bases", [])
        if any(optimizer is base for base in bases):
            return None
        return self._hook(optimizer, *args)


@contextmanager
def passing_by(base: Optimizer) -> Iterator[None]:
    """Keep torch's global step hooks from running for the base as well."""
    module = import_module("torch.optim.optimizer")  # torch.optim hides its name
    for kind in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        hooks = getattr(module, kind)
        for key, hook in list(hooks.items()):
            if not isinstance(hook, _ButForBases):
                hooks[key] = _ButForBases(hook)
    bases = _stepping.__dict__.setdefault("bases", [])
    bases.append(base)
    try:
        yield
    finally:
        bases.remove(base)


def is_zero(rate: Any) -> bool:
    """Say whether a learning rate is zero; one on a device is not read."""
    if isinstance(rate, Tensor) and rate.device.type != "cpu":
        return False
    return not rate


def takes(function: Callable[..., Any], keyword: str) -> bool:
    """Say whether a function takes a keyword."""
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def scaler_that_asks(frame: FrameType) -> GradScaler | None:
    """Give the scaler whose ``step`` asks for an attribute, if one does."""
    is_step = frame.f_code is GradScaler.step.__code__
    return frame.f_locals["self"] if is_step else None


def is_unscaled(optimizer: Optimizer) -> bool:
    """Say whether any scaler has unscaled the gradients of the step to come.

    The search takes some ten milliseconds.
    """
    # A scaler knows optimizers by their address, those that are no more included: one
    # that only waits to be collected speaks of an optimizer that was here before.
    if not _any_has_unscaled(optimizer):
        return False
    gc.collect()
    return _any_has_unscaled(optimizer)


def _any_has_unscaled(optimizer: Optimizer) -> bool:
    return any(has_unscaled(scaler, optimizer) for scaler in living(GradScaler))


def has_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Say whether a scaler has unscaled the gradients of the step to come."""
    # One that is not enabled has none.
    states = getattr(scaler, "_per_optimizer_states", {})
    state = states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY
