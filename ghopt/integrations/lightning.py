"""Lightning: modules whose ``training_step`` returns a dict of losses. Extra ``[lightning]``."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import wraps
from inspect import signature
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ghopt.extras import from_extra
from ghopt.losses import named_losses, summed_up
from ghopt.measuring import Harmonization
from ghopt.optimizer import HarmonizedOptimizer

with from_extra("lightning"):
    from lightning.pytorch import LightningModule
    from lightning.pytorch.core.optimizer import LightningOptimizer

_Step: TypeAlias = Callable[..., Any]


class HarmonizedModule(LightningModule):
    """A LightningModule that trains on harmonized gradients: a base class, or a mixin.

    ``training_step`` returns the losses by task, and ``configure_optimizers`` wraps the
    optimizer. All else is as in any module with automatic optimization::

        class Model(HarmonizedModule):
            def training_step(self, batch, batch_idx):
                depth, normals = self(batch["image"])
                return {
                    "depth": l1_loss(depth, batch["depth"]),
                    "normals": 0.5 * mse_loss(normals, batch["normals"]),
                }

            def configure_optimizers(self):
                return HarmonizedOptimizer(AdamW(self.parameters(), lr=1e-3))

    The Trainer does the rest: ``accumulate_grad_batches`` (the losses are divided, the
    tasks kept apart until the step), ``gradient_clip_val`` (of the harmonized gradient),
    ``precision`` with its loss scaling, checkpoints, schedulers (made with the
    ``HarmonizedOptimizer``), several processes with ``strategy="ddp"``.

    A loss is a real scalar with your own weight in it, or a list of scalars that are one
    task. A task without labels in a batch is left out. No task may be called "loss":
    callbacks find the sum there, beside the detached losses. None skips the batch.
    Without grad, where ``validation_step`` calls it, ``training_step`` returns what it
    returns by itself.

    A module of another package is harmonized by ``class Mine(HarmonizedModule, Theirs)``.
    If you override ``backward``, ``optimizer_step`` or ``configure_gradient_clipping``,
    call ``super()`` there.

    With manual optimization you need no class of ours, but three lines, with
    ``strategy="ddp_find_unused_parameters_true"`` over several processes::

        optimizer.backward(losses, backward_fn=self.manual_backward)
        optimizer.step()
        optimizer.zero_grad()

    Raises:
        TypeError: while training, if ``training_step`` returns anything but a mapping or
            None, ``configure_optimizers`` anything but one ``HarmonizedOptimizer``, or
            if the strategy wraps the module in anything but DDP.
        ValueError: likewise, if a task is called "loss", or for what
            ``HarmonizedOptimizer.backward`` refuses.
        RuntimeError: likewise, if ``backward`` is called by ``manual_backward``.
    """

    # Of the micro-batch before its backward: the losses, and their sum.
    _losses: Mapping[str, Tensor] | None = None
    _total: Tensor | None = None
    _is_in_training_step = False
    _is_last = False  # whether a step follows on this micro-batch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have ``training_step`` keep the losses, whichever class defines it."""
        super().__init_subclass__(**kwargs)
        step = _keeping(cls.training_step)
        cls.training_step = step  # type: ignore[method-assign]  # it is one

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run one backward pass per task, and harmonize where a step follows.

        Args:
            loss: sum of the losses that ``training_step`` returned, divided and scaled
                by Lightning; each loss is multiplied by the same factor.
            args: unused; Lightning gives some for manual optimization alone.
            kwargs: likewise.
        """
        del args, kwargs
        optimizer, losses, total = self._harmonized(), self._losses, self._total
        self._losses = self._total = None
        if losses is None or total is None:
            raise RuntimeError(
                "automatic_optimization must be True in a HarmonizedModule, got a "
                "backward() without losses of training_step(). For manual optimization "
                "take a LightningModule, and optimizer.backward(losses, "
                "backward_fn=self.manual_backward)"
            )
        (factor,) = torch.autograd.grad(loss, total, retain_graph=True)
        optimizer.backward(
            {name: factor * part for name, part in losses.items()},
            accumulate_only=not self._is_last,
            sync_group=self._replica(),
        )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Run the last micro-batch and the step, as Lightning does, and log the conflict.

        Args:
            epoch: see Lightning.
            batch_idx: see Lightning.
            optimizer: see Lightning.
            optimizer_closure: runs ``training_step`` and ``backward``.
        """
        harmonized, replica = self._harmonized(), self._replica()
        before = harmonized.last
        self._is_last = True
        try:
            # DDP would average the first pass alone: backward averages each task.
            with nullcontext() if replica is None else replica.no_sync():
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            self._is_last = False
        found = harmonized.last
        if found is not None and found is not before:
            self.log_conflict(found)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Harmonize what still waits, where the last batch was skipped, and clip.

        Args:
            optimizer: see Lightning.
            gradient_clip_val: see Lightning.
            gradient_clip_algorithm: see Lightning.
        """
        self._harmonized().finish_accumulation()
        super().configure_gradient_clipping(
            optimizer, gradient_clip_val, gradient_clip_algorithm
        )

    def log_conflict(self, found: Harmonization) -> None:
        """Log the share of the pairs of tasks that oppose each other, as ``conflict``.

        Called after each step that measured. Override it to log more, or nothing.

        Args:
            found: what the step found and did; it is the same on all ranks.
        """
        tasks = len(found.names)
        if tasks > 1:  # each pair stands twice in the matrix
            opposed = (found.cosines < 0).sum()
            self.log("conflict", opposed / (tasks * (tasks - 1)))

    def _keep(self, losses: Any) -> dict[str, Tensor] | None:
        """Keep the losses for ``backward``, and give Lightning their sum."""
        if losses is None:
            return None
        if not isinstance(losses, Mapping):
            raise TypeError(
                "training_step must return a dict of losses by task, got "
                f"{type(losses)}: return {{'depth': depth_loss, 'normals': normals_loss}}"
            )
        if "loss" in losses:
            raise ValueError(
                f"training_step must return no task called 'loss', got {[*losses]}: "
                "leave the sum out, or give the task another name"
            )
        self._losses = named = named_losses(losses)
        self._total = summed_up({"loss": [*named.values()]})["loss"]
        detached = {name: loss.detach() for name, loss in named.items()}
        return {"loss": self._total, **detached}

    def _harmonized(self) -> HarmonizedOptimizer:
        """Give the optimizer of ``configure_optimizers``."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, HarmonizedOptimizer):
            name = type(optimizer).__name__
            raise TypeError(
                f"configure_optimizers must return one HarmonizedOptimizer, got {name}: "
                "wrap the optimizer, HarmonizedOptimizer(optimizer)"
            )
        return optimizer

    def _replica(self) -> DistributedDataParallel | None:
        """Give the model under DDP, if there are several processes."""
        model = self.trainer.model
        if model is None or model is self:
            return None
        if not isinstance(model, DistributedDataParallel):
            name = type(self.trainer.strategy).__name__
            raise TypeError(
                f"strategy must be one for a single device or 'ddp', got {name}"
            )
        return model


def _keeping(step: _Step) -> _Step:
    """Wrap a ``training_step``: the outermost call keeps the losses."""

    @wraps(step)
    def training_step(self: HarmonizedModule, *args: Any, **kwargs: Any) -> Any:
        if self._is_in_training_step or not torch.is_grad_enabled():
            return step(self, *args, **kwargs)
        self._is_in_training_step = True
        try:
            losses = step(self, *args, **kwargs)
        finally:
            self._is_in_training_step = False
        return self._keep(losses)

    # Lightning asks which arguments it takes, and looks through one wrapper at most.
    training_step.__signature__ = signature(step)  # type: ignore[attr-defined]
    return training_step
