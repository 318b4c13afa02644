"""Packages that come with an extra: where one is missing, the error names the extra."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(extra: str) -> Iterator[None]:
    """Import packages of an extra inside this block.

    Raises:
        ImportError: if one is missing; names it and the extra that installs it.
    """
    try:
        yield
    except ImportError as error:
        raise missing(error.name or "a package that this needs", extra) from error


def missing(package: str, extra: str) -> ImportError:
    """Make the error for a package that is not there."""
    # Double quotes: the shell of Windows knows no others.
    return ImportError(
        f'{package} is missing; install it with: pip install "ghopt[{extra}]"',
        name=package,
    )
