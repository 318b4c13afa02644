"""torch's default device and dtype are the user's: nothing in ghopt depends on them."""

import ast
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.testing import assert_close

import ghopt
from ghopt import HarmonizedOptimizer, Recorder, geometry, harmonized_loss, measure
from ghopt.report import judge
from tests import models
from tests.literal import grads
from tests.versions import needs

_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "eye", "arange"),
    *("linspace", "logspace", "rand", "randn", "randint", "randperm", "scalar_tensor"),
)


@contextmanager
def other_defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node


@pytest.mark.parametrize(
    "path", sorted(Path(ghopt.__file__).parent.glob("*.py")), ids=str
)
def test_every_new_tensor_is_told_its_dtype_and_device(path: Path) -> None:
    for call in calls(path):
        assert isinstance(call.func, ast.Attribute)
        root = call.func.value
        if isinstance(root, ast.Name) and root.id == "torch":
            given = {keyword.arg for keyword in call.keywords}
            is_factory = call.func.attr in _FACTORIES
            assert not is_factory or {"dtype", "device"} <= given, ast.unparse(call)


everywhere = pytest.mark.parametrize(
    ("dtype", "device"),
    [(torch.float16, "cpu"), (torch.float64, "meta"), (torch.float16, "meta")],
    ids=str,
)


@everywhere
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("name", ["gh", "ghpp", "ghpp_balanced", "ghpp_printed"])
def test_the_rules_do_not_depend_on_them(
    name: str, tasks: int, dtype: torch.dtype, device: str
) -> None:
    rule = getattr(geometry, name)
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(tasks, 5, generator=generator, dtype=torch.float64)
    if tasks > 2 and name in ("ghpp_balanced", "ghpp_printed"):
        return
    expected = rule(jacobian @ jacobian.T)
    with other_defaults(dtype, device):
        actual = rule(jacobian @ jacobian.T)
    assert_close(actual, expected, rtol=0, atol=0)


def everything(model: models.Tasks, losses: list[Tensor]) -> list[Any]:
    """Do whatever ghopt does, and give all that comes of it."""
    made: list[Any] = [harmonized_loss(losses, model.parameters())]
    recorder = Recorder()
    measure(losses, model.parameters(), recorder=recorder, layers=model)
    optimizer = HarmonizedOptimizer(SGD(model.parameters(), 0.1))
    recorder.attach(optimizer, layers={"trunk": model.trunk.parameters()})
    optimizer.backward(losses, retain_graph=True, accumulate_only=True)
    optimizer.backward(losses, retain_graph=True, total=torch.stack([*losses]).sum())
    made += [[grad if grad is None else grad.clone() for grad in grads(model)]]
    optimizer.zero_grad()
    optimizer.backward(losses, retain_graph=True, accumulate_only=True)
    optimizer.step()
    recording = recorder.flush()
    file = io.StringIO()
    file.writelines(str(row) for row in recording.rows())
    return [*made, recording.gramians, recording.sgd_effects, file.getvalue(),
            judge(recording).findings, Recorder().flush().steps]  # fmt: skip


@everywhere
def test_no_step_and_no_recording_depends_on_them(
    dtype: torch.dtype, device: str
) -> None:
    made = []
    for changed in (False, True):
        model = models.make(models.heads_on_a_trunk, 3)
        losses = model(*models.batch(3))
        if changed:
            with other_defaults(dtype, device):
                made.append(everything(model, losses))
        else:
            made.append(everything(model, losses))
    assert_close(made[1][:4], made[0][:4], rtol=0, atol=0, equal_nan=True)
    assert made[1][4:6] == made[0][4:6]


@needs.adam_on_meta
@everywhere
def test_closures_and_reused_weights_do_not_depend_on_them(
    dtype: torch.dtype, device: str
) -> None:
    model = models.make(models.heads_on_a_trunk, 2)
    optimizer = HarmonizedOptimizer(AdamW(model.parameters()), measure_every=2)
    data = [models.batch(2, seed) for seed in range(4)]
    with other_defaults(dtype, device):
        for batch in data:
            value: Any = optimizer.step(lambda batch=batch: model(*batch))  # type: ignore[misc]  # inferred
            assert value.device.type == "cpu"
            assert value.dtype == torch.float64
