"""Print what a harmonized step sends and keeps on many GPUs, or check it on a few."""

import argparse
from collections.abc import Sequence

from benchmarks.scaling.check import check, format_lines
from benchmarks.scaling.table import format_tables


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 1 if a count disagrees with the model.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scaling", description=__doc__
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run small networks on gloo ranks and compare what they send and keep",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[2, 4],
        metavar="N",
        help="numbers of ranks for --check (default: 2 4)",
    )
    options = parser.parse_args(arguments)
    if not options.check:
        print(format_tables())
        return 0
    lines = check(options.ranks)
    wrong = sum(not line.agrees for line in lines)
    print(f"{format_lines(lines)}\n\n{len(lines) - wrong} of {len(lines)} cases agree.")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
