"""The update of the paper, literally: one gradient after the other, and a projection each.

What tests of the optimizer compare with. Nothing here comes from ``ghopt``.
"""

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.optim import Optimizer

Parameters = list[nn.Parameter]


def literal_update(jacobian: Tensor) -> Tensor:
    """Sum the projections of the gradients on their dual cone (lemma 1, eq. 28).

    By Moreau, g minus its projection is the nearest point of the cone that the negative
    gradients span.
    """
    rows = jacobian.numpy()
    projections = [row + rows.T @ nnls(rows.T, -row)[0] for row in rows]
    return torch.from_numpy(np.sum(projections, axis=0))


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
    update = literal_update(jacobian)
    for p, part in zip(
        trained, torch.split(update, [p.numel() for p in trained]), strict=True
    ):
        # None where no task reaches: AdamW must not decay such a parameter.
        reached = any(
            torch.autograd.grad(loss, p, retain_graph=True, allow_unused=True)[0]
            is not None
            for loss in losses
        )
        p.grad = part.view_as(p) if reached else None
    base.step()
    return bool((jacobian @ jacobian.T < 0).any())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def grads(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for p in model.parameters()]
