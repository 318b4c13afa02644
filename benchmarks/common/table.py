"""One layout of columns for all tables."""

from collections.abc import Sequence


def lay_out(
    rows: Sequence[Sequence[str]], names: int = 1, *, underline: bool = True
) -> str:
    """Align columns: the names to the left, the numbers to the right.

    Args:
        rows: of as many cells each; the first is the head.
        names: number of columns that hold names, from the first.
        underline: draw a line below the head.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < names else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if underline:
        lines.insert(1, "-" * sum(widths, 2 * (len(widths) - 1)))
    return "\n".join(lines)
