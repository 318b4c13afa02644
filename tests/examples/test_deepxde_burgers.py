"""The Burgers recipe: its losses are those of the equation."""

from typing import Any

import numpy as np
import torch
from torch.testing import assert_close


def test_solutions_of_the_equation_have_no_residual(dde: Any) -> None:
    from examples.deepxde_burgers import residual

    dde.config.set_default_float("float64")
    points = torch.linspace(0.02, 2, 18).view(9, 2).requires_grad_()
    x, t = points[:, :1], points[:, 1:]
    front = -0.05 * (0.05 * x / (0.02 / np.pi)).tanh()  # stands still
    for u in (x / (1 + t), front):
        assert_close(residual(points, u), torch.zeros(9, 1), rtol=0, atol=1e-12)
        dde.grad.clear()
    assert residual(points, 2 * front).abs().max() > 1e-3


def test_losses_are_residual_boundary_and_initial_values(dde: Any) -> None:
    from examples.deepxde_burgers import make_model

    assert dde.backend.backend_name == "pytorch"
    model = make_model(20)
    model.compile("adam", lr=1e-3, verbose=0)
    names = [type(condition).__name__ for condition in model.data.bcs]
    assert names == ["DirichletBC", "IC"]
    model.train(iterations=1, verbose=0)
    points = model.train_state.X_train
    u = model.predict(points)
    edge, first = points[:80], points[80:240]
    assert (np.abs(edge[:, 0]) == 1).all()
    assert (first[:, 1] == 0).all()
    losses = model.train_state.loss_train
    assert_close(losses[1], np.mean(u[:80] ** 2), rtol=1e-4, atol=1e-7)
    start = -np.sin(np.pi * first[:, :1])
    assert_close(losses[2], np.mean((u[80:240] - start) ** 2), rtol=1e-4, atol=1e-7)
