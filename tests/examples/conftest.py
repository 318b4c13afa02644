"""What Accelerate and the Trainer on top of it need between tests."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """Accelerate keeps what one Accelerator was told for all that follow it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
