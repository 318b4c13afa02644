"""What some versions lack: tests that need it are skipped there, and say why."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.optim import Optimizer

from ghopt.gradients.graph import is_supported


def _is_before(package: str, number: str) -> bool:
    """Say whether a package is there, and older."""
    try:
        return Version(version(package)) < Version(number)
    except PackageNotFoundError:
        return False


faster_passes = pytest.mark.skipif(
    not is_supported(),
    reason="torch 2.8 does not show who unpacks what a node saved: no faster passes",
)
stores = pytest.mark.skipif(
    not hasattr(dist.ProcessGroup, "get_group_store"),
    reason="torch 2.8 does not give the store of a group away: a missing rank has no name",
)
adam_on_meta = pytest.mark.skipif(
    _is_before("torch", "2.11"),
    reason="Adam of torch 2.10 reads its number of steps on the meta device",
)
few_operations = pytest.mark.skipif(
    _is_before("torch", "2.9"),
    reason="torch 2.8 makes several operations of what is one later",
)
interpreter = pytest.mark.skipif(
    _is_before("triton", "3.8") and not _is_before("numpy", "2.4"),
    reason="triton before 3.8 does not interpret kernels beside numpy 2.4",
)
swapping = pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"),
    reason="torch 2.10 has no swap_in_optimizer_params_and_state",
)


def can_grow(base: Callable[[list[dict[str, Any]]], Optimizer]) -> bool:
    """Say whether an optimizer takes parameters that it was not made with."""
    first, late = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = base([{"params": [first]}])
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(1)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


def grow(base: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
    """Skip a test that gives an optimizer more parameters than it takes."""
    if not can_grow(base):
        pytest.skip("Adagrad of torch 2.10 has no state for parameters added later")
