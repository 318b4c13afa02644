"""Pictures of the paper's figures beside ours: Table 3, figures 2 and 9."""

import math
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import TYPE_CHECKING

from benchmarks.uda.methods.steps import ALL_METHODS, SOURCE_ONLY
from benchmarks.uda.runs.records import Run
from benchmarks.uda.views.compared import Tasks, by_seed, compare
from benchmarks.uda.views.forest import RANGE
from benchmarks.uda.views.paper_table import PAPER
from benchmarks.uda.views.style import COLORS, LABELS, draw_curve, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER_OBTUSE = {
    ("mnist-usps", "MCD"): 42.0,
    ("mnist-usps", "DWL"): 37.0,
    ("usps-mnist", "MCD"): 40.0,
}
"""Shares of obtuse angles that the paper states, in percent: figures 2 and 12."""

_FORMS = {"sum": "X", "gh": "o", "ghpp": "s"}
_SHIFTS = {"sum": -0.24, "gh": 0.0, "ghpp": 0.24}


def draw_table3(tasks: Tasks) -> "Figure":
    """Draw accuracies and what the rules gain: the paper's hollow, ours filled."""
    figure = new_figure(6.2)
    grid = figure.subplots(2, len(tasks), sharey=True, sharex="row", squeeze=False)
    methods = [one for one in ALL_METHODS if any((t, one) in PAPER for t in tasks)]
    for (levels, gains), (task, runs) in zip(grid.T, tasks.items(), strict=True):
        ours = {(one.method, one.name): one for one in compare(runs)}
        for place, method in enumerate(methods):
            paper = PAPER.get((task, method), {})
            for rule, figure_of_paper in paper.items():
                at = place + _SHIFTS[rule]
                own = ours.get((method, rule))
                _mark(levels, at, rule, figure_of_paper)
                if own:
                    values = [run.accuracy for run in own.runs]
                    spread = stdev(values) if len(values) > 1 else math.nan
                    _mark(levels, at, rule, mean(values), spread)
                if rule != "sum":
                    _mark(gains, at, rule, figure_of_paper - paper["sum"])
                if own and own.difference:
                    found = own.difference
                    _mark(gains, at, rule, found.mean, found.margin)
        levels.set_title(task, fontsize=10)
        levels.set_xlabel("accuracy in percent, +- standard deviation", fontsize=8)
        gains.set_xlabel("points above the sum, and 95 % interval", fontsize=8)
        gains.set_xlim(*RANGE)
        gains.axvline(0, color="0.4", linewidth=1, zorder=0)
    _finish(figure, [*grid.flat], methods)
    return figure


def draw_angles(tasks: Tasks) -> "Figure":
    """Draw the shares of obtuse angles under the sum, of every seed, beside the null line."""
    figure = new_figure(3.0)
    grid = figure.subplots(1, len(tasks), sharey=True, sharex=True, squeeze=False)[0]
    methods = [one for one in ALL_METHODS if one != SOURCE_ONLY]
    for axes, (task, runs) in zip(grid, tasks.items(), strict=True):
        for place, method in enumerate(methods):
            own = by_seed(runs, method, "sum", 1.0).values()
            shares = [one.obtuse for one in own if one.obtuse is not None]
            if shares:
                axes.plot(
                    shares, [place] * len(shares), "|", color=COLORS["sum"], alpha=0.6
                )
                axes.plot([median(shares)], [place], "X", color=COLORS["sum"])
            if (task, method) in PAPER_OBTUSE:
                _mark(axes, place, "sum", PAPER_OBTUSE[task, method])
        axes.axvline(50, color="0.4", linestyle="--", linewidth=1, zorder=0)
        axes.text(50.4, -0.35, "unrelated gradients", fontsize=7, va="center")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(
            "obtuse angles, percent of the steps: each seed and the median", fontsize=8
        )
        axes.set_xlim(30, 85)
    _finish(figure, [*grid], methods, rules=["sum"])
    return figure


def draw_errors(tasks: Tasks) -> "Figure":
    """Draw test errors over training as figure 9 does, one panel per method and task."""
    methods = [
        method
        for method in ALL_METHODS
        if any(by_seed(runs, method, "gh", 1.0) for runs in tasks.values())
    ]
    figure = new_figure(0.8 + 2.1 * len(tasks))
    grid = figure.subplots(
        len(tasks), len(methods), sharex=True, sharey="row", squeeze=False
    )
    for row, (task, runs) in zip(grid, tasks.items(), strict=True):
        source = [*by_seed(runs, SOURCE_ONLY, "sum", 1.0).values()]
        for axes, method in zip(row, methods, strict=True):
            if source:
                draw_curve(axes, _errors(source), "source only", "black", ":")
            for rule, form in (("sum", "-"), ("gh", "--"), ("ghpp", "-.")):
                own = [*by_seed(runs, method, rule, 1.0).values()]
                if own:
                    draw_curve(axes, _errors(own), LABELS[rule], COLORS[rule], form)
            axes.set_title(f"{method}, {task}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("target test error, %", fontsize=8)
        row[0].set_ylim(0, 60)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    for axes in grid[-1]:
        axes.set_xlabel("training step", fontsize=8)
    return figure


def _errors(runs: Sequence[Run]) -> list[list[tuple[int, float]]]:
    return [run.errors for run in runs]


def _mark(
    axes: "Axes", at: float, rule: str, value: float, margin: float | None = None
) -> None:
    """Draw a figure of the paper, hollow; with a margin one of ours, and its interval."""
    color, ours = COLORS[rule], margin is not None
    if margin is not None and math.isfinite(margin):
        axes.hlines(at, value - margin, value + margin, color=color, linewidth=1.4)
    inside = color if ours else "white"
    axes.plot([value], [at], _FORMS[rule], color=color, markerfacecolor=inside)


def _finish(
    figure: "Figure",
    panels: Sequence["Axes"],
    methods: Sequence[str],
    rules: Sequence[str] = tuple(_FORMS),
) -> None:
    """Name the methods, and say what the marks are."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.5, -0.5)
    marks = []
    for inside in (COLORS, dict.fromkeys(COLORS, "white")):
        for rule in rules:
            form, color = _FORMS[rule], COLORS[rule]
            marks += panels[0].plot(
                [], [], form, color=color, markerfacecolor=inside[rule]
            )
    words = [
        f"{LABELS[r]}, {whose}" for whose in ("ours", "the paper's") for r in rules
    ]
    figure.legend(
        marks, words, loc="outside lower center", ncols=len(rules) * 2, fontsize=8
    )
