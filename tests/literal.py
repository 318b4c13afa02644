"""The update of the paper, literally: one gradient after the other, and a projection each.

What tests of the optimizer compare with. Nothing here comes from ``ghopt``.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.optim import Optimizer

Parameters = list[nn.Parameter]
MOMENTA = ("exp_avg", "momentum_buffer")


def literal_update(jacobian: Tensor) -> Tensor:
    """Sum the projections of the gradients on their dual cone (lemma 1, eq. 28).

    By Moreau, g minus its projection is the nearest point of the cone that the negative
    gradients span.
    """
    rows = jacobian.numpy()
    projections = [row + rows.T @ nnls(rows.T, -row)[0] for row in rows]
    return torch.from_numpy(np.sum(projections, axis=0))


def literal_projection(vector: Tensor, jacobian: Tensor) -> Tensor:
    """Give the vector nearest to this one that opposes no row of the Jacobian."""
    rows = jacobian.numpy()
    # In units of their lengths: a step is a thousandth of a gradient.
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = rows / np.where(lengths > 0, lengths, 1)
    size = float(vector.norm()) or 1.0
    target = vector.numpy() / size
    return torch.from_numpy(size * (target + unit.T @ nnls(unit.T, -target)[0]))


def literal_gradients(losses: list[Tensor], parameters: Parameters) -> Tensor:
    """Take the gradients one by one, zeros where a task does not reach a parameter."""
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True
        )
        entries = zip(grads, parameters, strict=True)
        dense = [torch.zeros_like(p) if g is None else g for g, p in entries]
        rows.append(torch.cat([entry.reshape(-1) for entry in dense]))
    return torch.stack(rows)


def literal_step(losses: list[Tensor], parameters: Parameters, base: Optimizer) -> bool:
    """Step on the update of the paper; say whether any two tasks were in conflict."""
    trained = [p for p in parameters if p.requires_grad]
    jacobian = literal_gradients(losses, trained)
    passes = [
        torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        for loss in losses
    ]
    parts = torch.split(literal_update(jacobian), [p.numel() for p in trained])
    for p, part, grads in zip(trained, parts, zip(*passes, strict=True), strict=True):
        # None where no task reaches: AdamW must not decay such a parameter.
        reached = any(grad is not None for grad in grads)
        p.grad = part.view_as(p) if reached else None
    base.step()
    return bool((jacobian @ jacobian.T < 0).any())


def literal_projected_step(
    losses: list[Tensor],
    parameters: Parameters,
    base: Optimizer,
    protected: list[int],
    update: Callable[[Tensor], Tensor] = literal_update,
) -> None:
    """Step such that neither momentum nor step opposes a protected task."""
    trained = [p for p in parameters if p.requires_grad]
    jacobian = literal_gradients(losses, trained)
    sizes = [p.numel() for p in trained]
    cone = jacobian[protected]
    reached = torch.split(jacobian, sizes, dim=1)
    for p, rows, part in zip(
        trained, reached, torch.split(update(jacobian), sizes), strict=True
    ):
        p.grad = part.view_as(p) if rows.any() else None
    momenta = [
        next((base.state[p][k] for k in MOMENTA if k in base.state[p]), None)
        for p in trained
    ]
    if any(momentum is not None for momentum in momenta):
        pairs = list(zip(momenta, trained, strict=True))
        dense = [torch.zeros_like(p) if m is None else m for m, p in pairs]
        before = torch.cat([m.detach().reshape(-1) for m in dense])
        after = literal_projection(before, cone)
        for momentum, part in zip(momenta, torch.split(after, sizes), strict=True):
            if momentum is not None:
                momentum.copy_(part.view_as(momentum))
    old = torch.cat([p.detach().reshape(-1) for p in trained])
    base.step()
    descent = old - torch.cat([p.detach().reshape(-1) for p in trained])
    projected = old - literal_projection(descent, cone)
    with torch.no_grad():
        for p, part in zip(trained, torch.split(projected, sizes), strict=True):
            p.copy_(part.view_as(p))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]
