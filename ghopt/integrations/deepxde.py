"""DeepXDE on PyTorch: a ``dde.Model`` that steps on its separate losses.

Needs the extra ``[deepxde]``, and ``DDE_BACKEND=pytorch`` in the environment.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer

from ghopt.extras import from_extra
from ghopt.geometry import Weighting, gh
from ghopt.optimizer import HarmonizedOptimizer

if TYPE_CHECKING:
    from deepxde import Model

_Wrap: TypeAlias = Callable[[Optimizer], HarmonizedOptimizer]


def harmonize(
    model: "Model",
    weighting: Weighting = gh,
    *,
    project_step: bool = False,
    protect: Iterable[str | int] | None = None,
) -> None:
    """Let a ``dde.Model`` step on harmonized gradients, from now on.

    Call it once, before or after ``compile``; the rest of the script stays as it is:

    .. code-block:: python

        model = dde.Model(data, net)
        harmonize(model)
        model.compile("adam", lr=1e-3)
        model.train(iterations=15000)
        model.compile("L-BFGS")
        model.train()

    Each ``compile`` makes a new optimizer, in ``model.opt``: a
    :class:`ghopt.HarmonizedOptimizer`, on which to look at ``last`` or to attach a
    :class:`ghopt.Recorder`. Loss weights, decay, metrics, callbacks, external variables,
    mixed precision, ``save`` and ``restore`` are DeepXDE's as before; so are the losses
    that it prints, which are not harmonized.

    The tasks are the losses in the order in which DeepXDE prints them and takes
    ``loss_weights``: the residuals as ``pde`` returns them, then the conditions as ``data``
    was given them. Their names are their numbers in this list, ``"0"``, ``"1"``, ... An L1
    penalty of the net is the last one. It is opposed to the others by design: leave it
    out, or ``protect`` the others. (L2 is weight decay, of the optimizer, and no task.)

    L-BFGS needs one function, so the weights are measured once in each of its steps and
    held to its end. DeepXDE makes up to 1000 iterations in a step: set
    ``dde.optimizers.config.LBFGS_options["iter_per_step"]`` to measure more often.

    It does not always pay: compare with a model that is not harmonized.

    Args:
        model: on the PyTorch backend; changed in place.
        weighting: as for :class:`ghopt.HarmonizedOptimizer`.
        project_step: likewise, but not in L-BFGS: the promise is one of first order,
            and a step of up to 1000 iterations is far beyond it.
        protect: likewise; numbers of losses, as above. Without ``gh`` it is
            ``project_step`` that protects, and so not in L-BFGS.

    Raises:
        ImportError: if DeepXDE is missing.
        RuntimeError: if its backend is not PyTorch.
        TypeError: if ``model`` is no ``dde.Model``, its optimizer is harmonized already,
            or an option is not what :class:`ghopt.HarmonizedOptimizer` takes.
        ValueError: likewise, if ``model`` is harmonized already, or if its optimizer is
            NNCG, which differentiates the sum of the losses by itself. ``compile``
            refuses both optimizers, too; the model stays as it was.
    """
    _check_model(model)
    # Wrong options must fail here, not in the next compile.
    checked = HarmonizedOptimizer(
        SGD([torch.zeros(1)]), weighting, project_step=project_step, protect=protect
    )
    wrap = partial(
        _wrapped,
        weighting=weighting,
        project_step=project_step,
        protect=checked.protect,
    )
    if model.opt is not None:
        _check_optimizer(model.opt_name)
        _take_over(model, wrap)
    model.compile = partial(_compile, model, wrap)


def _check_model(model: Any) -> None:
    with from_extra("deepxde"):
        from deepxde import Model
        from deepxde.backend import backend_name
    if backend_name != "pytorch":
        raise RuntimeError(
            f"DeepXDE must run on PyTorch, got the backend {backend_name!r}: set "
            "DDE_BACKEND=pytorch in the environment before importing it"
        )
    if not isinstance(model, Model):
        raise TypeError(f"model must be a dde.Model, got {type(model)}")
    if getattr(model.compile, "func", None) is _compile:
        raise ValueError(
            "model must not be harmonized already: it stays so through every compile(). "
            "For other options make a new dde.Model"
        )


def _check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, HarmonizedOptimizer):
        raise TypeError(
            "optimizer must not be harmonized already, got a HarmonizedOptimizer: pass "
            "the optimizer inside it, .base_optimizer, and the options to harmonize()"
        )
    if optimizer == "NNCG":
        raise ValueError(
            "optimizer must not be 'NNCG', which differentiates the sum of the losses by "
            "itself: use 'L-BFGS', or a dde.Model that is not harmonized"
        )


def _wrapped(
    base: Optimizer,
    weighting: Weighting,
    project_step: bool,
    protect: Iterable[str] | None,
) -> HarmonizedOptimizer:
    """Wrap the optimizer of a ``compile``, as :func:`harmonize` says."""
    if project_step and isinstance(base, LBFGS):
        project_step = False
        protect = protect if weighting is gh else None
    return HarmonizedOptimizer(
        base, weighting, project_step=project_step, protect=protect
    )


def _compile(
    model: "Model", wrap: _Wrap, optimizer: Any, *args: Any, **options: Any
) -> None:
    """Compile as DeepXDE does, in place of ``model.compile``, and harmonize."""
    _check_optimizer(optimizer)
    type(model).compile(model, optimizer, *args, **options)
    _take_over(model, wrap)


def _take_over(model: "Model", wrap: _Wrap) -> None:
    """Wrap the optimizer that ``compile`` made, and replace the step that it made."""
    model.opt = wrap(model.opt)
    model.train_step = partial(_train_step, model)


def _train_step(model: "Model", *batch: Any) -> None:
    """Do what the step of DeepXDE does, but with one backward pass per loss."""
    from deepxde import config

    def closure() -> list[Tensor]:
        device = torch.get_default_device().type
        # Not one that is disabled: it would end an autocast around the training.
        half = torch.autocast(device, torch.float16) if config.mixed else nullcontext()
        with half:
            return _losses(model, *batch)

    model.opt.step(closure)
    if model.lr_scheduler is not None:
        model.lr_scheduler.step()


def _losses(model: "Model", *batch: Any) -> list[Tensor]:
    """Evaluate the losses, weighed as DeepXDE does it, but each by itself.

    DeepXDE stacks them: from there each pass would run through the graphs of all.
    """
    data, apart = model.data, list[Tensor]()
    losses_train, own = data.losses_train, vars(data).get("losses_train")

    def keep(*args: Any, **options: Any) -> Any:
        losses = losses_train(*args, **options)
        apart[:] = losses if isinstance(losses, list) else [losses]
        return losses

    data.losses_train = keep
    try:
        _, stacked = model.outputs_losses_train(*batch)
    finally:
        if own is None:
            del data.losses_train
        else:
            data.losses_train = own
    tasks = apart
    if model.loss_weights is not None:
        weights = torch.as_tensor(model.loss_weights).expand(len(apart))
        tasks = [loss * weight for loss, weight in zip(apart, weights, strict=True)]
    return [*tasks, *stacked[len(apart) :]]  # what is left is the penalty of the net
