"""Settings shared by every test."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

from ghopt import geometry
from ghopt.geometry import cone

# torch's first calls are slow, so a deadline would fail on them and on nothing else. The
# same draws each time: a test that passed for one must not fail for another by chance.
settings.register_profile("same", deadline=None, derandomize=True)
# Other draws each time, to look for what the former miss.
settings.register_profile("anew", deadline=None, derandomize=False)
settings.load_profile("same")

# The tensors of a test are tiny: threads cost more than they save.
torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["on the CPU", "as on a device"])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test as the CPU does, and without reading values, as a device has to."""
    if request.param == "on the CPU":
        yield request.param
        return
    with (
        patch.object(geometry, "reading_is_free", return_value=False),
        patch.object(cone, "reading_is_free", return_value=False),
    ):
        yield request.param
