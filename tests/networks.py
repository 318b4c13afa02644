"""Gradients as small networks make them: equal, opposite or dependent but for rounding.

Hypothesis draws numbers; here a network and its losses make the gradients, in the dtype of
the network. So two gradients that are opposite on paper differ in their last digits.
"""

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

Gradients = list[list[Tensor | None]]

_SCALARS: list[Callable[[Tensor], Tensor]] = [
    lambda y: (y - 1).square().mean(),
    lambda y: (y + 1).abs().mean(),
    lambda y: -0.3 * (y - 1).square().mean(),
    lambda y: nn.functional.softplus(y).mean(),
    lambda y: -2 * y.mean(),
    # The same on paper: the rows of a batch are added up in another order.
    lambda y: (y.flip(0) - 1).square().sum() / len(y),
    lambda y: (y.sum() / len(y) + 0.5).square(),
]


def network_gradients(
    tasks: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> Gradients:
    """Gradients of so many losses over the trunk of a network with few heads.

    The seed chooses the batch (one row in every second network, where all losses of a
    head are multiples of one gradient), the heads, and for each task a loss of a head,
    a multiple of an earlier loss, or a sum of two.
    """
    generator = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows = [1, 4][pick(2)]
    trunk = [(draw(width, 8) / 3).requires_grad_(), draw(width).requires_grad_()]
    heads = [draw(width) / width**0.5 for _ in range(1 + pick(tasks))]
    features = torch.tanh(nn.functional.linear(draw(rows, 8), *trunk))
    losses: list[Tensor] = []
    for _ in range(tasks):
        kind = pick(5) if losses else 0
        if kind == 3:
            losses.append((0.5 - pick(3)) * losses[pick(len(losses))])
        elif kind == 4:
            losses.append(losses[pick(len(losses))] + losses[pick(len(losses))])
        else:
            output = features @ heads[pick(len(heads))]
            losses.append(_SCALARS[pick(len(_SCALARS))](output))
    return [
        list(torch.autograd.grad(loss, trunk, retain_graph=True)) for loss in losses
    ]


seeds = st.integers(0, 2**31)
widths = st.sampled_from([4, 16, 64, 256, 1000])


def flat(gradients: Gradients) -> Tensor:
    """Spell the gradients out as a float64 matrix, one row for each task."""
    rows = [
        [g.double().reshape(-1) for g in task if g is not None] for task in gradients
    ]
    return torch.stack([torch.cat(row) for row in rows])
