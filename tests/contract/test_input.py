"""Bad input is refused by name and value, before anything changed."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.testing import assert_close

from ghopt import HarmonizedOptimizer, gh
from tests import models
from tests.models import Tasks


class Training:
    """A model and its optimizer in the middle of everything that could be lost."""

    def __init__(self, base: Callable[..., Optimizer] = AdamW) -> None:
        self.base = base
        self.model = models.make(models.heads_on_a_trunk, 2)
        self.optimizer = HarmonizedOptimizer(base(self.model.parameters(), lr=0.1))
        self.optimizer.step(losses=self.losses())
        self.optimizer.backward(self.losses(1), accumulate_only=True)

    def losses(self, seed: int = 0) -> list[Tensor]:
        return self.model(*models.batch(2, seed))  # type: ignore[no-any-return]  # of a Module

    def held(self) -> list[object]:
        """List what a refused call must leave alone."""
        return [
            self.model.state_dict(),
            [p.grad for p in self.model.parameters()],
            self.optimizer.state_dict()["state"],
        ]

    def gramian(self) -> Tensor:
        """End the accumulation, and tell what was found: also what was accumulated."""
        self.optimizer.backward(self.losses(2))
        assert self.optimizer.last is not None
        return self.optimizer.last.gramian

    @contextmanager
    def refused(self, error: type[Exception], message: str) -> Iterator[None]:
        """Expect this error, and that nothing changed."""
        before, last = copy.deepcopy(self.held()), self.optimizer.last
        groups = copy.deepcopy(self.optimizer.state_dict()["param_groups"])
        with pytest.raises(error, match=message):
            yield
        assert_close(self.held(), before, rtol=0, atol=0)
        assert self.optimizer.state_dict()["param_groups"] == groups
        assert self.optimizer.last is last
        undisturbed = Training(self.base)
        assert self.gramian().equal(undisturbed.gramian())
        assert_close(self.held(), undisturbed.held(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("backward", {}, "losses"),
        ("backward", {"losses": [], "loss": []}, "loss"),
        ("backward", {"losses": [], "retain": True}, "retain"),
        ("step", {"loss": []}, "loss"),
        ("step", {"losses": [], "retain_graph": True}, "retain_graph"),
        ("zero_grad", {"to_none": True}, "to_none"),
        ("state_dict", {"full": True}, "full"),
        ("load_state_dict", {}, "state_dict"),
    ],
)
def test_an_unknown_or_missing_argument_is_named(
    method: str, arguments: dict[str, object], message: str
) -> None:
    training = Training()
    with training.refused(TypeError, f"'{message}'"):
        getattr(training.optimizer, method)(**arguments)


def test_only_losses_come_by_position() -> None:
    training = Training()
    with training.refused(TypeError, "positional"):
        training.optimizer.backward(training.losses(), True)  # type: ignore[call-arg,arg-type]  # the point


def fails(losses: list[Tensor]) -> Iterator[Tensor]:
    yield losses[0]
    raise ValueError("the loader is empty")


BAD: dict[str, tuple[Callable[[list[Tensor]], Any], type[Exception], str]] = {
    "0-D tensor": (sum, ValueError, r"pass \[a, b\], not a \+ b"),
    "2-D tensor": (
        lambda losses: torch.stack(losses)[None],
        ValueError,
        r"losses .* 1-D, got shape \[1, 2\]",
    ),
    "None": (lambda _: None, TypeError, "losses must be .* got .*NoneType"),
    "missing": (lambda losses: [losses[0], None], TypeError, "losses.*1.*NoneType"),
    "number": (
        lambda losses: {"0": losses[0], "1": 0.5},
        TypeError,
        "losses.*'1'.*float",
    ),
    "list in a list in a list": (
        lambda losses: [[losses], losses],
        TypeError,
        "losses.*'0'.*list",
    ),
    "group of a name": (
        lambda losses: [losses, ["ab", losses[1]]],
        TypeError,
        r"losses\['1'\]\[0\] must be a tensor, got .*str",
    ),
    "group of a vector": (
        lambda losses: [[losses[0], losses[1].expand(3)], losses[1]],
        ValueError,
        r"losses\['0'\]\[1\] must be a real scalar, got shape \[3\]",
    ),
    "group of nothing": (
        lambda losses: [losses[0], []],
        ValueError,
        r"losses\['1'\] must hold at least one loss",
    ),
    "name": (lambda _: "ab", TypeError, "losses.*'0'.*str"),
    "vector": (
        lambda losses: [losses[0], losses[1].expand(3)],
        ValueError,
        r"losses.*'1'.* scalar, got shape \[3\]",
    ),
    "integer": (
        lambda losses: [losses[0], losses[1].long()],
        ValueError,
        "losses.*'1'.*real.*int64",
    ),
    "complex": (
        lambda losses: [losses[0], losses[1] + 0j],
        ValueError,
        "losses.*'1'.*real.*complex128",
    ),
    "no graph": (
        lambda losses: [loss.detach() for loss in losses],
        ValueError,
        "losses must require grad.*'0', '1'",
    ),
    "other names": (
        lambda losses: dict(zip("ab", losses, strict=True)),
        ValueError,
        r"losses must be those of tasks \['0', '1'\], got \['a', 'b'\]",
    ),
    "one too few": (
        lambda losses: losses[:1],
        ValueError,
        r"losses must be those of tasks \['0', '1'\], got \['0'\]",
    ),
    "iterator that fails": (fails, ValueError, "the loader is empty"),
}
bad_losses = pytest.mark.parametrize(
    ("form", "error", "message"), BAD.values(), ids=[*BAD]
)


@bad_losses
@pytest.mark.parametrize("accumulate_only", [True, False])
def test_backward_refuses_bad_losses_before_anything_changed(
    form: Callable[[list[Tensor]], Any],
    error: type[Exception],
    message: str,
    accumulate_only: bool,
) -> None:
    training = Training()
    losses = training.losses()
    with training.refused(error, message):
        training.optimizer.backward(form(losses), accumulate_only=accumulate_only)
    # Nor has a pass freed the graph.
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]  # torch's


@pytest.mark.parametrize(
    ("form", "error", "message"),
    # A step starts anew, so other names are all right; with None there are no losses.
    [BAD[name] for name in BAD if name not in ("None", "other names", "one too few")],
)
def test_step_refuses_bad_losses_before_anything_changed(
    form: Callable[[list[Tensor]], Any], error: type[Exception], message: str
) -> None:
    training = Training()
    with training.refused(error, message):
        training.optimizer.step(losses=form(training.losses()))


@pytest.mark.parametrize("given", ["backward", 3, [print]])
def test_backward_fn_must_be_callable(given: Any) -> None:
    training = Training()
    with training.refused(TypeError, "backward_fn must be callable, got"):
        training.optimizer.backward(training.losses(), backward_fn=given)


def test_losses_given_as_a_closure_are_an_error_that_says_so() -> None:
    training = Training()
    losses: Any = training.losses()
    with training.refused(TypeError, "closure must be callable, got .*list"):
        training.optimizer.step(losses)


def test_a_closure_beside_losses_is_refused_before_anything_changed() -> None:
    training = Training()
    with training.refused(ValueError, "closure must be None .* got both"):
        training.optimizer.step(lambda: 0.0, losses=training.losses())


def test_a_group_without_tensors_is_refused() -> None:
    training = Training()
    with training.refused(TypeError, "optimizer can only optimize Tensors"):
        training.optimizer.add_param_group({"params": ["weight"]})


def test_a_group_with_a_parameter_of_another_is_refused() -> None:
    training = Training()
    group = {"params": [*training.model.trunk.parameters()]}
    with training.refused(ValueError, "some parameters appear in more than one"):
        training.optimizer.add_param_group(group)


def test_a_state_of_another_optimizer_is_refused_before_anything_changed() -> None:
    training = Training()
    other = AdamW([nn.Parameter(torch.ones(2))]).state_dict()
    with training.refused(ValueError, "loaded state dict contains"):
        training.optimizer.load_state_dict(other)


# The weighting


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_may_have_any_floating_point_dtype(dtype: torch.dtype) -> None:
    training = Training()
    weights = torch.tensor([0.75, 2.0], dtype=dtype)
    training.optimizer.weighting = lambda _: weights
    training.optimizer.zero_grad()
    bias, losses = training.model.trunk[0].bias, training.losses()  # type: ignore[index]  # Sequential
    first, second = (
        torch.autograd.grad(loss, bias, retain_graph=True)[0] for loss in losses
    )
    training.optimizer.backward(losses)
    assert_close(bias.grad, 0.75 * first + 2 * second, rtol=1e-14, atol=1e-15)
    assert training.optimizer.last is not None
    assert training.optimizer.last.weights.dtype is torch.float64


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(2, 2), ValueError, r"weighting .* \[2\], got .* \[2, 2\]"),
        (torch.ones(2, 1), ValueError, r"weighting .* \[2\], got .* \[2, 1\]"),
        (torch.ones(()), ValueError, r"weighting .* \[2\], got .* \[\]"),
        (torch.ones(3), ValueError, r"weighting .* \[2\], got .* \[3\]"),
        (torch.ones(2).bool(), ValueError, "weighting .* floating .* got torch.bool"),
        (torch.ones(2) + 0j, ValueError, "weighting .* floating .* got torch.complex"),
        (torch.ones(2).requires_grad_(), ValueError, "weighting .* without grad"),
        (None, TypeError, "weighting must return a tensor, got .*NoneType"),
        ((1.0, 1.0), TypeError, "weighting must return a tensor, got .*tuple"),
        (torch.ones(2, device="meta"), ValueError, "weighting .* cpu, got .*meta"),
    ],
)
def test_bad_weights_change_neither_grad_nor_weights_nor_state(
    weights: Any, error: type[Exception], message: str
) -> None:
    training = Training()
    training.optimizer.weighting = lambda _: weights
    before, last = copy.deepcopy(training.held()), training.optimizer.last
    with pytest.raises(error, match=message):
        training.optimizer.backward(training.losses())
    assert_close(training.held(), before, rtol=0, atol=0)
    assert training.optimizer.last is last
    # An exception after the passes drops what was collected.
    training.optimizer.weighting = gh
    undisturbed = Training()
    undisturbed.optimizer.zero_grad()
    assert training.gramian().equal(undisturbed.gramian())


# The constructor


@pytest.mark.parametrize(
    "given",
    [SGD, "SGD", None, nn.Linear(1, 1), [nn.Parameter(torch.ones(1))], partial(SGD)],
    ids=["class", "name", "None", "module", "parameters", "factory"],
)
def test_a_base_that_is_no_optimizer_is_named(given: Any) -> None:
    with pytest.raises(
        TypeError, match="base_optimizer must be a torch Optimizer, got"
    ):
        HarmonizedOptimizer(given)


def base(model: Tasks) -> Optimizer:
    return SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("given", [None, "gh", torch.ones(2)])
def test_a_weighting_that_is_not_callable_is_named(given: Any) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    with pytest.raises(TypeError, match="weighting must be callable, got"):
        HarmonizedOptimizer(base(model), given)


@pytest.mark.parametrize(
    "arguments", [{"lr": 0.1}, {"params": []}, {"shared": []}, {"lam": 0.5}]
)
def test_the_constructor_names_an_unknown_argument(
    arguments: Mapping[str, Any],
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    with pytest.raises(TypeError, match=next(iter(arguments))):
        HarmonizedOptimizer(base(model), gh, **arguments)


NOT_PARAMETERS: dict[str, Callable[[Tasks], Any]] = {
    "one tensor": lambda model: next(model.parameters()),
    "names": lambda model: [name for name, _ in model.named_parameters()],
    "a name": lambda _: "trunk",
    "named parameters": Tasks.named_parameters,
    "groups": lambda model: base(model).param_groups,
    "iterable module": lambda model: model.trunk,
    "module": lambda model: model,
    "number": lambda _: 3,
}


@pytest.mark.parametrize("given", NOT_PARAMETERS.values(), ids=[*NOT_PARAMETERS])
def test_shared_params_must_be_parameters(given: Callable[[Tasks], Any]) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    with pytest.raises(TypeError, match=r"shared_params must .*, got"):
        HarmonizedOptimizer(base(model), shared_params=given(model))


def test_a_refused_wrapper_leaves_the_base_as_it_was() -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    plain = base(model)
    before = dict(vars(plain))
    with pytest.raises(ValueError, match="shared_params"):
        HarmonizedOptimizer(plain, shared_params=[])
    assert vars(plain) == before
    HarmonizedOptimizer(plain).step(losses=model(*models.batch(2)))
