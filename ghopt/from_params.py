"""A harmonized optimizer that makes its base itself: ``HarmonizedFromParams``."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ghopt.geometry import Weighting, gh
from ghopt.harmonize import Passes
from ghopt.optimizer import HarmonizedOptimizer


class HarmonizedFromParams(HarmonizedOptimizer):
    """Make the base optimizer from parameters, and wrap it.

    For APIs that take a *class* of optimizers and call ``optimizer_class(params,
    **options)`` by themselves. Give them this class, and the class of the base among the
    options:

    >>> from torch import nn, optim
    >>> optimizer_class = HarmonizedFromParams
    >>> options = {"base_class": optim.AdamW, "weight_decay": 0.1}
    >>> model = nn.Linear(2, 1)
    >>> optimizer = optimizer_class(model.parameters(), lr=1e-3, **options)

    ======================  =====================================================
    Stable-Baselines3       ``policy_kwargs={"optimizer_class": ...,
                            "optimizer_kwargs": {...}}``. With a class other than
                            Adam it leaves out its ``eps=1e-5``: give it.
    pytorch-forecasting     ``optimizer=...``, ``optimizer_params={...}``
    skorch                  ``optimizer=...``, ``optimizer__base_class=...``
    Transformers            ``optimizer_cls_and_kwargs=(..., {...})``
    ======================  =====================================================

    An API without options takes ``functools.partial(HarmonizedFromParams,
    base_class=AdamW)``, or a subclass of your own. It is a class of a module, so pickles
    that name it can be loaded in another process.

    That is the optimizer only: the loop must call ``backward`` with the losses, in place
    of ``loss.backward()``. Else the first ``step`` warns that nothing is harmonized.

    Args:
        params: as for the base class; so is whatever is not listed here.
        base_class: makes the base optimizer, called as ``base_class(params, ...)``.
        weighting: as for :class:`HarmonizedOptimizer`; so are all that follow.
        shared_params: likewise.
        measure_every: likewise.
        passes: likewise.
        project_step: likewise.
        protect: likewise.

    Raises:
        TypeError: if ``base_class`` is not callable, or does not take an option; or as
            :class:`HarmonizedOptimizer` does.
        ValueError: as it does.
    """

    def __init__(
        self,
        params: ParamsT,
        *args: Any,
        base_class: Callable[..., Optimizer],
        weighting: Weighting = gh,
        shared_params: Iterable[Tensor] | None = None,
        measure_every: int = 1,
        passes: Passes = "auto",
        project_step: bool = False,
        protect: Iterable[str | int] | None = None,
        **options: Any,
    ) -> None:
        if not callable(base_class):
            raise TypeError(
                f"base_class must be a class of optimizers, got {base_class!r}"
            )
        super().__init__(
            base_class(params, *args, **options),
            weighting,
            shared_params=shared_params,
            measure_every=measure_every,
            passes=passes,
            project_step=project_step,
            protect=protect,
        )
