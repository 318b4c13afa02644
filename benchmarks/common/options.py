"""What the commands of the benchmarks share: numbers, as ``argparse`` reads them."""

import argparse


def positive(text: str) -> int:
    """Read an integer of at least 1."""
    return _at_least(1, text)


def whole(text: str) -> int:
    """Read an integer of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(
            f"invalid value: {text} (must be at least {least})"
        )
    return value
