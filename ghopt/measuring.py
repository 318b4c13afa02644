"""What is known of the gradients of tasks before they are combined: Gramian and weights.

The Gramian itself is made in ``gradients/products.py``.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ghopt.geometry import Weighting, cosines, gh
from ghopt.gradients import TaskGradients
from ghopt.losses import Losses, named_losses, warn_of_many, weighted_sum
from ghopt.passes import taken
from ghopt.ranks import ALONE, Alone, Ranks


@dataclass(frozen=True)
class Harmonization:
    """What one ``backward`` found and did. Reading a value waits for the device.

    Attributes:
        names: of the tasks, in the order of the rows below.
        gramian: inner products of the task gradients before harmonization, over the
            shared parameters, shape ``[K, K]``, float64.
        weights: of the task gradients in the update (tau), shape ``[K]``, float64.
        rule: name of the weighting, "" if unknown.
        at_features: whether the inner products are those of the gradients at the
            features, not over parameters.
    """

    names: tuple[str, ...]
    gramian: Tensor
    weights: Tensor
    rule: str = ""
    at_features: bool = False

    @property
    def cosines(self) -> Tensor:
        """Cosines between the task gradients, shape ``[K, K]``; 0 with a zero one."""
        return cosines(self.gramian)


GramianOf: TypeAlias = Callable[[Iterable[Tensor]], Tensor]
"""Inner products of the task gradients over some parameters, ``[K, K]``, float64."""

HarmonizeHook: TypeAlias = Callable[[Harmonization, GramianOf], None]
"""What :meth:`HarmonizedOptimizer.register_harmonize_hook` takes."""


def check_weighting(weighting: object) -> None:
    """Refuse a weighting that does not map a Gramian to weights.

    Raises:
        TypeError: if ``weighting`` is not callable; a class, where an object of it is
            meant; or an aggregator of TorchJD, or its ``ExcessMTLWeighting``. These map a
            Jacobian ``[K, N]``, and with a Gramian they run, too.
    """
    if not callable(weighting):
        raise TypeError(f"weighting must be callable, got {weighting!r}")
    kind = weighting if isinstance(weighting, type) else type(weighting)
    name = kind.__name__
    of_torchjd = {
        parent.__name__
        for parent in kind.__mro__
        if parent.__module__.startswith("torchjd.")
    }
    if of_torchjd & {"Aggregator", "ExcessMTLWeighting"}:
        twin = f"{name}Weighting"
        has_twin = hasattr(sys.modules["torchjd.aggregation"], twin)
        is_of_gramians = has_twin and twin != "ExcessMTLWeighting"
        cure = f"{twin}()" if is_of_gramians else "one of its weightings of a Gramian"
        raise TypeError(
            "weighting must map a Gramian to weights, not the gradients, as TorchJD's "
            f"{name}(): pass {cure}"
        )
    if isinstance(weighting, type):
        raise TypeError(
            f"weighting must map a Gramian to weights, got the class {name}: pass an "
            f"object of it, as {name}()"
        )


def name_of(weighting: Weighting) -> str:
    """Name a weighting: a function, a part of one, or an object."""
    while isinstance(weighting, partial):
        weighting = weighting.func
    return getattr(weighting, "__name__", type(weighting).__name__)


def weigh(weighting: Weighting, gramian: Tensor) -> Tensor:
    """Apply a weighting and check what it returns.

    Returns:
        Weights, shape ``[K]``, float64 and detached, on the device of the Gramian, in
        memory of their own: ranks write the weights of the first rank to it.

    Raises:
        TypeError: if ``weighting`` returns no tensor, or is none: see
            :func:`check_weighting`.
        ValueError: if it returns another shape than ``[K]``, complex numbers or
            integers, or weights on another device or that require grad.
    """
    check_weighting(weighting)
    with torch.no_grad():
        weights = weighting(gramian)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weighting must return a tensor, got {type(weights)}")
    if weights.shape != gramian.shape[:1] or not weights.is_floating_point():
        expected = f"floating point of shape {list(gramian.shape[:1])}"
        given = f"{weights.dtype} of shape {list(weights.shape)}"
        raise ValueError(f"weighting must return {expected}, got {given}")
    if weights.device != gramian.device:
        devices = f"{gramian.device}, got {weights.device}"
        raise ValueError(f"weighting must return weights on {devices}")
    if weights.requires_grad:
        raise ValueError(
            "weighting must return weights without grad, got requires_grad"
        )
    return weights.to(gramian, copy=True)


def measured(
    gradients: TaskGradients,
    names: Iterable[str],
    weighting: Weighting,
    ranks: Alone | Ranks = ALONE,
) -> Harmonization:
    """Take the Gramian of the gradients of some tasks, and weigh them.

    Raises:
        TypeError: as :func:`weigh` does.
        ValueError: likewise.
        RuntimeError: if a rank failed or does not answer.
    """
    gramian = gradients.gramian()
    weights = ranks.first_weights(weigh(weighting, gramian))
    return Harmonization(tuple(names), gramian, weights, name_of(weighting))


def harmonized_loss(
    losses: Losses, params: Iterable[Tensor], weighting: Weighting = gh
) -> Tensor:
    """Sum the losses with the weights of a rule: the equivalent model (eq. 44 and 45).

    For loops whose optimizer cannot be changed: call ``.backward()`` on the result. The
    weights are measured on ``params`` and constant, so the gradient of ``params`` is the
    harmonized one. Costs one backward pass per task for measuring and one more for the
    result; :class:`ghopt.HarmonizedOptimizer` saves the latter.

    The authors measure on the shared network and weigh the losses with the result for
    *all* parameters, as this function does when ``params`` are the shared ones. Mind
    that a task with a tiny gradient there can get a weight in the thousands, which its
    head then feels undiminished: training has diverged from it.

    Gradients are taken with :func:`torch.autograd.grad`, so ``.grad`` and hooks that
    accumulate are left alone; reentrant checkpointing and FSDP2 do not work, and under
    DDP the weights are those of each rank's own gradients.

    Args:
        losses: one scalar per task, as for ``HarmonizedOptimizer.backward``.
        params: parameters over which the Gramian is taken. One that is given twice
            counts once.
        weighting: from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``.

    Returns:
        Scalar with the graph of all losses.

    Raises:
        TypeError: as :func:`named_losses` and :func:`weigh` do, or if ``params`` are
            no parameters.
        ValueError: likewise, or if no loss reaches any of ``params``.
        RuntimeError: if a model was compiled and trained before ghopt was imported, and
            needs ``torch.compiler.reset()``.
    """
    named = named_losses(losses)
    warn_of_many(named)
    found = measured(taken(named, params), named, weighting)
    return weighted_sum([*named.values()], found.weights)
