"""What a caller gives as losses: checked, named, and each as it enters a total."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from functools import reduce
from operator import mul
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ghopt.compiled import refuse_donated

Loss: TypeAlias = Tensor | Sequence[Tensor]
"""A scalar, or several that are one task: their sum is meant."""

Losses: TypeAlias = Mapping[str, Loss] | Iterable[Loss] | Tensor
"""One loss per task: a mapping from names, an iterable, or a 1-D tensor."""

_UNSCALED = (
    "losses must be scaled one by one, since GradScaler.scale takes no mapping: pass "
    "{name: scaler.scale(loss) for name, loss in losses.items()}"
)

_MANY = 32
"""More tasks than this are a mistake as a rule: losses of samples, not yet averaged."""


def named_losses(losses: Losses) -> dict[str, Tensor]:
    """Check the losses of one step and name those that came without a name 0, 1, ...

    A task of several scalars, ``[l1, l2]``, is their sum.

    Raises:
        TypeError: if ``losses`` is nothing to iterate over, or a loss is no tensor.
        ValueError: if there is no loss, a loss is not a real scalar, or no loss
            requires grad.
    """
    return summed_up(scalars_of(losses))


def scalars_of(losses: Losses) -> dict[str, list[Tensor]]:
    """Check the losses of one step, and list the scalars of each task.

    Raises:
        TypeError, ValueError: as :func:`named_losses` does.
    """
    found: dict[str, list[Any]] = {
        name: [*loss] if isinstance(loss, list | tuple) else [loss]
        for name, loss in _named(losses).items()
    }
    if not found:
        raise ValueError("losses must hold at least one loss, got none")
    for name, scalars in found.items():
        if not scalars:
            raise ValueError(f"losses[{name!r}] must hold at least one loss, got none")
        for place, loss in enumerate(scalars):
            where = f"losses[{name!r}]" + (f"[{place}]" if len(scalars) > 1 else "")
            if isinstance(loss, map):
                raise TypeError(_UNSCALED)
            if not isinstance(loss, Tensor):
                raise TypeError(f"{where} must be a tensor, got {type(loss)}")
            if loss.numel() != 1 or not loss.is_floating_point():
                given = f"shape {list(loss.shape)} and dtype {loss.dtype}"
                raise ValueError(f"{where} must be a real scalar, got {given}")
    if not any(loss.requires_grad for scalars in found.values() for loss in scalars):
        raise ValueError(f"losses must require grad, got none that does in {[*found]}")
    return found


def summed_up(scalars: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Sum the scalars of each task; one alone stays the same tensor."""
    with torch.enable_grad():
        return {
            name: reduce(_added, parts[1:], parts[0]) for name, parts in scalars.items()
        }


def _added(total: Tensor, more: Tensor) -> Tensor:
    return total.reshape(()) + more.reshape(()).to(total.device)


def protected_names(protect: Iterable[str | int]) -> tuple[str, ...]:
    """Check which tasks are to be protected: names, or numbers in a list of losses.

    Raises:
        TypeError: if ``protect`` is a bare string, no iterable, or holds something else.
        ValueError: if it is empty.
    """
    if isinstance(protect, str | bytes) or not isinstance(protect, Iterable):
        raise TypeError(
            f"protect must be an iterable of names, got {protect!r}: pass ({protect!r},)"
        )
    names = list(protect)
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise TypeError(f"protect must hold names or numbers, got {name!r}")
    if not names:
        raise ValueError("protect must name a task, got none: leave it out")
    return tuple(dict.fromkeys(map(str, names)))


def warn_of_many(losses: Sized) -> None:
    """Warn of more than 32 tasks, which looks like a program that hangs."""
    if len(losses) > _MANY:
        warnings.warn(
            f"losses holds {len(losses)} tasks, and each costs a backward pass: losses of "
            "single samples must be averaged first, as by losses.mean()",
            stacklevel=3,
        )


def _named(losses: Losses) -> dict[str, Loss]:
    """Bring losses in any form to that of a dictionary."""
    if isinstance(losses, Tensor):
        if losses.dim() == 0:
            raise ValueError(
                "losses must be those of the tasks, got their sum, or one loss alone: "
                "pass [a, b], not a + b, and [loss] for a single task"
            )
        if losses.dim() != 1:
            shape = list(losses.shape)
            raise ValueError(f"losses as one tensor must be 1-D, got shape {shape}")
        losses = losses.unbind()
    if isinstance(losses, Mapping):
        named = {str(name): loss for name, loss in losses.items()}
        if len(named) != len(losses):
            raise ValueError(f"losses must have distinct names, got {[*losses]}")
        return named
    if isinstance(losses, Iterable):
        try:
            return {str(task): loss for task, loss in enumerate(losses)}
        except ValueError as error:
            if isinstance(losses, map) and "iterable of Tensors" in str(error):
                raise TypeError(_UNSCALED) from error
            raise
    raise TypeError(f"losses must be a mapping or iterable, got {type(losses)}")


def as_in_total(losses: Losses, total: Tensor) -> dict[str, Tensor]:
    """Give each loss the factor with which it enters a total: d total / d loss.

    For frameworks that want one scalar, and scale or divide it before the backward pass.
    A loss with the factor 0 comes back without grad, where to ask costs nothing: on the
    CPU, in a single process.

    Args:
        losses: scalars, none computed from another; or a 1-D tensor of them.
        total: scalar computed from them, and from nothing else that requires grad.

    Raises:
        TypeError: if ``total`` is no tensor, or as :func:`named_losses` does.
        ValueError: if it is no scalar that requires grad, a loss does not enter it,
            something else does, or two losses are the same tensor; or as
            :func:`named_losses` does.
    """
    scalars = scalars_of(losses)
    if not isinstance(total, Tensor):
        raise TypeError(f"total must be a tensor, got {type(total)}")
    if total.numel() != 1 or not total.requires_grad:
        given = f"shape {list(total.shape)}, requires_grad={total.requires_grad}"
        raise ValueError(f"total must be a scalar that requires grad, got {given}")
    live = {
        (name, place): loss
        for name, parts in scalars.items()
        for place, loss in enumerate(parts)
        if loss.requires_grad
    }
    factors = _factors(losses, live, total)
    with torch.enable_grad():
        scaled = summed_up(
            {
                name: [loss * factors.get((name, k), 1) for k, loss in enumerate(parts)]
                for name, parts in scalars.items()
            }
        )
    alone = not (dist.is_available() and dist.is_initialized())
    moving = {
        name
        for (name, _), factor in factors.items()
        if not (alone and _is_known_zero(factor))
    }
    if moving:
        idle = {name for name, _ in live if name not in moving}
        scaled |= {name: scaled[name].detach() for name in idle}
    return scaled


_Scalars: TypeAlias = dict[tuple[str, int], Tensor]
"""Scalars by task and place in it."""


def _factors(losses: Losses, live: _Scalars, total: Tensor) -> _Scalars:
    """Differentiate a total with respect to the scalars that require grad."""
    if len({id(loss) for loss in live.values()}) < len(live):
        names = [*dict.fromkeys(name for name, _ in live)]
        raise ValueError(f"losses in a total must be distinct tensors, got {names}")
    # A 1-D tensor entered the total as a whole: the pieces are not in its graph.
    sources = [losses] if isinstance(losses, Tensor) else [*live.values()]
    for leaf in leaves(total, but_through=sources):
        raise ValueError(
            "total must be made of the losses alone, got one that reaches a parameter of "
            f"shape {list(leaf.shape)} past them: its gradient there would be lost, so "
            "make that term a loss, or run its backward pass apart"
        )
    refuse_donated([total])
    found: Sequence[Tensor | None] = torch.autograd.grad(
        total, sources, retain_graph=True, allow_unused=True
    )
    if isinstance(losses, Tensor):
        found = [None] * len(live) if found[0] is None else found[0].unbind()
    factors: _Scalars = {}
    for (name, place), factor in zip(live, found, strict=True):
        if factor is None:
            raise ValueError(f"total must contain losses[{name!r}], got one without it")
        factors[name, place] = factor
    return factors


def leaves(tensor: Tensor, but_through: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """List the tensors without a history from which a tensor was computed.

    What a reentrant checkpoint hides is not found.

    Args:
        tensor: requires grad.
        but_through: intermediate results, also with grad, past which not to look.
    """
    seen = {edge_of(end) for end in but_through}
    stack = [edge_of(tensor)]
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        leaf = getattr(edge[0], "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        stack += [(node, place) for node, place in edge[0].next_functions if node]


def edge_of(tensor: Tensor) -> tuple[Node, int]:
    """Give the node that made a tensor, and which of its outputs it is."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _is_known_zero(factor: Tensor) -> bool:
    return factor.device.type == "cpu" and not factor.item()


def weighted_sum(losses: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum scalars with constant weights ``[K]``, each in its dtype.

    Raises:
        ValueError: if a dtype cannot hold a finite weight; on the CPU, where to ask
            costs nothing.
    """
    check_range(weights, (loss.dtype for loss in losses))
    pairs = zip(weights.unbind(), losses, strict=True)
    with torch.enable_grad():
        return torch.stack([w.to(loss) * loss.reshape(()) for w, loss in pairs]).sum()


def check_range(
    weights: Tensor, dtypes: Iterable[torch.dtype], gramian: Tensor | None = None
) -> None:
    """Refuse finite weights that one of the dtypes cannot hold.

    Half precision is summed in float32: there the weights may be larger, as long as their
    gradients are so much smaller.

    Args:
        weights: shape ``[K]``.
        dtypes: of what is weighed.
        gramian: inner products of the gradients, ``[K, K]``, if it is gradients.

    Raises:
        ValueError: if there are some; on the CPU, where to ask costs nothing.
    """
    if weights.device.type != "cpu":
        return
    given = [abs(weight) for weight in weights.tolist()]
    largest = max(given)
    # Every floating point dtype holds as much as this one.
    if not torch.finfo(torch.float16).max < largest < math.inf:
        return
    reach = largest
    if gramian is not None:
        squares = [row[task] for task, row in enumerate(gramian.tolist())]
        reach = max(map(mul, given, map(math.sqrt, squares)))
    for dtype in set(dtypes):
        is_half = dtype in (torch.float16, torch.bfloat16)
        held = (
            reach if is_half and largest < torch.finfo(torch.float32).max else largest
        )
        if torch.finfo(dtype).max < held:
            raise ValueError(
                f"weighting must return weights that {dtype} can hold, got {largest:g} for "
                "gradients of this dtype: does it map a Gramian [K, K] to weights [K]? Or "
                "scale the losses, if their gradients differ so much in size"
            )
