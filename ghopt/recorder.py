"""See the conflict: what each step found and did, kept without waiting for it.

A :class:`Recorder` keeps Gramians and weights where they are, on the device, and reads
them on the host in ``flush`` only. All else follows from them, in
:class:`ghopt.recording.Recording`.
"""

import math
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ghopt.change import Change
from ghopt.geometry import Weighting, gh
from ghopt.lines import Step
from ghopt.losses import Losses, named_losses, warn_of_many
from ghopt.measuring import GramianOf, Harmonization, measured
from ghopt.optimizer import HarmonizedOptimizer
from ghopt.passes import taken
from ghopt.recording import Recording, assemble

Layers: TypeAlias = nn.Module | Mapping[str, Iterable[Tensor]]
"""Groups of parameters by name; of a module, each of its modules with its own ones."""


class Recorder:
    """Keeps what the last steps found and did, until it is flushed.

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = HarmonizedOptimizer(torch.optim.SGD(model.parameters()))
    >>> recorder = Recorder()
    >>> handle = recorder.attach(optimizer, layers=model)
    >>> out = model(torch.ones(4, 2))
    >>> optimizer.step(losses={"up": out.mean(), "down": -2 * out.mean()})
    >>> recording = recorder.flush()
    >>> recording.names, recording.conflicts[0, 0, 1].item()
    (('up', 'down'), True)

    On the step path nothing is computed or read: small tensors that are there anyway are
    kept, two a step, and one more for each layer: 8 K^2 bytes each. Steps between the
    measurements of ``measure_every``, and calls with ``accumulate_only``, find nothing
    and are not recorded. Not for captured CUDA graphs, which would write all their
    steps to the same two tensors.

    A recorder can be pickled with what it holds; attach it again after loading. A weighting
    must not write to its argument, which is kept.

    Args:
        size: number of steps that it holds at most; with more, the oldest are lost.

    Attributes:
        count: number of steps recorded ever.
        lost: how many of them were overwritten before a flush.

    Raises:
        TypeError: if ``size`` is no whole number.
        ValueError: if ``size`` is less than 1.
    """

    def __init__(self, size: int = 4096) -> None:
        if isinstance(size, torch.optim.Optimizer):
            raise TypeError(
                "size must be an int, got an optimizer: make a Recorder(), then "
                "recorder.attach(optimizer)"
            )
        if not isinstance(size, int):
            raise TypeError(f"size must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.count = 0
        self.lost = 0
        self._steps: deque[Step] = deque(maxlen=size)
        self._handles: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy needs: it is attached to nothing."""
        return {**self.__dict__, "_handles": []}

    def attach(
        self,
        optimizer: HarmonizedOptimizer,
        *,
        layers: Layers | None = None,
        step: bool = False,
    ) -> RemovableHandle:
        """Record every step of an optimizer that measures.

        Args:
            optimizer: its first group's ``lr`` is recorded, too. Of Accelerate's, give
                ``.optimizer``.
            layers: parameters of which to take the inner products by themselves, by a
                name; or a module, for each module in it that has parameters of its own.
                Costs as much again as the Gramian itself. What is shared by two layers
                counts in both; DTensors in them on all ranks alike. Not with
                ``features``, and neither is ``step``: ``backward`` raises.
            step: record what the step taken did to each task, too
                (``Recording.step_slopes``). Costs as much as the Gramian, and K + 1
                copies of the gradients until the step. Of several ``backward`` calls
                before a step, the step is recorded with the last.

        Returns:
            A handle whose ``remove()`` ends the recording.

        Raises:
            TypeError: if ``optimizer`` is no harmonized one, or a layer is a tensor, not
                some tensors.
            ValueError: if the recorder is attached to this optimizer already: each step
                would be recorded twice.
        """
        if not isinstance(optimizer, HarmonizedOptimizer):
            raise TypeError(
                f"optimizer must be a HarmonizedOptimizer, got {type(optimizer)}; a model "
                "goes into layers=, a plain loop uses measure(..., recorder=recorder)"
            )
        groups = _listed(layers)
        hooks = optimizer._harmonize_hooks
        if any(
            handle.hooks_dict_ref() is hooks and handle.id in hooks
            for handle in self._handles
        ):
            raise ValueError(
                "optimizer must not be attached twice, got one that this recorder records "
                "already: call remove() on the handle of the first attach(), or make a "
                "new optimizer and Recorder"
            )
        # Not the optimizer itself, which holds this hook: both would outlive their use.
        owner = weakref.ref(optimizer)
        latest = [-1]

        def hook(found: Harmonization, gramian_of: GramianOf) -> None:
            wrapper = owner()
            rate = wrapper.param_groups[0].get("lr", math.nan) if wrapper else math.nan
            # A scheduler may change a tensor in place.
            rate = rate.detach().clone() if isinstance(rate, Tensor) else rate
            latest[0] = self.count
            self.record(found, rate=rate, layers=_over(groups, gramian_of))

        def after(change: Change) -> None:
            self._note(latest[0], change)

        handle = optimizer.register_harmonize_hook(hook)
        self._handles.append(handle)
        return _Both(handle, optimizer.register_change_hook(after)) if step else handle

    def record(
        self,
        found: Harmonization,
        *,
        rate: Tensor | float = math.nan,
        layers: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Record a step by hand, as what :func:`measure` returns.

        Args:
            found: its tensors are kept, not copied.
            rate: learning rate.
            layers: inner products over each layer, ``[K, K]``.
        """
        self.lost += len(self._steps) == self._steps.maxlen
        self._steps.append(
            Step(
                self.count,
                found.names,
                found.gramian,
                found.weights,
                rate,
                dict(layers or {}),
                rule=found.rule,
                at_features=found.at_features,
            )
        )
        self.count += 1

    def _note(self, number: int, change: Change) -> None:
        """Add to a recorded step what it did, unless it has been flushed or lost."""
        for place in reversed(range(len(self._steps))):
            step = self._steps[place]
            if step.number == number:
                slopes = change.slopes
                limits = change.limit.expand_as(slopes)
                rows = torch.stack([slopes, change.cosines, limits])
                if change.names != step.names:  # of other calls than this one
                    found = dict(zip(change.names, rows.unbind(1), strict=True))
                    none = torch.full_like(rows[:, 0], math.nan)
                    columns = [found.get(name, none) for name in step.names]
                    rows = torch.stack(columns, 1)
                self._steps[place] = step._replace(change=rows)
                return

    def flush(self) -> Recording:
        """Hand over all that is held, and hold nothing: waits for the device."""
        recording = assemble(list(self._steps))
        self._steps.clear()
        return recording


class _Both(RemovableHandle):
    """A handle that takes another one away, too."""

    def __init__(self, handle: RemovableHandle, other: RemovableHandle) -> None:
        self.__dict__.update(handle.__dict__)
        self._other = other

    def remove(self) -> None:
        """Take both hooks away."""
        super().remove()
        self._other.remove()


def measure(
    losses: Losses,
    params: Iterable[Tensor],
    weighting: Weighting = gh,
    *,
    recorder: Recorder | None = None,
    layers: Layers | None = None,
) -> Harmonization:
    """Measure the conflict of some losses, and do nothing about it.

    For a loop that stays as it is: ``.grad`` is left alone, and so is the graph, for the
    backward pass to come. Costs a backward pass per task. Gradients are taken with
    :func:`torch.autograd.grad`: reentrant checkpointing and FSDP2 do not work.

    >>> model = torch.nn.Linear(2, 1)
    >>> recorder = Recorder()
    >>> out = model(torch.ones(4, 2))
    >>> losses = {"up": out.mean(), "down": -2 * out.mean()}
    >>> found = measure(losses, model.parameters(), recorder=recorder, layers=model)
    >>> sum(losses.values()).backward()  # and the loop goes on
    >>> recorder.flush().conflicts[0, 0, 1].item()
    True

    Args:
        losses: one scalar per task, as for ``HarmonizedOptimizer.backward``.
        params: parameters over which the Gramian is taken.
        weighting: from a Gramian, shape ``[K, K]``, to weights, shape ``[K]``.
        recorder: records what is found, with the weights that the weighting would give.
            No rule is recorded: the loop steps as it did.
        layers: as for :meth:`Recorder.attach`; for the recorder.

    Returns:
        What ``backward`` of an optimizer with these parameters would find and do.

    Raises:
        TypeError: if ``losses`` is not iterable, a loss is no tensor, ``params`` are no
            parameters, or the weighting returns no tensor.
        ValueError: if ``losses`` or what the weighting returns is not as described, or
            no loss reaches any of ``params``.
        RuntimeError: if a model was compiled and trained before ghopt was imported, and
            needs ``torch.compiler.reset()``.
    """
    named = named_losses(losses)
    warn_of_many(named)
    gradients = taken(named, params)
    found = measured(gradients, named, weighting)
    if recorder is not None:
        layers_of = _listed(layers)
        # As of no rule: the report must not take the training for a harmonized one.
        unruled = replace(found, rule="")
        recorder.record(unruled, layers=_over(layers_of, gradients.gramian))
    return found


def by_layer(model: nn.Module) -> dict[str, list[Tensor]]:
    """List the parameters of each module that has some of its own, by its name.

    The model itself, if it has some, has the name "".
    """
    own = {
        name: list(module.parameters(recurse=False))
        for name, module in model.named_modules()
    }
    return {name: parameters for name, parameters in own.items() if parameters}


def _listed(layers: Layers | None) -> Layers:
    """Take the parameters out of iterators, which serve once only.

    Raises:
        TypeError: if a layer is a tensor.
    """
    if isinstance(layers, nn.Module):
        return layers
    for name, parameters in (layers or {}).items():
        if isinstance(parameters, Tensor):
            raise TypeError(f"layers[{name!r}] must be an iterable of tensors, got one")
    return {name: list(parameters) for name, parameters in (layers or {}).items()}


def _over(layers: Layers, gramian_of: GramianOf) -> dict[str, Tensor]:
    """Take the inner products over each layer."""
    # List those of a module anew at each step: Accelerate and FSDP swap them.
    named = by_layer(layers) if isinstance(layers, nn.Module) else layers
    return {name: gramian_of(parameters) for name, parameters in named.items()}
