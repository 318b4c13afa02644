"""What torch shows of a graph, where one lacks a name that the faster passes go by."""

import subprocess
import sys

import pytest
import torch

from ghopt.gradients import graph
from ghopt.gradients.graph import Hooks, is_supported
from tests.versions import needs

pytestmark = needs.faster_passes

TRAINING = """
import torch
owner, name = {owner}, "{name}"
delattr(owner, name)
from ghopt import HarmonizedOptimizer
from ghopt.gradients.graph import is_supported
assert not is_supported()
weight = torch.nn.Parameter(torch.ones(300, 300))
optimizer = HarmonizedOptimizer(torch.optim.SGD([weight], lr=0.5))
out = torch.ones(1, 300) @ weight.T
optimizer.step(losses=[out.sum(), 2 * out.sum()])
assert weight.eq(-0.5).all()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [("torch._C", "_functions"), ("torch._C._autograd", "_get_sequence_nr")],
)
def test_a_torch_without_a_name_takes_separate_passes(owner: str, name: str) -> None:
    script = TRAINING.format(owner=owner, name=name)
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_a_torch_lacks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_supported.__wrapped__()
    monkeypatch.delattr(torch.autograd, "_is_checkpoint_valid")
    assert not is_supported.__wrapped__()


def test_without_it_no_hook_is_known_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Hooks().are_known
    monkeypatch.setattr(graph, "is_supported", lambda: False)
    assert not Hooks().are_known
