"""What a command will import: whether it is there is known before any work."""

from importlib.util import find_spec

from ghopt.extras import missing


def need(extra: str, *packages: str) -> None:
    """Find packages that will be imported later, after minutes or hours of work.

    Raises:
        ImportError: if one is missing; names it and the extra that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise missing(package, extra)
