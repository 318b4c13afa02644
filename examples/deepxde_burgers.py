"""DeepXDE: the Burgers equation of its own examples, shortened, Adam and then L-BFGS.

Run it with `DDE_BACKEND=pytorch python -m examples.deepxde_burgers`. One line is new:
`harmonize(model)`. The three tasks are the losses that DeepXDE prints: the residual, the
boundary values and the initial ones.
"""

import deepxde as dde
import numpy as np
from torch import Tensor

from ghopt.integrations.deepxde import harmonize


def residual(points: Tensor, u: Tensor) -> Tensor:
    """Give u_t + u u_x - 0.01/pi u_xx.

    Args:
        points: x and t, ``[n, 2]``.
        u: ``[n, 1]``.
    """
    u_x = dde.grad.jacobian(u, points, i=0, j=0)
    u_t = dde.grad.jacobian(u, points, i=0, j=1)
    u_xx = dde.grad.hessian(u, points, i=0, j=0)
    result: Tensor = u_t + u * u_x - 0.01 / np.pi * u_xx
    return result


def make_model(points: int = 600) -> dde.Model:
    """Give a model with so many points inside, and fewer at the edges."""
    where = dde.geometry.GeometryXTime(
        dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99)
    )
    boundary = dde.icbc.DirichletBC(where, lambda _: 0, lambda _, is_on: is_on)
    start = dde.icbc.IC(
        where, lambda x: -np.sin(np.pi * x[:, :1]), lambda _, is_initial: is_initial
    )
    data = dde.data.TimePDE(
        where,
        residual,
        [boundary, start],
        num_domain=points,
        num_boundary=80,
        num_initial=160,
    )
    net = dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal")
    return dde.Model(data, net)


def main() -> None:
    """Train for 200 steps of Adam and 100 iterations of L-BFGS."""
    dde.config.set_random_seed(0)
    model = make_model()
    harmonize(model)
    model.compile("adam", lr=1e-3)
    model.train(iterations=200, display_every=100)
    dde.optimizers.config.LBFGS_options.update(maxiter=100, iter_per_step=50)
    model.compile("L-BFGS")
    model.train()
    print("Weights of the last step:", model.opt.last.weights)


if __name__ == "__main__":
    main()
