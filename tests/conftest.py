"""Settings shared by every test."""

import gc
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

import ghopt
from ghopt import HarmonizedOptimizer
from ghopt.gradients import deferred, together
from tests.pretended import nothing_read

# torch's first calls are slow, so a deadline would fail on them and on nothing else. The
# same draws each time: a test that passed for one must not fail for another by chance.
settings.register_profile("same", deadline=None, derandomize=True, max_examples=50)
# Other draws each time, and more, to look for what the former miss.
settings.register_profile("anew", deadline=None, derandomize=False, max_examples=200)
settings.load_profile("same")

# The tensors of a test are tiny: threads cost more than they save. Some ask for two, to see
# that no bound is that of one order of summation.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# DeepXDE reads it when it is imported; without it, it writes a file at home.
os.environ["DDE_BACKEND"] = "pytorch"


def pytest_collection_finish() -> None:
    """Hide what was imported from the search for garbage, and for objects of a kind."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let it go at the end, or some of it complains that it is left."""
    gc.unfreeze()


@pytest.fixture(scope="module", params=["on the CPU", "as on a device"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test as the CPU does, and without reading values, as a device has to."""
    if request.param == "on the CPU":
        yield request.param
        return
    with nothing_read():
        yield request.param


@pytest.fixture(scope="module")
def never_separate() -> Iterator[None]:
    """Run tests with passes="auto" such that no gain is too small."""
    with (
        patch.object(together, "_FEWEST_TASKS", 2),
        patch.object(together, "_pays", lambda *_: True),
        patch.object(deferred, "_pays", lambda rows, *_: rows > 0),
    ):
        yield


@pytest.fixture(scope="module", params=["auto", "separate"])
def passes(request: pytest.FixtureRequest, never_separate: None) -> Iterator[str]:
    """Run a test with separate passes, and with others wherever it can be."""
    del never_separate
    with (
        patch.dict(HarmonizedOptimizer.__init__.__kwdefaults__, passes=request.param),
        patch.dict(ghopt.backward.__kwdefaults__, passes=request.param),
    ):
        yield request.param


@pytest.fixture
def dde(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give DeepXDE, and put back what it sets for the whole process."""
    import deepxde

    if torch.cuda.is_available():  # the import has changed it
        torch.set_default_device(None)
    options = deepxde.optimizers.config.LBFGS_options
    for name, value in options.items():
        monkeypatch.setitem(options, name, value)
    monkeypatch.setattr(deepxde.config, "mixed", False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # whatever ran before
        yield deepxde
    deepxde.config.set_default_float("float32")
