"""Gradients of tasks at the features, where they leave the shared trunk.

The gradients of K tasks with respect to some features walk through the heads alone, and
say how the tasks conflict there. One ordinary backward pass of the summed losses then does
the rest: the gradient that arrives at the features is replaced by the weighted sum.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from ghopt.compiled import refuse_donated
from ghopt.forms import placed_as
from ghopt.gradients import StoredGradients
from ghopt.losses import edge_of
from ghopt.passes import with_cure
from ghopt.ranks import Alone, Ranks

Features: TypeAlias = Tensor | Iterable[Tensor]
"""Results of the trunk that the heads take: one, or several with none behind another."""


def listed_features(features: Features) -> list[Tensor]:
    """Check features, and list each of them once.

    Raises:
        TypeError: if they are no tensors.
        ValueError: if there is none, one does not require grad or is a leaf, or one lies
            behind another.
    """
    if not isinstance(features, Iterable):  # which a tensor is
        given = type(features)
        raise TypeError(f"features must be a tensor, or several, got {given}")
    found = [features] if isinstance(features, Tensor) else [*features]
    if not found:
        raise ValueError("features must hold a tensor, got none")
    for one in found:
        if not isinstance(one, Tensor):
            raise TypeError(f"features must hold tensors alone, got {type(one)}")
        if not one.requires_grad:
            raise ValueError(
                f"features must require grad, got shape {list(one.shape)} without: were "
                "they detached, or made under no_grad? While the trunk is frozen, leave "
                "features out"
            )
        if one.grad_fn is None:
            raise ValueError(
                f"features must be computed by the trunk, got a leaf of shape "
                f"{list(one.shape)}, behind which there is none. To harmonize over some "
                "parameters, give them as shared_params"
            )
    edges = {edge_of(one): one for one in found}
    if len(edges) > 1:
        _refuse_nested(edges)
    return [*edges.values()]


def _refuse_nested(features: Mapping[tuple[Node, int], Tensor]) -> None:
    """Refuse features of which one was computed from another.

    What the tasks want of it would count twice.
    """
    stack = [node for node, _ in features]
    seen: set[tuple[Node, int]] = set()
    while stack:
        for node, place in stack.pop().next_functions:
            if node is None or (node, place) in seen:
                continue
            seen.add((node, place))
            stack.append(node)
    for behind in features.keys() & seen:
        raise ValueError(
            "features must not lie behind one another, got one of shape "
            f"{list(features[behind].shape)} from which another was computed: give those "
            "that the heads take"
        )


class FeatureGradients:
    """Gradients of K tasks at the features of this rank, measured over all ranks.

    Args:
        stored: those of this rank, by feature.
        ranks: each has features of its own, of its part of the batch.
        parameters: of the optimizer. Ranks that share them as shards sum, too.
    """

    def __init__(
        self,
        stored: StoredGradients,
        ranks: Alone | Ranks,
        parameters: Sequence[Tensor],
    ) -> None:
        self._stored = stored
        self._ranks = ranks
        self._parameters = parameters

    def __bool__(self) -> bool:
        """Say whether a task reaches a feature."""
        return bool(self._stored)

    def gramian(self, over: Iterable[Tensor] | None = None) -> Tensor:
        """Take the inner products over the features of all ranks, to be called on all.

        Raises:
            ValueError: if they are asked for over some parameters, of which no task has a
                gradient by itself.
        """
        if over is not None:
            raise ValueError(
                "layers of parameters cannot be measured with features, where no task has "
                "a gradient of its own: take Recorder.attach(layers=...), or the hook that "
                "asks, away"
            )
        mine = self._stored.gramian().clone()  # which is summed in place
        return self._ranks.sum_products(mine, self._parameters)

    def combine(
        self, weights: Tensor, gramian: Tensor | None = None, *, keep: bool = False
    ) -> dict[Tensor, Tensor]:
        """See :meth:`ghopt.gradients.TaskGradients.combine`: here nothing is spoilt.

        Features are small, and their gradients may share memory among tasks, or be one
        number expanded: the sums are written elsewhere.
        """
        del keep
        return self._stored.combine(weights, gramian, keep=True)


def gradients_at(
    features: Sequence[Tensor], losses: Mapping[str, Tensor], names: Collection[str]
) -> StoredGradients:
    """Take the gradients of each loss with respect to the features: K walks of the heads.

    The graph stays, and so does what a feature retains as its ``.grad``.

    Args:
        features: see :func:`listed_features`.
        losses: of this rank, by name.
        names: of all tasks, those of other ranks included.

    Raises:
        ValueError: if no loss depends on a feature.
        RuntimeError: see :func:`refuse_donated`; and as torch does, for one, where the
            heads use reentrant checkpoints.
    """
    refuse_donated(losses.values())
    gradients = StoredGradients(names, features)
    with _retaining(features), with_cure():
        for name, loss in losses.items():
            if loss.requires_grad:
                found = torch.autograd.grad(
                    loss, features, retain_graph=True, allow_unused=True
                )
                pairs = zip(features, found, strict=True)
                gradients[name].update(
                    {z: placed_as(g, z) for z, g in pairs if g is not None}
                )
    missing = {*features} - {*gradients}
    if missing:
        raise ValueError(
            f"features must be what the losses are computed from, got {len(missing)} on "
            "which none depends: give the very tensors that the heads take, of this "
            "forward pass. A compiled model that returns features beside outputs, or a "
            "DDP model with find_unused_parameters, hands out copies: let it return the "
            "features, and apply the heads outside"
        )
    return gradients


@contextmanager
def _retaining(features: Iterable[Tensor]) -> Iterator[None]:
    """Keep what features retain in ``.grad``: gradients that are taken add to it."""
    kept = {z: z.grad for z in features if z.retains_grad}
    try:
        yield
    finally:
        for feature, grad in kept.items():
            feature.grad = grad


def pass_replacing(
    total: Tensor, gradients: Mapping[Tensor, Tensor], *, retain_graph: bool
) -> None:
    """Run a backward pass in which some features hand on other gradients than arrive."""
    handles = [
        feature.register_hook(lambda _, gradient=gradient: gradient)  # type: ignore[no-untyped-call]  # torch's
        for feature, gradient in gradients.items()
    ]
    try:
        with with_cure():
            total.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]  # torch's
    finally:
        for handle in handles:
            handle.remove()


def made(
    parameters: Iterable[Tensor],
    before: Iterable[Tensor | None],
    averaged: Collection[Tensor],
) -> dict[Tensor, Tensor]:
    """Take what a pass has left in ``.grad``, such that it can be added and averaged.

    Args:
        parameters: without ``.grad`` before the pass.
        before: what each had there earlier, to which the new one will be added. Both may
            be views of one bucket of a DDP model.
        averaged: those whose gradients will be changed in place.
    """
    apart = {*averaged}
    return {
        p: p.grad.clone()
        if p.grad._is_view() and (p in apart or old is not None)
        else p.grad
        for p, old in zip(parameters, before, strict=True)
        if p.grad is not None
    }
