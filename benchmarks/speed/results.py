"""Figures of the benchmark, and how they are laid out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.common.table import lay_out
from benchmarks.speed.methods import METHODS

T = TypeVar("T")

TITLES = {
    "time": "step time over that of the floor: median (quartiles) of the rounds",
    "passes": 'step time with passes="auto" over that with "separate": median (quartiles)',
    "memory": "peak memory over that of the plain step, in copies of the gradients",
    "accuracy": "error of the update, relative to the same sum taken in float64",
    "exactness": "distance of the unit updates of a method and of the paper's formula, "
    "by the ratio of the norms",
    "gramian": "error of the Gramian, relative to the product of the norms, by "
    "the number of elements",
    "bandwidth": "Gramian and combination, by dtype and number of tasks",
    "rules": "microseconds from a Gramian to weights, on the CPU, by the number of "
    "tasks: median (quartiles)",
}
"""What the figures of each table are."""

DIGITS = {"memory": ".2f", "bandwidth": ".2f"}


@dataclass(frozen=True)
class Figure:
    """One figure of one table.

    Attributes:
        table: one of :data:`TITLES`.
        tasks: their number; 0 where a column is of a number.
        row: name of the method, or of what is measured.
        column: name of the network, or of the case.
        value: None where the method does not run.
        low: lower quartile, where there is a spread.
        high: upper quartile.
        error: why it does not run.
    """

    table: str
    tasks: int
    row: str
    column: str
    value: float | None
    low: float | None = None
    high: float | None = None
    error: str = ""


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """Give what a run returns, or what it raises, in words."""
    try:
        return run(), ""
    except Exception as error:  # noqa: BLE001  # a peer may raise anything
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def format_table(figures: Sequence[Figure]) -> str:
    """Lay out the figures of one table and number of tasks, and why some are missing.

    Returns:
        A title, a line per row, "-" where there is nothing to measure, "error [n]"
        where a method does not run, and then these errors, each once.
    """
    first = figures[0]
    number = f", K = {first.tasks}" if first.tasks else ""
    title = f"{first.table}{number}: {TITLES[first.table]}"
    columns = list(dict.fromkeys(figure.column for figure in figures))
    rows = list(dict.fromkeys(figure.row for figure in figures))
    places = {(figure.row, figure.column): figure for figure in figures}
    errors = list(dict.fromkeys(figure.error for figure in figures if figure.error))
    cells = [["", *columns]]
    for row in rows:
        found = [places.get((row, column)) for column in columns]
        cells.append([row, *(_cell(figure, errors) for figure in found)])
    notes = [f"[{number}] {error}" for number, error in enumerate(errors, 1)]
    return "\n".join([title, lay_out(cells), *notes])


def format_notes(rows: Sequence[str]) -> str:
    """Say what the methods among these rows do, and what they do differently."""
    notes = [(method.name, method.note) for method in METHODS if method.name in rows]
    return "\n".join(f"{name}: {note}." for name, note in notes)


def _cell(figure: Figure | None, errors: Sequence[str]) -> str:
    if figure is None:
        return "-"
    if figure.value is None:
        return f"error [{errors.index(figure.error) + 1}]"
    digits = DIGITS.get(figure.table, ".1e")
    if figure.low is None or figure.high is None:
        return format(figure.value, digits)
    digits = ".0f" if figure.table == "rules" else ".2f"
    return f"{figure.value:{digits}} ({figure.low:{digits}}-{figure.high:{digits}})"
