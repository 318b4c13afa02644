"""`harmonize` on a `dde.Model`, against a literal loop and against DeepXDE itself."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, Recorder, Weighting, gh, ghpp, plain_sum
from ghopt.integrations.deepxde import harmonize
from tests.literal import literal_gradients, literal_step, literal_update

ITERATIONS = 6
"""Of Adam, and of L-BFGS in each of its two steps."""


@pytest.fixture
def wide(dde: Any) -> Any:
    """Give DeepXDE in float64, with short steps of L-BFGS."""
    dde.config.set_default_float("float64")
    shorten(dde)
    return dde


def shorten(dde: Any) -> None:
    dde.optimizers.config.LBFGS_options.update(
        maxiter=2 * ITERATIONS, iter_per_step=ITERATIONS
    )


def burgers(points: int = 30) -> Any:
    # Not above: DeepXDE is to be imported by the fixture.
    from examples.deepxde_burgers import make_model

    torch.manual_seed(0)
    np.random.seed(0)
    return make_model(points)


def train(model: Any, callbacks: list[Any] | None = None, **options: Any) -> None:
    """Train by Adam, then by L-BFGS: as anybody does."""
    np.random.seed(0)
    once = {key: options.pop(key) for key in ("decay",) if key in options}
    quiet: dict[str, Any] = {"verbose": 0, "callbacks": callbacks}
    model.compile("adam", lr=1e-3, verbose=0, **once, **options)
    model.train(iterations=ITERATIONS, display_every=2, **quiet)
    model.compile("L-BFGS", verbose=0, **options)
    model.train(**quiet)


def batch_of(model: Any) -> Any:
    return model.data.train_next_batch(None)


def weights(model: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.net.parameters()]


def difference(model: Any, other: Any) -> float:
    pairs = zip(weights(model), weights(other), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def literal_training(model: Any, loss_weights: list[float]) -> int:
    """Train as :func:`train` does, but literally; count the steps in conflict."""
    parameters = list(model.net.parameters())
    factors = torch.tensor(loss_weights)

    def losses() -> list[Tensor]:
        stacked: Tensor = model.outputs_losses_train(*batch_of(model))[1]
        return [*(factors * stacked)]

    model.compile("adam", lr=1e-3, verbose=0)
    adam = Adam(parameters, lr=1e-3)
    conflicts = sum(literal_step(losses(), parameters, adam) for _ in range(ITERATIONS))
    lbfgs = LBFGS(
        parameters,
        max_iter=ITERATIONS,
        max_eval=1000,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    for _ in range(2):
        jacobian = literal_gradients(losses(), parameters)
        update = literal_update(jacobian)
        tau = torch.linalg.lstsq(jacobian.T, update).solution
        conflicts += bool((jacobian @ jacobian.T < 0).any())

        def closure(tau: Tensor = tau) -> float:
            value = (tau * torch.stack(losses())).sum()
            lbfgs.zero_grad()
            torch.autograd.backward(value)
            return float(value.detach())

        lbfgs.step(closure)  # type: ignore[no-untyped-call]  # torch's
    return conflicts


@pytest.mark.parametrize("loss_weights", [[1.0, 1.0, 1.0], [0.2, 5.0, 1.0]])
@pytest.mark.usefixtures("wide")
def test_adam_then_lbfgs_equal_a_literal_loop(loss_weights: list[float]) -> None:
    model, expected, plain = burgers(), burgers(), burgers()
    harmonize(model)
    train(model, loss_weights=loss_weights)
    assert model.train_state.step == 3 * ITERATIONS
    assert literal_training(expected, loss_weights) > 6
    assert_close(weights(model), weights(expected), rtol=1e-7, atol=1e-8)
    train(plain, loss_weights=loss_weights)
    assert difference(model, plain) > 1e-3


Case = Callable[[Any, Any], dict[str, Any]]


def with_loss_weights(*_: Any) -> dict[str, Any]:
    return {"loss_weights": [2, 10.0, 0.5]}


def with_one_loss_weight_for_all(*_: Any) -> dict[str, Any]:
    return {"loss_weights": [0.5]}


def with_decay(*_: Any) -> dict[str, Any]:
    return {"decay": ("step", 2, 0.5)}


def with_an_l1_penalty(_: Any, model: Any) -> dict[str, Any]:
    model.net.regularizer = ("l1", 1e-3)
    return {"loss_weights": [1.0, 3.0, 2.0]}


def with_an_external_variable(dde: Any, model: Any) -> dict[str, Any]:
    factor, inner = dde.Variable(0.5), model.data.pde
    model.data.pde = lambda points, u: inner(points, u) + factor * u
    return {"external_trainable_variables": factor}


def with_new_points(dde: Any, _: Any) -> dict[str, Any]:
    return {"callbacks": [dde.callbacks.PDEPointResampler(period=2)]}


def with_metrics(*_: Any) -> dict[str, Any]:
    return {"metrics": [lambda _, u: float(u.mean()), lambda _, u: float(u.std())]}


CASES: list[Case] = [
    with_loss_weights,
    with_one_loss_weight_for_all,
    with_decay,
    with_an_l1_penalty,
    with_an_external_variable,
    with_new_points,
    with_metrics,
]


@pytest.mark.parametrize("case", CASES)
def test_with_weights_of_one_nothing_differs_from_plain_deepxde(
    wide: Any, case: Case
) -> None:
    model, plain = burgers(), burgers()
    harmonize(model, plain_sum)
    train(model, **case(wide, model))
    train(plain, **case(wide, plain))
    history, expected = model.losshistory, plain.losshistory
    assert history.steps == expected.steps == [0, 2, 4, 6, 6, 12, 18]
    close = partial(assert_close, rtol=1e-7, atol=1e-9)
    close(weights(model), weights(plain))
    variables = "external_trainable_variables"
    close(getattr(model, variables), getattr(plain, variables))
    for name in ("loss_train", "loss_test", "metrics_test"):
        close(np.array(getattr(history, name)), np.array(getattr(expected, name)))


@pytest.mark.usefixtures("wide")
def test_weight_decay_of_the_net_stays() -> None:
    model, plain = burgers(), burgers()
    harmonize(model, plain_sum)
    for each in (model, plain):
        each.net.regularizer = ("l2", 0.1)
        each.compile("adam", lr=1e-3, verbose=0)
        each.train(iterations=3, verbose=0)
    assert model.opt.param_groups[0]["weight_decay"] == 0.1
    assert_close(weights(model), weights(plain), rtol=1e-9, atol=1e-11)


def test_mixed_precision_runs_the_losses_in_half(dde: Any) -> None:
    dde.config.set_default_float("mixed")
    model, plain = burgers(), burgers()
    seen = []
    inner = model.data.pde

    def pde(points: Tensor, u: Tensor) -> Tensor:
        seen.append((u.dtype, torch.is_autocast_enabled("cpu")))
        result: Tensor = inner(points, u)
        return result

    model.data.pde = pde
    harmonize(model, plain_sum)
    for each in (model, plain):
        each.compile("adam", lr=1e-3, verbose=0)
        each.train(iterations=2, verbose=0)
    assert (torch.float16, True) in seen
    assert difference(model, plain) < 1e-4


@pytest.mark.usefixtures("dde")
def test_an_autocast_around_the_step_holds() -> None:
    model, seen = burgers(), set()
    inner = model.data.pde

    def pde(points: Tensor, u: Tensor) -> Tensor:
        seen.add(u.dtype)
        result: Tensor = inner(points, u)
        return result

    model.data.pde = pde
    harmonize(model)
    model.compile("adam", lr=1e-3, verbose=0)
    with torch.autocast("cpu", torch.bfloat16):
        model.train_step(*batch_of(model))
    assert seen == {torch.bfloat16}


@pytest.mark.usefixtures("wide")
def test_it_may_be_called_after_compile() -> None:
    first, second = burgers(), burgers()
    harmonize(first)
    for model in (first, second):
        model.compile("adam", lr=1e-3, verbose=0)
    harmonize(second)
    for model in (first, second):
        model.train(iterations=4, verbose=0)
        model.compile(optimizer="L-BFGS", verbose=0)
        model.train(verbose=0)
        assert isinstance(model.opt.base_optimizer, LBFGS)
    assert_close(weights(second), weights(first), rtol=0, atol=0)


@pytest.mark.usefixtures("wide")
def test_each_compile_makes_an_optimizer_with_the_options() -> None:
    model = burgers()
    harmonize(model, ghpp, project_step=True, protect=iter([0, 2]))
    for given in ("adam", SGD(model.net.parameters(), lr=0.1), "rmsprop"):
        before = model.opt
        model.compile(given, lr=1e-3, verbose=0)
        assert isinstance(model.opt, HarmonizedOptimizer)
        assert model.opt is not before
        assert model.opt.weighting is ghpp
        assert model.opt.project_step
        assert model.opt.protect == ("0", "2")


@pytest.mark.parametrize(
    ("weighting", "protected"), [(gh, ("0",)), (ghpp, None)], ids=["gh", "ghpp"]
)
@pytest.mark.usefixtures("wide")
def test_steps_of_lbfgs_are_not_projected(
    weighting: Weighting, protected: tuple[str, ...] | None
) -> None:
    model = burgers()
    harmonize(model, weighting, project_step=True, protect=[0])
    model.compile("adam", lr=1e-3, verbose=0)
    assert model.opt.project_step
    model.compile("L-BFGS", verbose=0)
    assert isinstance(model.opt, HarmonizedOptimizer)
    assert model.opt.weighting is weighting
    assert not model.opt.project_step
    assert model.opt.protect == protected


@pytest.mark.usefixtures("wide")
def test_lbfgs_keeps_its_protection_without_a_projected_step() -> None:
    model = burgers()
    harmonize(model, protect=[0])
    model.compile("L-BFGS", verbose=0)
    assert model.opt.protect == ("0",)


@pytest.mark.usefixtures("wide")
def test_a_task_is_protected_by_its_number() -> None:
    model = burgers()
    harmonize(model, protect=[0])
    model.compile("adam", lr=1e-3, verbose=0)
    batch = batch_of(model)
    stacked = model.outputs_losses_train(*batch)[1]
    jacobian = literal_gradients([*stacked], list(model.net.parameters()))
    model.train_step(*batch)
    update = torch.cat([p.grad.reshape(-1) for p in model.net.parameters()])
    main, others = jacobian[0], jacobian[1:]
    bent = [g - (g @ main).clamp(max=0) / (main @ main) * main for g in others]
    assert (others @ main < 0).any()
    assert_close(update, main + bent[0] + bent[1], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("wide")
def test_a_protected_number_beyond_the_losses_is_refused() -> None:
    model = burgers()
    harmonize(model, protect=[7])
    model.compile("adam", lr=1e-3, verbose=0)
    with pytest.raises(ValueError, match=r"got \['7'\]: .* has seen \['0', '1', '2'\]"):
        model.train_step(*batch_of(model))


@pytest.mark.usefixtures("wide")
def test_each_pass_runs_through_the_graph_of_its_loss_alone() -> None:
    model, passes = burgers(), []
    inner = model.data.pde

    def pde(points: Tensor, u: Tensor) -> Tensor:
        result: Tensor = inner(points, u)
        if result.requires_grad:
            result.register_hook(lambda _: passes.append("residual"))  # type: ignore[no-untyped-call]  # torch's
        return result

    model.data.pde = pde
    harmonize(model)
    model.compile("adam", lr=1e-3, verbose=0)
    model.train_step(*batch_of(model))
    assert passes == ["residual"]


def test_a_single_loss_is_a_single_task(wide: Any) -> None:
    models = []
    for weighting in (gh, None):
        torch.manual_seed(0)
        np.random.seed(0)
        data = wide.data.Function(
            wide.geometry.Interval(-1, 1), lambda x: x**2, num_train=8, num_test=8
        )
        model = wide.Model(data, wide.nn.FNN([1, 5, 1], "tanh", "Glorot normal"))
        if weighting:
            harmonize(model, weighting)
        train(model)
        models.append(model)
    assert models[0].opt.last.names == ("0",)
    assert_close(weights(models[0]), weights(models[1]), rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("wide")
def test_losses_that_data_does_not_compute_are_tasks_all_the_same() -> None:
    model = burgers()
    harmonize(model)
    model.compile("adam", lr=1e-3, verbose=0)
    inner = model.outputs_losses_train
    kept = type(model.data).losses_train

    def by_itself(*batch: Any) -> tuple[Tensor, Tensor]:
        replaced, model.data.losses_train = (
            model.data.losses_train,
            kept.__get__(model.data),
        )
        result: tuple[Tensor, Tensor] = inner(*batch)
        model.data.losses_train = replaced
        return result

    model.outputs_losses_train = by_itself
    model.train_step(*batch_of(model))
    assert model.opt.last.names == ("0", "1", "2")


@pytest.mark.usefixtures("wide")
def test_data_stay_as_they_were() -> None:
    model = burgers()
    harmonize(model)
    model.compile("adam", lr=1e-3, verbose=0)
    batch = batch_of(model)
    model.train_step(*batch)
    assert "losses_train" not in vars(model.data)
    calls = []

    def own(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return type(model.data).losses_train(model.data, *args, **options)

    model.data.losses_train = own
    model.train_step(*batch)
    assert model.data.losses_train is own
    assert len(calls) == 1
    assert model.opt.last.names == ("0", "1", "2")


@pytest.mark.usefixtures("wide")
def test_data_stay_as_they_were_where_a_residual_fails() -> None:
    model = burgers()
    harmonize(model)
    model.compile("adam", lr=1e-3, verbose=0)
    before = weights(model)
    model.data.pde = lambda points, u: 1 / 0  # noqa: ARG005  # DeepXDE looks at the names
    with pytest.raises(ZeroDivisionError):
        model.train_step(*batch_of(model))
    assert "losses_train" not in vars(model.data)
    assert_close(weights(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adam", "L-BFGS"])
@pytest.mark.usefixtures("wide")
def test_a_restored_model_goes_on_where_it_was_saved(name: str, tmp_path: Path) -> None:
    model, other = burgers(), burgers()
    for each in (model, other):
        harmonize(each)
        each.compile(name, lr=1e-3, verbose=0)
    model.train(iterations=3, verbose=0)
    path = model.save(str(tmp_path / "model"))
    other.restore(path)
    for each in (model, other):
        each.train_step(*batch_of(each))
    assert_close(weights(other), weights(model), rtol=0, atol=0)


@pytest.mark.usefixtures("wide")
def test_a_plain_model_restores_what_a_harmonized_one_saved(tmp_path: Path) -> None:
    model, plain = burgers(), burgers()
    harmonize(model)
    for each in (model, plain):
        each.compile("adam", lr=1e-3, verbose=0)
    model.train(iterations=3, verbose=0)
    plain.restore(model.save(str(tmp_path / "model")))
    assert_close(weights(plain), weights(model), rtol=0, atol=0)
    assert plain.opt.state_dict().keys() == model.opt.state_dict().keys()


def test_early_stopping_and_display_go_on(
    wide: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = burgers()
    harmonize(model)
    model.compile("adam", lr=1e-3)
    stopping = wide.callbacks.EarlyStopping(min_delta=1e9, patience=3)
    model.train(iterations=50, display_every=1, callbacks=[stopping])
    assert model.train_state.step == 4
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(tuple("01234"))]) == 5


@pytest.mark.usefixtures("wide")
def test_a_recorder_sees_the_steps() -> None:
    model, recorder = burgers(), Recorder()
    harmonize(model)
    model.compile("adam", lr=1e-3, verbose=0)
    recorder.attach(model.opt, layers=model.net)
    model.train(iterations=3, verbose=0)
    recording = recorder.flush()
    assert recording.names == ("0", "1", "2")
    assert len(recording) == 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.usefixtures("wide")
def test_a_copy_made_before_compile_is_harmonized_itself(
    copied: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = burgers()
    # Its geometry and conditions are functions without names.
    state = {name: value for name, value in vars(model).items() if name != "data"}
    monkeypatch.setattr(type(model), "__getstate__", lambda _: state, raising=False)
    harmonize(model)
    state["compile"] = model.compile
    other = copied(model)
    other.data = model.data
    other.compile("adam", lr=1e-3, verbose=0)
    assert model.opt is None
    assert isinstance(other.opt, HarmonizedOptimizer)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weighting": "gh"}, TypeError, "weighting"),
    ({"protect": "main"}, TypeError, "protect"),
    ({"weighting": ghpp, "protect": [0]}, ValueError, "protect"),
]


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("options", "error", "named"), WRONG)
@pytest.mark.usefixtures("wide")
def test_wrong_options_are_refused_before_anything_changes(
    options: dict[str, Any], error: type[Exception], named: str, is_compiled: bool
) -> None:
    model = burgers()
    if is_compiled:
        model.compile("adam", lr=1e-3, verbose=0)
    before = dict(vars(model))
    with pytest.raises(error, match=named):
        harmonize(model, **options)
    assert vars(model) == before


@pytest.mark.usefixtures("dde")
def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a dde.Model, got .*Linear"):
        harmonize(torch.nn.Linear(2, 1))


@pytest.mark.usefixtures("dde")
def test_a_model_is_harmonized_once() -> None:
    model = burgers()
    harmonize(model)
    with pytest.raises(ValueError, match="model must not be harmonized already"):
        harmonize(model)


@pytest.mark.usefixtures("wide")
def test_nncg_is_refused_and_the_model_stays_as_it_was() -> None:
    model = burgers()
    model.compile("NNCG", verbose=0)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="must not be 'NNCG'"):
        harmonize(model)
    assert vars(model) == before
    model.compile("adam", lr=1e-3, verbose=0)
    harmonize(model)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="must not be 'NNCG'"):
        model.compile("NNCG")
    assert vars(model) == before


@pytest.mark.usefixtures("wide")
def test_an_optimizer_that_is_harmonized_is_refused() -> None:
    model = burgers()
    optimizer = HarmonizedOptimizer(Adam(model.net.parameters()))
    harmonize(model)
    with pytest.raises(TypeError, match="must not be harmonized already, got a Harm"):
        model.compile(optimizer)
    assert vars(model)["opt"] is None
    model.compile(optimizer.base_optimizer, verbose=0)
    assert model.opt.base_optimizer is optimizer.base_optimizer


def test_another_backend_is_refused(dde: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = burgers()
    monkeypatch.setattr(dde.backend, "backend_name", "jax")
    with pytest.raises(RuntimeError, match="'jax': set DDE_BACKEND=pytorch"):
        harmonize(model)


def test_without_deepxde_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepxde", None)
    with pytest.raises(ImportError, match=r'pip install "ghopt\[deepxde\]"'):
        harmonize(None)


def test_importing_ghopt_does_not_import_deepxde() -> None:
    code = (
        "import sys, ghopt, ghopt.integrations.deepxde\n"
        "assert 'deepxde' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
