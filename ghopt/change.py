"""The change that a step makes of the parameters: seen, and kept from opposing tasks.

``gh`` promises that the gradient opposes no task. What a base optimizer makes of it is
another matter: its momentum carries old directions on, and Adam scales each coordinate. So
here the change itself is projected, and the momentum with it, which would otherwise push
on, step after step, into what is always cut off.

Each is one row of :func:`ghopt.dual_cone`, on the Gramian of the K task gradients and the
vector in question.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ghopt.forms import as_real, has_float64, home_of_numbers, is_dtensor
from ghopt.geometry import cosines, dual_cone
from ghopt.gradients import StoredGradients

MOMENTA = ("exp_avg", "momentum_buffer")
"""Where a base optimizer keeps an average of its gradients, in ``state[parameter]``.

``exp_avg``: Adam, AdamW, NAdam, RAdam, Adamax, SparseAdam, Lion and their kin.
``momentum_buffer``: SGD, RMSprop and Muon. Bases that have neither (Adagrad, Adafactor, L-BFGS,
schedule-free ones) have their steps projected alone.
"""

OTHERWISE = ("AccSGD", "AliG")
"""Classes that keep something else under these names: parameters, or minus the average."""


@dataclass(frozen=True)
class Change:
    """What one step did to the harmonized parameters. Reading a value waits for the device.

    Attributes:
        names: of the tasks whose gradients were measured since the step before.
        gramian: inner products of their gradients and, in the last row, of the change,
            over the parameters that a task reaches, shape ``[K + 1, K + 1]``, float64.
        rounding: length of what the rounding of these parameters may have in the change,
            a scalar, float64.
    """

    names: tuple[str, ...]
    gramian: Tensor
    rounding: Tensor

    @property
    def slopes(self) -> Tensor:
        """What the step adds to each loss, to first order, shape ``[K]``."""
        return self.gramian[-1, :-1]

    @property
    def cosines(self) -> Tensor:
        """Cosines of the change and each gradient, ``[K]``: above 0 a task is opposed."""
        return cosines(self.gramian)[-1, :-1]

    @property
    def limit(self) -> Tensor:
        """Cosine above which more than rounding opposes a task, a scalar."""
        length = self.gramian[-1, -1].sqrt()
        return 1e-6 + self.rounding / length.clamp(min=torch.finfo(length.dtype).tiny)


ChangeHook: TypeAlias = Callable[[Change], None]
"""What :meth:`HarmonizedOptimizer.register_change_hook` takes."""


def copied(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copy parameters, to know what a step changes."""
    return {parameter: parameter.detach().clone() for parameter in parameters}


def look(gradients: StoredGradients, before: dict[Tensor, Tensor]) -> Change:
    """See what a step did.

    Args:
        gradients: of the tasks.
        before: the parameters before the step. Spoilt.
    """
    gramian = gradients.gramian_with(_descent(gradients, before))
    # The descent is the change with its sign turned.
    sign = torch.ones_like(gramian[0])
    sign[-1] = -1
    return Change(gradients.names, gramian * sign * sign[:, None], _rounding(gradients))


def project_momentum(
    gradients: StoredGradients, base: Optimizer, protected: Sequence[int] | None = None
) -> None:
    """Change the momentum of a base that is about to step, so that it opposes no task.

    The momentum m, where the base keeps one (:data:`MOMENTA`), becomes the nearest vector
    with ``m . g_k >= 0`` for every protected task k, rounded to its dtype once. Exactly
    nothing changes where that holds already, or where a gradient is not finite.

    Projecting it after the step instead gave a third of the gain on the heat equation
    and the detector of ``benchmarks/mtl``; projecting in Adam's scale gave no more.

    Args:
        gradients: of the tasks.
        base: about to step.
        protected: numbers of the tasks that must not be opposed; None: all.
    """
    momentum = _momentum(gradients, base)
    if momentum:
        multipliers, active = _multipliers(gradients.gramian_with(momentum), protected)
        gradients.add_to(momentum, multipliers, active)


def project_step(
    gradients: StoredGradients,
    before: dict[Tensor, Tensor],
    protected: Sequence[int] | None = None,
) -> None:
    """Change a step that was made as little as it takes to oppose no task.

    With d the change of the parameters that a task reaches, they become what they were
    plus d*, the nearest to d with ``d* . g_k <= 0`` for every protected task k, rounded to
    their dtype once. Exactly nothing changes where that holds already, or where a gradient
    is not finite. No host read on a device.

    Args:
        gradients: of the tasks.
        before: the parameters before the step. Spoilt.
        protected: numbers of the tasks that must not be opposed; None: all.
    """
    gramian = gradients.gramian_with(_descent(gradients, before))
    multipliers, active = _multipliers(gramian, protected)
    parameters = {parameter: parameter.detach() for parameter in gradients}
    gradients.add_to(parameters, -multipliers, active)


def _multipliers(
    gramian: Tensor, protected: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Say what to add of each gradient to the last vector of a Gramian, and if at all."""
    last = len(gramian) - 1
    kept = range(last) if protected is None else protected
    # On the CPU to ask is free.
    if gramian.device.type == "cpu" and (gramian[last, :last] >= 0).all():
        nothing = torch.zeros((), dtype=torch.bool, device="cpu")
        return torch.zeros_like(gramian[last, :last]), nothing
    multipliers = dual_cone(gramian, [last], kept)[0, :last]
    # If one is NaN all are; then this is False, and nothing changes.
    return multipliers, (multipliers > 0).any()


def _descent(
    gradients: StoredGradients, before: dict[Tensor, Tensor]
) -> dict[Tensor, Tensor]:
    """Take the old parameters minus the new ones, in place of the old ones."""
    return {p: before[p].sub_(p.detach()) for p in gradients if p in before}


def _rounding(gradients: StoredGradients) -> Tensor:
    """Bound the length of the rounding of the parameters: half a unit in the last place."""
    lengths = [_length(p.detach()) * (torch.finfo(p.dtype).eps / 2) for p in gradients]
    device = lengths[0].device
    squares = torch.stack([length.to(device) for length in lengths]).square()
    return squares.sum().sqrt()


def _length(parameter: Tensor) -> Tensor:
    """Take the norm in float64, without a copy in it."""
    wide = torch.float64 if has_float64(parameter.device) else torch.float32
    norm = _whole(torch.linalg.vector_norm(as_real(parameter), dtype=wide))
    return norm.to(home_of_numbers(norm.device)).double()


def _whole(number: Tensor) -> Tensor:
    """Give the norm of all shards."""
    return number.full_tensor() if is_dtensor(number) else number


def _momentum(gradients: StoredGradients, base: Optimizer) -> dict[Tensor, Tensor]:
    """Find what the base keeps as an average of gradients."""
    found: dict[Tensor, Tensor] = {}
    if any(kind.__name__ in OTHERWISE for kind in type(base).__mro__):
        return found
    for parameter in gradients:
        state = base.state.get(parameter, {})
        for name in MOMENTA:
            momentum = state.get(name)
            if isinstance(momentum, Tensor) and momentum.shape == parameter.shape:
                # Packed integers, as of 8-bit optimizers, are left alone.
                if momentum.is_floating_point() or momentum.is_complex():
                    found[parameter] = momentum
                break
    return found
