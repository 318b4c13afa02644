"""What Accelerate needs between tests."""

from tests.examples.conftest import fresh_state

__all__ = ["fresh_state"]
