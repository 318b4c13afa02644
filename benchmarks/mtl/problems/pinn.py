"""Physics-informed networks (Raissi et al., 2019) for three equations of known solution.

The residual of the equation inside the domain is one task, the values at its boundary
another, the initial values of the heat equation a third.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.mtl.problem import Batch, Metric, Problem, Training, generator

WIDTH = 32
INSIDE, EDGE = 128, 32
RATE = 5e-3
DIFFUSIVITY = 0.1
# Of the solution along the two axes. The example of Wang, Teng and Perdikaris (2021), on
# whose gradients their paper is, has the same two, on a square of twice the side.
WAVES = (1, 4)
ERROR = "rel. L2 error %"

Function = Callable[[Tensor], Tensor]
"""From points ``[B, d]`` to values ``[B, 1]``."""


def poisson_solution(points: Tensor) -> Tensor:
    """Solution of -u'' = f on [0, 1], points ``[B, 1]`` to values ``[B, 1]``."""
    return sum_of_sines(points, (1, 1.0), (4, 0.5))


def poisson_residual(function: Function, points: Tensor) -> Tensor:
    """Return -u'' - f at points ``[B, 1]``, over the largest part of f, ``[B, 1]``."""
    points = points.detach().requires_grad_()
    curvature = _derivatives(_derivatives(function(points), points), points)
    pi2 = math.pi**2
    force = sum_of_sines(points.detach(), (1, pi2), (4, 8 * pi2))
    return -(curvature + force) / (8 * pi2)


def heat_solution(points: Tensor) -> Tensor:
    """Solution of u_t = a u_xx, points (x, t) ``[B, 2]`` to values ``[B, 1]``."""
    terms = [
        factor
        * torch.sin(waves * math.pi * points[:, :1])
        * torch.exp(-DIFFUSIVITY * (waves * math.pi) ** 2 * points[:, 1:])
        for waves, factor in ((1, 1.0), (2, 0.5))
    ]
    return torch.stack(terms).sum(0)


def heat_residual(function: Function, points: Tensor) -> Tensor:
    """Return u_t - a u_xx at points (x, t) ``[B, 2]``, ``[B, 1]``."""
    points = points.detach().requires_grad_()
    slopes = _derivatives(function(points), points)
    curvature = _derivatives(slopes[:, :1], points)[:, :1]
    return slopes[:, 1:] - DIFFUSIVITY * curvature


def helmholtz_solution(points: Tensor) -> Tensor:
    """Solution of u_xx + u_yy + u = q, points (x, y) ``[B, 2]`` to values ``[B, 1]``."""
    waves = math.pi * points.new_tensor(WAVES)
    return torch.sin(waves * points).prod(1, keepdim=True)


def helmholtz_residual(function: Function, points: Tensor) -> Tensor:
    """Return u_xx + u_yy + u - q at points ``[B, 2]``, over the scale of q, ``[B, 1]``."""
    points = points.detach().requires_grad_()
    values = function(points)
    slopes = _derivatives(values, points)
    curvatures = [
        _derivatives(slopes[:, axis : axis + 1], points)[:, axis : axis + 1]
        for axis in (0, 1)
    ]
    scale = math.pi**2 * sum(waves**2 for waves in WAVES)
    force = (1 - scale) * helmholtz_solution(points.detach())
    return (curvatures[0] + curvatures[1] + values - force) / scale


def sum_of_sines(points: Tensor, *terms: tuple[int, float]) -> Tensor:
    """Sum factor * sin(waves pi x) over terms (waves, factor), ``[B, 1]``."""
    parts = [factor * torch.sin(waves * math.pi * points) for waves, factor in terms]
    return torch.stack(parts).sum(0)


def poisson_losses(function: Function, batch: Batch) -> dict[str, Tensor]:
    """Mean squares of the residual and of the boundary values, which should be 0."""
    inside, edge = batch
    return {
        "residual": poisson_residual(function, inside).square().mean(),
        "boundary": function(edge).square().mean(),
    }


def heat_losses(function: Function, batch: Batch) -> dict[str, Tensor]:
    """Mean squares of the residual, of the boundary and of what initial values lack."""
    inside, edge, first = batch
    return {
        "residual": heat_residual(function, inside).square().mean(),
        "boundary": function(edge).square().mean(),
        "initial": (function(first) - heat_solution(first)).square().mean(),
    }


def helmholtz_losses(function: Function, batch: Batch) -> dict[str, Tensor]:
    """Mean squares of the residual and of the boundary values, which should be 0."""
    inside, edge = batch
    return {
        "residual": helmholtz_residual(function, inside).square().mean(),
        "boundary": function(edge).square().mean(),
    }


def poisson_batches(seed: int) -> Iterator[Batch]:
    """Yield points inside, ``[128, 1]``, and both ends, ``[2, 1]``."""
    draws = generator(seed, 1)
    ends = torch.tensor([[0.0], [1.0]])
    while True:
        yield torch.rand(INSIDE, 1, generator=draws), ends


def heat_batches(seed: int) -> Iterator[Batch]:
    """Yield points inside, ``[128, 2]``, at both ends and at time 0, ``[32, 2]`` each."""
    draws = generator(seed, 1)
    while True:
        inside = torch.rand(INSIDE, 2, generator=draws)
        edge = torch.rand(EDGE, 2, generator=draws)
        edge[:, 0] = edge[:, 0].round()
        first = torch.rand(EDGE, 2, generator=draws)
        first[:, 1] = 0
        yield inside, edge, first


def helmholtz_batches(seed: int) -> Iterator[Batch]:
    """Yield points inside, ``[128, 2]``, and on the four sides, ``[32, 2]``."""
    draws = generator(seed, 1)
    while True:
        inside = torch.rand(INSIDE, 2, generator=draws)
        edge = torch.rand(EDGE, 2, generator=draws)
        side = torch.randint(4, (EDGE,), generator=draws)
        edge[torch.arange(EDGE), side // 2] = (side % 2).float()
        yield inside, edge


def relative_error(function: Function, solution: Function, points: Tensor) -> float:
    """Norm of the error over that of the solution at points, in percent."""
    with torch.no_grad():
        expected = solution(points)
        return 100 * float((function(points) - expected).norm() / expected.norm())


def start_poisson(seed: int) -> Training:
    """Give the training of a seed; sets the global random state."""
    points = torch.linspace(0, 1, 201)[:, None]
    return _start(seed, poisson_losses, poisson_solution, poisson_batches(seed), points)


def start_heat(seed: int) -> Training:
    """Give the training of a seed; sets the global random state."""
    axis = torch.linspace(0, 1, 41)
    return _start(
        seed,
        heat_losses,
        heat_solution,
        heat_batches(seed),
        torch.cartesian_prod(axis, axis),
    )


def start_helmholtz(seed: int) -> Training:
    """Give the training of a seed; sets the global random state."""
    axis = torch.linspace(0, 1, 41)
    return _start(
        seed,
        helmholtz_losses,
        helmholtz_solution,
        helmholtz_batches(seed),
        torch.cartesian_prod(axis, axis),
    )


def _start(
    seed: int,
    losses: Callable[[Function, Batch], dict[str, Tensor]],
    solution: Function,
    batches: Iterator[Batch],
    points: Tensor,
) -> Training:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(points.shape[1], WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, 1),
    )
    return Training(
        model,
        torch.optim.Adam(model.parameters(), lr=RATE),
        list(model.parameters()),
        batches,
        lambda batch: losses(model, batch),
        lambda: {ERROR: relative_error(model, solution, points)},
    )


PROBLEMS = (
    Problem(
        "poisson",
        "-u'' = f in one dimension, as a physics-informed network",
        ("residual", "boundary"),
        (Metric(ERROR, ".2f", more_is_better=False),),
        steps=800,
        start=start_poisson,
        weighted=("boundary",),
    ),
    Problem(
        "heat",
        "heat equation in one dimension, as a physics-informed network",
        ("residual", "boundary", "initial"),
        (Metric(ERROR, ".2f", more_is_better=False),),
        steps=800,
        start=start_heat,
        weighted=("boundary", "initial"),
    ),
    Problem(
        "helmholtz",
        "u_xx + u_yy + u = q in two dimensions, as a physics-informed network",
        ("residual", "boundary"),
        (Metric(ERROR, ".2f", more_is_better=False),),
        steps=800,
        start=start_helmholtz,
        weighted=("boundary",),
    ),
)


def _derivatives(values: Tensor, points: Tensor) -> Tensor:
    """Derivatives of each value by its own point, ``[B, d]``, with a graph."""
    (slopes,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    return slopes
