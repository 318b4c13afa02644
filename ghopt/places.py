"""Parameters by their places in the groups of an optimizer.

What is remembered of ``shared_params``: Accelerate and FSDP put other parameters in the
same places.
"""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

Place: TypeAlias = tuple[int, int]
"""Number of the group, and number in it."""


def placed(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[Place, Tensor]]:
    """Yield the parameters of some groups with their places."""
    for number, group in enumerate(groups):
        for index, parameter in enumerate(group["params"]):
            yield (number, index), parameter


def places(shared_params: Iterable[Tensor], base: Optimizer) -> frozenset[Place]:
    """Find the places of the shared parameters.

    Raises:
        TypeError: if ``shared_params`` is no iterable of parameters.
        ValueError: if it is empty, or holds one that is not in the optimizer.
    """
    is_other = isinstance(shared_params, Tensor | nn.Module)
    if is_other or not isinstance(shared_params, Iterable):
        raise TypeError(
            f"shared_params must be an iterable of parameters, got "
            f"{type(shared_params)}: pass trunk.parameters()"
        )
    wanted = list(shared_params)
    if not wanted:
        raise ValueError("shared_params must hold a parameter, got none")
    for index, parameter in enumerate(wanted):
        if not isinstance(parameter, Tensor):
            entry = f"{type(parameter)} at {index}"
            raise TypeError(f"shared_params must hold parameters, got {entry}")
    known = {parameter for _, parameter in placed(base.param_groups)}
    for index, parameter in enumerate(wanted):
        if parameter not in known:
            given = f"one of shape {list(parameter.shape)} at {index} that is not"
            raise ValueError(f"shared_params must be in base_optimizer, got {given}")
    members = set(wanted)
    return frozenset(place for place, p in placed(base.param_groups) if p in members)
