"""A picture of all differences to the sum, with their intervals: a forest plot."""

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from benchmarks.uda.methods.rules import ALL_RULES, FLIPS
from benchmarks.uda.methods.steps import ALL_METHODS
from benchmarks.uda.views.compared import Compared, Tasks, compare
from benchmarks.uda.views.style import COLORS, new_figure
from benchmarks.uda.views.verdict import ENOUGH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANGE = (-11.0, 16.0)
"""Of the differences that are drawn, in points; a longer interval is cut."""

# Who cannot tell the colors has the forms.
_LOOKS = {
    "gh": (COLORS["gh"], "o"),
    "gh_projected": (COLORS["gh"], "v"),
    "ghpp": (COLORS["ghpp"], "s"),
    "ghpp_balanced": (COLORS["ghpp"], "D"),
    "ghpp_printed": (COLORS["ghpp_printed"], "^"),
    "sum": (COLORS["sum"], "X"),
}
_ROW, _PANEL, _REST = 0.19, 0.42, 0.5  # inches


_IN_SHORT = ("gh", "ghpp", "sum x 2", "sum x 4")


def draw_in_short(tasks: Tasks) -> "Figure":
    """Draw the paper's rules and larger weights of the sum alone, where ten seeds ran."""
    return draw_forest(tasks, _IN_SHORT)


def draw_forest(tasks: Tasks, only: Collection[str] = ()) -> "Figure":
    """Draw a column for each task, a panel for each method, a line for each difference.

    But for those of changed signs, which are far outside. Filled is what an interval tells
    from zero. With ``only``, draw these lines, and of them those that enough seeds made.
    """
    found = {
        task: [
            one
            for one in compare(runs)
            if one.difference is not None and one.rule not in FLIPS
            if not only or (one.name in only and one.pairs >= ENOUGH)
        ]
        for task, runs in tasks.items()
    }
    names = _names_by_method([one for own in found.values() for one in own])
    counts = [len(rules) for rules in names.values()]
    figure = new_figure(_ROW * sum(counts) + _PANEL * len(counts) + _REST)
    grid = figure.subplots(
        len(names),
        len(found),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=counts,
    )
    for row, (method, rules) in zip(grid, names.items(), strict=True):
        for axes, (task, own) in zip(row, found.items(), strict=True):
            axes.set_title(f"{method}, {task}", fontsize=9, loc="left", weight="bold")
            for one in own:
                if one.method == method:
                    _draw(axes, rules.index(one.name), one)
            axes.axvline(0, color="0.4", linewidth=1, zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="x", alpha=0.25)
            axes.tick_params(labelsize=8)
        row[0].set(xlim=RANGE, ylim=(len(rules) - 0.4, -0.6))
        row[0].set_yticks(range(len(rules)), rules)
    figure.supxlabel(
        "points above the sum at the same weight (the sum's own: above weight 1), mean of "
        "paired seeds\nand 95 % interval; filled where it is free of zero; in brackets how "
        "many seeds, where fewer than ten",
        fontsize=8,
    )
    return figure


def _names_by_method(found: Sequence[Compared]) -> dict[str, list[str]]:
    """List what a method's panel has lines for: rules, rules at larger weights, the sum."""

    def place(one: Compared) -> tuple[bool, float, int]:
        return one.rule == "sum", one.weight, [*ALL_RULES].index(one.rule)

    ordered = sorted(found, key=place)
    return {
        method: [*dict.fromkeys(one.name for one in ordered if one.method == method)]
        for method in ALL_METHODS
        if any(one.method == method for one in found)
    }


def _draw(axes: "Axes", place: int, one: Compared) -> None:
    """Draw a line: the interval, cut at the edge, the mean, and that in figures."""
    found = one.difference
    if found is None:
        raise ValueError("one must be compared with a sum, got no difference")
    color, form = _LOOKS[one.rule]
    if math.isfinite(found.margin):
        low, high = max(found.low, RANGE[0]), min(found.high, RANGE[1])
        axes.hlines(place, low, high, color=color, linewidth=1.4)
    inside = "white" if found.is_noise else color
    axes.plot(
        [found.mean], [place], form, color=color, markersize=5, markerfacecolor=inside
    )
    few = "" if one.pairs >= ENOUGH else f" ({one.pairs})"
    axes.text(
        1.01,
        place,
        f"{found.mean:+.1f}{few}",
        transform=axes.get_yaxis_transform(),
        va="center",
        fontsize=7.5,
        weight="normal" if found.is_noise else "bold",
    )
