"""What the commands of the benchmarks share: numbers and options, as ``argparse`` reads them."""

import argparse
from pathlib import Path


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


def add_runs(parser: argparse.ArgumentParser, kept: Path) -> None:
    """Add ``--workers``, ``--store`` and ``--show``, of commands that keep their runs."""
    parser.add_argument(
        "--workers",
        type=positive,
        default=2,
        metavar="N",
        help="processes that train (default: 2)",
    )
    add_store(parser, kept)
    parser.add_argument(
        "--show", action="store_true", help="show what is there; train nothing"
    )


def add_store(parser: argparse.ArgumentParser, kept: Path) -> None:
    """Add ``--store``, by default the file of the runs that are committed."""
    parser.add_argument(
        "--store",
        type=Path,
        default=kept,
        metavar="FILE",
        help=f"where the runs are kept (default: the committed ones, {kept.name})",
    )
