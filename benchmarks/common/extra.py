"""The packages that only the benchmarks need."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bench_extra(extra: str = "bench") -> Iterator[None]:
    """Import packages of an extra inside this block.

    Raises:
        ImportError: if one is missing; names it and the extra that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'{error.name} is missing; install it with: pip install "ghopt[{extra}]"',
            name=error.name,
        ) from error
