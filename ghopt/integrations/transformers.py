"""Hugging Face: a Trainer for models with a dict of losses. Extra ``[transformers]``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ghopt.extras import from_extra
from ghopt.losses import Loss, as_in_total, named_losses, summed_up
from ghopt.optimizer import HarmonizedOptimizer

with from_extra("transformers"):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import Trainer

Harmonize: TypeAlias = Callable[[Optimizer], HarmonizedOptimizer]
"""Wraps the optimizer of the Trainer."""


class HarmonizedTrainer(Trainer):
    """A ``transformers.Trainer`` that steps on harmonized gradients.

    For models that return ``loss_dict`` beside ``loss``, as those for detection and
    segmentation do, nothing else changes::

        HarmonizedTrainer(model, TrainingArguments("out"), train_dataset=data).train()

    For all others override :meth:`losses`::

        class MyTrainer(HarmonizedTrainer):
            def losses(self, outputs, inputs):
                return {
                    "masked": cross_entropy(outputs.prediction_logits, ...),
                    "next": cross_entropy(outputs.seq_relationship_logits, ...),
                }

    The arguments of the Trainer do the rest: ``gradient_accumulation_steps``,
    ``max_grad_norm`` (of the harmonized gradient), ``fp16`` and ``bf16``, schedulers,
    checkpoints, and several processes under DDP, as ``torchrun`` starts them.

    **Accumulation.** Losses are means over a micro-batch, and are divided once, by the
    number of micro-batches of the step. So the model is not told
    ``num_items_in_batch``, whether or not it takes it. (A Trainer believes every model
    with ``**kwargs`` to divide by it.) If your losses are to be divided by it, set
    ``loss_is_scaled_for_ga = True`` in a subclass: the model is told, and nothing else
    divides.

    Args:
        args: as for ``Trainer``; so are ``kwargs``.
        harmonize: wraps the optimizer, unless ``optimizers`` has a
            ``HarmonizedOptimizer``: by default with ``gh``; for options of your own
            ``partial(HarmonizedOptimizer, weighting=ghpp, project_step=True)``.
        kwargs: see above.

    Raises:
        ValueError: if ``compute_loss_func`` or ``label_smoothing_factor`` is given, which
            make one loss of the outputs; if several GPUs would share a process
            (``n_gpu``), or the processes run anything but DDP.
    """

    # As in Trainer, and for versions that do not have it.
    loss_is_scaled_for_ga: bool | None = None

    def __init__(
        self,
        *args: Any,
        harmonize: Harmonize = HarmonizedOptimizer,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.harmonize = harmonize
        # Of the micro-batch before its backward: the losses, and their sum.
        self._losses: dict[str, Tensor] = {}
        self._total = torch.zeros(())
        self._refuse()

    def losses(self, outputs: Any, inputs: Mapping[str, Any]) -> Mapping[str, Loss]:
        """Give the losses of a micro-batch by task, with your weights in them.

        By default those of ``outputs["loss_dict"]``, each with the factor that the model
        gives it in ``outputs["loss"]``, if there is one; none may be computed from
        another. The losses of earlier layers are one task with that of the last:
        ``loss_ce_0`` with ``loss_ce``. What does not require grad is no task, nor is
        ``outputs["loss"]`` itself. In evaluation nothing requires grad, and the loss is
        ``outputs["loss"]``.

        Args:
            outputs: of the model.
            inputs: of the model, on its device.

        Returns:
            Real scalars, or lists of scalars that are one task together. In evaluation
            their sum is the loss.

        Raises:
            ValueError: if there is no ``loss_dict``, or ``loss`` is not made of it alone,
                outside of what is compiled.
        """
        del inputs
        given = outputs.get("loss_dict") if isinstance(outputs, Mapping) else None
        if not given:
            found = [*outputs] if isinstance(outputs, Mapping) else type(outputs)
            raise ValueError(
                f"outputs must hold a loss_dict, got {found}: return one from the model, "
                "or override losses(outputs, inputs)"
            )
        loss = outputs.get("loss")
        live = {
            name: part
            for name, part in given.items()
            if part.requires_grad and part is not loss
        }
        if loss is not None and not live:
            return {"loss": loss}
        if loss is not None:
            try:
                live = as_in_total(live, loss)
            except ValueError as error:
                raise ValueError(
                    "outputs['loss'] must be made of outputs['loss_dict'] alone, and not "
                    "by a compiled model; override losses(outputs, inputs), and return the "
                    f"losses with the weights that they are to have. ({error})"
                ) from error
        tasks: dict[str, list[Tensor]] = {}
        for name, part in (live or given).items():
            tasks.setdefault(_task(name, given), []).append(part)
        return tasks

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Create the optimizer as ``Trainer`` does, and wrap it.

        Args:
            args: as for ``Trainer``.
            kwargs: likewise.
        """
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        if not isinstance(_bare(optimizer), HarmonizedOptimizer):
            optimizer = self.optimizer = self.harmonize(optimizer)
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and sum its losses.

        Args:
            model: as for ``Trainer``.
            inputs: likewise.
            return_outputs: likewise.
            num_items_in_batch: likewise; unused unless ``loss_is_scaled_for_ga``.

        Returns:
            The sum, or the sum and what the model returned.

        Raises:
            TypeError: if ``losses`` returns no mapping.
            ValueError: in training, for what ``HarmonizedOptimizer.backward`` refuses.
        """
        items = num_items_in_batch if self.loss_is_scaled_for_ga else None
        told = items is not None  # as the Trainer counts them for models that take them
        # Past DDP, which copies its outputs: loss is made of loss_dict no more then. All
        # else it does to a forward pass is to prepare averages, and those are ours.
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        outputs = inner(**inputs, **({"num_items_in_batch": items} if told else {}))
        losses = self.losses(outputs, inputs)
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"losses() must return a dict of losses by task, got {type(losses)}"
            )
        if torch.is_grad_enabled():
            losses = self._losses = named_losses(losses)
        loss = self._total = _sum(losses)
        if told and self.args.average_tokens_across_devices:
            # The items are those of all processes, whose gradients are averaged.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one backward pass per task on a micro-batch, and harmonize at the last.

        Args:
            model: as for ``Trainer``.
            inputs: likewise.
            num_items_in_batch: likewise; unused unless ``loss_is_scaled_for_ga``.

        Returns:
            The sum of the losses, divided by the number of micro-batches.
        """
        items = num_items_in_batch if self.loss_is_scaled_for_ga else None
        with self._passes_for_backward(model):
            step: Tensor = super().training_step(model, inputs, items)
        return step

    @contextmanager
    def _passes_for_backward(self, model: nn.Module) -> Iterator[None]:
        """Have the Trainer's own step, with its divisions, run our backward."""
        accelerator = self.accelerator
        # An attribute of this object hides the method of its class.
        vars(accelerator)["backward"] = partial(
            self._backward, model, accelerator.backward
        )
        try:
            # Each task is averaged over the processes by itself, see sync_group.
            with accelerator.no_sync(model):
                yield
        finally:
            del vars(accelerator)["backward"]

    def _backward(
        self, model: nn.Module, run: Callable[..., None], loss: Tensor
    ) -> None:
        """Run a backward pass per task, each divided as the sum of the losses is."""
        optimizer = _bare(self.optimizer)
        if not isinstance(optimizer, HarmonizedOptimizer):
            name = type(optimizer).__name__
            raise TypeError(
                f"create_optimizer must give a HarmonizedOptimizer, got {name}: call "
                "super().create_optimizer() where you override it"
            )
        losses, total = self._losses, self._total
        self._losses, self._total = {}, torch.zeros(())
        (factor,) = torch.autograd.grad(loss, total, retain_graph=True)
        group: DistributedDataParallel | bool | None
        group = True if self.accelerator.num_processes > 1 else None
        optimizer.backward(
            {name: factor * part for name, part in losses.items()},
            backward_fn=run,
            accumulate_only=not self.accelerator.sync_gradients,
            sync_group=model if isinstance(model, DistributedDataParallel) else group,
        )

    def _refuse(self) -> None:
        """Refuse arguments that would train on other losses or gradients."""
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func must be None, got {self.compute_loss_func!r}: it "
                "gives one loss. Override losses(outputs, inputs)"
            )
        smoothing = self.args.label_smoothing_factor
        if smoothing:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {smoothing}: it replaces the "
                "losses of the model by one. Override losses(outputs, inputs)"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"n_gpu must be 1, got {self.args.n_gpu}: start a process for each GPU, "
                "torchrun --nproc-per-node, or set CUDA_VISIBLE_DEVICES=0"
            )
        kind = self.accelerator.distributed_type.value
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise ValueError(f"the processes must run DDP, got {kind}")


def _sum(losses: Mapping[str, Loss]) -> Tensor:
    """Sum the losses of all tasks."""
    parts = [[loss] if isinstance(loss, Tensor) else loss for loss in losses.values()]
    return summed_up({"loss": [loss for part in parts for loss in part]})["loss"]


def _task(name: str, names: Mapping[str, Any]) -> str:
    """Name the task of a loss: that of the last layer for one of an earlier layer."""
    last = [n for n in names if name.startswith(f"{n}_") and name[-1].isdigit()]
    return min(last, key=len, default=name)


def _bare(optimizer: Any) -> Any:
    """Give the optimizer that Accelerate has wrapped."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
